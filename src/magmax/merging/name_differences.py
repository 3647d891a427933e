"""Names that would match after a renaming: which prefix, or which part of the names, a model has differently."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoints import Checkpoint, TensorSpec

MAX_SAMPLES = 200
"""Names for which a prefix is looked for; more would tell the same."""


@dataclass(frozen=True)
class SuggestedRenaming:
    """A renaming of a model's tensors that makes them match the base's.

    Attributes:
        rename: regular expression -> replacement, as of `rename`.
        prefix: what to take off, where that is all of it.
        pairs: the model's name -> the base's name of each tensor that matches then.
        elements: how many elements these are.
    """

    rename: Mapping[str, str]
    prefix: str
    pairs: Mapping[str, str]
    elements: int

    @property
    def options(self) -> str:
        """Return it as options of the command line."""
        if self.prefix:
            return f"--strip {shlex.quote(self.prefix)}"
        return " ".join(f"--rename {shlex.quote(f'{old}={new}')}" for old, new in self.rename.items())


def find_renaming(base: Checkpoint, model: Checkpoint) -> SuggestedRenaming | None:
    """Find a renaming by which more of a model matches its base: a prefix taken off, put on or replaced, or parts of
    names that are called otherwise (gamma for weight).
    """
    missing = {k: s for k, s in base.specs.items() if model.resolve_alias(k) not in model.specs}
    extra = {k: s for k, s in model.specs.items() if k not in base.specs and k not in base.aliases}
    best: SuggestedRenaming | None = None
    for rename in [*_prefix_changes(missing, extra), _part_changes(missing, extra)]:
        pairs = {name: new for name in extra if (new := _apply(rename, name)) in missing}
        pairs = {name: new for name, new in pairs.items() if _alike(extra[name], missing[new])}
        elements = sum(missing[new].numel for new in pairs.values())
        if pairs and (best is None or elements > best.elements):
            first, replacement = next(iter(rename.items()))
            prefix = _unescaped(first) if len(rename) == 1 and not replacement and first != "^" else ""
            best = SuggestedRenaming(rename, prefix, pairs, elements)
    return best


def _prefix_changes(missing: Mapping[str, TensorSpec], extra: Mapping[str, TensorSpec]) -> list[dict[str, str]]:
    """The most frequent replacements of a prefix by which names of `extra` become names of `missing`."""
    by_ending: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, spec in missing.items():
        by_ending.setdefault((name.rpartition(".")[2], spec.shape), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in list(extra)[:MAX_SAMPLES]:
        candidates = by_ending.get((name.rpartition(".")[2], extra[name].shape), [])[:MAX_SAMPLES]
        if candidates:
            length, other = max((_common_parts(name, other), other) for other in candidates)
            votes[_without_ending(name, length), _without_ending(other, length)] += 1
    return [{"^" + re.escape(old): new} for (old, new), _ in votes.most_common(3)]


def _part_changes(missing: Mapping[str, TensorSpec], extra: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Replacements of one part of a name between dots, where such a part is always called otherwise."""
    masked: dict[tuple[str, ...], str] = {}
    for name in missing:
        parts = name.split(".")
        for place, part in enumerate(parts):
            masked[(*parts[:place], "", *parts[place + 1 :])] = part
    changes: dict[str, str] = {}
    for name in extra:
        parts = name.split(".")
        for place, part in enumerate(parts):
            wanted = masked.get((*parts[:place], "", *parts[place + 1 :]))
            if wanted is not None and not part.isdecimal():
                changes.setdefault(rf"\b{re.escape(part)}\b", wanted)
    return changes


def _apply(rename: Mapping[str, str], name: str) -> str:
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    return one.shape == other.shape and one.is_mergeable == other.is_mergeable


def _common_parts(one: str, other: str) -> int:
    """How many of the last parts of two names are equal."""
    count = 0
    for ours, theirs in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def _without_ending(name: str, parts: int) -> str:
    """The name without its last parts, with the dot where something is left."""
    kept: Sequence[str] = name.split(".")[:-parts]
    return "".join(f"{part}." for part in kept)


def _unescaped(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
