"""MAGIC: a merged model's magnitudes, measured on a few unlabelled samples and folded into its weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .features import Calibration, FeatureOptions, calibrate_features
    from .plot import draw
    from .report import Layer, Report
    from .samples import run_items
    from .sensitive import find_sensitive
    from .unfold import unfolded

_HOMES = {
    "Calibration": ".features",
    "FeatureOptions": ".features",
    "Layer": ".report",
    "Report": ".report",
    "calibrate_features": ".features",
    "draw": ".plot",
    "find_sensitive": ".sensitive",
    "run_items": ".samples",
    "unfolded": ".unfold",
}

__all__ = [
    "Calibration",
    "FeatureOptions",
    "Layer",
    "Report",
    "calibrate_features",
    "draw",
    "find_sensitive",
    "run_items",
    "unfolded",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
