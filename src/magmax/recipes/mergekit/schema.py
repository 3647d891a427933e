"""The keys of a mergekit recipe, as pydantic reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

STRICT_CONFIG = ConfigDict(extra="forbid", strict=True)


def _parse_reference(value: Any) -> Any:
    """A model as one string, PATH[@REVISION][+ADAPTER[@REVISION]], which mergekit also writes as a map."""
    if not isinstance(value, dict):
        return value
    if unknown := sorted(map(str, set(value) - {"model", "lora"})):
        raise ValueError(f"of a model written as a map only model and lora are supported, not {', '.join(unknown)}")
    halves = [value.get("model"), value.get("lora")]
    return "+".join(_parse_reference_part(half) for half in halves if half is not None)


def _parse_reference_part(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return f"{value.get('path')}@{value['revision']}" if value.get("revision") else str(value.get("path"))


def _parse_dtype(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


Reference = Annotated[str, BeforeValidator(_parse_reference)]
Dtype = Annotated[Literal["float16", "bfloat16", "float32", "float64"], BeforeValidator(_parse_dtype)]
Settings = dict[str, Any]
"""Parameters as they are written: a value, a list over the layers, or {filter, value} pairs."""


class MergekitModel(BaseModel):
    """A model, the range of its layers (the second number excluded), and its parameters."""

    model_config = STRICT_CONFIG
    model: Reference
    layer_range: list[int] | None = None
    parameters: Settings | None = None


class MergekitSlice(BaseModel):
    """Layers of the output, and where they come from."""

    model_config = STRICT_CONFIG
    sources: list[MergekitModel]
    base_model: Reference | None = None
    parameters: Settings | None = None


class MergekitRecipe(BaseModel):
    """A whole recipe."""

    model_config = STRICT_CONFIG
    merge_method: str
    base_model: Reference | None = None
    models: list[MergekitModel] | None = None
    slices: list[MergekitSlice] | None = None
    modules: Any = None
    parameters: Settings | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer: Any = None
    tokenizer_source: Any = None
    chat_template: Any = None


def valid_keys(parts: Sequence[str]) -> list[str]:
    """The valid keys beside a place in a recipe."""
    if len(parts) == 1:
        return list(MergekitRecipe.model_fields)
    return list((MergekitModel if parts[0] == "models" or "sources" in parts else MergekitSlice).model_fields)
