"""The statistics of batch normalisation: which tensors hold them, and what a merge makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..checkpoints import TensorSpec
from ..errors import MagMaxError
from .matching import Match

BatchNorm = Literal["average", "base", "clip"]
"""What a merge makes of running means and variances: their averages over the models, which no rule or scaling factor
changes; the base's; or what the rule makes of them, with variances of at least zero."""

_VARIANCE = re.compile(r"(?P<path>(?:.*[./_:])?(?:running|moving)_)var(?:iance)?(?P<end>(?::\d+)?)")
"""torch's bn.running_var, Keras' bn/moving_variance:0, and the like."""
_FLAX_VARIANCE = re.compile(r"(?P<path>(?:.*[./])?batch_stats[./](?:.*[./])?)var(?P<end>)")


@dataclass(frozen=True)
class BatchNormStatistics:
    """The running means and variances among a model's tensors, and what a merge makes of them.

    A rule that adds task vectors up makes variances negative, and so NaN of the model's outputs.
    """

    option: BatchNorm = "average"
    means: frozenset[str] = frozenset()
    variances: frozenset[str] = frozenset()

    @classmethod
    def find(cls, specs: Mapping[str, TensorSpec], option: BatchNorm) -> BatchNormStatistics:
        """Find them by their names: a variance by its own, a mean beside the variance of the same module."""
        if option not in get_args(BatchNorm):
            raise MagMaxError(f"batch_norm must be one of {', '.join(get_args(BatchNorm))}, not {option!r}")
        names = [key for key, spec in specs.items() if spec.is_mergeable]
        found = {key: _VARIANCE.fullmatch(key) or _FLAX_VARIANCE.fullmatch(key) for key in names}
        matches = {key: match for key, match in found.items() if match}
        means = {f"{match['path']}mean{match['end']}" for match in matches.values()}
        return cls(option, frozenset(means & set(names)), frozenset(matches))

    @property
    def averaged(self) -> frozenset[str]:
        """Return the tensors that are averaged over the models, whatever the rule."""
        return self.means | self.variances if self.option == "average" else frozenset()

    @property
    def kept(self) -> frozenset[str]:
        """Return the tensors that are the base's."""
        return self.means | self.variances if self.option == "base" else frozenset()

    def narrow(self, match: Match) -> Match:
        """The match without what is kept from the base."""
        why = "statistics of batch normalisation are kept from the base (batch_norm: base)"
        kept = {key: why for key in sorted(self.kept) if key not in match.unmerged}
        return replace(match, unmerged={**match.unmerged, **kept}) if kept else match

    def describe(self) -> dict[str, Any]:
        """Return what provenance tells of them."""
        return {"batch_norm": self.option} if self.variances else {}

    def notes(self) -> list[str]:
        """Return what the user should know of them."""
        done = {
            "average": "averaged over the models, whatever the rule and the scaling factor",
            "base": "kept from the base",
            "clip": "merged like any tensor, variances of at least zero",
        }[self.option]
        which = f"{len(self.means)} running means and {len(self.variances)} variances of batch normalisation"
        best = "best taken anew from data"
        return [f"{which} are {done} (batch_norm: {self.option}); they are {best}"] if self.variances else []


NO_STATISTICS = BatchNormStatistics()
"""Of a model without batch normalisation."""
