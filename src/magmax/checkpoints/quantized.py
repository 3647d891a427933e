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
from .base import Checkpoint
from .dtypes import STORAGE_DTYPES

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where transformers and diffusers, compressed-tensors and MLX say in config.json how weights are quantised."""
CONFIG_DEPTH = 3
PLAIN_DTYPES = ("BOOL", "C64")
INDEX_DTYPES = ("I64", "U64")
"""Types of positions and counts, which are codes only where their own name and a companion's say so."""
CODE_NAME = re.compile(r"(packed_|quantized_|int_|q_?)?weights?(_q|_int8)?|W_q|codes|B|bitmask|trellis|Qidxs")
"""The last part of a tensor's name where it is weights, so that a scale beside it is the scale of these."""
CODE_ENDING = re.compile(r"(?<=.)[_:](packed|quantized|quant|qdata|q?data|int_data|blocks|codes|compressed|values|q)$")
COMPANION = re.compile(
    r"[._:]*(weight_)?((global_|block_|channel_|group_|nested_)?scales?(_inv|_\d+|_and_zeros?)?|scaling_factors?|"
    r"(nested_)?absmax|(nested_)?quant_map|quant_state\..+|q?zeros?(_points?)?|zp|g_idx|shape|SCB|scb|shift|codebooks?)"
)
"""What follows the name of quantised weights in the names of the tensors that decode them."""
MODULE_COMPANIONS = (
    "scale", "scales", "scale_weight", "weight_scale", "weight_scales", "wscales", "dequant_scale", "qzeros", "zeros",
    "zero", "zero_point", "zero_points", "g_idx", "SCB", "absmax", "codebook", "codebooks", "compressed", "s",
    "q_scale", "suh", "SU", "Wscale",
)  # fmt: skip
"""What the tensors that decode weights are called in the weights' module."""
METHODS = {
    r"_scale_inv$": "fp8", r"_blocks ": "mxfp4", r"absmax|quant_map|quant_state|SCB": "bitsandbytes",
    r"weight_packed ": "compressed-tensors", r"qweight ": "GPTQ or AWQ", r"W_q ": "HQQ", r"codes ": "AQLM",
    r"trellis |q_weight ": "EXL2 or EXL3", r"Qidxs ": "QuIP#",
    r"\._data ": "quanto",
}  # fmt: skip
"""A pattern of the codes' and the companion's names -> the method that writes them."""
DEQUANTIZE = {
    "fp8": "with transformers: quantization_config=FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "with transformers: quantization_config=Mxfp4Config(dequantize=True)",
    "compressed-tensors": "with transformers: quantization_config=CompressedTensorsConfig(dequantize=True)",
    "bitsandbytes": "with transformers: model.dequantize()",
}
"""How a model is loaded with floating weights, where transformers can."""


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise MagMaxError if a checkpoint is quantised, with the method and the way to dequantise it."""
    found = _find_in_config(checkpoint)
    method, sign = found or _find_in_tensors(checkpoint) or ("", "")
    if not sign:
        return
    remedy = "give the model that it was quantised from"
    if how := DEQUANTIZE.get(method):
        remedy += f", or dequantise it {how}, and save_pretrained"
    if found and not any(_is_code(spec.dtype) for spec in checkpoint.specs.values()):
        remedy += "; if its weights are not quantised any more, take that out of its config.json"
    by = f" with {method}" * bool(method)
    raise MagMaxError(f"{checkpoint.label}: is quantised{by} ({sign}), and codes cannot be merged; {remedy}")


def _find_in_config(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The method that config.json names, and the words with which it does."""
    config = checkpoint.read_config()
    for key, settings in _find_settings(config, CONFIG_DEPTH):
        method = str(settings.get("quant_method") or settings.get("quant_algo") or settings.get("format") or "")
        is_off = settings.get("load_in_8bit") is False and settings.get("load_in_4bit") is False
        if not (is_off and method in ("bitsandbytes", "")):
            is_bitsandbytes = "load_in_4bit" in settings or "load_in_8bit" in settings
            return (method or "bitsandbytes" * is_bitsandbytes)[:40], f"{key} in its config.json"
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
            names_of_both = f"{key} {companion}"
            method = next((name for pattern, name in METHODS.items() if re.search(pattern, names_of_both)), "")
            return method, f"{key} is {spec.dtype}, decoded by {companion}"
    return None


def _is_code(dtype: str) -> bool:
    """Return whether a type may hold codes: neither the floating types that are merged nor truth values."""
    return dtype not in (*STORAGE_DTYPES, *PLAIN_DTYPES)


def _find_companion(key: str, checkpoint: Checkpoint, names: list[str]) -> str | None:
    """The tensor that decodes the codes `key`, if there is one.

    A name alone decides nothing: `logit_scale` beside `relative_position_index` scales something else.
    """
    module, _, last = key.rpartition(".")
    is_named_so, is_wide = CODE_NAME.fullmatch(last) is not None, checkpoint.specs[key].dtype in INDEX_DTYPES
    if is_wide and not is_named_so:
        return None
    stem = CODE_ENDING.sub("", key).removesuffix(".")
    place = bisect_left(names, stem)
    while place < len(names) and names[place].startswith(stem):
        if names[place] != key and COMPANION.fullmatch(names[place][len(stem) :]):
            return names[place]
        place += 1
    if is_wide or not is_named_so:
        return None
    beside = (f"{module}.{name}" if module else name for name in MODULE_COMPANIONS)
    return next((name for name in beside if name in checkpoint.specs), None)
