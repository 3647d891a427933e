"""A short training loop that goes on where it was killed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import MagMaxError
from ..data.datasets import LabelledExamples
from ..experiment import Parallel
from ..models.text_encoder import training_mode
from ..progress import ProgressCallback, no_progress
from .parallel import distribute, gather
from .snapshot import FitSnapshot

if TYPE_CHECKING:
    from accelerate import Accelerator


class LossFunction(Protocol):
    """A loss: a scalar for a batch of n items and their n labels.

    One that computes with the model's weights themselves, as a penalty of their size does, and is to run with
    `parallel="fsdp"`, says so by an attribute `reads_weights = True`.
    """

    def __call__(self, items: Sequence[Any], labels: Tensor) -> Tensor: ...


Augment = Callable[[Sequence[Any], np.random.Generator], Sequence[Any]]
"""What training sees of a batch's items, this time (random crops of pictures); evaluation sees them as they are."""


@dataclass(frozen=True)
class FitSettings:
    """AdamW, a linear warm-up, then a cosine to zero; gradients clipped by norm.

    `warmup` below 1 is a fraction of the steps, from 1 on a number of steps (MagMax's scripts: 500, also where a task
    has fewer). `dropout` puts the model into training mode, whose chance is then drawn from the seed and the step.
    """

    steps: int
    batch: int = 32
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0
    dropout: bool = False

    def factor(self, step: int) -> float:
        """The share of learning_rate used at this step (from 0)."""
        warm = round(self.warmup * self.steps if self.warmup < 1 else self.warmup)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def fit(
    model: nn.Module,
    data: LabelledExamples,
    loss: LossFunction,
    settings: FitSettings,
    seed: int | Sequence[int],
    *,
    progress: ProgressCallback = no_progress,
    snapshot: FitSnapshot | None = None,
    team: Accelerator | None = None,
    parallel: Parallel = "ddp",
    vary: Augment | None = None,
) -> list[float]:
    """Fine-tunes the model's trainable weights in place; returns each step's loss.

    The order of the items, drawn from the seed, is all there is of chance (with `dropout`, its masks are drawn from
    the seed too, and so is what `vary` makes of a batch): the same seed gives the same weights on the same machine.
    With a snapshot, a killed fit goes on after the last saved step and ends in the same bytes. With a team (an
    `accelerate.Accelerator` of several processes) every process works on its share of each batch; the sum is the
    whole batch, the loss its mean. With `parallel="fsdp"` each has only a part of the weights, gradients and moments
    while the fit lasts (see `magmax.continual.training.parallel`); the model is whole again when it ends.

    Raises MagMaxError where there are no items or not one label for each, at a loss or gradient that is not
    finite (the snapshot is then as it last was), and for processes or weights that `parallel` does not suit.
    """
    if len(data) == 0 or len(data) != len(data.labels):
        counts = f"{len(data)} items and {len(data.labels)} labels"
        raise MagMaxError(f"fit needs at least one item, and one label for each; it was given {counts}")
    if not any(p.requires_grad for p in model.parameters()):
        raise MagMaxError(f"this {type(model).__name__} has no weights to train: every requires_grad is off")
    rank, world = (team.process_index, team.num_processes) if team else (0, 1)
    reads = getattr(loss, "reads_weights", False)
    with distribute(_LossModule(model, loss), team, parallel, reads) as step_of, training_mode(model, settings.dropout):
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        losses = snapshot.restore(model, optimizer) if snapshot else []
        progress(len(losses), settings.steps)
        for step, rows in enumerate(
            batches([np.size(item) for item in data.items], settings.batch, settings.steps, seed)
        ):
            if step < len(losses):
                continue
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * settings.factor(step)
            own_rows, weight = share_of(rows, rank, world)
            labels = torch.from_numpy(data.labels[own_rows]).to(weights[0].device)
            items: Sequence[Any] = [data.items[i] for i in own_rows]
            if vary:
                items = vary(items, np.random.default_rng([*_seed_list(seed), step, rank]))
            with _seeded_generators(settings.dropout, seed, step, rank):
                value = step_of(items, labels) * weight
            optimizer.zero_grad()
            value.backward()
            norm = gather(nn.utils.clip_grad_norm_(weights, settings.clip))
            mean: Any = team.reduce(value.detach(), "mean") if team else value.detach()
            losses.append(float(mean))
            if not (math.isfinite(losses[-1]) and torch.isfinite(norm)):
                raise MagMaxError(_non_finite_message(step, losses, settings, norm.item()))
            optimizer.step()
            progress(len(losses), settings.steps, f"loss {np.mean(losses[-10:]):.3f}")
            if snapshot and len(losses) < settings.steps:
                snapshot.save(model, optimizer, losses, write=rank == 0)
    return losses


class _LossModule(nn.Module):
    """The loss as a module around the model, so that a wrapper for several processes sees each forward pass."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, items: Sequence[Any], labels: Tensor) -> Tensor:
        return self.loss(items, labels)


def share_of(rows: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, float]:
    """One process's rows of a batch, and the weight that makes the mean over processes the mean over the batch."""
    own_rows = rows[rank::world]
    if len(own_rows) == 0:  # a batch smaller than the team: work on any row, and count it for nothing
        return rows[:1], 0.0
    return own_rows, len(own_rows) * world / len(rows)


@contextmanager
def _seeded_generators(wanted: bool, seed: int | Sequence[int], step: int, rank: int) -> Iterator[None]:
    """torch's global generators set by seed, step and process, and put back; nothing where no chance is wanted."""
    if not wanted:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(
            int(np.random.SeedSequence([*_seed_list(seed), step, rank]).generate_state(1, np.uint64)[0] >> 1)
        )
        yield


def _seed_list(seed: int | Sequence[int]) -> list[int]:
    return [seed] if isinstance(seed, int) else list(seed)


def _non_finite_message(step: int, losses: Sequence[float], settings: FitSettings, norm: float) -> str:
    before = ", ".join(f"{loss:.4g}" for loss in losses[-4:-1]) or "none"
    return (
        f"step {step + 1} of {settings.steps}: the loss is {losses[-1]} and the gradient's norm {norm} (losses before: "
        f"{before}); lower learning_rate ({settings.learning_rate:g}), or look for NaN in the items of this task"
    )


def batches(
    sizes: Sequence[int], batch: int, steps: int, seed: int | Sequence[int], pool: int = 8
) -> Iterator[np.ndarray]:
    """Yields the positions of each of `steps` batches, epoch after epoch in a new random order.

    Within a pool of 8 batches the items are sorted by size, so that a batch holds items of about one size and
    little of it is padding; the batches of a pool come in random order.
    """
    random = np.random.default_rng(seed)
    done = 0
    while done < steps:
        order = random.permutation(len(sizes))
        for start in range(0, len(order), pool * batch):
            some = order[start : start + pool * batch]
            some = some[np.argsort(np.asarray(sizes)[some], kind="stable")]
            cuts = [some[i : i + batch] for i in range(0, len(some), batch)]
            for i in random.permutation(len(cuts))[: steps - done]:
                done += 1
                yield cuts[i]
