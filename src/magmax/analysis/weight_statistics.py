"""One pass over a base and its fine-tuned models that counts and sums all that the studies of weights need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..errors import MagMaxError
from ..merging.execution.pool import WorkerPool
from ..merging.matching import match_to_base, refuse_same_path
from ..merging.pipeline import BlockPipeline, InputBlock, Kernel, Progress
from ..merging.reader import BlockReader
from ..merging.statistics_pass import StatisticsRunner
from ..rules import Address, Prune
from ..rules.statistics import Statistics

WHOLE_MODEL = "whole model"
"""What stands for all layers together in records."""

MIN_SEQUENCE_OVERLAP = 0.6
"""<tau_t, tau_{t+1}> / |tau_t|^2 from which on models count as trained one after another: 1 for orthogonal steps, about
0.8 of the largest fifth of each task vector, 0 for orthogonal task vectors, 0.5 for those that are alike by half."""
WALKS = 100_000

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class TaskVectorStatistics:
    """Counts and sums over the task vectors tau_1..tau_T of one tensor, or of several added up.

    Attributes:
        elements: how many there are.
        shared: those that at least two task vectors change; `conflicts`: those of them changed in both directions.
        agreement_counts: shape (T + 1,): the elements by how many task vectors move them the same way, max(ups, downs).
        largest_sums, average_sums: shape (T + 1,): of the same groups the sums of max_t |tau_t| and of mean_t |tau_t|.
        winner_counts: shape (T,): the elements that MagMax takes from each task, where any task vector is not zero.
        winner_magnitudes: shape (T,): the sums of |tau_t| over these.
        moved_counts: shape (T + 1,): the elements by how many task vectors change them.
        inner_products: shape (T, T): the inner products <tau_t, tau_u>; `base_squared_norm`: that of the base with
        itself.
    """

    elements: int
    shared: int
    conflicts: int
    agreement_counts: Ints
    largest_sums: Floats
    average_sums: Floats
    winner_counts: Ints
    winner_magnitudes: Floats
    moved_counts: Ints
    inner_products: Floats
    base_squared_norm: float

    @classmethod
    def zeros(cls, tasks: int) -> TaskVectorStatistics:
        one, more = np.zeros(tasks), np.zeros(tasks + 1)
        ints = np.zeros(tasks, np.int64), np.zeros(tasks + 1, np.int64)
        counts = np.zeros(tasks + 1, np.int64)
        return cls(0, 0, 0, ints[1], more, more.copy(), ints[0], one, counts, np.zeros((tasks, tasks)), 0.0)

    def __add__(self, other: TaskVectorStatistics) -> TaskVectorStatistics:
        return TaskVectorStatistics(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def coin_flip_conflicts(self) -> float:
        """The share of the shared elements that would be in conflict if every change had a sign drawn at random.

        The mean of 1 - 2^(1 - k) over the elements that k >= 2 task vectors change; NaN if there is none.
        """
        changing = np.arange(2, len(self.moved_counts))
        return float(self.moved_counts[2:] @ (1 - 2.0 ** (1 - changing))) / self.shared if self.shared else math.nan

    @property
    def sequence_steps(self) -> Floats | None:
        """The squared lengths of theta_t - theta_{t-1}, if the models seem to be trained one after another; or None.

        Task t + 1 then goes at least as far along tau_t as task t: <tau_t, tau_{t+1}> is near |tau_t|^2, where it is
        near zero of models that are trained apart.
        """
        squares = np.diagonal(self.inner_products)
        if len(squares) < 2 or not squares.all():
            return None
        along = np.diagonal(self.inner_products, 1) / squares[:-1]
        steps = np.diff(squares, prepend=0.0)
        return steps if along.mean() > MIN_SEQUENCE_OVERLAP and (steps > 0).all() else None

    @property
    def norms(self) -> Floats:
        """||tau_t|| for each task."""
        return np.sqrt(np.diagonal(self.inner_products))

    @property
    def cosines(self) -> Floats:
        """<tau_t, tau_u> / (||tau_t|| ||tau_u||), shape (T, T); NaN where either is zero."""
        norms = self.norms
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip(self.inner_products / np.outer(norms, norms), -1, 1)


@dataclass(frozen=True)
class WeightStatistics:
    """The statistics of a pass over a base and its fine-tuned models, tensor by tensor.

    Attributes:
        task_names: the models' names, in order.
        by_tensor: by the tensor's name, in the base's order.
        left_out: the tensors that were left out, and why.
        sources: the base and the models, as the user named them; empty where nothing can be named.
        input_digests: name -> xxh3-128 of its tensors, of the base and of every model, as a merge's provenance has it.
    """

    task_names: Sequence[str]
    by_tensor: Mapping[str, TaskVectorStatistics]
    left_out: Mapping[str, str]
    input_digests: Mapping[str, str]
    sources: Sequence[str] = ()

    def expected_conflicts(self, top: float | None = None) -> tuple[dict[str, float], str]:
        """By layer, the share of conflicts that chance alone would give, and what chance is.

        Of models trained apart, coin flips on the elements that each layer shares. Of models trained one after another,
        which repeat what came before, a random walk of independent steps as long as theirs: one number for all layers.
        """
        layers = self.by_layer()
        steps = layers[WHOLE_MODEL].sequence_steps
        if steps is None:
            return {name: layer.coin_flip_conflicts for name, layer in layers.items()}, "coin flips"
        share = random_walk_conflicts(steps, top)
        return dict.fromkeys(layers, share), "random steps one after another"

    def by_layer(self) -> dict[str, TaskVectorStatistics]:
        """The tensors of each layer added up, in the order of their names, after WHOLE, which has all of them."""
        layers = {WHOLE_MODEL: TaskVectorStatistics.zeros(len(self.task_names))}
        for key in sorted(self.by_tensor, key=_natural_sort_key):
            for name in (WHOLE_MODEL, layer_name(key)):
                layers[name] = layers[name] + self.by_tensor[key] if name in layers else self.by_tensor[key]
        return layers


def random_walk_conflicts(steps: Floats, top: float | None = None) -> float:
    """The share of conflicts between the partial sums of independent steps of these squared lengths, by simulation.

    Of T equal steps it is 1 - 2 C(2T, T) / 4^T, to about 0.2 %; with `top`, of the largest part of each sum.
    """
    draws = np.random.default_rng(0).standard_normal((len(steps), WALKS)) * np.sqrt(steps)[:, None]
    sums = np.cumsum(draws, axis=0)
    if top is not None:
        sums[np.abs(sums) < np.quantile(np.abs(sums), 1 - top, axis=1, keepdims=True)] = 0
    ups, downs = (sums > 0).sum(axis=0), (sums < 0).sum(axis=0)
    shared = int(np.count_nonzero(ups + downs >= 2))
    return int(np.count_nonzero((ups > 0) & (downs > 0))) / shared if shared else math.nan


def layer_name(key: str) -> str:
    """The layer a tensor belongs to, from its name: up to its first number, else without its last part.

    >>> layer_name("encoder.layer.3.attention.query.weight"), layer_name("embeddings.position.weight")
    ('encoder.layer.3', 'embeddings.position')
    >>> layer_name("scale")
    'scale'
    """
    parts = key.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1] or parts)


def _natural_sort_key(key: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9, whatever the order of the file."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


@dataclass(frozen=True)
class _CountingKernel(Kernel):
    """Counts block by block; sums are joined exactly at the end, so that the order of blocks changes nothing."""

    reader: BlockReader
    excluded: Mapping[str, str]
    prune: Prune | None = None
    prune_statistics: Statistics = None
    block_counts: dict[str, list[TaskVectorStatistics]] = field(default_factory=dict[str, list[TaskVectorStatistics]])

    @property
    def holds_all_inputs(self) -> bool:
        return True

    @property
    def model_indices(self) -> range:
        return range(1, len(self.reader.inputs))

    def __call__(self, block: InputBlock) -> list[NDArray[Any] | None]:
        if block.key in self.excluded:
            block.read(0)
            for task in self.model_indices:
                block.read_for_digest(task)
            return []
        base = self.reader.read_numbers(block, 0)
        vectors = [self.reader.task_vector(block, task, base) for task in self.model_indices]
        if self.prune:
            at = Address(block.key, block.start)
            vectors = [self.prune.apply(v, t, at, self.prune_statistics) for t, v in enumerate(vectors, start=1)]
        self.block_counts.setdefault(block.key, []).append(block_statistics(vectors, base))
        return []


def block_statistics(vectors: Sequence[NDArray[Any]], base: NDArray[Any]) -> TaskVectorStatistics:
    """The counts of one block of task vectors."""
    tasks, size = len(vectors), len(base)
    ups = np.zeros(size, np.int16)
    downs = np.zeros(size, np.int16)
    winner = np.zeros(size, np.int64)
    best = np.abs(vectors[0])
    total = np.zeros(size)
    for task, vector in enumerate(vectors):
        magnitude = np.abs(vector)
        ups += vector > 0
        downs += vector < 0
        total += magnitude
        wins = magnitude >= best
        np.copyto(winner, task, where=wins)
        np.copyto(best, magnitude, where=wins)
    agreeing = np.maximum(ups, downs).astype(np.int64)
    some = agreeing > 0
    wide = np.stack(vectors).astype(np.float64, copy=False)
    start = base.astype(np.float64, copy=False)
    return TaskVectorStatistics(
        elements=size,
        shared=int(np.count_nonzero(ups + downs >= 2)),
        conflicts=int(np.count_nonzero((ups > 0) & (downs > 0))),
        agreement_counts=np.bincount(agreeing, minlength=tasks + 1),
        largest_sums=_sum_by_group(agreeing, best, tasks + 1),
        average_sums=_sum_by_group(agreeing, total / tasks, tasks + 1),
        winner_counts=np.bincount(winner[some], minlength=tasks),
        winner_magnitudes=_sum_by_group(winner[some], best[some], tasks),
        moved_counts=np.bincount(ups + downs, minlength=tasks + 1),
        inner_products=wide @ wide.T,
        base_squared_norm=float(start @ start),
    )


def _sum_by_group(groups: Ints, values: NDArray[Any], count: int) -> Floats:
    """The sum of the values in each group."""
    return np.bincount(groups, weights=values, minlength=count).astype(np.float64)


def collect_weight_statistics(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    task_names: Sequence[str],
    top: float | None = None,
    threads: int = 0,
    progress: Progress = lambda _: None,
) -> WeightStatistics:
    """Count over all tensors that the base and every model have, in constant memory; the others are left out.

    Args:
        task_names: of the models.
        top: count only this fraction of each task vector, its entries of largest magnitude over the whole model, as if
            the others were zero.

    Raises:
        MagMaxError: no model, a file named twice, nothing in common, NaN or infinity, a fraction that is none.
    """
    if not models:
        raise MagMaxError("a study needs at least one fine-tuned model beside the base")
    refuse_same_path([base, *models])
    match = match_to_base(base, models, "base")
    base, inputs, apart = match.base, [match.base, *match.models], dict(match.unmerged)
    elements = {key: spec.numel for key, spec in base.specs.items() if key not in apart}
    if not any(elements.values()):
        raise MagMaxError(f"{base.label}: has no floating tensor that all models have; is it their base?")
    kernel = _CountingKernel(BlockReader(inputs), apart)
    if top is not None:
        prune = Prune(density=top)
        runner = StatisticsRunner(kernel.reader, elements, WorkerPool(threads), progress)
        kernel = replace(kernel, prune=prune, prune_statistics=runner.collect(prune.statistics(runner.scope)))
    collector = BlockPipeline(inputs, [], kernel, WorkerPool(threads)).run(progress)
    tensors = {key: _add_exactly(kernel.block_counts[key]) for key in base.specs if key in kernel.block_counts}
    digests = dict(zip(["base", *task_names], collector.digests(inputs), strict=True))
    return WeightStatistics(list(task_names), tensors, apart, digests, [each.label for each in inputs])


def _add_exactly(parts: Sequence[TaskVectorStatistics]) -> TaskVectorStatistics:
    """All parts added up; floating sums exactly, then rounded once."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name in vars(parts[0]):
        values: list[Any] = [getattr(part, name) for part in parts]
        whole = isinstance(values[0], int) or (isinstance(values[0], np.ndarray) and values[0].dtype.kind == "i")
        if whole:
            joined[name] = sum(values[1:], values[0])
        elif isinstance(values[0], float):
            joined[name] = math.fsum(values)
        else:
            stacked = np.stack(values)
            sums = [math.fsum(column) for column in stacked.reshape(len(values), -1).T]
            joined[name] = np.array(sums).reshape(stacked.shape[1:])
    return TaskVectorStatistics(**joined)
