"""Fine-tuning on task after task, keeping the weights after each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import MagMaxError, list_problems
from ..data.datasets import LabelledExamples
from ..data.scenarios import Task
from ..experiment import Parallel
from ..models.text_encoder import Encoder
from ..progress import BarFactory, no_bars
from .fit import FitSettings, fit
from .losses import Classifier, ForgettingPenalty, TaskLoss
from .parallel import check_team
from .snapshot import FitSnapshot
from .weight_files import MADE_FROM, load_weights, read_metadata, save_weights, write_bytes, write_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

TaskCallback = Callable[[int, Path], None]
"""Called after each task with its number and theta_t's file, whether it was trained now or kept from an earlier run."""


@dataclass(frozen=True)
class TrainingMethod:
    """Options of learning a sequence of tasks.

    Attributes:
        settings: of every task.
        start: task t starts at theta_{t-1} ("previous": sequential fine-tuning) or at theta_0 ("base": independent).
        penalty: makes the term that is added to the loss; for each sequence a new one.
        replay: training examples of each class kept from every task and mixed into later ones, whose heads are then
            those of all classes seen. This breaks the exemplar-free rule that every other protocol here keeps.
        balanced: replayed examples are repeated until a class has as many as the mean class of the new task, which
            would otherwise crowd them out.
        save_every: steps between two snapshots of a task's training; 0 for none.
        parallel: how several processes share the model.
    """

    settings: FitSettings
    start: Literal["previous", "base"] = "previous"
    penalty: Callable[[], ForgettingPenalty] | None = None
    replay: int = 0
    balanced: bool = True
    save_every: int = 0
    parallel: Parallel = "ddp"


def fine_tune(
    encoder: Encoder,
    head: Tensor,
    data: LabelledExamples,
    tasks: Sequence[Task],
    protocol: TrainingMethod,
    folder: Path,
    *,
    seed: int,
    new_bar: BarFactory = no_bars,
    done: TaskCallback | None = None,
    team: Accelerator | None = None,
) -> list[Path]:
    """Fine-tunes on each task in turn, under the head's rows of that task alone; returns theta_0 .. theta_T.

    Each theta_t is a safetensors file in the folder. A file says what it was made from: weights, head, examples,
    tasks, settings, penalty and seed. Where all are the same it is used again: a killed run goes on after its last
    finished task, and after the last snapshot within a task; a changed one starts afresh. The encoder is left with
    some task's weights. What each task took is in `costs.json`.

    Raises MagMaxError for a task that has no examples, a class that has none, and labels that the head has no row for.
    """
    check(data, tasks, len(head))
    check_team(team, protocol.parallel)
    first = team is None or team.is_main_process
    penalty = protocol.penalty() if protocol.penalty else None
    recipe = _training_inputs(encoder, head, protocol, penalty, seed)
    paths = [folder / f"theta_{t}.safetensors" for t in range(len(tasks) + 1)]
    if first and read_metadata(paths[0]) != made_from_metadata(recipe):
        save_weights(encoder.model, paths[0], made_from_metadata(recipe))
    _synchronize(team)
    learner, remembered = Classifier(encoder, head), 0
    for t, task in enumerate(tasks, start=1):
        own, part = _training_examples(data, tasks, t, protocol, seed)
        recipe[f"task {t}"] = [list(own.classes), _digest(part.labels, *map(np.asarray, part.items))]
        metadata = made_from_metadata(recipe)
        tell = new_bar(f"Fine-tuning on {task.name.lower()} of {len(tasks)}")
        if read_metadata(paths[t]) == metadata:
            tell(protocol.settings.steps, protocol.settings.steps, "kept from an earlier run")
            remembered = _restore_penalty(penalty, folder, t)
        else:
            load_weights(encoder.model, paths[t - 1] if protocol.start == "previous" else paths[0])
            if penalty and remembered < t - 1:
                lost = _penalty_file(folder, t - 1)
                raise MagMaxError(f"{lost}: is missing, and task {t} needs it; delete its folder to begin again")
            if penalty:
                penalty.before_task(learner, sorted({c for earlier in tasks[: t - 1] for c in earlier.classes}))
            targets = replace(part, labels=own.targets(part.labels))
            snapshot = FitSnapshot(folder / f"step_{t}.safetensors", protocol.save_every, metadata[MADE_FROM])
            loss = TaskLoss(learner, own.classes, penalty)
            more = {"progress": tell, "snapshot": snapshot, "team": team, "vary": getattr(encoder, "vary", None)}
            losses = fit(encoder.model, targets, loss, protocol.settings, [seed, t], parallel=protocol.parallel, **more)
            if penalty:
                penalty.after_task(learner, targets, own.classes)
                remembered = t
            if first:
                if penalty:
                    write_tensors(penalty.state, _penalty_file(folder, t), metadata)
                save_weights(encoder.model, paths[t], metadata)
                _write_costs(folder, t, {"seconds": round(snapshot.spent(), 3), "loss": float(np.mean(losses[-10:]))})
                snapshot.remove()
                _penalty_file(folder, t - 1).unlink(missing_ok=True)
            _synchronize(team)
        if done:
            done(t, paths[t])
    return paths


def check(data: LabelledExamples, tasks: Sequence[Task], classes: int) -> None:
    """Raises MagMaxError, with all problems at once, where the tasks cannot be learned from these data."""
    problems = [] if tasks else ["there is no task"]
    strange = sorted({int(label) for label in data.labels if not 0 <= label < classes})
    if strange:
        problems.append(f"labels {strange[:8]} are out of range; the head has the classes 0 to {classes - 1}")
    for task in tasks:
        if beyond := [c for c in task.classes if not 0 <= c < classes]:
            problems.append(f"{task.name}: the classes {beyond} are out of range; the head has 0 to {classes - 1}")
        rows = task.rows(data.labels, data.domains)
        missing = sorted(set(task.classes) - set(data.labels[rows].tolist()))
        if len(rows) == 0:
            problems.append(f"{task.name}: has no training example of its classes {list(task.classes)}")
        elif missing and task.domain is None:
            problems.append(f"{task.name}: no training example is of the classes {missing}; leave them out of it")
    if problems:
        raise list_problems("these tasks cannot be learned", problems)


def training_costs(folder: Path) -> dict[str, dict[str, float]]:
    """Return what each task's training took (seconds, last loss), by its number."""
    try:
        return json.loads((folder / "costs.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}


def made_from_metadata(recipe: Mapping[str, object]) -> dict[str, str]:
    """The metadata that says what a file was made from: a digest."""
    return {MADE_FROM: hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()}


def _training_examples(
    data: LabelledExamples, tasks: Sequence[Task], t: int, protocol: TrainingMethod, seed: int
) -> tuple[Task, LabelledExamples]:
    """The classes and examples that task t (from 1) is trained on: its own and, with replay, some of earlier ones."""
    task = tasks[t - 1]
    rows = task.rows(data.labels, data.domains)
    if not protocol.replay or t == 1:
        return task, data.pick(rows)
    row_groups, as_many = [rows], round(len(rows) / len(task.classes))
    for number, earlier in enumerate(tasks[: t - 1], start=1):
        before = earlier.rows(data.labels, data.domains)
        order = np.random.default_rng([seed, number]).permutation(before)
        for c in sorted(set(data.labels[order].tolist())):
            chosen = order[data.labels[order] == c][: protocol.replay]
            row_groups.append(np.resize(chosen, max(as_many, len(chosen))) if protocol.balanced else chosen)
    classes = tuple(dict.fromkeys(c for each in tasks[:t] for c in each.classes))
    return replace(task, classes=classes, domain=None), data.pick(np.concatenate(row_groups))


def _training_inputs(
    encoder: Encoder, head: Tensor, protocol: TrainingMethod, penalty: ForgettingPenalty | None, seed: int
) -> dict[str, object]:
    """Everything but the tasks that decides the weights; a digest where it is long."""
    weights = encoder.model.state_dict()
    chosen = {k: v for k, v in vars(penalty).items() if k != "state" and not k.startswith("_")} if penalty else {}
    return {
        "settings": asdict(protocol.settings),
        "varied": getattr(encoder, "variation", ""),
        "trained": [key for key, weight in encoder.model.named_parameters() if weight.requires_grad],
        "base": _digest(*(weights[key].detach().cpu().float().numpy() for key in sorted(weights))),
        "head": _digest(head.detach().cpu().numpy()),
        "start": protocol.start,
        "penalty": [type(penalty).__name__, chosen],
        "replay": [protocol.replay, "balanced"] if protocol.replay and protocol.balanced else protocol.replay,
        "seed": seed,
    }


def _digest(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _penalty_file(folder: Path, t: int) -> Path:
    """Return where what the penalty remembers after task t is kept until task t + 1 is done."""
    return folder / f"penalty_{t}.safetensors"


def _restore_penalty(penalty: ForgettingPenalty | None, folder: Path, t: int) -> int:
    """Put what the penalty remembered after task t back into it; t, or 0 where there is no such file."""
    if penalty is None or not _penalty_file(folder, t).exists():
        return 0
    try:
        penalty.state = load_file(_penalty_file(folder, t))
    except (OSError, SafetensorError) as error:
        raise MagMaxError(
            f"{_penalty_file(folder, t)}: cannot be read: {error}; delete its folder to begin again"
        ) from error
    return t


def _write_costs(folder: Path, t: int, costs: Mapping[str, float]) -> None:
    content = {**training_costs(folder), str(t): dict(costs)}
    write_bytes(json.dumps(content, indent=2).encode() + b"\n", folder / "costs.json")


def _synchronize(team: Accelerator | None) -> None:
    if team:
        team.wait_for_everyone()
