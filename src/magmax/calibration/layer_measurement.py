"""Magnitudes of features measured while the samples go through the model together, layer by layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint
from ..errors import MagMaxError
from .calibration_report import CalibrationReport, LayerReport, clipped
from .foldable_layers import FoldableLayer, FoldablePart, Inputs, LayerStage, ParameterRows, find_foldable_layers
from .forward import Run
from .gram import TaskVectorGram
from .layer_scheduler import LayerCoroutine, LayerScheduler
from .ratios import RatioStatistics, mean_magnitudes
from .rescale import Coefficients, fold_tensor, read_widened

Handle = Callable[[int, FoldableLayer, Inputs], None]
"""What is done at a call: the number of the item under way, the layer, and what it is called with."""


class _PendingCall(NamedTuple):
    """A call that an item waits at: the stage's place in the order of measurement, and each part's input."""

    place: int
    inputs: Sequence[Inputs]


@dataclass
class _PartResult:
    """The result for a part: ratio statistics, coefficient before and after the limits, and the reason."""

    tally: RatioStatistics
    raw: float = 1.0
    xi: float = 1.0
    why: str = ""


@dataclass
class FeatureMeasurement:
    """One calibration of a module that holds the merged weights; see `calibrate_features`.

    All items go through the model at once, each as far as the next layer that is not calibrated; there they wait for
    each other, the layer is measured on all of them and folded, and they go on.
    """

    model: nn.Module
    base: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]
    samples: Sequence[Sequence[Any]]
    run: Run
    gram: TaskVectorGram
    norm: str = "l1"
    ratio: str = "place"
    sensitive: Collection[str] | None = None
    coefficients: Coefficients = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._items = [
            (task, n, item) for task, task_samples in enumerate(self.samples) for n, item in enumerate(task_samples)
        ]
        self._sites, self._left = find_foldable_layers(self.model)
        self._aliases = {id(p): key for key, p in reversed(list(self.model.named_parameters(remove_duplicate=False)))}
        self._outcomes: dict[FoldablePart, _PartResult] = {}
        self._holder: dict[Any, FoldablePart] = {}

    def calibrate(self, sequential: bool) -> None:
        """Measure and fold every layer that the samples reach: one after another, or all of them at the end."""
        calls = self._discover()
        stages = [stage for site in calls for stage in site.stages]
        held = [stage for site, most in calls.items() if most > 1 for stage in site.stages]
        if not sequential:
            self._run_samples(stages, stages)
            return
        for last in [*held, None]:  # a layer called again is known only when all items are through
            upto = len(stages) if last is None else stages.index(last) + 1
            if todo := [stage for stage in stages[:upto] if any(part not in self._outcomes for part in stage.parts)]:
                self._run_samples(todo, [] if last is None else [last])

    def _discover(self) -> dict[FoldableLayer, int]:
        """The layers in the order of their first calls, and how often an item calls each at the most."""
        calls: dict[FoldableLayer, Counter[int]] = {}

        def count(number: int, site: FoldableLayer, inputs: Inputs) -> None:
            calls.setdefault(site, Counter())[number] += 1

        with self._watch_layer(count) as put_through:
            for number, (task, sample, item) in enumerate(self._items):
                try:
                    put_through(number)
                except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
                    message = next(iter(str(error).strip().splitlines()), type(error).__name__)
                    raise MagMaxError(
                        f"{self.names[task]}, sample {sample + 1}: {type(self.model).__name__} cannot be run on this "
                        f"{type(item).__name__}: {message}; give samples of the kind that the model takes"
                    ) from error
        return {site: max(each.values()) for site, each in calls.items()}

    def _run_samples(self, todo: Sequence[LayerStage], held: Sequence[LayerStage]) -> None:
        """Put all items through together; measure these stages, and fold those that are not held until the end."""
        places = {stage: place for place, stage in enumerate(todo)}
        open_stages = set(todo)
        tallies: dict[FoldablePart, RatioStatistics] = {}

        def handle(number: int, site: FoldableLayer, inputs: Inputs) -> None:
            for stage in site.stages:
                if stage in open_stages:
                    turns.wait(_PendingCall(places[stage], stage.inputs(inputs)))

        def decide(waiting: list[LayerCoroutine]) -> Sequence[LayerCoroutine]:
            calls: dict[LayerCoroutine, _PendingCall] = {turn: turn.waits_with for turn in waiting}
            first = min(call.place for call in calls.values())
            group = [turn for turn, call in calls.items() if call.place == first]
            stage = todo[first]
            self._measure(stage, {turn.number: calls[turn].inputs for turn in group}, tallies)
            if stage not in held:
                self._fold_stage(stage, tallies)
                open_stages.remove(stage)
            return group

        turns = LayerScheduler(decide)
        with self._watch_layer(handle) as put_through:
            turns.run([lambda number=number: put_through(number) for number in range(len(self._items))])
        for stage in [stage for stage in todo if stage in open_stages]:
            self._fold_stage(stage, tallies)

    @contextmanager
    def _watch_layer(self, handle: Handle) -> Iterator[Callable[[int], None]]:
        """While every call of a layer is told to `handle`: a function that puts an item through the model."""
        here = threading.local()

        def hook(site: FoldableLayer) -> Any:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                number = getattr(here, "number", None)
                if number is None:  # a layer tried out by itself
                    return
                here.number = None
                handle(number, site, (args, kwargs))
                here.number = number

            return before

        def put_through(number: int) -> None:
            here.number = number
            with torch.no_grad():
                self.run(self.model, [self._items[number][2]])
            here.number = None

        handles = [s.module.register_forward_pre_hook(hook(s), with_kwargs=True) for s in self._sites]
        try:
            yield put_through
        finally:
            for each in handles:
                each.remove()

    def _measure(
        self, stage: LayerStage, calls: Mapping[int, Sequence[Inputs]], tallies: dict[FoldablePart, RatioStatistics]
    ) -> None:
        """Add calls of a stage, by the number of the item, to the tallies of its parts."""
        for place, part in enumerate(stage.parts):
            part_inputs = {number: inputs[place] for number, inputs in calls.items()}
            if part in self._outcomes:
                continue
            tally = tallies.setdefault(part, RatioStatistics(len(self.models)))
            if why := self._hindrance(part, part_inputs):
                self._outcomes[part] = _PartResult(tally, why=why)
                continue
            base = self._tensors(self.base, part)
            merged = self._magnitudes(part, self._merged_task_vector(part, base), part_inputs)
            for task, model in enumerate(self.models):
                theirs = {number: inputs for number, inputs in part_inputs.items() if self._items[number][0] == task}
                for number, magnitudes in self._magnitudes(part, self._task_vector(model, part, base), theirs).items():
                    tally.add(task, self._items[number][1], magnitudes, merged[number])

    def _hindrance(self, part: FoldablePart, calls: Mapping[int, Inputs]) -> str:
        """Why a part cannot be calibrated; empty where it can."""
        for piece in part.pieces.values():
            if self._holder.setdefault(piece.place, part) is not part:
                return f"shares {self._key(piece)} with {self._holder[piece.place].name}, and is calibrated there"
            if self._key(piece) in self.gram.left_out:
                return f"{self._key(piece)}: {self.gram.left_out[self._key(piece)]}"
        base = self._tensors(self.base, part)
        moved = self._merged_task_vector(part, base)
        if not any(delta.any() for delta in moved.values()):
            return "the merge does not move it"
        if not part.sure and not part.is_affine(base, moved, next(iter(calls.values()))):
            return f"the features of this {type(part.module).__name__} are not affine in its weights"
        return ""

    def _magnitudes(
        self, part: FoldablePart, delta: Mapping[str, Tensor], calls: Mapping[int, Inputs]
    ) -> dict[int, Tensor]:
        """By item: how far the change of the weights moves the features at each place."""
        magnitudes: dict[int, Tensor] = {}
        for number, inputs in calls.items():
            device = next(iter(delta.values())).device.type
            with torch.autocast(device, enabled=False):
                features = part.change(delta, inputs)
                magnitudes[number] = part.magnitudes(features, squared=self.norm == "l2", whole=self.ratio == "sample")
            if not magnitudes[number].isfinite().all():
                task, sample, _ = self._items[number]
                raise MagMaxError(
                    f"{part.name}: its features are not finite, on sample {sample + 1} of {self.names[task]}"
                )
        return magnitudes

    def _fold_stage(self, stage: LayerStage, tallies: Mapping[FoldablePart, RatioStatistics]) -> None:
        """Fold what was measured of a stage into the weights."""
        for part in stage.parts:
            if part in self._outcomes:
                continue
            tally = tallies.get(part, RatioStatistics(len(self.models)))
            raw = tally.xi()
            keys = [self._key(piece) for piece in part.pieces.values()]
            if raw is None:
                self._outcomes[part] = _PartResult(tally, why="the merge does not move its features on these samples")
                continue
            xi, why = clipped(raw, keys, self.sensitive)
            self._outcomes[part] = _PartResult(tally, raw, xi, why)
            base = self._tensors(self.base, part)
            for name, piece in part.pieces.items():
                fold_tensor(piece.values, base[name], xi)
                self._add_coefficient(piece, xi)

    def _add_coefficient(self, piece: ParameterRows, xi: float) -> None:
        key = self._key(piece)
        if piece.rows is None:
            self.coefficients[key] = np.array(xi)
        else:
            rows = self.coefficients.setdefault(key, np.ones(len(piece.parameter)))
            rows[piece.rows[0] : piece.rows[1]] = xi

    def _key(self, piece: ParameterRows) -> str:
        """The key of a parameter in the state dict; of one with several, the first."""
        return self._aliases[id(piece.parameter)]

    def _merged_task_vector(self, part: FoldablePart, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged weights less the base's."""
        return {name: piece.values.to(part.compute) - base[name] for name, piece in part.pieces.items()}

    def _task_vector(self, model: Checkpoint, part: FoldablePart, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = self._tensors(model, part)
        return tensors if model.is_task_vector else {name: values.sub_(base[name]) for name, values in tensors.items()}

    def _tensors(self, checkpoint: Checkpoint, part: FoldablePart) -> dict[str, Tensor]:
        """A part's weights in a checkpoint, on the module's device."""
        return {name: self._tensor(checkpoint, piece, part.compute) for name, piece in part.pieces.items()}

    def _tensor(self, checkpoint: Checkpoint, piece: ParameterRows, compute: torch.dtype) -> Tensor:
        shape, key = piece.parameter.shape, self._key(piece)
        row = piece.parameter.numel() // max(1, shape[0])
        start, stop = piece.rows or (0, shape[0])
        numbers = torch.from_numpy(read_widened(checkpoint, key, start * row, stop * row))
        return numbers.reshape(stop - start, *shape[1:]).to(piece.parameter.device, compute)

    def report(self) -> CalibrationReport:
        """Return what was measured of every layer, in the order of the module."""
        layers: list[LayerReport] = []
        for part in (part for site in self._sites for stage in site.stages for part in stage.parts):
            result = self._outcomes.get(part) or _PartResult(
                RatioStatistics(len(self.models)), why="the samples do not reach it"
            )
            keys = [self._key(piece) for piece in part.pieces.values()]
            before, weights = mean_magnitudes(result.tally.merged), self.gram.norms(keys)
            layers.append(
                LayerReport(
                    name=part.name,
                    kind=part.kind,
                    tensors=keys,
                    xi=result.xi,
                    measured=result.raw,
                    why=result.why,
                    features=mean_magnitudes(result.tally.task_magnitudes),
                    features_before=before,
                    features_after=[result.xi * value for value in before],
                    by_samples=self._by_samples(result.tally),
                    by_place=result.tally.by_place(),
                    weights=weights,
                    weight_after=result.xi * weights[-1],
                    cosine=self.gram.cosine(keys),
                )
            )
        return CalibrationReport(list(self.names), layers, dict(self._left))

    def _by_samples(self, tally: RatioStatistics) -> dict[int, float]:
        """Return what so many samples a task would have said, on the same inputs."""
        most = max(len(task_samples) for task_samples in self.samples)
        counts = sorted({2**n for n in range(most.bit_length()) if 2**n <= most} | {most})
        return {count: xi for count in counts if (xi := tally.xi(count)) is not None}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While the module, and all in it, is in evaluation mode."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
