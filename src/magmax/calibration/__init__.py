"""MAGIC: a merged model's magnitudes, measured on a few unlabelled samples and folded into its weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration_report import CalibrationReport, LayerReport
    from .feature_space import FeatureCalibration, FeatureOptions, calibrate_features
    from .forward import run_items
    from .hooks import calibration_hooks
    from .plot import draw
    from .sensitive_layers import find_sensitive

_LAZY_IMPORTS = {
    "FeatureCalibration": ".feature_space",
    "FeatureOptions": ".feature_space",
    "LayerReport": ".calibration_report",
    "CalibrationReport": ".calibration_report",
    "calibrate_features": ".feature_space",
    "draw": ".plot",
    "find_sensitive": ".sensitive_layers",
    "run_items": ".forward",
    "calibration_hooks": ".hooks",
}

__all__ = [
    "CalibrationReport",
    "FeatureCalibration",
    "FeatureOptions",
    "LayerReport",
    "calibrate_features",
    "calibration_hooks",
    "draw",
    "find_sensitive",
    "run_items",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY_IMPORTS[name], __name__), name)
