"""Options of a merge beyond its rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.dtypes import FLOAT_DTYPES
from ..checkpoints.renamed import find_pattern
from ..checkpoints.writer import DEFAULT_SHARD_BYTES
from ..errors import MagMaxError
from ..rules import Filters, Layers, Number, Rule, nearest_hint
from ..rules.schedules import Schedule, validate_range
from .matching import Mismatch
from .normalization_statistics import BatchNorm


@dataclass(frozen=True)
class OutputOptions:
    """Options of a merge beyond its rule: scaling factor, dtype, mismatches, shards.

    Attributes:
        scaling_factor: multiplies the merged task vector, and may depend on the tensor; None means the rule's default.
        dtype: the output's floating type ("float32", "bfloat16", ...); None keeps each tensor's type in the base.
        keep_dtype: a regular expression; tensors in whose names it is found keep the base's type whatever `dtype` is,
            such as the biases of routers and norms that a model keeps in float32.
        mismatch: "strict" refuses models whose tensors differ from the base's; "base" keeps the base's there;
            "intersect" merges the leading rows that all have, where tensors differ in the number of rows alone, and
            keeps the base's rows and tensors elsewhere; "union" keeps every row and tensor of the base and of all
            models, as `growing.grow` defines them.
        allow_nonfinite: let NaN and infinity through instead of refusing them. An element that is not finite in the
            base stays as it is there, and needs no permission where all models have the same bits. One that is not
            finite in a model alone counts as IEEE 754 arithmetic and the rule have it (`magmax` takes NaN for the
            largest magnitude; `elect`, `ties` and `sce` give NaN for opposite infinities); NaN is written with one
            pattern of bits. Rules that need angles or singular values refuse those.
        batch_norm: what is made of the running means and variances of batch normalisation: "average" is their mean over
            the models, whatever the rule and the scaling factor; "base" keeps the base's; "clip" merges them like any
            tensor and raises negative variances to zero.
        shard_bytes: the most a shard of a folder output may hold.
    """

    scaling_factor: Number | None = None
    dtype: str | None = None
    mismatch: Mismatch = "strict"
    allow_nonfinite: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    keep_dtype: str = ""
    batch_norm: BatchNorm = "average"

    def out_specs(self, base: Checkpoint) -> dict[str, TensorSpec]:
        """The output's tensors. Raises MagMaxError for a dtype that is none."""
        if self.dtype is None:
            return dict(base.output_specs)
        if self.dtype not in FLOAT_DTYPES:
            raise MagMaxError(f"there is no dtype {self.dtype!r}; {nearest_hint(self.dtype, list(FLOAT_DTYPES))}")
        wanted = FLOAT_DTYPES[self.dtype]
        kept = find_pattern(self.keep_dtype, base.specs, "keep_dtype") if self.keep_dtype else set[str]()
        return {
            key: TensorSpec(wanted, s.shape) if s.is_mergeable and key not in kept else s
            for key, s in base.output_specs.items()
        }

    def dtype_notes(self, base: Checkpoint) -> list[str]:
        """Say which tensors become narrower though most of the base is of the output's type already."""
        wanted = FLOAT_DTYPES.get(self.dtype or "")
        out = self.out_specs(base)
        mergeable = [key for key, spec in base.specs.items() if spec.is_mergeable]
        wide = [key for key in mergeable if out[key].dtype == wanted != base.specs[key].dtype]
        wide = [key for key in wide if base.specs[key].dtype in ("F32", "F64")]
        if wanted not in ("F16", "BF16") or len(wide) * 2 > len(mergeable) or not wide:
            return []
        return [
            f"{len(wide)} tensors that {base.label} keeps in {base.specs[wide[0]].dtype} become {wanted} "
            f"({wide[0]}, ...); to keep their type: --keep-dtype REGEX"
        ]

    def resolve_scaling_factor(self, rule: Rule) -> Number:
        if isinstance(self.scaling_factor, Layers | Filters):
            validate_range("a merge", "scaling_factor", self.scaling_factor)
            return self.scaling_factor
        if isinstance(self.scaling_factor, Schedule):
            raise MagMaxError("scaling_factor is one for all models; give the rule weights")
        try:
            factor = rule.default_scaling_factor if self.scaling_factor is None else float(self.scaling_factor)
        except OverflowError:
            factor = math.inf
        if not math.isfinite(factor):
            raise MagMaxError(f"scaling_factor must be a finite number, not {factor}")
        return factor
