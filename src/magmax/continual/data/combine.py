"""Data sets made of other data sets: several joined into one, and long tails of classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np

from ...errors import MagMaxError
from .datasets import Dataset, LabelledExamples


def joined_datasets(of: Mapping[str, Any] | Sequence[Any]) -> Dataset:
    """Several data sets as one, each with classes of its own: for the scenario `data_sets`.

    `of` lists data sets as a recipe writes them, a name or {name: {option: value}}, or maps names to them. A data
    set's classes come after those of the data sets before it; a class whose name another data set has too is still
    another class.
    """
    from ..registry import build, split

    choices = of if isinstance(of, Mapping) else {split("data", choice)[0]: choice for choice in of}
    if not choices or len(choices) != len(of):
        raise MagMaxError(f"joined: give at least one data set, each under a name of its own, not {of!r}")
    return join_datasets({name: build("data", choice) for name, choice in choices.items()})


def join_datasets(parts: Mapping[str, Dataset]) -> Dataset:
    """The data sets as one; class c of a data set that begins at class b is class b + c."""
    begins = np.cumsum([0, *(len(part.classes) for part in parts.values())]).tolist()
    owned = [(name, tuple(range(a, b))) for name, a, b in zip(parts, begins, begins[1:], strict=False)]
    sets = list(parts.values())
    return Dataset(
        _concatenate([part.train for part in sets], begins),
        _concatenate([part.test for part in sets], begins),
        [name for part in sets for name in part.classes],
        prompts=[prompt for part in sets for prompt in _class_prompts(part)],
        parts=owned,
    )


def _class_prompts(part: Dataset) -> Sequence[Sequence[str]]:
    return part.prompts or [[name] for name in part.classes]


def _concatenate(parts: list[LabelledExamples], begins: Sequence[int]) -> LabelledExamples:
    labels = [part.labels + begin for part, begin in zip(parts, begins, strict=False)]
    return LabelledExamples(ConcatenatedSequence([part.items for part in parts]), np.concatenate(labels))


class ConcatenatedSequence(Sequence[Any]):
    """Sequences one after another, none of them copied."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        part = int(np.searchsorted(self._ends, at, side="right"))
        return self.parts[part][at - int(self._ends[part]) + len(self.parts[part])]

    def __iter__(self) -> Iterator[Any]:
        return (item for part in self.parts for item in part)


def long_tail(of: Any, imbalance: float = 100.0, seed: int = 0) -> Dataset:
    """A data set whose training classes shrink: class c keeps n_c = n * imbalance^(-c / (C - 1)) random examples.

    n is the size of the largest class, C the number of classes; a class with fewer keeps what it has, none less than
    one. The test examples stay. From Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin
    Loss" (NeurIPS 2019).
    """
    from ..registry import build

    return thin_classes(build("data", of), imbalance, seed)


def thin_classes(dataset: Dataset, imbalance: float, seed: int) -> Dataset:
    """The data set with a long tail of training classes."""
    if imbalance < 1:
        raise MagMaxError(f"long_tail: imbalance {imbalance} is the largest class over the smallest; choose 1 or more")
    n, labels = len(dataset.classes), dataset.train.labels
    largest = int(np.bincount(labels, minlength=1).max())
    random = np.random.default_rng(seed)
    rows_kept = []
    for c in range(n):
        size = max(1, round(largest * imbalance ** (-c / max(1, n - 1))))
        rows_kept.append(random.permutation(np.flatnonzero(labels == c))[:size])
    return replace(dataset, train=dataset.train.pick(np.sort(np.concatenate(rows_kept))))
