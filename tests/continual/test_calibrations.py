"""Cells that are calibrated: as calibrating by hand, on validation examples alone, beside those that are not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.continual.test_benchmark import experiment  # noqa: E402

import magmax  # noqa: E402
from magmax.calibration import FeatureOptions, calibrate_features, calibration_hooks  # noqa: E402
from magmax.continual.benchmark import Benchmark  # noqa: E402
from magmax.continual.cells import samples_of, training_folder  # noqa: E402
from magmax.continual.context import build_context  # noqa: E402
from magmax.continual.experiment import BenchmarkCell  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402
from magmax.rules import Average, CalibrateWeights, chain  # noqa: E402

GRID: dict[str, Any] = {
    "seeds": [0],
    "training": ["independent"],
    "rules": ["average"],
    "validation": 4,
    "calibrations": [
        "wsc",
        {"fsc": {"n": 2, "norm": "l2"}},
        {"fsc": {"n": 2, "folded": False}},
        {"dsc": {"n": 3}},
        {"dsc": {"n": 3, "per": "row"}},
    ],
}


def test_every_rule_is_measured_with_every_calibration_as_by_hand(tmp_path: Path) -> None:
    recipe = experiment(**GRID)
    with ThreadPoolExecutor(1) as executor:
        records = Benchmark(recipe, tmp_path, executor).run()
    found = {record["method"]: record["variants"][0]["rows"]["3"]["tasks"] for record in records}
    weights = {"tensor": chain(Average(), CalibrateWeights()), "row": chain(Average(), CalibrateWeights(per="row"))}
    calibrated = {
        "fsc(n=2,norm=l2)": (Average(), 2, "l2"),
        "fsc(n=2,folded=False)": (Average(), 2, "l1"),
        "dsc(n=3)": (weights["tensor"], 3, "l1"),
        "dsc(n=3,per=row)": (weights["row"], 3, "l1"),
    }
    names = ["average", "average+wsc", *(f"average+{name}" for name in calibrated)]
    assert list(found) == ["zero_shot", *(f"{name}/independent" for name in names)]
    here = build_context(recipe, 0)
    paths = [training_folder(tmp_path, recipe, 0, "independent") / f"theta_{t}.safetensors" for t in (1, 2, 3)]
    expected: dict[str, Any] = {}
    for name, rule in (("average", Average()), ("average+wsc", weights["tensor"])):
        here.encoder.model.load_state_dict(magmax.merge(rule, here.base, paths))
        expected[name] = here.row(3).tasks
    for name, (rule, count, norm) in calibrated.items():
        merged = magmax.merge(rule, here.base, paths)
        here.encoder.model.load_state_dict(merged)
        items = samples_of(here, here.tasks, count)
        run = lambda model, items: here.encoder(items)  # noqa: E731
        made = calibrate_features(here.encoder.model, here.base, paths, items, run, FeatureOptions(norm=norm))
        if "folded" in name:
            here.encoder.model.load_state_dict(merged)
            with calibration_hooks(here.encoder.model, here.base, made):
                expected[f"average+{name}"] = here.row(3).tasks
        else:
            expected[f"average+{name}"] = here.row(3).tasks
    assert {name: found[f"{name}/independent"] for name in names} == expected


def test_samples_are_of_the_task_and_held_out_of_training_and_of_the_test() -> None:
    here = build_context(experiment(**GRID), 0)
    drawn = samples_of(here, here.tasks, 3)
    for task, items in zip(here.tasks, drawn, strict=True):
        assert len(items) == 3
        own = here.validation.pick(task.rows(here.validation.labels))
        assert all(any(np.array_equal(item, other) for other in own.items) for item in items)
        for data in (here.train, here.test):
            assert not any(np.array_equal(item, other) for item in items for other in data.items)


def test_what_was_measured_before_is_read_and_not_measured_again() -> None:
    """Without calibrations a cell's recipe, and with it its digest, is what it was."""
    cell = BenchmarkCell(seed=0, training="independent", rule="average")
    plain = experiment(**{**GRID, "calibrations": []}).cell_recipe(cell)
    assert experiment(**GRID).cell_recipe(cell) == plain
    assert "calibration" not in plain


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibrations": ["fcs"]}, "did you mean 'fsc'"),
        ({"calibrations": [{"fsc": {"m": 2}}]}, "fsc has no option 'm'"),
        ({"calibrations": [{"fsc": {"n": 0}}]}, "fsc needs n to be a whole number of 1 or more, not 0"),
        ({"calibrations": [{"dsc": {"inputs": "raw"}}]}, "dsc needs inputs to be calibrated or merged"),
        ({"calibrations": [{"dsc": {"per": "column"}}]}, "dsc needs per to be tensor or row, not 'column'"),
        ({"calibrations": [{"fsc": {"ratio": "token"}}]}, "fsc needs ratio to be place or sample, not 'token'"),
        ({"calibrations": [{"fsc": {"folded": "no"}}]}, "fsc needs folded to be true or false, not 'no'"),
        ({"calibrations": [{"wsc": {"form": "round"}}]}, "form"),
        ({"calibrations": ["fsc"], "validation": 0}, "fsc measures features on validation examples"),
        ({"calibrations": ["wsc", "wsc"]}, "calibrations: one is named twice"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(MagMaxError, match=said):
        experiment(**{**GRID, **changes}).check()
