"""FusionBench's five scripts, as recipes: merged and evaluated word for word, on copies of everything that are tiny.

The working directory holds models and data sets under the names that the recipes give them on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.continual.tiny_clip import save_tiny_clip  # noqa: E402

from magmax.continual.benchmark import Benchmark  # noqa: E402
from magmax.continual.context import build_context  # noqa: E402
from magmax.continual.data.scenarios import published_order  # noqa: E402
from magmax.continual.experiment import Experiment  # noqa: E402
from magmax.continual.experiment_file import read_experiment  # noqa: E402

RECIPES = Path(__file__).parents[2] / "benchmarks" / "continual" / "fusion_bench"
HUB = json.loads(files("magmax.continual.data").joinpath("hub.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, while this module's tests run."""
    place = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MAGMAX_CACHE", str(place / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for seed, name in enumerate(HUB["pools"]["tall14"]):
            save_data(place, HUB["sets"][name], seed)
        for size in ("32", "16"):
            base = save_tiny_clip(place / f"openai/clip-vit-base-patch{size}", seed=int(size))
            tensors = load_file(base / "model.safetensors")
            for recipe in RECIPES.glob(f"vit-b{size}-*.yaml"):
                for seed, model in enumerate(given(read_experiment(str(recipe)))):
                    save_tower(place / model, tensors, seed)
        yield place


def save_data(place: Path, told: dict[str, Any], seed: int) -> None:
    """Parquet files with the columns that the hub's have: a small picture of each class for training, two for test."""
    names = told.get("classes") or ["one", "two", "three"][: 2 + seed % 2]
    label = datasets.Value("int64") if "classes" in told else datasets.ClassLabel(names=names)
    columns = {told.get("image", "image"): datasets.Image(), told.get("label", "label"): label}
    for split, each in (("train", 1), ("test", 2)):
        random = np.random.default_rng([seed, each])
        pictures = [
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(each * len(names))
        ]
        content = dict(zip(columns, (pictures, [*range(len(names))] * each), strict=True))
        folder = place / told["path"] / "data"
        folder.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(content, datasets.Features(columns))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def save_tower(folder: Path, tensors: dict[str, Any], seed: int) -> None:
    """As FusionBench stores a fine-tuned CLIP: the image tower, without the projection."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tower = {
        key: value + 0.05 * torch.randn(value.shape, generator=generator)
        for key, value in tensors.items()
        if key.startswith("vision_model.") and value.is_floating_point()
    }
    save_file(tower, folder / "model.safetensors")


def given(experiment: Experiment) -> list[str]:
    """The checkpoints that a recipe names."""
    training = experiment.training[0]
    return training["external"]["models"] if isinstance(training, dict) else []


def measured(recipe: str, world: Path, *changes: str) -> tuple[Experiment, dict[str, dict[str, Any]]]:
    torch.set_num_threads(1)
    experiment = read_experiment(str(RECIPES / f"{recipe}.yaml"), changes)
    with ThreadPoolExecutor(1) as pool:
        found = Benchmark(experiment, world / "out" / recipe, pool).run()
    return experiment, {record["method"]: record for record in found}


@pytest.mark.parametrize(("recipe", "size", "tasks"), [("vit-b32-ta8", 32, 8), ("vit-b16-ta8", 16, 8)])
def test_eight_checkpoints_are_merged_and_evaluated(recipe: str, size: int, tasks: int, world: Path) -> None:
    experiment, found = measured(recipe, world)
    assert set(found) == {
        "zero_shot",
        *(f"{rule}/external" for rule in ("magmax", "average", "task_arithmetic", "ties")),
    }
    (row,) = found["magmax/external"]["variants"][0]["rows"].values()
    assert row["tasks"] == plain_accuracies(experiment, size, 0.5)
    assert len(row["tasks"]) == tasks
    assert row["tasks"] != found["zero_shot"]["variants"][0]["rows"]["8"]["tasks"]


def plain_accuracies(experiment: Experiment, size: int, factor: float) -> list[float]:
    """transformers' own model with the merge put in, one data set after another, among its own classes alone."""
    here = build_context(experiment, 0)
    path = f"openai/clip-vit-base-patch{size}"
    base = load_file(f"{path}/model.safetensors")
    merged = dict(base)
    for key in load_file(Path(given(experiment)[0]) / "model.safetensors"):
        largest = torch.zeros_like(base[key])
        for model in given(experiment):
            tau = load_file(Path(model) / "model.safetensors")[key] - base[key]
            largest = torch.where(tau.abs() >= largest.abs(), tau, largest)
        merged[key] = base[key] + factor * largest
    model = transformers.CLIPModel.from_pretrained(path)
    model.load_state_dict(merged, strict=False)
    processor = transformers.CLIPImageProcessor.from_pretrained(path)
    shares: list[float] = []
    for task in here.tasks:
        table = datasets.load_dataset("parquet", data_dir=HUB["sets"][task.name]["path"])["test"]
        image, label = HUB["sets"][task.name].get("image", "image"), HUB["sets"][task.name].get("label", "label")
        with torch.inference_mode():
            pixels = processor(images=[row.convert("RGB") for row in table[image]], return_tensors="pt")
            features = model.visual_projection(model.vision_model(**pixels).pooler_output)
            logits = torch.nn.functional.normalize(features, dim=-1) @ here.head[list(task.classes)].T
        shares.append(float(np.mean(logits.argmax(1).numpy() == np.array(table[label]))))
    return shares


def test_fourteen_checkpoints_are_merged_and_evaluated(world: Path) -> None:
    experiment, found = measured("vit-b32-tall14", world)
    (row,) = found["magmax/external"]["variants"][0]["rows"].values()
    assert row["tasks"] == plain_accuracies(experiment, 32, 0.5)
    assert len(row["tasks"]) == 14


def test_the_sweep_has_a_row_for_each_factor(world: Path) -> None:
    experiment, found = measured("vit-b32-ta8-sweep", world)
    variants = {v["scaling_factor"]: v["rows"]["8"]["tasks"] for v in found["magmax/external"]["variants"]}
    assert sorted(variants) == [k / 10 for k in range(1, 11)]
    assert variants[0.8] == plain_accuracies(experiment, 32, 0.8)


def test_sequential_fine_tuning_and_merge_and_no_training_the_second_time(world: Path) -> None:
    """Two steps of a data set instead of 2000; all else as the recipe has it."""
    few = ("fit.steps=2", "fit.batch=4")
    experiment, found = measured("vit-b32-sequential", world, *few)
    assert [task.name for task in build_context(experiment, 0).tasks] == published_order("data_sets", "eight")
    assert set(found) == {"zero_shot", "last/sequential", "magmax/sequential"}
    assert list(found["magmax/sequential"]["variants"][0]["rows"]) == [str(i) for i in range(1, 9)]
    checkpoints = {path: path.stat().st_mtime_ns for path in world.glob("out/vit-b32-sequential/training/*/theta_*")}
    assert len(checkpoints) == 9
    (world / "out" / "vit-b32-sequential" / "cells.jsonl").unlink()
    again = measured("vit-b32-sequential", world, *few)[1]
    assert again["magmax/sequential"]["variants"] == found["magmax/sequential"]["variants"]
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints
