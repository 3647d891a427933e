"""Where a preference comes from: by hand, by a schedule, from labels or samples of the target, or by trying several."""

from __future__ import annotations

from .candidates import Choice, choose, tempered
from .estimators import from_labels, from_samples, schedule, uniform
from .natural_shares import own_shares

__all__ = ["Choice", "choose", "from_labels", "from_samples", "own_shares", "schedule", "tempered", "uniform"]
