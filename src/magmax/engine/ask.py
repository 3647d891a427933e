"""Putting a rule's questions to every block of the models: passes that only count."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

from ..checkpoints.slabs import Chunk, chunks
from ..rules import Address, Block, Rule
from ..rules.plan import Answer, Counts, Fold, Plan, Scope, Span, carried_out
from .reader import Reader
from .stream import Progress, Slab, cores, cut, hold_freed_memory, in_threads


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
    threads: int,
    progress: Progress,
) -> Answers:
    """Carry out the plan over all models: the rule's, or a tensor's of the rule as `placed`.

    Args:
        elements: of each tensor to be merged, how many leading elements are.
    """
    threads = 1 if rule.whole else threads or cores()
    hold_freed_memory()
    if rule.questions_span is Span.MODEL:
        questions = Questions(reader, elements, threads, progress, rule.whole)
        return Answers({None: questions.answer(rule.plan(questions.scope))}, questions.reader)

    def one(key: str) -> tuple[Answer, bool]:
        spec = reader.inputs[0].specs[key]
        row = spec.elements // spec.shape[0] if len(spec.shape) > 1 else elements[key]
        questions = Questions(reader, {key: elements[key]}, 1, progress, rule.whole)
        scope = replace(questions.scope, row=row)
        return questions.answer(placed[key].plan(scope)), questions.reader.checked

    asked = [key for key, count in elements.items() if count]
    with ThreadPoolExecutor(threads) as pool:
        replies = list(pool.map(one, asked))
    found: dict[str | None, Answer] = {key: answer for key, (answer, _) in zip(asked, replies, strict=True)}
    return Answers(found, replace(reader, checked=all(checked for _, checked in replies)))


class Questions:
    """Carries out plans over some tensors of the inputs, of which the first is the base and the next are the tasks.

    Blocks are slabs, or whole tensors where the rule merges these, so that what is asked and what is merged agree.
    """

    def __init__(
        self, reader: Reader, elements: Mapping[str, int], threads: int, progress: Progress, whole: bool = False
    ) -> None:
        self.reader, self._threads, self._progress = reader, threads, progress
        self._whole = whole
        self._elements, specs = elements, reader.inputs[0].specs
        self._specs = {key: specs[key] for key in elements}
        wide = any(spec.dtype == "F64" for spec in self._specs.values())
        shapes = {key: _trimmed(spec.shape, elements[key]) for key, spec in self._specs.items()}
        self.scope = Scope(len(reader.inputs) - 1, sum(elements.values()), wide, shapes=shapes)

    def answer(self, plan: Plan) -> Answer:
        """Ask each question in turn, and return what the plan makes of the replies."""
        return carried_out(plan, lambda fold: self._apart(fold) if fold.apart else self._summed(fold))

    def _summed(self, fold: Fold) -> Counts:
        """Each thread counts for itself; integers can be added in any order."""
        own = threading.local()
        everyones: list[Counts] = []

        def work(chunk: Chunk) -> Chunk:
            if not hasattr(own, "counts"):
                own.counts = fold.zeros()
                everyones.append(own.counts)
            for block in self._blocks(chunk, fold):
                fold.count(block, own.counts)
            return chunk

        self._each(work, fold)
        total = fold.zeros()
        for counts in everyones:
            total += counts
        return total

    def _apart(self, fold: Fold) -> dict[Address, Counts]:
        found: dict[Address, Counts] = {}

        def work(chunk: Chunk) -> Chunk:
            for block in self._blocks(chunk, fold):
                counts = fold.zeros()
                fold.count(block, counts)
                found[block.at] = counts
            return chunk

        self._each(work, fold)
        return found

    def _each(self, work: Any, fold: Fold) -> None:
        whole = not fold.sample and fold.only is None
        todo = (chunk for key, spec in self._specs.items() for chunk in chunks(key, spec, self._whole))
        one_by_one = (work(chunk) for chunk in todo)
        with closing(one_by_one if self._threads == 1 else in_threads(work, todo, self._threads)) as done:
            for chunk in done:
                if whole:
                    size = self._specs[chunk.key].storage.itemsize
                    self._progress((chunk.stop - chunk.start) * size * len(self.reader.inputs))
        if whole:
            self.reader = replace(self.reader, checked=True)

    def _blocks(self, chunk: Chunk, fold: Fold) -> Iterator[Block]:
        for cuts in cut(chunk, self._specs[chunk.key], self._whole):
            start, stop = cuts[0][0], min(cuts[-1][1], self._elements[chunk.key])
            if stop <= start:
                break
            if fold.only is not None and Address(chunk.key, start) not in fold.only:
                continue
            end = min(stop, start + fold.sample) if fold.sample else stop
            slab = Slab(self.reader.inputs, chunk.key, [(start, end)], digest=False)
            base = self.reader.numbers(slab, 0)
            deltas = [self.reader.task_vector(slab, task, base) for task in range(1, self.scope.tasks + 1)]
            shape = slab.shape if self._whole and end == stop else None
            yield Block(Address(chunk.key, start), deltas, base, shape)


def _trimmed(shape: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """The shape of the leading rows that have so many elements."""
    row = math.prod(shape[1:])
    return (elements // row, *shape[1:]) if shape and row else shape
