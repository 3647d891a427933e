"""The folder of a running merge: its `state.json`, and the files of the versions that this names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...checkpoints import Checkpoint, open_checkpoint
from ...checkpoints.blocks import iter_chunks
from ...checkpoints.journal import WorkingFolder, delete_staged, hold_folder, lock_folder
from ...checkpoints.output_paths import (
    WORK_SUFFIX,
    delete_output,
    describe_foreign,
    find_foreign,
    is_working_name,
    kind_of,
)
from ...checkpoints.renamed import RenamedCheckpoint, strip_prefix
from ...errors import MagMaxError, list_problems
from .manifest import Manifest, Version, read_manifest

MANIFEST_FILE = "state.json"
VERSION_FOLDERS = re.compile(r"generation-\d{6,}")
WINNER_PREFIX = "magmax.winner/"
MAX_MAPPED_MODELS = 255


def slot_prefix(number: int) -> str:
    """Return the prefix of the tensor names of slot `number`; slot 0 has none."""
    return f"magmax.slot{number}/" if number else ""


class VersionStore:
    """The files of a running merge: its manifest and the versions that this names.

    Attributes:
        path: the folder.
        state: what its `state.json` says, as it was last read or written here.
    """

    def __init__(self, path: Path, state: Manifest) -> None:
        self.path, self.state = path, state

    @classmethod
    def find(cls, path: Path) -> VersionStore | None:
        """Return what is there, if something is. Raises MagMaxError for a folder of anything else, and for a damaged
        one.
        """
        if (path / MANIFEST_FILE).exists():
            return cls(path, _read_current_manifest(path))
        strange = not path.is_dir() or any(not _is_of_running_merge(p.name) for p in path.iterdir())
        if path.exists() and strange:
            raise MagMaxError(f"{path}: is not a running merge (it has no state.json); name its folder, or a new one")
        return None

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the folder against other processes, having seen what they did since it was opened."""
        with hold_folder(self.path):
            if (self.path / MANIFEST_FILE).exists():
                self.state = _read_current_manifest(self.path)
            problems = [p for folder in self._droppable() for p in describe_foreign(folder, find_foreign(folder))]
            if problems:
                raise list_problems(f"{self.path} cannot be changed", problems)
            yield

    def folder(self, number: int) -> Path:
        """Return where a version's files are, or will be."""
        return _folder(self.path, number)

    def slots(self) -> list[Checkpoint]:
        """Return what the current version holds of the rule, a checkpoint for each slot."""
        if self.state.current is None:
            return []
        whole = open_checkpoint(self.folder(self.state.current), mergeable=False)
        first_slot = RenamedCheckpoint(whole, {key: key for key in whole.specs if not key.startswith("magmax.")})
        count = self.state.rule.slots(len(self.state.tasks))
        return [first_slot, *(strip_prefix(whole, slot_prefix(n)) for n in range(1, count))]

    def winners(self) -> Checkpoint:
        """The map of the current version: which task, from 1, supplied each element, 0 where none did."""
        whole = open_checkpoint(self.folder(self.state.current or 0), mergeable=False)
        return strip_prefix(whole, WINNER_PREFIX)

    def shares(self) -> list[float]:
        """The part of the elements that each task supplied."""
        view, tasks = self.winners(), len(self.state.tasks)
        counts = np.zeros(MAX_MAPPED_MODELS + 1, np.int64)
        for key, spec in view.specs.items():
            for chunk in iter_chunks(key, spec):
                counts += np.bincount(view.read(key, chunk.start, chunk.stop), minlength=len(counts))
        total = max(1, int(counts[1:].sum()))
        return [int(counts[number]) / total for number in range(1, tasks + 1)]

    def verifier(self) -> Callable[[Sequence[str]], None]:
        """Return what refuses digests of the base and the slots that are not those recorded when they were last
        seen.
        """
        current = self.state.current_version
        recorded = [self.state.base_digest, *(current.slots if current else ())]

        def verify(found: Sequence[str]) -> None:
            for number, (now, then) in enumerate(zip(found, recorded, strict=False)):
                if then is not None and now != then:
                    what = "its files were changed or damaged"
                    if number == 0:
                        what = "the base is not the one it was begun with"
                    raise MagMaxError(f"{self.path}: {what} (digest {now}, expected {then})")

        return verify

    def check_label(self, label: str | None) -> None:
        """Raise MagMaxError for a label that is taken, or looks like a number."""
        taken = next((g for g in self.state.versions.values() if label is not None and g.label == label), None)
        if taken:
            raise MagMaxError(f"{self.path}: version {taken.number} is labelled {label!r} already")
        if label is not None and (not label or label.isdigit()):
            raise MagMaxError(f"a label needs a letter in it, so that it cannot be taken for a number: {label!r}")

    def label(self, label: str) -> None:
        """Name the current version, so that it is kept."""
        current = self.state.current_version
        if current is None:
            raise MagMaxError(f"{self.path}: nothing was absorbed yet, so there is nothing to label")
        self.check_label(label)
        self.publish(replace(current, label=label))

    def restore(self, which: str | int) -> Version | None:
        """Make the version of this label or number the current one; returns the one that was, with a label to keep it.

        Where it is current already, nothing changes, and None is returned.
        """
        before = list(self.state.versions.values())
        matches = [g for g in before if which in (g.label, g.number, str(g.number))]
        if not matches:
            names = ", ".join(f"{g.number} ({g.label})" if g.label else str(g.number) for g in before)
            raise MagMaxError(f"{self.path}: has no version {which!r}; it has {names or 'none'}")
        left = self.state.current_version
        if left is None or left.number == matches[0].number:
            return None
        if left.label is None:
            taken = {version.label for version in before}
            names = itertools.chain([f"left-{left.number}"], (f"left-{left.number}-{n}" for n in itertools.count(2)))
            left = replace(left, label=next(name for name in names if name not in taken))
            self.state.versions[left.number] = left
        self.publish(matches[0])
        return left

    def publish(self, version: Version) -> None:
        """Make a version the one that counts, then drop those that nothing names."""
        versions = {**self.state.versions, version.number: version}
        self.state.current = version.number
        self.state.versions = {n: g for n, g in versions.items() if g.label or n == version.number}
        self.state.write(self.path / MANIFEST_FILE)
        self.delete_unnamed()

    def delete_unnamed(self) -> None:
        """Delete the versions that nothing names, and what a kill left of one; what others put there stays."""
        named = {self.folder(n).name for n in self.state.versions}
        for folder in self._droppable():
            if folder.name not in named:
                delete_output(folder)
        _delete_work(self.path)

    def _droppable(self) -> list[Path]:
        """The folders of versions that no label keeps: the current one and what a kill left."""
        labelled = {self.folder(version.number).name for version in self.state.versions.values() if version.label}
        return [p for p in sorted(self.path.iterdir()) if VERSION_FOLDERS.fullmatch(p.name) and p.name not in labelled]


def delete_running_merge(path: Path) -> None:
    """Delete a running merge, if it is there.

    Raises MagMaxError, and deletes nothing, where something else is in its folder.
    """
    if kind_of(path) is None:
        return
    if kind_of(path) != "folder":
        raise MagMaxError(f"{path}: is a {kind_of(path)}, not the folder of a running merge; move it")
    with lock_folder(path):
        ours = {MANIFEST_FILE, *(inner.name for inner in path.iterdir() if _is_of_running_merge(inner.name))}
        foreign = [inner.name for inner in path.iterdir() if inner.name not in ours]
        versions = [inner for inner in path.iterdir() if VERSION_FOLDERS.fullmatch(inner.name)]
        foreign += [f"{inner.name}/{name}" for inner in versions for name in find_foreign(inner)]
        if foreign:
            raise MagMaxError(describe_foreign(path, foreign)[0])
        (path / MANIFEST_FILE).unlink(missing_ok=True)
        _delete_work(path)
        for version in versions:
            delete_output(version)
    path.rmdir()


def _delete_work(path: Path) -> None:
    """Delete what kills left of versions that were not complete."""
    delete_staged(path)
    for folder in path.glob(f"generation-*{WORK_SUFFIX}"):
        with WorkingFolder(folder.with_name(folder.name.removesuffix(WORK_SUFFIX))) as work:
            work.clear()


def _is_of_running_merge(name: str) -> bool:
    """Return whether a file or folder of this name can be what the first absorption, if it was killed, left."""
    return is_working_name(name) or VERSION_FOLDERS.fullmatch(name) is not None


def _read_current_manifest(path: Path) -> Manifest:
    state = read_manifest(path / MANIFEST_FILE)
    if state.current is not None and not _folder(path, state.current).is_dir():
        raise MagMaxError(f"{path}: its version {state.current} is missing; the state is damaged")
    return state


def _folder(path: Path, number: int) -> Path:
    return path / f"generation-{number:06}"
