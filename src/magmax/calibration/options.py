"""A calibration in words, as recipes and the command line say it, made ready: model loaded, samples read, xi known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..checkpoints import Checkpoint
from ..errors import MagMaxError, missing_extra, nearest_hint
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.matching import refuse_same_path
from ..rules import CalibrateWeights
from ..rules.transforms.sensitive_tensors import read_sensitivity
from .calibration_report import CalibrationReport
from .gram import TaskVectorGram
from .rescale import Coefficients, multiply_coefficients
from .weight_space import calibrate_weights, measure_gram

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class CalibrationOptions(BaseModel):
    """Options of a calibration (MAGIC). Paths are relative to the recipe's folder.

    Attributes:
        space: "weight" needs no data; "feature" a few samples of each task; "dual" is the one and then the other.
        samples: the folder of the tasks' unlabelled samples, NAME.csv (a column text), or NAME/ with .txt or pictures.
        n: how many samples of each task are drawn from these; fewer where there are fewer.
        seed: of that draw.
        model: the folder of the model's config and tokenizer, where neither the merged model nor the base is one.
        norm: of a magnitude: by default l2 of weights and l1 of features.
        form, per, guard: in weight space, see `CalibrateWeights`.
        ratio: in feature space, of magnitudes at each "place" (token, channel), or of those of each whole "sample".
        inputs: in feature space, whether a layer sees what the "calibrated" or the "merged" layers before it make.
        sensitive: a file of sensitive tensors, whose xi is at most 1; every other is then at least 1.
        max_tokens: the tokens of a text that are used.
        any_model: calibrate even what does not look like a merge of the models.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    space: Literal["weight", "feature", "dual"] = "dual"
    samples: str | None = None
    n: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)
    model: str | None = None
    norm: Literal["l1", "l2"] | None = None
    form: Literal["norm", "ellipsoid"] = "norm"
    per: Literal["tensor", "row"] | None = None
    guard: float = 1.0
    ratio: Literal["place", "sample"] = "place"
    inputs: Literal["calibrated", "merged"] = "calibrated"
    sensitive: str | None = None
    max_tokens: int = Field(64, ge=1)
    any_model: bool = False

    def provenance(self) -> dict[str, Any]:
        """Return what provenance tells of it: all that is not as usual, without paths."""
        changed = self.model_dump(exclude_defaults=True, exclude={"samples", "model", "sensitive", "space"})
        return {"space": self.space, **changed, **({"n": self.n} if self.space != "weight" else {})}


class CalibrationResult(NamedTuple):
    """xi for each tensor of the merged checkpoint that has one, and what was measured."""

    coefficients: Coefficients
    report: CalibrationReport


@dataclass(frozen=True)
class PreparedCalibration:
    """A calibration with all that it needs opened, read and checked; only the forward passes are left."""

    options: CalibrationOptions
    base: Checkpoint
    merged: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]
    sensitive: Sequence[str] | None
    items: Sequence[Sequence[Any]] = ()
    loaded: Any = None

    def measure(self, execution: ExecutionOptions) -> CalibrationResult:
        """Measure, in weight space, in feature space, or one after the other.

        Raises:
            MagMaxError: see `calibrate_features`.
        """
        gram = measure_gram(self.base, self.merged, self.models, self.names, execution)
        gram.check(self.merged.label, self.options.any_model)
        if doubt := gram.doubtful_reason(self.merged.label):
            execution.note(doubt)
        if self.options.space == "feature":
            return self._features({}, gram, execution)
        transform = CalibrateWeights(
            self.options.form, self.options.per, self.options.norm or "l2", self.options.guard, self.sensitive or ()
        )
        checkpoints = self.base, self.merged, self.models
        coefficients, layers = calibrate_weights(*checkpoints, transform, gram, execution)
        if self.options.space == "weight":
            return CalibrationResult(coefficients, CalibrationReport(self.names, layers, {}))
        calibrated = self._features(coefficients, gram, execution)
        return CalibrationResult(multiply_coefficients(coefficients, calibrated.coefficients), calibrated.report)

    def _features(self, ahead: Coefficients, gram: TaskVectorGram, execution: ExecutionOptions) -> CalibrationResult:
        """In feature space, of the model that has the coefficients of the weight space already."""
        from .feature_space import FeatureOptions, calibrate_features
        from .rescale import fold_state

        names, module = self.loaded.names, self.loaded.module
        keys = {name: key for key, name in names.items()}
        base = self.loaded.renamed(self.base)
        fold_state(module.state_dict(), base, {keys[name]: xi for name, xi in ahead.items() if name in keys})
        tensors = {key: gram.tensors[name] for key, name in names.items() if name in gram.tensors}
        apart = {key: gram.left_out[name] for key, name in names.items() if name in gram.left_out}
        sensitive = None if self.sensitive is None else [keys[name] for name in self.sensitive if name in keys]
        options = FeatureOptions(self.options.norm or "l1", self.options.ratio, self.options.inputs, sensitive)
        calibration = calibrate_features(
            module,
            base,
            [self.loaded.renamed(model) for model in self.models],
            self.items,
            options=options,
            names=self.names,
            gram=TaskVectorGram(tensors, apart, self.names),
            execution=execution,
        )
        return CalibrationResult(self.loaded.in_files(calibration.coefficients), calibration.report)


def prepare_calibration(
    chosen: CalibrationOptions, base: Checkpoint, merged: Checkpoint, models: Sequence[Checkpoint], names: Sequence[str]
) -> PreparedCalibration:
    """Open and read what a calibration needs.

    Raises:
        MagMaxError: options that do not go together, no samples, no model to run, no file of sensitive tensors, or one
            that names tensors the model has not.
    """
    if not models:
        raise MagMaxError("name the models that were merged; calibration compares magnitudes with theirs")
    refuse_same_path([base, merged, *models])
    sensitive = None if chosen.sensitive is None else read_sensitivity(Path(chosen.sensitive)).sensitive
    for name in sensitive or ():
        if base.resolve_alias(name) not in base.specs:
            hint = nearest_hint(name, sorted(base.specs))
            raise MagMaxError(f"{chosen.sensitive}: names {name!r}, which is no tensor of {base.label}; {hint}")
    prepared = PreparedCalibration(chosen, base, merged, models, names, sensitive)
    if chosen.space == "weight":
        if chosen.samples:
            raise MagMaxError("calibrating in weight space takes no samples; choose the space feature or dual")
        return prepared
    if chosen.samples is None:
        raise MagMaxError(
            f"calibrating in {chosen.space} space needs unlabelled samples of each task: --samples FOLDER with "
            f"{names[0]}.csv, ..., never those that the result is scored on; the space weight needs none"
        )
    folder = _folder(chosen, base, merged)
    from .model_loading import load_module

    items = read_model_inputs(folder, Path(chosen.samples), names, chosen)
    return PreparedCalibration(chosen, base, merged, models, names, sensitive, items, load_module(folder, merged))


def _folder(chosen: CalibrationOptions, base: Checkpoint, merged: Checkpoint) -> Path:
    """The folder of the model's config."""
    if chosen.model is not None:
        return Path(chosen.model)
    for checkpoint in (merged, base):
        folder = checkpoint.small_files_folder()
        if folder is not None and (folder / "config.json").is_file():
            return folder
    raise MagMaxError(
        f"{merged.label}: to run the model, its config.json is needed, and neither this nor {base.label} is a folder "
        "with one; name the folder of the model's config and tokenizer: --model FOLDER"
    )


def read_model_inputs(folder: Path, samples: Path, names: Sequence[str], chosen: CalibrationOptions) -> list[list[Any]]:
    """n samples of each task as a model's own inputs: token ids of texts, or pixels of pictures."""
    from .samples import read_samples, sample_paths

    places = sample_paths(samples, names)
    seen = [_find_images(place) for place in places]
    if any(seen):
        return [
            _load_images(folder, _sample(task_items, chosen), place)
            for task_items, place in zip(seen, places, strict=True)
        ]
    texts = [read_samples(place, labelled=False).texts for place in places]
    return [
        _tokenize(folder, _sample(task_items, chosen), chosen, place)
        for task_items, place in zip(texts, places, strict=True)
    ]


def _sample(items: Sequence[Any], chosen: CalibrationOptions) -> list[Any]:
    order = np.random.default_rng(chosen.seed).permutation(len(items))[: chosen.n]
    return [items[row] for row in sorted(order.tolist())]


def _find_images(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES) if place.is_dir() else []


def _tokenize(folder: Path, texts: Sequence[str], chosen: CalibrationOptions, place: Path) -> list[list[int]]:
    from .pretrained import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MagMaxError(
            f"{folder}: has no tokenizer for the texts of {place}: {message}; name a folder that has one: --model "
            f"FOLDER"
        ) from error
    ids = [tokenizer(text, truncation=True, max_length=chosen.max_tokens)["input_ids"] for text in texts]
    if empty := [text for text, token_ids in zip(texts, ids, strict=True) if not token_ids]:
        raise MagMaxError(f"{place}: a sample, {empty[0]!r}, has no token; give texts with words in them")
    return ids


def _load_images(folder: Path, pictures: Sequence[Path], place: Path) -> list[Any]:
    if not pictures:
        raise MagMaxError(f"{place}: holds no picture, and other tasks have pictures; give all tasks the same kind")
    try:
        from PIL import Image

        from .image_transforms import ImageTransform
    except ModuleNotFoundError as error:
        raise missing_extra(f"{place}: reading pictures needs Pillow", "data") from error
    view = ImageTransform.of_file(folder / "preprocessor_config.json")
    tensors: list[Any] = []
    for path in pictures:
        try:
            with Image.open(path) as picture:
                tensors.append(view.to_tensor([view.center_crop(view.load(picture))])[0])
        except OSError as error:
            raise MagMaxError(f"{path}: cannot be read as a picture: {error}") from error
    return tensors
