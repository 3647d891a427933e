"""The benchmark of preferences against a plain one: merge, predict everything, count what is right."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from tests.continual import toys  # noqa: E402
from tests.test_cli import run  # noqa: E402, F401

import magmax  # noqa: E402
from magmax import MagMaxError  # noqa: E402
from magmax.cli import environments  # noqa: E402
from magmax.continual.cells import training_folder  # noqa: E402
from magmax.continual.context import ExperimentContext, build_context  # noqa: E402
from magmax.continual.experiment import Experiment  # noqa: E402
from magmax.merging.execution import executors  # noqa: E402
from magmax.preference import from_labels, from_samples, natural_shares  # noqa: E402
from magmax.preference.candidates import split_halves  # noqa: E402
from magmax.preference.environments import environment_runs as running  # noqa: E402
from magmax.preference.environments.environment_runs import EnvironmentRuns  # noqa: E402
from magmax.preference.environments.environment_tables import write_report  # noqa: E402
from magmax.preference.environments.environments_config import EnvironmentsConfig  # noqa: E402
from magmax.preference.environments.tidy_rows import ScoreTable, tidy_rows  # noqa: E402
from magmax.preference.mixtures import MIXTURES  # noqa: E402
from magmax.rules import Average, MagMax, PerModel, Ties, Tunable  # noqa: E402

STUDIES = Path(__file__).parents[2] / "benchmarks" / "continual" / "environments"
SMALL: dict[str, Any] = {
    "experiment": "toy.yaml",
    "training": ["independent"],
    "mixtures": ["D2", "D3", "D4"],
    "draws": 2,
    "sources": ["label", "ot", "mmd", "auto"],
    "crowd_draws": 1,
    "temperatures": [1.0],
    "selections": {"smallest": 1, "random": 1},
    "samples": {"per_task": [1, 4]},
    "curves": {"schedule": [0.5, 2.0], "weights": [0.0, 1.0], "tasks": 2},
    "archive": {"top": [0.5], "bits": [8, 32]},
}
EXPERIMENT = Experiment.model_validate({**toys.RECIPE, "validation": 5, "factors": [0.3, 1.0], "seeds": [0]})


def study(**changes: Any) -> EnvironmentsConfig:
    return EnvironmentsConfig.model_validate({**SMALL, **changes}).resolve(EXPERIMENT)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def records(place: Path, executor: Executor) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {record["part"]: record for record in EnvironmentRuns(study(), EXPERIMENT, place, executor).run()}


class Plain:
    """The same experiment by hand: files, whole merges, and the logits of every test example."""

    def __init__(self, out: Path) -> None:
        self.here: ExperimentContext = build_context(EXPERIMENT, 0)
        folder = training_folder(out, EXPERIMENT, 0, "independent")
        self.theta = [load_file(folder / f"theta_{t}.safetensors") for t in range(4)]

    def features(self, state: dict[str, Any], items: Any) -> np.ndarray:
        self.here.encoder.model.load_state_dict(state)
        self.here.encoder.model.eval()
        with torch.inference_mode():
            return self.here.encoder(items).numpy()

    def right(self, rule: Any, factor: float, data: Any = None) -> np.ndarray:
        """Which examples the merge gets right, among all classes."""
        data = data or self.here.test
        merged = self.theta[0]
        if rule is not None:
            merged = rule if isinstance(rule, dict) else magmax.merge(rule, self.theta[0], self.theta[1:], factor)
        logits = self.features(merged, data.items) @ self.here.head.numpy().T
        return logits.argmax(1) == data.labels

    def compared(self, target: np.ndarray, source: Any) -> list[float]:
        """A preference by features of these test examples and of the tasks' training examples."""
        train, test = self.here.train, self.here.test
        pairs = []
        for state, task in zip(self.theta[1:], self.here.tasks, strict=True):
            own = np.flatnonzero(np.isin(train.labels, task.classes))
            sides = ((train, own), (test, target))
            pairs.append(tuple(self.features(state, [part.items[i] for i in rows]) for part, rows in sides))
        return from_samples(pairs, source)


@pytest.fixture(scope="module")
def plain(place: Path, records: dict[str, Any]) -> Plain:
    return Plain(place)


def rule_of(row: dict[str, Any]) -> Any:
    kind, *rest = row["method"].split("/")
    if kind == "tunable":
        return Tunable(preference=row["weights"], selection=rest[0], seed=0)
    named = {"average": Average(), "ties": Ties(), "magmax": MagMax(), "zero_shot": None}
    return Average(weights=PerModel(tuple(row["weights"]))) if kind == "weighted_average" else named[kind]


def test_accuracies_are_those_of_whole_merges_and_all_logits(records: dict[str, Any], plain: Plain) -> None:
    for part in ("D2-0", "D2-1", "D4-0", "M1-0", "M2-0"):
        name = part[:2]
        for row in records[part]["rows"]:
            assert f"{row['mixture']}-{row['draw']}" == part
            rows = np.flatnonzero(np.isin(plain.here.test.labels, classes_of(plain, row["tasks"])))
            rule = plain.theta[3] if row["method"] == "last" else rule_of(row)
            right = plain.right(rule, row["scaling_factor"] or 0.0)
            scored = np.array(sorted(scored_rows(name, row)))
            assert set(scored) <= set(rows)
            assert row["accuracy"] == right[scored].mean(), row


def classes_of(plain: Plain, tasks: list[int]) -> list[int]:
    return [c for task in tasks for c in plain.here.tasks[task].classes]


def scored_rows(name: str, row: dict[str, Any]) -> list[int]:
    return environment_of(name, row["draw"]).scored_rows.tolist()


def environment_of(name: str, draw: int) -> Any:
    """Drawn again, by the public function."""
    from magmax.preference.mixtures import draw_environments

    here = build_context(EXPERIMENT, 0)
    task_of = np.array([next(t for t, task in enumerate(here.tasks) if c in task.classes) for c in here.test.labels])
    order = list(MIXTURES).index(name) if name in MIXTURES else 100 + int(name[1:])
    shares = MIXTURES.get(name) or (1 / int(name[1:]),) * int(name[1:])
    return draw_environments(task_of, mixtures={name: shares}, draws=draw + 1, target_fraction=0.1, seed=[0, order])[
        draw
    ]


def test_factors_are_chosen_on_held_out_training_examples(records: dict[str, Any], plain: Plain) -> None:
    held = plain.here.validation
    for name, rule in (("average", Average()), ("ties", Ties()), ("magmax", MagMax())):
        search = records["baselines"]["search"][name]
        assert {float(factor) for factor in search} == {0.3, 0.5, 1.0, rule.default_scaling_factor}
        for factor, score in search.items():
            right = plain.right(rule, float(factor), held)
            by_task = [right[np.isin(held.labels, task.classes)].mean() for task in plain.here.tasks]
            assert score == pytest.approx(np.mean(by_task), abs=1e-12)
        assert search[f"{records['baselines']['chosen'][name]:g}"] == max(search.values())


def test_preferences_are_those_of_the_target_sample_alone(records: dict[str, Any], plain: Plain) -> None:
    own = natural_shares(plain.theta[0], plain.theta[1:])
    assert records["baselines"]["own"] == pytest.approx(own, abs=1e-12)
    test = plain.here.test
    for row in [*records["D3-0"]["rows"], *records["D3-1"]["rows"]]:
        environment = environment_of("D3", row["draw"])
        assert environment.tasks == row["tasks"]
        target = environment.target_rows
        source = row["method"].rpartition("/")[2]
        if source == "label":
            expected = from_labels(test.labels[target].tolist(), [task.classes for task in plain.here.tasks])
        elif source in ("ot", "cos", "mmd"):
            expected = plain.compared(target, source)
        elif source in ("oracle", "manual"):
            expected = np.full(3, 1 / 3)
        else:
            continue
        assert row["weights"] == pytest.approx(expected, abs=1e-5)


def test_auto_takes_the_source_whose_halves_give_the_right_classes_most_probability(
    records: dict[str, Any], plain: Plain
) -> None:
    test, theta = plain.here.test, plain.theta
    own = records["baselines"]["own"]
    factor = records["baselines"]["chosen"]["magmax"]
    target = environment_of("D4", 1).target_rows
    rows = {(row["method"], row["variant"]): row for row in records["D4-1"]["rows"]}
    row = rows["tunable/optimal/auto", "chosen"]

    def preference(source: str, places: Any) -> list[float]:
        if source in ("magmax", "uniform"):
            return own if source == "magmax" else [1 / 3] * 3
        if source == "label":
            return from_labels(test.labels[target[places]].tolist(), [task.classes for task in plain.here.tasks])
        return plain.compared(target[places], source)

    def probability(weights: list[float], rows: Any) -> np.ndarray:
        merged = magmax.merge(Tunable(preference=weights), theta[0], theta[1:], factor)
        logits = plain.features(merged, [test.items[i] for i in rows]) @ plain.here.head.numpy().T
        powers = np.exp(logits.astype(float))
        return (powers / powers.sum(axis=1, keepdims=True))[np.arange(len(rows)), test.labels[rows]]

    first, second = split_halves(len(target), 1)
    objectives = {}
    for source in ("magmax", "uniform", "label", "ot", "cos", "mmd"):
        pairs = (first, second), (second, first)
        found = [probability(preference(source, half), target[others]) for half, others in pairs]
        final = np.array(preference(source, range(len(target))))
        objectives[source] = np.concatenate(found).mean() - 0.01 * ((final - own) ** 2).sum()
    assert objectives[row["origin"]] == pytest.approx(max(objectives.values()), abs=1e-6)
    assert row["weights"] == pytest.approx(preference(row["origin"], range(len(target))), abs=1e-5)
    assert row["tries"] == len(objectives)


def test_curves_samples_and_archives_are_what_they_say(records: dict[str, Any], plain: Plain) -> None:
    labels = plain.here.test.labels
    curves = records["curves"]["rows"]
    assert len(curves) == 2 * (2 + 2 * 2)
    assert curves[0]["weights"] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    for row in curves:
        right = plain.right(Tunable(preference=row["weights"], seed=0), row["scaling_factor"])
        assert row["tasks"] == [right[np.isin(labels, task.classes)].mean() for task in plain.here.tasks]
    samples = records["samples"]["rows"]
    for row in samples:
        assert row["samples"] <= row["per_task"] * len(row["tasks"])
        right = plain.right(rule_of(row), row["scaling_factor"])
        assert row["accuracy"] == right[scored_rows(row["mixture"], row)].mean()
    label = {r["per_task"]: r["weights"] for r in samples if r["method"].endswith("label") and r["mixture"] == "D2"}
    assert all(np.isclose(np.array(weights) * n * 2 % 1, [0, 0, 0], atol=1e-9).all() for n, weights in label.items())
    for row in records["archive"]["rows"]:
        rule = Tunable(preference=row["weights"], seed=0)
        assert row["exact"] == plain.right(rule, row["scaling_factor"]).mean()
        assert row["bytes"] > 0
        assert 0 <= row["agreement"] <= 1


def test_what_is_there_is_read_and_what_is_damaged_is_measured_again(
    records: dict[str, Any], place: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place / "environments" / "cells.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert EnvironmentRuns(study(), EXPERIMENT, place, executor).run() == list(records.values())
    assert file.read_text().splitlines(keepends=True) == lines
    (damaged,) = (line for line in lines if json.loads(line)["part"] == "D4-1")
    others = [line for line in lines if line != damaged]
    file.write_text("".join(others) + damaged[:-100])
    again = {record["part"]: record for record in EnvironmentRuns(study(), EXPERIMENT, place, executor).run()}
    assert again["D4-1"]["rows"] == records["D4-1"]["rows"]
    assert (file.read_text().splitlines(keepends=True)[:-1], len(lines)) == (others, len(others) + 1)
    monkeypatch.setattr(running, "measure_baselines", None)  # known already
    more = EnvironmentRuns(
        study(curves={"schedule": [1.0], "weights": [], "tasks": 1}), EXPERIMENT, place, executor
    ).run()
    assert len(more) == len(records)
    assert len(file.read_text().splitlines()) == len(lines) + 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_study_that_was_stopped_has_its_tables_too(records: dict[str, Any], count: int, tmp_path: Path) -> None:
    files = write_report(study(), EXPERIMENT, list(records.values())[:count], tmp_path)
    assert files[2].read_text().startswith(f"NOT ALL IS MEASURED: {count} of {len(records)} parts.")


def test_a_seed_that_lacks_an_environment_is_not_averaged_with_whole_ones(records: dict[str, Any]) -> None:
    other = [{**record, "seed": 1} for name, record in records.items() if name != "D4-0" and name != "D4-1"]
    table = ScoreTable(tidy_rows([*records.values(), *other]))
    assert len(table.seed_means("magmax", "0.5", ["D2", "D3"])) == 2
    assert len(table.seed_means("magmax", "0.5", ["D2", "D3", "D4"])) == 1


def test_a_study_that_fails_has_its_tables_too(
    records: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(self: EnvironmentRuns) -> None:
        raise MagMaxError("a part failed")

    monkeypatch.setattr(EnvironmentRuns, "run", stopped)
    monkeypatch.setattr(EnvironmentRuns, "read_finished", lambda self: list(records.values())[:3])
    monkeypatch.setattr(environments, "read_study", lambda *_: (study(), EXPERIMENT))
    with pytest.raises(MagMaxError, match="a part failed"):
        environments.environments("any.yaml", out=str(tmp_path))
    assert "3 of" in (tmp_path / "environments" / "results.md").read_text()


def test_the_files_agree_with_the_records(records: dict[str, Any], place: Path) -> None:
    files = write_report(study(), EXPERIMENT, list(records.values()), place)
    with files[0].open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    given = [
        row["accuracy"]
        for record in records.values()
        for row in record.get("rows", [])
        if row.get("method") == "magmax" and row["mixture"] in MIXTURES
    ]
    of_magmax = [row for row in rows if row["method"] == "magmax" and row["mixture"] in MIXTURES]
    told = [float(row["value"]) for row in of_magmax]
    assert told == given
    content = json.loads(files[1].read_text())
    assert {pair["n"] for pair in (each["difference"] for each in content["paired"])} == {1}
    assert "proves nothing" in files[2].read_text()
    mean = np.mean([float(row["value"]) for row in of_magmax if row["variant"] == "chosen"])
    assert "| magmax | chosen | " in files[2].read_text()
    line = next(line for line in files[2].read_text().splitlines() if line.startswith("| magmax | chosen"))
    assert line.endswith(f"| {100 * mean:.1f} |")


def test_the_command_line(tmp_path: Path, executor: Executor, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    toys.write_recipe(tmp_path / "toy.yaml", validation=5, factors=[0.3, 1.0], seeds=[0, 1])
    few = {"curves": None, "samples": None, "archive": None, "mixtures": ["D1"], "sources": ["label"], "crowd_draws": 0}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**SMALL, **few}))
    monkeypatch.setattr(executors, "job_executor", lambda jobs, scheduler: nullcontext(executor))
    code, out, err = run("study", "environments", tmp_path / "study.yaml", "draws=1", "--out", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "environments" / "results.md").read_text() in out
    assert "| tunable/optimal/label | chosen |" in out
    assert "paired t-test over 2 seeds" in out
    assert len((tmp_path / "out" / "environments" / "cells.jsonl").read_text().splitlines()) == 4
    code, _, err = run("study", "environments", tmp_path / "study.yaml", "sauces=[ot]", "--out", tmp_path / "out")
    assert code == 2
    assert "did you mean 'sources'" in err
    code, _, err = run("study", "environments", tmp_path / "study.yaml", "experiment=3", "--out", tmp_path / "out")
    assert (code, "whose trainings are merged, not 3" in err) == (2, True)


@pytest.mark.parametrize("recipe", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_can_be_read(recipe: Path) -> None:
    study, experiment = environments.read_study(str(recipe))
    assert study.seeds == experiment.seeds == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": ["joint"]}, "training: there is no 'joint'"),
        ({"seeds": [5]}, "seeds: there is no 5"),
        ({"mixtures": ["D6"]}, "mixtures: there is no 'D6'"),
    ],
)
def test_what_the_experiment_lacks_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MagMaxError, match=message):
        study(**changes)
    with pytest.raises(MagMaxError, match="validation: 10"):
        EnvironmentsConfig.model_validate(SMALL).resolve(Experiment.model_validate(toys.RECIPE))
