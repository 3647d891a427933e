"""What a recipe comes to, in whatever words it was written: the arguments of a merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoints import Checkpoint, open_checkpoint
from .checkpoints.base import PREFIX
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

    def opened(self) -> tuple[Checkpoint, list[Checkpoint], list[str]]:
        """The base, the models and their names; what is named after its id on the hub gets its commit into the name."""
        base = open_checkpoint(self.base)
        models = [open_checkpoint(m, base=base) for m in self.models]
        by_id = [
            PREFIX + name in (path, path.rpartition("+")[2]) for name, path in zip(self.names, self.models, strict=True)
        ]
        resolved = [model.place.removeprefix(PREFIX) for model in models]
        names = [r if i else n for n, r, i in zip(self.names, resolved, by_id, strict=True)]
        return self.checked(base, models), models, names

    def job(self, out: str | None = None) -> Job:
        """Open every input and check it. Raises MagMaxError for all that does not fit."""
        where = out or self.out
        if where is None:
            raise MagMaxError("the recipe names no out; say where the result goes: out=PATH")
        base, models, names = self.opened()
        return merge_job(self.rule, base, models, Path(where), self.options, names)
