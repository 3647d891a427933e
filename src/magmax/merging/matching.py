"""How models are matched to a base, from their headers: which tensors are merged, in part or whole, and which not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.zero_base import ZeroBase
from ..errors import MagMaxError, list_problems
from .growing import differ_in_rows_only, grow
from .name_differences import SuggestedRenaming, find_renaming
from .tying import resolve_ties

Mismatch = Literal["strict", "base", "intersect", "union"]
"""What to do where a model's tensors are not the base's: refuse; keep the base's tensor; or, where they differ in their
number of rows alone, merge the leading rows that the base and all models have, and keep the base's other rows; or keep
every row and tensor of the base and of all models."""


NARROW_DTYPES = ("F8_", "F6_", "F4")
"""How the names of floating types begin that are not merged."""


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
        base, models: the checkpoints as they are merged: tied tensors under one name, grown where that was asked for.
        unmerged: the tensors that are not merged, key -> why; those of the base are carried over as they are.
        partly_merged: the tensors of which only leading rows are merged.
        mismatched: the keys among `unmerged` that are there because a model differs from the base.
    """

    base: Checkpoint
    models: Sequence[Checkpoint]
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


def match_to_base(
    base: Checkpoint, models: Sequence[Checkpoint], mismatch: Mismatch = "strict", keep_copies: bool = False
) -> Match:
    """Find what of the base can be merged with all models.

    Args:
        keep_copies: leave a tensor that the base stores twice apart, also where models store it once.

    Raises:
        MagMaxError: under "strict", one error that lists every key that is missing, extra, or of another shape or kind
            in any model. In any case, a model of which nothing would be merged, or less than after a renaming.
    """
    if mismatch not in get_args(Mismatch):
        raise MagMaxError(f"mismatch must be one of {', '.join(get_args(Mismatch))}, not {mismatch!r}")
    _refuse_nothing_mergeable(base)
    ties = resolve_ties(base, models, keep_copies)
    _refuse_unlike_models(ties.base, ties.models, mismatch)
    base, models = grow(ties.base, ties.models) if mismatch == "union" else (ties.base, ties.models)
    carried = {key: f"{spec.dtype} is not merged" for key, spec in base.specs.items() if not spec.is_mergeable}
    problems: dict[str, str] = {}
    row_counts: dict[str, dict[str, int]] = {}
    remedies: set[str] = set()
    listed: list[str] = []
    for model, conflicts in zip(models, ties.conflicts, strict=True):
        differences = _differences(base, model) | conflicts
        if mismatch == "strict" and differences:
            listed += _summarize(base, model, differences, remedies)
        for key, problem in differences.items():
            theirs = model.find_spec(key)
            if mismatch == "intersect" and key in base.specs and differ_in_rows_only(base.specs[key], theirs):
                row_counts.setdefault(key, {})[model.label] = theirs.shape[0] if theirs else 0
            else:
                problems[key] = problem
    if listed:
        raise list_problems(f"the models do not match {base.label}", listed, sorted(remedies))
    partly: dict[str, RowRange] = {}
    for key, counts in row_counts.items():
        part = _common_rows(base.specs[key], counts)
        if key in problems:
            continue
        if part.rows:
            partly[key] = part
        else:
            problems[key] = part.reason
    match = Match(base, models, carried | problems, partly, list(problems))
    _refuse_empty(match)
    return match


def _refuse_nothing_mergeable(base: Checkpoint) -> None:
    """Raise MagMaxError for a base of which nothing, or the smaller part of the floating elements, can be merged."""
    mergeable = sum(spec.numel for spec in base.specs.values() if spec.is_mergeable)
    narrow = sum(spec.numel for spec in base.specs.values() if spec.dtype.startswith(NARROW_DTYPES))
    if (not mergeable and any(spec.numel for spec in base.specs.values())) or narrow > mergeable:
        dtypes = ", ".join(sorted({spec.dtype for spec in base.specs.values() if not spec.is_mergeable}))
        raise MagMaxError(
            f"{base.label}: {mergeable:,} elements are F16, BF16, F32 or F64, which can be merged; the others are "
            f"{dtypes} and would stay as they are. Convert it to one of these four types first, or give the original"
        )


def _refuse_unlike_models(base: Checkpoint, models: Sequence[Checkpoint], mismatch: Mismatch) -> None:
    """Raise MagMaxError if nothing of a model would be merged, or less than under other names."""
    problems: list[str] = []
    for model in models if mismatch != "strict" else ():
        shared = sum(_shared_elements(spec, model.find_spec(key), mismatch) for key, spec in base.specs.items())
        renaming = None
        if any(model.find_spec(key) is None for key in base.specs):
            renaming = find_renaming(base, model)
        if renaming and renaming.elements > shared:
            problems.append(_renaming_words(base, model, renaming))
        elif not shared:
            ours, theirs = next(iter(base.specs.items()), None), next(iter(model.specs.items()), None)
            first, other = (f"{pair[0]}, {pair[1]}" if pair else "nothing" for pair in (theirs, ours))
            problems.append(
                f"{model.label}: nothing of it would be merged: no tensor has the name and shape of one in "
                f"{base.label} (it holds {first}; the base holds {other}); is it a model of this base?"
            )
    if problems:
        raise list_problems(f"too little would be merged into {base.label}", problems)


def _refuse_empty(match: Match) -> None:
    """Raise MagMaxError if what each model shares with the base is not what the others share."""
    specs = {key: spec for key, spec in match.base.specs.items() if spec.is_mergeable and spec.numel}
    if match.models and specs and not any(key not in match.unmerged for key in specs):
        raise MagMaxError(
            f"{match.base.label}: nothing would be merged: it has no tensor that every model has; "
            "merge models of one architecture"
        )


def _shared_elements(ours: TensorSpec, theirs: TensorSpec | None, mismatch: Mismatch) -> int:
    """How many elements of a tensor can be merged with one model's."""
    if theirs is None or not (ours.is_mergeable and theirs.is_mergeable):
        return 0
    if ours.shape == theirs.shape:
        return ours.numel
    rows = mismatch in ("intersect", "union") and differ_in_rows_only(ours, theirs)
    return min(ours.numel, theirs.numel) if rows else 0


def _renaming_words(base: Checkpoint, model: Checkpoint, renaming: SuggestedRenaming) -> str:
    """Say which names differ, and the option that makes them match."""
    theirs, ours = next(iter(renaming.pairs.items()))
    count = (
        "1 tensor has another name" if len(renaming.pairs) == 1 else f"{len(renaming.pairs)} tensors have other names"
    )
    return f"{model.label}: {count}: {theirs} is {ours} in {base.label}; to match them: {renaming.options}"


def _summarize(base: Checkpoint, model: Checkpoint, differences: Mapping[str, str], remedies: set[str]) -> list[str]:
    """The problems of one model: names that a renaming explains in one line, and each other; adds the remedies."""
    lacks = [key for key in differences if key in base.specs and model.find_spec(key) is None]
    renaming = find_renaming(base, model) if lacks else None
    explained = {*renaming.pairs, *renaming.pairs.values()} if renaming else set[str]()
    lines = [_renaming_words(base, model, renaming)] if renaming else []
    for key, problem in differences.items():
        if key in explained:
            continue
        lines.append(problem)
        theirs = model.find_spec(key)
        if key not in base.specs:
            remedies.add("to leave out what the base lacks: --mismatch base; to keep it: --mismatch union")
            continue
        remedies.add("to keep the base's tensor wherever a model has no match: --mismatch base")
        if differ_in_rows_only(base.specs[key], theirs):
            remedies.add("to merge the rows that all have, where only the number of rows differs: --mismatch intersect")
            if theirs and theirs.shape[0] > base.specs[key].shape[0]:
                remedies.add("to keep every row, of heads and vocabularies that grew: --mismatch union")
    return lines


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
    return replace(match, unmerged=carried, partly_merged=partly, mismatched=mismatched)


def _common_rows(ours: TensorSpec, row_counts: Mapping[str, int]) -> RowRange:
    """Return the rows that the base and all models have; models not in `row_counts` have as many as the base."""
    of = ours.shape[0]
    rows = min(of, *row_counts.values())
    theirs = ", ".join(f"{label} has {count}" for label, count in row_counts.items())
    kept = f", the other {of - rows} kept from the base" if of > rows else ""
    dropped = ", the further rows of models left out" if max(row_counts.values()) > of else ""
    why = f"{rows} of {of} rows merged{kept}{dropped} ({theirs})"
    return RowRange(rows, of, rows * (ours.numel // of) if of else 0, why)


def _differences(base: Checkpoint, model: Checkpoint) -> dict[str, str]:
    differences: dict[str, str] = {}
    for key, ours in base.specs.items():
        theirs = model.find_spec(key)
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
        if key not in base.specs and key not in base.aliases:
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
