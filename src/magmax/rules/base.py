"""What a merge rule is: a left fold over task vectors, written for numpy and torch arrays alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from ..errors import MagMaxError

Array = Any
"""A numpy array or a torch tensor of float32 or float64; a rule uses what the array API standard gives both."""

State = tuple[Array, ...]
"""What a fold remembers of the tasks so far: arrays of one block's shape."""


class Address(NamedTuple):
    """Where a block lies: its tensor, and the offset of its first element in the flattened tensor."""

    key: str
    offset: int


@dataclass(frozen=True)
class Rule(ABC):
    """A way to merge task vectors tau_t = theta_t - theta_0 into one, element by element.

    A rule is a fold: `step` takes one task vector after another, `finish` turns what is remembered into the merged
    task vector. The merge of files, the merge of modules and the running merge all call exactly these two.

    Attributes:
        name: the word for it in recipes and on the command line.
        scaling_factor: what multiplies the merged task vector where the user names nothing else.
        selects: whether every remembered element is some task's own element, verbatim.
        paper: where the rule comes from.
    """

    name: ClassVar[str]
    scaling_factor: ClassVar[float]
    selects: ClassVar[bool]
    paper: ClassVar[str]

    @abstractmethod
    def step(self, state: State, task_vector: Array, task: int, at: Address) -> State:
        """Take in the task vector of task number `task` (from 1). `state` is () at first.

        Both `state` and `task_vector` belong to the rule from here on: it may overwrite them.
        """

    @abstractmethod
    def finish(self, state: State, tasks: int) -> Array:
        """The merged task vector of `tasks` tasks; may overwrite `state`."""

    def slots(self, tasks: int) -> int:
        """How many arrays the state of so many tasks holds."""
        return min(tasks, 1)

    def check(self, tasks: int) -> None:
        """Raise MagMaxError if the rule cannot merge so many tasks."""
        if tasks < 1:
            raise MagMaxError(f"{self.name} needs at least one model to merge; none was given")

    def describe(self) -> dict[str, Any]:
        """The rule as a recipe writes it: {name: {option: value}}."""
        return {self.name: asdict(self)}

    def __call__(self, task_vectors: Sequence[Array], key: str = "", offset: int = 0) -> Array:
        """Merge bare arrays of one shape (numpy or torch; half precision is computed in float32, rounded once)."""
        self.check(len(task_vectors))
        shapes = sorted({tuple(v.shape) for v in task_vectors})
        if len(shapes) > 1:
            raise MagMaxError(f"task vectors must have one shape; these have {', '.join(map(str, shapes))}")
        xp = array_namespace(*task_vectors)
        dtype = task_vectors[0].dtype
        compute = xp.float64 if dtype == xp.float64 else xp.float32
        state: State = ()
        for task, vector in enumerate(task_vectors, start=1):
            state = self.step(state, xp.asarray(vector, dtype=compute, copy=True), task, Address(key, offset))
        return xp.astype(self.finish(state, len(task_vectors)), dtype, copy=False)


def bits(values: Array) -> Array:
    """The same memory as signed integers of the same width."""
    xp = array_namespace(values)
    return values.view(xp.int64 if values.dtype == xp.float64 else xp.int32)


def keeps(incumbent: Array, challenger: Array) -> Array:
    """All ones (as bits) where |incumbent| > |challenger|, all zeros where the challenger wins or ties.

    Magnitudes are compared as the integers their bits spell, an order equal to that of the numbers and in which NaN
    stands above infinity; selecting by a mask of bits is several times faster than `where`.
    """
    sign = 8 * incumbent.dtype.itemsize - 1
    magnitude = (1 << sign) - 1
    mask = bits(challenger) & magnitude
    mask -= bits(incumbent) & magnitude
    mask >>= sign
    return mask
