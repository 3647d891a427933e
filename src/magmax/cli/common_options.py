"""Options that several commands have: one name, type and default for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import MagMaxError

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Mismatch = Literal["strict", "base", "intersect", "union"]
Rename = Annotated[
    tuple[str, ...],
    Parameter(
        name="--rename",
        negative="",
        help="REGEX=REPLACEMENT: replace a pattern in the models' tensor names, so that they are the base's; may be "
        "repeated.",
    ),
]
Strip = Annotated[
    str,
    Parameter(
        help="Of a model whose tensor names begin with this, use only these tensors, and take it off: module. for what "
        "DataParallel saved, bert. for the encoder of a classifier."
    ),
]
BatchNorm = Literal["average", "base", "clip"]
Models = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]
Out = Annotated[str, Parameter(name=["--out", "-o"])]
OptionalOut = Annotated[str | None, Parameter(name=["--out", "-o"])]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")]
Quiet = Parameter(name=["--quiet", "-q"], negative="", help="No progress and no notes, only results and errors.")
Threads = Annotated[
    int,
    Parameter(
        help="Chunks worked on at once, or threads of torch; 0 lets the command choose: one for each processor, or "
        "one in each process where it starts several."
    ),
]
Jobs = Annotated[int, Parameter(help="Processes that work at once.")]
Scheduler = Annotated[
    str | None,
    Parameter(
        help="The address of a Dask scheduler, whose workers do the work instead; they must see every input and the "
        "output's folder at the same paths."
    ),
]
Device = Annotated[
    str | None,
    Parameter(help="Where the rule works on blocks: cuda, or cuda:1 for the second. The processors by default."),
]
Restart = Annotated[bool, Parameter(negative="", help="Forget an interrupted run and begin again.")]
DryRun = Annotated[bool, Parameter(negative="", help="Check everything and print the cost, but do nothing.")]
AllowCode = Annotated[
    bool,
    Parameter(
        negative="",
        help="Let the recipe name functions in Python files beside it (my_file:my_function), and run them. Only for "
        "recipes and files that you trust.",
    ),
]
Nonfinite = Annotated[bool, Parameter(negative="", help="Let NaN and infinity through instead of refusing them.")]


def parse_renames(words: Sequence[str]) -> dict[str, str]:
    """The patterns and replacements of `Rename`, which are parted by the last =."""
    for word in words:
        if not word.rpartition("=")[1]:
            raise MagMaxError(f"--rename needs REGEX=REPLACEMENT, such as '^bert[.]=', not {word!r}")
    return {pattern: replacement for pattern, _, replacement in (word.rpartition("=") for word in words)}
