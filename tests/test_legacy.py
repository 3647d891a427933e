"""What earlier versions stored still opens; what users write in the old names is refused with the new ones."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.models import load_tensors, same_bytes, save_tensors, small_model

import magmax
from magmax import MagMaxError, legacy
from magmax.rules import rule_from


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("magmax", "magmax"),
        ({"dare": {"drop": 0.9, "seed": 3}}, {"dare": {"density": 0.1, "seed": 3}}),
        ({"dare": {"drop": {"layers": [0.5, 0.9], "outside": "first"}}},
         {"dare": {"density": {"layers": [0.5, 0.1], "outside": "first"}}}),
        ({"dare": {"drop": [0.1, {"value": 0.25}]}}, {"dare": {"density": [0.9, {"value": 0.75}]}}),
        ({"chain": [{"prune": {"keep": 0.2, "which": "top"}}, {"ties": {"density": 0.5}}]},
         {"chain": [{"prune": {"density": 0.2, "which": "top"}}, {"ties": {"density": 0.5}}]}),
        ([{"prune": {"keep": 1.0}}, "magmax"], [{"prune": {"density": 1.0}}, "magmax"]),
    ],
)  # fmt: skip
def test_a_stored_rule_gets_todays_options_and_todays_rules_stay(old: Any, new: Any) -> None:
    assert legacy.modern_rule(old) == new
    assert legacy.modern_rule(new) == new


@pytest.mark.parametrize(
    ("rule", "hint"),
    [
        ({"dare": {"drop": 0.9}}, r"dare has no option 'drop'; it is now density, the fraction kept: density: 0\.1$"),
        ({"dare": {"drop": [0.9, 0.5]}}, r"dare has no option 'drop'; it is now density, the fraction kept$"),
        ({"prune": {"keep": 0.2}}, r"prune has no option 'keep'; it is now density$"),
    ],
)
def test_an_old_option_is_refused_with_the_new_one(rule: Any, hint: str) -> None:
    with pytest.raises(MagMaxError, match=hint):
        rule_from([rule, "magmax"])


def test_a_running_merge_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    base, *models = (save_tensors(small_model(n), tmp_path / f"{n}.safetensors") for n in range(3))
    rule = rule_from([{"dare": {"density": 0.5, "seed": 7}}, "magmax"])
    state = tmp_path / "state"
    magmax.Running(state, rule, base).absorb(models[0])
    manifest = state / "state.json"
    content = json.loads(manifest.read_text())
    assert "density" in json.dumps(content["rule"])
    manifest.write_text(json.dumps(content).replace('"density": 0.5', '"drop": 0.5'))
    running = magmax.Running(state)
    running.absorb(models[1])
    running.result(out=tmp_path / "running.safetensors")
    whole = magmax.merge(rule, base, models, out=tmp_path / "whole.safetensors")
    assert same_bytes(load_tensors(tmp_path / "running.safetensors"), load_tensors(whole))


@pytest.fixture
def benchmark(tmp_path: Path) -> tuple[Any, Path]:
    """A finished benchmark of two ways to train, as an earlier version left it: old keys, old digests, old folders."""
    pytest.importorskip("transformers")
    from tests.continual import toys

    from magmax.continual.benchmark import Benchmark
    from magmax.continual.cell_store import CellStore
    from magmax.continual.experiment import Experiment, digest_of

    experiment = Experiment.model_validate(
        {**toys.RECIPE, "seeds": [0], "training": ["sequential", "independent"],
         "rules": ["magmax", [{"dare": {"density": 0.5, "seed": 1}}, "average"]]}
    )  # fmt: skip
    out = tmp_path / "bench"
    with ThreadPoolExecutor(1) as executor:
        Benchmark(experiment, out, executor).run()
    store = CellStore(out)
    (out / "cells").mkdir()
    for number, record in enumerate(store.records()):
        old = {key: value for key, value in record.items() if key not in ("training", "recipe", "digest")}
        recipe = legacy.old_training_recipe(record["recipe"])
        recipe["rule"] = json.loads(json.dumps(recipe["rule"]).replace('"density": 0.5', '"drop": 0.5'))
        method = record["method"].replace("density=0.5", "drop=0.5")
        old |= {"method": method, "chain": record["training"], "recipe": recipe, "digest": digest_of(recipe)}
        (out / "cells" / f"{number}.json").write_text(json.dumps(old))
    store.file.unlink()
    for folder in (out / "training").iterdir():
        name = folder.name.rpartition("-seed")[0]
        digest = digest_of(legacy.old_training_recipe(experiment.training_recipe(0, name)))
        (out / "chains").mkdir(exist_ok=True)
        folder.rename(out / "chains" / f"{name}-seed0-{digest[:8]}")
    (out / "training").rmdir()
    return experiment, out


def test_a_benchmark_of_an_earlier_version_is_not_measured_again(benchmark: tuple[Any, Path], monkeypatch: Any) -> None:
    from magmax.continual import benchmark as module

    experiment, out = benchmark
    monkeypatch.setattr(module, "run_cell", None)
    monkeypatch.setattr(module, "run_training", None)
    with ThreadPoolExecutor(1) as executor:
        records = module.Benchmark(experiment, out, executor).run()
    assert len(records) == len(experiment.cells())
    assert {record["training"] for record in records} == {"zero_shot", "sequential", "independent"}
    assert "dare(density=0.5,seed=1)+average/sequential" in {record["method"] for record in records}


def test_checkpoints_of_an_earlier_version_are_merged_by_a_new_rule(benchmark: tuple[Any, Path]) -> None:
    from magmax.continual.benchmark import Benchmark

    experiment, out = benchmark
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("chains/*/theta_*")}
    assert len(stamps) == 2 * 4
    more = experiment.model_copy(update={"rules": [*experiment.rules, "task_arithmetic"]})
    with ThreadPoolExecutor(1) as executor:
        assert len(Benchmark(more, out, executor).run()) == len(more.cells())
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert not (out / "training").exists()


def test_results_of_an_earlier_version_are_studied(benchmark: tuple[Any, Path]) -> None:
    from magmax.analysis.run_folders import load_results

    _, out = benchmark
    run = load_results(out)
    assert {origin.training for origin in run.checkpoints} == {"sequential", "independent"}
    assert all(len(paths) == 4 for paths in run.checkpoints.values())


def test_a_training_of_an_earlier_version_goes_on_and_is_known_by_the_page(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("transformers")
    from tests.continual import toys

    from magmax.continual.experiment import Experiment
    from magmax.continual.progress import no_bars
    from magmax.continual.training import trainer
    from magmax.ui.sources import read_training_recipe

    experiment = Experiment.model_validate({**toys.RECIPE, "seeds": [0], "training": ["sequential"]})
    rule = rule_from([{"dare": {"density": 0.5}}, "magmax"]).describe()
    training = trainer.ContinualTraining(experiment, tmp_path / "run", "sequential", rule, 0)
    recipe = training.recipe()
    first = training.run(no_bars)
    old = {key: value for key, value in recipe.items() if key != "training"} | {"chain": recipe["training"]}
    (tmp_path / "run" / trainer.RECIPE_FILE).write_text(json.dumps(old).replace('"density": 0.5', '"drop": 0.5'))
    assert trainer.ContinualTraining(experiment, tmp_path / "run", "sequential", rule, 0).run(no_bars) == first
    found = read_training_recipe(tmp_path / "run" / trainer.RECIPE_FILE)
    assert (list(found.training_choices), found.seeds[0]) == (["sequential"], 0)


def test_an_old_key_of_an_experiment_is_refused_with_its_line_and_the_new_one(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.continual import toys

    from magmax.continual.experiment_file import read_experiment

    file = toys.write_recipe(tmp_path / "old.yaml", chains=["sequential"])
    line = 1 + file.read_text().splitlines().index("chains:")
    with pytest.raises(MagMaxError, match=rf"old\.yaml, line {line}: chains is now training"):
        read_experiment(str(file))
    toys.write_recipe(file, chains=["sequential"], sedes=[0])
    with pytest.raises(MagMaxError, match=r"old\.yaml is not an experiment"):
        read_experiment(str(file))
    with pytest.raises(MagMaxError, match="training: given is now external"):
        read_experiment(str(toys.write_recipe(tmp_path / "given.yaml", training=[{"given": {"models": []}}])))
