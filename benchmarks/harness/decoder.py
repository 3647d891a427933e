"""A decoder language model: pre-trained once, fine-tuned on domain after domain, merged and calibrated, measured."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from tokenizers import Tokenizer

import magmax
from harness.machine import git_commit
from magmax.calibration import calibrate_features
from magmax.continual.cell_store import CellStore, Record
from magmax.continual.cells import digest_of_file, environment
from magmax.continual.data.datasets import LabelledExamples
from magmax.continual.experiment import digest_of
from magmax.continual.language import (
    NextTokenLoss,
    bytes_of,
    corpus,
    llama,
    perplexity_per_byte,
    train_tokenizer,
    windows,
)
from magmax.continual.progress import ProgressCallback, no_progress
from magmax.continual.training.fit import FitSettings, fit
from magmax.continual.training.sequence import made_from_metadata
from magmax.continual.training.snapshot import FitSnapshot
from magmax.continual.training.weight_files import MADE_FROM, load_weights, read_metadata, save_weights, write_bytes
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.rules import CalibrateWeights, Rule, chain, rule_from
from magmax.rules.norms import dot_products_and_norms, mean_cosine
from magmax.rules.transforms.calibrate_weights import is_calibrated

SNAPSHOT_STEPS = 50
REFERENCE_CELL = "references"
"""The cell of what is merged: the pre-trained model and every checkpoint."""


class ModelShape(BaseModel):
    model_config = ConfigDict(extra="forbid")
    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int


class WindowCounts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    validation: int
    test: int


class LanguageConfig(BaseModel):
    """What is trained, merged and measured; every record repeats it."""

    model_config = ConfigDict(extra="forbid")
    pretraining: list[str]
    domains: list[str]
    model: ModelShape
    pretrain: FitSettings
    tune: FitSettings
    seeds: list[int]
    training: list[Literal["sequential", "independent"]]
    rules: list[Any]
    calibrations: list[Literal["none", "norm", "ellipsoid", "fsc", "dsc"]]
    samples: int
    factors: list[float]
    windows: WindowCounts
    precision: Literal["float32", "bfloat16"]

    @property
    def evaluated_texts(self) -> list[str]:
        """The texts that models are measured on: the domains, and the first of what was pre-trained on."""
        return [*self.domains, self.pretraining[0]]

    def domain_order(self, seed: int) -> list[str]:
        """The domains in a seed's order."""
        return [self.domains[n] for n in np.random.default_rng(seed).permutation(len(self.domains))]


def json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PreparedExperiment:
    """The pre-trained model's file, the tokenizer and the windows of every domain."""

    config: LanguageConfig
    work: Path
    base: Path
    tokenizer: Tokenizer
    train: Mapping[str, LabelledExamples]
    validation: Mapping[str, LabelledExamples]
    test: Mapping[str, LabelledExamples]

    def build_model(self) -> torch.nn.Module:
        shape = self.config.model
        return llama(shape.vocabulary, shape.width, shape.layers, shape.heads, shape.length, seed=0)

    def perplexity(self, model: torch.nn.Module, data: Mapping[str, LabelledExamples]) -> dict[str, float]:
        loss = NextTokenLoss(model, self.config.precision)
        return {name: perplexity_per_byte(loss, self.tokenizer, part) for name, part in data.items()}


def prepare(config: LanguageConfig, work: Path, progress: ProgressCallback = no_progress) -> PreparedExperiment:
    """Train the tokenizer and the pre-trained model, or find them in the folder `work`."""
    torch.set_num_threads(1)
    texts = {name: corpus(name) for name in [*config.pretraining, *config.domains]}
    general = [text for name in config.pretraining for text in texts[name].train]
    tokenizer = _tokenizer(config, work, general)
    length = config.model.length

    def cut(part: str, names: Sequence[str], most: int | None) -> dict[str, LabelledExamples]:
        return {name: windows(tokenizer, getattr(texts[name], part), length, most) for name in names}

    train = cut("train", config.domains, None)
    validation = cut("validation", config.domains, config.windows.validation)
    test = cut("test", config.evaluated_texts, config.windows.test)
    base = work / "theta_0.safetensors"
    ready = PreparedExperiment(config, work, base, tokenizer, train, validation, test)
    told = made_from_metadata(
        {"model": config.model.model_dump(), "fit": asdict(config.pretrain), "texts": json_digest(general)}
        | {"as": config.precision}
    )
    if read_metadata(base) != told:
        model, items = ready.build_model(), windows(tokenizer, general, length).items
        _train(model, items, config.pretrain, config, 0, work / "step_0.safetensors", told, progress)
        save_weights(model, base, told)
    return ready


def _tokenizer(study: LanguageConfig, work: Path, texts: Sequence[str]) -> Tokenizer:
    file = work / f"tokenizer-{json_digest([study.model.vocabulary, *texts])[:16]}.json"
    if not file.exists():
        write_bytes(train_tokenizer(texts, study.model.vocabulary).to_str().encode(), file)
    return Tokenizer.from_file(str(file))


def _items_digest(items: Sequence[np.ndarray]) -> str:
    return hashlib.sha256(np.ascontiguousarray(items).tobytes()).hexdigest()


def _train(
    model: torch.nn.Module,
    items: Sequence[np.ndarray],
    settings: FitSettings,
    config: LanguageConfig,
    seed: int | Sequence[int],
    snapshot: Path,
    metadata: Mapping[str, str],
    progress: ProgressCallback,
) -> None:
    data = LabelledExamples(items, np.zeros(len(items), np.int64))
    kept = FitSnapshot(snapshot, SNAPSHOT_STEPS, metadata[MADE_FROM])
    fit(model, data, NextTokenLoss(model, config.precision), settings, seed, snapshot=kept, progress=progress)
    kept.remove()


def train_sequence(
    prepared: PreparedExperiment, seed: int, training: str, progress: ProgressCallback = no_progress
) -> list[Path]:
    """Fine-tune on each domain in the seed's order, or find that done; the files of theta_1 .. theta_T."""
    study, folder = prepared.config, prepared.work / f"{training}-seed{seed}"
    paths, model = [prepared.base], prepared.build_model()
    for place, domain in enumerate(study.domain_order(seed), start=1):
        path = folder / f"theta_{place}.safetensors"
        start = paths[-1] if training == "sequential" else prepared.base
        items = prepared.train[domain].items
        told = made_from_metadata(
            {
                "from": digest_of_file(start),
                "fit": asdict(study.tune),
                "windows": _items_digest(items),
                "seed": [seed, place],
            }
            | {"as": study.precision}
        )
        if read_metadata(path) != told:
            load_weights(model, start)
            step = folder / f"step_{place}.safetensors"
            _train(model, items, study.tune, study, [seed, place], step, told, progress)
            save_weights(model, path, told)
        paths.append(path)
    return paths[1:]


def build_rule(content: Any, tasks: int) -> Rule:
    """The rule; tunable prefers all domains alike."""
    return rule_from({"tunable": {"preference": [1] * tasks}} if content == "tunable" else content)


CALIBRATION_FORMS = {"norm": "norm", "ellipsoid": "ellipsoid", "dsc": "norm"}
"""What each calibration does in weight space."""


def add_calibration(rule: Rule, calibration: str) -> Rule:
    return (
        chain(rule, CalibrateWeights(form=CALIBRATION_FORMS[calibration])) if calibration in CALIBRATION_FORMS else rule
    )


def cell_choices(config: LanguageConfig) -> list[tuple[str, str]]:
    """The rules and calibrations to be measured on each training."""
    names = [str(rule) if isinstance(rule, str) else json.dumps(rule) for rule in config.rules]
    return [(REFERENCE_CELL, "none"), *((rule, how) for rule in names for how in config.calibrations)]


def cell_recipe(config: LanguageConfig, seed: int, training: str, rule: str, calibration: str) -> dict[str, Any]:
    """All that decides a cell's numbers; which others are measured does not."""
    told = config.model_dump(mode="json", exclude={"seeds", "training", "rules", "calibrations"})
    return told | {"seed": seed, "training": training, "rule": rule, "calibration": calibration}


def read_cells(out: Path, recipes: Sequence[Mapping[str, Any]]) -> list[Record | None]:
    """The record of each recipe, if it is there."""
    there = CellStore(out).by_digest()
    return [there.get(digest_of(recipe)) for recipe in recipes]


def measure_sequence(
    config: dict[str, Any], work: Path, out: Path, seed: int, training: str, discard: bool = False
) -> str:
    """Measure all cells of a training that are not there yet, trained for it; a job for a process, of one thread.

    With `discard`, the checkpoints are deleted afterwards.
    """
    chosen = LanguageConfig.model_validate(config)
    recipes = [(rule, how, cell_recipe(chosen, seed, training, rule, how)) for rule, how in cell_choices(chosen)]
    there = read_cells(out, [recipe for _, _, recipe in recipes])
    missing = [cell for cell, record in zip(recipes, there, strict=True) if record is None]
    if not missing:
        return f"{training}, seed {seed}: from an earlier run"
    ready = prepare(chosen, work)
    paths, made_at = train_sequence(ready, seed, training), git_commit()
    for rule, how, recipe in missing:
        began = time.perf_counter()
        measured = (
            measure_references(ready, paths)
            if rule == REFERENCE_CELL
            else measure_merges(ready, paths, seed, rule, how)
        )
        record = {
            "recipe": recipe,
            "order": chosen.domain_order(seed),
            **measured,
            "models": {path.stem: digest_of_file(path) for path in [ready.base, *paths]},
            "test_bytes": {domain: bytes_of(ready.tokenizer, ready.test[domain]) for domain in chosen.domains},
            "seconds": round(time.perf_counter() - began, 3),
            "commit": made_at,
            "environment": environment(1),
        }
        CellStore(out).append(record)
    if discard:
        shutil.rmtree(paths[0].parent)
    return f"{training}, seed {seed}"


def measure_references(prepared: PreparedExperiment, paths: Sequence[Path]) -> dict[str, Any]:
    """Every checkpoint on every text, and how much alike the task vectors are."""
    model, found = prepared.build_model(), {}
    for path in [prepared.base, *paths]:
        load_weights(model, path)
        found[path.stem] = prepared.perplexity(model, prepared.test)
    base, *others = [load_file(path) for path in [prepared.base, *paths]]
    cosines = {
        key: mean_cosine(
            dot_products_and_norms([(other[key] - start).flatten().numpy() for other in others], start.numel(), True)[
                0, :, :-1
            ]
        )
        for key, start in base.items()
        if is_calibrated(key, start.shape)
    }
    return {"perplexity": found, "cosine": {"mean": sum(cosines.values()) / len(cosines), "tensors": cosines}}


def measure_merges(
    prepared: PreparedExperiment, paths: Sequence[Path], seed: int, rule: str, calibration: str
) -> dict[str, Any]:
    """A rule's merge at its own scaling factor; uncalibrated, also at the best on validation texts.

    Features are measured on the first validation windows of each domain, in the order of the checkpoints.
    """
    study, model = prepared.config, prepared.build_model()
    content = json.loads(rule) if rule.startswith(("{", "[")) else rule
    plain = build_rule(content, len(paths))
    base = load_file(prepared.base)
    settings = ExecutionOptions(threads=1)

    def at(factor: float, data: Mapping[str, LabelledExamples]) -> dict[str, float]:
        model.load_state_dict(
            magmax.merge(add_calibration(plain, calibration), base, paths, factor, execution=settings)
        )
        if calibration in ("fsc", "dsc"):
            samples = [prepared.validation[domain].items[: study.samples] for domain in study.domain_order(seed)]
            calibrate_features(model, prepared.base, paths, samples, next_tokens, execution=settings)
        return prepared.perplexity(model, data)

    default = plain.default_scaling_factor
    found: dict[str, Any] = {"scaling_factor": default, "perplexity": at(default, prepared.test)}
    if calibration == "none":
        search = {
            factor: mean_perplexity(at(factor, prepared.validation)) for factor in sorted({default, *study.factors})
        }
        best = min(search, key=lambda factor: search[factor])
        found["search"] = {f"{factor:g}": score for factor, score in search.items()}
        found["chosen"] = {"scaling_factor": best, "perplexity": at(best, prepared.test)}
    return found


def next_tokens(model: torch.nn.Module, items: Sequence[np.ndarray]) -> None:
    """Put windows through the model, as training does."""
    model(input_ids=torch.from_numpy(np.stack(items))[:, :-1], use_cache=False)


def mean_perplexity(by_domain: Mapping[str, float]) -> float:
    """The geometric mean: what the mean number of bits a byte is to perplexity."""
    return math.exp(sum(map(math.log, by_domain.values())) / len(by_domain))
