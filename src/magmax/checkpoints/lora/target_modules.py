"""What several LoRA adapters do to the same modules, seen without their base; and one adapter to be written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from ...errors import MagMaxError, list_problems
from ..dtypes import TensorSpec
from .peft import PEFT_PREFIX, LowRankUpdate, PeftAdapter, StoredFactor

MAX_UPDATE_ELEMENTS = 1 << 40
"""Elements of a dense update beyond which an adapter's shapes cannot be meant."""


class AdaptedLayer(NamedTuple):
    """A module that adapters target, whose update is a matrix (rows, columns).

    Attributes:
        is_embedding: whether its factors are those of an embedding, and so stored transposed.
        row_shape: the shape of a row, which is more than one length for a convolution.
    """

    module: str
    is_embedding: bool
    rows: int
    row_shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """The name of the weight in the base."""
        return f"{self.module}.weight"

    @property
    def columns(self) -> int:
        return TensorSpec("F32", self.row_shape).numel

    def factor_names(self) -> tuple[str, str]:
        """The names of A and B in an adapter's file."""
        kind = "lora_embedding_{}" if self.is_embedding else "lora_{}.weight"
        return tuple(f"{PEFT_PREFIX}{self.module}.{kind.format(letter)}" for letter in "AB")  # pyright: ignore[reportReturnType]

    def factor_specs(self, rank: int, dtype: str) -> dict[str, TensorSpec]:
        """The factors A and B as PEFT stores them, at a rank."""
        a, b = self.factor_names()
        if self.is_embedding:
            return {a: TensorSpec(dtype, (rank, self.rows)), b: TensorSpec(dtype, (self.columns, rank))}
        units = (1,) * (len(self.row_shape) - 1)
        return {a: TensorSpec(dtype, (rank, *self.row_shape)), b: TensorSpec(dtype, (self.rows, rank, *units))}


def adapted_layers(adapter: PeftAdapter) -> dict[AdaptedLayer, LowRankUpdate]:
    """Return what an adapter adds to each module that it targets.

    Raises:
        MagMaxError: one that lists all that has no meaning without the base: modules and biases saved in full, and
            factors that do not fit together.
    """
    problems = list(adapter.problems)
    frozen = frozen_weights(adapter)
    problems += [
        f"{adapter.label}: saves {name} in full, which can be merged only into its base; give --base BASE and leave "
        f"out "
        "--adapter-rank"
        for name in adapter.replacements.values()
        if name not in frozen
    ]
    updates: dict[AdaptedLayer, LowRankUpdate] = {}
    for module, embedding in adapter.factor_pairs:
        try:
            layer, update = _read_update(adapter, module, embedding)
            updates[layer] = update
        except MagMaxError as error:
            problems += error.problems
    if problems:
        raise list_problems(f"{adapter.label} cannot be merged into an adapter", problems)
    return updates


def frozen_weights(adapter: PeftAdapter) -> list[str]:
    """The base's own weights that PEFT saves with an adapter of an embedding or head: not tuned, at most resized."""
    modules = {f"{module}.base_layer.weight" for module, _ in adapter.factor_pairs}
    return [name for name in adapter.replacements.values() if name.removeprefix(PEFT_PREFIX) in modules]


def _read_update(adapter: PeftAdapter, module: str, is_embedding: bool) -> tuple[AdaptedLayer, LowRankUpdate]:
    name_a, name_b = adapter.factor_names(module, is_embedding)
    a, b = adapter.spec(name_a), adapter.spec(name_b)
    rank, scale = adapter.rank_and_scale(module)
    outer, units = b.shape[:1], (1,) * (len(a.shape) - 2)
    fits = len(a.shape) > 1 and a.shape[:1] == (rank,) and b.shape == (*outer, rank, *units)
    if not (fits and a.numel and b.numel and a.is_mergeable and b.is_mergeable) or (is_embedding and units):
        raise MagMaxError(
            f"{adapter.weights.label}: {name_a}, {a}, and {name_b}, {b}, are not the factors of an update at rank "
            f"{rank}"
        )
    by_a = StoredFactor(name_a, rank, a.numel // rank, is_rank_first=True)
    by_b = StoredFactor(name_b, rank, b.numel // rank, is_rank_first=False)
    if by_a.length * by_b.length > MAX_UPDATE_ELEMENTS:
        raise MagMaxError(f"{adapter.weights.label}: {name_a}, {a}, and {name_b}, {b}: no weight is as large as this")
    if is_embedding:
        return AdaptedLayer(module, True, by_a.length, outer), LowRankUpdate(by_a, by_b, scale)
    return AdaptedLayer(module, False, by_b.length, a.shape[1:]), LowRankUpdate(by_b, by_a, scale)


def common_layers(adapters: Sequence[PeftAdapter]) -> tuple[list[AdaptedLayer], list[dict[str, LowRankUpdate]]]:
    """All modules that any adapter targets, by name, and each adapter's updates by the name of the weight.

    Raises:
        MagMaxError: what `layers` refuses, and a module that has one shape in one adapter and another in the next.
    """
    everyones = [adapted_layers(folder) for folder in adapters]
    first_layers: dict[str, tuple[AdaptedLayer, PeftAdapter]] = {}
    problems: list[str] = []
    for folder, layer_updates in zip(adapters, everyones, strict=True):
        for layer in layer_updates:
            first, other = first_layers.setdefault(layer.key, (layer, folder))
            if first != layer:
                problems.append(
                    f"{folder.label}: {layer.module} is of shape {[layer.rows, *layer.row_shape]}"
                    f"{' (an embedding)' * layer.is_embedding}, but {[first.rows, *first.row_shape]}"
                    f"{' (an embedding)' * first.is_embedding} in {other.label}"
                )
    if problems:
        raise list_problems("the adapters do not match", problems)
    updates = [{layer.key: update for layer, update in layer_updates.items()} for layer_updates in everyones]
    return [first_layers[key][0] for key in sorted(first_layers)], updates


def merged_config(adapters: Sequence[PeftAdapter], ranks: Mapping[str, int]) -> bytes:
    """The adapter_config.json of an adapter with these ranks by module, whose scale s is 1 everywhere.

    What all the given adapters agree on of their base and task is kept.
    """
    shared = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
    kept: dict[str, Any] = {}
    for name in shared:
        values = [folder.config.get(name) for folder in adapters]
        kept[name] = values[0] if all(value == values[0] for value in values) else None
    rank = max(ranks.values())
    lower = {f"^{_escape(module)}": r for module, r in ranks.items() if r != rank}
    config = {
        **kept,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": _target_modules(adapters, list(ranks)),
        "fan_in_fan_out": any(folder.fan_in_fan_out for folder in adapters),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def _target_modules(adapters: Sequence[PeftAdapter], modules: Sequence[str]) -> list[str]:
    """Ends of names that stand for exactly these modules: the adapters' own, where they say it so; else all names."""
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    modules_of_all: set[str] = set()
    for folder in adapters:
        target_modules: Any = folder.config.get("target_modules")
        if not isinstance(target_modules, list) or any(folder.config.get(name) for name in narrowed):
            return sorted(modules)
        modules_of_all.update(name for name in cast("list[Any]", target_modules) if type(name) is str)
    covered = all(any(f".{module}".endswith(f".{name}") for name in modules_of_all) for module in modules)
    return sorted(modules_of_all) if covered else sorted(modules)


def _escape(module: str) -> str:
    """A name as an expression of itself, escaped no more than is needed."""
    return re.escape(module).replace("\\-", "-")
