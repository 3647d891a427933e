"""Where a preference comes from: by hand, by a schedule, from labels or samples of the target, or by trying several."""

from __future__ import annotations

from .candidates import PreferenceChoice, apply_temperature, choose_preference
from .estimators import from_labels, from_samples, geometric_weights, uniform_weights
from .natural_shares import natural_shares

__all__ = [
    "PreferenceChoice",
    "apply_temperature",
    "choose_preference",
    "from_labels",
    "from_samples",
    "geometric_weights",
    "natural_shares",
    "uniform_weights",
]
