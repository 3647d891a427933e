"""What other people put where outputs and working files go: it is never changed or deleted, whenever it comes."""

from __future__ import annotations

import json
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.crash.harness import ChildResult, Disturbance, ForeignKind, ForkServer, plant, read_contents
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.crash.test_kills import completed, copied

REPLACING = [scenario for scenario in SCENARIOS if scenario.name.endswith("again")]
NAMES = ("notes.txt", "model.safetensors.bak", "x", "théta", "checkpoint-1", ".hidden")
OWN_NAMES = (
    *("model.safetensors", "config.json", "README.md", "output", "old", "output.safetensors", "output.journal"),
    *(".magmax-lock", ".magmax-contents", "probe-1"),
)
"""Names that this program uses: only what it cannot have made stands under one of them."""
Prepare = Callable[[Scenario], tuple[Path, Path, ChildResult]]


def find_lost(folder: Path, elsewhere: Path) -> list[str]:
    """What was planted and is not somewhere in the folder, or in a folder that was moved, as it was."""
    log = elsewhere / "planted"
    lost = []
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        name, inode, kind, target = json.loads(line)
        places = [path for path in folder.rglob("*") if path.name == name and path.lstat().st_ino == inode]
        if not places or not is_as_planted(places[0], kind, Path(target)):
            lost.append(line)
    return lost


def is_as_planted(path: Path, kind: ForeignKind, target: Path) -> bool:
    mode = path.lstat().st_mode
    if kind in ("link", "dangling link"):
        whole = kind == "dangling link" or target.read_bytes() == b"precious"
        return path.is_symlink() and path.readlink() == target and whole
    if kind == "pipe":
        return stat.S_ISFIFO(mode)
    if kind in ("folder", "full folder"):
        return stat.S_ISDIR(mode) and (kind == "folder" or (path / "mine.txt").read_bytes() == b"precious")
    return stat.S_ISREG(mode) and path.read_bytes() == b"precious"


@st.composite
def foreign_places(draw: st.DrawFn, out: str, amid: bool = False) -> tuple[str, ForeignKind]:
    """A place in or beside an output or its working folder, and what is put there.

    Amid the work not where a rename goes in that very moment: the system offers none that replaces nothing.
    """
    kind = draw(st.sampled_from(get_args(ForeignKind)))
    work, partial = f"{out}.magmax-work", f"{out}.magmax-work/{'output' if out == 'out' else 'x'}"
    folders = [out, work, partial, f"{work}/old", f"{out}.partial"]
    beside = [f"{out}.partial", f"{out}.journal", f"{out}.magmax-old", f"{out}.task-vector.safetensors"]
    names = NAMES if amid or kind == "file" else (*NAMES, *OWN_NAMES)
    inside = [f"{folder}/{name}" for folder in folders for name in names]
    return draw(st.sampled_from([*beside, *inside, *([] if amid else [work])])), kind


@pytest.fixture(scope="module")
def prepared_once(child: ForkServer) -> Iterator[Prepare]:
    """A folder before the work, one after it, and how it went: for each scenario made once."""
    made: dict[str, tuple[Path, Path, ChildResult]] = {}
    place = tempfile.TemporaryDirectory()

    def prepare(scenario: Scenario) -> tuple[Path, Path, ChildResult]:
        if scenario.name not in made:
            before = Path(place.name, scenario.name, "before")
            before.mkdir(parents=True)
            completed(child(scenario.prepare, before, scenario.out))
            after = copied(before, "after")
            made[scenario.name] = before, after, completed(child(scenario.work, after, scenario.out))
        return made[scenario.name]

    yield prepare
    place.cleanup()


@pytest.mark.parametrize("scenario", REPLACING, ids=str)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_nothing_that_others_made_is_touched_before_during_or_after_a_kill(
    scenario: Scenario,
    data: st.DataObject,
    child: ForkServer,
    prepared_once: Prepare,
) -> None:
    """Something is there from the start, something appears amid the work, which may be killed, something after it."""
    out = scenario.out
    before, after, undisturbed = prepared_once(scenario)
    calls = st.integers(1, len(undisturbed.calls) + 1)
    first, second, third = (data.draw(st.none() | foreign_places(out, amid)) for amid in (False, True, False))
    killed_at, planted_at = data.draw(calls), data.draw(calls)
    with tempfile.TemporaryDirectory() as name:
        folder, elsewhere = Path(name, "copy"), Path(name, "elsewhere")
        elsewhere.mkdir()
        shutil.copytree(before, folder)
        if first:
            plant(folder / first[0], first[1], elsewhere)
        place, kind = second or (f"nowhere/{out}", "file")
        child(
            scenario.work,
            folder,
            out,
            fault=Disturbance(killed_at, "before", planted_at, folder / place, kind, elsewhere),
        )
        if third:
            plant(folder / third[0], third[1], elsewhere)
        end = child(scenario.work, folder, out)
        assert not find_lost(folder, elsewhere)
        assert (folder / out).exists() or (folder / f"{out}.magmax-work" / "old").exists()
        if not end.error_message:
            new, whole = read_contents(folder / out), read_contents(after / out)
            assert new is not None
            assert whole is not None
            assert {name: new[name] for name in whole} == whole
