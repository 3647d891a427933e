"""Pictures made ready: for evaluation as transformers does it, for training by chance, in memory or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from magmax.calibration.image_transforms import ImageTransform  # noqa: E402
from magmax.continual.data.combine import ConcatenatedSequence  # noqa: E402
from magmax.continual.data.pixels import StoredImages, load_images  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(40, 50, 3), (90, 33, 3), (28, 28), (64, 64, 3), (41, 63)])
@pytest.mark.parametrize(("size", "resize"), [(32, 32), (24, 37)])
def test_evaluation_is_what_transformers_own_processor_does(shape: tuple[int, ...], size: int, resize: int) -> None:
    processor: Any = pytest.importorskip("transformers").CLIPImageProcessorPil(
        size={"shortest_edge": resize}, crop_size={"height": size, "width": size}
    )
    view = ImageTransform(size, resize, tuple(processor.image_mean), tuple(processor.image_std))
    image = Image.fromarray(noise(*shape))
    expected = processor([image], return_tensors="np")["pixel_values"]
    found = view.to_tensor([view.center_crop(view.load(image))]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_picture_is_an_image_or_bytes_and_transparency_is_dropped() -> None:
    view, pixels = ImageTransform(8, 8), noise(8, 8, 3)
    assert (view.load(pixels) == pixels).all()
    assert (view.load(Image.fromarray(pixels)) == pixels).all()
    assert (view.load(Image.fromarray(np.dstack([pixels, noise(8, 8)]))) == pixels).all()
    grey = noise(8, 8)
    assert view.load(grey).shape == (8, 8)
    assert (view.to_tensor([view.load(grey)])[0, 1] == view.to_tensor([np.dstack([grey] * 3)])[0, 1]).all()


@pytest.mark.parametrize("picture", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_what_is_no_picture(picture: np.ndarray) -> None:
    with pytest.raises(MagMaxError, match="a picture is a PIL image, or bytes"):
        ImageTransform(8, 8).load(picture)


@pytest.mark.parametrize("options", [{"size": 9, "resize": 8}, {"size": 8, "resize": 8, "smallest": 0}])
def test_impossible_views(options: dict[str, Any]) -> None:
    with pytest.raises(MagMaxError):
        ImageTransform(**options)


def test_training_rectangles_have_the_size_the_share_and_the_seed() -> None:
    """On a picture whose pixels tell where they are, the corners of a variation tell its rectangle."""
    row, column = np.mgrid[0:60, 0:90]
    where = np.dstack([row * 4, column * 2, np.zeros_like(row)]).astype(np.uint8)
    view = ImageTransform(30, 60, smallest=0.5)
    areas = []
    for seed in range(60):
        varied = view.augment(where, np.random.default_rng(seed)).astype(int)
        assert varied.shape == (30, 30, 3)
        assert (varied == view.augment(where, np.random.default_rng(seed))).all()
        height = (varied[-1, 15, 0] - varied[0, 15, 0]) / 4 * 30 / 29
        width = (varied[15, -1, 1] - varied[15, 0, 1]) / 2 * 30 / 29
        assert 0.65 < width / height < 1.5  # 3/4 to 4/3, but for rounding and the resampled edges
        areas.append(height * width / (60 * 90))
    assert min(areas) > 0.45
    assert max(areas) < 1
    assert np.ptp(areas) > 0.1


def test_mirrored_half_of_the_time() -> None:
    ramp = np.tile(np.arange(0, 240, 8, dtype=np.uint8), (30, 1))
    turned = [
        ImageTransform(30, 30, mirror=True).augment(ramp, np.random.default_rng(seed))[5, 0] > 120 for seed in range(40)
    ]
    assert 8 < sum(turned) < 32
    assert not any(ImageTransform(30, 30).augment(ramp, np.random.default_rng(seed))[5, 0] > 120 for seed in range(40))


class Told(list[Any]):
    """Items that say what they are, and count how often they are read."""

    identity = "these"
    reads = 0

    def __iter__(self) -> Any:
        self.reads += 1
        return super().__iter__()


def test_items_that_say_what_they_are_are_decoded_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGMAX_CACHE", str(tmp_path))
    view, items = ImageTransform(8, 8), Told([noise(9, 12, 3), noise(8, 8), noise(20, 10, 3)])
    expected = [view.load(item) for item in list.__iter__(items)]
    for _ in range(2):
        found = load_images(items, view)
        assert isinstance(found, StoredImages)
        assert [picture.shape for picture in found] == [(8, 10, 3), (8, 8), (16, 8, 3)]
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
        assert (found[-1] == expected[-1]).all()
        assert len(found[1:]) == 2
    assert items.reads == 1
    load_images(items, ImageTransform(6, 6))
    assert items.reads == 2  # another size is another file
    joined = load_images(ConcatenatedSequence([items, [noise(8, 8)]]), view)
    assert (len(joined), items.reads) == (4, 2)
    assert (joined[2] == expected[2]).all()
    assert not [path for path in (tmp_path / "pixels").iterdir() if path.name.startswith(".")]
