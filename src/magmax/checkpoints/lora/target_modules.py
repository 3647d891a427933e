"""What several LoRA adapters do to the same modules, seen without their base; and one adapter to be written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from ...errors import MagMaxError, listed
from ..dtypes import Spec
from .peft import PREFIX, Factor, PeftFolder, Update

FACTOR_LIMIT = 1 << 40
"""Elements of a dense update beyond which an adapter's shapes cannot be meant."""


class Layer(NamedTuple):
    """A module that adapters target, whose update is a matrix (rows, columns).

    Attributes:
        embedding: whether its factors are those of an embedding, and so stored transposed.
        rest: the shape of a row, which is more than one length for a convolution.
    """

    module: str
    embedding: bool
    rows: int
    rest: tuple[int, ...]

    @property
    def key(self) -> str:
        """The name of the weight in the base."""
        return f"{self.module}.weight"

    @property
    def columns(self) -> int:
        return Spec("F32", self.rest).elements

    def names(self) -> tuple[str, str]:
        """The names of A and B in an adapter's file."""
        kind = "lora_embedding_{}" if self.embedding else "lora_{}.weight"
        return tuple(f"{PREFIX}{self.module}.{kind.format(letter)}" for letter in "AB")  # pyright: ignore[reportReturnType]

    def specs(self, rank: int, dtype: str) -> dict[str, Spec]:
        """The factors A and B as PEFT stores them, at a rank."""
        a, b = self.names()
        if self.embedding:
            return {a: Spec(dtype, (rank, self.rows)), b: Spec(dtype, (self.columns, rank))}
        units = (1,) * (len(self.rest) - 1)
        return {a: Spec(dtype, (rank, *self.rest)), b: Spec(dtype, (self.rows, rank, *units))}


def layers(folder: PeftFolder) -> dict[Layer, Update]:
    """What an adapter adds to each module that it targets.

    Raises:
        MagMaxError: one that lists all that has no meaning without the base: modules and biases saved in full, and
            factors that do not fit together.
    """
    problems = list(folder.problems)
    frozen = frozen_weights(folder)
    problems += [
        f"{folder.label}: saves {name} in full, which can be merged only into its base; give --base BASE and leave out "
        "--adapter-rank"
        for name in folder.copies.values()
        if name not in frozen
    ]
    found: dict[Layer, Update] = {}
    for module, embedding in folder.pairs:
        try:
            layer, update = _layer(folder, module, embedding)
            found[layer] = update
        except MagMaxError as error:
            problems.append(str(error))
    if problems:
        raise listed(f"{folder.label} cannot be merged into an adapter", problems)
    return found


def frozen_weights(folder: PeftFolder) -> list[str]:
    """The base's own weights that PEFT saves with an adapter of an embedding or head: not tuned, at most resized."""
    modules = {f"{module}.base_layer.weight" for module, _ in folder.pairs}
    return [name for name in folder.copies.values() if name.removeprefix(PREFIX) in modules]


def _layer(folder: PeftFolder, module: str, embedding: bool) -> tuple[Layer, Update]:
    name_a, name_b = folder.pair(module, embedding)
    a, b = folder.spec(name_a), folder.spec(name_b)
    rank, scale = folder.rank_and_scale(module)
    outer, units = b.shape[:1], (1,) * (len(a.shape) - 2)
    fits = len(a.shape) > 1 and a.shape[:1] == (rank,) and b.shape == (*outer, rank, *units)
    if not (fits and a.elements and b.elements and a.floating and b.floating) or (embedding and units):
        raise MagMaxError(
            f"{folder.weights.label}: {name_a}, {a}, and {name_b}, {b}, are not the factors of an update at rank {rank}"
        )
    by_a = Factor(name_a, rank, a.elements // rank, rank_first=True)
    by_b = Factor(name_b, rank, b.elements // rank, rank_first=False)
    if by_a.length * by_b.length > FACTOR_LIMIT:
        raise MagMaxError(f"{folder.weights.label}: {name_a}, {a}, and {name_b}, {b}: no weight is as large as this")
    if embedding:
        return Layer(module, True, by_a.length, outer), Update(by_a, by_b, scale)
    return Layer(module, False, by_b.length, a.shape[1:]), Update(by_b, by_a, scale)


def same_layers(folders: Sequence[PeftFolder]) -> tuple[list[Layer], list[dict[str, Update]]]:
    """All modules that any adapter targets, by name, and each adapter's updates by the name of the weight.

    Raises:
        MagMaxError: what `layers` refuses, and a module that has one shape in one adapter and another in the next.
    """
    everyones = [layers(folder) for folder in folders]
    known: dict[str, tuple[Layer, PeftFolder]] = {}
    problems: list[str] = []
    for folder, own in zip(folders, everyones, strict=True):
        for layer in own:
            first, other = known.setdefault(layer.key, (layer, folder))
            if first != layer:
                problems.append(
                    f"{folder.label}: {layer.module} is of shape {[layer.rows, *layer.rest]}"
                    f"{' (an embedding)' * layer.embedding}, but {[first.rows, *first.rest]}"
                    f"{' (an embedding)' * first.embedding} in {other.label}"
                )
    if problems:
        raise listed("the adapters do not match", problems)
    updates = [{layer.key: update for layer, update in own.items()} for own in everyones]
    return [known[key][0] for key in sorted(known)], updates


def config_of(folders: Sequence[PeftFolder], ranks: Mapping[str, int]) -> bytes:
    """The adapter_config.json of an adapter with these ranks by module, whose scale s is 1 everywhere.

    What all the given adapters agree on of their base and task is kept.
    """
    shared = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
    kept: dict[str, Any] = {}
    for name in shared:
        values = [folder.settings.get(name) for folder in folders]
        kept[name] = values[0] if all(value == values[0] for value in values) else None
    rank = max(ranks.values())
    lower = {f"^{_escaped(module)}": r for module, r in ranks.items() if r != rank}
    config = {
        **kept,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": _targets(folders, list(ranks)),
        "fan_in_fan_out": any(folder.transposed for folder in folders),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def _targets(folders: Sequence[PeftFolder], modules: Sequence[str]) -> list[str]:
    """Ends of names that stand for exactly these modules: the adapters' own, where they say it so; else all names."""
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    own: set[str] = set()
    for folder in folders:
        given: Any = folder.settings.get("target_modules")
        if not isinstance(given, list) or any(folder.settings.get(name) for name in narrowed):
            return sorted(modules)
        own.update(name for name in cast("list[Any]", given) if type(name) is str)
    covered = all(any(f".{module}".endswith(f".{name}") for name in own) for module in modules)
    return sorted(own) if covered else sorted(modules)


def _escaped(module: str) -> str:
    """A name as an expression of itself, escaped no more than is needed."""
    return re.escape(module).replace("\\-", "-")
