"""Previews against the exact merge, and what is written against the command line."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from tests.continual import toys  # noqa: E402
from tests.continual.conftest import tiny_encoder  # noqa: E402

import magmax  # noqa: E402
from magmax import cli  # noqa: E402
from magmax.checkpoints import open_checkpoint  # noqa: E402
from magmax.continual.data.scenarios import Task  # noqa: E402
from magmax.continual.experiment import Experiment  # noqa: E402
from magmax.continual.training.trainer import ContinualTraining  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402
from magmax.merging.execution.execution_options import ExecutionOptions  # noqa: E402
from magmax.preference.archive import Archive  # noqa: E402
from magmax.preference.archive_writer import write_archive  # noqa: E402
from magmax.rules import Tunable  # noqa: E402
from magmax.ui.preview import PreviewMerges  # noqa: E402
from magmax.ui.sources import open_source  # noqa: E402
from magmax.ui.view_model import DEFAULT_FACTOR, MAGMAX_PRESET, Preview, TunerModel, user_samples  # noqa: E402

EXPERIMENT = Experiment(**toys.RECIPE, validation=10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training."""
    run = tmp_path_factory.mktemp("ui") / "run"
    ContinualTraining(EXPERIMENT, run, seed=1).run()
    return run


@pytest.fixture(scope="module")
def archived(trained: Path) -> Path:
    """An archive of the same."""
    base = open_checkpoint(str(trained / "theta_0.safetensors"))
    models = [open_checkpoint(str(trained / f"theta_{t}.safetensors"), base=base) for t in (1, 2, 3)]
    names = ["theta_1", "theta_2", "theta_3"]
    out = trained.parent / "archive"
    write_archive(base, models, names, out, top=0.5, bits=8, base_given=str(base.path), execution=ExecutionOptions())
    return out


@pytest.fixture(params=["run", "archive"])
def tuner(request: pytest.FixtureRequest, trained: Path, archived: Path) -> TunerModel:
    if request.param == "run":
        return TunerModel.open(open_source(trained), 30)
    return TunerModel.open(open_source(archived, trained / "recipe.json"), 30)


def vectors(models: Sequence[dict[str, Any]], base: dict[str, Any]) -> Any:
    """All task vectors, flat, shape (tasks, elements)."""
    return torch.stack([torch.cat([(m[k] - base[k]).flatten() for k in base]) for m in models])


def right(tuner: TunerModel, path: Path) -> list[float]:
    """The share of each task's examples in the sample that a model of the toy experiment gets right, among all."""
    encoder = toys.encoder()
    encoder.model.load_state_dict(load_file(path))
    encoder.model.eval()
    with torch.no_grad():
        found = (encoder(tuner.examples.items) @ tuner.context.head.T).argmax(1).numpy()
    return [
        float(np.mean([f == c for f, c in zip(found, tuner.examples.labels, strict=True) if c in task.classes]))
        for task in tuner.context.tasks
    ]


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """A command as a user types it."""
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [5.0, 0.0, 1.0], [0.0, 2.0, 0.0], None], ids=str)
def test_a_preview_is_nearly_the_exact_merge(tuner: TunerModel, tmp_path: Path, weights: list[float] | None) -> None:
    chosen = tuner.natural_counts if weights is None else weights
    told: list[float] = []
    tuner.write_merge(chosen, 0.8, tmp_path / "exact.safetensors", told.append)
    exact = load_file(tmp_path / "exact.safetensors")
    found = tuner.preview(chosen, 0.8)
    state = tuner.context.encoder.model.state_dict()
    others = sum(int((state[key] != exact[key]).sum()) for key in exact)
    sure = weights is None or sum(weight > 0 for weight in weights) == 1
    assert others <= (0 if sure else 6), "the sample is everything: all but the last few elements have their task"
    if sure:
        assert list(found.task_accuracies) == right(tuner, tmp_path / "exact.safetensors")
    assert told
    assert max(told) <= 1


def test_references_are_what_they_say(trained: Path, tmp_path: Path) -> None:
    tuner = TunerModel.open(open_source(trained), 30)
    base, *models = (load_file(trained / f"theta_{t}.safetensors") for t in range(4))
    taus = vectors(models, base)
    at = 2 - taus.abs().flip(0).argmax(0)
    assert tuner.natural_counts == [float((at[taus.ne(0).any(0)] == t).sum()) for t in range(3)]
    magmax.merge(
        "magmax",
        str(trained / "theta_0.safetensors"),
        tuner.source.model_paths,
        DEFAULT_FACTOR,
        tmp_path / "m.safetensors",
    )
    paths = [trained / "theta_0.safetensors", trained / "theta_3.safetensors", tmp_path / "m.safetensors"]
    assert [list(mark.task_accuracies) for mark in tuner.reference_previews.values()] == [
        right(tuner, path) for path in paths
    ]
    assert list(tuner.reference_previews) == ["Zero-shot", "Last model", MAGMAX_PRESET]


def test_a_chain_of_a_benchmark_needs_its_recipe_alone(trained: Path, tmp_path: Path) -> None:
    for path in trained.glob("theta_*"):
        shutil.copy(path, tmp_path)
    found = TunerModel.open(open_source(tmp_path, EXPERIMENT, 1), 30)
    assert (
        found.reference_previews[MAGMAX_PRESET].task_accuracies
        == TunerModel.open(open_source(trained), 30).reference_previews[MAGMAX_PRESET].task_accuracies
    )


def test_the_sample_is_balanced(tuner: TunerModel) -> None:
    assert [len(task.rows(tuner.examples.labels)) for task in tuner.context.tasks] == [10, 10, 10]
    assert tuner.preview([1, 1, 1], 0.5).example_counts == [10, 10, 10]
    again = TunerModel.open(tuner.source, 30)
    assert all((a == b).all() for a, b in zip(again.examples.items, tuner.examples.items, strict=True))


def test_previews_are_scored_on_validation_examples_alone(tuner: TunerModel, trained: Path, tmp_path: Path) -> None:
    def contents(data: Any) -> set[bytes]:
        return {item.tobytes() for item in data.items}

    seen = contents(tuner.examples)
    assert len(seen) == 30
    assert seen <= contents(tuner.context.validation)
    assert not seen & (contents(tuner.context.test) | contents(tuner.context.train))
    assert "validation" in tuner.examples_source
    without = json.loads((trained / "recipe.json").read_text()) | {"validation": 0}
    (tmp_path / "recipe.json").write_text(json.dumps(without))
    for theta in trained.glob("theta_*"):
        shutil.copy(theta, tmp_path)
    with pytest.raises(MagMaxError, match=r"holds out no validation examples.*--samples.*validation=10"):
        TunerModel.open(open_source(tmp_path), 30)


def test_the_intervals_are_wilsons_and_those_of_means_narrower() -> None:
    stats = pytest.importorskip("scipy.stats")
    found = Preview([1.0, 0.25, 0.0, 0.5], [7, 24, 1, 400], 0.1)
    for share, count, interval in zip(found.task_accuracies, found.example_counts, found.intervals, strict=True):
        expected = stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
        assert interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    alone = [0.0, 1.0, 0.0, 0.0]
    assert found.mean_interval(alone) == pytest.approx(found.intervals[1])
    equal = Preview([0.5] * 4, [24] * 4, 0.1)
    low, high = equal.mean_interval([1.0] * 4)
    assert (high - low) * 2 == pytest.approx(equal.intervals[0][1] - equal.intervals[0][0])
    assert low < equal.mean < high


def test_what_is_written_is_what_the_commands_write(
    tuner: TunerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (weights, factor) in enumerate(
        [([41.0, 0.0, 7.5], 0.65), (tuner.natural_counts, 0.5), ([1 / 3, 1.0, 2.0], 1.0)]
    ):
        tuner.write_merge(weights, factor, tmp_path / f"{number}.safetensors", lambda share: None)
        expected = (tmp_path / f"{number}.safetensors").read_bytes()
        run(monkeypatch, shlex.split(tuner.command(weights, factor)))
        assert Path("tuned.safetensors").read_bytes() == expected
        if tuner.source.archive is None:
            Path("tuned.safetensors").unlink()
            Path("recipe.yaml").write_text(tuner.recipe(weights, factor))
            run(monkeypatch, ["magmax", "merge", "recipe.yaml"])
            assert Path("tuned.safetensors").read_bytes() == expected


@pytest.mark.parametrize("kept", [1.0, 0.3], ids=["full", "archive"])
def test_quotas_of_the_whole_follow_from_a_sample(tmp_path: Path, kept: float) -> None:
    """From 200 000 elements: shares within 0.5 %, and as much magnitude retained as exactly, within 0.5 %."""
    random = np.random.default_rng(0)
    base = {"a": np.zeros((300, 1000), np.float32), "b": np.zeros(300_000, np.float32), "c": np.ones(9, np.float32)}
    models = [
        {
            key: (t + 1) * random.normal(size=value.shape).astype(np.float32) if key != "c" else value
            for key, value in base.items()
        }
        for t in range(3)
    ]
    opened = open_checkpoint(base, "base")
    others = [open_checkpoint(model, f"model {t}") for t, model in enumerate(models)]
    if kept < 1:
        write_archive(
            opened,
            others,
            ["x", "y", "z"],
            tmp_path / "archive",
            top=kept,
            bits=8,
            base_given=None,
            execution=ExecutionOptions(),
        )
        others = Archive(tmp_path / "archive").models(opened)
    held = PreviewMerges.read(opened, others)
    assert held.sampled_columns.magnitudes.shape[1] < 0.6 * sum(held.natural_counts)
    assert "c" not in {block.address.key for block in held.blocks}
    for weights in ([1, 1, 1], [6, 1, 0], [1, 10, 4]):
        priced = held.assignment(weights)
        taus = np.concatenate([np.stack(block.task_vectors) for block in held.blocks], axis=1)
        winners = np.concatenate([priced.winners(block) for block in held.blocks])[taus.any(axis=0)]
        shares = np.bincount(winners, minlength=3) / len(winners)
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 0.005
        given = [{b.address.key + str(b.address.offset): b.task_vectors[t] for b in held.blocks} for t in range(3)]
        zero = {key: np.zeros_like(value) for key, value in given[0].items()}
        best = magmax.merge(Tunable(preference=weights), zero, given, 1.0)
        exact = np.abs(np.concatenate(list(best.values()))).sum()
        assert np.abs(taus[:, taus.any(axis=0)][winners, np.arange(len(winners))]).sum() == pytest.approx(
            exact, rel=0.005
        )


def test_presets_are_kept_in_the_archive(trained: Path, archived: Path, tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    shutil.copytree(archived, folder)
    about = json.loads((folder / "archive.json").read_text())
    about["base"]["path"] = str(trained / "theta_0.safetensors")
    (folder / "archive.json").write_text(json.dumps(about))
    tuner = TunerModel.open(open_source(folder, EXPERIMENT, 1), 30)
    assert list(tuner.presets) == [MAGMAX_PRESET, "Equal", "Early tasks", "Late tasks"]
    tuner.store_preset(" shop ", [3.0, 0.0, 1.0])
    assert tuner.presets["shop"] == [3.0, 0.0, 1.0]
    assert Archive(folder).preset("shop") == {"theta_1": 3.0, "theta_2": 0.0, "theta_3": 1.0}
    for name, weights, said in (("shop", [1.0] * 3, "taken"), (" ", [1.0] * 3, "none"), ("x", [0.0] * 3, "above 0")):
        with pytest.raises(MagMaxError, match=said):
            tuner.store_preset(name, weights)
    with pytest.raises(MagMaxError, match="kept in archives"):
        TunerModel.open(open_source(trained), 30).store_preset("shop", [1.0, 1.0, 1.0])


def test_own_samples(tmp_path: Path) -> None:
    tasks = (Task("Task 1", (0, 2)), Task("Task 2", (1,)))
    here: Any = SimpleNamespace(encoder=tiny_encoder(), tasks=tasks, classes=["cats", "dogs", "fish"])
    file = tmp_path / "mine.csv"
    file.write_text("text,label\n3 4,cats\n5,1\n6 7 8,dogs\n")
    found = user_samples(here, file)
    assert found.labels.tolist() == [0, 1, 1]
    assert [list(item) for item in found.items] == [[4, 5], [6], [7, 8, 9]]
    for content, said in (("3,cat", "'cat' is no class.*cats"), ("3,fish", "no sample of Task 2")):
        file.write_text(f"text,label\n{content}\n")
        with pytest.raises(MagMaxError, match=said):
            user_samples(here, file)
    here.encoder = toys.encoder()
    with pytest.raises(MagMaxError, match="samples are texts"):
        user_samples(here, file)


def test_refusals(trained: Path, archived: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    shutil.copytree(trained, few)
    (few / "theta_3.safetensors").unlink()
    with pytest.raises(MagMaxError, match="models of 2 tasks, and the recipe has 3"):
        TunerModel.open(open_source(few), 30)
    (few / "theta_2.safetensors").unlink()
    with pytest.raises(MagMaxError, match="1 trained checkpoint"):
        open_source(few)
    (few / "recipe.json").write_text('{"data": 1}')
    with pytest.raises(MagMaxError, match="is not the recipe"):
        open_source(few)
    with pytest.raises(MagMaxError, match="neither the folder of a training"):
        open_source(tmp_path)
    (few / "recipe.json").unlink()
    for folder in (archived, few):
        with pytest.raises(MagMaxError, match="name the experiment with --recipe"):
            open_source(folder)
    with pytest.raises(MagMaxError, match="leave out --recipe"):
        open_source(trained, EXPERIMENT)
    with pytest.raises(MagMaxError, match="one weight for each of 3 tasks"):
        TunerModel.open(open_source(trained), 30).preview([0, 0, 0], 0.5)
