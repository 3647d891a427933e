"""Pictures decoded and resized once: in memory, or in a file of the cache folder that is mapped into it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ...calibration.image_transforms import ImageTransform
from ..progress import ProgressCallback, no_progress
from .combine import ConcatenatedSequence
from .downloads import cache_folder, publish_folder

CACHE_FORMAT = 1


class StoredImages(Sequence[np.ndarray]):
    """Pictures one after another in a file: each uint8, shape (h, w) or (h, w, 3)."""

    def __init__(self, folder: Path) -> None:
        self.shapes = np.load(folder / "shapes.npy")
        sizes = self.shapes.prod(1)
        self._begins = np.concatenate([[0], np.cumsum(sizes)])
        self._pixels = np.memmap(folder / "pixels.bin", np.uint8, "r") if self._begins[-1] else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        height, width, channels = self.shapes[at].tolist()
        pixels = np.asarray(self._pixels[self._begins[at] : self._begins[at + 1]])
        return pixels.reshape((height, width) if channels == 1 else (height, width, channels))


def load_images(
    items: Sequence[Any], view: ImageTransform, progress: ProgressCallback = no_progress
) -> Sequence[np.ndarray]:
    """Every picture as the view loads it.

    Items that say what they are (an attribute `identity`, as those of a hub's data sets have) are kept in the cache
    folder, and decoded once for all runs; others are kept in memory.
    """
    if isinstance(items, ConcatenatedSequence):
        return ConcatenatedSequence([load_images(part, view, progress) for part in items.parts])
    identity = getattr(items, "identity", None)
    if identity is None:
        return list(_decode_images(items, view, progress))
    what = f"{CACHE_FORMAT} {identity} {len(items)} {view.resize} {view.resample}"
    folder = cache_folder() / "pixels" / hashlib.sha256(what.encode()).hexdigest()[:32]
    if not folder.is_dir():
        _write_images(_decode_images(items, view, progress), folder)
    return StoredImages(folder)


def _decode_images(items: Sequence[Any], view: ImageTransform, progress: ProgressCallback) -> Iterator[np.ndarray]:
    for i, item in enumerate(items, start=1):
        yield view.load(item)
        if i % 100 == 0 or i == len(items):
            progress(i, len(items))


def _write_images(pictures: Iterator[np.ndarray], folder: Path) -> None:
    """Writes the pictures into a folder that appears at once and whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pixels-", dir=folder.parent) as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        shapes: list[tuple[int, ...]] = []
        with (fresh / "pixels.bin").open("wb") as out:
            for pixels in pictures:
                shapes.append((*pixels.shape, 1)[:3])
                out.write(np.ascontiguousarray(pixels).tobytes())
            out.flush()
            os.fsync(out.fileno())
        np.save(fresh / "shapes.npy", np.array(shapes, dtype=np.int64).reshape(-1, 3))
        publish_folder(fresh, folder)
