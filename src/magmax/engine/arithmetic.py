"""The arithmetic of a merge on one slab: base + scaling_factor * rule(task vectors)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Spec
from ..checkpoints.dtypes import compute_dtype, narrow, widen
from ..errors import MagMaxError
from ..rules import Address, Block, Rule, StreamingRule
from ..rules.plan import Answer
from .ask import ask
from .reader import Reader, finite
from .stream import Kernel, Progress, Slab


@dataclass(frozen=True)
class MergeKernel(Kernel):
    """The merged tensor of one slab; input 0 is the base, inputs 1 to T are the models.

    Attributes:
        out: the specs of what is written.
        carried: tensors copied from the base as they are, and why.
        answers: what the rule asked, by tensor; under None what it asked of the whole model.
    """

    reader: Reader
    rule: Rule
    tasks: int
    scaling_factor: float
    out: Mapping[str, Spec]
    carried: Mapping[str, str]
    answers: Mapping[str | None, Answer] = field(default_factory=dict[str | None, Any])

    def prepared(self, threads: int, progress: Progress) -> Self:
        """Ask what the rule must know, over every model."""
        if isinstance(self.rule, StreamingRule):
            return self
        merged = [key for key in self.reader.inputs[0].specs if key not in self.carried]
        answers = ask(self.rule, self.reader, self.tasks, merged, threads, progress)
        return replace(self, answers=answers.found, reader=answers.reader)

    def note(self) -> str:
        return self.rule.explain(list(self.answers.values()))

    def __call__(self, slab: Slab) -> list[NDArray[Any]]:
        if slab.key in self.carried:
            return [self.carry(slab)]
        base = self.reader.numbers(slab, 0)
        return [self.scaled(slab, base, self.task_vector(slab, base))]

    def task_vector(self, slab: Slab, base: NDArray[Any]) -> NDArray[Any]:
        """The rule's merge of the models' task vectors, unscaled."""
        at = Address(slab.key, slab.start)
        numbers = range(1, self.tasks + 1)
        if isinstance(self.rule, StreamingRule):
            state = ()
            for task in numbers:
                state = self.rule.step(state, self.reader.task_vector(slab, task, base), task, at)
            return self.rule.finish(state, self.tasks)
        block = Block(at, [self.reader.task_vector(slab, task, base) for task in numbers])
        return self.rule.merge(block, self.answers.get(slab.key, self.answers.get(None)))

    def scaled(self, slab: Slab, base: NDArray[Any], merged: NDArray[Any]) -> NDArray[Any]:
        """base + scaling_factor * merged, the product and the sum rounded separately, stored in the output's type."""
        with np.errstate(over="ignore", invalid="ignore"):
            merged *= merged.dtype.type(self.scaling_factor)
            merged += base
        return self._stored(slab, merged)

    def carry(self, slab: Slab) -> NDArray[Any]:
        """The base's own tensor; the models' are read where they can be, for their digests alone."""
        base = slab.stored(0)
        spec = slab.spec(0)
        for task in range(1, self.tasks + 1):
            slab.digest_alike(task)
        if not spec.floating or self.out[slab.key].dtype == spec.dtype:
            return base
        return self._stored(slab, widen(base, spec.dtype, compute_dtype(spec.dtype)))

    def _stored(self, slab: Slab, values: NDArray[Any]) -> NDArray[Any]:
        """Numbers in the output's type; refuses what is no longer finite, unless that is allowed."""
        dtype = self.out[slab.key].dtype
        stored = narrow(values, dtype)
        if not self.reader.allow_nonfinite and not finite(stored, dtype):
            if np.isfinite(values).all():
                raise MagMaxError(f"{slab.key}: the merged values overflow {dtype}; choose a wider dtype")
            raise MagMaxError(
                f"{slab.key}: the merged values overflow {values.dtype}, the type merged in; convert the base"
            )
        return stored
