"""The running merge: learn task after task with constant memory, on disk and safe against a kill at any moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ...checkpoints import Checkpoint, TensorSpec, open_checkpoint
from ...checkpoints.base import HUB_PREFIX
from ...checkpoints.lora.adapted_model import portable_path, resolve_portable_path, split_base_and_adapter
from ...checkpoints.output_paths import OutputPath
from ...checkpoints.remote.urls import is_url
from ...checkpoints.renamed import PrefixedSink, Renaming
from ...checkpoints.torch.dcp import find_dcp
from ...checkpoints.writer import OutputDraft
from ...errors import MagMaxError
from ...rules import Average, Number, Rule, StreamingRule, as_rule
from ..config_differences import note_differences
from ..execution.execution_options import ExecutionOptions
from ..in_memory import MemorySink, restore_kind
from ..job import Job, provenance_file
from ..kernel import MergeKernel
from ..matching import Match, Mismatch, extents_of, match_to_base, narrow_match, refuse_same_path
from ..merge_job import base_metadata, provenance_recipe, small_files
from ..model_names import default_names
from ..normalization_statistics import BatchNorm, BatchNormStatistics
from ..output_options import OutputOptions
from ..pipeline import BlockPipeline, TensorSink
from ..reader import BlockReader
from ..result import MergeResult
from ..tying import tie_as_slots
from .absorb_kernels import AbsorbKernel, ResultKernel, slot_dtype
from .manifest import AbsorbedModel, Manifest, Version, require_streaming
from .versions import MAX_MAPPED_MODELS, WINNER_PREFIX, VersionStore, slot_prefix


@dataclass(frozen=True)
class RunningStatus:
    """A running merge at a glance; `shares` is the part of the elements each task supplies, where that is mapped."""

    rule: Mapping[str, Any]
    base: str | None
    base_digest: str | None
    current: Version | None
    versions: Sequence[Version]
    shares: Sequence[float] = ()


class Running:
    """A merge that grows by one model at a time and holds the base, the rule's slots, and nothing else.

    Absorbing T models one by one gives the bytes that merging them at once gives. Each absorption writes version
    g + 1 beside version g and then replaces `state.json`, so a kill leaves one or the other. An unlabelled
    version is dropped when its successor is in place; a labelled one, and one that `restore` leaves, is kept and can be
    restored. A task cannot be taken out of the middle: restore a version from before it and absorb the others again.

    Args:
        path: the folder of the state; made by the first `absorb`.
        rule: needed to begin; an existing state has its own, which must be equal if one is given.
        base: a path, state dict or module; an existing state remembers a path.
        winners: also map which task supplied each element (a byte an element; at most 255 tasks).
        mismatch: "strict", "base" or "intersect", as in `OutputOptions`, for all models to come; what one model
            lacks is the base's from then on. An existing state has its own, which must be equal if one is given.
        batch_norm: what is made of the statistics of batch normalisation, as in `OutputOptions`; likewise.

    Raises:
        MagMaxError: a folder that is no state, another rule, another base than the state was begun with.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        rule: Rule | str | None = None,
        base: Any = None,
        *,
        winners: bool = False,
        mismatch: Mismatch | None = None,
        batch_norm: BatchNorm | None = None,
        execution: ExecutionOptions | None = None,
    ) -> None:
        self.path = Path(fspath(path))
        self._execution = execution or ExecutionOptions()
        self._base_source: Any = base
        there = VersionStore.find(self.path)
        if there is None:
            if mismatch == "union":
                raise MagMaxError(
                    f"{self.path}: a running merge does not grow, so mismatch cannot be union; begin with a base that "
                    "has all rows, which magmax merge --mismatch union of the first model makes"
                )
            begun = Manifest(
                require_streaming(as_rule("magmax" if rule is None else rule)),
                winners,
                mismatch or "strict",
                batch_norm=batch_norm or "average",
            )
            if winners and not (begun.rule.selects_entries and begun.rule.slots(2) == 1):
                raise MagMaxError(
                    f"the winners of {begun.rule.name} cannot be mapped: its elements are not one task's own"
                )
            self._disk = VersionStore(self.path, begun)
            return
        self._disk = there
        if winners and not self.winners:
            raise MagMaxError(f"{self.path}: was begun without a map of winners; begin a new state to have one")
        if mismatch is not None and mismatch != self._manifest.mismatch:
            raise MagMaxError(f"{self.path}: was begun with mismatch {self._manifest.mismatch}, not {mismatch}")
        if batch_norm is not None and batch_norm != self._manifest.batch_norm:
            raise MagMaxError(f"{self.path}: was begun with batch_norm {self._manifest.batch_norm}, not {batch_norm}")
        if rule is not None and as_rule(rule) != self.rule:
            raise MagMaxError(
                f"{self.path}: was begun with the rule {self.rule.describe()}, not {as_rule(rule).describe()}"
            )

    @property
    def rule(self) -> StreamingRule:
        """The rule that the merge was begun with."""
        return self._manifest.rule

    @property
    def winners(self) -> bool:
        """Return whether it maps which task supplied each element."""
        return self._manifest.winners

    @property
    def tasks(self) -> Sequence[AbsorbedModel]:
        """The tasks absorbed so far, in order."""
        return self._manifest.tasks

    def opened(self, model: Any, name: str | None = None, renaming: Renaming | None = None) -> Checkpoint:
        """A model as `absorb` will read it; an adapter is applied to the base."""
        label = None if isinstance(model, str | PathLike) else name or "the model"
        return (renaming or Renaming()).apply(open_checkpoint(model, label, self._open_base()))

    def absorb(
        self,
        model: Any,
        name: str | None = None,
        label: str | None = None,
        *,
        rename: Mapping[str, str] | None = None,
        strip: str = "",
    ) -> MergeResult:
        """Take in one more model: one read of base, state and model, one write of the state.

        Args:
            rename, strip: what the model's tensors are called, as in `magmax.merge`.

        Raises:
            MagMaxError: a model that does not fit, or one that was absorbed before. The state is then as it was.
        """
        with self._disk.lock():
            return self._absorb_model(model, name, label, Renaming(strip, rename or {}))

    def _absorb_model(self, model: Any, name: str | None, label: str | None, renaming: Renaming) -> MergeResult:
        base = self._open_base()
        opened = self.opened(model, name, renaming)
        refuse_same_path([base, opened])
        note_differences(base, [opened])
        match = self._narrow_match(base, match_to_base(base, [opened], self._manifest.mismatch))
        base, (opened,) = match.base, match.models
        match = self._batch_norm(base).narrow(match)
        name = name or (default_names([opened.source])[0] if opened.is_on_disk else f"task {len(self.tasks) + 1}")
        self._disk.check_label(label)
        number = max(self._manifest.versions, default=0) + 1
        job = self._absorb_job(number, base, opened, name, match)
        result = job.run(self._execution)
        slots = list(result.sink_digests[: self.rule.slots(len(self.tasks) + 1)])
        tasks = [*self.tasks, AbsorbedModel(name, result.input_digests[len(self._disk.slots()) + 1])]
        self._manifest.base_digest = result.input_digests[0]
        self._remember_base()
        self._disk.publish(Version(number, tasks, slots, label, extents_of(base, match)))
        return result

    def result(
        self, scaling_factor: Number | None = None, out: str | PathLike[str] | None = None, **options: Any
    ) -> Any:
        """base + scaling_factor * the merged task vector, to `out`; without it, of the same kind as an in-memory base.

        `options` are those of `magmax.merge`: dtype, allow_nonfinite.
        """
        base = self._open_base()
        chosen = OutputOptions(scaling_factor, **options)
        if out is not None:
            self.result_job(out, chosen).run(self._execution)
            return fspath(out) if is_url(fspath(out)) else Path(fspath(out))
        if base.is_on_disk:
            raise MagMaxError("the result of merging files needs `out`, the path of the result")
        kernel = self._result_kernel(base, chosen)
        memory = MemorySink(kernel.merge.out)
        inputs = kernel.merge.reader.inputs
        digests = BlockPipeline(inputs, [memory], kernel, self._execution.pool).run(self._execution.progress)
        self._disk.verifier()(digests.digests(inputs))
        return restore_kind(self._base_source, base, memory.tensors, chosen)

    def result_job(self, out: str | PathLike[str], options: OutputOptions) -> Job:
        """The work of writing the result. Raises MagMaxError where nothing, or too little, was absorbed."""
        base = self._open_base()
        kernel = self._result_kernel(base, options)
        target = OutputPath.parse(out)
        statistics = kernel.merge.batch_norm
        match = statistics.narrow(self._narrow_match(base, match_to_base(base, [])))
        return Job(
            target=target,
            inputs=kernel.merge.reader.inputs,
            names=["base", *(f"slot {n}" for n in range(kernel.slots))],
            recipe={
                **provenance_recipe(self.rule, options),
                **match.describe(),
                **statistics.describe(),
                "absorbed": [asdict(task) for task in self.tasks],
            },
            specs=kernel.merge.out,
            kernel=kernel,
            unmerged=match.unmerged,
            partly_merged={key: part.reason for key, part in match.partly_merged.items()},
            metadata=base_metadata(base),
            small_files=small_files(base, target, kernel.merge.out, options, match),
            stem=base.layout.stem,
            modules=base.layout.modules,
            companions=base,
            check=self._disk.verifier(),
            shard_bytes=options.shard_bytes,
            notes=statistics.notes(),
        )

    def status(self) -> RunningStatus:
        """Return where the running merge stands."""
        current = self._manifest.current_version
        return RunningStatus(
            self.rule.describe(),
            self._manifest.base_path,
            self._manifest.base_digest,
            current,
            list(self._manifest.versions.values()),
            self._disk.shares() if self.winners and current else (),
        )

    def label(self, label: str) -> None:
        """Name the current version, so that it is kept."""
        with self._disk.lock():
            self._remember_base()
            self._disk.label(label)

    def restore(self, which: str | int) -> Version | None:
        """Go back to a version, by its label or number.

        Returns the version that was current, which is kept: one without a label gets "left-NUMBER". None where the
        version is current already.
        """
        with self._disk.lock():
            self._remember_base()
            return self._disk.restore(which)

    @property
    def _manifest(self) -> Manifest:
        return self._disk.state

    def _open_base(self) -> Checkpoint:
        base = self._base_source
        if base is None:
            if self._manifest.base_path is None:
                raise MagMaxError(f"{self.path}: needs the base, the model that training started from (--base)")
            base = resolve_portable_path(self.path, self._manifest.base_path)
            gone = not Path(base).exists() and not find_dcp(Path(base))
            if gone and not split_base_and_adapter(base) and not base.startswith(HUB_PREFIX) and not is_url(base):
                raise MagMaxError(f"{self.path}: its base is no longer at {base}; say where it is (--base)")
        opened = open_checkpoint(base, None if isinstance(base, str | PathLike) else "base")
        return tie_as_slots(opened, self._disk.slots()[0]) if self.tasks else opened

    def _absorb_job(self, number: int, base: Checkpoint, model: Checkpoint, name: str, match: Match) -> Job:
        slots, task = self._disk.slots(), len(self.tasks) + 1
        self._refuse_other_base(base, slots)
        if self.winners and task > MAX_MAPPED_MODELS:
            raise MagMaxError(f"{self.path}: a map of winners holds at most {MAX_MAPPED_MODELS} tasks")
        statistics = self._batch_norm(base)
        specs = {
            key: TensorSpec(
                slot_dtype(
                    Average() if key in statistics.averaged else self.rule,
                    spec,
                    [s.dtype for s in _existing_specs(key, *slots, model)],
                ),
                spec.shape,
            )
            for key, spec in base.specs.items()
            if spec.is_mergeable
        }
        count = self.rule.slots(task)
        prefixes = [slot_prefix(n) for n in range(count)] + [WINNER_PREFIX] * self.winners
        written = {
            prefix + key: TensorSpec("U8", s.shape) if prefix == WINNER_PREFIX else s
            for prefix in prefixes
            for key, s in specs.items()
        }
        inputs = [base, *slots, model]
        names = ["base", *(f"slot {n}" for n in range(len(slots))), name]
        if self.winners and slots:
            inputs.append(self._disk.winners())
            if not inputs[-1].specs.keys() >= specs.keys():
                raise MagMaxError(f"{self.path}: its map of winners is missing; the state is damaged")
            names.append("winners")
        held = {key for key in specs if self._manifest.extents.get(key, 1)} - statistics.kept
        kernel = AbsorbKernel(
            BlockReader(inputs), self.rule, task, len(slots), specs, match.unmerged, self.winners, match.extents, held,
            statistics,
        )  # fmt: skip

        def sinks(draft: OutputDraft) -> Sequence[TensorSink]:
            return [PrefixedSink(draft, prefix) for prefix in prefixes]

        verify = self._disk.verifier()

        def check(found: Sequence[str]) -> None:
            verify(found)
            twin = next((t for t in self.tasks if t.digest == found[len(slots) + 1]), None)
            if twin:
                raise MagMaxError(f"{model.label}: was absorbed already, as {twin.name!r}")

        recipe = {"absorb": self.rule.describe(), "task": task}
        return Job(
            target=OutputPath(self._disk.folder(number)), inputs=inputs, names=names, recipe=recipe, specs=written,
            kernel=kernel,
            unmerged=match.unmerged,
            partly_merged={key: part.reason for key, part in match.partly_merged.items()},
            sinks=sinks, small_files=provenance_file, check=check, notes=statistics.notes(),
        )  # fmt: skip

    def _result_kernel(self, base: Checkpoint, options: OutputOptions) -> ResultKernel:
        self.rule.check(len(self.tasks))
        slots = self._disk.slots()
        self._refuse_other_base(base, slots)
        statistics = self._batch_norm(base)
        match = statistics.narrow(self._narrow_match(base, match_to_base(base, [])))
        reader = BlockReader([base, *slots], options.allow_nonfinite)
        factor, out = options.resolve_scaling_factor(self.rule), options.out_specs(base)
        merge = MergeKernel(reader, self.rule, len(self.tasks), factor, out, match.unmerged, match.extents)
        merge = replace(merge, batch_norm=statistics)
        merge.check_rules()
        return ResultKernel(merge, len(slots))

    def _narrow_match(self, base: Checkpoint, match: Match) -> Match:
        """The match of one more model, without what a model absorbed before has not."""
        before = self._manifest.extents
        return narrow_match(base, match, before) if before else match

    def _batch_norm(self, base: Checkpoint) -> BatchNormStatistics:
        return BatchNormStatistics.find(base.specs, self._manifest.batch_norm)

    def _refuse_other_base(self, base: Checkpoint, slots: Sequence[Checkpoint]) -> None:
        """Refuse, by its headers, a base that cannot be the one that the slots were made from."""
        merged = {key: spec.shape for key, spec in base.specs.items() if spec.is_mergeable}
        if any({key: spec.shape for key, spec in slot.specs.items()} != merged for slot in slots):
            raise MagMaxError(f"{self.path}: the base is not the one it was begun with: {base.label} has other tensors")

    def _remember_base(self) -> None:
        """Note where the base that was given is, as seen from the state, if it can be opened again from there."""
        if self._base_source is not None:
            self._manifest.base_path = portable_path(self.path, self._base_source, self._open_base())


def _existing_specs(key: str, *checkpoints: Checkpoint) -> list[TensorSpec]:
    """The specs of a tensor in those checkpoints that have it."""
    return [c.spec(key) for c in checkpoints if c.resolve_alias(key) in c.specs]
