"""The same command again takes up what is on the disk, and only what is still of use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.crash.harness import Call, ForkServer, Kill, read_contents
from tests.crash.scenarios import (
    merge,
    merge_by_angles,
    merge_by_preference,
    merge_calibrated,
    merge_whole_tensors,
    merge_with_tuple_description,
    write_inputs,
)
from tests.crash.test_kills import completed, copied, prepared
from tests.robustness.files import small_model, write_safetensors

from magmax.checkpoints.output_paths import OutputPath

OUTS = ["out.safetensors", "out"]


@pytest.mark.parametrize("out", OUTS)
def test_a_resumed_merge_says_what_it_reuses_and_gives_the_same_bytes(
    out: str, child: ForkServer, tmp_path: Path
) -> None:
    before, after, undisturbed = prepared(child, tmp_path, write_inputs, merge, out)
    shares = []
    for number in journalled(undisturbed.calls):
        folder = copied(before)
        assert child(merge, folder, out, fault=Kill(number, "after")).is_killed
        outcome, notes = completed(child(merge, folder, out)).result
        assert notes == [f"resuming: {outcome.reused_bytes / outcome.read_bytes:.0%} was done already"]
        assert read_contents(folder) == read_contents(after)
        shares.append(outcome.reused_bytes / outcome.read_bytes)
    assert len(shares) > 3
    assert shares == sorted(set(shares))
    assert shares[0] > 0
    assert shares[-1] == 1


@pytest.mark.parametrize(
    "work",
    [
        merge_whole_tensors,
        merge_by_angles,
        merge_by_preference,
        merge_calibrated,
        merge_with_tuple_description,
    ],
)
@pytest.mark.parametrize("out", OUTS)
def test_a_rule_that_asks_or_takes_whole_tensors_resumes_too(
    work: Callable[..., object], out: str, child: ForkServer, tmp_path: Path
) -> None:
    before, after, undisturbed = prepared(child, tmp_path, write_inputs, work, out)
    reused = []
    for number in journalled(undisturbed.calls):
        folder = copied(before)
        assert child(work, folder, out, fault=Kill(number, "after")).is_killed
        outcome, _ = completed(child(work, folder, out)).result
        assert read_contents(folder) == read_contents(after)
        reused.append(outcome.reused_bytes)
    assert len(reused) > 3
    assert reused == sorted(set(reused))
    assert reused[0] > 0


@pytest.mark.parametrize("out", OUTS)
def test_what_was_read_is_not_read_again(out: str, child: ForkServer, tmp_path: Path) -> None:
    _, folder, undisturbed = interrupted(child, tmp_path, out)
    resumed = completed(child(merge, folder, out))
    assert 0 < written(resumed.calls) < written(undisturbed)


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def retrained(path: Path) -> None:
    write_safetensors(path, small_model(9))


def grown(path: Path) -> None:
    status = path.stat()
    write_safetensors(path, small_model(9), {"note": "another header, and so another size"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewritten_in_place(path: Path) -> None:
    """The same size and the same time of modification, and the same inode."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size - 4)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swapped(path: Path) -> None:
    """Another file under the name, of the same size, header and time of modification."""
    status = path.stat()
    write_safetensors(
        path.with_name("new"), small_model(9), {"format": "pt"} if path.name == "model.safetensors" else None
    )
    assert path.with_name("new").stat().st_size == status.st_size
    os.utime(path.with_name("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("change", [touched, retrained, grown, rewritten_in_place, swapped])
@pytest.mark.parametrize("which", ["task2.safetensors", "base/model.safetensors"])
def test_a_changed_input_starts_afresh_and_says_so(
    which: str, change: Callable[[Path], None], out: str, child: ForkServer, tmp_path: Path
) -> None:
    _, folder, _ = interrupted(child, tmp_path, out)
    change(folder / which)
    outcome, notes = completed(child(merge, folder, out)).result
    assert notes == [f"starting afresh: {folder / which} changed since the interrupted run"]
    assert outcome.reused_bytes == 0
    assert read_contents(folder / out) == merged_without_history(child, folder, out)


@pytest.mark.parametrize("out", OUTS)
def test_other_models_start_afresh(out: str, child: ForkServer, tmp_path: Path) -> None:
    _, folder, _ = interrupted(child, tmp_path, out)
    outcome, notes = completed(child(merge, folder, out, (1, 2, 3))).result
    assert notes
    assert notes[0].startswith("starting afresh")
    assert outcome.reused_bytes == 0


@pytest.mark.parametrize("out", OUTS)
def test_restart_forgets_the_interrupted_run_even_if_it_is_killed_in_turn(
    out: str, child: ForkServer, tmp_path: Path
) -> None:
    after, folder, log = interrupted(child, tmp_path, out)
    half_done = copied(folder, "half")
    outcome, notes = completed(child(merge, folder, out, (1, 2), True)).result
    assert (outcome.reused_bytes, notes) == (0, [])
    assert read_contents(folder) == read_contents(after)
    for number, _ in enumerate(log, start=1):
        folder = back(half_done, folder)
        child(merge, folder, out, (1, 2), True, fault=Kill(number, "after"))
        completed(child(merge, folder, out))
        assert read_contents(folder) == read_contents(after), number


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("end", [b'["weight",0,', b"\0" * 40, b"\xff\n", b'"not a part'])
def test_a_damaged_end_of_the_journal_costs_only_what_it_held(
    end: bytes, out: str, child: ForkServer, tmp_path: Path
) -> None:
    after, folder, _ = interrupted(child, tmp_path, out)
    with OutputPath(folder / out).journal_path.open("ab") as journal:
        journal.write(end)
    assert child(merge, folder, out, fault=Kill(12, "after")).is_killed
    outcome, _ = completed(child(merge, folder, out)).result
    assert outcome.reused_bytes > 0
    assert read_contents(folder) == read_contents(after)


@pytest.mark.parametrize("out", OUTS)
def test_a_damaged_draft_is_not_taken_up(out: str, child: ForkServer, tmp_path: Path) -> None:
    after, folder, _ = interrupted(child, tmp_path, out)
    partial = OutputPath(folder / out).partial_path
    victim = min(partial.glob("*.safetensors")) if partial.is_dir() else partial
    os.truncate(victim, victim.stat().st_size - 1)
    outcome, _ = completed(child(merge, folder, out)).result
    assert outcome.reused_bytes == 0
    assert read_contents(folder) == read_contents(after)


def test_a_read_of_the_inputs_does_not_make_the_journal_useless(child: ForkServer, tmp_path: Path) -> None:
    """Nor does another path to the same files."""
    after, folder, _ = interrupted(child, tmp_path, "out")
    for path in folder.rglob("*.safetensors"):
        path.read_bytes()
    outcome, _ = completed(child(merge, folder, "out")).result
    assert outcome.reused_bytes > 0
    assert read_contents(folder) == read_contents(after)


def interrupted(child: ForkServer, tmp_path: Path, out: str) -> tuple[Path, Path, Sequence[Call]]:
    """A folder where the work is done, one where a kill stopped it half-way, and the undisturbed calls."""
    before, after, undisturbed = prepared(child, tmp_path, write_inputs, merge, out)
    folder = copied(before)
    moments = journalled(undisturbed.calls)
    assert child(merge, folder, out, fault=Kill(moments[len(moments) // 2], "after")).is_killed
    return after, folder, undisturbed.calls


def back(saved: Path, folder: Path) -> Path:
    """The folder as it was when it was saved, under its own name, which the journal knows."""
    return copied(saved, folder.name)


def journalled(log: Sequence[Call]) -> list[int]:
    """The numbers of the calls that put parts into the journal; the first only names the work."""
    return [n for n, call in enumerate(log, start=1) if call[0] == "write" and call[1].endswith(".journal")][1:]


def written(log: Sequence[Call]) -> int:
    return sum(call[-1] for call in log if call[0] == "pwrite")


def merged_without_history(child: ForkServer, folder: Path, out: str) -> object:
    clean = folder.with_name("clean")
    clean.mkdir()
    for name in ("base", "task1.safetensors", "task2.safetensors"):
        (clean / name).symlink_to(folder / name)
    completed(child(merge, clean, out))
    return read_contents(clean / out)
