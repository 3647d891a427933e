"""Looking without merging: what a checkpoint holds, and how far a model moved from its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from .execution.pool import WorkerPool
from .matching import match_to_base
from .pipeline import BlockPipeline, InputBlock, Kernel, Progress
from .provenance import read_provenance
from .reader import BlockReader


@dataclass(frozen=True)
class TensorMovement:
    """The movement of one tensor: L2 norm of its task vector and of the base, and the share of elements that
    changed.
    """

    key: str
    elements: int
    norm: float
    base_norm: float
    changed: float

    @property
    def relative(self) -> float:
        """The task vector's norm in units of the base's."""
        return self.norm / self.base_norm if self.base_norm else math.inf * (self.norm > 0)


@dataclass(frozen=True)
class ModelDifference:
    """A model against its base: each merged tensor's movement, and what cannot be compared, key -> why."""

    movements: Sequence[TensorMovement]
    incomparable: dict[str, str]

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(m.norm**2 for m in self.movements))


@dataclass(frozen=True)
class MovementKernel(Kernel):
    """Sums of squares of the task vector and of the base, and counts of changes, block by block."""

    reader: BlockReader
    apart: Mapping[str, str]
    sums: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict[str, list[tuple[float, float, int]]])

    def __call__(self, block: InputBlock) -> list[NDArray[Any] | None]:
        if block.key not in self.apart:
            start = self.reader.read_numbers(block, 0).astype("f8")
            stored = block.read(1)
            vector = self.reader.widen(block, 1, stored) - start
            if block.fixed is not None:
                same = block.fixed.equal(stored, block.spec(1).dtype)
                vector[block.fixed.places] = np.where(same, 0, np.nan)
            parts = (float(vector @ vector), float(start @ start), int(np.count_nonzero(vector)))
            self.sums.setdefault(block.key, []).append(parts)
        return []


def diff(base: Checkpoint, model: Checkpoint, threads: int = 0, progress: Progress = lambda _: None) -> ModelDifference:
    """Measure the task vector of `model` tensor by tensor; sums are float64, so the order of blocks hardly matters."""
    match = match_to_base(base, [model], "base")
    base, (model,), apart = match.base, match.models, dict(match.unmerged)
    kernel = MovementKernel(BlockReader([base, model], allow_nonfinite=True), apart)
    BlockPipeline([base, model], [], kernel, WorkerPool(threads), digest=False).run(progress)
    sums = kernel.sums
    movements = [
        TensorMovement(
            key=key,
            elements=base.specs[key].numel,
            norm=math.sqrt(math.fsum(part[0] for part in parts)),
            base_norm=math.sqrt(math.fsum(part[1] for part in parts)),
            changed=sum(part[2] for part in parts) / base.specs[key].numel,
        )
        for key, parts in sums.items()
    ]
    order = {key: place for place, key in enumerate(base.specs)}
    extra = {
        key: f"{model.label}: has a tensor {key} that {base.label} has not" for key in model.specs if key not in order
    }
    return ModelDifference(sorted(movements, key=lambda m: order[m.key]), {**apart, **extra})


def provenance_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How a checkpoint says it was made, if magmax made it."""
    return read_provenance(checkpoint.metadata)
