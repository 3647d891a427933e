"""What other people put where outputs and working files go: it is never changed or deleted, whenever it comes."""

from __future__ import annotations

import json
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.crash.harness import ChildResult, Disturbance, ForeignKind, ForkServer, plant, read_contents
from tests.crash.scenarios import SCENARIOS, Scenario, merge, run_cli, write_inputs
from tests.crash.test_kills import completed, copied

from magmax.checkpoints.journal import WorkingFolder, delete_staged
from magmax.checkpoints.output_paths import delete_output

REPLACING = [scenario for scenario in SCENARIOS if scenario.name.endswith("again")]
FOLDER_AGAIN = next(scenario for scenario in SCENARIOS if scenario.name == "folder-again")
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


@pytest.mark.parametrize("kind", get_args(ForeignKind))
@pytest.mark.parametrize("place", ["out/mine", "out/deep/mine", "out.magmax-work", "out.magmax-work/mine"])
def test_a_foreign_thing_stops_a_merge_before_any_work(
    place: str, kind: ForeignKind, child: ForkServer, prepared_once: Prepare, tmp_path: Path
) -> None:
    before, _, _ = prepared_once(FOLDER_AGAIN)
    folder = shutil.copytree(before, tmp_path / "copy")
    (folder / place).parent.mkdir(exist_ok=True)
    plant(folder / place, kind, tmp_path)
    old = read_contents(folder / "base")
    end = child(FOLDER_AGAIN.work, folder, "out")
    assert str(folder / place.split("/")[0]) in end.error_message
    assert "magmax did not write" in end.error_message or "is not what magmax writes there" in end.error_message
    assert "move" in end.error_message
    assert end.calls == []
    assert not find_lost(folder, tmp_path)
    assert read_contents(folder / "base") == old


@pytest.mark.parametrize("kind", get_args(ForeignKind))
def test_what_is_added_to_the_old_output_amid_the_merge_stays_and_the_merge_goes_on_when_it_is_moved(
    kind: ForeignKind, child: ForkServer, prepared_once: Prepare, tmp_path: Path
) -> None:
    before, after, undisturbed = prepared_once(FOLDER_AGAIN)
    folder, old = shutil.copytree(before, tmp_path / "copy"), read_contents(before / "out")
    moment = len([call for call in undisturbed.calls if call[0] != "rename"]) // 2
    end = child(
        FOLDER_AGAIN.work, folder, "out", fault=Disturbance(0, "before", moment, folder / "out/x", kind, tmp_path)
    )
    assert "x" in end.error_message
    assert "then run the same command again" in end.error_message
    assert not find_lost(folder, tmp_path)
    (folder / "out/x").rename(tmp_path / "moved")
    assert read_contents(folder / "out") == old
    _, notes = completed(child(FOLDER_AGAIN.work, folder, "out")).result
    assert notes == ["resuming: 100% was done already"]
    assert read_contents(folder) == read_contents(after)


@pytest.mark.parametrize(
    "name", ["x.partial", "x.journal", "x.magmax-old", "x.magmax-work", ".x.0123456789abcdef.magmax-draft"]
)
def test_an_input_with_the_name_of_a_working_file_is_merged_or_refused_and_never_deleted(
    name: str, child: ForkServer, tmp_path: Path
) -> None:
    write_inputs(tmp_path)
    (tmp_path / "base").rename(tmp_path / name)
    found = read_contents(tmp_path / name)
    code, _, said = child(
        run_cli, "merge", "--base", tmp_path / name, tmp_path / "task1.safetensors", "--out", tmp_path / "x"
    ).result
    assert code == (2 if name == "x.magmax-work" else 0)
    assert ("is an input where working files go" in said) == (code == 2)
    assert read_contents(tmp_path / name) == found


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("leads_to", ["what is there", "nothing"])
def test_an_output_that_is_a_link_is_refused(out: str, leads_to: str, child: ForkServer, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    target = tmp_path / "elsewhere" / out
    target.parent.mkdir()
    if leads_to == "what is there":
        completed(child(merge, tmp_path / "elsewhere" / "..", f"elsewhere/{out}"))
    (tmp_path / out).symlink_to(target)
    found = read_contents(tmp_path / "elsewhere")
    end = child(merge, tmp_path, out)
    assert end.error_message == (
        f"{tmp_path / out}: is a symbolic link to {target}; name that path itself, or delete the link"
    )
    assert end.calls == []
    assert (tmp_path / out).is_symlink()
    assert read_contents(tmp_path / "elsewhere") == found


@pytest.mark.parametrize("listing", ["../precious", "/precious", "x/../../precious", "../empty/x", "mine\n..", "\0"])
def test_a_list_of_files_names_nothing_outside_its_folder(listing: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out" / ".magmax-contents").write_text(listing.replace("/precious", str(tmp_path / "precious")))
    delete_output(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "precious"}


def test_an_output_of_a_version_that_made_no_list_is_refused_with_a_remedy(child: ForkServer, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    completed(child(merge, tmp_path, "out"))
    (tmp_path / "out" / ".magmax-contents").unlink()
    found = read_contents(tmp_path / "out")
    assert (
        "if an earlier version wrote them, which made no .magmax-contents, delete the folder"
        in child(merge, tmp_path, "out").error_message
    )
    assert read_contents(tmp_path / "out") == found


def test_working_folders_are_made_while_others_clean_up_beside_them(tmp_path: Path) -> None:
    """A cleaner holds the lock of a folder that is just being made for a moment: that is no other writer."""
    ended, usual = threading.Event(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def clean() -> None:
        while not ended.is_set():
            delete_staged(tmp_path)

    cleaners = [threading.Thread(target=clean) for _ in range(2)]
    for cleaner in cleaners:
        cleaner.start()
    try:
        for number in range(150):
            with WorkingFolder(tmp_path / f"out-{number}.safetensors"):
                pass
    finally:
        sys.setswitchinterval(usual)
        ended.set()
        for cleaner in cleaners:
            cleaner.join()
    assert not list(tmp_path.iterdir())
