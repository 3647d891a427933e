"""MAGIC: a merged model's magnitudes, measured on a few unlabelled samples and folded into its weights."""

from __future__ import annotations

from .features import Calibration, FeatureOptions, calibrate_features
from .report import Layer, Report
from .samples import run_items

__all__ = ["Calibration", "FeatureOptions", "Layer", "Report", "calibrate_features", "run_items"]
