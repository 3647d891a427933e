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
from harness.machine import commit
from magmax.calibration import calibrate_features
from magmax.continual.cells import digest_of_file, environment
from magmax.continual.data.datasets import Labelled
from magmax.continual.language import NextToken, bytes_of, corpus, llama, perplexity_per_byte, train_tokenizer, windows
from magmax.continual.progress import Tell, silent
from magmax.continual.training.fit import FitSettings, fit
from magmax.continual.training.sequence import made_from
from magmax.continual.training.snapshot import Snapshot
from magmax.continual.training.weight_files import MADE_FROM, load_weights, read_metadata, save_weights, write_bytes
from magmax.merging.execution.execution_options import Settings
from magmax.rules import CalibrateWeights, Rule, chain, rule_from
from magmax.rules.norms import mean_angle, measures
from magmax.rules.transforms.calibrate_weights import is_calibrated

SNAPSHOT_STEPS = 50
REFERENCES = "references"
"""The cell of what is merged: the pre-trained model and every checkpoint."""


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")
    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int


class Windows(BaseModel):
    model_config = ConfigDict(extra="forbid")
    validation: int
    test: int


class Study(BaseModel):
    """What is trained, merged and measured; every record repeats it."""

    model_config = ConfigDict(extra="forbid")
    pretraining: list[str]
    domains: list[str]
    model: Model
    pretrain: FitSettings
    tune: FitSettings
    seeds: list[int]
    chains: list[Literal["sequential", "independent"]]
    rules: list[Any]
    calibrations: list[Literal["none", "norm", "ellipsoid", "fsc", "dsc"]]
    samples: int
    factors: list[float]
    windows: Windows
    precision: Literal["float32", "bfloat16"]

    @property
    def measured(self) -> list[str]:
        """The texts that models are measured on: the domains, and the first of what was pre-trained on."""
        return [*self.domains, self.pretraining[0]]

    def order(self, seed: int) -> list[str]:
        """The domains in a seed's order."""
        return [self.domains[n] for n in np.random.default_rng(seed).permutation(len(self.domains))]


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Ready:
    """The pre-trained model's file, the tokenizer and the windows of every domain."""

    study: Study
    work: Path
    base: Path
    tokenizer: Tokenizer
    train: Mapping[str, Labelled]
    validation: Mapping[str, Labelled]
    test: Mapping[str, Labelled]

    def model(self) -> torch.nn.Module:
        shape = self.study.model
        return llama(shape.vocabulary, shape.width, shape.layers, shape.heads, shape.length, seed=0)

    def perplexity(self, model: torch.nn.Module, data: Mapping[str, Labelled]) -> dict[str, float]:
        loss = NextToken(model, self.study.precision)
        return {name: perplexity_per_byte(loss, self.tokenizer, part) for name, part in data.items()}


def prepare(study: Study, work: Path, tell: Tell = silent) -> Ready:
    """Train the tokenizer and the pre-trained model, or find them in the folder `work`."""
    torch.set_num_threads(1)
    texts = {name: corpus(name) for name in [*study.pretraining, *study.domains]}
    general = [text for name in study.pretraining for text in texts[name].train]
    tokenizer = _tokenizer(study, work, general)
    length = study.model.length

    def cut(part: str, names: Sequence[str], most: int | None) -> dict[str, Labelled]:
        return {name: windows(tokenizer, getattr(texts[name], part), length, most) for name in names}

    train = cut("train", study.domains, None)
    validation = cut("validation", study.domains, study.windows.validation)
    test = cut("test", study.measured, study.windows.test)
    base = work / "theta_0.safetensors"
    ready = Ready(study, work, base, tokenizer, train, validation, test)
    told = made_from(
        {"model": study.model.model_dump(), "fit": asdict(study.pretrain), "texts": digest(general)}
        | {"as": study.precision}
    )
    if read_metadata(base) != told:
        model, items = ready.model(), windows(tokenizer, general, length).items
        _train(model, items, study.pretrain, study, 0, work / "step_0.safetensors", told, tell)
        save_weights(model, base, told)
    return ready


def _tokenizer(study: Study, work: Path, texts: Sequence[str]) -> Tokenizer:
    file = work / f"tokenizer-{digest([study.model.vocabulary, *texts])[:16]}.json"
    if not file.exists():
        write_bytes(train_tokenizer(texts, study.model.vocabulary).to_str().encode(), file)
    return Tokenizer.from_file(str(file))


def _digest(items: Sequence[np.ndarray]) -> str:
    return hashlib.sha256(np.ascontiguousarray(items).tobytes()).hexdigest()


def _train(
    model: torch.nn.Module,
    items: Sequence[np.ndarray],
    settings: FitSettings,
    study: Study,
    seed: int | Sequence[int],
    snapshot: Path,
    told: Mapping[str, str],
    tell: Tell,
) -> None:
    data = Labelled(items, np.zeros(len(items), np.int64))
    kept = Snapshot(snapshot, SNAPSHOT_STEPS, told[MADE_FROM])
    fit(model, data, NextToken(model, study.precision), settings, seed, snapshot=kept, tell=tell)
    kept.remove()


def train_chain(ready: Ready, seed: int, name: str, tell: Tell = silent) -> list[Path]:
    """Fine-tune on each domain in the seed's order, or find that done; the files of theta_1 .. theta_T."""
    study, folder = ready.study, ready.work / f"{name}-seed{seed}"
    paths, model = [ready.base], ready.model()
    for place, domain in enumerate(study.order(seed), start=1):
        path = folder / f"theta_{place}.safetensors"
        start = paths[-1] if name == "sequential" else ready.base
        items = ready.train[domain].items
        told = made_from(
            {"from": digest_of_file(start), "fit": asdict(study.tune), "windows": _digest(items), "seed": [seed, place]}
            | {"as": study.precision}
        )
        if read_metadata(path) != told:
            load_weights(model, start)
            step = folder / f"step_{place}.safetensors"
            _train(model, items, study.tune, study, [seed, place], step, told, tell)
            save_weights(model, path, told)
        paths.append(path)
    return paths[1:]


def rule_of(content: Any, tasks: int) -> Rule:
    """The rule; tunable prefers all domains alike."""
    return rule_from({"tunable": {"preference": [1] * tasks}} if content == "tunable" else content)


FORMS = {"norm": "norm", "ellipsoid": "ellipsoid", "dsc": "norm"}
"""What each calibration does in weight space."""


def calibrated(rule: Rule, how: str) -> Rule:
    return chain(rule, CalibrateWeights(form=FORMS[how])) if how in FORMS else rule


def cells_of(study: Study) -> list[tuple[str, str]]:
    """The rules and calibrations to be measured on each chain."""
    names = [str(rule) if isinstance(rule, str) else json.dumps(rule) for rule in study.rules]
    return [(REFERENCES, "none"), *((rule, how) for rule in names for how in study.calibrations)]


def cell_recipe(study: Study, seed: int, name: str, rule: str, how: str) -> dict[str, Any]:
    """All that decides a cell's numbers; which others are measured does not."""
    told = study.model_dump(mode="json", exclude={"seeds", "chains", "rules", "calibrations"})
    return told | {"seed": seed, "chain": name, "rule": rule, "calibration": how}


def cell_file(out: Path, recipe: Mapping[str, Any]) -> Path:
    rule = "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in recipe["rule"])
    stem = f"{rule}-{recipe['calibration']}-{recipe['chain']}-seed{recipe['seed']}"
    return out / "cells" / f"{stem}-{digest(recipe)[:8]}.json"


def read_cell(out: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(cell_file(out, recipe).read_text())
    except (OSError, ValueError):
        return None
    return record if record["recipe"] == recipe else None


def measure_chain(study: dict[str, Any], work: Path, out: Path, seed: int, name: str, discard: bool = False) -> str:
    """Measure all cells of a chain that are not there yet, trained for it; a job for a process, of one thread.

    With `discard`, the checkpoints are deleted afterwards.
    """
    chosen = Study.model_validate(study)
    recipes = [(rule, how, cell_recipe(chosen, seed, name, rule, how)) for rule, how in cells_of(chosen)]
    missing = [cell for cell in recipes if read_cell(out, cell[-1]) is None]
    if not missing:
        return f"{name}, seed {seed}: from an earlier run"
    ready = prepare(chosen, work)
    paths, made_at = train_chain(ready, seed, name), commit()
    for rule, how, recipe in missing:
        began = time.perf_counter()
        measured = references(ready, paths) if rule == REFERENCES else merges(ready, paths, seed, rule, how)
        record = {
            "recipe": recipe,
            "order": chosen.order(seed),
            **measured,
            "models": {path.stem: digest_of_file(path) for path in [ready.base, *paths]},
            "test_bytes": {domain: bytes_of(ready.tokenizer, ready.test[domain]) for domain in chosen.domains},
            "seconds": round(time.perf_counter() - began, 3),
            "commit": made_at,
            "environment": environment(1),
        }
        write_bytes(json.dumps(record, indent=2).encode() + b"\n", cell_file(out, recipe))
    if discard:
        shutil.rmtree(paths[0].parent)
    return f"{name}, seed {seed}"


def references(ready: Ready, paths: Sequence[Path]) -> dict[str, Any]:
    """Every checkpoint on every text, and how much alike the task vectors are."""
    model, found = ready.model(), {}
    for path in [ready.base, *paths]:
        load_weights(model, path)
        found[path.stem] = ready.perplexity(model, ready.test)
    base, *others = [load_file(path) for path in [ready.base, *paths]]
    cosines = {
        key: mean_angle(
            measures([(other[key] - start).flatten().numpy() for other in others], start.numel(), True)[0, :, :-1]
        )
        for key, start in base.items()
        if is_calibrated(key, start.shape)
    }
    return {"perplexity": found, "cosine": {"mean": sum(cosines.values()) / len(cosines), "tensors": cosines}}


def merges(ready: Ready, paths: Sequence[Path], seed: int, rule: str, how: str) -> dict[str, Any]:
    """A rule's merge at its own scaling factor; uncalibrated, also at the best on validation texts.

    Features are measured on the first validation windows of each domain, in the order of the checkpoints.
    """
    study, model = ready.study, ready.model()
    content = json.loads(rule) if rule.startswith(("{", "[")) else rule
    plain = rule_of(content, len(paths))
    base = load_file(ready.base)
    settings = Settings(threads=1)

    def at(factor: float, data: Mapping[str, Labelled]) -> dict[str, float]:
        model.load_state_dict(magmax.merge(calibrated(plain, how), base, paths, factor, settings=settings))
        if how in ("fsc", "dsc"):
            samples = [ready.validation[domain].items[: study.samples] for domain in study.order(seed)]
            calibrate_features(model, ready.base, paths, samples, next_tokens, settings=settings)
        return ready.perplexity(model, data)

    default = plain.default_factor
    found: dict[str, Any] = {"scaling_factor": default, "perplexity": at(default, ready.test)}
    if how == "none":
        search = {factor: mean_perplexity(at(factor, ready.validation)) for factor in sorted({default, *study.factors})}
        best = min(search, key=lambda factor: search[factor])
        found["search"] = {f"{factor:g}": score for factor, score in search.items()}
        found["chosen"] = {"scaling_factor": best, "perplexity": at(best, ready.test)}
    return found


def next_tokens(model: torch.nn.Module, items: Sequence[np.ndarray]) -> None:
    """Put windows through the model, as training does."""
    model(input_ids=torch.from_numpy(np.stack(items))[:, :-1], use_cache=False)


def mean_perplexity(of_domains: Mapping[str, float]) -> float:
    """The geometric mean: what the mean number of bits a byte is to perplexity."""
    return math.exp(sum(map(math.log, of_domains.values())) / len(of_domains))
