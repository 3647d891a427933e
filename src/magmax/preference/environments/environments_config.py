"""The benchmark of preferences in words: which environments, which preferences, how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from ...continual.experiment import REFERENCES, Experiment, digest_of
from ...errors import MagMaxError, nearest_hint
from ..candidates import TEMPERATURES
from ..mixtures import MIXTURES

RECORD_FORMAT = 1
"""Of the records; a new one makes old records be computed again."""

AUTO_VERSION = 2
"""Of what `auto` does; a new one makes records with it be computed again."""

PreferenceSource = Literal["label", "ot", "cos", "mmd", "auto"]
SelectionName = Literal["smallest", "random"]
BASELINES, CURVES, SAMPLES, ARCHIVE = "baselines", "curves", "samples", "archive"


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ControlCurves(_StrictModel):
    """Control curves, over the test examples of all tasks, `selection` optimal.

    Attributes:
        schedule: the a of `schedule(a)`, which moves weight from early to late tasks.
        weights: the weight of one task, the others sharing the rest evenly.
        tasks: how many tasks the second is drawn for: the first, the last, and others at equal distances.
    """

    schedule: list[float] = [0.25, 0.5, 1.0, 2.0, 4.0]
    weights: list[float] = [0.0, 0.25, 0.5, 0.75, 1.0]
    tasks: int = Field(3, ge=1)


class SampleCurve(_StrictModel):
    """Numbers of target samples to try, as multiples of the number of tasks in the environment.

    They are drawn by the environment's mixture from the training examples that were held out, and the environments are
    scored on the same rows as elsewhere.
    """

    per_task: list[int] = Field([1, 5, 10, 20], min_length=1)
    draws: int = Field(1, ge=1)
    sources: list[PreferenceSource] = ["label", "ot", "auto"]


class ArchiveComparison(_StrictModel):
    """Archives of these fractions and bits against the models themselves."""

    top: list[float] = [0.3]
    bits: list[Literal[8, 16, 32]] = [8]


class EnvironmentsConfig(_StrictModel):
    """The configuration of `magmax study environments`.

    Attributes:
        experiment: the recipe of `magmax bench` whose trainings are merged; relative to this one's file.
        training: of these, the ones to merge.
        seeds: of these, the ones to take; none means all.
        mixtures: kinds of environments, of `MIXTURES`.
        draws: environments of each kind, over tasks drawn at random.
        crowd_draws: environments of M tasks in equal parts, for each M from 1 to T that is not among the mixtures; 0
            for none.
        target: the part of each environment's examples that preferences are made of; the rest is scored.
        sources: where preferences come from.
        selections: how else than by `optimal`, which is always tried, `tunable` chooses under a preference, and on how
            many draws of each of the mixtures.
        factors: scaling factors for the rules to choose from, on the training examples that were held out; beside
            their own defaults and 0.5. By default the experiment's. `tunable` takes what MagMax chose.
        temperatures, pull: of `auto`; see `choose_preference`.
        curves, samples, archive: the other questions; null for none.
    """

    experiment: str
    training: list[str] = Field(["sequential", "independent"], min_length=1)
    seeds: list[int] = []
    mixtures: list[str] = list(MIXTURES)
    draws: int = Field(5, ge=1)
    crowd_draws: int = Field(2, ge=0)
    target: float = Field(0.1, gt=0, lt=1)
    sources: list[PreferenceSource] = list(get_args(PreferenceSource))
    selections: dict[SelectionName, int] = {"smallest": 5, "random": 5}
    factors: list[float] = []
    temperatures: list[float] = list(TEMPERATURES)
    pull: float = Field(0.01, ge=0)
    curves: ControlCurves | None = Field(default_factory=lambda: ControlCurves.model_validate({}))
    samples: SampleCurve | None = Field(default_factory=lambda: SampleCurve.model_validate({}))
    archive: ArchiveComparison | None = Field(default_factory=lambda: ArchiveComparison.model_validate({}))

    def resolve(self, experiment: Experiment) -> EnvironmentsConfig:
        """Itself, with what it leaves to the experiment. Raises MagMaxError for what does not fit that."""
        for kind, chosen, allowed in (
            ("training", self.training, [name for name in experiment.training_choices if name not in REFERENCES]),
            ("seeds", self.seeds, experiment.seeds),
            ("mixtures", self.mixtures, list(MIXTURES)),
        ):
            for one in chosen:
                if one not in allowed:
                    raise MagMaxError(f"{kind}: there is no {one!r}; {nearest_hint(str(one), list(map(str, allowed)))}")
        if not experiment.validation:
            raise MagMaxError(
                "scaling factors are chosen on training examples that were held out, and the experiment holds out "
                "none; give it validation: 10"
            )
        factors = sorted({0.5, *(self.factors or experiment.factors)})
        return self.model_copy(update={"seeds": self.seeds or experiment.seeds, "factors": factors})

    def cell_names(self, num_tasks: int) -> list[str]:
        """Return what is measured of each training, one record each: the baselines, the environments ("D1-0"), other
        questions.

        Of every kind of environment the first draw comes before any second one.
        """
        widths = {len(MIXTURES[name]) for name in self.mixtures if len(set(MIXTURES[name])) == 1}
        mixtures = [name for name in self.mixtures if len(MIXTURES[name]) <= num_tasks]
        crowds = [f"M{m}" for m in range(1, num_tasks + 1) if m not in widths]
        drawn = [f"{name}-{draw}" for draw in range(self.draws) for name in mixtures]
        drawn += [f"{name}-{draw}" for draw in range(self.crowd_draws) for name in crowds]
        asked = {CURVES: self.curves, SAMPLES: self.samples, ARCHIVE: self.archive}
        return [BASELINES, *drawn, *(name for name, words in asked.items() if words is not None)]

    def extra_selections(self, mixture: str, draw: int) -> list[SelectionName]:
        """The other selections that are tried in this environment."""
        return [name for name, draws in self.selections.items() if mixture in MIXTURES and draw < draws]

    def cell_recipe(self, experiment: Experiment, cell: RecordKey) -> dict[str, Any]:
        """All that decides a record."""
        keys = {
            BASELINES: ["factors"],
            CURVES: ["factors", "curves"],
            SAMPLES: ["factors", "target", "temperatures", "pull", "samples", "mixtures"],
            ARCHIVE: ["factors", "archive"],
        }
        environment = ["factors", "target", "sources", "temperatures", "pull"]
        content = self.model_dump(include=set(keys.get(cell.name, environment)))
        if cell.name not in keys:
            content["selections"] = self.extra_selections(cell.mixture, cell.draw)
        sources = content["samples"]["sources"] if cell.name == SAMPLES else content.get("sources", [])
        if "auto" in sources:
            content["auto"] = AUTO_VERSION
        return {
            "format": RECORD_FORMAT,
            **experiment.training_recipe(cell.seed, cell.training),
            "part": cell.name,
            **content,
        }

    def cell_digest(self, experiment: Experiment, cell: RecordKey) -> str:
        return digest_of(self.cell_recipe(experiment, cell))


class RecordKey(NamedTuple):
    """One record: a seed, a training, and what is measured of it."""

    seed: int
    training: str
    name: str

    @property
    def mixture(self) -> str:
        """Of an environment "D1-0": D1."""
        return self.name.partition("-")[0]

    @property
    def draw(self) -> int:
        """Of an environment "D1-0": 0."""
        return int(self.name.partition("-")[2] or 0)


def mixture_shares(name: str) -> Sequence[float]:
    """The tasks' shares in a kind of environment: of `MIXTURES`, or "M4" for four in equal parts."""
    return MIXTURES[name] if name in MIXTURES else (1 / int(name[1:]),) * int(name[1:])


SECTION_CONFIGS: Mapping[str, type[_StrictModel]] = {
    "curves": ControlCurves,
    "samples": SampleCurve,
    "archive": ArchiveComparison,
}
"""The parts of a study that have keys of their own."""
