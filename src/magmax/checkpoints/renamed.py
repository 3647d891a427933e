"""Views of checkpoints under other tensor names: renamed by patterns, or the part under a prefix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from ..errors import MagMaxError, list_problems
from .base import Checkpoint, CheckpointView
from .dtypes import TensorSpec

PATTERN_SECONDS = 1.0
"""The most time that a pattern may take for one name: a pattern of a downloaded recipe must not run for ever."""


class TensorSink(Protocol):
    """A destination of tensors, written in any order: a draft on disk, a view of one, or arrays in memory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None: ...

    def sync(self) -> None: ...


class RenamedCheckpoint(CheckpointView):
    """The tensors of a checkpoint under other names.

    Args:
        names: new name -> its name in the checkpoint. A tensor without a new name is not visible. Of several new names
            for one tensor, the unchanged one, or else the first, is the stored one and the others are tied to it.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(checkpoint, {})
        self._stored_name: dict[str, str] = {}
        first = {old: new for new, old in names.items() if new == old and old in checkpoint.specs}
        for new, name in names.items():
            old = checkpoint.resolve_alias(name)
            if first.setdefault(old, new) == new:
                self.specs[new], self._stored_name[new] = checkpoint.specs[old], old
            else:
                self.aliases[new] = first[old]

    @property
    def output_specs(self) -> dict[str, TensorSpec]:
        stored = self._checkpoint.output_specs
        return {new: stored[old] for new, old in self._stored_name.items()}

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        """Those of the files, and the digest of the names: what was read under other names is of no use."""
        fingerprints, key = super().fingerprints(refresh), f"the names of {self.label}"
        names = hashlib.sha256(json.dumps(sorted(self._stored_name.items())).encode()).hexdigest()
        return {**fingerprints, key: [*fingerprints.get(key, []), names]}

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._checkpoint.read(self._stored_name[key], start, stop)

    def prefetch(self, key: str, start: int, stop: int) -> int:
        return self._checkpoint.prefetch(self._stored_name[key], start, stop)

    def release_prefetched(self, key: str, start: int, stop: int) -> int:
        return self._checkpoint.release_prefetched(self._stored_name[key], start, stop)


@dataclass(frozen=True)
class Renaming:
    """How the tensors of a checkpoint are called in a merge.

    Attributes:
        strip: keep the tensors whose names begin with this, and take it off.
        rename: regular expression -> replacement, as of `re.sub`, applied in order; {"^": "bert."} puts a prefix on.
    """

    strip: str = ""
    rename: Mapping[str, str] = field(default_factory=dict[str, str])

    def __bool__(self) -> bool:
        return bool(self.strip or self.rename)

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a view of a checkpoint under the new names.

        Raises:
            MagMaxError: a prefix or pattern that no name has; a pattern that is none, or takes too long; two tensors
                that get one name.
        """
        if self.strip:
            stripped = strip_prefix(checkpoint, self.strip)
            if not stripped.specs:
                raise MagMaxError(
                    f"{checkpoint.label}: no tensor's name begins with {self.strip!r}; {_first_name(checkpoint)}"
                )
            left_out = [key for key in checkpoint.specs if not key.startswith(self.strip)]
            if left_out:
                stripped.notes.append(
                    f"{checkpoint.label}: {len(left_out)} tensors without {self.strip!r} left out ({left_out[0]}, ...)"
                )
            checkpoint = stripped
        names = {key: key for key in [*checkpoint.specs, *checkpoint.aliases]}
        for pattern, replacement in self.rename.items():
            renamed = _substitute(checkpoint.label, names, pattern, replacement)
            if renamed == names:
                raise MagMaxError(
                    f"{checkpoint.label}: no tensor's name has the pattern {pattern!r}; {_first_name(checkpoint)}"
                )
            names = renamed
        return RenamedCheckpoint(checkpoint, _inverted(checkpoint.label, names)) if self.rename else checkpoint

    def apply_to_some(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Apply it to each checkpoint that has such names. Raises MagMaxError if none has, as `apply` does."""
        if not self:
            return list(checkpoints)
        some = [any(self._concerns(key) for key in [*c.specs, *c.aliases]) for c in checkpoints]
        if not any(some):
            self.apply(checkpoints[0])
        return [self.apply(c) if concerned else c for c, concerned in zip(checkpoints, some, strict=True)]

    def _concerns(self, name: str) -> bool:
        if self.strip:
            return name.startswith(self.strip)
        return any(_substitute("rename", {"": name}, *pair)[""] != name for pair in self.rename.items())


def _first_name(checkpoint: Checkpoint) -> str:
    """What to say of a checkpoint's names."""
    return f"the first is {next(iter(checkpoint.specs))}" if checkpoint.specs else "it has no tensors"


def strip_prefix(checkpoint: Checkpoint, prefix: str) -> RenamedCheckpoint:
    """The tensors whose names begin with a prefix, under their names without it."""
    names = [*checkpoint.specs, *checkpoint.aliases]
    return RenamedCheckpoint(checkpoint, {n.removeprefix(prefix): n for n in names if n.startswith(prefix)})


def _substitute(label: str, names: Mapping[str, str], pattern: str, replacement: str) -> dict[str, str]:
    """Replace a pattern in all the values."""
    import regex

    try:
        compiled = regex.compile(pattern)
        return {key: compiled.sub(replacement, name, timeout=PATTERN_SECONDS) for key, name in names.items()}
    except TimeoutError as error:
        raise MagMaxError(f"{label}: the pattern {pattern!r} of rename takes too long; write a simpler one") from error
    except (regex.error, IndexError) as error:
        raise MagMaxError(f"{label}: rename {pattern!r} to {replacement!r} cannot be done: {error}") from error


def find_pattern(pattern: str, names: Iterable[str], option: str) -> set[str]:
    """The names in which a regular expression is found.

    Raises:
        MagMaxError: an expression that is none, takes too long, or is found in no name; `option` is where it came from.
    """
    import regex

    try:
        compiled = regex.compile(pattern)
        found = {name for name in names if compiled.search(name, timeout=PATTERN_SECONDS)}
    except TimeoutError as error:
        raise MagMaxError(f"the pattern {pattern!r} of {option} takes too long; write a simpler one") from error
    except regex.error as error:
        raise MagMaxError(f"{option}: {pattern!r} is no regular expression: {error}") from error
    if not found:
        raise MagMaxError(f"{option}: no tensor's name has the pattern {pattern!r}")
    return found


def _inverted(label: str, names: Mapping[str, str]) -> dict[str, str]:
    """New name -> old name."""
    inverted: dict[str, str] = {}
    problems: list[str] = []
    for old, new in names.items():
        if not new or new in inverted:
            other = f"as is {inverted[new]}" if new else "which is no name"
            problems.append(f"{label}: {old} is renamed to {new!r}, {other}")
        inverted[new] = old
    if problems:
        raise list_problems(f"{label} cannot be renamed", problems)
    return inverted


@dataclass(frozen=True)
class PrefixedSink:
    """Writes tensors under their names with a prefix."""

    sink: TensorSink
    prefix: str

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        named = self.sink.specs.items()
        return {key.removeprefix(self.prefix): spec for key, spec in named if key.startswith(self.prefix)}

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None:
        self.sink.write(self.prefix + key, start, raw)

    def sync(self) -> None:
        self.sink.sync()
