"""Preferences for text encoders: target and training samples from files, features from each task's own encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..calibration.samples import LabelledTexts, read_samples, sample_paths
from ..checkpoints import Checkpoint
from ..checkpoints.memory import to_tensor
from ..continual.evaluation.accuracy import likelihoods
from ..continual.models.heads import zero_shot_head
from ..continual.models.text_encoder import TextEncoder
from ..errors import MagMaxError
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.in_memory import merge_in_memory
from ..merging.output_options import OutputOptions
from ..rules import MagMax, Rule, Tunable
from .candidates import PreferenceChoice, choose_preference
from .estimators import MAX_SAMPLES, DistanceMethod, Features, from_all_methods, from_labels, from_samples
from .natural_shares import natural_shares

PreferenceMethod = Literal["label", "ot", "cos", "mmd", "auto"]
PROMPT_TEMPLATES = ("a message about {}",)
HEAD_TEMPERATURE = 20.0
BATCH_SIZE = 64


def read_task_samples(folder: Path, names: Sequence[str], labelled: bool = True) -> list[LabelledTexts]:
    """Training samples of each task: FOLDER/NAME.csv, or a folder FOLDER/NAME. Raises MagMaxError where one lacks."""
    return [read_samples(place, labelled) for place in sample_paths(folder, names)]


@dataclass(frozen=True)
class TextPreferenceEstimator:
    """An estimator of preferences for text models, from training samples and samples of the target."""

    encoder: TextEncoder
    base: Checkpoint
    models: Sequence[Checkpoint]
    task_samples: Sequence[LabelledTexts]
    target_samples: LabelledTexts
    execution: ExecutionOptions
    options: OutputOptions = field(default_factory=OutputOptions)

    def estimate_weights(self, method: DistanceMethod) -> list[float]:
        """A preference by features; see `from_samples`."""
        return from_samples(self._feature_pairs(), method)

    def choose_weights(
        self, make_rule: Callable[[Sequence[float]], Rule] = Tunable, seed: int = 0, pull: float = 0.01
    ) -> PreferenceChoice:
        """The best, on samples it was not made of, of all methods, uniform and MagMax's own counts; see `choose`.

        Scores are the probability of the right label among all, with a zero-shot head of the base.
        """
        shares = natural_shares(
            self.base, self.models, self.execution, self.options.mismatch, self.options.allow_nonfinite
        )
        names = sorted({label for samples in (*self.task_samples, self.target_samples) for label in samples.labels})
        self._load_merge(0.0, self.models)  # the base itself
        head = zero_shot_head(self.encoder, names, PROMPT_TEMPLATES, HEAD_TEMPERATURE)
        items = self.encoder.tokenize(self.target_samples.texts)
        labels = np.array([names.index(label) for label in self.target_samples.labels])
        pairs = list(self._feature_pairs())

        def score(weights: Sequence[float]) -> np.ndarray:
            settings = ExecutionOptions(self.execution.threads)
            merged = merge_in_memory(make_rule(weights), self.base, self.models, self.options, settings)
            load_merged_weights(self.encoder.model, self.base, merged)
            return likelihoods(self.encoder, head, items, labels)

        def candidates(places: Sequence[int]) -> dict[str, list[float]]:
            seen = [(shares, target[list(places)]) for shares, target in pairs]
            return from_all_methods(
                self.target_samples.pick(places).labels,
                labels_by_task(self.task_samples),
                seen,
                descriptions.setdefault,
            )

        descriptions: dict[str, str] = {}
        choice = choose_preference(candidates, shares, score, len(items), seed=seed, pull=pull)
        for method, why in descriptions.items():
            self.execution.note(f"not tried: {method} ({why})")
        return choice

    def _feature_pairs(self) -> Iterator[tuple[Features, Features]]:
        for number, samples in enumerate(self.task_samples):
            self._load_merge(1.0, [self.models[number]])
            yield self._extract_features(samples.texts[:MAX_SAMPLES]), self._extract_features(self.target_samples.texts)

    def _extract_features(self, texts: Sequence[str]) -> Features:
        self.encoder.model.eval()
        ids = self.encoder.tokenize(texts)
        with torch.inference_mode():
            parts = [self.encoder(ids[at : at + BATCH_SIZE]).cpu().numpy() for at in range(0, len(ids), BATCH_SIZE)]
        return np.concatenate(parts)

    def _load_merge(self, factor: float, models: Sequence[Checkpoint]) -> None:
        """Put a merge of some models into the encoder; of a single one, at scaling factor 1, it is the model."""
        options = replace(self.options, scaling_factor=factor, dtype=None)
        merged = merge_in_memory(MagMax(), self.base, models, options, ExecutionOptions(self.execution.threads))
        load_merged_weights(self.encoder.model, self.base, merged)


def labels_by_task(tasks: Sequence[LabelledTexts]) -> list[set[str]]:
    """The different labels of each task."""
    return [set(samples.labels) for samples in tasks]


def estimate_text_preference(
    method: PreferenceMethod,
    data: Path,
    samples: Path,
    encoder: Path | None,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    rule: Tunable,
    options: OutputOptions,
    execution: ExecutionOptions,
    max_tokens: int = 64,
) -> list[float]:
    """A preference for models of texts, from files; what "auto" tried is told to `settings.note`.

    Args:
        data: samples of the target, as `read_samples` reads them; "label" and "auto" need their labels.
        samples: the folder of each task's training samples, as `read_task_samples` reads them.
        encoder: the folder of the encoder in the Hugging Face layout; by default the base's own. "label" needs none.
        rule: the merge that "auto" tries preferences with; its own preference does not matter.
    """
    labelled = method in ("label", "auto")
    tasks, target = read_task_samples(samples, names, labelled), read_samples(data, labelled)
    if method == "label":
        return from_labels(target.labels, labels_by_task(tasks))
    folder = encoder or base.small_files_folder()
    if folder is None or not folder.is_dir():
        raise MagMaxError(
            f"{folder or base.label}: is no folder with an encoder and its tokenizer; name one: --encoder"
        )
    try:
        loaded = TextEncoder.load(folder, max_tokens)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MagMaxError(f"{folder}: has no encoder with its tokenizer: {reason}; name one: --encoder") from error
    sought = TextPreferenceEstimator(loaded, base, models, tasks, target, execution, options)
    if method != "auto":
        return sought.estimate_weights(method)
    choice = sought.choose_weights(lambda tried: replace(rule, preference=list(tried)))
    lines = ["score  less pull  weights  candidate"]
    for trial in choice.candidates:
        shares = " ".join(f"{weight:.3f}" for weight in trial.weights)
        origin = f"{trial.source}, temperature {trial.temperature:g}"
        lines.append(f"{trial.score:.4f}  {trial.objective:.4f}  {shares}  {origin}")
    for line in [*lines, f"chosen: {choice.best.source}, temperature {choice.best.temperature:g}"]:
        execution.note(line)
    return list(choice.best.weights)


def load_merged_weights(model: nn.Module, base: Checkpoint, tensors: Mapping[str, Any]) -> None:
    """Copy merged tensors into a module. Raises MagMaxError where the module is not of the base's kind.

    A pooler that the checkpoints do not have stays as it is: features are made of the last hidden states.
    """
    whole = model.state_dict()
    state = {k: v for k, v in whole.items() if base.resolve_alias(k) in tensors or not k.startswith("pooler.")}
    missing = [key for key in state if base.resolve_alias(key) not in tensors]
    extra = [key for key in tensors if key not in state]
    if missing or extra:
        raise MagMaxError(
            f"{base.label} does not hold the weights of this {type(model).__name__}: "
            f"{len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(extra)} are not its own "
            f"({', '.join(extra[:3])}); name the encoder that was fine-tuned"
        )
    tensors_out = {
        key: to_tensor(tensors[base.resolve_alias(key)], base.spec(key), value) for key, value in state.items()
    }
    model.load_state_dict(whole | tensors_out)
