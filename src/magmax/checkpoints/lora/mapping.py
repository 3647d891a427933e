"""A LoRA adapter matched to the base it was trained on: what each of its tensors does to which of the base's."""

from __future__ import annotations

from collections.abc import Set
from functools import cached_property
from typing import Any, cast

from ...errors import MagMaxError, list_problems
from ..base import Checkpoint
from ..dtypes import TensorSpec
from .peft import UNSUPPORTED_HINTS, LowRankUpdate, PeftAdapter, StoredFactor

CONV1D_ARCHITECTURES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""The model types of transformers whose weights are partly stored transposed (transformers' Conv1D)."""
CONV1D_MODULES = (["c_attn"], ["q_attn"], ["c_proj"], ["c_fc"])
"""The last part of the names of these architectures' transposed modules; all others are stored as usual."""


class AdapterMapping:
    """The tensors of an adapter's folder, matched to a base.

    Attributes:
        replacements: key -> the adapter's tensor that stands in its place (modules_to_save, biases, saved embeddings).
        updates: key -> what is added to it.
    """

    def __init__(self, adapter: PeftAdapter, base: Checkpoint) -> None:
        self._adapter, self._base = adapter, base
        self.replacements: dict[str, str] = {}
        self.updates: dict[str, LowRankUpdate] = {}
        self._square_keys: list[str] = []
        self._contradicting_key: str | None = None
        if problems := self._match():
            raise list_problems(f"{adapter.label} cannot be applied to {base.label}", problems)

    def source_spec(self, key: str) -> TensorSpec:
        """The spec of the tensor under `key` before any update: the adapter's copy, or the base's own."""
        return self._adapter.spec(self.replacements[key]) if key in self.replacements else self._base.specs[key]

    def _match(self) -> list[str]:
        """Fill `replacements` and `updates`; return all that cannot be used."""
        folder = self._adapter
        problems = list(folder.problems)
        self._tied = self._find_tied_names()
        targets = [f"{module}.weight" for module, _ in folder.factor_pairs]
        names = _match_names(targets, list(folder.replacements), self._base.specs.keys() | self._tied.keys())
        for key, name in folder.replacements.items():
            self._add_replacement(names[key], name, problems)
        for module, embedding in folder.factor_pairs:
            try:
                self._add_update(module, names[f"{module}.weight"], embedding)
            except MagMaxError as error:
                problems += error.problems
        if self._square_keys and (other := self._contradicting_key or self._transposed_key_of_base()):
            problems += [
                f"{folder.label}: {key} is square, and whether it is stored transposed cannot be known: fan_in_fan_out "
                f"is {str(folder.fan_in_fan_out).lower()}, which is not so for {other}; {UNSUPPORTED_HINTS}"
                for key in self._square_keys
            ]
        return problems

    def _find_tied_names(self) -> dict[str, str]:
        """Names that share a tensor of the base -> its name there: the base's aliases, and an output head that the base
        does not store because its config ties it to the token embedding."""
        tied = dict(self._base.aliases)
        embedding = find_tied_embedding(self._base)
        if embedding is None:
            return tied
        shape, adapter = self._base.specs[embedding].shape, self._adapter
        heads = [key for key, name in adapter.replacements.items() if adapter.spec(name).shape == shape]
        for (module, is_embedding), pair in adapter.factor_pairs.items():
            if is_embedding or len(pair) < 2:
                continue
            a, b = adapter.spec(pair["A"]).shape, adapter.spec(pair["B"]).shape
            if b[:1] + a[1:] == shape:
                heads.append(f"{module}.weight")
        ends = {part for key in self._base.specs for part in key.split(".")[-2:-1]}
        return tied | {head: embedding for head in heads if "." in head and head.split(".")[-2] not in ends}

    def _add_replacement(self, key: str, name: str, problems: list[str]) -> None:
        """Note a tensor that is saved in full; refuse one of several tied names, which PEFT parts from the others."""
        stored = self._tied.get(key, key)
        others = [other for other, first in self._tied.items() if first == stored]
        tied = bool(others) or stored == find_tied_embedding(self._base)
        # PEFT trains a copy of a module of modules_to_save, but the base's own biases, and saves what it leaves frozen.
        stays_tied = ".base_layer." in name or key.endswith(".bias") or self._adapter.config.get("ensure_weight_tying")
        if tied and not stays_tied:
            other = stored if stored != key else next(iter(others), "the output head")
            problems.append(
                f"{self._adapter.label}: saves {key} in full, but {self._base.label} ties it to {other}: PEFT trains "
                "one and leaves the other as it was; give a base that is not tied (tie_word_embeddings false in "
                "its config.json, and a copy of the embedding stored as the head)"
            )
        self.replacements.setdefault(stored, name)

    def _explain(self, name: str) -> str:
        """What to do about a targeted tensor that the base lacks: say how the base calls the nearest one."""
        keys, parts = self._base.specs.keys(), name.split(".")
        attention = f"{name.removesuffix('weight')}in_proj_weight"
        if name.endswith(".weight") and attention in keys:
            return f"LoRA on torch's MultiheadAttention ({attention}) is not supported; {UNSUPPORTED_HINTS}"
        if "experts" in parts and any(".experts.gate_up_proj" in key or ".experts.down_proj" in key for key in keys):
            return f"the base stores its experts as one tensor (as transformers 5 does); {UNSUPPORTED_HINTS}"
        for length in range(len(parts) - 1, 2, -1):
            end = "." + ".".join(parts[-length:])
            if like := [key for key in keys if key.endswith(end) or key == end[1:]]:
                ours, theirs = like[0].removesuffix(end[1:]), name.removesuffix(end[1:])
                return (
                    f"but it has {like[0]}: if only the names differ, as between versions of transformers, give the "
                    f"base with its names changed from {ours!r} to {theirs!r} (convert --rename)"
                )
        return "give the base that the adapter was trained on"

    @cached_property
    def _has_conv1d_names(self) -> bool:
        """Return whether the base's config names an architecture whose transposed modules are known by name."""
        config = self._base.read_config()
        return config.get("model_type") in CONV1D_ARCHITECTURES and not config.get("auto_map")

    def _is_square_transposed(self, key: str) -> bool:
        """Return whether a square weight is stored transposed: as its architecture says, or else as the adapter does.

        PEFT stores the fan_in_fan_out of the last module that it adapted, so where a model has modules of both kinds
        the adapter's own word is not enough: such keys are collected, to be refused.
        """
        if self._has_conv1d_names:
            return key.split(".")[-2:-1] in CONV1D_MODULES
        self._square_keys.append(key)
        return self._adapter.fan_in_fan_out

    def _transposed_key_of_base(self) -> str | None:
        """A weight of the base that is stored transposed, as the length of its bias shows, if the adapter has none."""
        specs = self._base.specs
        for key, (_, shape) in () if self._adapter.fan_in_fan_out else specs.items():
            bias = specs.get(f"{key.removesuffix('.weight')}.bias")
            if len(shape) == 2 and shape[0] != shape[1] and bias and bias.shape == shape[1:]:
                return key
        return None

    def _add_update(self, module: str, name: str, is_embedding: bool) -> None:
        """Note the update that a module's pair of factors makes. Raises MagMaxError where they do not fit."""
        folder, key = self._adapter, self._tied.get(name, name)
        name_a, name_b = folder.factor_names(module, is_embedding)
        if key not in self._base.specs and key not in self.replacements:
            raise MagMaxError(
                f"{folder.label}: targets {module}, but {self._base.label} has no tensor {name}; {self._explain(name)}"
            )
        if key in self.updates:
            raise MagMaxError(f"{folder.label}: targets {key} of {self._base.label} twice; {UNSUPPORTED_HINTS}")
        weight, a, b = self.source_spec(key), folder.spec(name_a), folder.spec(name_b)
        joined = f"{folder.weights.label}: cannot join {name_a}, {a}, and {name_b}, {b}, with {key}, {weight}"
        kinds = {a.dtype, b.dtype}
        if not (weight.is_mergeable and a.is_mergeable and b.is_mergeable) or (
            "F64" in kinds and weight.dtype != "F64"
        ):
            if not weight.is_mergeable:
                raise MagMaxError(
                    f"{joined} in {self._base.label}: the weight is stored as {weight.dtype}, as in quantised models; "
                    "give the base as it was before it was quantised"
                )
            raise MagMaxError(f"{joined} in {self._base.label}: these types do not go together; convert one of them")
        rank, scale = folder.rank_and_scale(module)
        rows, rest = weight.shape[:1], weight.shape[1:]
        units = (1,) * (len(rest) - 1)
        plain = rest != () and a.shape == (rank, *rest) and b.shape == (*rows, rank, *units)
        across = len(rest) == 1 and a.shape == (rank, *rows) and b.shape == (*rest, rank)
        if not across and (is_embedding or not plain):
            raise MagMaxError(
                f"{joined} in {self._base.label}, at rank {rank}: these shapes do not fit; "
                f"{folder.explain_shapes(module, a, b, weight)}"
            )
        is_square = plain and across and not is_embedding
        transposed = self._is_square_transposed(key) if is_square else across
        if not is_embedding and not is_square and len(rest) == 1 and across != folder.fan_in_fan_out:
            self._contradicting_key = key
        by_a = StoredFactor(name_a, rank, a.numel // rank, is_rank_first=True)
        by_b = StoredFactor(name_b, rank, b.numel // rank, is_rank_first=False)
        self.updates[key] = LowRankUpdate(by_a, by_b, scale) if transposed else LowRankUpdate(by_b, by_a, scale)


def _match_names(targets: list[str], others: list[str], keys: Set[str]) -> dict[str, str]:
    """For each of an adapter's names the base's: its own or, as transformers finds them, all with a first part (such as
    `transformer.`) dropped or added, where that is what makes every target one of the base's tensors."""
    firsts = {name.partition(".")[0] + "." for name in targets}
    changes = [("", ""), *((first, "") for first in sorted(firsts))]
    changes += [("", first) for first in sorted({key.partition(".")[0] + "." for key in keys})]
    wanted = [*targets, *others]
    for drop, add in changes:
        base_names = {name: name if name in keys else add + name.removeprefix(drop) for name in wanted}
        if keys >= {base_names[name] for name in targets}:
            return {name: new if new in keys else name for name, new in base_names.items()}
    return {name: name for name in wanted}


def find_tied_embedding(base: Checkpoint) -> str | None:
    """The token embedding of a base whose config says that the output head is tied to it; None where none is."""
    config = base.read_config()
    text = config.get("text_config")
    places = [config, cast("dict[str, Any]", text)] if isinstance(text, dict) else [config]
    if not any(place.get("tie_word_embeddings") is True for place in places):
        return None
    rows = next((place["vocab_size"] for place in places if type(place.get("vocab_size")) is int), None)
    found = [key for key, spec in base.specs.items() if len(spec.shape) == 2 and spec.shape[0] == rows]
    return next((key for key in found if "lm_head" not in key), None)
