"""Several checkpoints in one set of files, told apart by a prefix of their tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from .base import Checkpoint
from .dtypes import TensorSpec


class TensorSink(Protocol):
    """A destination of tensors, written in any order: a draft on disk, a view of one, or arrays in memory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None: ...

    def sync(self) -> None: ...


class PrefixedCheckpoint(Checkpoint):
    """The tensors of `whole` whose names begin with `prefix`, under their names without it."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, label: str) -> None:
        super().__init__(label, strip_prefix(checkpoint.specs, prefix))
        self.path, self.url, self._checkpoint, self._prefix = checkpoint.path, checkpoint.url, checkpoint, prefix

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._checkpoint.read(self._prefix + key, start, stop)

    def files(self) -> list[Path]:
        return self._checkpoint.files()

    def header_digests(self) -> list[str]:
        return self._checkpoint.header_digests()

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        return self._checkpoint.fingerprints(refresh)


@dataclass(frozen=True)
class PrefixedSink:
    """Writes tensors under their names with a prefix."""

    sink: TensorSink
    prefix: str

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return strip_prefix(self.sink.specs, self.prefix)

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None:
        self.sink.write(self.prefix + key, start, raw)

    def sync(self) -> None:
        self.sink.sync()


def strip_prefix(specs: Mapping[str, TensorSpec], prefix: str) -> dict[str, TensorSpec]:
    """The specs whose names begin with the prefix, under their names without it."""
    return {key.removeprefix(prefix): spec for key, spec in specs.items() if key.startswith(prefix)}
