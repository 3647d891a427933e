"""A killed fit or training ends in the bytes of one that was not; what goes wrong leaves the last good state."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.continual import toys  # noqa: E402

from magmax.checkpoints.journal import lock_folder  # noqa: E402
from magmax.continual.data.datasets import LabelledExamples  # noqa: E402
from magmax.continual.data.scenarios import Task  # noqa: E402
from magmax.continual.experiment import Experiment  # noqa: E402
from magmax.continual.training.fit import FitSettings, fit  # noqa: E402
from magmax.continual.training.losses import Classifier, TaskLoss  # noqa: E402
from magmax.continual.training.sequence import TrainingMethod, fine_tune  # noqa: E402
from magmax.continual.training.snapshot import FitSnapshot  # noqa: E402
from magmax.continual.training.trainer import MERGED_FILE, ContinualTraining  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate({**toys.RECIPE, **changes}).check()


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a training leaves, but for the seconds it took."""
    kept = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("costs.json", ".lock")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_fit_stopped_after_any_step_goes_on_after_its_last_snapshot(tmp_path: Path, stop: int, dropout: bool) -> None:
    data, settings = toys.blobs().train, FitSettings(steps=9, batch=7, learning_rate=0.02, dropout=dropout)

    def run(path: Path, stop: int = 99) -> tuple[list[float], torch.Tensor, list[int]]:
        encoder = toys.encoder()
        loss = TaskLoss(Classifier(encoder, toys.head(encoder, toys.blobs())), range(toys.CLASSES))
        steps: list[int] = []

        def tell(done: int, total: int, note: str = "") -> None:
            steps.append(done)
            if done == stop + 1:
                raise KeyboardInterrupt

        losses = fit(encoder.model, data, loss, settings, 0, progress=tell, snapshot=FitSnapshot(path, 2, "this test"))
        return losses, torch.nn.utils.parameters_to_vector(encoder.model.parameters()), steps

    losses, weights, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop)
    again = run(tmp_path / "killed")
    assert again[2][0] == stop // 2 * 2
    assert losses == again[0]
    assert torch.equal(weights, again[1])


def test_a_snapshot_of_something_else_is_not_used(tmp_path: Path) -> None:
    encoder = toys.encoder()
    optimizer = torch.optim.AdamW(encoder.model.parameters())
    FitSnapshot(tmp_path / "s", 1, "one thing").save(encoder.model, optimizer, [0.5])
    assert FitSnapshot(tmp_path / "s", 1, "another").restore(encoder.model, optimizer) == []
    assert FitSnapshot(tmp_path / "s", 1, "one thing").restore(encoder.model, optimizer) == [0.5]
    (tmp_path / "s").write_bytes(b"rubbish")
    assert FitSnapshot(tmp_path / "s", 1, "one thing").restore(encoder.model, optimizer) == []


def test_a_training_killed_by_sigkill_ends_in_the_same_bytes(tmp_path: Path) -> None:
    changes = {"fit": {"steps": 150, "batch": 8, "learning_rate": 0.02}, "save_every": 1}
    recipe = toys.write_recipe(tmp_path / "toy.yaml", **changes)
    ContinualTraining(experiment(**changes), tmp_path / "whole").run()
    command = [sys.executable, "-m", "magmax.cli", "train", str(recipe), "--out", str(tmp_path / "killed")]
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--threads", "1"], env=there, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "step_2.safetensors").exists():
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "theta_2.safetensors").exists()
    assert (tmp_path / "killed" / "theta_1.safetensors").exists()
    ContinualTraining(experiment(**changes), tmp_path / "killed").run()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("place", ["absorb", "result", "row"])
def test_a_training_stopped_between_tasks_ends_in_the_same_bytes(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from magmax.continual.context import ExperimentContext
    from magmax.merging.running.running_merge import Running

    ContinualTraining(experiment(), tmp_path / "whole").run()
    owner: Any = ExperimentContext if place == "row" else Running
    real, calls = getattr(owner, place), 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stopping)
        with pytest.raises(KeyboardInterrupt):
            ContinualTraining(experiment(), tmp_path / "killed").run()
    ContinualTraining(experiment(), tmp_path / "killed").run()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    metrics = ContinualTraining(experiment(), tmp_path / "a").run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("theta_*")}
    assert ContinualTraining(experiment(), tmp_path / "a").run() == metrics
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("theta_*")} == before


def test_another_recipe_is_an_error_that_names_the_change_and_restart_begins_again(tmp_path: Path) -> None:
    ContinualTraining(experiment(), tmp_path / "a").run()
    other = experiment(fit={**toys.RECIPE["fit"], "steps": 3})
    before = outcome(tmp_path / "a")
    with pytest.raises(
        MagMaxError, match=r"another recipe: fit.steps was 12 and is 3; name another --out, or .*--rest"
    ):
        ContinualTraining(other, tmp_path / "a").run()
    assert outcome(tmp_path / "a") == before
    ContinualTraining(other, tmp_path / "a", restart=True).run()
    ContinualTraining(other, tmp_path / "fresh").run()
    assert outcome(tmp_path / "a") == outcome(tmp_path / "fresh")


def test_restart_deletes_nothing_that_no_training_made(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"soup": ["salt"]}')
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MagMaxError, match="nothing is deleted"):
        ContinualTraining(experiment(), tmp_path, restart=True).run()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_other_data_under_the_same_recipe_never_mix_with_the_old_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from magmax.continual import context

    ContinualTraining(experiment(), tmp_path / "a").run()
    others = toys.blobs(noise=0.3)
    monkeypatch.setattr(toys, "blobs", lambda: others)
    monkeypatch.setattr(context, "_cache", {})
    ContinualTraining(experiment(), tmp_path / "a").run()
    ContinualTraining(experiment(), tmp_path / "fresh").run()
    assert outcome(tmp_path / "a") == outcome(tmp_path / "fresh")


def test_restart_deletes_what_a_training_wrote_and_nothing_that_is_called_alike(tmp_path: Path) -> None:
    ContinualTraining(experiment(), tmp_path).run()
    whole = outcome(tmp_path)
    mine = ["theta_mine.txt", "merge-notes.txt", "merged_by_hand.safetensors", "penalty_box", "step_1.txt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    ContinualTraining(experiment(), tmp_path, restart=True).run()
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert {name: outcome(tmp_path)[name] for name in whole} == whole
    (tmp_path / "merge" / "generation-000003" / "notes.txt").write_text("mine")
    with pytest.raises(MagMaxError, match=r"did not write \(generation-000003/notes\.txt\)"):
        ContinualTraining(experiment(), tmp_path, restart=True).run()
    assert {name: outcome(tmp_path)[name] for name in whole} == whole


def test_of_two_trainings_in_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(MagMaxError, match="another magmax is writing this output"):
        ContinualTraining(experiment(), tmp_path).run()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(MagMaxError, match="is not empty, and no training's folder"):
        ContinualTraining(experiment(), tmp_path, restart=True).run()
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_merge_of_a_training_is_the_merge_of_its_checkpoints(tmp_path: Path) -> None:
    import magmax

    ContinualTraining(experiment(), tmp_path / "a").run()
    theta = [tmp_path / "a" / f"theta_{t}.safetensors" for t in range(4)]
    magmax.merge("magmax", theta[0], theta[1:], out=tmp_path / "batch.safetensors")
    ours, theirs = (safetensors_of(path) for path in (tmp_path / "a" / MERGED_FILE, tmp_path / "batch.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def safetensors_of(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_loss_that_is_not_finite_says_where_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    dataset, encoder = toys.blobs(per_class=6), toys.encoder()
    head, settings = toys.head(encoder, dataset), FitSettings(steps=6, batch=4, learning_rate=0.02)
    tasks = [Task("Task 1", (0, 1)), Task("Task 2", (2, 3))]
    items = [np.full_like(item, np.nan) if c == 3 else item for item, c in zip(*both(dataset.train), strict=True)]
    bad = LabelledExamples(items, dataset.train.labels)
    with pytest.raises(MagMaxError, match=r"step \d of 6: the loss is nan .*lower learning_rate \(0.02\)"):
        fine_tune(encoder, head, bad, tasks, TrainingMethod(settings, save_every=1), tmp_path, seed=0)
    good = (tmp_path / "theta_1.safetensors").read_bytes()
    assert not (tmp_path / "theta_2.safetensors").exists()
    if (tmp_path / "step_2.safetensors").exists():
        assert all(bool(tensor.isfinite().all()) for tensor in safetensors_of(tmp_path / "step_2.safetensors").values())
    again = toys.encoder()
    fine_tune(again, head, dataset.train, tasks, TrainingMethod(settings), tmp_path, seed=0)
    assert (tmp_path / "theta_1.safetensors").read_bytes() == good


def both(data: LabelledExamples) -> tuple[Any, Any]:
    return data.items, data.labels


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ContinualTraining(experiment(), tmp_path / "whole").run()
    real = os.fsync

    def full(number: int) -> None:
        if "theta_2" in str(Path(f"/proc/self/fd/{number}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MagMaxError, match=r"theta_2.safetensors: cannot be written: No space left on device"):
            ContinualTraining(experiment(), tmp_path / "full").run()
    assert not [path for path in (tmp_path / "full").iterdir() if "magmax" in path.name]
    ContinualTraining(experiment(), tmp_path / "full").run()
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


def test_all_that_is_wrong_with_the_tasks_is_said_at_once(tmp_path: Path) -> None:
    encoder = toys.encoder()
    head = toys.head(encoder, toys.blobs())
    data = LabelledExamples([np.zeros(6, np.float32)] * 4, np.array([0, 1, 1, 9]))
    tasks = [Task("Task 1", (0, 2)), Task("Task 2", (3, 4)), Task("Task 3", (1, 8))]
    with pytest.raises(MagMaxError) as caught:
        fine_tune(encoder, head, data, tasks, TrainingMethod(FitSettings(steps=1)), tmp_path, seed=0)
    told = str(caught.value)
    assert "labels [9] are out of range; the head has the classes 0 to 5" in told
    assert "Task 1: no training example is of the classes [2]" in told
    assert "Task 2: has no training example of its classes [3, 4]" in told
    assert "Task 3: the classes [8] are out of range" in told
    assert list(tmp_path.iterdir()) == []


def test_metrics_hold_a_row_for_every_task_of_model_and_merge(tmp_path: Path) -> None:
    ContinualTraining(experiment(), tmp_path / "a").run()
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert {what: sorted(rows) for what, rows in metrics.items()} == {
        "model": ["1", "2", "3"],
        "merged": ["1", "2", "3"],
    }
