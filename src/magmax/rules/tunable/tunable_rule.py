"""Tunable MagMax: a preference says how many elements each task supplies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

from ...errors import MagMaxError, nearest_hint
from ..contract import Rule
from ..statistics import Array, Block, Scope, Span, Statistics, StatisticsRequest
from . import windows
from .assignment import SupplyCount, take_from_winners
from .cascade import Cascade
from .dual import PricedAssignment
from .dual_prices import COPIES, LEAST_ROOM, ROOM, request_prices
from .quotas import NamedWeights, Weights, parse_weights, quotas


@dataclass(frozen=True)
class Tunable(Rule):
    """Of the d elements that moved, exactly n_t from task t, verbatim; the rest of the merge is MagMax.

        m[p] = tau_win(p)[p],   #{p : win(p) = t} = n_t,   sum_t n_t = d

    n is `preference` in whole numbers (largest remainders; a weight of 0 gives 0), over each tensor or the whole model.
    An element moved if some task vector is not zero there. With MagMax's own counts the result is MagMax.

    * `optimal`, this project's own, keeps the largest sum_p |m[p]| that the quotas allow. Its dual has a price a task,
      win(p) = argmax_t (|tau_t[p]| - price_t); equal magnitudes are decided by random numbers with an address.
    * `random`, the paper's, starts from MagMax among the tasks with a quota. From the last task to the second, those in
      surplus release random elements, each to the strongest of the tasks before. What the first task has too many of
      goes to the tasks that lack some, where they are the strongest first, and then at random.
    * `smallest` releases those of smallest magnitude instead; of equal ones the last by tensor name and flat offset.

    The authors' code counts elements that no task moved, rounds down and gives what remains to the first tasks.

    >>> import numpy as np
    >>> Tunable(preference=[1, 3])([np.float32([1, -3, 2, 5]), np.float32([-2, 1, -2, 4])])
    array([-2., -3., -2.,  4.], dtype=float32)

    Raises:
        MagMaxError: weights that are negative, not finite or all zero, or not one for each model.
    """

    name: ClassVar[str] = "tunable"
    scaling_factor: ClassVar[float] = 0.5
    paper: ClassVar[str] = "Hiroshima et al., Tunable MagMax, arXiv 2605.20803"
    cpu_only: ClassVar[bool] = True

    preference: Sequence[float] | Mapping[str, float] = ()
    span: Literal["model", "tensor"] = "model"
    selection: Literal["optimal", "random", "smallest"] = "optimal"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, choices in (("span", ("model", "tensor")), ("selection", ("optimal", "random", "smallest"))):
            if getattr(self, option) not in choices:
                raise MagMaxError(
                    f"tunable needs {option} to be one of {', '.join(choices)}, not {getattr(self, option)!r}"
                )
        object.__setattr__(self, "preference", parse_weights(self.preference))

    @property
    def passes(self) -> int:
        return 4

    @property
    def memory(self) -> int:
        if self.selection == "optimal":
            return 8 * COPIES * max(ROOM, LEAST_ROOM * len(self._weights))
        return windows.cascade_memory(len(self._weights), self.selection == "random")

    @property
    def statistics_span(self) -> Span:
        return Span(self.span)

    @property
    def shares(self) -> Sequence[float]:
        """The weights, to the sum 1."""
        return [weight / sum(self._weights) for weight in self._weights]

    @property
    def _weights(self) -> Weights:
        if self.preference and isinstance(next(iter(self.preference)), tuple):
            return tuple(weight for _, weight in cast("NamedWeights", self.preference))
        return cast("Weights", self.preference)

    @property
    def per_model(self) -> bool:
        return True

    def for_models(self, names: Sequence[str]) -> Self:
        if self._weights is self.preference:
            return self
        by_name = dict(cast("NamedWeights", self.preference))
        for name in by_name:
            if name not in names:
                hint = nearest_hint(name, list(names))
                raise MagMaxError(f"the preference names {name!r}, which is none of the models; {hint}")
        return replace(self, preference=[by_name.get(name, 0.0) for name in names])

    def describe(self) -> dict[str, Any]:
        preference = (
            list(self._weights) if self._weights is self.preference else dict(cast("NamedWeights", self.preference))
        )
        return {self.name: {**super().describe()[self.name], "preference": preference}}

    def check(self, tasks: int) -> None:
        super().check(tasks)
        if tasks == 1:
            raise MagMaxError("tunable needs two models or more: with one there is nothing to prefer; take magmax")
        if self._weights is not self.preference:
            raise MagMaxError("a preference by name needs models with names; give a list in the models' order")
        if len(self._weights) != tasks:
            raise MagMaxError(
                f"tunable needs a preference with one weight for each of the {tasks} models, not {len(self._weights)}: "
                f"{list(self._weights)}"
            )

    def statistics(self, scope: Scope) -> StatisticsRequest:
        supply: list[int] = (yield SupplyCount(scope.tasks, scope.float64)).tolist()
        wanted = quotas(self._weights, sum(supply))
        everyone = Cascade(scope.tasks, range(scope.tasks), self.selection == "random", self.seed, scope.float64)
        if wanted == supply:
            return everyone
        among = [task for task, count in enumerate(wanted) if count]
        quota = [wanted[task] for task in among]
        if len(among) == 1:
            return replace(everyone, among=among)
        if self.selection == "optimal":
            return (yield from request_prices(among, quota, self.seed))
        return (yield from windows.request_windows(replace(everyone, among=among), quota))

    def merge(self, block: Block, statistics: Statistics) -> Array:
        chosen: Cascade | PricedAssignment = statistics
        return take_from_winners(block, chosen.winners(block))

    def summarize(self, all_statistics: Collection[Statistics]) -> str:
        assignments = [answer for answer in all_statistics if isinstance(answer, PricedAssignment)]
        if not assignments:
            return ""
        retained, bound = sum(one.retained for one in assignments), sum(one.bound for one in assignments)
        gap = max(0.0, bound - retained) / bound if bound else 0.0
        return f"tunable: retains {retained:.9g} of magnitude; no choice could exceed {bound:.9g} (gap {gap:.1e})"
