"""Studies of accuracies: what is read out of a benchmark's records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.analysis import runs

pytest.importorskip("scipy")

from magmax.analysis.accuracy_studies import ACCURACY_SWEEPS, run_accuracy_study
from magmax.analysis.method_comparison import compare_best_two, summarise_methods
from magmax.analysis.recommendations import recommend_from_accuracies
from magmax.analysis.records import aggregate
from magmax.analysis.run_folders import load_results
from magmax.continual.cell_store import CellStore
from magmax.continual.evaluation.measures import average_accuracy
from magmax.errors import MagMaxError


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    return list(load_results(runs.write_results(tmp_path / "results")).records)


def accuracy(record: dict[str, Any], variant: int = 0) -> float:
    last = record["variants"][variant]["rows"][str(runs.TASKS)]["tasks"]
    return float(np.mean(last))


@pytest.mark.parametrize(
    ("kind", "x", "values", "series"),
    [
        ("retention", "density", {0.1, 0.5}, "bottom, magmax/independent"),
        ("kth", "k", {1, 2, 3}, "sequential"),
        ("scaling", "scaling_factor", {0.2, 0.5, 0.6, 1.0}, "magmax/sequential"),
        ("drop", "dropped", {0, 1, 2}, "magmax/independent"),
    ],
)
def test_each_kind_finds_its_own_records(records, kind: str, x: str, values: set, series: str) -> None:
    found = run_accuracy_study(kind, records).records
    own = [record for record in found if record["series"] == series]
    assert {record[x] for record in own} == values
    assert len(own) == len(values) * 3, "one for each seed"


def test_what_is_calibrated_counts_for_no_study(records) -> None:
    plain = run_accuracy_study("kth", records).records
    calibrated = [{**record, "calibration": "fsc", "variants": []} for record in records]
    assert run_accuracy_study("kth", [*records, *calibrated]).records == plain


def test_one_model_counts_on_its_own_task_alone(records) -> None:
    like = next(record for record in records if record["method"] == "average/independent")
    tasks = range(len(next(iter(like["variants"][0]["rows"].values()))["tasks"]))
    own: list[Any] = []
    for keep in (0.1, 0.5):
        for task in tasks:
            rule = [{"prune": {"density": keep}}, {"average": {"weights": [int(other == task) for other in tasks]}}]
            own.append({**like, "recipe": {"rule": rule}})
            like = json.loads(json.dumps(like))
            for row in like["variants"][0]["rows"].values():
                row["tasks"] = [share + 0.01 for share in row["tasks"]]  # so that each cell differs
    found = run_accuracy_study("retention", own).records
    assert {record["series"] for record in found} == {"top, each model on its own task/independent"}
    for keep, cells in ((0.1, own[: len(tasks)]), (0.5, own[len(tasks) :])):
        rows = [cell["variants"][0]["rows"] for cell in cells]
        expected = np.mean([row[max(row, key=int)]["tasks"][task] for task, row in enumerate(rows)])
        assert [r["accuracy"] for r in found if r["density"] == keep] == [pytest.approx(expected)]


def test_values_are_those_of_the_cells(records) -> None:
    found = {(r["series"], r["k"], r["seed"]): r["accuracy"] for r in run_accuracy_study("kth", records).records}
    for record in records:
        if record["rule"].startswith("kth_magnitude"):
            k = record["recipe"]["rule"]["kth_magnitude"]["k"]
            assert found[record["training"], k, record["seed"]] == pytest.approx(accuracy(record), abs=1e-15)
        elif record["rule"] == "magmax" and isinstance(record["recipe"]["rule"], str):
            assert found[record["training"], 1, record["seed"]] == pytest.approx(accuracy(record), abs=1e-15)


def test_bands_are_mean_and_standard_deviation_over_seeds(records) -> None:
    study = run_accuracy_study("retention", records)
    for (series, keep), band in aggregate(study.records, ["series", "density"], "accuracy").items():
        own = [r["accuracy"] for r in study.records if (r["series"], r["density"]) == (series, keep)]
        assert (band.mean, band.std) == (pytest.approx(np.mean(own)), pytest.approx(np.std(own, ddof=1)))


def test_merging_on_top_of_other_training(records) -> None:
    found = run_accuracy_study("penalties", records).records
    assert {r["training"] for r in found if r["series"] == "average"} == {"sequential", "independent"}
    assert "last" not in {r["series"] for r in found}, "it was trained in one way only"


def test_curves_are_the_matrix(records) -> None:
    found = run_accuracy_study("curves", records).records
    own = {
        (r["learned"], r["task"]): r["accuracy"] for r in found if (r["method"], r["seed"]) == ("last/sequential", 1)
    }
    cell = next(r for r in records if r["method"] == "last/sequential" and r["seed"] == 1)
    for i, row in cell["variants"][0]["rows"].items():
        for j, share in enumerate(row["tasks"], start=1):
            assert own[int(i), j] == share


def test_methods_agree_with_the_measures(records) -> None:
    for method in summarise_methods(records):
        averages = [average_accuracy(r) for r in method.accuracy_matrices.values()]
        assert method.average_accuracy.mean == pytest.approx(np.mean(averages), abs=1e-12)
    assert [m.average_accuracy.mean for m in summarise_methods(records)] == sorted(
        (m.average_accuracy.mean for m in summarise_methods(records)), reverse=True
    )


def test_the_best_two_are_compared_on_the_same_seeds(records) -> None:
    found = summarise_methods(records)
    pair = compare_best_two(found)
    assert pair is not None
    assert pair.difference.mean == pytest.approx(found[0].average_accuracy.mean - next(
        m.average_accuracy.mean for m in found if m.name == pair.other and m.variant == "default"
    ))  # fmt: skip


def test_advice_says_when_the_best_lies_within_the_noise(tmp_path: Path) -> None:
    folder = runs.write_results(tmp_path / "results")
    content = json.loads((folder / "results.json").read_text())
    wobble = {("magmax", 0): 0.05, ("magmax", 1): -0.06, ("magmax", 2): 0.04}
    for record in content["records"]:
        for variant in record["variants"]:
            for row in variant["rows"].values():
                row["tasks"] = [t + wobble.get((record["rule"], record["seed"]), 0.0) for t in row["tasks"]]
    advice = recommend_from_accuracies(summarise_methods(content["records"]), content["records"])
    assert any("cannot be told apart" in each.headline for each in advice)
    plain = list(load_results(folder).records)
    assert any("is ahead of" in each.headline for each in recommend_from_accuracies(summarise_methods(plain), plain))
    one = [record for record in plain if record["seed"] == 0]
    assert any("at least 3 seeds" in each.headline for each in recommend_from_accuracies(summarise_methods(one), one))


def test_a_benchmark_without_such_cells_is_told_what_to_run(records) -> None:
    few = [record for record in records if record["rule"] in ("zero_shot", "last")]
    for kind, sweep in ACCURACY_SWEEPS.items():
        with pytest.raises(MagMaxError, match=rf"study/{sweep.recipe}"):
            run_accuracy_study(kind, few)
        assert (Path(__file__).parents[2] / "benchmarks" / "continual" / "study" / sweep.recipe).is_file()


def test_a_benchmark_that_is_still_running_has_the_cells_that_are_finished(records, tmp_path: Path) -> None:
    store = CellStore(tmp_path / "running")
    for n, record in enumerate(records):
        store.append({**record, "digest": str(n)})
    with store.file.open("a") as file:
        file.write('{"seed": 0, "meth')
    found = load_results(tmp_path / "running")
    assert [record["method"] for record in found.records] == [record["method"] for record in records]
    assert found.recipe == {"data": "toys", "model": "tiny"}
    runs.write_results(tmp_path / "running", few=True)
    whole = load_results(tmp_path / "running")
    assert len(whole.cells) == len(whole.records) + len(records), "those of other recipes beside the last one's"


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MagMaxError, match="no such folder"):
        load_results(tmp_path / "nothing")
    with pytest.raises(MagMaxError, match=r"no results\.json"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(MagMaxError, match="cannot be read"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"records": [{"seed": 1}]}')
    with pytest.raises(MagMaxError, match="is not what magmax bench writes"):
        load_results(tmp_path)
