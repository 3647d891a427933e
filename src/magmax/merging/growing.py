"""Merges of models that have more than their base: new rows of heads and vocabularies, and new tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.base import CheckpointView
from ..checkpoints.dtypes import compute_dtype, narrow, widen

MAX_NOTES = 10


class ExtendedCheckpoint(CheckpointView):
    """A checkpoint whose tensors go on with those of another: further rows, and tensors that it lacks.

    Args:
        specs: the tensors to present; their types are those of `specs` whatever they are stored in.
        rest: where all beyond the checkpoint's own elements comes from; zeros, if None.
    """

    small_files: Checkpoint
    """The checkpoint whose config and tokenizer belong to these tensors; by default the one that is extended."""

    def __init__(self, checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], rest: Checkpoint | None) -> None:
        super().__init__(checkpoint, dict(specs))
        self.aliases = {k: v for k, v in checkpoint.aliases.items() if k not in specs and v in specs}
        self._rest, self.small_files = rest, checkpoint

    @property
    def output_specs(self) -> dict[str, TensorSpec]:
        stored, names = self._checkpoint.output_specs, {key: self._checkpoint.resolve_alias(key) for key in self.specs}
        return {
            key: TensorSpec(stored[names[key]].dtype if names[key] in stored else spec.dtype, spec.shape)
            for key, spec in self.specs.items()
        }

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        spec, name = self.specs[key], self._checkpoint.resolve_alias(key)
        own = self._checkpoint.specs[name].num_units if name in self._checkpoint.specs else 0
        parts: list[NDArray[Any]] = []
        if start < own:
            stored = self._checkpoint.read(name, start, min(stop, own))
            parts.append(_as_dtype(stored, self._checkpoint.specs[name].dtype, spec.dtype))
        if stop > own:
            begin = max(start, own)
            if self._rest is None:
                parts.append(np.zeros(stop - begin, spec.storage_dtype))
            else:
                stored = self._rest.read(self._rest.resolve_alias(key), begin, stop)
                parts.append(_as_dtype(stored, self._rest.spec(key).dtype, spec.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def small_files_folder(self) -> Path | None:
        return self.small_files.small_files_folder()


def grow(base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[Checkpoint, Sequence[Checkpoint]]:
    """Extend the base by the rows and tensors that only models have; a model that lacks some takes the base's.

    A row or tensor that the base lacks starts from the first model that has it. Its task vector there is zero, so that
    what one model has stays as it is; further models that have it are merged as task vectors from there.
    """
    specs, extended = dict(base.specs), base
    rows: dict[str, tuple[int, int]] = {}
    for model in models:
        added: dict[str, TensorSpec] = {}
        for key, theirs in model.specs.items():
            ours = specs.get(key)
            if ours is None and key not in base.aliases:
                added[key] = theirs
            elif ours and differ_in_rows_only(ours, theirs) and theirs.shape[0] > ours.shape[0]:
                added[key] = TensorSpec(ours.dtype, theirs.shape)
        for key, spec in added.items():
            before = base.specs[key].shape[0] if key in base.specs else 0
            rows[key] = before, spec.shape[0] if spec.shape else 1
        if added:
            specs |= added
            extended = ExtendedCheckpoint(extended, specs, model)
    filled = [_fill(model, specs, extended) for model in models]
    if isinstance(extended, ExtendedCheckpoint) and rows:
        # an adapter's config is its base's, which does not know of rows that the adapter adds
        own = [m for m in models if m.small_files_folder() not in (None, base.small_files_folder())]
        whole = (m for m in own if all(_rows(m, key) == count for key, (_, count) in rows.items()))
        extended.small_files = next(whole, base)
        extended.notes += _growth_notes(base, rows, extended.small_files)
    return extended, filled


def _growth_notes(base: Checkpoint, rows: Mapping[str, tuple[int, int]], small_files: Checkpoint) -> list[str]:
    """Say what grew, and where config and tokenizer come from."""
    notes = [f"{key}: {after} rows, of which {base.label} has {before}" for key, (before, after) in rows.items()]
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"... and {len(notes) - MAX_NOTES} more tensors that grew"]
    if small_files is base:
        words = (
            "no model has a config with all rows: set the sizes (vocab_size, num_labels) in the output's config.json"
        )
        return [*notes, words]
    return [*notes, f"config and tokenizer are those of {small_files.label}, which has all rows"]


def _fill(model: Checkpoint, specs: Mapping[str, TensorSpec], extended: Checkpoint) -> Checkpoint:
    """A model with the rows and tensors of the extended base that it lacks: their task vectors are zero."""
    wanted: dict[str, TensorSpec] = {}
    for key, spec in specs.items():
        theirs = model.find_spec(key)
        if theirs is None or (differ_in_rows_only(spec, theirs) and theirs.shape[0] < spec.shape[0]):
            wanted[key] = spec if theirs is None else TensorSpec(theirs.dtype, spec.shape)
    own = {key: spec for key, spec in model.specs.items() if key not in wanted}
    return ExtendedCheckpoint(model, own | wanted, None if model.is_task_vector else extended) if wanted else model


def differ_in_rows_only(ours: TensorSpec, theirs: TensorSpec | None) -> bool:
    """Return whether two tensors differ in the length of their first dimension and in nothing else that matters."""
    if theirs is None or not ours.shape or not theirs.shape or ours.shape[1:] != theirs.shape[1:]:
        return False
    return (
        ours.shape != theirs.shape
        and ours.is_mergeable
        and theirs.is_mergeable
        and not theirs.dtype == "F64" != ours.dtype
    )


def _rows(checkpoint: Checkpoint, key: str) -> int | None:
    """How many rows a checkpoint has of a tensor."""
    spec = checkpoint.find_spec(key)
    return None if spec is None else spec.shape[0] if spec.shape else 1


def _as_dtype(stored: NDArray[Any], dtype: str, wanted: str) -> NDArray[Any]:
    """Stored units in another floating type."""
    return stored if dtype == wanted else narrow(widen(stored, dtype, compute_dtype(wanted)), wanted)
