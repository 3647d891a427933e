"""Coefficients folded into weights: W = W_0 + xi (W_m - W_0), in a module or on the way to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.dtypes import compute_dtype, narrow, widen
from ..errors import MagMaxError
from ..merging.pipeline import InputBlock, Kernel, WrappedKernel
from ..merging.reader import cast_units, is_finite

if TYPE_CHECKING:
    from torch import Tensor

Coefficients = dict[str, NDArray[np.float64]]
"""For a tensor's key its xi: of shape () for all of it, or one for each row of shape (rows,). No key, no change."""


def multiply_coefficients(first: Coefficients, second: Coefficients) -> Coefficients:
    """Both, one after the other."""
    joined: Coefficients = {}
    for key in [*first, *(key for key in second if key not in first)]:
        joined[key] = first.get(key, np.ones(())) * second.get(key, np.ones(()))
    return joined


def fold_arrays(base: NDArray[Any], merged: NDArray[Any], xi: NDArray[Any]) -> NDArray[Any]:
    """base + xi (merged - base), each step rounded by itself; where xi is 1 the merged number, to the bit."""
    xi = xi.astype(merged.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = merged - base
        moved *= xi
        moved += base
    return np.where(xi == 1, merged, moved)


def fold_tensor(values: Tensor, base: Tensor, xi: float) -> None:
    """The same in place, on a module's weights; `base` in the type to compute in."""
    if xi != 1:
        moved = values.to(base.dtype).sub(base)
        values.copy_(moved.mul_(xi).add_(base))


def fold_state(state: Mapping[str, Tensor], base: Checkpoint, coefficients: Coefficients) -> None:
    """Fold coefficients into a module's state dict, in place, one tensor of the base in memory at a time."""
    import torch

    for key, xi in coefficients.items():
        spec, values = base.spec(key), state[key]
        base_values = read_widened(base, key)
        merged = values.detach().to(torch.from_numpy(base_values).dtype).cpu().numpy().reshape(-1)
        folded = fold_arrays(base_values, merged, coefficient_per_unit(xi, spec, 0, spec.num_units))
        values.copy_(torch.from_numpy(folded).reshape(spec.shape))


def read_widened(checkpoint: Checkpoint, key: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Elements start..stop of a flattened tensor as numbers."""
    name, spec = checkpoint.resolve_alias(key), checkpoint.spec(key)
    stored = checkpoint.read(name, start, spec.num_units if stop is None else stop)
    return widen(stored, spec.dtype, compute_dtype(spec.dtype))


def coefficient_per_unit(xi: NDArray[np.float64], spec: TensorSpec, start: int, stop: int) -> NDArray[np.float64]:
    """The coefficient of each element start..stop of the flattened tensor."""
    if not xi.ndim:
        return xi
    row = max(1, spec.numel // spec.shape[0])
    return xi[np.arange(start, stop) // row]


class InMemoryCheckpoint(Checkpoint):
    """A merge that has not been written: flat arrays of stored units."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], tensors: Mapping[str, NDArray[Any]], aliases: dict[str, str]
    ) -> None:
        super().__init__("the merged model", dict(specs))
        self.aliases, self._tensors = aliases, tensors

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._tensors[key][start:stop].copy()

    def files(self) -> list[Path]:
        return []


@dataclass(frozen=True)
class FoldKernel(Kernel):
    """The calibrated tensor of one block. Input 0 is the base, 1 the merged model; the rest are read for their digests.

    Attributes:
        out: the specs of what is written: those of the merged model.
    """

    inputs: tuple[Checkpoint, ...]
    coefficients: Coefficients
    out: Mapping[str, TensorSpec]

    def __call__(self, block: InputBlock) -> list[NDArray[Any]]:
        base = block.read(0)
        for number in range(2, len(self.inputs)):
            block.read_for_digest(number)
        out = self.out[block.key]
        merged = cast_units(block.read(1), block.key, block.spec(1).dtype, out.dtype)
        return [fold_block(block, base, block.spec(0), merged, out, self.coefficients)]


@dataclass(frozen=True)
class FoldAfterMerge(WrappedKernel[Kernel]):
    """A merge, and then its calibration: what another kernel makes of a block, folded. Input 0 is the base."""

    coefficients: Coefficients
    out: Mapping[str, TensorSpec]

    def __call__(self, block: InputBlock) -> list[NDArray[Any]]:
        (merged,) = self.merge(block)
        assert merged is not None
        return [fold_block(block, block.read(0), block.spec(0), merged, self.out[block.key], self.coefficients)]


def fold_block(
    block: InputBlock,
    base: NDArray[Any],
    spec: TensorSpec,
    merged: NDArray[Any],
    out: TensorSpec,
    coefficients: Coefficients,
) -> NDArray[Any]:
    """A block's stored units, folded where its tensor has a coefficient; refuses what overflows."""
    xi = coefficients.get(block.key)
    if xi is None or (xi == 1).all() or not out.is_mergeable:
        return merged
    wide = compute_dtype("F64" if "F64" in (spec.dtype, out.dtype) else out.dtype)
    each = coefficient_per_unit(xi, spec, block.start, block.stop)
    folded = fold_arrays(widen(base, spec.dtype, wide), widen(merged, out.dtype, wide), each)
    stored = narrow(folded, out.dtype)
    if not is_finite(stored, out.dtype):
        raise MagMaxError(f"{block.key}: the calibrated values overflow {out.dtype}; merge into a wider dtype")
    return stored
