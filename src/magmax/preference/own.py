"""MagMax's own preference: how much it takes from each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints import open_checkpoint
from ..engine.ask import Questions
from ..engine.compare import compare
from ..engine.job import Settings
from ..engine.reader import Reader
from ..engine.stream import cores
from ..rules.winners import Supply


def own_shares(base: Any, models: Sequence[Any], settings: Settings | None = None) -> list[float]:
    """Each task's share of the elements that moved, when MagMax merges them; one pass over the models.

    Args:
        base, models: paths, state dicts, modules or checkpoints, as in `magmax.merge`.
    """
    settings = settings or Settings()
    opened = open_checkpoint(base)
    others = [open_checkpoint(model, base=opened) for model in models]
    carried = compare(opened, others).carried
    elements = {key: spec.elements for key, spec in opened.specs.items() if key not in carried}
    wide = any(opened.specs[key].dtype == "F64" for key in elements)
    reader = Reader([opened, *others])
    questions = Questions(reader, len(others), elements, settings.threads or cores(), settings.progress)

    def plan() -> Any:
        return (yield Supply(len(others), wide))

    counts = questions.answer(plan())
    return [float(count) / max(1, int(counts.sum())) for count in counts]
