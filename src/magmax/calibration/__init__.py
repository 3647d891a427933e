"""MAGIC: a merged model's magnitudes, measured on a few unlabelled samples and folded into its weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration_report import Layer, Report
    from .feature_space import Calibration, FeatureOptions, calibrate_features
    from .forward import run_items
    from .hooks import unfolded
    from .plot import draw
    from .sensitive_layers import find_sensitive

_HOMES = {
    "Calibration": ".feature_space",
    "FeatureOptions": ".feature_space",
    "Layer": ".calibration_report",
    "Report": ".calibration_report",
    "calibrate_features": ".feature_space",
    "draw": ".plot",
    "find_sensitive": ".sensitive_layers",
    "run_items": ".forward",
    "unfolded": ".hooks",
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
