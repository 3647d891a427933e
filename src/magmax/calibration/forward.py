"""Putting items through a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[nn.Module, Sequence[Any]], Any]
"""run(model, items): put these items through the model; what it returns does not matter."""

TOKEN_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def run_items(model: nn.Module, items: Sequence[Any]) -> None:
    """Put items through a model, one by one, so that no item is padded for the sake of another.

    An item is a sequence of token ids, for model(input_ids=...); a map of the model's arguments, as a tokenizer or an
    image processor of Hugging Face makes it; or an array or tensor of floating numbers, such as an image, for
    model(item). Each without a dimension for the batch; a map may have it.
    """
    for item in items:
        if isinstance(item, Mapping):
            model(**{key: _move_to_model(model, _add_batch_dimension(str(key), value)) for key, value in item.items()})
            continue
        values = torch.as_tensor(np.asarray(item) if isinstance(item, list | tuple) else item)
        if values.is_floating_point() or values.dtype == torch.uint8:
            model(_move_to_model(model, values[None].float() if values.dtype == torch.uint8 else values[None]))
        else:
            model(input_ids=_move_to_model(model, values[None]))


def _add_batch_dimension(key: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(np.asarray(value) if isinstance(value, list | tuple) else value)
    alone = tensor.dim() == 1 if key in TOKEN_ARGUMENTS else key == "pixel_values" and tensor.dim() == 3
    return tensor[None] if alone else tensor


def _move_to_model(model: nn.Module, tensor: Tensor) -> Tensor:
    """On the model's device, floating numbers in its type."""
    like = next(model.parameters())
    return tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)
