"""The running merge equals the batch merge, whatever the rule, the type and the interruptions between tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.models import load_tensors, same_bytes, save_tensors, small_model

import magmax
from magmax import MagMaxError, Running, open_checkpoint
from magmax.rules import KthMagnitude, RandomMix, as_rule

RULES = [as_rule(n) for n in ("magmax", "average", "task_arithmetic")] + [RandomMix(seed=3), KthMagnitude(k=2)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_absorbing_one_by_one_equals_merging_at_once(rule, dtype, tmp_path):
    base, *tasks = [save_tensors(small_model(n, dtype), tmp_path / f"{n}.safetensors") for n in range(5)]
    for task in tasks:
        Running(tmp_path / "state", rule, base).absorb(task)
    ours = Running(tmp_path / "state").result(0.7, tmp_path / "ours.safetensors")
    theirs = magmax.merge(rule, base, tasks, 0.7, tmp_path / "theirs.safetensors")
    assert same_bytes(load_tensors(ours), load_tensors(theirs))


def test_tasks_of_several_types_are_absorbed_exactly(tmp_path):
    types = [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]
    tasks = [small_model(n, t) for n, t in enumerate(types, start=1)]
    running = Running(tmp_path / "state", "magmax", small_model(0))
    for task in tasks:
        running.absorb(task)
    assert same_bytes(running.result(), magmax.merge("magmax", small_model(0), tasks))


def test_the_state_of_magmax_is_one_model_in_the_checkpoints_own_type(files, tmp_path):
    base, tasks = files
    running = Running(tmp_path / "state", "magmax", base)
    for task in tasks:
        running.absorb(task)
    (held,) = [open_checkpoint(p) for p in (tmp_path / "state").glob("generation-*")]
    floating = {key: spec for key, spec in open_checkpoint(base).specs.items() if spec.is_mergeable}
    assert held.specs == floating


def test_modules_can_be_absorbed_in_a_training_loop(tmp_path):
    base, tasks = torch.nn.Linear(3, 2), [torch.nn.Linear(3, 2) for _ in range(3)]
    running = Running(tmp_path / "state", "magmax", base)
    for task in tasks:
        running.absorb(task)
    expected = magmax.merge("magmax", base, tasks)
    assert same_bytes(running.result().state_dict(), expected.state_dict())
    assert [t.name for t in running.tasks] == ["task 1", "task 2", "task 3"]


def test_the_map_of_winners_says_which_task_supplies_each_element(tmp_path):
    base, *tasks = [small_model(n) for n in range(4)]
    running = Running(tmp_path / "state", "magmax", base, winners=True)
    for task in tasks:
        running.absorb(task)
    folder = next((tmp_path / "state").glob("generation-*"))
    mapped = load_tensors(folder / "model.safetensors")["magmax.winner/embed.weight"].numpy()
    sizes = np.stack([abs((t["embed.weight"] - base["embed.weight"]).numpy()) for t in tasks])
    latest_largest = len(tasks) - np.argmax(sizes[::-1], axis=0)
    assert (mapped == latest_largest).all()
    shares = running.status().shares
    assert sum(shares) == pytest.approx(1)


def test_a_labelled_version_is_kept_and_restored(files, tmp_path):
    base, tasks = files
    running = Running(tmp_path / "state", "magmax", base)
    for task in tasks[:2]:
        running.absorb(task)
    running.label("two")
    for task in tasks[2:]:
        running.absorb(task)
    assert [g.number for g in running.status().versions] == [2, 4]
    running.restore("two")
    assert [t.name for t in Running(tmp_path / "state").tasks] == ["task1", "task2"]
    running.absorb(tasks[3])
    ours = running.result(out=tmp_path / "ours.safetensors")
    theirs = magmax.merge("magmax", base, [*tasks[:2], tasks[3]], out=tmp_path / "theirs.safetensors")
    assert same_bytes(load_tensors(ours), load_tensors(theirs))


def test_restore_keeps_the_version_that_it_leaves(files, tmp_path):
    """Through further absorptions, under a label of its own; a version that has one keeps that."""
    base, tasks = files
    running = Running(tmp_path / "state", "magmax", base)
    running.absorb(tasks[0], label="one")
    running.absorb(tasks[1], label="left-3")
    running.absorb(tasks[2])
    three = running.result(out=tmp_path / "three.safetensors").read_bytes()
    left = running.restore("one")
    assert left is not None
    assert (left.number, left.label) == (3, "left-3-2")
    running.absorb(tasks[3])
    assert running.restore("left-3-2").label == "left-4"
    assert [task.name for task in Running(tmp_path / "state").tasks] == ["task1", "task2", "task3"]
    assert running.result(out=tmp_path / "again.safetensors").read_bytes() == three
    assert running.restore(3) is None
    assert running.restore(1).label == "left-3-2"
    assert [version.label for version in running.status().versions] == ["one", "left-3", "left-3-2", "left-4"]


def test_what_others_put_into_a_running_merge_stays(files, tmp_path):
    """Beside its versions, and in one that the next absorption would delete, which then is refused."""
    base, tasks = files
    running = Running(tmp_path / "state", "magmax", base)
    running.absorb(tasks[0])
    (tmp_path / "state" / "generation-notes").mkdir()
    (tmp_path / "state" / "generation-000001" / "notes.txt").write_text("mine")
    with pytest.raises(MagMaxError, match=r"generation-000001: holds files that magmax did not write \(notes\.txt\)"):
        running.absorb(tasks[1])
    assert [task.name for task in running.tasks] == ["task1"]
    (tmp_path / "state" / "generation-000001" / "notes.txt").rename(tmp_path / "state" / "notes.txt")
    running.absorb(tasks[1])
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        *("generation-000002", "generation-notes", "notes.txt", "state.json"),
    }


def test_an_absorbed_task_is_refused_and_nothing_changes(files, tmp_path):
    base, tasks = files
    running = Running(tmp_path / "state", "magmax", base)
    running.absorb(tasks[0])
    before = (tmp_path / "state" / "state.json").read_bytes()
    twin = save_tensors(load_tensors(tasks[0]), tmp_path / "twin.safetensors")
    with pytest.raises(MagMaxError, match=r"twin\.safetensors: was absorbed already, as 'task1'"):
        running.absorb(twin)
    assert (tmp_path / "state" / "state.json").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["generation-000001", "state.json"]


def test_the_result_of_too_few_tasks_is_an_error(files, tmp_path):
    base, tasks = files
    running = Running(tmp_path / "state", KthMagnitude(k=2), base)
    with pytest.raises(MagMaxError, match="at least one model"):
        running.result(out=tmp_path / "out.safetensors")
    running.absorb(tasks[0])
    with pytest.raises(MagMaxError, match="k = 2 needs at least 2 models; 1 given"):
        running.result(out=tmp_path / "out.safetensors")


def test_winners_of_a_mean_cannot_be_mapped(files, tmp_path):
    with pytest.raises(MagMaxError, match="average"):
        Running(tmp_path / "state", "average", files[0], winners=True)


def test_labels_must_be_new_and_not_look_like_numbers(files, tmp_path):
    base, tasks = files
    running = Running(tmp_path / "state", "magmax", base)
    running.absorb(tasks[0], label="one")
    for label, words in [("one", "labelled 'one' already"), ("7", "needs a letter")]:
        with pytest.raises(MagMaxError, match=words):
            running.label(label)
    with pytest.raises(MagMaxError, match=r"no version 'two'; it has 1 \(one\)"):
        running.restore("two")


def test_a_base_other_than_the_one_it_was_begun_with_is_refused_in_memory_too(tmp_path):
    base, task = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    Running(tmp_path / "state", "magmax", base).absorb(task)
    for other, words in [
        ({"w": torch.full((2,), 100.0)}, "not the one it was begun with"),
        ({"v": base["w"]}, "other tensors"),
    ]:
        with pytest.raises(MagMaxError, match=words):
            Running(tmp_path / "state", base=other).result()


def test_two_tasks_of_one_name_keep_their_own_shares(tmp_path):
    running = Running(tmp_path / "state", "magmax", {"w": torch.zeros(4)}, winners=True)
    running.absorb({"w": torch.tensor([3.0, 3, 3, 1])}, "same")
    running.absorb({"w": torch.tensor([1.0, 1, 1, 3])}, "same")
    assert running.status().shares == [0.75, 0.25]
