"""DELLA: drop entries at random, the smaller the likelier, and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import MagMaxError
from ..contract import TaskVectorTransform
from ..random import keep_at_random
from ..schedules import Numbers, PerModel, for_all_models, for_model, validate_range
from ..selection import BINS, CodeHistogram, magnitude_codes
from ..statistics import Address, Array, Counts, Scope, Span, Statistics, StatisticsRequest, namespace


class MagnitudeRanks(NamedTuple):
    """The ranks of entries by magnitude, from 0 for the smallest to 1 for the largest.

    Attributes:
        row: the length of the rows to rank within; 0 where `tables` tell the ranks.
        tables: for each task the magnitudes it has, as the first 16 of their bits, and their ranks.
        float64: whether the magnitudes are of float64.
    """

    row: int
    tables: Sequence[tuple[NDArray[np.uint16], NDArray[np.float64]]] = ()
    float64: bool = False

    def of(self, task_vector: Array, task: int, address: Address) -> NDArray[np.float64]:
        codes = np.asarray(magnitude_codes(task_vector, self.float64)).reshape(-1)
        if not len(codes):
            return np.zeros(0)
        if not self.row:
            there, ranks = self.tables[task - 1]
            table: NDArray[np.float64] = np.zeros(BINS)
            table[there] = ranks
            return table[codes >> (47 if self.float64 else 15)]
        if address.offset % self.row or len(codes) % self.row:
            raise MagMaxError(
                f"{address.key}: its rows of {self.row:,} elements are too long to be ranked by della; use span: tensor"
            )
        places = _rank_in_row(codes.reshape(-1, self.row)).reshape(-1)
        return places / (self.row - 1) if self.row > 1 else np.full(len(codes), 0.5)


def _rank_in_row(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Each number's place in its row, the smallest first; of equal ones, the last first."""
    last: int = rows.shape[1] - 1
    if rows.itemsize == 4:
        # Numbers with their places in the lower bits are sorted several times faster than places.
        keys: NDArray[np.int64] = rows.astype(np.int64)
        keys <<= 32
        keys |= np.arange(last, -1, -1)
        keys.sort(axis=1)
        order: NDArray[np.int64] = last - (keys & 0xFFFFFFFF)
    else:
        order = last - np.argsort(rows[:, ::-1], axis=1, kind="stable")
    places: NDArray[np.int64] = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(last + 1)[None], axis=1)
    return places


@dataclass(frozen=True)
class Della(TaskVectorTransform):
    """Keep each entry with a probability that grows with the rank of its magnitude; divide it by that probability.

        p = density - epsilon + 2 epsilon r,  r = 0 for the smallest entry in the span, ..., 1 for the largest

    The paper's MAGPRUNE. The span is a row (what has one index of the first dimension; a vector is one row), within
    which of equal magnitudes those first by flat offset count as larger; or a tensor, or the model, where magnitudes
    that agree in the 16 bits after the sign (a part in 256 of each other) share the mean of their ranks. A row
    of one entry has r = 1/2. The draws depend on (seed, tensor name, flat offset, task) alone.

    As in the authors' code, which draws from a generator in the order of work. mergekit does not divide by p, but by
    the part of the tensor's L1 norm that is left; both keep everything at a density of 1, whatever epsilon is.
    """

    name: ClassVar[str] = "della"
    paper: ClassVar[str] = "Deep et al., DELLA-Merging, 2024, arXiv 2406.11617"
    cpu_only: ClassVar[bool] = True

    density: Numbers = 0.5
    epsilon: Numbers = 0.15
    span: Literal["row", "tensor", "model"] = "row"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.span not in ("row", "tensor", "model"):
            raise MagMaxError(f"della needs span to be row, tensor or model, not {self.span!r}")
        validate_range(self.name, "density", self.density, 0, 1)
        validate_range(self.name, "epsilon", self.epsilon, 0, 1)
        if self.varies_by_tensor:
            return
        tasks = min([len(v.values) for v in (self.density, self.epsilon) if isinstance(v, PerModel)], default=1)
        for density, epsilon in zip(
            for_all_models(self.density, tasks), for_all_models(self.epsilon, tasks), strict=True
        ):
            if density < 1 and not 0 <= density - epsilon <= density + epsilon <= 1:
                raise MagMaxError(f"della needs density -+ epsilon from 0 to 1, not {density:g} -+ {epsilon:g}")

    @property
    def passes(self) -> int:
        return 0 if self.span == "row" else 1

    @property
    def statistics_span(self) -> Span:
        return Span.MODEL if self.span == "model" else Span.TENSOR

    def statistics(self, scope: Scope) -> StatisticsRequest:
        if self.span == "row":
            return MagnitudeRanks(scope.row_elements, float64=scope.float64)
        counted: Counts = yield CodeHistogram([0] * scope.tasks, 47 if scope.float64 else 15, scope.float64)
        equal = counted[:, 1:]
        below = np.cumsum(equal, axis=1) - equal
        last = scope.elements - 1
        ranks = (below + (equal - 1) / 2) / last if last else np.full(equal.shape, 0.5)
        there = [np.flatnonzero(of_task).astype(np.uint16) for of_task in equal]  # few: every tensor has its own
        return MagnitudeRanks(
            0, [(codes, of_task[codes]) for codes, of_task in zip(there, ranks, strict=True)], scope.float64
        )

    def apply(self, task_vector: Array, task: int, address: Address, statistics: Statistics) -> Array:
        ranks: MagnitudeRanks = statistics
        density, epsilon = for_model(self.density, task), for_model(self.epsilon, task)
        if density == 1:
            return task_vector
        keep = density - epsilon + 2 * epsilon * ranks.of(task_vector, task, address)
        sparse = keep_at_random(task_vector, keep, "della", self.seed, task, address)
        xp = namespace(task_vector)
        sparse /= xp.reshape(
            xp.asarray(
                np.where(keep > 0, keep, 1), dtype=task_vector.dtype, device=getattr(task_vector, "device", None)
            ),
            task_vector.shape,
        )
        return sparse
