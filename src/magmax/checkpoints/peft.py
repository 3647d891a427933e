"""What a folder written by PEFT says: its LoRA settings, and what each of its tensors does to a base."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import xxhash

from ..errors import MagMaxError, listed
from .base import Checkpoint
from .dtypes import Spec
from .memory import open_pickle
from .safetensors import SafetensorsFile

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_METHODS = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
"""Settings under which the tuned weight is more than W + s * B A."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they are."""
INSTEAD = "merge the adapter with PEFT (merge_and_unload), save the model and give that"


class Factor(NamedTuple):
    """A stored matrix to be read as (rank, length): as it is, or transposed where it is stored (length, rank)."""

    name: str
    rank: int
    length: int
    rank_first: bool


class Update(NamedTuple):
    """scale * (left^T right), to be added to a weight that has `left`'s length of rows, each of `right`'s."""

    left: Factor
    right: Factor
    scale: float


class Adapter:
    """The settings and tensors of an adapter's folder, matched to a base.

    Attributes:
        copies: key -> the adapter's tensor that stands in its place (modules_to_save, biases, saved embeddings).
        updates: key -> what is added to it.
    """

    def __init__(self, folder: Path, base: Checkpoint, label: str) -> None:
        self.label, self._base, self._config = label, base, folder / CONFIG
        self._settings = self._read_settings()
        self._transposed = self._settings.get("fan_in_fan_out") is True
        self.weights = self._open_weights(folder)
        self.copies: dict[str, str] = {}
        self.updates: dict[str, Update] = {}
        self._square: list[str] = []
        self._against: str | None = None
        if problems := self._match():
            raise listed(f"{label} cannot be applied to {base.label}", problems)

    def files(self) -> list[Path]:
        return [self._config, *self.weights.files()]

    def header_digests(self) -> list[str]:
        return [self._config_digest, *self.weights.header_digests()]

    def source(self, key: str) -> Spec:
        """The spec of the tensor under `key` before any update: the adapter's copy, or the base's own."""
        return self.weights.spec(self.copies[key]) if key in self.copies else self._base.specs[key]

    def _read_settings(self) -> dict[str, Any]:
        try:
            text = self._config.read_bytes()
            read: Any = json.loads(text.decode())
        except (OSError, ValueError, RecursionError) as error:
            raise MagMaxError(f"{self._config}: cannot be read as an adapter's settings ({error})") from error
        self._config_digest = xxhash.xxh3_128_hexdigest(text)
        if not isinstance(read, dict) or cast("dict[str, Any]", read).get("peft_type") != "LORA":
            kind = cast("dict[str, Any]", read).get("peft_type") if isinstance(read, dict) else None
            raise MagMaxError(f"{self._config}: peft_type is {kind!r}, and only 'LORA' can be read; {INSTEAD}")
        settings = cast("dict[str, Any]", read)
        problems = [
            f"{self._config}: {name} is {settings[name]!r}, which is not supported; {INSTEAD}"
            for name in OTHER_METHODS
            if settings.get(name)
        ]
        if settings.get("init_lora_weights") not in PLAIN_STARTS:
            start = settings["init_lora_weights"]
            problems.append(f"{self._config}: init_lora_weights {start!r} changes the base's own weights; {INSTEAD}")
        if problems:
            raise listed(f"{self.label} is not a plain LoRA adapter", problems)
        return settings

    def _open_weights(self, folder: Path) -> Checkpoint:
        file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise MagMaxError(f"{self.label}: has {CONFIG}, but no {WEIGHTS[0]}; copy the whole folder again")
        return SafetensorsFile(file) if file.suffix == ".safetensors" else open_pickle(file, str(file))

    def _match(self) -> list[str]:
        """Fill `copies` and `updates`; return all that cannot be used."""
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        copies: dict[str, str] = {}
        problems: list[str] = []
        for name in [*self.weights.specs, *self.weights.aliases]:
            plain = name.removeprefix("base_model.model.")
            if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)", plain):
                pairs.setdefault((match[1], match[2] is not None), {})[match[3]] = name
            elif re.search(r"(^|\.)(lora_|token_adapter\.|trainable_tokens_)", plain):
                problems.append(f"{self.weights.label}: {name} is of a kind that is not supported; {INSTEAD}")
            elif ".original_module." not in plain:
                copies[plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
        if not pairs and not copies and not problems:
            problems.append(f"{self.weights.label}: holds no tensor of an adapter; save it again with PEFT")
        names = _names([f"{module}.weight" for module, _ in pairs], list(copies), self._base)
        self.copies = {names[key]: name for key, name in copies.items()}
        for (module, embedding), pair in pairs.items():
            try:
                self._add(module, names[f"{module}.weight"], embedding, pair)
            except MagMaxError as error:
                problems.append(str(error))
        if self._against:
            problems += [
                f"{self.label}: {key} is square, and whether it is stored transposed cannot be known: fan_in_fan_out "
                f"is {str(self._transposed).lower()}, which is not so for {self._against}; {INSTEAD}"
                for key in self._square
            ]
        return problems

    def _add(self, module: str, name: str, embedding: bool, pair: dict[str, str]) -> None:
        """Note the update that a module's pair of factors makes. Raises MagMaxError where they do not fit."""
        key = self._base.resolve(name)
        if len(pair) < 2:
            ((letter, half),) = pair.items()
            other = "B" if letter == "A" else "A"
            raise MagMaxError(f"{self.weights.label}: holds {half}, but not the lora_{other} to it; copy it again")
        if key not in self._base.specs and key not in self.copies:
            raise MagMaxError(
                f"{self.label}: targets {module}, but {self._base.label} has no tensor {name}; "
                "give the base that the adapter was trained on"
            )
        if key in self.updates:
            raise MagMaxError(f"{self.label}: targets {key} of {self._base.label} twice; {INSTEAD}")
        weight, a, b = self.source(key), self.weights.spec(pair["A"]), self.weights.spec(pair["B"])
        joined = f"{self.weights.label}: cannot join {pair['A']}, {a}, and {pair['B']}, {b}, with {key}, {weight}"
        kinds = {a.dtype, b.dtype}
        if not (weight.floating and a.floating and b.floating) or ("F64" in kinds and weight.dtype != "F64"):
            raise MagMaxError(f"{joined} in {self._base.label}: these types do not go together; convert one of them")
        rank, scale = self._rank_and_scale(module)
        rows, rest = weight.shape[:1], weight.shape[1:]
        units = (1,) * (len(rest) - 1)
        plain = rest != () and a.shape == (rank, *rest) and b.shape == (*rows, rank, *units)
        across = len(rest) == 1 and a.shape == (rank, *rows) and b.shape == (*rest, rank)
        if not across and (embedding or not plain):
            raise MagMaxError(
                f"{joined} in {self._base.label}, at rank {rank}: these shapes do not fit; "
                "give the base that the adapter was trained on"
            )
        if plain and across and not embedding:
            self._square.append(key)
        elif not embedding and len(rest) == 1 and across != self._transposed:
            self._against = key
        transposed = across and (embedding or not plain or self._transposed)
        by_a = Factor(pair["A"], rank, a.elements // rank, rank_first=True)
        by_b = Factor(pair["B"], rank, b.elements // rank, rank_first=False)
        self.updates[key] = Update(by_a, by_b, scale) if transposed else Update(by_b, by_a, scale)

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        """r, and lora_alpha / r or lora_alpha / sqrt(r), after the patterns that name the module."""
        rank, alpha = self._setting("rank_pattern", "r", module), self._setting("alpha_pattern", "lora_alpha", module)
        if type(rank) is not int or rank < 1:
            raise MagMaxError(f"{self._config}: the rank r of {module} is {rank!r}; it must be a positive whole number")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise MagMaxError(f"{self._config}: lora_alpha of {module} is {alpha!r}; it must be a finite number")
        return rank, alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _setting(self, patterns: str, name: str, module: str) -> Any:
        found: Any = self._settings.get(patterns) or {}
        if not isinstance(found, dict):
            raise MagMaxError(f"{self._config}: {patterns} is {found!r}; it must be a map of module names to numbers")
        for pattern, value in cast("dict[str, Any]", found).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except (re.error, RecursionError, OverflowError) as error:
                raise MagMaxError(f"{self._config}: {patterns} has a bad expression {pattern!r}: {error}") from error
        return self._settings.get(name, 8)


def _names(targets: list[str], others: list[str], base: Checkpoint) -> dict[str, str]:
    """For each of an adapter's names the base's: its own or, as transformers finds them, all with a first part (such as
    `transformer.`) dropped or added, where that is what makes every target one of the base's tensors."""
    keys = base.specs.keys() | base.aliases.keys()
    firsts = {name.partition(".")[0] + "." for name in targets}
    changes = [("", ""), *((first, "") for first in sorted(firsts))]
    changes += [("", first) for first in sorted({key.partition(".")[0] + "." for key in keys})]
    wanted = [*targets, *others]
    for drop, add in changes:
        found = {name: name if name in keys else add + name.removeprefix(drop) for name in wanted}
        if keys.issuperset(found[name] for name in targets):
            return {name: new if new in keys else name for name, new in found.items()}
    return {name: name for name in wanted}
