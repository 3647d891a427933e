"""MAGIC in weight space: give each merged matrix back the magnitude of the task vectors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import MagMaxError, nearest_hint
from ..contract import MergedTransform, MergeFunction
from ..norms import NormStatistics, cosines, mean_cosine, request_norms
from ..statistics import Array, Block, Scope, Statistics, StatisticsRequest, Sums, namespace
from .sensitive_tensors import read_sensitivity

EPSILON = 1e-8
MAX_COEFFICIENT = 1e38
MAX_NAMES = 3
MAX_MEAN_COSINE = 0.1
"""The mean cosine of task vectors above which the ellipsoid's supposition does not hold: it is then a third off."""
LAYER_WEIGHT = re.compile(r"((.*_)?weight(_(ih|hh)_l\d+(_reverse)?)?|w|kernel)?")
"""What layers call their weights: in torch also in_proj_weight and weight_ih_l0, in Flax kernel; or bare arrays, by no
name at all."""
EMBEDDING = re.compile(r".*(?<!un)embed(?!_out).*|(.*_)?emb|wte|wpe|shared|(.*_)?tokens?|relative_attention_bias")
HEAD = re.compile(r"(.*_)?(head|heads|classifier|embed_out|unembed|unembedding|score)")
NORM = re.compile(r"(.*_)?((layer|group|batch|rms)?_?norm\d*|(ln|bn)(_.*|\d*))")
"""What models call the modules that own the weights of embeddings, heads and norms."""


@dataclass(frozen=True)
class CalibrateWeights(MergedTransform):
    """Multiply each merged matrix by a xi that gives it the magnitude of the task vectors as they came in.

        norm:       xi = mean_k |tau_k| / |m|
        ellipsoid:  xi = 1 / sqrt( sum_k a_k^2 + |m - sum_k a_k tau_k|^2 / ((mean_k |tau_k|)^2 + e) + e ),
                    a_k = <tau_k, m> / (|tau_k|^2 + e),  e = 1e-8

    m is scaling_factor times what the rule merged, so that the magnitude of scaling_factor no longer matters; xi = 1
    where m = 0 or xi is no number. `per` each tensor (the norm's default) or each of its rows (the ellipsoid's).
    The weights of linear layers and convolutions, as (outputs, rest), are calibrated; embeddings, heads, norms, vectors
    and parameters that belong to no layer (CLIP's visual.proj) stay as merged, and are named in a note. So does a
    tensor where the mean of the task vectors' cosine matrix, its diagonal included, exceeds `guard`; 1 guards none.
    `sensitive` names tensors that may only shrink, xi <= 1, or the JSON file of a `Sensitivity`; the others may then
    only grow, xi >= 1.

    The norm is the plain reading of the paper's text, the ellipsoid what its released code computes. That supposes
    task vectors to be orthogonal: where they are alike, as those of sequential fine-tuning, it shrinks them.

    >>> import numpy as np
    >>> from magmax.rules import Average, chain
    >>> chain(Average(), CalibrateWeights())([np.float32([[3, 0]]), np.float32([[0, 4]])])
    array([[2.1, 2.8]], dtype=float32)
    """

    name: ClassVar[str] = "calibrate_weights"
    paper: ClassVar[str] = "Li et al., MAGIC, 2025, arXiv 2512.19320"
    cpu_only: ClassVar[bool] = True

    form: Literal["norm", "ellipsoid"] = "norm"
    per: Literal["tensor", "row"] | None = None
    norm: Literal["l2", "l1"] = "l2"
    guard: float = 1.0
    sensitive: Sequence[str] | str = ()

    def __post_init__(self) -> None:
        choices = {"form": ("norm", "ellipsoid"), "per": ("tensor", "row", None), "norm": ("l2", "l1")}
        for option, words in choices.items():
            if getattr(self, option) not in words:
                allowed = " or ".join(word for word in words if word)
                raise MagMaxError(f"{self.name} needs {option} to be {allowed}, not {getattr(self, option)!r}")
        if self.form == "ellipsoid" and self.norm == "l1":
            raise MagMaxError(f"{self.name}: the ellipsoid is one of L2 norms; leave norm out, or choose form: norm")
        if not -1 <= self.guard <= 1:
            raise MagMaxError(f"{self.name} needs guard from -1 to 1, a mean of cosines, not {self.guard}")
        names: Any = self.sensitive
        names = read_sensitivity(Path(names)).sensitive if isinstance(names, str) else names
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in cast("Sequence[Any]", names)):
            raise MagMaxError(f"{self.name} needs sensitive to be names of tensors or a file's path, not {names!r}")
        object.__setattr__(self, "sensitive", tuple(cast("Sequence[str]", names)))

    @property
    def passes(self) -> int:
        return 1

    @property
    def needs_angles(self) -> bool:
        """Return whether the angles between vectors matter, not their lengths alone."""
        return self.form == "ellipsoid" or self.guard < 1

    def check_names(self, names: Collection[str]) -> None:
        for name in self.sensitive:
            if name not in names:
                hint = nearest_hint(name, sorted(names))
                raise MagMaxError(f"{self.name}: sensitive names {name!r}, which is no tensor of the model; {hint}")

    def statistics(self, scope: Scope, merge: MergeFunction) -> StatisticsRequest:
        rows = self.per == "row" or (self.per is None and self.form == "ellipsoid")
        parts = {
            key: math.prod(shape[1:] if rows else shape)
            for key, shape in scope.shapes.items()
            if is_calibrated(key, shape)
        }
        found = yield from request_norms(parts, merge, scope.tasks, self.needs_angles)
        left = {
            key: reason_to_leave(key, shape) for key, shape in scope.shapes.items() if len(shape) > 1 and 0 not in shape
        }
        return found._replace(left={key: why for key, why in left.items() if why})

    def apply(self, block: Block, merge: MergeFunction, statistics: Statistics, factor: float) -> Array:
        lengths: NormStatistics = statistics
        key = block.address.key
        if key not in lengths.parts or self.is_guarded(lengths.vectors[key]):
            return merge(block)
        merged, measures = lengths.of(block, merge, self.needs_angles)
        xi = self.coefficients(measures, factor)
        if self.sensitive:
            xi = np.minimum(xi, 1) if key in self.sensitive else np.maximum(xi, 1)
        xp = namespace(merged)
        rows = xp.reshape(merged, (len(xi), -1))
        rows *= xp.asarray(xi[:, None], dtype=rows.dtype, device=getattr(rows, "device", None))
        return xp.reshape(rows, (-1,))

    def is_guarded(self, vectors: Sums) -> bool:
        """Return whether task vectors of these measures are too much alike."""
        return self.guard < 1 and float(cosines(vectors[:, :-1]).mean()) > self.guard

    def coefficients(self, measures: Sums, factor: float = 1.0) -> NDArray[np.float64]:
        """xi of each part, shape (parts,), from the `measures` of tau_1, ..., tau_T and m: (parts, T + 1, T + 2)."""
        dots = measures[:, :, :-1]
        squares = dots.diagonal(axis1=1, axis2=2)
        sizes = measures[:, :, -1] if self.norm == "l1" else np.sqrt(squares)
        mean, size = sizes[:, :-1].mean(axis=1), sizes[:, -1] * abs(factor)
        with np.errstate(all="ignore"):
            if self.form == "norm":
                xi = mean / size
            else:
                along = factor * dots[:, -1, :-1]
                a = along / (squares[:, :-1] + EPSILON)
                inner = (a[:, :, None] * dots[:, :-1, :-1] * a[:, None, :]).sum(axis=(1, 2))
                across = np.maximum(size**2 - 2 * (a * along).sum(axis=1) + inner, 0)
                xi = 1 / np.sqrt((a**2).sum(axis=1) + across / (mean**2 + EPSILON) + EPSILON)
        return np.where((size > 0) & (xi < MAX_COEFFICIENT), xi, 1.0)

    def summarize(self, all_statistics: Collection[Statistics]) -> str:
        vectors = {key: measures for answer in all_statistics for key, measures in answer.vectors.items()}
        sentences: list[str] = []
        if left := {key: why for answer in all_statistics for key, why in answer.left.items()}:
            kinds = [
                f"{why}: {_shorten([key for key in left if left[key] == why])}" for why in sorted({*left.values()})
            ]
            sentences.append(
                f"{self.name}: {len(left)} tensors of two or more dimensions are left ({'; '.join(kinds)})"
            )
        if guarded := [key for key in vectors if self.is_guarded(vectors[key])]:
            sentences.append(f"{self.name}: the guard leaves {len(guarded)} of {len(vectors)} tensors as they were")
        means = (
            {key: mean_cosine(measures[:, :-1]) for key, measures in vectors.items()}
            if self.form == "ellipsoid"
            else {}
        )
        mean = math.fsum(means.values()) / max(1, len(means))
        if mean > MAX_MEAN_COSINE:
            most = max(means, key=lambda key: means[key])
            sentences.append(
                f"{self.name}: the ellipsoid supposes orthogonal task vectors, and their mean cosine is {mean:.2f} "
                f"({means[most]:.2f} in {most}), so that it shrinks what it should restore; use form: norm"
            )
        return "; ".join(sentences)


def _shorten(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:MAX_NAMES]) + f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES)


def is_calibrated(key: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is the weight of a linear layer or of a convolution."""
    return not reason_to_leave(key, shape)


def reason_to_leave(key: str, shape: Sequence[int]) -> str:
    """Say why a tensor is not calibrated, or nothing.

    A file has no module types. So a weight's kind is told from its shape and from the name of the module that owns it,
    whatever the modules around that are called: token_mixing.fc1.weight is of the linear layer fc1.

    >>> reason_to_leave("time_embedding.linear_1.weight", (8, 4)), reason_to_leave("wte.weight", (90, 4))
    ('', 'embedding')
    """
    if len(shape) < 2 or 0 in shape:
        return "no matrix"
    *modules, name = re.split(r"[./]", key.lower())
    owner = next((module for module in reversed(modules) if module != "default"), "")
    if not LAYER_WEIGHT.fullmatch(name) and owner != "experts":  # fused experts: experts.down_proj, of each a matrix
        return "a parameter of its own"
    if len(shape) > 3:
        return ""
    if HEAD.fullmatch(owner):
        return "head"
    if EMBEDDING.fullmatch(owner):
        return "embedding"
    return "norm" if NORM.fullmatch(owner) else ""
