"""One pass over a base and its fine-tuned models that counts and sums all that the studies of weights need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..errors import MagMaxError
from ..merging.execution.pool import Crew
from ..merging.matching import compare, refuse_same_path
from ..merging.pipeline import Kernel, Pass, Progress, Slab
from ..merging.reader import Reader
from ..merging.statistics_pass import Questions
from ..rules import Address, Prune
from ..rules.statistics import Answer

WHOLE = "whole model"
"""What stands for all layers together in records."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class Counts:
    """What is known of one tensor, or of several added up; T is the number of task vectors tau_1..tau_T.

    Attributes:
        elements: how many there are.
        shared: those that at least two task vectors change; `conflicts`: those of them changed in both directions.
        agreeing: shape (T + 1,): the elements by how many task vectors move them the same way, max(ups, downs).
        largest, average: shape (T + 1,): of the same groups the sums of max_t |tau_t| and of mean_t |tau_t|.
        supplied: shape (T,): the elements that MagMax takes from each task, where any task vector is not zero.
        magnitude: shape (T,): the sums of |tau_t| over these.
        dots: shape (T, T): the inner products <tau_t, tau_u>; `base`: that of the base with itself.
    """

    elements: int
    shared: int
    conflicts: int
    agreeing: Ints
    largest: Floats
    average: Floats
    supplied: Ints
    magnitude: Floats
    dots: Floats
    base: float

    @classmethod
    def none(cls, tasks: int) -> Counts:
        one, more = np.zeros(tasks), np.zeros(tasks + 1)
        ints = np.zeros(tasks, np.int64), np.zeros(tasks + 1, np.int64)
        return cls(0, 0, 0, ints[1], more, more.copy(), ints[0], one, np.zeros((tasks, tasks)), 0.0)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def norms(self) -> Floats:
        """||tau_t|| for each task."""
        return np.sqrt(np.diagonal(self.dots))

    @property
    def cosines(self) -> Floats:
        """<tau_t, tau_u> / (||tau_t|| ||tau_u||), shape (T, T); NaN where either is zero."""
        norms = self.norms
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip(self.dots / np.outer(norms, norms), -1, 1)


@dataclass(frozen=True)
class Tally:
    """What a pass found.

    Attributes:
        tasks: the models' names, in order.
        tensors: by the tensor's name, in the base's order.
        apart: the tensors that were left out, and why.
        inputs: name -> xxh3-128 of its tensors, of the base and of every model, as a merge's provenance has it.
    """

    tasks: Sequence[str]
    tensors: Mapping[str, Counts]
    apart: Mapping[str, str]
    inputs: Mapping[str, str]

    def layers(self) -> dict[str, Counts]:
        """The tensors of each layer added up, in the order of their names, after WHOLE, which has all of them."""
        found = {WHOLE: Counts.none(len(self.tasks))}
        for key in sorted(self.tensors, key=_in_order):
            for name in (WHOLE, layer_of(key)):
                found[name] = found[name] + self.tensors[key] if name in found else self.tensors[key]
        return found


def layer_of(key: str) -> str:
    """The layer a tensor belongs to, from its name: up to its first number, else without its last part.

    >>> layer_of("encoder.layer.3.attention.query.weight"), layer_of("embeddings.position.weight"), layer_of("scale")
    ('encoder.layer.3', 'embeddings.position', 'scale')
    """
    parts = key.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1] or parts)


def _in_order(key: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9, whatever the order of the file."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


@dataclass(frozen=True)
class _Counting(Kernel):
    """Counts slab by slab; sums are joined exactly at the end, so that the order of slabs changes nothing."""

    reader: Reader
    apart: Mapping[str, str]
    prune: Prune | None = None
    cuts: Answer = None
    parts: dict[str, list[Counts]] = field(default_factory=dict[str, list[Counts]])

    @property
    def gathers(self) -> bool:
        return True

    @property
    def tasks(self) -> range:
        return range(1, len(self.reader.inputs))

    def __call__(self, slab: Slab) -> list[NDArray[Any] | None]:
        if slab.key in self.apart:
            slab.stored(0)
            for task in self.tasks:
                slab.digest_alike(task)
            return []
        base = self.reader.numbers(slab, 0)
        vectors = [self.reader.task_vector(slab, task, base) for task in self.tasks]
        if self.prune:
            at = Address(slab.key, slab.start)
            vectors = [self.prune.apply(v, t, at, self.cuts) for t, v in enumerate(vectors, start=1)]
        self.parts.setdefault(slab.key, []).append(counted(vectors, base))
        return []


def counted(vectors: Sequence[NDArray[Any]], base: NDArray[Any]) -> Counts:
    """The counts of one block of task vectors."""
    tasks, size = len(vectors), len(base)
    ups = np.zeros(size, np.int16)
    downs = np.zeros(size, np.int16)
    winner = np.zeros(size, np.int64)
    best = np.abs(vectors[0])
    total = np.zeros(size)
    for task, vector in enumerate(vectors):
        magnitude = np.abs(vector)
        ups += vector > 0
        downs += vector < 0
        total += magnitude
        wins = magnitude >= best
        np.copyto(winner, task, where=wins)
        np.copyto(best, magnitude, where=wins)
    agreeing = np.maximum(ups, downs).astype(np.int64)
    some = agreeing > 0
    wide = np.stack(vectors).astype(np.float64, copy=False)
    start = base.astype(np.float64, copy=False)
    return Counts(
        elements=size,
        shared=int(np.count_nonzero(ups + downs >= 2)),
        conflicts=int(np.count_nonzero((ups > 0) & (downs > 0))),
        agreeing=np.bincount(agreeing, minlength=tasks + 1),
        largest=_summed(agreeing, best, tasks + 1),
        average=_summed(agreeing, total / tasks, tasks + 1),
        supplied=np.bincount(winner[some], minlength=tasks),
        magnitude=_summed(winner[some], best[some], tasks),
        dots=wide @ wide.T,
        base=float(start @ start),
    )


def _summed(groups: Ints, values: NDArray[Any], count: int) -> Floats:
    """The sum of the values in each group."""
    return np.bincount(groups, weights=values, minlength=count).astype(np.float64)


def tally(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    top: float | None = None,
    threads: int = 0,
    progress: Progress = lambda _: None,
) -> Tally:
    """Count over all tensors that the base and every model have, in constant memory; the others are left out.

    Args:
        names: of the models.
        top: count only this fraction of each task vector, its entries of largest magnitude over the whole model, as if
            the others were zero.

    Raises:
        MagMaxError: no model, a file named twice, nothing in common, NaN or infinity, a fraction that is none.
    """
    if not models:
        raise MagMaxError("a study needs at least one fine-tuned model beside the base")
    inputs = [base, *models]
    refuse_same_path(inputs)
    apart = dict(compare(base, models, "base").carried)
    elements = {key: spec.elements for key, spec in base.specs.items() if key not in apart}
    if not any(elements.values()):
        raise MagMaxError(f"{base.label}: has no floating tensor that all models have; is it their base?")
    kernel = _Counting(Reader(inputs), apart)
    if top is not None:
        prune = Prune(keep=top)
        questions = Questions(kernel.reader, elements, Crew(threads), progress)
        kernel = replace(kernel, prune=prune, cuts=questions.answer(prune.plan(questions.scope)))
    ledger = Pass(inputs, [], kernel, Crew(threads)).run(progress)
    tensors = {key: _joined(kernel.parts[key]) for key in base.specs if key in kernel.parts}
    digests = dict(zip(["base", *names], ledger.digests(inputs), strict=True))
    return Tally(list(names), tensors, apart, digests)


def _joined(parts: Sequence[Counts]) -> Counts:
    """All parts added up; floating sums exactly, then rounded once."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name in vars(parts[0]):
        values: list[Any] = [getattr(part, name) for part in parts]
        whole = isinstance(values[0], int) or (isinstance(values[0], np.ndarray) and values[0].dtype.kind == "i")
        if whole:
            joined[name] = sum(values[1:], values[0])
        elif isinstance(values[0], float):
            joined[name] = math.fsum(values)
        else:
            stacked = np.stack(values)
            sums = [math.fsum(column) for column in stacked.reshape(len(values), -1).T]
            joined[name] = np.array(sums).reshape(stacked.shape[1:])
    return Counts(**joined)
