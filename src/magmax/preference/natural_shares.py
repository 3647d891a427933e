"""MagMax's own preference: how much it takes from each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints import open_checkpoint
from ..merging.execution.execution_options import Settings
from ..merging.matching import Mismatch, compare
from ..merging.reader import Reader
from ..merging.statistics_pass import Questions
from ..rules.tunable.assignment import Supply


def own_shares(
    base: Any,
    models: Sequence[Any],
    settings: Settings | None = None,
    mismatch: Mismatch = "strict",
    allow_nonfinite: bool = False,
) -> list[float]:
    """Each task's share of the elements that moved, when MagMax merges them; one pass over the models.

    Args:
        base: a path, a state dict, a module or a checkpoint, as in `magmax.merge`.
        models: the same, one for each task.
        mismatch: see `Options`; what the merge keeps of the base is not counted.
        allow_nonfinite: count NaN and infinity as the largest magnitudes.
    """
    settings = settings or Settings()
    opened = open_checkpoint(base)
    others = [open_checkpoint(model, base=opened) for model in models]
    match = compare(opened, others, mismatch)
    elements = {k: match.extents.get(k, s.elements) for k, s in opened.specs.items() if k not in match.carried}
    reader = Reader([opened, *others], allow_nonfinite)
    questions = Questions(reader, elements, settings.crew, settings.progress)

    def plan() -> Any:
        return (yield Supply(questions.scope.tasks, questions.scope.wide))

    counts = questions.answer(plan())
    return [float(count) / max(1, int(counts.sum())) for count in counts]
