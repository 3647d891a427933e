"""What a model's config and tokenizer say otherwise than the base's, whose files the output gets."""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
from collections.abc import Sequence
from typing import Any, cast

from ..checkpoints import Checkpoint
from ..checkpoints.base import read_small

OTHER_SETTINGS = re.compile(
    r"_.*|.*_version|architectures|auto_map|(torch_)?dtype|use_cache|output_.*|gradient_checkpointing|.*drop(out)?(_.*)?|"
    r".*_token_id|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|vocab_size|.*initializer.*"
)
"""The settings of a config.json that may differ between a model and its base: training, labels, special tokens."""


def note_differences(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Add to the notes of each model what its config.json and tokenizer.json say otherwise than the base's.

    The output gets the base's files. Weights of equal shapes that were trained with another rope_theta, another number
    of heads or other token numbers merge without an error into a model that makes no sense.
    """
    for model in models:
        settings, their_settings = map(_list_settings, _read_differing(base, model, "config.json"))
        differing = [
            f"{name} {reprlib.repr(their_settings[name])} (base: {reprlib.repr(value)})"
            for name, value in settings.items()
            if name in their_settings and their_settings[name] != value
        ]
        if differing:
            model.notes.append(
                f"{model.label}: its config.json is not the base's, which the output gets: {_list_few(differing)}"
            )
        numbers, their_numbers = map(_number_tokens, _read_differing(base, model, "tokenizer.json"))
        moved = [
            f"{token!r} {their_numbers[token]} (base: {number})"
            for token, number in numbers.items()
            if their_numbers.get(token, number) != number
        ]
        if moved:
            model.notes.append(
                f"{model.label}: its tokenizer.json numbers tokens otherwise than the base's, so rows of different "
                f"tokens are merged: {_list_few(moved)}"
            )


def _read_differing(base: Checkpoint, model: Checkpoint, name: str) -> tuple[Any, Any]:
    """The parsed file of this name of the base and of a model; None for both where one is missing or they are equal."""
    folders = [None if c.url else c.small_files_folder() for c in (base, model)]
    with contextlib.suppress(OSError, ValueError, RecursionError):
        ours, theirs = [read_small(folder / name) for folder in folders if folder]
        if ours != theirs:  # a tokenizer takes far longer to parse than to read
            return json.loads(ours), json.loads(theirs)
    return None, None


def _list_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings that say what the weights compute, as a.b -> value, without those that do not."""
    if not isinstance(config, dict):
        return {}
    settings: dict[str, Any] = {}
    for name, value in cast("dict[str, Any]", config).items():
        if not OTHER_SETTINGS.fullmatch(name):
            settings |= _list_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return settings


def _number_tokens(tokenizer: Any) -> dict[str, int]:
    """Token -> number, as a tokenizer.json says; empty where it does not."""
    try:
        tokens = tokenizer["model"]["vocab"]
        if isinstance(tokens, list):
            tokens = {token: number for number, (token, _) in enumerate(cast("list[Any]", tokens))}
        return {**tokens, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _list_few(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5:,} more" if len(items) > 5 else "")
