"""Putting a rule's questions to every block of the models: passes that only count."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from ..checkpoints.slabs import Chunk, chunks
from ..rules import Address, Block, Rule
from ..rules.plan import Answer, Counts, Fold, Plan, Scope, Span, carried_out
from .reader import Reader
from .stream import Progress, Slab, cores, hold_freed_memory, in_threads


def ask(
    rule: Rule, reader: Reader, tasks: int, elements: Mapping[str, int], threads: int, progress: Progress
) -> dict[str | None, Answer]:
    """The answers to the rule's plan, by tensor; under None where it asks of the whole model.

    Args:
        elements: of each tensor to be merged, how many leading elements are.
    """
    specs = reader.inputs[0].specs
    wide = any(specs[key].dtype == "F64" for key in elements)
    hold_freed_memory()
    if rule.questions_span is Span.MODEL:
        questions = Questions(reader, tasks, elements, threads or cores(), progress)
        return {None: questions.answer(rule.plan(Scope(tasks, sum(elements.values()), wide)))}

    def one(key: str) -> tuple[str, Answer]:
        scope = Scope(tasks, elements[key], specs[key].dtype == "F64")
        return key, Questions(reader, tasks, {key: elements[key]}, 1, progress).answer(rule.plan(scope))

    with ThreadPoolExecutor(threads or cores()) as pool:
        return dict(pool.map(one, [key for key, count in elements.items() if count]))


class Questions:
    """Carries out plans over some tensors of the inputs, of which the first is the base and the next are the tasks."""

    def __init__(
        self, reader: Reader, tasks: int, elements: Mapping[str, int], threads: int, progress: Progress
    ) -> None:
        self._reader, self._tasks, self._threads, self._progress = reader, tasks, threads, progress
        self._elements, specs = elements, reader.inputs[0].specs
        self._specs = {key: specs[key] for key in elements}

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
            for block in self._blocks(chunk, fold.sample):
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
            for block in self._blocks(chunk, fold.sample):
                counts = fold.zeros()
                fold.count(block, counts)
                found[block.at] = counts
            return chunk

        self._each(work, fold)
        return found

    def _each(self, work: Any, fold: Fold) -> None:
        todo = (chunk for key, spec in self._specs.items() for chunk in chunks(key, spec))
        one_by_one = (work(chunk) for chunk in todo)
        with closing(one_by_one if self._threads == 1 else in_threads(work, todo, self._threads)) as done:
            for chunk in done:
                if not fold.sample:
                    size = self._specs[chunk.key].storage.itemsize
                    self._progress((chunk.stop - chunk.start) * size * len(self._reader.inputs))

    def _blocks(self, chunk: Chunk, sample: int) -> Any:
        for start, stop in chunk.slabs(self._specs[chunk.key]):
            end = min(stop, self._elements[chunk.key], start + sample if sample else stop)
            if end <= start:
                break
            slab = Slab(self._reader.inputs, chunk, start, end, digest=False)
            base = self._reader.numbers(slab, 0)
            deltas = [self._reader.task_vector(slab, task, base) for task in range(1, self._tasks + 1)]
            yield Block(Address(chunk.key, start), deltas)
