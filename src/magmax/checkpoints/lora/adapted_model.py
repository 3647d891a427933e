"""PEFT LoRA adapters as models: base + adapter, computed in the ranges in which it is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import MagMaxError
from ..base import HUB_PREFIX, Checkpoint
from ..dtypes import TensorSpec, widen
from ..remote.hub import parse_hub_id
from ..remote.urls import is_url
from .mapping import AdapterMapping
from .peft import ADAPTER_CONFIG, PeftAdapter
from .product import compute_delta


class LoraModel(Checkpoint):
    """A base and an adapter as PEFT saves it, read as the model that merging the adapter into the base would give.

    A targeted weight is W + s * D, D[i, j] = sum over k of B[i, k] * A[k, j], where W is the base's, or the adapter's
    own full copy of it, and s is lora_alpha / r (lora_alpha / sqrt(r) with use_rslora). D is transposed for embeddings
    and where weights are stored transposed (fan_in_fan_out); a kernel of a convolution counts as a row. All factors
    are widened to the type in which W is merged (float64 for F64, else float32), and everything is rounded in that
    type: each product, the sum as a left fold over k = 0, 1, ..., s itself, its product with D, the sum with W. So
    every element is the same whatever range is read, and by whichever thread; the tuned weight is presented in that
    type (F64 or F32), not rounded to W's. Modules and biases that are saved in full stand in the base's place, and
    every other tensor is the base's.

    Raises:
        MagMaxError: an adapter of another kind, or one that does not fit the base.
    """

    def __init__(self, folder: Path, base: Checkpoint, label: str) -> None:
        super().__init__(label, {})
        self.path, self.url = folder if base.is_on_disk else None, base.url
        self.layout = base.layout
        self._base, self._peft_adapter = base, PeftAdapter(folder, label)
        self._mapping = AdapterMapping(self._peft_adapter, base)
        self._updates, self._replacements = self._mapping.updates, self._mapping.replacements
        for key in dict.fromkeys([*base.specs, *self._replacements]):
            source = self._mapping.source_spec(key)
            tuned = TensorSpec("F64" if source.dtype == "F64" else "F32", source.shape)
            self.specs[key] = tuned if key in self._updates else source
        self.metadata = base.metadata
        self.aliases = {key: stored_key for key, stored_key in base.aliases.items() if key not in self.specs}
        if missing := self._find_targets_without_update():
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
            self.notes.append(
                f"{label}: target_modules names weights for which its file holds nothing, as if it was cut short; "
                f"they stay the base's: {listed}"
            )

    def _find_targets_without_update(self) -> list[str]:
        """The base's weights that the adapter's settings name, and its file has not; a list of names is looked at."""
        config, narrowed = self._peft_adapter.config, ("layers_to_transform", "exclude_modules")
        targets: Any = config.get("target_modules")
        if not isinstance(targets, list) or any(config.get(name) is not None for name in narrowed):
            return []
        ends = tuple(f".{name}.weight" for name in cast("list[Any]", targets))
        tuned = {*self._updates, *self._replacements}
        return [
            key
            for key, spec in self._base.specs.items()
            if len(spec.shape) > 1 and f".{key}".endswith(ends) and key not in tuned
        ]

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        if key in self._replacements:
            stored = self._peft_adapter.read(self._peft_adapter.resolve_alias(self._replacements[key]), start, stop)
        else:
            stored = self._base.read(key, start, stop)
        if key not in self._updates:
            return stored
        with np.errstate(over="ignore", invalid="ignore"):
            tuned = compute_delta(self._peft_adapter, self._updates[key], start, stop, self.specs[key].storage_dtype)
            tuned += widen(stored, self._mapping.source_spec(key).dtype, tuned.dtype)
        return tuned

    @property
    def output_specs(self) -> dict[str, TensorSpec]:
        """The tensors in the base's types: a tuned weight is computed in float32, but stored as the base stores it."""
        stored = self._base.output_specs
        return {
            key: TensorSpec(stored[key].dtype, spec.shape) if key in stored and spec.is_mergeable else spec
            for key, spec in self.specs.items()
        }

    def small_files_folder(self) -> Path | None:
        return self._base.small_files_folder()

    def files(self) -> list[Path]:
        return [*self._base.files(), *self._peft_adapter.files()]

    def header_digests(self) -> list[str]:
        return [*self._base.header_digests(), *self._peft_adapter.header_digests()]

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        return self._base.fingerprints(refresh) | self._peft_adapter.fingerprints(refresh)

    def prefetch(self, key: str, start: int, stop: int) -> int:
        return 0 if key in self._replacements else self._base.prefetch(key, start, stop)

    def release_prefetched(self, key: str, start: int, stop: int) -> int:
        return 0 if key in self._replacements else self._base.release_prefetched(key, start, stop)


def split_base_and_adapter(text: str, folder: str = "") -> tuple[str, str] | None:
    """The halves of "BASE+ADAPTER", where nothing has that very name and ADAPTER is the folder of an adapter, or both
    are there or on the hub."""
    if "+" not in text or os.path.lexists(os.path.join(folder, text)):
        return None
    for place in (n for n, letter in enumerate(text) if letter == "+"):
        base, adapter = text[:place], text[place + 1 :]
        if not base or not adapter:
            continue
        lora_file = Path(folder, adapter)  # refused by name once it is opened
        if lora_file.suffix == ".safetensors" and lora_file.is_file():
            return base, adapter
        if is_url(adapter) or any(Path(folder, adapter, name, ADAPTER_CONFIG).is_file() for name in ("", "default")):
            return base, adapter
        with suppress(MagMaxError):  # at this plus the text does not fall into two ids
            if parse_hub_id(adapter, folder) and (
                parse_hub_id(base, folder) or os.path.lexists(os.path.join(folder, base))
            ):
                return base, adapter
    return None


def resolve_path(folder: str, text: str) -> str:
    """A path, or every part of "BASE+ADAPTER", as seen from where `folder` is; an id of the hub as hf://..."""
    return map_parts(text, lambda part: os.path.join(folder, part), folder)


def relative_path(folder: str, text: str) -> str:
    """A path, or every part of "BASE+ADAPTER", so that `within(folder, ...)` gives it back."""
    return map_parts(text, lambda part: os.path.relpath(part, folder or "."))


def portable_path(folder: Path, source: object, checkpoint: Checkpoint) -> str | None:
    """Return what opens a checkpoint again, as seen from a folder: its ids on the hub, or the path, or every part of
    "BASE+ADAPTER", that was given; None if nothing does."""
    if checkpoint.origin and all(origin.startswith(HUB_PREFIX) for origin in checkpoint.origin.split("+")):
        return checkpoint.origin
    if isinstance(source, str | os.PathLike):
        return relative_path(os.fspath(folder), os.fspath(source))
    return (
        None
        if checkpoint.path is None or isinstance(checkpoint, LoraModel)
        else os.path.relpath(checkpoint.path, folder)
    )


def resolve_portable_path(folder: Path, source: str) -> str:
    """Return what `portable_path` told of a folder, as it is seen from here."""
    here = os.fspath(folder)
    return map_parts(source, lambda part: os.path.normpath(os.path.join(here, part)), here)


def map_parts(text: str, change: Callable[[str], str], folder: str = "") -> str:
    """A path, or every part of "BASE+ADAPTER" (BASE may be a join itself), changed; an id of the hub as hf://...

    Paths are seen from `folder`.
    """
    halves = split_base_and_adapter(text, folder)
    if halves is not None:
        return f"{map_parts(halves[0], change, folder)}+{map_parts(halves[1], change, folder)}"
    named = parse_hub_id(text, folder)
    return named.address if named else text if is_url(text) else change(text)
