"""The records of the benchmark of preferences: the baselines of a training, and each kind of environment on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...rules import Average, MagMax, PerModel, Rule, Ties, Tunable
from ..mixtures import MIXTURES, TargetEnvironment, draw_environments
from .environments_config import EnvironmentsConfig, RecordKey, mixture_shares
from .target_texts import TEST, EnvironmentTarget, Weights, reference_preferences
from .trained_models import ClassIds, TrainedModels

FIXED_FACTOR = 0.5
BASELINE_RULES: Mapping[str, Rule] = {"average": Average(), "ties": Ties(), "magmax": MagMax()}
CONTROL_METHOD = "weighted_average"
CONTROL_SOURCES = ("label", "auto", "oracle")
"""The preferences that the weighted average is tried with."""

ResultRow = dict[str, Any]


def measure_baselines(config: EnvironmentsConfig, evaluator: TrainedModels) -> dict[str, Any]:
    """Return what needs no environment: each rule's factor chosen on held-out training examples, and what it predicts.

    A rule's score is the mean over tasks of its accuracy; the lowest factor of equal ones is chosen.
    """
    context = evaluator.context
    everything, labels, held = range(evaluator.num_tasks), context.validation.labels, evaluator.validation_task_ids
    evaluator.load_checkpoint(0)
    predictions: dict[str, ClassIds] = {"zero_shot": evaluator.predict_rows(context.test, evaluator.test_task_ids >= 0)}
    evaluator.load_checkpoint(evaluator.num_tasks)
    predictions["last"] = evaluator.predict_rows(context.test, evaluator.test_task_ids >= 0)
    search: dict[str, dict[str, float]] = {}
    chosen: dict[str, float] = {}
    for name, rule in BASELINE_RULES.items():
        factors = sorted({*config.factors, rule.default_scaling_factor})
        scores = {
            factor: float(
                np.mean(
                    accuracy_by_task(evaluator.predict_rows(context.validation, held >= 0) == labels, held, everything)
                )
            )
            for factor, _ in zip(factors, evaluator.load_merges(rule, factors), strict=True)
        }
        chosen[name] = max(factors, key=lambda factor: scores[factor])
        search[name] = {f"{factor:g}": score for factor, score in scores.items()}
        used = list(dict.fromkeys([FIXED_FACTOR, chosen[name], rule.default_scaling_factor]))
        for factor, classes in zip(used, evaluator.predict(rule, used, everything), strict=True):
            predictions[f"{name}@{factor:g}"] = classes
    return {
        "search": search,
        "chosen": chosen,
        "own": evaluator.magmax_shares,
        "predicted": {name: classes.tolist() for name, classes in predictions.items()},
    }


class MethodPredictions(NamedTuple):
    """A method in an environment: its name, and the class of each test example at each of its scaling factors."""

    method: str
    factors: Mapping[str, float | None]
    predictions: Mapping[str, ClassIds]
    weights: Weights = ()
    extra: Mapping[str, Any] = {}


class EnvironmentScorer:
    """The measurements of one training in all environments."""

    def __init__(self, config: EnvironmentsConfig, evaluator: TrainedModels, baselines: Mapping[str, Any]) -> None:
        self.config, self.evaluator, self.baselines = config, evaluator, baselines
        self.labels = evaluator.context.test.labels
        self.magmax_factor = float(baselines["chosen"]["magmax"])
        self.factor_variants = {"0.5": FIXED_FACTOR, "chosen": self.magmax_factor}

    def draw_environment(self, mixture: str, draw: int) -> TargetEnvironment:
        """An environment; the same for every training of a seed, and however many are drawn."""
        order = list(MIXTURES).index(mixture) if mixture in MIXTURES else 100 + int(mixture[1:])
        return draw_environments(
            self.evaluator.test_task_ids,
            mixtures={mixture: mixture_shares(mixture)},
            draws=draw + 1,
            target_fraction=self.config.target,
            seed=[self.evaluator.context.seed, order],
        )[draw]

    def measure_environment(self, cell: RecordKey) -> list[ResultRow]:
        """Every method in one environment."""
        environment = self.draw_environment(cell.mixture, cell.draw)
        target = EnvironmentTarget(self.evaluator, TEST, environment.target_rows)
        preferences = {source: self.compute_preference(source, target, cell.draw) for source in self.config.sources}
        mixture = reference_preferences(mixture_shares(cell.mixture), environment.tasks, self.evaluator.num_tasks)
        preferences |= {source: {"weights": list(weights)} for source, weights in mixture.items()}
        rows = self.score_results(environment, self.baseline_results())
        for source, preference in preferences.items():
            rows += self.score_results(environment, self.preference_results(source, preference, environment))
        return rows

    def compute_preference(self, source: str, target: EnvironmentTarget, seed: int) -> dict[str, Any]:
        """A source's weights, and what else is to be told of them."""
        if source == "auto":
            return target.choose_weights(self.magmax_factor, self.config.temperatures, self.config.pull, seed)
        return {"weights": target.estimate_weights(source)}

    def baseline_results(self) -> Iterator[MethodPredictions]:
        """The methods without a preference."""
        predicted = {name: np.array(classes) for name, classes in self.baselines["predicted"].items()}
        for name in ("zero_shot", "last"):
            yield MethodPredictions(name, {"": None}, {"": predicted[name]})
        for name in BASELINE_RULES:
            factors = {"0.5": FIXED_FACTOR, "chosen": float(self.baselines["chosen"][name])}
            yield MethodPredictions(
                name, factors, {key: predicted[f"{name}@{factor:g}"] for key, factor in factors.items()}
            )

    def preference_results(
        self, source: str, preference: Mapping[str, Any], environment: TargetEnvironment
    ) -> Iterator[MethodPredictions]:
        """`tunable` under a preference, by every selection of this draw, and the control."""
        others = self.config.extra_selections(environment.mixture, environment.draw)
        yield from self.tunable_results(source, preference, environment, ["optimal", *others])
        if source in CONTROL_SOURCES:
            rule = Average(weights=PerModel(tuple(preference["weights"])))
            factors = {"0.5": FIXED_FACTOR, "chosen": float(self.baselines["chosen"]["average"])}
            yield self.evaluate_rule(f"{CONTROL_METHOD}/{source}", rule, factors, preference, environment)

    def tunable_results(
        self, source: str, preference: Mapping[str, Any], environment: TargetEnvironment, selections: Sequence[str]
    ) -> Iterator[MethodPredictions]:
        """`tunable` under a preference."""
        for selection in selections:
            rule = Tunable(
                preference=tuple(preference["weights"]),
                selection=cast("Literal['optimal', 'smallest', 'random']", selection),
                seed=self.evaluator.context.seed,
            )
            yield self.evaluate_rule(
                f"tunable/{selection}/{source}", rule, self.factor_variants, preference, environment
            )

    def evaluate_rule(
        self,
        method: str,
        rule: Rule,
        factors: Mapping[str, float],
        preference: Mapping[str, Any],
        environment: TargetEnvironment,
    ) -> MethodPredictions:
        """A rule under a preference, on the tasks of an environment."""
        classes = self.evaluator.predict(rule, list(factors.values()), environment.tasks)
        more = {key: value for key, value in preference.items() if key != "weights"}
        return MethodPredictions(
            method, factors, dict(zip(factors, classes, strict=True)), tuple(preference["weights"]), more
        )

    def score_results(self, environment: TargetEnvironment, results: Iterator[MethodPredictions]) -> list[ResultRow]:
        """The micro accuracy of each on the environment's scored rows."""
        rows: list[ResultRow] = []
        for one in results:
            for variant, classes in one.predictions.items():
                right = classes[environment.scored_rows] == self.labels[environment.scored_rows]
                rows.append(
                    {
                        "mixture": environment.mixture,
                        "draw": environment.draw,
                        "tasks": list(environment.tasks),
                        "method": one.method,
                        "variant": variant,
                        "scaling_factor": one.factors[variant],
                        "accuracy": float(right.mean()),
                        "scored": len(environment.scored_rows),
                        "weights": list(one.weights),
                        **one.extra,
                    }
                )
        return rows


def accuracy_by_task(is_correct: NDArray[np.bool_], task_ids: ClassIds, tasks: Sequence[int]) -> list[float]:
    """The share of each task's examples that are right."""
    return [float(is_correct[task_ids == task].mean()) for task in tasks]
