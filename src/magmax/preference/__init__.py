"""Where a preference comes from: by hand, by a schedule, from labels or samples of the target, or by trying several."""

from __future__ import annotations

from .choose import Choice, choose, tempered
from .own import own_shares
from .sources import from_labels, from_samples, schedule, uniform

__all__ = ["Choice", "choose", "from_labels", "from_samples", "own_shares", "schedule", "tempered", "uniform"]
