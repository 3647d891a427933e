"""CLIP models of the open_clip library, where it can be imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.image_transforms import ImageTransform
from ...errors import MagMaxError
from ..registry import allows_code
from .vision import ImageEncoder


@dataclass(frozen=True)
class OpenClipTextTower:
    """The frozen text side of a model: unit features of texts in the space of the pictures' features."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        where = next(self.model.parameters()).device
        return nn.functional.normalize(self.model.encode_text(self.tokenizer(list(texts)).to(where)), dim=-1)


def open_clip(
    name: str = "ViT-B-32", pretrained: str | None = "openai", varied: bool = True, mirror: bool = False
) -> ImageEncoder:
    """A model's image tower, trained and merged, its projection included, with its frozen text side for the head.

    `name` is one of the library's models, or `local-dir:FOLDER`, or `hf-hub:ORG/REPO`; `pretrained` names its weights
    or a file of them. The weights are called as in the library's image tower (`transformer.resblocks...`, `proj`).

    A configuration of the last two may make the library load code of a repository, so they need --allow-code.

    Raises MagMaxError where the library cannot be imported (it needs torchvision) or does not give the model.
    """
    if ":" in name and not allows_code():
        raise MagMaxError(
            f"open_clip: the configuration of {name} may name code, which open_clip would run; if you trust its "
            "author, add --allow-code"
        )
    try:
        library: Any = import_module("open_clip")
    except (ImportError, RuntimeError) as error:
        raise MagMaxError(
            f"open_clip: {error}; pip install open_clip_torch, with the torchvision that belongs to your torch, or "
            "give the same weights in the hub's layout to the model clip"
        ) from error
    try:
        whole = library.create_model(name, pretrained=None if ":" in name else pretrained)
        tokenizer = library.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise MagMaxError(f"open_clip does not give {name} with the weights {pretrained}: {error}") from error
    tower = whole.visual
    whole.visual = None
    whole.eval().requires_grad_(False)
    size, mean, std = (tower.preprocess_cfg[key] for key in ("size", "mean", "std"))
    side = size if isinstance(size, int) else min(size)
    view = ImageTransform(side, side, tuple(mean), tuple(std), mirror=mirror)
    temperature = float(whole.logit_scale.detach().exp())
    return ImageEncoder(tower.eval(), _tower_features, view, varied, OpenClipTextTower(whole, tokenizer), temperature)


def _tower_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    return tower(pixels)
