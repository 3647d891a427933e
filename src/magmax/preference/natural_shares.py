"""MagMax's own preference: how much it takes from each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints import open_checkpoint
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.matching import Mismatch, match_to_base
from ..merging.reader import BlockReader
from ..merging.statistics_pass import StatisticsRunner
from ..rules.tunable.assignment import SupplyCount


def natural_shares(
    base: Any,
    models: Sequence[Any],
    execution: ExecutionOptions | None = None,
    mismatch: Mismatch = "strict",
    allow_nonfinite: bool = False,
) -> list[float]:
    """Each task's share of the elements that moved, when MagMax merges them; one pass over the models.

    Args:
        base: a path, a state dict, a module or a checkpoint, as in `magmax.merge`.
        models: the same, one for each task.
        mismatch: see `OutputOptions`; what the merge keeps of the base is not counted.
        allow_nonfinite: count NaN and infinity as the largest magnitudes.
    """
    execution = execution or ExecutionOptions()
    opened = open_checkpoint(base)
    others = [open_checkpoint(model, base=opened) for model in models]
    match = match_to_base(opened, others, mismatch)
    elements = {k: match.extents.get(k, s.numel) for k, s in match.base.specs.items() if k not in match.unmerged}
    reader = BlockReader([match.base, *match.models], allow_nonfinite)
    runner = StatisticsRunner(reader, elements, execution.pool, execution.progress)

    def plan() -> Any:
        return (yield SupplyCount(runner.scope.tasks, runner.scope.float64))

    counts = runner.collect(plan())
    return [float(count) / max(1, int(counts.sum())) for count in counts]
