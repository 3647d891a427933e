"""The verbs train, eval and bench as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.continual import toys  # noqa: E402

from magmax import cli  # noqa: E402
from magmax.continual.experiment_file import read_experiment  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks" / "continual").rglob("*.yaml"))
BENCHMARKS = [path for path in BENCHMARKS if path.parent.name != "environments"]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["magmax", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    told = capsys.readouterr()
    return code, told.out, told.err


def test_train_eval_and_the_library_tell_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = toys.write_recipe(tmp_path / "toy.yaml"), tmp_path / "out"
    code, told, errors = run(
        monkeypatch, capsys, "train", recipe, "fit.steps=5", "--out", out, "--rule", "{dare: {density: 0.5}}"
    )
    assert code == 2
    assert "a chain is transforms and then one merge rule" in errors
    code, told, errors = run(monkeypatch, capsys, "train", recipe, "fit.steps=5", "--out", out, "--rule", "random_mix")
    assert code == 0, errors
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(f"{100 * share:.1f}" in told for share in metrics["merged"]["3"]["tasks"])
    assert "Fine-tuning on task 3 of 3" in errors
    models = [out / "theta_3.safetensors", out / "merged.safetensors"]
    code, told, _ = run(monkeypatch, capsys, "eval", recipe, *models, "--json")
    assert code == 0
    found = json.loads(told)
    assert [found[str(model)] for model in models] == [metrics["model"]["3"], metrics["merged"]["3"]]
    code, told, _ = run(monkeypatch, capsys, "eval", recipe, models[0])
    assert f"mean {100 * sum(metrics['model']['3']['tasks']) / 3:.1f}" in told


@pytest.mark.parametrize(
    "rule", ["{random_mix: {seed: 5}}", "[{dare: {density: 0.1, seed: 1}}, average]", "{kth_magnitude: {k: 1}}"]
)
def test_train_takes_any_rule_that_runs_in_constant_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    recipe = toys.write_recipe(tmp_path / "toy.yaml")
    code, _, errors = run(
        monkeypatch, capsys, "train", recipe, "fit.steps=1", "--out", tmp_path / "out", "--rule", rule
    )
    assert code == 0, errors
    code, _, errors = run(
        monkeypatch, capsys, "train", recipe, "fit.steps=1", "--out", tmp_path / "o2", "--rule", "ties"
    )
    assert (code, "constant memory" in errors) == (2, True)


def test_bench_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toys.write_recipe(tmp_path / "toy.yaml")
    words = ["bench", recipe, "seeds=[0]", "training=[sequential]", "rules=[magmax]", "--out", tmp_path / "out"]
    code, told, errors = run(monkeypatch, capsys, *words, "--jobs", "2")
    assert code == 0, errors
    assert "magmax/sequential" in told
    assert "proves nothing" in told
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    told_of = {json.loads(line)["method"] for line in lines}
    assert (len(lines), told_of) == (3, {"zero_shot", "last/sequential", "magmax/sequential"})
    again = run(monkeypatch, capsys, *words)
    assert (again[0], again[1]) == (0, told)
    assert (tmp_path / "out" / "cells.jsonl").read_text().splitlines() == lines
    code, told, _ = run(monkeypatch, capsys, *words, "seeds=[0, 1]", "--dry-run")
    assert (code, "Not run: zero_shot (seeds 1); last/sequential (seeds 1); magmax/sequential (seeds 1)." in told) == (
        0,
        True,
    )


def test_a_benchmark_that_fails_shows_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = toys.write_recipe(tmp_path / "toy.yaml"), tmp_path / "out"
    words = ["bench", recipe, "seeds=[0]", "training=[sequential]", "rules=[magmax, {kth_magnitude: {k: 9}}]"]
    code, _, errors = run(monkeypatch, capsys, *words, "--out", out)
    assert (code, "k = 9 needs at least 9 models" in errors) == (2, True)
    table = (out / "results.md").read_text()
    assert "| magmax/sequential |" in table
    assert "Not run: kth_magnitude(k=9)/sequential (seeds 0)." in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fit.step=3", r"toy.yaml, line \d+: unknown key 'fit.step'; did you mean 'steps'"),
        ("fit.steps=0", r"fit.steps: input should be greater than or equal to 1, not 0"),
        ("seed=[1]", "unknown key 'seed'; did you mean 'seeds'"),
        ("seeds=[1, 1]", "seeds: seeds are different whole numbers"),
        ("among=every", "among: input should be 'seen' or 'all'"),
        ("scenario.class_incremental.tasks=9", "9 tasks; choose 1 to 6"),
        ("scenario.class_incremental.task=2", "has no option 'task'; did you mean 'tasks'"),
        ("model=toy", "model: there is no 'toy'"),
        ("steps", "cannot read 'steps' as an assignment"),
    ],
)
def test_mistakes_in_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    import re

    recipe = toys.write_recipe(tmp_path / "toy.yaml")
    code, _, errors = run(monkeypatch, capsys, "train", recipe, change, "--out", tmp_path / "out")
    assert code == 2
    assert re.search(message, errors), errors
    assert not list(tmp_path.glob("out/theta*"))


def test_a_chain_that_the_recipe_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toys.write_recipe(tmp_path / "toy.yaml")
    code, _, errors = run(monkeypatch, capsys, "train", recipe, "--training", "ewc", "--out", tmp_path / "out")
    assert (
        code,
        "the ways to train in the experiment are sequential, independent; 'ewc' is none of them" in errors,
    ) == (2, True)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_the_benchmarks_that_come_with_magmax_are_experiments(path: Path) -> None:
    assert read_experiment(str(path)).cells()


def test_a_missing_recipe() -> None:
    with pytest.raises(MagMaxError, match=r"none.yaml: there is no such file"):
        read_experiment("none.yaml")
