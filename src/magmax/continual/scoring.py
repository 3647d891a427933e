"""What a model is worth to a search: its accuracies on the tasks of an experiment."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import MagMaxError
from .context import alone, context
from .experiment import Experiment
from .training.weight_files import load_weights


def accuracies(recipe: str, seed: int, on: str, model: Path) -> dict[str, float]:
    """The accuracy of a model on each task after all of them, on the validation or the test examples.

    Args:
        recipe: the experiment as JSON.

    Raises:
        MagMaxError: a task without examples.
    """
    with alone:
        here = context(Experiment.model_validate_json(recipe), seed)
        load_weights(here.encoder.model, model)
        row = here.row(len(here.tasks), here.test if on == "test" else here.validation)
    found = {task.name: share for task, share in zip(here.tasks, row.tasks, strict=True)}
    if lacking := [name for name, share in found.items() if math.isnan(share)]:
        raise MagMaxError(f"no {on} example of {', '.join(lacking)}; hold out more of each class")
    return found
