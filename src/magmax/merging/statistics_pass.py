"""Putting a rule's questions to every block of the models: passes that only count."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from ..checkpoints.blocks import Chunk, chunks
from ..rules import Address, Block, Rule
from ..rules.statistics import Answer, Counts, Fold, Plan, Scope, Span, carried_out
from .execution.pool import Crew, Task
from .pipeline import Ahead, Progress, Slab, cut, hold_freed_memory, in_threads
from .reader import Reader

RESULT_SHARE = 64
"""How many times the bytes of its counts a share of the work reads, at least."""


class Answers(NamedTuple):
    """What a rule asked.

    Attributes:
        found: the answers by tensor; under None where the rule asks of the whole model.
        reader: the reader, which need not check again what was read to answer.
    """

    found: Mapping[str | None, Answer]
    reader: Reader


def ask(
    rule: Rule,
    placed: Mapping[str, Rule],
    reader: Reader,
    elements: Mapping[str, int],
    crew: Crew,
    progress: Progress,
) -> Answers:
    """Carry out the plan over all models: the rule's, or a tensor's of the rule as `placed`.

    Args:
        elements: of each tensor to be merged, how many leading elements are.
    """
    hold_freed_memory()
    if rule.questions_span is Span.MODEL:
        questions = Questions(reader, elements, crew, progress, rule.whole)
        return Answers({None: questions.answer(rule.plan(questions.scope))}, questions.reader)
    asking = AskingTensors(placed, reader, elements, rule.whole)
    asked = [key for key, count in elements.items() if count]
    found: dict[str | None, Answer] = {}
    checked = True
    for key, reply in _replies(asking, asked, crew, progress):
        found[key] = reply.answer
        checked &= reply.checked
    return Answers({key: found[key] for key in asked}, replace(reader, checked=checked))


class Reply(NamedTuple):
    """What came of the questions about one tensor: the answer, whether all of it was read, and bytes read."""

    answer: Answer
    checked: bool
    read: int


@dataclass(frozen=True)
class AskingTensors(Task):
    """The questions of a rule about each tensor by itself."""

    placed: Mapping[str, Rule]
    reader: Reader
    elements: Mapping[str, int]
    whole: bool

    @property
    def alone(self) -> bool:
        return self.whole

    def __call__(self, items: Sequence[str]) -> list[Reply]:
        hold_freed_memory()
        return [self.tensor(key, lambda _: None) for key in items]

    def tensor(self, key: str, progress: Progress) -> Reply:
        spec = self.reader.inputs[0].specs[key]
        count = self.elements[key]
        row = spec.elements // spec.shape[0] if len(spec.shape) > 1 else count
        read: list[int] = []

        def counted(size: int) -> None:
            read.append(size)
            progress(size)

        questions = Questions(self.reader, {key: count}, Crew(1), counted, self.whole)
        answer = questions.answer(self.placed[key].plan(replace(questions.scope, row=row)))
        return Reply(answer, questions.reader.checked, sum(read))


def _replies(
    asking: AskingTensors, asked: Sequence[str], crew: Crew, progress: Progress
) -> Iterator[tuple[str, Reply]]:
    """The reply about each tensor, as they come."""
    if crew.executor is None:
        with ThreadPoolExecutor(1 if asking.whole else crew.count) as pool:
            yield from zip(asked, pool.map(partial(asking.tensor, progress=progress), asked), strict=True)
        return
    inputs = asking.reader.inputs
    for share, replies in crew.shares(asking, asked, lambda key: len(inputs) * inputs[0].specs[key].nbytes):
        progress(sum(reply.read for reply in replies))
        yield from zip(share, replies, strict=True)


@dataclass(frozen=True)
class Counting(Task):
    """One question, to be put to blocks: slabs, or whole tensors where the rule merges these, so that what is asked
    and what is merged agree.

    Attributes:
        elements: of each tensor, how many leading elements are merged.
    """

    reader: Reader
    fold: Fold
    elements: Mapping[str, int]
    whole: bool

    @property
    def alone(self) -> bool:
        return self.whole

    def __call__(self, items: Sequence[Chunk]) -> Counts | dict[Address, Counts]:
        hold_freed_memory()
        if self.fold.apart:
            return {at: counts for chunk in items for at, counts in self.apart(chunk)}
        total = self.fold.zeros()
        for chunk in items:
            self.summed(chunk, total)
        return total

    def summed(self, chunk: Chunk, into: Counts) -> None:
        for block in self._blocks(chunk):
            self.fold.count(block, into)

    def apart(self, chunk: Chunk) -> Iterator[tuple[Address, Counts]]:
        for block in self._blocks(chunk):
            counts = self.fold.zeros()
            self.fold.count(block, counts)
            yield block.at, counts

    def cost(self, chunk: Chunk) -> int:
        """Bytes that a chunk reads, where the fold looks at all of it."""
        inputs = self.reader.inputs
        return (chunk.stop - chunk.start) * inputs[0].specs[chunk.key].storage.itemsize * len(inputs)

    def _blocks(self, chunk: Chunk) -> Iterator[Block]:
        inputs, fold = self.reader.inputs, self.fold
        for cuts in cut(chunk, inputs[0].specs[chunk.key], self.whole):
            start, stop = cuts[0][0], min(cuts[-1][1], self.elements[chunk.key])
            if stop <= start:
                break
            if fold.only is not None and Address(chunk.key, start) not in fold.only:
                continue
            end = min(stop, start + fold.sample) if fold.sample else stop
            slab = Slab(inputs, chunk.key, [(start, end)], digest=False)
            base = self.reader.numbers(slab, 0)
            deltas = [self.reader.task_vector(slab, task, base) for task in range(1, len(inputs))]
            shape = slab.shape if self.whole and end == stop else None
            yield Block(Address(chunk.key, start), deltas, base, shape)


class Questions:
    """Carries out plans over some tensors of the inputs, of which the first is the base and the next are the tasks."""

    def __init__(
        self, reader: Reader, elements: Mapping[str, int], crew: Crew, progress: Progress, whole: bool = False
    ) -> None:
        self.reader, self._crew, self._progress = reader, crew, progress
        self._whole = whole
        self._elements, specs = elements, reader.inputs[0].specs
        self._specs = {key: specs[key] for key in elements}
        wide = any(spec.dtype == "F64" for spec in self._specs.values())
        shapes = {key: _trimmed(spec.shape, elements[key]) for key, spec in self._specs.items()}
        self.scope = Scope(len(reader.inputs) - 1, sum(elements.values()), wide, shapes=shapes)

    def answer(self, plan: Plan) -> Answer:
        """Ask each question in turn, and return what the plan makes of the replies."""
        return carried_out(plan, self._asked)

    def _asked(self, fold: Fold) -> Counts | dict[Address, Counts]:
        counting = Counting(self.reader, fold, self._elements, self._whole)
        if self._crew.executor is not None:
            reply = self._sent(counting)
        else:
            reply = self._apart(counting) if fold.apart else self._summed(counting)
        if _sees_all(fold):
            self.reader = replace(self.reader, checked=True)
        return reply

    def _sent(self, counting: Counting) -> Counts | dict[Address, Counts]:
        """The shares' own counts; integers can be added in any order."""
        fold = counting.fold
        found: dict[Address, Counts] = {}
        total = fold.zeros()
        least = 0 if fold.apart else RESULT_SHARE * total.nbytes
        for share, reply in self._crew.shares(counting, self._chunks(), counting.cost, least):
            if fold.apart:
                found |= reply
            else:
                total += reply
            if _sees_all(fold):
                self._progress(sum(map(counting.cost, share)))
        return found if fold.apart else total

    def _summed(self, counting: Counting) -> Counts:
        """Each thread counts for itself; integers can be added in any order."""
        own = threading.local()
        everyones: list[Counts] = []

        def work(chunk: Chunk) -> Chunk:
            if not hasattr(own, "counts"):
                own.counts = counting.fold.zeros()
                everyones.append(own.counts)
            counting.summed(chunk, own.counts)
            return chunk

        self._each(work, counting)
        total = counting.fold.zeros()
        for counts in everyones:
            total += counts
        return total

    def _apart(self, counting: Counting) -> dict[Address, Counts]:
        found: dict[Address, Counts] = {}

        def work(chunk: Chunk) -> Chunk:
            found.update(counting.apart(chunk))
            return chunk

        self._each(work, counting)
        return found

    def _each(self, work: Callable[[Chunk], Chunk], counting: Counting) -> None:
        threads = 1 if self._whole else self._crew.count
        one_by_one = (work(chunk) for chunk in self._chunks())
        ahead = Ahead(self.reader.inputs if _sees_all(counting.fold) else ())
        alone = threads == 1 and not any(checkpoint.url for checkpoint in self.reader.inputs)
        with closing(one_by_one if alone else in_threads(work, self._chunks(), threads, ahead)) as done:
            for chunk in done:
                if _sees_all(counting.fold):
                    self._progress(counting.cost(chunk))

    def _chunks(self) -> Iterator[Chunk]:
        return (chunk for key, spec in self._specs.items() for chunk in chunks(key, spec, self._whole))


def _sees_all(fold: Fold) -> bool:
    return not fold.sample and fold.only is None


def _trimmed(shape: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """The shape of the leading rows that have so many elements."""
    row = math.prod(shape[1:])
    return (elements // row, *shape[1:]) if shape and row else shape
