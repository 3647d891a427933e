"""Whether models can be merged into a base, seen from their headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.zero_base import ZeroBase
from ..errors import MagMaxError, list_problems

Mismatch = Literal["strict", "base", "intersect"]
"""What to do where a model's tensors are not the base's: refuse; keep the base's tensor; or, where they differ in their
number of rows alone, merge the leading rows that the base and all models have, and keep the base's other rows."""


class RowRange(NamedTuple):
    """The leading rows of a tensor that are merged: how many of the base's, how many elements they are, and why."""

    rows: int
    of: int
    elements: int
    reason: str


@dataclass(frozen=True)
class Match:
    """The result of matching models to a base: tensors merged in part, not merged, and mismatched.

    Attributes:
        unmerged: the tensors that are not merged, key -> why; those of the base are carried over as they are.
        partly_merged: the tensors of which only leading rows are merged.
        mismatched: the keys among `unmerged` that are there because a model differs from the base.
    """

    unmerged: Mapping[str, str]
    partly_merged: Mapping[str, RowRange] = field(default_factory=dict[str, RowRange])
    mismatched: Sequence[str] = ()

    @property
    def extents(self) -> dict[str, int]:
        """Of each tensor that is merged in part, how many elements are."""
        return {key: part.elements for key, part in self.partly_merged.items()}

    def describe(self) -> dict[str, Any]:
        """Return what provenance tells of tensors that are not merged as a whole, without any path."""
        description: dict[str, Any] = {}
        if self.partly_merged:
            description["merged_rows"] = {key: [part.rows, part.of] for key, part in sorted(self.partly_merged.items())}
        if self.mismatched:
            description["not_merged"] = sorted(self.mismatched)
        return description


def match_to_base(base: Checkpoint, models: Sequence[Checkpoint], mismatch: Mismatch = "strict") -> Match:
    """Find what of the base can be merged with all models.

    Raises:
        MagMaxError: under "strict", one error that lists every key that is missing, extra, or of another shape or kind
            in any model.
    """
    if mismatch not in get_args(Mismatch):
        raise MagMaxError(f"mismatch must be one of {', '.join(get_args(Mismatch))}, not {mismatch!r}")
    carried = {key: f"{spec.dtype} is not merged" for key, spec in base.specs.items() if not spec.is_mergeable}
    problems: dict[str, str] = {}
    everyones: list[str] = []
    rows: dict[str, dict[str, int]] = {}
    for model in models:
        for key, problem in _differences(base, model).items():
            everyones.append(problem)
            theirs = model.specs.get(model.resolve_alias(key))
            if mismatch == "intersect" and key in base.specs and _differ_in_rows_only(base.specs[key], theirs):
                rows.setdefault(key, {})[model.label] = theirs.shape[0] if theirs else 0
            else:
                problems[key] = problem
    if everyones and mismatch == "strict":
        hints = [
            "to keep the base's tensor wherever a model has no match: --mismatch base",
            "to merge the rows that all have, where only the number of rows differs: --mismatch intersect",
        ]
        raise list_problems(f"the models do not match {base.label}", everyones, hints)
    partly: dict[str, RowRange] = {}
    for key, row_counts in rows.items():
        part = _common_rows(base.specs[key], row_counts)
        if key in problems:
            continue
        if part.rows:
            partly[key] = part
        else:
            problems[key] = part.reason
    return Match(carried | problems, partly, list(problems))


def extents_of(base: Checkpoint, match: Match) -> dict[str, int]:
    """Return how many elements are merged of each of the base's tensors of which a model has not all."""
    return {**{key: 0 for key in match.mismatched if key in base.specs}, **match.extents}


def narrow_match(base: Checkpoint, match: Match, before: Mapping[str, int]) -> Match:
    """A match of one more model, without what the models before it have not."""
    carried, partly, mismatched = dict(match.unmerged), dict(match.partly_merged), list(match.mismatched)
    for key, count in before.items():
        if key not in base.specs or count > base.specs[key].numel:
            raise MagMaxError(f"the state merges {count} elements of {key}, which {base.label} has not; it is damaged")
        if key in mismatched:
            continue
        if not count:
            partly.pop(key, None)
            carried[key] = f"{key} of a model absorbed before is not that of {base.label}"
            mismatched.append(key)
        elif key not in partly or count < partly[key].elements:
            spec = base.specs[key]
            rows = count * spec.shape[0] // spec.numel
            why = f"{rows} of {spec.shape[0]} rows merged, the others kept from the base (so many had a model before)"
            partly[key] = RowRange(rows, spec.shape[0], count, why)
    return Match(carried, partly, mismatched)


def _differ_in_rows_only(ours: TensorSpec, theirs: TensorSpec | None) -> bool:
    """Return whether two tensors differ in the length of their first dimension and in nothing else that matters."""
    if theirs is None or not ours.shape or not theirs.shape or ours.shape[1:] != theirs.shape[1:]:
        return False
    return ours.is_mergeable and theirs.is_mergeable and not theirs.dtype == "F64" != ours.dtype


def _common_rows(ours: TensorSpec, row_counts: Mapping[str, int]) -> RowRange:
    """Return the rows that the base and all models have; models not in `row_counts` have as many as the base."""
    of = ours.shape[0]
    rows = min(of, *row_counts.values())
    theirs = ", ".join(f"{label} has {count}" for label, count in row_counts.items())
    why = f"{rows} of {of} rows merged, the other {of - rows} kept from the base ({theirs})"
    return RowRange(rows, of, rows * (ours.numel // of) if of else 0, why)


def _differences(base: Checkpoint, model: Checkpoint) -> dict[str, str]:
    differences: dict[str, str] = {}
    for key, ours in base.specs.items():
        theirs = model.specs.get(model.resolve_alias(key))
        if theirs is None:
            differences[key] = f"{model.label}: has no tensor {key}, which is {ours} in {base.label}"
        elif theirs.shape != ours.shape:
            differences[key] = (
                f"{model.label}: {key} has shape {list(theirs.shape)}, but {list(ours.shape)} in {base.label}"
            )
        elif theirs.is_mergeable != ours.is_mergeable:
            differences[key] = f"{model.label}: {key} is {theirs.dtype}, but {ours.dtype} in {base.label}"
        elif theirs.dtype == "F64" != ours.dtype and ours.is_mergeable:
            differences[key] = (
                f"{model.label}: {key} is F64, wider than {ours.dtype} in {base.label}; convert one of them"
            )
    for key, theirs in model.specs.items():
        if key in base.aliases:
            differences[key] = (
                f"{model.label}: stores {key} apart, but in {base.label} it is tied to {base.aliases[key]}"
            )
        elif key not in base.specs:
            differences[key] = f"{model.label}: has a tensor {key}, {theirs}, that {base.label} has not"
    return differences


def refuse_same_path(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise MagMaxError if two checkpoints are one file or folder; zeros take no numbers from theirs."""
    seen: dict[Path | str, str] = {}
    for checkpoint in checkpoints:
        if not checkpoint.is_on_disk or isinstance(checkpoint, ZeroBase):
            continue
        real = checkpoint.path.resolve() if checkpoint.path is not None else checkpoint.url
        if real in seen:
            raise MagMaxError(f"{checkpoint.label}: is the same file as {seen[real]}; name each model once")
        seen[real] = checkpoint.label


def refuse_equal_models(models: Sequence[Checkpoint], digests: Sequence[str]) -> None:
    """Raise MagMaxError if two models hold the same tensors, wherever they are."""
    seen: dict[str, str] = {}
    for model, digest in zip(models, digests, strict=True):
        if digest in seen:
            raise MagMaxError(f"{model.label}: holds the same tensors as {seen[digest]}; name each model once")
        seen[digest] = model.label
