"""An experiment in words: what is learned, how, and with which methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from ..errors import MagMaxError
from ..rules import nearest_hint, rule_from
from . import registry

Choice = str | dict[str, Any]
Parallel = Literal["ddp", "fsdp"]
"""ddp: each process has all weights, gradients and moments of AdamW. fsdp: each has a part of them, cut along the first
dimension, and layer after layer is put together where it is computed with."""
RECORD_FORMAT = 1
"""Of the records of a benchmark; a new one makes old records be computed again."""

TRAININGS: Mapping[str, Mapping[str, Any]] = {
    "sequential": {},
    "independent": {},
    "lwf": {"weight": 0.3, "temperature": 2.0},
    "ewc": {"weight": 5e5, "keep": 0.5, "samples": 256},
    "ewc_released": {"weight": 5e5, "keep": 0.5},
    "replay": {"per_class": 10, "balanced": True},
    "joint": {"steps": 0},
    "external": {"models": []},
}
"""The ways to train, and their options: joint's steps are those of all tasks together where it says 0; external
trains nothing, but takes the models that are named, one for each task, as if they had been trained independently."""

CALIBRATIONS: Mapping[str, Mapping[str, Any]] = {
    "wsc": {"form": "norm", "per": None, "norm": "l2", "guard": 1.0},
    "fsc": {"n": 8, "norm": "l1", "ratio": "place", "inputs": "calibrated", "folded": True},
    "dsc": {"n": 8, "norm": "l1", "ratio": "place", "inputs": "calibrated", "per": None},
}
"""MAGIC's ways to give a merged model its magnitudes back, and their options: in weight space (`calibrate_weights`), in
feature space with n validation examples of each task (for comparison not folded into the weights), and the one of
length alone, per tensor or row, and then the other."""

CALIBRATION_VALUES: Mapping[str, Sequence[Any]] = {
    "norm": ("l1", "l2"),
    "ratio": ("place", "sample"),
    "inputs": ("calibrated", "merged"),
    "folded": (True, False),
    "per": ("tensor", "row", None),
}
"""What an option in feature space may be."""

REFERENCES = ("replay", "joint")
"""References that no merge is made of: replay keeps examples, joint sees all data at once."""

FROM_BASE = ("independent", "external")
"""Chains whose tasks all begin at theta_0, so that the last checkpoint knows the last task alone."""

LAST_CHECKPOINT, ZERO_SHOT = "last", "zero_shot"


class FitOptions(BaseModel):
    """`FitSettings`, as a recipe writes them; steps are those of one task."""

    model_config = ConfigDict(extra="forbid", strict=True)
    steps: int = Field(ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(1e-5, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    warmup: float = Field(0.1, ge=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0)
    dropout: bool = False


class Experiment(BaseModel):
    """An experiment of `magmax train` or `magmax bench`. Names come from the registry; see `allow_code` for others.

    Attributes:
        data, model, head, scenario: each a name, or {name: {option: value}}.
        fit: the training of one task.
        seeds: each draws the tasks' classes and the order of the examples anew.
        training: the ways to train; every rule merges the checkpoints of every training but replay and joint.
        rules: the merge rules, by name or {name: {option: value}}.
        calibrations: each rule's merges are measured as they are, and also calibrated by each of these.
        factors: scaling factors to choose from on the validation examples; beside the rule's own default. What is
            calibrated has the rule's own: the magnitude of its matrices no longer depends on the factor.
        sweep: scaling factors to report, each for itself, on the test examples after the last task; of the same.
        validation: training examples of each class that nothing is trained on, for choosing the factor.
        among: the classes that a test example is told apart from: of the tasks learned so far, or of all tasks.
        rows: "all": R after every task; "last": after the last alone (no forgetting, a fraction of the time);
            "default": after every task with the rules' own factors, after the last alone with the chosen ones.
        measure_on: "test", or "validation": the validation examples, to choose a learning rate without the test set.
        save_every: steps between two snapshots of a task's training; 0 for none.
        parallel: how several processes of `magmax train` share the model: "ddp", a copy on each, or "fsdp", a part on
            each. It decides nothing but the order of sums, so one may go on with what another began.
        precision: what the encoder computes in, training and evaluating; weights are float32 and heads made in float32.
        batch_norm: the statistics of merged models: "frozen", as the merge has them (theta_0's, unless training moved
            them), or "recalibrated" on training examples of all tasks, which an exemplar-free method may not keep.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    data: Choice
    model: Choice
    head: Choice
    scenario: Choice
    fit: FitOptions
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    training: list[Choice] = ["sequential", "independent", "joint"]
    rules: list[Choice | list[Any]] = ["average", "task_arithmetic", "ties", "random_mix", "magmax"]
    calibrations: list[Choice] = []
    factors: list[float] = []
    sweep: list[float] = []
    validation: int = Field(0, ge=0)
    among: Literal["seen", "all"] = "seen"
    rows: Literal["all", "default", "last"] = "all"
    measure_on: Literal["test", "validation"] = "test"
    save_every: int = Field(0, ge=0)
    parallel: Parallel = "ddp"
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_norm: Literal["frozen", "recalibrated"] = "frozen"
    _code_folder: Path | None = PrivateAttr(None)  # private, so that no recipe can set it; it travels to workers

    def allow_code(self, folder: str | Path) -> Experiment:
        """Return the experiment, whose names may also be "module:function" in Python files of this folder.

        The functions are imported and called: allow it for recipes and files that you trust.
        """
        allowed = self.model_copy()
        allowed._code_folder = Path(folder).absolute()
        return allowed

    @property
    def code_folder(self) -> Path | None:
        """The folder whose Python files the names may mean; None for registered names alone."""
        return self._code_folder

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds are different whole numbers from 0 on")
        return seeds

    def check(self) -> Experiment:
        """Itself. Raises MagMaxError for names and options that are none, and factors without validation examples."""
        with registry.code_from(self.code_folder):
            for kind in registry.PARTS:
                registry.find(kind, registry.split(kind, getattr(self, kind))[0])
        for training in self.training:
            training_options(training)
        for rule in self.rules:
            rule_from(rule)
        named = {
            "training": (self.training, list(self.training_choices)),
            "rule": (self.rules, [rule_name(r) for r in self.rules]),
            "calibration": (self.calibrations, [rule_name(c) for c in self.calibrations]),
        }
        for kind, (wanted, names) in named.items():
            if len(set(names)) < len(wanted):
                raise MagMaxError(f"{kind}s: one is named twice: {', '.join(map(str, wanted))}")
        for calibration in self.calibrations:
            name, _ = calibration_options(calibration)
            if name != "wsc" and not self.validation:
                raise MagMaxError(
                    f"{name} measures features on validation examples; hold some out, as in validation: 10"
                )
        if (self.factors or self.measure_on == "validation") and not self.validation:
            raise MagMaxError(
                "factors are chosen on validation examples, never on the test set; say how many of each class are held "
                "out of the training data, such as validation: 10"
            )
        return self

    @property
    def training_choices(self) -> dict[str, dict[str, Any]]:
        """The trainings by name, each with all its options."""
        return dict(training_options(training) for training in self.training)

    def training_recipe(self, seed: int, training: str) -> dict[str, Any]:
        """All that decides the checkpoints of a training."""
        keys = ("data", "model", "head", "scenario", "validation")
        return {
            **{key: getattr(self, key) for key in keys},
            **({} if self.precision == "float32" else {"precision": self.precision}),
            "fit": self.fit.model_dump(),
            "seed": seed,
            "training": {training: self.training_choices.get(training, {})},
        }

    def cells(self) -> list[BenchmarkCell]:
        """Everything that there is to measure: one cell for each seed, training and rule, zero-shot first."""
        cells: list[BenchmarkCell] = []
        for seed in self.seeds:
            cells.append(BenchmarkCell(seed=seed, training=ZERO_SHOT, rule=ZERO_SHOT))
            for training in self.training_choices:
                if training not in FROM_BASE:
                    cells.append(BenchmarkCell(seed=seed, training=training, rule=LAST_CHECKPOINT))
                if training not in REFERENCES:
                    cells += [
                        BenchmarkCell(seed=seed, training=training, rule=rule, calibration=calibration)
                        for rule in self.rules
                        for calibration in (None, *self.calibrations)
                    ]
        return cells

    def cell_recipe(self, cell: BenchmarkCell) -> dict[str, Any]:
        """All that decides a cell's record."""
        measured = {key: getattr(self, key) for key in ("among", "rows", "measure_on")}
        factors: dict[str, Any] = {"factors": self.factors, "sweep": self.sweep} if cell.scaled else {}
        if cell.merges and self.batch_norm != "frozen":
            factors["batch_norm"] = self.batch_norm
        chosen = {"rule": cell.rule, **factors}
        if cell.calibration is not None:
            name, options = calibration_options(cell.calibration)
            chosen["calibration"] = {name: options}
        return {"format": RECORD_FORMAT, **self.training_recipe(cell.seed, cell.training), **measured, **chosen}


class BenchmarkCell(BaseModel):
    """One measurement: a rule applied to the checkpoints of one training of one seed, and calibrated or not."""

    model_config = ConfigDict(frozen=True)
    seed: int
    training: str
    rule: Choice | list[Any]
    calibration: Choice | None = None

    @property
    def merges(self) -> bool:
        return self.rule not in (LAST_CHECKPOINT, ZERO_SHOT)

    @property
    def scaled(self) -> bool:
        """Return whether its scaling factor matters."""
        return self.merges and self.calibration is None

    @property
    def method(self) -> str:
        """Its name: "zero_shot", RULE/CHAIN, or RULE+CALIBRATION/CHAIN."""
        calibrated = "" if self.calibration is None else f"+{rule_name(self.calibration)}"
        return ZERO_SHOT if self.rule == ZERO_SHOT else f"{rule_name(self.rule)}{calibrated}/{self.training}"


def rule_name(rule: Choice | list[Any]) -> str:
    """A rule in one word that can be part of a file's name: "ties", "ties(density=0.1)", "dare+magmax"."""
    if isinstance(rule, str):
        return rule
    if isinstance(rule, list):
        return "+".join(rule_name(part) for part in rule)
    ((name, options),) = rule.items()
    options_text = ",".join(f"{key}={value}" for key, value in (options or {}).items())
    return f"{name}({options_text})" if options_text else name


def _known_options(
    kind: str, table: Mapping[str, Mapping[str, Any]], choice: Choice
) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """A choice's name, the options given, and all that are known, with defaults; refuses what is none."""
    name, chosen = registry.split(kind, choice)
    if name not in table:
        raise MagMaxError(f"{kind}: there is no {name!r}; {nearest_hint(name, list(table))}")
    defaults = table[name]
    for option in chosen:
        if option not in defaults:
            hint = nearest_hint(option, list(defaults)) if defaults else "it takes none"
            raise MagMaxError(f"{kind}: {name} has no option {option!r}; {hint}")
    return name, chosen, defaults


def training_options(training: Choice) -> tuple[str, dict[str, Any]]:
    """A training's name and all its options. Raises MagMaxError for a name or an option that is none."""
    if registry.split("training", training)[0] == "given":
        raise MagMaxError("training: given is now external")
    name, chosen, defaults = _known_options("training", TRAININGS, training)
    for option, value in chosen.items():
        if name == "external":
            if not isinstance(value, list) or not all(isinstance(model, str) for model in value):
                raise MagMaxError(f"training: external needs models to be a list of paths, not {value!r}")
        elif type(value) not in (int, float) or (type(defaults[option]) is int and type(value) is not int) or value < 0:
            raise MagMaxError(f"training: {name} needs {option} to be a number like {defaults[option]}, not {value!r}")
    return name, {**defaults, **chosen}


def calibration_options(calibration: Choice) -> tuple[str, dict[str, Any]]:
    """A calibration's name and all its options. Raises MagMaxError for a name or an option that is none."""
    name, chosen, defaults = _known_options("calibrations", CALIBRATIONS, calibration)
    for option, value in chosen.items():
        if option == "n" and (type(value) is not int or value < 1):
            raise MagMaxError(f"calibrations: {name} needs n to be a whole number of 1 or more, not {value!r}")
        if name != "wsc" and (allowed := CALIBRATION_VALUES.get(option)) and value not in allowed:
            allowed_text = " or ".join(str(one).lower() for one in allowed if one is not None)
            raise MagMaxError(f"calibrations: {name} needs {option} to be {allowed_text}, not {value!r}")
    if name == "wsc":
        rule_from(["magmax", {"calibrate_weights": chosen}])  # which checks the options
    return name, {**defaults, **chosen}


def digest_of(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """A short digest of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
