"""Several checkpoints in one set of files, told apart by a prefix of their tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from .base import Checkpoint
from .dtypes import Spec


class Sink(Protocol):
    """Where tensors go, in any order: a draft on disk, a view of one, or arrays in memory."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def write(self, key: str, start: int, stored: NDArray[Any]) -> None: ...

    def sync(self) -> None: ...


class PrefixedView(Checkpoint):
    """The tensors of `whole` whose names begin with `prefix`, under their names without it."""

    def __init__(self, whole: Checkpoint, prefix: str, label: str) -> None:
        super().__init__(label, unprefixed(whole.specs, prefix))
        self.path, self.url, self._whole, self._prefix = whole.path, whole.url, whole, prefix

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._whole.read(self._prefix + key, start, stop)

    def files(self) -> list[Path]:
        return self._whole.files()

    def header_digests(self) -> list[str]:
        return self._whole.header_digests()

    def fingerprints(self, again: bool = False) -> dict[str, list[object]]:
        return self._whole.fingerprints(again)


@dataclass(frozen=True)
class PrefixedSink:
    """Writes tensors under their names with a prefix."""

    sink: Sink
    prefix: str

    @property
    def specs(self) -> Mapping[str, Spec]:
        return unprefixed(self.sink.specs, self.prefix)

    def write(self, key: str, start: int, stored: NDArray[Any]) -> None:
        self.sink.write(self.prefix + key, start, stored)

    def sync(self) -> None:
        self.sink.sync()


def unprefixed(specs: Mapping[str, Spec], prefix: str) -> dict[str, Spec]:
    """The specs whose names begin with the prefix, under their names without it."""
    return {key.removeprefix(prefix): spec for key, spec in specs.items() if key.startswith(prefix)}
