"""What is shown is on the disk already: a loss of power does no more harm than a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.crash.harness import Call, ForkServer
from tests.crash.scenarios import OTHER_SCENARIOS, SCENARIOS, Scenario, absorb_task, prepare_running_merge
from tests.crash.test_kills import completed, prepared

from magmax.checkpoints.output_paths import STAGED_FOLDERS


@pytest.mark.parametrize("scenario", [*SCENARIOS, *OTHER_SCENARIOS], ids=str)
def test_an_output_is_on_the_disk_before_it_has_its_name(scenario: Scenario, child: ForkServer, tmp_path: Path) -> None:
    _, _, undisturbed = prepared(child, tmp_path, scenario.prepare, scenario.work, scenario.out)
    replay(undisturbed.calls)


def test_a_version_is_on_the_disk_before_the_state_names_it(child: ForkServer, tmp_path: Path) -> None:
    completed(child(prepare_running_merge, tmp_path))
    replay(completed(child(absorb_task, tmp_path, 3)).calls)


@dataclass
class Unsafe:
    """Files and folders with changes that a loss of power could still undo."""

    files: set[Path] = field(default_factory=set)
    folders: set[Path] = field(default_factory=set)

    def within(self, path: Path) -> list[Path]:
        return [p for p in self.files | self.folders if p == path or path in p.parents]


def replay(log: Sequence[Call]) -> None:
    """Follow the calls, and see at each what a loss of power would undo."""
    unsafe = Unsafe()
    for name, text, *rest in log:
        path = Path(text)
        if name in ("fsync", "fdatasync"):
            unsafe.files.discard(path)
            unsafe.folders.discard(path)
        elif name in ("pwrite", "write", "ftruncate"):
            notes_a_part = path.suffix == ".journal" and name == "write" and path not in unsafe.files
            assert not (notes_a_part and unsafe.files), f"{path} notes what is not on the disk: {unsafe.files}"
            unsafe.files.add(path)
        elif name == "rename" and STAGED_FOLDERS.fullmatch(Path(rest[0]).name):
            assert not unsafe.files, "a working folder is given up before what was made in it is on the disk"
            unsafe.folders.discard(path)
        elif name in ("rename", "replace"):
            assert not unsafe.within(path), f"{path} gets its final name before its content is on the disk"
            unsafe.folders |= {path.parent, Path(rest[0]).parent}
        elif name == "unlink":
            unsafe.files.discard(path)
        elif name == "rmdir":
            assert path.parent not in unsafe.folders, f"{path} is deleted before what replaces it is on the disk"
        elif name == "open":
            unsafe.folders.add(path.parent)
    assert not unsafe.files
