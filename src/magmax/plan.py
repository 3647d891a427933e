"""What a recipe comes to, in whatever words it was written: the arguments of a merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoints import Checkpoint, open_checkpoint
from .engine.job import Job
from .engine.merge import Options, merge_job
from .errors import MagMaxError
from .rules import Rule


@dataclass(frozen=True)
class Plan:
    """A recipe made ready: what `magmax.merge` would be given.

    Attributes:
        checked: given the opened base and models, refuses what the recipe cannot mean for them, and returns the base to
            merge into.
        notes: what the user should know of the recipe before it is carried out.
    """

    rule: Rule
    base: str
    models: Sequence[str]
    names: Sequence[str]
    options: Options
    out: str | None
    checked: Callable[[Checkpoint, Sequence[Checkpoint]], Checkpoint] = lambda base, models: base
    notes: Sequence[str] = ()

    def opened(self) -> tuple[Checkpoint, list[Checkpoint]]:
        """The base and the models; only headers are read."""
        base = open_checkpoint(self.base)
        models = [open_checkpoint(m, base=base) for m in self.models]
        return self.checked(base, models), models

    def job(self, out: str | None = None) -> Job:
        """Open every input and check it. Raises MagMaxError for all that does not fit."""
        where = out or self.out
        if where is None:
            raise MagMaxError("the recipe names no out; say where the result goes: out=PATH")
        base, models = self.opened()
        return merge_job(self.rule, base, models, Path(where), self.options, self.names)
