"""The command line: parse, call, print. Results go to stdout, progress and notes to stderr."""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError

from .._version import __version__
from ..errors import MagMaxError
from . import analysis, calibrate, continual, environments, inspect, merge, preference, recipes, running, search, ui

app = App(
    name="magmax",
    version=__version__,
    help="Merge fine-tuned models by magnitude, and learn new tasks without forgetting.",
)
for verb in (
    *(merge.merge, merge.sweep, search.search, calibrate.calibrate),
    *(preference.tune, preference.archive, preference.presets),
    *(running.absorb, running.result, running.status, running.label, running.restore),
    *(inspect.inspect, inspect.convert, inspect.diff, inspect.rules),
    *(continual.train, continual.bench, environments.environments, analysis.study, analysis.report),
):
    app.command(verb)
app.command(continual.evaluate, name="eval")
app.command(ui.ui)

own = App(name="recipes", help="The recipes that come with magmax, and a check of your own.")
own.command(recipes.list_recipes, name="ls")
own.command(recipes.copy_recipe, name="cp")
own.command(recipes.check)
app.command(own)


def main() -> None:
    """The `magmax` command: exit code 0, or 2 for input that cannot be used, 130 for an interruption."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except MagMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
