"""A base for rules that merge the weights themselves: nothing but zeros, in the shape of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Checkpoint
from .dtypes import TensorSpec


class ZeroBase(Checkpoint):
    """Zeros where `like` has floating tensors, so that a task vector is a model's own weights; the rest is `like`'s.

    Ties, metadata and the files beside the weights are those of `like` too.
    """

    def __init__(self, like: Checkpoint) -> None:
        super().__init__(like.label, dict(like.specs))
        self.path, self.url = like.path, like.url
        self.aliases, self.metadata = dict(like.aliases), dict(like.metadata)
        self.layout, self._like = like.layout, like

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        spec = self.specs[key]
        return np.zeros(stop - start, spec.storage_dtype) if spec.is_mergeable else self._like.read(key, start, stop)

    def files(self) -> list[Path]:
        return self._like.files()

    def header_digests(self) -> list[str]:
        return self._like.header_digests()

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        return self._like.fingerprints(refresh)

    @property
    def output_specs(self) -> dict[str, TensorSpec]:
        return self._like.output_specs

    def small_files_folder(self) -> Path | None:
        return self._like.small_files_folder()
