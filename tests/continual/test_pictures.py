"""Fashion-MNIST, digits and emoji, from tiny files of the same formats."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from magmax.continual.data.pictures import EMOJI_VENDORS, read_digits, read_emoji, read_fashion, read_idx
from magmax.errors import MagMaxError

Image = pytest.importorskip("PIL.Image")
RANDOM = np.random.default_rng(0)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_fashion_pictures_and_labels(tmp_path: Path) -> None:
    pictures = RANDOM.integers(0, 256, (7, 4, 4), dtype=np.uint8)
    for part, rows in (("train", [0, 1, 2, 3]), ("t10k", [4, 5, 2])):  # 2 is in both
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pictures[rows])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.array(rows, dtype=np.uint8))
    train, test = read_fashion(tmp_path)
    assert train.labels.tolist() == [0, 1, 3]
    assert test.labels.tolist() == [4, 5, 2]
    assert all((picture == pictures[label]).all() for picture, label in zip(train.items, train.labels, strict=True))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\0\0\x08\x02" + struct.pack(">2I", 2, 3) + b"12345", r"should hold \(2, 3\) bytes, and holds 5"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"1234", "no IDX file of bytes"),
        (b"\0\0\x08\x03\0\0", "no IDX file of bytes"),
    ],
)
def test_a_bad_idx_file(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "some.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(MagMaxError, match=why):
        read_idx(path)


def test_digits_become_bytes_and_a_fifth_of_each_is_held_out(tmp_path: Path) -> None:
    pictures = RANDOM.integers(0, 256, (10, 10, 784))
    for digit in range(10):
        flat = [round(value / 255, 3) for value in pictures[digit].ravel().tolist()]
        (tmp_path / f"{digit}.json").write_text(json.dumps({"data": flat}))
    train, test = read_digits(tmp_path)
    assert np.bincount(test.labels).tolist() == [2] * 10
    assert np.bincount(train.labels).tolist() == [8] * 10
    for data in (train, test):
        for picture, digit in zip(data.items, data.labels, strict=True):
            assert any((picture.ravel() == known).all() for known in pictures[digit])
    (tmp_path / "3.json").write_text(json.dumps({"data": [0.5] * 785}))
    with pytest.raises(MagMaxError, match=r"3.json holds 785 numbers"):
        read_digits(tmp_path)


def write_emoji(folder: Path, count: int, lonely: bool = False) -> list[np.ndarray]:
    """A sheet of `count` cells, 5 a row, in colours of their own; the first quarter of each is transparent."""
    cells = []
    sheet = np.zeros((66 * 5, 66 * 5, 4), dtype=np.uint8)
    entries = []
    for i in range(count):
        cell = RANDOM.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        cell[..., 3] = 255
        cell[:32, :32, 3] = 0
        x, y = i % 5, i // 5
        sheet[y * 66 + 1 : y * 66 + 65, x * 66 + 1 : x * 66 + 65] = cell
        cells.append(cell)
        category = "Lonely" if lonely and i == 0 else f"Kind {i % 2}"
        entries.append({"unified": f"1F{i:03}", "category": category, "sheet_x": x, "sheet_y": y})
        entries[-1] |= {f"has_img_{vendor}": i != 3 for vendor in EMOJI_VENDORS}
    folder.mkdir()
    Image.fromarray(sheet).save(folder / "sheet.png")
    (folder / "emoji.json").write_text(json.dumps(entries))
    return cells


def test_emoji_come_from_the_sheet_on_white_and_are_split_by_emoji(tmp_path: Path) -> None:
    cells = {vendor: write_emoji(tmp_path / vendor, 25, lonely=True) for vendor in EMOJI_VENDORS}
    train, test, names = read_emoji([tmp_path / vendor for vendor in EMOJI_VENDORS], "category")
    assert names == ["Kind 0", "Kind 1"]  # a class of one emoji cannot be both trained and tested
    assert len(train) + len(test) == 2 * 23  # number 3 is not drawn, number 0 is alone
    seen: dict[str, set[int]] = {}
    for part, data in (("train", train), ("test", test)):
        assert set(data.domains.tolist()) == {0, 1}  # pyright: ignore
        for picture, label, domain in zip(data.items, data.labels, data.domains, strict=True):  # pyright: ignore
            assert (picture[:32, :32] == 255).all()
            own = cells[EMOJI_VENDORS[domain]]
            i = next(i for i, cell in enumerate(own) if (cell[32:, 32:, :3] == picture[32:, 32:]).all())
            assert i % 2 == label
            seen.setdefault(part, set()).add(i)
    assert not seen["train"] & seen["test"]
