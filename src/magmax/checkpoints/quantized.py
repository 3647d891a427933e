"""Quantised checkpoints: recognised by their settings and by their tensors, and refused.

Codes cannot be averaged, and scales that are merged without their codes make garbage of them. A format that is read one
day is opened in `checkpoints/__init__.py` instead of being refused there.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, cast

from ..errors import MagMaxError
from .base import Checkpoint, parse_json_object
from .dtypes import STORAGE_DTYPES

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where transformers and diffusers, compressed-tensors and MLX say in config.json how weights are quantised."""
CONFIG_DEPTH = 3
PLAIN_DTYPES = ("BOOL", "C64")
INDEX_DTYPES = ("I64", "U64")
"""Types of positions and counts, which are codes only under a name of weights."""
CODE_NAME = re.compile(r"(packed_|quantized_|int_|q_?)?weights?(_q|_int8)?|W_q|codes|B|bitmask")
"""The last part of a tensor's name where it is weights, so that a scale beside it is the scale of these."""
CODE_ENDING = re.compile(r"(?<=.)[_:](packed|quantized|qdata|q?data|int_data|blocks|codes|compressed|values|q)$")
COMPANION = re.compile(
    r"[._:]*(weight_)?((global_|block_|channel_|group_|nested_)?scales?(_inv|_\d+|_and_zeros?)?|scaling_factors?|"
    r"(nested_)?absmax|(nested_)?quant_map|quant_state\..+|q?zeros?(_points?)?|zp|g_idx|shape|SCB|scb|shift|codebooks?)"
)
"""What follows the name of quantised weights in the names of the tensors that decode them."""
MODULE_COMPANIONS = (
    "scale", "scales", "scale_weight", "weight_scale", "weight_scales", "wscales", "dequant_scale", "qzeros", "zeros",
    "zero", "zero_point", "zero_points", "g_idx", "SCB", "absmax", "codebook", "codebooks", "compressed", "s",
)  # fmt: skip
"""What the tensors that decode weights are called in the weights' module."""
DEQUANTIZE = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(dequantize=True)",
}
"""The settings with which transformers dequantises as it loads."""


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise MagMaxError if a checkpoint is quantised, with the method and the way to dequantise it."""
    method, sign = _find_in_config(checkpoint) or _find_in_tensors(checkpoint) or ("", "")
    if not sign:
        return
    settings = DEQUANTIZE.get(method)
    how = (
        f"AutoModel.from_pretrained(..., quantization_config={settings})" if settings else "model.dequantize()"
    ) + " and save_pretrained of transformers"
    stale = any(key in sign for key in CONFIG_KEYS) and not any(_is_code(s.dtype) for s in checkpoint.specs.values())
    advice = " If its weights are not quantised any more, take that out of its config.json." if stale else ""
    raise MagMaxError(
        f"{checkpoint.label}: is quantised ({sign}), and codes cannot be merged; give the model that it was quantised "
        f"from, or dequantise it first: {how}.{advice}"
    )


def _find_in_config(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The method that config.json names, and the words with which it does."""
    config = parse_json_object(checkpoint.read_small_file("config.json"))
    for key, settings in _find_settings(config, CONFIG_DEPTH):
        method = str(settings.get("quant_method") or settings.get("quant_algo") or settings.get("format") or "")
        is_off = settings.get("load_in_8bit") is False and settings.get("load_in_4bit") is False
        if not (is_off and method in ("bitsandbytes", "")):
            return method, f"{key} in its config.json" + (f": {method[:40]}" if method else "")
    return None


def _find_settings(config: Any, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of quantisation in a config and in those of its parts, such as text_config."""
    if not isinstance(config, dict) or not depth:
        return
    for key, value in cast("dict[str, Any]", config).items():
        if key in CONFIG_KEYS and isinstance(value, dict) and value:
            yield key, cast("dict[str, Any]", value)
        else:
            yield from _find_settings(value, depth - 1)


def _find_in_tensors(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """A tensor of codes and one that decodes it, as (method, words)."""
    names = sorted(checkpoint.specs)
    for key, spec in checkpoint.specs.items():
        if _is_code(spec.dtype) and (companion := _find_companion(key, checkpoint, names)):
            return "fp8" if companion.endswith("_scale_inv") else "", f"{key} is {spec.dtype}, decoded by {companion}"
    return None


def _is_code(dtype: str) -> bool:
    """Return whether a type may hold codes: neither the floating types that are merged nor truth values."""
    return dtype not in (*STORAGE_DTYPES, *PLAIN_DTYPES)


def _find_companion(key: str, checkpoint: Checkpoint, names: list[str]) -> str | None:
    """The tensor that decodes the codes `key`, if there is one.

    A name alone decides nothing: `logit_scale` beside `relative_position_index` scales something else.
    """
    module, _, last = key.rpartition(".")
    is_named_so = CODE_NAME.fullmatch(last) is not None
    if checkpoint.specs[key].dtype in INDEX_DTYPES and not is_named_so:
        return None
    stem = CODE_ENDING.sub("", key).removesuffix(".")
    place = bisect_left(names, stem)
    while place < len(names) and names[place].startswith(stem):
        if names[place] != key and COMPANION.fullmatch(names[place][len(stem) :]):
            return names[place]
        place += 1
    if not is_named_so:
        return None
    beside = (f"{module}.{name}" if module else name for name in MODULE_COMPANIONS)
    return next((name for name in beside if name in checkpoint.specs), None)
