"""The verb of the page: ui."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..errors import MagMaxError, missing_extra
from .common_options import AllowCode
from .console import progress_bars

if TYPE_CHECKING:
    from ..continual.experiment import Experiment


def ui(
    run: str,
    *,
    recipe: str | None = None,
    seed: int | None = None,
    samples: str | None = None,
    examples: int = 120,
    port: int = 7860,
    no_browser: Annotated[bool, Parameter(negative="")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Try preferences on a page of this machine, and take the merge from there.

    Parameters
    ----------
    run
        The folder of magmax train; or an archive of magmax archive create, or a training of magmax bench.
    recipe
        Of an archive or a training: its experiment (.yaml), or the recipe.json of a training.
    seed
        Of an archive or a training: what drew the tasks; the recipe's first by default.
    samples
        Your own texts to see accuracies on: a CSV with the columns text and label, a class's name or number. By default
        validation examples of the recipe, which nothing was trained on.
    examples
        How many validation examples, dealt evenly to the tasks.
    port
        Where the page is served, on 127.0.0.1 alone; 0 for any free port.
    no_browser
        Do not open a browser.
    """
    try:
        from ..ui.server import bind_socket, serve
        from ..ui.sources import open_source
        from ..ui.view_model import TunerModel
    except ImportError as error:
        raise missing_extra(f"the page needs {error.name}", "ui") from error

    if examples < 1:
        raise MagMaxError(f"--examples is a whole number from 1 on, not {examples}")
    with bind_socket(port) as at:
        from ..continual.experiment_file import read_experiment

        experiment: Experiment | Path | None = None
        if recipe:
            is_json = recipe.endswith(".json")
            experiment = Path(recipe) if is_json else read_experiment(recipe, allow_code=allow_code)
        source = open_source(Path(run), experiment, seed, allow_code)
        with progress_bars() as new_bar:
            tuner = TunerModel.open(source, examples, Path(samples) if samples else None, new_bar)
        serve(tuner, at, not no_browser, partial(print, flush=True))
