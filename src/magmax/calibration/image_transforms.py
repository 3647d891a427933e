"""How pictures become a vision model's input: one way for evaluation, another for training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import MagMaxError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageTransform:
    """Resizing, cropping and normalising, in the order of CLIP's preprocessing.

    `load` brings a picture's shorter side to `resize` pixels, once and for all; what it gives is kept as bytes.
    For evaluation the middle `size` x `size` pixels are cut out. For training (`augment`), a random rectangle of
    `smallest` to 1 of the area, with sides of a ratio between 3/4 and 4/3, is resized to `size` x `size`, and
    mirrored half of the time where `mirror` is on. Then `(pixel / 255 - mean) / std`, channel by channel.
    """

    size: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resample: int = Image.Resampling.BICUBIC
    smallest: float = 0.9
    mirror: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise MagMaxError(f"pictures of {self.resize} pixels cannot be cut to {self.size}; crop at most the resize")
        if not 0 < self.smallest <= 1:
            raise MagMaxError(f"smallest {self.smallest} is a share of a picture's area; choose above 0, at most 1")

    @classmethod
    def of_file(cls, path: Path) -> ImageTransform:
        """The view in a preprocessor_config.json: for evaluation what transformers' own CLIP processor does."""
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            resize = _side_length(config["size"], "shortest_edge")
            size = _side_length(config["crop_size"], "height") if config.get("do_center_crop", True) else resize
            return cls(size, resize, tuple(config["image_mean"]), tuple(config["image_std"]), config.get("resample", 3))
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise MagMaxError(f"{path}: expected size, crop_size, image_mean and image_std: {error!r}") from error

    def load(self, picture: Any) -> np.ndarray:
        """A PIL image or an array of bytes, resized: uint8, shape (h, w) if it is grey, else (h, w, 3)."""
        image = picture if isinstance(picture, Image.Image) else _to_image(picture)
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        width, height = image.size
        short, long = min(width, height), max(width, height)
        other = int(self.resize * long / short)
        image = image.resize((self.resize, other) if width < height else (other, self.resize), self.resample)
        return np.array(image)

    def center_crop(self, pixels: np.ndarray) -> np.ndarray:
        """The middle of a loaded picture."""
        top, left = ((side - self.size) // 2 for side in pixels.shape[:2])
        return pixels[top : top + self.size, left : left + self.size]

    def augment(self, pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A random rectangle of a loaded picture, resized; the same for the same state of `random`."""
        box = _random_box(pixels.shape[0], pixels.shape[1], self.smallest, random)
        image = Image.fromarray(pixels).resize((self.size, self.size), self.resample, box=box)
        varied = np.array(image)
        return varied[:, ::-1] if self.mirror and random.random() < 0.5 else varied

    def to_tensor(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """n pictures of `size` x `size` as float32, shape (n, 3, size, size)."""
        colours = [np.repeat(p[:, :, None], 3, axis=2) if p.ndim == 2 else p for p in pictures]
        pixels = torch.from_numpy(np.stack(colours)).permute(0, 3, 1, 2).to(torch.float32) / 255
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (pixels - mean) / std


def _side_length(size: int | Mapping[str, int], key: str) -> int:
    return int(size if isinstance(size, int) else size[key])


def _to_image(picture: Any) -> Image.Image:
    array = np.asarray(picture)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.shape[2:] == (3,)):
        actual = f"{array.dtype} of shape {array.shape}"
        raise MagMaxError(f"a picture is a PIL image, or bytes of shape (h, w) or (h, w, 3); this one is {actual}")
    return Image.fromarray(array)


def _random_box(
    height: int, width: int, smallest: float, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom; where ten tries do not fit, the largest square in the middle."""
    for _ in range(10):
        area = height * width * random.uniform(smallest, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
