"""SIGKILL at every call that changes the disk: the output is the old one, none, or the new one; never another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.crash.harness import ChildResult, ForkServer, Kill, all_kills, read_contents, sampled_kills
from tests.crash.scenarios import (
    OTHER_SCENARIOS,
    SCENARIOS,
    Scenario,
    absorb_task,
    absorbed_names,
    label_version,
    names_and_labels,
    prepare_labelled_merge,
    prepare_running_merge,
    restore_version,
    write_inputs,
)

from magmax.checkpoints.output_paths import OutputPath


@pytest.mark.parametrize("scenario", [*SCENARIOS, *OTHER_SCENARIOS], ids=str)
def test_a_kill_leaves_the_old_output_or_none_or_the_new_and_the_same_command_mends_it(
    scenario: Scenario, child: ForkServer, tmp_path: Path
) -> None:
    out = scenario.out
    before, after, undisturbed = prepared(child, tmp_path, scenario.prepare, scenario.work, out)
    old, new, whole = read_contents(before / out), read_contents(after / out), read_contents(after)
    for kill in all_kills(undisturbed.calls) if scenario in SCENARIOS else sampled_kills(undisturbed.calls):
        folder = copied(before)
        assert child(scenario.work, folder, out, fault=kill).is_killed
        target = OutputPath(folder / out)
        assert read_contents(target.path) in (old, new) or read_contents(target.replaced) == old, kill
        completed(child(scenario.work, folder, out))
        assert read_contents(folder) == whole, kill


@pytest.mark.parametrize("scenario", SCENARIOS[:2], ids=str)
@pytest.mark.parametrize("last", [1, 4])
def test_a_second_kill_does_no_more_harm_than_the_first(
    scenario: Scenario, last: int, child: ForkServer, tmp_path: Path
) -> None:
    """The first kill falls on one of the last calls, where the output is being published."""
    work, out = scenario.work, scenario.out
    before, after, undisturbed = prepared(child, tmp_path, scenario.prepare, work, out)
    first, whole = Kill(len(undisturbed.calls) - last, "after"), read_contents(after)
    for number, _ in enumerate(undisturbed.calls, start=1):
        folder = copied(before)
        assert child(work, folder, out, fault=first).is_killed
        child(work, folder, out, fault=Kill(number, "after"))
        completed(child(work, folder, out))
        assert read_contents(folder) == whole, (first, number)


@pytest.mark.parametrize("done", [0, 2], ids=["first", "third"])
def test_a_kill_leaves_the_state_before_an_absorption_or_after_it(done: int, child: ForkServer, tmp_path: Path) -> None:
    task = done + 1
    before, after, undisturbed = prepared(
        child, tmp_path, prepare_running_merge if done else write_inputs, absorb_task, task
    )
    further = copied(after, "further")
    completed(child(absorb_task, further, 4))
    whole = read_contents(further)
    for kill in all_kills(undisturbed.calls):
        folder = copied(before)
        assert child(absorb_task, folder, task, fault=kill).is_killed
        tasks = len(completed(child(absorbed_names, folder)).result)
        assert tasks in (done, task), kill
        assert version(folder, tasks) == version(after if tasks == task else before, tasks), kill
        again = child(absorb_task, folder, task)
        assert ("was absorbed already" in again.error_message) == (tasks == task), kill
        assert version(folder, task) == version(after, task), kill
        completed(child(absorb_task, folder, 4))
        assert read_contents(folder) == whole, kill


@pytest.mark.parametrize("work", [label_version, restore_version])
def test_a_kill_leaves_the_state_as_it_was_or_labelled_or_restored(
    work: Callable[[Path], None], child: ForkServer, tmp_path: Path
) -> None:
    before, after, undisturbed = prepared(child, tmp_path, prepare_labelled_merge, work)
    was, will = (completed(child(names_and_labels, folder)).result for folder in (before, after))
    assert was != will
    for kill in all_kills(undisturbed.calls):
        folder = copied(before)
        assert child(work, folder, fault=kill).is_killed
        stands = completed(child(names_and_labels, folder)).result
        assert stands in (was, will), kill
        again = child(work, folder)
        assert not again.error_message or (stands == will and "is labelled 'two' already" in again.error_message), kill
        assert read_contents(folder / "state" / "state.json") == read_contents(after / "state" / "state.json"), kill
        completed(child(absorb_task, folder, 4))
        assert len(completed(child(absorbed_names, folder)).result) == len(will[0]) + 1, kill


def test_a_kill_while_threads_write_does_no_harm(child: ForkServer, tmp_path: Path) -> None:
    """The calls then come in any order: some kills fall between a write and its place in the journal."""
    out, prepare, work = SCENARIOS[0].out, SCENARIOS[0].prepare, SCENARIOS[0].work
    before, after, undisturbed = prepared(child, tmp_path, prepare, work, out)
    whole = read_contents(after)
    for number in range(8, len(undisturbed.calls)):
        folder = copied(before)
        child(work, folder, out, fault=Kill(number, "after"), threads=True)
        completed(child(work, folder, out, threads=True))
        assert read_contents(folder) == whole, number


def prepared(
    child: ForkServer, folder: Path, prepare: Callable[..., object], work: Callable[..., object], *given: Any
) -> tuple[Path, Path, ChildResult]:
    """A folder before the work, one after it, and how the undisturbed work went."""
    before = folder / "before"
    before.mkdir()
    completed(child(prepare, before, *given))
    after = copied(before, "after")
    return before, after, completed(child(work, after, *given))


def copied(folder: Path, name: str = "copy") -> Path:
    """A copy beside the folder, in place of the last one of that name; times of modification are kept."""
    copy = folder.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(folder, copy)


def completed(end: ChildResult) -> ChildResult:
    assert not end.is_killed
    assert not end.error_message
    return end


def version(folder: Path, number: int) -> object:
    return read_contents(folder / "state" / f"generation-{number:06}")
