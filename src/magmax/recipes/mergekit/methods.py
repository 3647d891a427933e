"""mergekit's merge methods: what each takes, its defaults, and the rule that does the same here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...rules import (
    Average,
    AverageOrSum,
    Breadcrumbs,
    Dare,
    Della,
    Elect,
    ElectSum,
    Karcher,
    ModelStock,
    NearSwap,
    Numbers,
    PerModel,
    Prune,
    Rule,
    Sce,
    Slerp,
    TaskArithmetic,
    TaskVectorTransform,
    chain,
)
from ...rules.average import MIN_WEIGHT_SUM
from ...rules.schedules import all_numbers
from .parameters import ParameterLookup

Default = bool | int | float | None


@dataclass(frozen=True)
class MergekitMethod:
    """A merge method.

    Attributes:
        rule: makes the rule from what a recipe sets.
        shared: parameters that are the same for all models, and their defaults; None means that there is none.
        own: parameters that each model has.
        counted: whether there is no start: a base model that is named is a model like the others.
        least, most: how many models, without the base if that is the start.
    """

    rule: Callable[[ParameterLookup], Rule]
    shared: Mapping[str, Default] = field(default_factory=dict[str, Default])
    own: Mapping[str, Default] = field(default_factory=dict[str, Default])
    counted: bool = False
    least: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Sparsifier:
    """A way to thin out task vectors, with the parameters it has beyond `density`."""

    parts: Callable[[ParameterLookup, bool], list[TaskVectorTransform]]
    rescale: bool = False
    own: Mapping[str, Default] = field(default_factory=dict[str, Default])


def _linear_rule(parameters: ParameterLookup) -> Rule:
    weights = parameters.per_model("weight", None)
    return Average(weights) if parameters.constant("normalize", True) else TaskArithmetic(weights)


def _densities(parameters: ParameterLookup) -> Numbers:
    """A density for each model; in mergekit, too, one above 1 keeps everything."""
    return parameters.per_model("density", 1.0, lambda density: min(density, 1.0))


def _no_sparsifier(parameters: ParameterLookup, rescale: bool) -> list[TaskVectorTransform]:
    return []


def _keep_largest(parameters: ParameterLookup, rescale: bool) -> list[TaskVectorTransform]:
    _reject_rescale(parameters, rescale)
    return [Prune(density=_densities(parameters), span="tensor")]


def _keep_at_random(parameters: ParameterLookup, rescale: bool) -> list[TaskVectorTransform]:
    if not rescale:
        return [Prune(density=_densities(parameters), which="random")]
    return [Dare(density=_densities(parameters))]


def _breadcrumbs(parameters: ParameterLookup, rescale: bool) -> list[TaskVectorTransform]:
    _reject_rescale(parameters, rescale)
    return [Breadcrumbs(density=_densities(parameters), gamma=parameters.per_model("gamma", 0.01))]


def _della(parameters: ParameterLookup, rescale: bool) -> list[TaskVectorTransform]:
    if not rescale:
        raise parameters.unsupported("rescale", "della without rescaling; leave rescale out")
    return [Della(density=_densities(parameters), epsilon=parameters.per_model("epsilon", 0.15))]


def _reject_rescale(parameters: ParameterLookup, rescale: bool) -> None:
    if rescale:
        raise parameters.unsupported("rescale", "rescaling to the norm before trimming; raise lambda instead")


NO_SPARSIFICATION = Sparsifier(_no_sparsifier)
MAGNITUDE = Sparsifier(_keep_largest)
RANDOM = Sparsifier(_keep_at_random, rescale=True)
MAGNITUDE_OUTLIERS = Sparsifier(_breadcrumbs, own={"gamma": 0.01})
DELLA_MAGPRUNE = Sparsifier(_della, rescale=True, own={"epsilon": 0.15})


def _mean_rule(weights: Numbers) -> Rule:
    """The weighted mean, or, as in mergekit, the sum where weights sum to zero."""
    if not isinstance(weights, PerModel):
        return AverageOrSum(weights) if any(abs(w) < MIN_WEIGHT_SUM for w in all_numbers(weights)) else Average(weights)
    may_cancel = weights.varies_by_tensor or abs(sum(all_numbers(weights))) < MIN_WEIGHT_SUM
    return AverageOrSum(weights) if may_cancel else Average(weights)


def _generalized_task_arithmetic(thinning: Sparsifier, elect: bool, normalize: bool) -> MergekitMethod:
    """Thin out the task vectors, perhaps elect a sign, and add up what is left or take its mean."""

    def rule(given: ParameterLookup) -> Rule:
        weights, mean = given.per_model("weight", None), given.constant("normalize", normalize)
        parts = thinning.parts(given, given.constant("rescale", thinning.rescale))
        if elect:
            return chain(*parts, Elect(weights) if mean else ElectSum(weights))
        return chain(*parts, _mean_rule(weights) if mean else TaskArithmetic(weights))

    shared = {"normalize": normalize, "rescale": thinning.rescale, "lambda": 1.0, "int8_mask": False}
    return MergekitMethod(rule, shared, {"weight": None, "density": 1.0, **thinning.own})


def _model_stock_rule(parameters: ParameterLookup) -> Rule:
    if parameters.constant("filter_wise", False):
        raise parameters.unsupported("filter_wise", "model_stock row by row; leave filter_wise out")
    return ModelStock()


MERGE_METHODS: dict[str, MergekitMethod] = {
    "linear": MergekitMethod(_linear_rule, {"normalize": True}, {"weight": None}, counted=True),
    "task_arithmetic": _generalized_task_arithmetic(NO_SPARSIFICATION, elect=False, normalize=False),
    "ties": _generalized_task_arithmetic(MAGNITUDE, elect=True, normalize=True),
    "dare_linear": _generalized_task_arithmetic(RANDOM, elect=False, normalize=False),
    "dare_ties": _generalized_task_arithmetic(RANDOM, elect=True, normalize=False),
    "della_linear": _generalized_task_arithmetic(DELLA_MAGPRUNE, elect=False, normalize=False),
    "della": _generalized_task_arithmetic(DELLA_MAGPRUNE, elect=True, normalize=True),
    "breadcrumbs": _generalized_task_arithmetic(MAGNITUDE_OUTLIERS, elect=False, normalize=False),
    "breadcrumbs_ties": _generalized_task_arithmetic(MAGNITUDE_OUTLIERS, elect=True, normalize=False),
    "sce": MergekitMethod(
        lambda given: Sce(given.number("select_topk", 1.0, lambda part: min(part, 1.0))),
        {"select_topk": 1.0, "int8_mask": False},
    ),
    "slerp": MergekitMethod(lambda given: Slerp(t=given.number("t")), {"t": None}, most=1),
    "nearswap": MergekitMethod(lambda given: NearSwap(t=given.number("t")), {"t": None}, most=1),
    "model_stock": MergekitMethod(_model_stock_rule, {"filter_wise": False}, least=2),
    "karcher": MergekitMethod(
        lambda given: Karcher(max_iter=given.constant("max_iter", 10), tol=given.constant("tol", 1e-5)),
        {"max_iter": 10, "tol": 1e-5},
        counted=True,
    ),
    "passthrough": MergekitMethod(
        lambda given: TaskArithmetic(given.per_model("scale", 1.0)), {}, {"scale": 1.0}, counted=True, most=1
    ),
}

UNSUPPORTED_METHODS: dict[str, str] = {
    "nuslerp": "for two models without a base, slerp with t = w2 / (w1 + w2) is the same arc",
    "multislerp": "karcher is the mean on the sphere that is supported",
    "arcee_fusion": "nearswap and breadcrumbs also choose by the size of a change",
    "ram": "ties also treats what several models changed apart",
    "ramplus_tl": "ties also treats what several models changed apart",
}
"""Methods that are not supported, and what comes nearest."""

ALL_PARAMETERS = sorted(
    {name for method in MERGE_METHODS.values() for name in (*method.shared, *method.own)}
    | {"nuslerp_row_wise", "nuslerp_flatten", "normalize_weights", "eps", "r", "alpha"}
)
"""Every parameter that some method takes; one that the recipe's method does not take has no effect in mergekit."""
