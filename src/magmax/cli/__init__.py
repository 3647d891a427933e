"""The command line: parse, call, print. Results go to stdout, progress and notes to stderr."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter

from .._version import __version__
from ..errors import SAME_COMMAND, MagMaxError, escape_controls, missing_extra
from . import analysis, calibrate, continual, environments, inspect, merge, preference, recipes, running, search, ui
from .common_options import Quiet
from .console import quiet_output
from .old_names import refuse_old_names

app = App(
    name="magmax",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `main` says what is left
    help="Merge fine-tuned models by magnitude: continual learning by model merging.",
)
MERGE, CHECKPOINTS, RUNNING, TUNABLE, CONTINUAL, ANALYSIS, REFERENCE = (
    Group(name, sort_key=number)
    for number, name in enumerate(
        ("Merge", "Checkpoints", "Running merge", "Tunable", "Continual learning", "Analysis", "Reference")
    )
)


MAX_OPEN_FILES = 1 << 16
"""Most shells allow 1,024, which six large models exceed."""


def group_of_commands(name: str, summary: str, group: Group) -> App:
    """Add a command that has sub-commands to the command line."""
    commands = App(name=name, help=summary, group=group)
    app.command(commands)
    return commands


app.command(merge.merge, group=MERGE)
searches = group_of_commands("search", "Choose the settings of a merge by trying several.", MERGE)
searches.command(merge.sweep)
searches.command(search.search, name="run")
app.command(calibrate.calibrate, group=MERGE)

checkpoint = group_of_commands("checkpoint", "Inspect, compare and convert checkpoints.", CHECKPOINTS)
for command in (inspect.inspect, inspect.diff, inspect.convert):
    checkpoint.command(command)

running_merge = group_of_commands("running", "Merge models one after another in constant memory.", RUNNING)
for command in (running.absorb, running.result, running.status, running.label, running.restore):
    running_merge.command(command)

app.command(preference.tune, group=TUNABLE)
archive = group_of_commands("archive", "Keep small parts of models, to be tuned again without them.", TUNABLE)
archive.command(preference.create)
archive.command(preference.presets)
app.command(ui.ui, group=TUNABLE)

app.command(continual.train, group=CONTINUAL)
app.command(continual.evaluate, name="eval", group=CONTINUAL)
app.command(continual.bench, group=CONTINUAL)

study = group_of_commands("study", "Analyse why a merge works, of any models or of a benchmark's results.", ANALYSIS)
study.default(analysis.study)
study.command(environments.environments)
app.command(analysis.report, group=ANALYSIS)

reference = group_of_commands("recipes", "List rules and shipped recipes; copy one; check your own.", REFERENCE)
reference.command(recipes.list_recipes, name="list")
reference.command(recipes.copy_recipe, name="copy")
reference.command(recipes.check)
reference.command(recipes.rules)


app.meta.suppress_keyboard_interrupt = False
RESUMABLE = {
    *(("merge",), ("calibrate",), ("tune",), ("train",), ("bench",), ("search", "sweep"), ("search", "run")),
    *(("running", "absorb"), ("running", "result"), ("checkpoint", "convert"), ("study", "environments")),
}
"""Commands that keep what is finished when they are stopped, and go on from there."""

EXTRA_OF_PACKAGE = {
    **dict.fromkeys(("accelerate", "safetensors", "tokenizers", "torch", "transformers"), "train"),
    **dict.fromkeys(("jinja2", "markupsafe", "matplotlib", "scipy"), "report"),
    **dict.fromkeys(("datasets", "PIL"), "data"),
}
"""The extra that has a package, for commands that find it missing where nothing else says so."""


@app.meta.default
def launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)], quiet: Annotated[bool, Quiet] = False
) -> None:
    """Run a command with the options that all commands share."""
    with quiet_output(quiet):
        app(words, exit_on_error=False, print_error=True)


def run(words: Sequence[str]) -> None:
    """Run the command that the words spell. Raises MagMaxError, and what cyclopts raises for words it cannot parse."""
    refuse_old_names(words)
    app.meta(words, exit_on_error=False, print_error=True)


def prepare_process() -> None:
    """Make the process fit for any terminal and any number of files."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller: without this the next file opened would get what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding lacks
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    """Run `magmax`: exit code 0, 2 for input that cannot be used, 130 for an interruption."""
    prepare_process()
    try:
        run(sys.argv[1:])
    except CycloptsError:
        sys.exit(2)
    except MagMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(_interruption(sys.argv[1:]), file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF_PACKAGE:
            raise
        print(f"error: {missing_extra(f'this needs {package}', EXTRA_OF_PACKAGE[package])}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        print(escape_controls(f"error: {error.filename or 'the system'}: {error.strerror or error}"), file=sys.stderr)
        sys.exit(2)


def _interruption(words: Sequence[str]) -> str:
    """Return what to say of a command that was interrupted."""
    command, _, _ = app.parse_commands([word for word in words if word not in ("--quiet", "-q")])
    return f"interrupted; {SAME_COMMAND}" if command in RESUMABLE else "interrupted"
