"""SIGKILL at every call that changes the disk: the output is the old one, none, or the new one; never another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.crash.harness import End, Kill, Nursery, every_kill, fewer_kills, tree
from tests.crash.scenarios import (
    OTHERS,
    SCENARIOS,
    Scenario,
    absorb,
    absorbed,
    inputs,
    label,
    labelled_state,
    restore,
    standing,
    state_of_two,
)

from magmax.checkpoints.writer import Target


@pytest.mark.parametrize("scenario", [*SCENARIOS, *OTHERS], ids=str)
def test_a_kill_leaves_the_old_output_or_none_or_the_new_and_the_same_command_mends_it(
    scenario: Scenario, child: Nursery, tmp_path: Path
) -> None:
    out = scenario.out
    before, after, undisturbed = prepared(child, tmp_path, scenario.prepare, scenario.work, out)
    old, new, whole = tree(before / out), tree(after / out), tree(after)
    for kill in every_kill(undisturbed.log) if scenario in SCENARIOS else fewer_kills(undisturbed.log):
        folder = copied(before)
        assert child(scenario.work, folder, out, fault=kill).killed
        target = Target(folder / out)
        assert tree(target.path) in (old, new) or tree(target.old) == old, kill
        completed(child(scenario.work, folder, out))
        assert tree(folder) == whole, kill


@pytest.mark.parametrize("scenario", SCENARIOS[:2], ids=str)
@pytest.mark.parametrize("last", [1, 4])
def test_a_second_kill_does_no_more_harm_than_the_first(
    scenario: Scenario, last: int, child: Nursery, tmp_path: Path
) -> None:
    """The first kill falls on one of the last calls, where the output is being published."""
    work, out = scenario.work, scenario.out
    before, after, undisturbed = prepared(child, tmp_path, scenario.prepare, work, out)
    first, whole = Kill(len(undisturbed.log) - last, "after"), tree(after)
    for number, _ in enumerate(undisturbed.log, start=1):
        folder = copied(before)
        assert child(work, folder, out, fault=first).killed
        child(work, folder, out, fault=Kill(number, "after"))
        completed(child(work, folder, out))
        assert tree(folder) == whole, (first, number)


@pytest.mark.parametrize("done", [0, 2], ids=["first", "third"])
def test_a_kill_leaves_the_state_before_an_absorption_or_after_it(done: int, child: Nursery, tmp_path: Path) -> None:
    task = done + 1
    before, after, undisturbed = prepared(child, tmp_path, state_of_two if done else inputs, absorb, task)
    further = copied(after, "further")
    completed(child(absorb, further, 4))
    whole = tree(further)
    for kill in every_kill(undisturbed.log):
        folder = copied(before)
        assert child(absorb, folder, task, fault=kill).killed
        tasks = len(completed(child(absorbed, folder)).result)
        assert tasks in (done, task), kill
        assert generation(folder, tasks) == generation(after if tasks == task else before, tasks), kill
        again = child(absorb, folder, task)
        assert ("was absorbed already" in again.refusal) == (tasks == task), kill
        assert generation(folder, task) == generation(after, task), kill
        completed(child(absorb, folder, 4))
        assert tree(folder) == whole, kill


@pytest.mark.parametrize("work", [label, restore])
def test_a_kill_leaves_the_state_as_it_was_or_labelled_or_restored(
    work: Callable[[Path], None], child: Nursery, tmp_path: Path
) -> None:
    before, after, undisturbed = prepared(child, tmp_path, labelled_state, work)
    was, will = (completed(child(standing, folder)).result for folder in (before, after))
    assert was != will
    for kill in every_kill(undisturbed.log):
        folder = copied(before)
        assert child(work, folder, fault=kill).killed
        stands = completed(child(standing, folder)).result
        assert stands in (was, will), kill
        again = child(work, folder)
        assert not again.refusal or (stands == will and "is labelled 'two' already" in again.refusal), kill
        assert tree(folder / "state" / "state.json") == tree(after / "state" / "state.json"), kill
        completed(child(absorb, folder, 4))
        assert len(completed(child(absorbed, folder)).result) == len(will[0]) + 1, kill


def test_a_kill_while_threads_write_does_no_harm(child: Nursery, tmp_path: Path) -> None:
    """The calls then come in any order: some kills fall between a write and its place in the journal."""
    out, prepare, work = SCENARIOS[0].out, SCENARIOS[0].prepare, SCENARIOS[0].work
    before, after, undisturbed = prepared(child, tmp_path, prepare, work, out)
    whole = tree(after)
    for number in range(8, len(undisturbed.log)):
        folder = copied(before)
        child(work, folder, out, fault=Kill(number, "after"), threads=True)
        completed(child(work, folder, out, threads=True))
        assert tree(folder) == whole, number


def prepared(
    child: Nursery, folder: Path, prepare: Callable[..., object], work: Callable[..., object], *given: Any
) -> tuple[Path, Path, End]:
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


def completed(end: End) -> End:
    assert not end.killed
    assert not end.refusal
    return end


def generation(folder: Path, number: int) -> object:
    return tree(folder / "state" / f"generation-{number:06}")
