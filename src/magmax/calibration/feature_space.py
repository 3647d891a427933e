"""Calibration in feature space: how large each layer's features are under each task's model, folded into the merge."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from ..checkpoints import open_checkpoint
from ..errors import MagMaxError
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.model_names import default_names
from .calibration_report import CalibrationReport
from .forward import Run, run_items
from .gram import TaskVectorGram
from .layer_measurement import FeatureMeasurement, evaluation_mode
from .rescale import Coefficients
from .weight_space import measure_gram

Samples = Sequence[Sequence[Any]]
"""For each task its unlabelled items, as `run` takes them."""


@dataclass(frozen=True)
class FeatureOptions:
    """Options of a calibration in feature space, beyond the samples.

    Attributes:
        norm: of a feature vector's magnitude: "l1", as the public code has it, or "l2".
        ratio: "place": of magnitudes at each token or channel, as published; a few places that the merge hardly moves
            may then dominate the mean. "sample": of those of whole samples.
        inputs: "calibrated": a layer's inputs come from the model whose earlier layers are calibrated already;
            "merged": from the merged model as it was given.
        sensitive: keys of tensors whose coefficient may not exceed 1; if there are any, that of every other tensor may
            not be below 1. None: no limits.
        mismatch: as in `OutputOptions`; what a model has not is left alone.
        any_model: calibrate even what does not look like a merge of the models.
    """

    norm: Literal["l1", "l2"] = "l1"
    ratio: Literal["place", "sample"] = "place"
    inputs: Literal["calibrated", "merged"] = "calibrated"
    sensitive: Collection[str] | None = None
    mismatch: Literal["strict", "base"] = "strict"
    any_model: bool = False


@dataclass(frozen=True)
class FeatureCalibration:
    """The result of a calibration in feature space: coefficients and report.

    Attributes:
        coefficients: xi for each tensor of the module that was folded.
        report: what was measured, layer by layer.
    """

    coefficients: Coefficients
    report: CalibrationReport


def calibrate_features(
    model: nn.Module,
    base: Any,
    models: Sequence[Any],
    samples: Samples,
    run: Run = run_items,
    options: FeatureOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    gram: TaskVectorGram | None = None,
    execution: ExecutionOptions | None = None,
) -> FeatureCalibration:
    """Give a merged model's features the magnitude they have in the models it was made of.

    For a layer l, with x its input in the model while it is calibrated, theta_k task k's weights and W_m the merged
    ones:

        F_k = layer_l(x; theta_k) - layer_l(x; theta_0)          F_m = layer_l(x; W_m) - layer_l(x; theta_0)
        xi_l = mean_k mean_places ||F_k|| / ||F_m||               W = W_0 + xi_l (W_m - W_0), the bias alike

    over the places of task k's samples: tokens of linear layers and embeddings, channels of convolutions, samples of
    norms. Exact for layers whose features are affine in their weights: linear, convolution, embedding, the affine part
    of norms, q, k, v and the output projection of `nn.MultiheadAttention`. Others are named in the report. A layer
    that is called several times has one xi, of all its calls, with later layers as they were given; weights that two
    layers share are calibrated where they are used first.

    Args:
        model: holds the merged weights; they are calibrated in place, and not restored if an error is raised half way.
        base, models: paths, state dicts, modules or checkpoints with the model's keys; read tensor by tensor, so that
            no more than the weights of two models are in memory, where `base` and `models` are files.
        samples: for each model its unlabelled items. Never those that the result is scored on.
        run: run(model, items) puts items through the model; see `run_items` for those it knows by default.
        names: what the models are called; gram: `measure_gram` of the same inputs, where it is known already.

    Raises:
        MagMaxError: no samples, or of a kind that the model cannot be run on; a model that is no merge of these; task
            vectors that are zero; features that are not finite.

    From Li et al., MAGIC, arXiv 2512.19320. Its released code keeps the pre-trained model beside the merged one and
    corrects the outputs at every inference; here the correction becomes part of the weights.
    """
    options = options or FeatureOptions()
    opened = open_checkpoint(base, None if isinstance(base, str | PathLike) else "base")
    merged = open_checkpoint(model.state_dict(), "the merged model")
    labels = [None if isinstance(m, str | PathLike) else f"model {n}" for n, m in enumerate(models, start=1)]
    others = [open_checkpoint(m, label, opened) for m, label in zip(models, labels, strict=True)]
    names = names or default_names([m.source for m in others])
    if len(samples) != len(others) or not others:
        raise MagMaxError(f"each model needs samples of its task: {len(others)} models, samples of {len(samples)}")
    if lacking := [name for name, task_samples in zip(names, samples, strict=True) if not len(task_samples)]:
        raise MagMaxError(f"there are no samples of {', '.join(lacking)}; one each is enough, and some more are better")
    if gram is None:
        gram = measure_gram(opened, merged, others, names, execution, options.mismatch)
        gram.check("the merged model", options.any_model)
    work = FeatureMeasurement(
        model, opened, others, names, samples, run, gram, options.norm, options.ratio, options.sensitive
    )
    with evaluation_mode(model), torch.no_grad():
        work.calibrate(sequential=options.inputs == "calibrated")
    return FeatureCalibration(work.coefficients, work.report())
