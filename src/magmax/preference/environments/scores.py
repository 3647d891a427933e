"""The records of the benchmark of preferences: the baselines of a chain, and each kind of environment on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...rules import Average, MagMax, PerModel, Rule, Ties, Tunable
from ..mixtures import MIXTURES, Environment, environments
from .environments_config import Part, Study, shares_of
from .target_texts import TEST, Target, Weights, known
from .trained_models import Classes, Learned

HALF = 0.5
RULES: Mapping[str, Rule] = {"average": Average(), "ties": Ties(), "magmax": MagMax()}
CONTROL = "weighted_average"
CONTROLLED = ("label", "auto", "oracle")
"""The preferences that the weighted average is tried with."""

Row = dict[str, Any]


def baselines(study: Study, learned: Learned) -> dict[str, Any]:
    """What needs no environment: each rule's factor chosen on held-out training examples, and what it predicts.

    A rule's score is the mean over tasks of its accuracy; the lowest factor of equal ones is chosen.
    """
    here = learned.here
    everything, labels, held = range(learned.tasks), here.validation.labels, learned.held_task_of
    learned.put(0)
    found: dict[str, Classes] = {"zero_shot": learned.seen(here.test, learned.task_of >= 0)}
    learned.put(learned.tasks)
    found["last"] = learned.seen(here.test, learned.task_of >= 0)
    search: dict[str, dict[str, float]] = {}
    chosen: dict[str, float] = {}
    for name, rule in RULES.items():
        factors = sorted({*study.factors, rule.default_factor})
        scores = {
            factor: float(np.mean(by_task(learned.seen(here.validation, held >= 0) == labels, held, everything)))
            for factor, _ in zip(factors, learned.merged(rule, factors), strict=True)
        }
        chosen[name] = max(factors, key=lambda factor: scores[factor])
        search[name] = {f"{factor:g}": score for factor, score in scores.items()}
        used = list(dict.fromkeys([HALF, chosen[name], rule.default_factor]))
        for factor, classes in zip(used, learned.predicted(rule, used, everything), strict=True):
            found[f"{name}@{factor:g}"] = classes
    return {
        "search": search,
        "chosen": chosen,
        "own": learned.own,
        "predicted": {name: classes.tolist() for name, classes in found.items()},
    }


class Tried(NamedTuple):
    """A method in an environment: its name, and the class of each test example at each of its scaling factors."""

    method: str
    factors: Mapping[str, float | None]
    classes: Mapping[str, Classes]
    weights: Weights = ()
    more: Mapping[str, Any] = {}


class Measure:
    """One chain's records, given its baselines."""

    def __init__(self, study: Study, learned: Learned, base: Mapping[str, Any]) -> None:
        self.study, self.learned, self.base = study, learned, base
        self.labels = learned.here.test.labels
        self.factor = float(base["chosen"]["magmax"])
        self.variants = {"0.5": HALF, "chosen": self.factor}

    def drawn(self, kind: str, draw: int) -> Environment:
        """An environment; the same for every chain of a seed, and however many are drawn."""
        order = list(MIXTURES).index(kind) if kind in MIXTURES else 100 + int(kind[1:])
        return environments(
            self.learned.task_of,
            mixtures={kind: shares_of(kind)},
            draws=draw + 1,
            target=self.study.target,
            seed=[self.learned.here.seed, order],
        )[draw]

    def environment(self, part: Part) -> list[Row]:
        """Every method in one environment."""
        environment = self.drawn(part.kind, part.draw)
        target = Target(self.learned, TEST, environment.target)
        preferences = {source: self.preference(source, target, part.draw) for source in self.study.sources}
        mixture = known(shares_of(part.kind), environment.tasks, self.learned.tasks)
        preferences |= {source: {"weights": list(weights)} for source, weights in mixture.items()}
        rows = self.scored(environment, self.fixed())
        for source, found in preferences.items():
            rows += self.scored(environment, self.preferred(source, found, environment))
        return rows

    def preference(self, source: str, target: Target, seed: int) -> dict[str, Any]:
        """A source's weights, and what else is to be told of them."""
        if source == "auto":
            return target.chosen(self.factor, self.study.temperatures, self.study.pull, seed)
        return {"weights": target.weights(source)}

    def fixed(self) -> Iterator[Tried]:
        """The methods without a preference."""
        predicted = {name: np.array(classes) for name, classes in self.base["predicted"].items()}
        for name in ("zero_shot", "last"):
            yield Tried(name, {"": None}, {"": predicted[name]})
        for name in RULES:
            factors = {"0.5": HALF, "chosen": float(self.base["chosen"][name])}
            yield Tried(name, factors, {key: predicted[f"{name}@{factor:g}"] for key, factor in factors.items()})

    def preferred(self, source: str, found: Mapping[str, Any], environment: Environment) -> Iterator[Tried]:
        """`tunable` under a preference, by every selection of this draw, and the control."""
        others = self.study.selected(environment.mixture, environment.draw)
        yield from self.selected(source, found, environment, ["optimal", *others])
        if source in CONTROLLED:
            rule = Average(weights=PerModel(tuple(found["weights"])))
            factors = {"0.5": HALF, "chosen": float(self.base["chosen"]["average"])}
            yield self.tried(f"{CONTROL}/{source}", rule, factors, found, environment)

    def selected(
        self, source: str, found: Mapping[str, Any], environment: Environment, selections: Sequence[str]
    ) -> Iterator[Tried]:
        """`tunable` under a preference."""
        for selection in selections:
            rule = Tunable(
                preference=tuple(found["weights"]),
                selection=cast("Literal['optimal', 'smallest', 'random']", selection),
                seed=self.learned.here.seed,
            )
            yield self.tried(f"tunable/{selection}/{source}", rule, self.variants, found, environment)

    def tried(
        self,
        method: str,
        rule: Rule,
        factors: Mapping[str, float],
        found: Mapping[str, Any],
        environment: Environment,
    ) -> Tried:
        """A rule under a preference, on the tasks of an environment."""
        classes = self.learned.predicted(rule, list(factors.values()), environment.tasks)
        more = {key: value for key, value in found.items() if key != "weights"}
        return Tried(method, factors, dict(zip(factors, classes, strict=True)), tuple(found["weights"]), more)

    def scored(self, environment: Environment, tried: Iterator[Tried]) -> list[Row]:
        """The micro accuracy of each on the environment's scored rows."""
        rows: list[Row] = []
        for one in tried:
            for variant, classes in one.classes.items():
                right = classes[environment.scored] == self.labels[environment.scored]
                rows.append(
                    {
                        "mixture": environment.mixture,
                        "draw": environment.draw,
                        "tasks": list(environment.tasks),
                        "method": one.method,
                        "variant": variant,
                        "scaling_factor": one.factors[variant],
                        "accuracy": float(right.mean()),
                        "scored": len(environment.scored),
                        "weights": list(one.weights),
                        **one.more,
                    }
                )
        return rows


def by_task(right: NDArray[np.bool_], task_of: Classes, tasks: Sequence[int]) -> list[float]:
    """The share of each task's examples that are right."""
    return [float(right[task_of == task].mean()) for task in tasks]
