"""A disk that is full, slow to take what it is given, forbidden, or in use by another merge."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.crash.harness import DiskFailure, ForkServer, ShortWrites, read_contents
from tests.crash.scenarios import (
    SCENARIOS,
    Scenario,
    absorb_command,
    absorb_task,
    absorbed_names,
    merge,
    merge_command,
    prepare_running_merge,
    run_as_user,
    write_inputs,
)
from tests.crash.test_kills import completed, copied, prepared

from magmax.checkpoints.journal import FolderLock, WorkingFolder
from magmax.checkpoints.output_paths import LOCK_FILE
from magmax.errors import MagMaxError

NOBODY = 65534
TAKING_SPACE = ("open", "pwrite", "write", "ftruncate", "fdatasync", "fsync")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_no_space_left_is_one_error_wherever_it_strikes_and_the_same_command_goes_on(
    scenario: Scenario, child: ForkServer, tmp_path: Path
) -> None:
    work, out = scenario.work, scenario.out
    before, after, undisturbed = prepared(child, tmp_path, scenario.prepare, work, out)
    old, whole = read_contents(before / out), read_contents(after)
    for number, call in enumerate(undisturbed.calls, start=1):
        if call[0] not in TAKING_SPACE:
            continue
        folder = copied(before)
        refusal = child(work, folder, out, fault=DiskFailure(number, call[0], errno.ENOSPC)).error_message
        assert str(folder) in refusal, call
        assert "o space left" in refusal, call
        if call[0] == "pwrite":
            assert refusal.startswith(str(folder / out))
            assert "run the same command again" in refusal
            assert "resumes" in refusal
            assert read_contents(folder / out) == old
        completed(child(work, folder, out))
        assert read_contents(folder) == whole, call


def test_no_space_left_leaves_the_state_at_one_version_or_the_next(child: ForkServer, tmp_path: Path) -> None:
    before, after, undisturbed = prepared(child, tmp_path, prepare_running_merge, absorb_task, 3)
    for number, call in enumerate(undisturbed.calls, start=1):
        if call[0] not in TAKING_SPACE:
            continue
        folder = copied(before)
        assert (
            "o space left"
            in child(absorb_task, folder, 3, fault=DiskFailure(number, call[0], errno.ENOSPC)).error_message
        ), call
        tasks = completed(child(absorbed_names, folder)).result
        if len(tasks) == 2:
            completed(child(absorb_task, folder, 3))
        assert completed(child(absorbed_names, folder)).result == ["task1", "task2", "task3"]
        assert read_contents(folder / "state" / "generation-000003") == read_contents(
            after / "state" / "generation-000003"
        ), call


def test_a_failing_disk_is_named_with_what_the_system_says(child: ForkServer, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    refusal = child(merge, tmp_path, "out.safetensors", fault=DiskFailure(1, "pwrite", errno.EIO)).error_message
    assert str(tmp_path / "out.safetensors") in refusal
    assert os.strerror(errno.EIO) in refusal


@pytest.mark.parametrize("most", [1, 7, 4096])
@pytest.mark.parametrize("scenario", SCENARIOS[:2], ids=str)
def test_writes_that_take_a_part_only_are_gone_on_with(
    scenario: Scenario, most: int, child: ForkServer, tmp_path: Path
) -> None:
    before, after, _ = prepared(child, tmp_path, scenario.prepare, scenario.work, scenario.out)
    completed(child(scenario.work, before, scenario.out, fault=ShortWrites(most)))
    assert read_contents(before) == read_contents(after)


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_the_command_line_ends_with_code_2_and_one_line(out: str, child: ForkServer, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    code, stdout, stderr = completed(
        child(merge_command, tmp_path, out, fault=DiskFailure(1, "pwrite", errno.ENOSPC))
    ).result
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {tmp_path / out}: no space left")
    assert stderr.count("\n") == 1
    code, _, stderr = completed(child(merge_command, tmp_path, out)).result
    assert (code, stderr) == (0, "")


@pytest.mark.parametrize("name", ["write", "open", "fsync"])
def test_a_state_that_cannot_be_saved_ends_with_code_2(name: str, child: ForkServer, tmp_path: Path) -> None:
    """The last calls of an absorption, after the version itself is in place."""
    before, _, undisturbed = prepared(child, tmp_path, prepare_running_merge, absorb_task, 3)
    number = max(n for n, call in enumerate(undisturbed.calls, start=1) if call[0] == name)
    folder = copied(before)
    fault = DiskFailure(number, name, errno.ENOSPC)
    code, _, stderr = completed(child(absorb_command, folder, 3, fault=fault)).result
    assert code == 2
    assert stderr.startswith("error: ")
    assert "o space left" in stderr


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that everyone may look into and nobody else may write to; its parents do not keep anyone out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH | (0o111 if path.is_dir() else 0))
        yield folder
        folder.chmod(0o755)
        (folder / "base").chmod(0o755)


@pytest.mark.parametrize("out", ["out.safetensors", "out", "new/deep/out.safetensors"])
def test_a_folder_that_may_not_be_written_to_is_named_before_any_work(
    out: str, closed: Path, child: ForkServer
) -> None:
    found = read_contents(closed)
    end = child(run_as_user, NOBODY, merge, closed, out)
    assert end.error_message == f"{closed}: cannot be written to; choose another place for the output"
    assert end.calls == []
    assert read_contents(closed) == found


def test_a_state_in_a_folder_that_may_not_be_written_to(closed: Path, child: ForkServer) -> None:
    assert f"{closed}: cannot be written to" in child(run_as_user, NOBODY, absorb_task, closed, 1).error_message


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_turns_out_to_be_read_only_is_named(code: int, child: ForkServer, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    refusal = child(merge, tmp_path, "out.safetensors", fault=DiskFailure(1, "open", code)).error_message
    assert refusal == f"{tmp_path}: cannot be written to: {os.strerror(code)}"


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_an_output_that_is_being_written_is_left_alone(out: str, child: ForkServer, tmp_path: Path) -> None:
    before, after, _ = prepared(child, tmp_path, write_inputs, merge, out)
    with WorkingFolder(before / out):
        found = read_contents(before)
        refusal = child(merge, before, out).error_message
        assert refusal == f"{before / out}: another magmax is writing this output; wait for it to end"
        assert read_contents(before) == found
    completed(child(merge, before, out))
    assert read_contents(before) == read_contents(after)


def test_a_lock_on_a_file_that_was_just_deleted_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock's file and locking it, the process that held the lock ends its work and deletes it."""
    real, deletions = fcntl.flock, [(tmp_path / LOCK_FILE).unlink]

    def late_lock(fd: int, how: int) -> None:
        if deletions:
            deletions.pop()()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late_lock)
    mine = FolderLock(tmp_path, tmp_path)
    with pytest.raises(MagMaxError, match="another magmax"):
        FolderLock(tmp_path, tmp_path)
    mine.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_two_merges_to_one_output_never_mix(out: str, child: ForkServer, tmp_path: Path) -> None:
    before, after, _ = prepared(child, tmp_path, write_inputs, merge, out)
    whole = read_contents(after)
    other = ForkServer()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(15):
            folder = copied(before)
            ends = list(pool.map(lambda nursery, f=folder: nursery(merge, f, out), (child, other)))
            refusals = [end.error_message for end in ends if end.error_message]
            assert len(refusals) < 2
            assert all("another magmax is writing this output" in refusal for refusal in refusals)
            assert read_contents(folder) == whole
    other.close()


def test_two_absorptions_at_once_lose_no_task(child: ForkServer, tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    completed(child(write_inputs, before))
    completed(child(absorb_task, before, 1))
    other = ForkServer()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(15):
            folder = copied(before)
            ends = list(pool.map(lambda nursery, task, f=folder: nursery(absorb_task, f, task), (child, other), (2, 3)))
            taken = {f"task{task}" for task, end in zip((2, 3), ends, strict=True) if not end.error_message}
            assert set(completed(child(absorbed_names, folder)).result) == {"task1"} | taken
    other.close()
