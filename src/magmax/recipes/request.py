"""What a recipe comes to, in whatever words it was written: the arguments of a merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import path
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..calibration.options import CalibrationOptions, prepare_calibration
from ..checkpoints import Checkpoint, open_adapter, open_checkpoint
from ..checkpoints.base import HUB_PREFIX
from ..checkpoints.renamed import Renaming
from ..errors import MagMaxError
from ..merging.adapters.adapter_merge import AdapterOptions, adapter_job
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.in_memory import merge_in_memory
from ..merging.job import Job
from ..merging.matching import match_to_base
from ..merging.merge_job import merge_job
from ..merging.output_options import OutputOptions
from ..rules import Rule, Tunable


def expand_home(text: str) -> str:
    """A path, or BASE+ADAPTER, with the home folder for a leading ~, as in a shell."""
    return "+".join(path.expanduser(part) for part in text.split("+"))  # noqa: PTH111 - pathlib refuses an unknown ~user


class TargetSamples(BaseModel):
    """The source of a preference for the rule tunable. Paths are relative to the recipe's folder.

    Attributes:
        data: labelled texts of the target: a CSV with the columns text and label, or a folder of LABEL/NAME.txt.
        samples: the folder of the tasks' training samples, NAME.csv or NAME/ for each model's name.
        method: label, ot, cos, mmd, or auto to try all of them.
        encoder: the folder of the encoder in the Hugging Face layout; by default the base.
    """

    model_config = ConfigDict(extra="forbid")
    data: str
    samples: str
    method: Literal["label", "ot", "cos", "mmd", "auto"] = "auto"
    encoder: str | None = None
    max_tokens: int = 64


@dataclass(frozen=True)
class InputRenamings:
    """The renamings of a merge's inputs.

    Attributes:
        shared: for every model that has such names and no renaming of its own.
        base: for the base.
        models: for each model; no entries mean none.
    """

    shared: Renaming = field(default_factory=Renaming)
    base: Renaming = field(default_factory=Renaming)
    models: Sequence[Renaming] = ()

    def apply_to_models(self, models: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return the models under their names in the merge."""
        own = list(self.models) or [Renaming()] * len(models)
        renamed = [renaming.apply(model) if renaming else model for renaming, model in zip(own, models, strict=True)]
        others = iter(self.shared.apply_to_some([m for m, renaming in zip(renamed, own, strict=True) if not renaming]))
        return [model if renaming else next(others) for model, renaming in zip(renamed, own, strict=True)]


@dataclass(frozen=True)
class MergeRequest:
    """A validated merge: rule, inputs, options and output.

    Attributes:
        check: given the opened base and models, refuses what the recipe cannot mean for them, and returns the base to
            merge into.
        renamings: what the tensors of the inputs are called in the merge.
        notes: what the user should know of the recipe before it is carried out.
        target: where the preference of the rule tunable comes from, if it is not the rule's own.
        adapter_rank: merge adapters, without a base, into one adapter of at most this rank.
        calibrate: how the merged model gets its magnitudes back, if it does.
    """

    rule: Rule
    base: str | None
    models: Sequence[str]
    names: Sequence[str]
    options: OutputOptions
    out: str | None
    check: Callable[[Checkpoint, Sequence[Checkpoint]], Checkpoint] = lambda base, models: base
    renamings: InputRenamings = field(default_factory=InputRenamings)
    notes: Sequence[str] = ()
    adapter_rank: int | None = None
    target: TargetSamples | None = None
    calibrate: CalibrationOptions | None = None

    def open_inputs(self) -> tuple[Checkpoint, Sequence[Checkpoint], list[str]]:
        """The base, the models and their names; what is named after its id on the hub gets its commit into the name.

        Raises MagMaxError for a merge of adapters, which has no base.
        """
        if self.base is None:
            raise MagMaxError("a merge of adapters into an adapter has no base; this needs one: leave out adapter_rank")
        base = self.renamings.base.apply(open_checkpoint(self.base))
        models = self.renamings.apply_to_models([open_checkpoint(m, base=base) for m in self.models])
        by_id = [
            HUB_PREFIX + name in (path, path.rpartition("+")[2])
            for name, path in zip(self.names, self.models, strict=True)
        ]
        resolved = [model.source.removeprefix(HUB_PREFIX) for model in models]
        names = [r if i else n for n, r, i in zip(self.names, resolved, by_id, strict=True)]
        match = match_to_base(self.check(base, models), models, self.options.mismatch)
        return match.base, match.models, names

    def job(self, out: str | None = None, execution: ExecutionOptions | None = None) -> Job:
        """Open every input and check it. Raises MagMaxError for all that does not fit."""
        where = out or self.out
        if where is None:
            raise MagMaxError("the recipe names no out; say where the result goes: out=PATH")
        if self.adapter_rank is not None:
            chosen = AdapterOptions(self.adapter_rank, self.options.scaling_factor, self.options.dtype)
            adapters = [open_adapter(m) for m in self.models]
            return adapter_job(self.rule, adapters, Path(where), chosen, self.names)[1]
        base, models, names = self.open_inputs()
        rule = self.rule_with_preference(base, models, execution) if self.target else self.rule
        job = merge_job(rule, base, models, where, self.options, names)
        return (
            self._calibrate_job(job, rule, base, models, names, execution or ExecutionOptions())
            if self.calibrate
            else job
        )

    def _calibrate_job(
        self,
        job: Job,
        rule: Rule,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        names: Sequence[str],
        execution: ExecutionOptions,
    ) -> Job:
        """The merge's job, calibrated: the merge is made in memory to measure it, and again as it is written."""
        from ..calibration.calibration_job import calibrate_merge
        from ..calibration.rescale import InMemoryCheckpoint

        assert self.calibrate is not None
        tensors = merge_in_memory(
            rule.for_models(names), base, models, self.options, ExecutionOptions(execution.threads)
        )
        merged = InMemoryCheckpoint(job.specs, tensors, base.aliases)
        calibrated = prepare_calibration(self.calibrate, base, merged, models, names).measure(
            ExecutionOptions(execution.threads)
        )
        return replace(
            calibrate_merge(job, calibrated.coefficients, self.calibrate.provenance()), report=calibrated.report.lines
        )

    def rule_with_preference(
        self, base: Checkpoint, models: Sequence[Checkpoint], execution: ExecutionOptions | None = None
    ) -> Tunable:
        """The rule, with the preference that comes from the target, if there is one."""
        if not isinstance(self.rule, Tunable):
            raise MagMaxError(f"a target says what the rule tunable prefers; the rule is {self.rule.name}")
        if self.target is None:
            return self.rule.for_models(self.names)
        if self.rule.preference:
            raise MagMaxError("the rule tunable has a preference, and a target to take one from; keep one of the two")
        from ..preference.text_target import estimate_text_preference

        encoder = Path(self.target.encoder) if self.target.encoder else None
        weights = estimate_text_preference(
            self.target.method,
            Path(self.target.data),
            Path(self.target.samples),
            encoder,
            base,
            models,
            self.names,
            self.rule,
            self.options,
            execution or ExecutionOptions(),
            self.target.max_tokens,
        )
        return replace(self.rule, preference=weights)
