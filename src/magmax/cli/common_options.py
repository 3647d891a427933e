"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Mismatch = Literal["strict", "base", "intersect"]
Models = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]
Threads = Annotated[int, Parameter(help="Chunks worked on at once; 0 means one for each processor.")]
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
Restart = Annotated[bool, Parameter(negative="", help="Forget an interrupted run instead of resuming it.")]
DryRun = Annotated[bool, Parameter(negative="", help="Check everything and print the cost, but do nothing.")]
Nonfinite = Annotated[bool, Parameter(negative="", help="Let NaN and infinity through instead of refusing them.")]
