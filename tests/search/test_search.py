"""A search finds what is known to be best, goes on after a kill as if nothing had been, and scores on what it says."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tests.continual import toys
from tests.search.scores import read_number

import magmax
from magmax import MagMaxError, cli
from magmax.continual.context import build_context
from magmax.continual.experiment import Experiment
from magmax.continual.training.weight_files import load_weights
from magmax.recipes.recipe import load_recipe
from magmax.search.config import load_search
from magmax.search.runner import STORE_FILE, Search, TrialRecord
from magmax.search.trial_results import BEST_FILE, TABLE_FILE, best_of, pareto_front, write_search

pytest.importorskip("optuna")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A base of 0 and two models of 1 and 0.5: what MagMax makes of them is the scaling factor."""
    for name, value in (("base", 0.0), ("one", 1.0), ("half", 0.5)):
        save_file({"w": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    recipe = {"base": "base.safetensors", "models": ["one.safetensors", "half.safetensors"], "rule": "magmax"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def written(folder: Path, **changes: Any) -> Path:
    content = {
        "merge": "merge.yaml",
        "space": {"scaling_factor": {"low": -1, "high": 2}},
        "score": "peak",
        "trials": 12,
        **changes,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "search.yaml"


def searched(file: Path, out: Path, jobs: int = 1, executor: Executor | None = None) -> list[TrialRecord]:
    recipe, trials = load_search(str(file), [])
    with ThreadPoolExecutor(jobs) as threads:
        tried = Search(recipe, trials, out, executor or threads, jobs).run()
    write_search(recipe, trials, tried, out)
    return tried


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / TABLE_FILE).read_text().splitlines()))


def test_the_best_is_found_written_and_merged(toy):
    file = written(toy, trials=30)
    tried = searched(file, toy / "out" / "deep")
    best = best_of(load_search(str(file), [])[0], tried)
    assert abs(best.settings["scaling_factor"] - 0.7) < 0.05
    assert best.scores["score"] == max(t.scores["score"] for t in tried)
    plan = load_recipe(str(toy / "out" / "deep" / BEST_FILE))
    plan.job().run()
    assert read_number(toy / "out" / "deep" / "best.safetensors") == np.float32(best.settings["scaling_factor"])
    rows = table(toy / "out" / "deep")
    assert [float(row["score"]) for row in rows] == [t.scores["score"] for t in tried]
    assert sorted(p.name for p in (toy / "out" / "deep").iterdir()) == sorted(
        [BEST_FILE, "best.safetensors", STORE_FILE, TABLE_FILE]
    )


@pytest.mark.parametrize("objectives", [[], ["zero", "one"]])
def test_the_pareto_front_is_the_known_one(objectives, toy):
    """From 0 to 1 what is better for one task is worse for the other; all else is worse for both than 0 or than 1."""
    space = {"scaling_factor": {"low": -1, "high": 2, "step": 0.25}}
    changes = {"score": "two_tasks", "objectives": objectives, "sampler": "random"}
    tried = searched(written(toy, space=space, trials=40, **changes), toy / "out", jobs=3)
    first: dict[float, int] = {}
    for trial in tried:
        first.setdefault(trial.settings["scaling_factor"], trial.number)
    assert {0.0, 0.5, 1.0} < first.keys()
    assert {t.number for t in pareto_front(tried, ["zero", "one"])} == {n for x, n in first.items() if 0 <= x <= 1}
    rows = table(toy / "out")
    assert {int(r["trial"]) for r in rows if r["front"] == "1"} == {n for x, n in first.items() if 0 <= x <= 1}
    assert yaml.safe_load((toy / "out" / BEST_FILE).read_text())["scaling_factor"] == 0.5


def test_losses_are_minimised(toy):
    tried = searched(written(toy, score="two_tasks", direction="minimize", trials=30), toy / "out")
    assert yaml.safe_load((toy / "out" / BEST_FILE).read_text())["scaling_factor"] < -0.8
    assert len(tried) == 30


def test_the_same_trials_whatever_is_faster_or_interrupted(toy):
    """Three at once: the choice of each knows the scores of all but the last two, in whichever order they come."""
    whole = searched(written(toy), toy / "whole", jobs=3)
    searched(written(toy, trials=5), toy / "parts", jobs=3)
    store = toy / "parts" / STORE_FILE
    store.write_bytes(store.read_bytes() + b'{"op_code": 4, "torn')
    (toy / "parts" / "trial-notes.txt").write_bytes(b"mine")
    assert searched(written(toy), toy / "parts", jobs=3) == whole
    names = {path.name for path in (toy / "parts").iterdir()}
    assert names == {STORE_FILE, TABLE_FILE, BEST_FILE, "trial-notes.txt"}
    assert searched(written(toy, seed=1), toy / "other", jobs=3) != whole
    assert len({t.settings["scaling_factor"] for t in whole}) == len(whole)


def test_a_killed_search_ends_with_the_same_trials(toy):
    """Killed outright, its workers in processes of their own; told from one that was not."""
    file = written(toy, score="slow_peak")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(root)]), "SCORE_SECONDS": "0.2"}
    command = [sys.executable, "-m", "magmax.cli", "search", "run", str(file), "--out", str(toy / "out"), "--jobs", "2"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as running:
        for line in running.stderr or ():
            if line.startswith("trial 3:"):
                running.send_signal(signal.SIGKILL)  # the pipe ends when the workers do, which must not outlive it
    assert running.returncode == -signal.SIGKILL
    assert not (toy / "out" / BEST_FILE).exists()
    done = subprocess.run(command, env={**env, "SCORE_SECONDS": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trial 3:" not in done.stderr
    tried = searched(file, toy / "out", jobs=2)
    assert tried == searched(file, toy / "undisturbed", jobs=2)
    assert f"best: trial {max(tried, key=lambda t: t.scores['score']).number};" in done.stdout


def test_rules_options_of_a_chain_and_each_model_s_number(toy):
    """Settings that do not go together are a trial that was refused, and the search goes on."""
    space = {
        "rule": ["average", {"kth_magnitude": {"k": 5}}, [{"prune": {"density": 1.0}}, "magmax"]],
        "scaling_factor": {"low": 0.5, "high": 2, "log": True},
    }
    tried = searched(written(toy, space=space, sampler="random", trials=20), toy / "out")
    assert {bool(t.refused) for t in tried if "kth_magnitude" in t.settings["rule"]} == {True}
    assert {bool(t.refused) for t in tried if "kth_magnitude" not in t.settings["rule"]} == {False}
    recipe = yaml.safe_load((toy / "merge.yaml").read_text())
    (toy / "merge.yaml").write_text(yaml.safe_dump({**recipe, "rule": [{"prune": {"density": 0.9}}, "average"]}))
    options = {
        "rule.prune.density": {"low": 0.5, "high": 1},
        "rule.average.weights": {"low": 1, "high": 3, "whole": True, "each": "model"},
    }
    for trial in searched(written(toy, space=options, trials=6, seed=2), toy / "training"):
        keep, one, half = trial.settings.values()
        assert list(trial.settings) == ["rule.prune.density", "rule.average.weights[one]", "rule.average.weights[half]"]
        assert {one, half} <= {1, 2, 3}
        kept = [v if round(keep * 1) else 0.0 for v in (1.0, 0.5)]
        x = (one * kept[0] + half * kept[1]) / (one + half)
        assert trial.scores["score"] == pytest.approx(-((x - 0.7) ** 2), abs=1e-6)


def test_a_preference_is_searched_for(toy):
    for name, value in (("base", 0.0), ("one", 1.0), ("half", 0.5)):
        save_file({"w": torch.full((100,), value)}, toy / f"{name}.safetensors")
    recipe = yaml.safe_load((toy / "merge.yaml").read_text())
    (toy / "merge.yaml").write_text(yaml.safe_dump({**recipe, "rule": "tunable", "scaling_factor": 1.0}))
    space = {"rule.preference": {"low": 0.1, "high": 1, "each": "model"}}
    best = max(searched(written(toy, space=space), toy / "out"), key=lambda t: t.scores["score"])
    content = yaml.safe_load((toy / "out" / BEST_FILE).read_text())
    assert content["rule"] == {
        "tunable": {"preference": {m: best.settings[f"rule.preference[{m}]"] for m in ("one", "half")}}
    }


def test_a_score_that_fails_fails_its_trial_alone(toy, capsys):
    """Of every kind of failure, in one line each; a search that goes on reads the same of the trials before."""
    space = {"scaling_factor": {"low": 0.01, "high": 0.96, "step": 0.05}}
    file = written(toy, space=space, score="moody", sampler="random", trials=40, objectives=["one"])
    with pytest.raises(SystemExit) as ended:
        cli.run(["search", "run", str(file), "--out", str(toy / "out")])
    assert not ended.value.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trial ")]
    assert len(lines) == 40
    tried = searched(file, toy / "out")
    kinds = {0.0: "returned nan; every", 0.2: "raised ValueError (scores.py, line", 0.4: "raised SystemExit"}
    kinds |= {0.6: "returned {}; every", 0.7: "returned 'not a number', not a number"}
    for trial, line in zip(tried, lines, strict=True):
        x = trial.settings["scaling_factor"]
        words = next((words for at, words in reversed(kinds.items()) if at <= x < 0.8), "")
        assert (words in trial.refused, bool(trial.scores)) == (True, x >= 0.8)
        assert (trial.refused or f"one {trial.scores.get('one', 0):.6g}") in line
    assert {words for words in kinds.values() if any(words in trial.refused for trial in tried)} == set(kinds.values())
    rows = table(toy / "out")
    assert [row["refused"] for row in rows] == [trial.refused for trial in tried]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": "nan_score"}, "every score must be a finite number"),
        ({"score": "pek"}, "did you mean 'peak'"),
        ({"score": "scores:peak"}, "--allow-code"),
        ({"objectives": ["else"]}, "there is no score of else; there are score"),
        ({"space": {"scaling_factor": {"low": 2, "high": 1}}}, "low is at most high"),
        ({"space": {"scaling_factor": {"lo": 2, "high": 1}}}, "did you mean 'low'"),
        ({"space": {"rule.k.deeper.still": [1]}}, r"cannot set rule\.k\.deeper\.still"),
        ({"space": {"scaling_factor": []}}, "holds at least one"),
        ({"tries": 3}, "did you mean 'trials'"),
        ({"score": {"experiment": "toys.yaml"}}, "holds out no validation examples"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, words, toy):
    (toy / "toys.yaml").write_text(yaml.safe_dump(toys.RECIPE))
    with pytest.raises(MagMaxError, match=words):
        searched(written(toy, **changes), toy / "out")


def test_a_folder_of_another_search_is_refused(toy):
    searched(written(toy, trials=2), toy / "out")
    with pytest.raises(MagMaxError, match=r"holds a search with another recipe \(seed\)"):
        searched(written(toy, trials=2, seed=1), toy / "out")
    (toy / "full").mkdir()
    (toy / "full" / "mine").touch()
    with pytest.raises(MagMaxError, match="is not empty, and holds no search"):
        searched(written(toy), toy / "full")


@pytest.mark.parametrize("on", ["validation", "test"])
def test_an_experiment_scores_on_validation_examples_unless_the_test_set_is_named(on, toy):
    """Against accuracies counted by hand among the classes of all tasks."""
    experiment = Experiment.model_validate({**toys.RECIPE, "validation": 5, "among": "all"})
    (toy / "toys.yaml").write_text(yaml.safe_dump(experiment.model_dump()))
    here = build_context(experiment, 0)
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "one", "half"):
        moved = {k: t + (name != "base") * 0.2 * torch.randn(t.shape, generator=draw) for k, t in here.base.items()}
        save_file(moved, toy / f"{name}.safetensors")
    score = {"experiment": "toys.yaml"} | ({"measure_on": "test"} if on == "test" else {})
    (trial,) = searched(written(toy, score=score, trials=1), toy / "out")
    models = [toy / "one.safetensors", toy / "half.safetensors"]
    out = magmax.merge(
        "magmax", toy / "base.safetensors", models, trial.settings["scaling_factor"], toy / "m.safetensors"
    )
    load_weights(here.encoder.model, out)
    data = here.test if on == "test" else here.validation
    with torch.no_grad():
        guesses = (here.encoder(data.items) @ here.head.T).argmax(1).numpy()
    for task in here.tasks:
        own = np.isin(data.labels, task.classes)
        assert trial.scores[task.name] == pytest.approx((guesses[own] == data.labels[own]).mean())
    assert len(trial.scores) == len(here.tasks)
