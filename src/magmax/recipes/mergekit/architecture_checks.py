"""What a mergekit recipe supposes of its models, checked once they are open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints import Checkpoint
from ...checkpoints.lora.adapted_model import LoraModel
from ...checkpoints.zero_base import ZeroBase
from ...errors import MagMaxError

Where = str
"""A file and the line of the key that supposes it."""


@dataclass(frozen=True)
class ArchitectureCheck:
    """Refuses models for which a recipe means something else in mergekit than here.

    Attributes:
        counted: whether weights, not differences from the base, are merged: then the base is all zeros.
        untyped: the recipe names no type, so all models must have one: mergekit would go on in the widest.
        ranges: the last layer, less one, that the recipe takes of all models.
        tokenizer: the recipe asks for a common vocabulary, so all models must have that already.
        template: the chat template it asks for, which must be the base's already.
    """

    counted: bool
    untyped: Where | None
    ranges: Sequence[tuple[Where, list[int]]]
    tokenizer: Where | None
    template: tuple[Where, str] | None

    def __call__(self, base: Checkpoint, models: Sequence[Checkpoint]) -> Checkpoint:
        for where, layer_range in self.ranges:
            if layer_range != [0, layers(base.specs)]:
                raise MagMaxError(
                    f"{where}: not supported here: a part of the layers; {base.label} has {layers(base.specs)}, and "
                    f"layer_range is {layer_range}"
                )
        if self.untyped:
            _check_same_dtype(self.untyped, base, models)
        if self.tokenizer:
            _check_same_vocabulary(self.tokenizer, base, models)
        if self.template:
            _check_chat_template(*self.template, base, models)
        return ZeroBase(base) if self.counted else base


def layers(names: Mapping[str, Any]) -> int:
    """The number of layers, told from tensor names: the first part of a name that is a number is a layer's."""
    stacks: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        place = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            stacks.setdefault(".".join(parts[:place]), set()).add(parts[place])
    return max(map(len, stacks.values()), default=0)


def _check_same_dtype(where: Where, base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    for model in models:
        for key, spec in base.output_specs.items():
            theirs = model.output_specs.get(model.resolve_alias(key))
            if theirs and spec.is_mergeable and theirs.dtype != spec.dtype:
                raise MagMaxError(
                    f"{where}: the models have several types ({key} is {spec.dtype} in {base.label} and {theirs.dtype} "
                    f"in {model.label}), and the recipe names none; give it a dtype or an out_dtype"
                )


def _check_same_vocabulary(where: Where, base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    wanted = _read_vocabulary(base)
    for model in [base, *models]:
        vocabulary = _read_vocabulary(model)
        if vocabulary is None or vocabulary != wanted:
            why = "has no tokenizer.json" if vocabulary is None else f"has another vocabulary than {base.label}"
            raise MagMaxError(
                f"{where}: not supported here: bringing vocabularies together; {model.label} {why}. If the models have "
                "the same tokens, take the key out: the base's tokenizer is copied"
            )


def _check_chat_template(where: Where, wanted: str, base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    base_template = _read_chat_template(base)
    others = {_read_chat_template(model) for model in models} - {None} if wanted == "auto" else {wanted.strip()}
    if others - {base_template}:
        raise MagMaxError(
            f"{where}: not supported here: a chat template other than the base's; take the key out and put the "
            "template into the merged folder yourself"
        )


def _read_vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Token -> number, of the tokenizer beside the weights; None where there is none."""
    content = _read_json(checkpoint, "tokenizer.json")
    tokens = content.get("model", {}).get("vocab")
    if isinstance(tokens, list):
        tokens = {token: number for number, (token, _) in enumerate(tokens)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return None if tokens is None else {**tokens, **added}


def _read_chat_template(checkpoint: Checkpoint) -> str | None:
    file = _find_file(checkpoint, "chat_template.jinja")
    text = file.read_text("utf-8") if file else None
    text = text or _read_json(checkpoint, "tokenizer_config.json").get("chat_template")
    return text.strip() if isinstance(text, str) else None


def _read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    file = _find_file(checkpoint, name)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MagMaxError(f"{file}: cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _find_file(checkpoint: Checkpoint, name: str) -> Path | None:
    """The file beside the weights: an adapter's own, where it has one, or else its base's."""
    folders = [checkpoint.path if isinstance(checkpoint, LoraModel) else None, checkpoint.small_files_folder()]
    return next((folder / name for folder in folders if folder is not None and (folder / name).is_file()), None)
