"""What every kind of checkpoint can do: name its tensors and read any range of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .dtypes import Spec

PREFIX = "hf://"


class Checkpoint(ABC):
    """Named tensors, read in flat ranges; nothing is held in memory beyond their names and shapes.

    Attributes:
        label: what messages call it (its path as given, or a word such as "model 2").
        path: the file or folder, or None for a checkpoint in memory.
        specs: key -> (dtype, shape), in the order of the file.
        aliases: key -> the key in `specs` whose storage it shares (tied weights).
        metadata: the header's own strings.
        notes: what a user should know of how it was read.
        origin: its id on the hub with the commit, as hf://..., or those of base+adapter; "" for what never was there.
        relative: whether the floating tensors are task vectors, to be added to a base.
    """

    label: str
    path: Path | None = None
    specs: dict[str, Spec]
    aliases: dict[str, str]
    metadata: dict[str, str]
    notes: list[str]
    origin: str = ""
    relative: bool = False

    def __init__(self, label: str, specs: dict[str, Spec]) -> None:
        self.label, self.specs, self.aliases, self.metadata, self.notes = label, specs, {}, {}, []

    @abstractmethod
    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        """Units start..stop of the flattened tensor, in `specs[key].storage`; the caller may overwrite them."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file the tensors and their names come from."""

    @property
    def place(self) -> str:
        """What a name for it is made from: where it was downloaded from, its path, or its label."""
        last = self.origin.rpartition("+")[2]
        return last if last.startswith(PREFIX) else str(self.path or self.label)

    def header_digests(self) -> list[str]:
        """One digest per file of `files()` of what can be known without reading tensors."""
        return ["" for _ in self.files()]

    def spec(self, key: str) -> Spec:
        return self.specs[self.resolve(key)]

    def resolve(self, key: str) -> str:
        """The key under which a possibly tied tensor is stored."""
        return self.aliases.get(key, key)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label!r}, {len(self.specs)} tensors, {self.nbytes:,} bytes)"
