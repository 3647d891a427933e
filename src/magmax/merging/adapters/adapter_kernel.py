"""The merge of LoRA adapters' updates, one layer at a time, and how well a product of a rank stands for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoints import TensorSpec
from ...checkpoints.dtypes import FLOAT_DTYPES
from ...checkpoints.lora.peft import LowRankUpdate, PeftAdapter
from ...checkpoints.lora.product import LoraTaskVectors, read_factor
from ...checkpoints.lora.target_modules import AdaptedLayer, frozen_weights
from ...errors import MagMaxError
from ...rules import Number, Rule, nearest_hint
from ..execution.pool import WorkerPool
from ..in_memory import MemorySink
from ..kernel import MergeKernel
from ..output_options import OutputOptions
from ..pipeline import BlockPipeline
from ..reader import BlockReader, is_finite
from .truncation import FactorPair, dense_error, dense_norm, nearest_to_dense, nearest_to_sum, product_norm, sum_error

NUM_WORST_LAYERS = 5
"""How many layers the report names."""
FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class AdapterOptions:
    """Options of a merge of adapters, beyond its rule.

    Attributes:
        rank: the most that a layer of the result may have.
        scaling_factor: multiplies the merged update; None means the rule's own default.
        dtype: the factors' floating type; None means the adapters', or float32 where they have several.
    """

    rank: int
    scaling_factor: Number | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise MagMaxError(f"the rank of the merged adapter must be a positive whole number, not {self.rank!r}")
        if self.dtype is not None and self.dtype not in FLOAT_DTYPES:
            raise MagMaxError(f"there is no dtype {self.dtype!r}; {nearest_hint(self.dtype, list(FLOAT_DTYPES))}")


@dataclass(frozen=True)
class LayerFit:
    """The error of a layer's product B A against the merged update M: ||M|| and ||M - B A|| as stored (Frobenius)."""

    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        return self.error / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "norm": _round_significant(self.norm),
            "relative_error": _round_significant(self.relative),
        }


@dataclass(frozen=True)
class AdapterMerge:
    """A merge of adapters, layer by layer: scaling_factor * rule(s_t * B_t A_t), then the nearest product of a rank.

    Attributes:
        updates: of each adapter, by the name of the weight; where it has none, its task vector is zero.
        fits: how well each layer of the result fits, by its module; filled as layers are done.
    """

    rule: Rule
    folders: Sequence[PeftAdapter]
    options: AdapterOptions
    layers: Sequence[AdaptedLayer]
    updates: Sequence[Mapping[str, LowRankUpdate]]
    fits: dict[str, LayerFit] = field(default_factory=dict[str, LayerFit])

    @property
    def scaling_factor(self) -> Number:
        return OutputOptions(self.options.scaling_factor).resolve_scaling_factor(self.rule)

    @property
    def dtype(self) -> str:
        """The factors' type in the result."""
        dtypes = self._factor_dtypes()
        return FLOAT_DTYPES[self.options.dtype] if self.options.dtype else dtypes.pop() if len(dtypes) == 1 else "F32"

    def ranks(self) -> dict[str, int]:
        """The rank of each module in the result."""
        return {layer.module: self.rank(layer) for layer in self.layers}

    def rank(self, layer: AdaptedLayer) -> int:
        """The layer's rank in the result: no more than a matrix of its shape, or the sum of a linear rule, can have."""
        most = min(self.options.rank, layer.rows, layer.columns)
        if not self.rule.linear:
            return most
        return min(
            most,
            sum(layer_updates[layer.key].left.rank for layer_updates in self.updates if layer.key in layer_updates),
        )

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors of the result."""
        specs = {key: s for layer in self.layers for key, s in layer.factor_specs(self.rank(layer), self.dtype).items()}
        return specs | {name: folder.spec(name) for name, folder in self.frozen().items()}

    def frozen(self) -> dict[str, PeftAdapter]:
        """The base's own weights that come with the adapters, and the first adapter that has each."""
        return {name: folder for folder in reversed(self.folders) for name in frozen_weights(folder)}

    def kernel(self) -> MergeKernel:
        """The merge of the updates as models of a base of zeros."""
        wide = "F64" if "F64" in self._factor_dtypes() else "F32"
        specs = {layer.key: TensorSpec(wide, (layer.rows, *layer.row_shape)) for layer in self.layers}
        return MergeKernel(self._make_reader(specs), self.rule, len(self.folders), self.scaling_factor, specs, {})

    def fit_layer(self, layer: AdaptedLayer, kernel: MergeKernel, threads: int) -> tuple[FactorPair, LayerFit]:
        """The layer's factors as they are stored, and how well they fit."""
        rank = self.rank(layer)
        if self.rule.linear:
            whole = self._sum_of_products(layer, kernel)
            stored, worth = nearest_to_sum(whole, rank).stored(self.dtype)
            fit = LayerFit(rank, product_norm(whole), sum_error(whole, worth))
        else:
            matrix = self._dense_merge(layer, kernel, threads)
            stored, worth = nearest_to_dense(matrix, rank).stored(self.dtype)
            fit = LayerFit(rank, dense_norm(matrix), dense_error(matrix, worth))
        if not all(is_finite(factor, self.dtype) for factor in stored):
            raise MagMaxError(f"{layer.key}: the merged factors overflow {self.dtype}; choose a wider dtype")
        return stored, fit

    def read_bytes(self, layer: AdaptedLayer) -> int:
        """Bytes of the adapters' factors for a layer."""
        return sum(
            folder.spec(factor.tensor_name).nbytes
            for folder, layer_updates in zip(self.folders, self.updates, strict=True)
            if layer.key in layer_updates
            for factor in (layer_updates[layer.key].left, layer_updates[layer.key].right)
        )

    @property
    def memory(self) -> int:
        """Bytes that the largest layer takes while it is fitted."""
        sizes = [(layer.rows * layer.columns, min(layer.rows, layer.columns)) for layer in self.layers]
        if self.rule.linear:
            ranks = [sum(o[x.key].left.rank for o in self.updates if x.key in o) for x in self.layers]
            return max(8 * 4 * r * (x.rows + x.columns) for r, x in zip(ranks, self.layers, strict=True))
        return max(8 * elements + 8 * 4 * side**2 for elements, side in sizes)

    def overall_fit(self) -> LayerFit:
        """All layers as one."""
        fits = self.fits.values()
        norm, error = (
            math.sqrt(math.fsum(n**2 for n in ns)) for ns in ([f.norm for f in fits], [f.error for f in fits])
        )
        return LayerFit(max((f.rank for f in fits), default=0), norm, error)

    def report(self) -> list[str]:
        """The layers that the rank serves worst, and the whole, in words."""
        worst = sorted(self.fits, key=lambda module: (-self.fits[module].relative, module))[:NUM_WORST_LAYERS]
        width = max(len(word) for word in ("layer", *worst))
        rows = [f"{m:{width}}  {self.fits[m].rank:4}  {self.fits[m].relative:.3g}" for m in worst]
        summary = f"all {len(self.fits)} layers: relative error {self.overall_fit().relative:.3g} (Frobenius norm)"
        return [f"{'layer':{width}}  rank  relative error", *rows, summary]

    def _factor_dtypes(self) -> set[str]:
        pairs = zip(self.folders, self.updates, strict=True)
        return {
            folder.spec(f.tensor_name).dtype
            for folder, layer_updates in pairs
            for u in layer_updates.values()
            for f in (u.left, u.right)
        }

    def _make_reader(self, specs: dict[str, TensorSpec]) -> BlockReader:
        updates: Sequence[Mapping[str, LowRankUpdate]] = [{}, *self.updates]
        folders = [self.folders[0], *self.folders]
        return BlockReader(
            [
                LoraTaskVectors(folder, layer_updates, specs)
                for folder, layer_updates in zip(folders, updates, strict=True)
            ]
        )

    def _sum_of_products(self, layer: AdaptedLayer, kernel: MergeKernel) -> FactorPair:
        """scaling_factor * sum of c_t * s_t * B_t A_t as one product; c is what a linear rule makes of unit vectors."""
        weights = kernel.rules[layer.key](list(np.eye(len(self.folders))), layer.key)
        factor = kernel.factors[layer.key]
        parts: list[FactorPair] = []
        for weight, folder, layer_updates in zip(weights.tolist(), self.folders, self.updates, strict=True):
            if update := layer_updates.get(layer.key):
                factors = (update.left, update.right)
                left, right = (read_factor(folder, f, slice(0, f.length), np.dtype(np.float64)) for f in factors)
                parts.append(FactorPair(left * (factor * weight * update.scale), right))
        return FactorPair(*(np.concatenate(factors) for factors in zip(*parts, strict=True)))

    def _dense_merge(self, layer: AdaptedLayer, kernel: MergeKernel, threads: int) -> NDArray[Any]:
        """scaling_factor * rule(s_t * B_t A_t) as a matrix."""
        reader = self._make_reader({layer.key: kernel.out[layer.key]})
        memory = MemorySink(reader.inputs[0].specs)
        BlockPipeline(reader.inputs, [memory], kernel, WorkerPool(threads), digest=False).run(lambda _: None)
        return memory.tensors[layer.key].reshape(layer.rows, layer.columns)


def _round_significant(number: float) -> float:
    """Six digits: what a processor's own sums cannot change."""
    return float(f"{number:.6g}")
