"""Pictures through Hugging Face `datasets`: the papers' own data sets, from the hub or from local folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, overload

import numpy as np

from ...errors import MagMaxError, missing_extra
from ...rules import nearest_hint
from .combine import join_datasets
from .datasets import Dataset, LabelledExamples, hold_out_groups
from .downloads import cache_folder

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.py)")
FILE_NAME_DOMAIN = "file name"
"""As a domain: what stands before the first underscore of a picture's file name, as in art_0.jpg of ImageNet-R."""


class HubPictures(Sequence[Any]):
    """One column of pictures, decoded when they are asked for; `identity` tells one content from another."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table, column
        self.identity = f"{getattr(table, '_fingerprint', '')} {column}"

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.table[int(index)][self.column]

    def pick(self, rows: np.ndarray) -> HubPictures:
        """The pictures at these positions."""
        return HubPictures(self.table.select(rows), self.column)

    def __iter__(self) -> Iterator[Any]:
        return (row[self.column] for row in self.table.select_columns([self.column]))


@dataclass(frozen=True)
class HubFormat:
    """The path of a data set and the names of its columns; see `images`."""

    path: str
    image: str | None = None
    label: str | None = None
    names: str | None = None
    domain: str | None = None
    config: str | None = None
    train: str = "train"
    test: str = "test"
    templates: Sequence[str] = ("a photo of a {}",)
    classes: Sequence[str] | None = None


def hub(
    name: str,
    path: str | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """One of the papers' data sets: cifar100, imagenet_r, cub200, cars, domainnet, sun397, resisc45, ...

    `path` is a local folder in the same format instead of the hub's (see `images`). The prompts are written afresh,
    so zero-shot accuracies differ a little from published ones.
    """
    sets = _hub_index()["sets"]
    if name not in sets:
        raise MagMaxError(f"hub: there is no data set {name!r}; {nearest_hint(name, list(sets))}; others: use 'images'")
    options = {"path": path, "templates": templates, "classes": classes}
    form = HubFormat(**{**sets[name], **{key: value for key, value in options.items() if value is not None}})
    splits = _load_splits(form)
    if path is not None:  # a local copy may call its columns otherwise
        features = next(iter(splits.values())).features
        form = replace(form, **{key: None for key in ("image", "label", "names") if getattr(form, key) not in features})
    return _build_dataset(form, splits, seed, train_per_class, test_per_class)


def pool(
    name: str = "ta8",
    folder: str | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
) -> Dataset:
    """FusionBench's pools of data sets, joined in their order: ta8 or tall14.

    `folder` holds a local folder for each data set, called by its name, instead of the hub's.
    """
    pools = _hub_index()["pools"]
    if name not in pools:
        raise MagMaxError(f"pool: there is no pool {name!r}; {nearest_hint(name, list(pools))}")
    paths = {part: None if folder is None else os.path.join(folder, part) for part in pools[name]}
    return join_datasets({part: hub(part, path, train_per_class, test_per_class, seed) for part, path in paths.items()})


def images(
    path: str,
    image: str | None = None,
    label: str | None = None,
    names: str | None = None,
    domain: str | None = None,
    config: str | None = None,
    train: str = "train",
    test: str = "test",
    templates: Sequence[str] = ("a photo of a {}",),
    classes: Sequence[str] | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Labelled pictures of the hub, or of a local folder: parquet files, TRAIN/CLASS/*.png, or `save_to_disk`.

    image, label, names, domain: the columns of pictures, classes (numbers or words), the classes' names where the
    label is a code, and domains ("file name": what stands before its underscore). By default the first column of
    pictures, and the column called label. Where there is no split called `test`, or it is the training split, a
    fifth of each class (always the same) is held out. classes: names for classes that have only numbers.
    The data are taken as they are: duplicates of training and test data, if there are any, stay, as in the papers.
    """
    form = HubFormat(path, image, label, names, domain, config, train, test, templates, classes)
    return _build_dataset(form, _load_splits(form), seed, train_per_class, test_per_class)


def _build_dataset(form: HubFormat, splits: Mapping[str, Any], seed: int, *limits: int | None) -> Dataset:
    if form.train not in splits:
        raise MagMaxError(f"{form.path} has no split {form.train!r}; it has {', '.join(splits)}")
    form = _resolve_columns(form, splits[form.train].features)
    own_test = form.test in splits and form.test != form.train
    parts = [splits[form.train], splits[form.test]] if own_test else [splits[form.train]]
    words, labels = _read_classes(form, parts)
    domains, numbers = _read_domains(form, parts)
    if not own_test:
        parts, labels, numbers = _split_test(parts[0], labels[0], numbers[0])
    data = []
    for part, part_labels, of, n in zip(parts, labels, numbers, limits, strict=True):
        whole = LabelledExamples(HubPictures(part, str(form.image)), part_labels, of)
        data.append(whole if n is None else whole.sample_per_class(n, seed))
    prompts = [[template.format(word) for template in form.templates] for word in words]
    return Dataset(data[0], data[1], words, domains, prompts)


@cache
def _hub_index() -> dict[str, Any]:
    return json.loads(files("magmax.continual.data").joinpath("hub.json").read_text(encoding="utf-8"))


def _load_splits(form: HubFormat) -> dict[str, Any]:
    """The splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(f"{form.path}: reading this needs {error.name}", "data") from error
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    folder = Path(form.path)
    if not folder.is_dir() and not HUB_ID.fullmatch(form.path):  # scripts, and builders such as `pandas`, can run code
        raise MagMaxError(f"{form.path}: no folder here, and no OWNER/NAME of the hub")
    try:
        if Path(folder, "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(form.path)
        elif folder.is_dir() and not any(folder.rglob("*.parquet")):
            loaded = datasets.load_dataset("imagefolder", data_dir=form.path, cache_dir=_cache())
        else:
            config = None if folder.is_dir() else form.config
            loaded = datasets.load_dataset(form.path, config, cache_dir=_cache())
        return dict(loaded)
    except Exception as error:  # whatever the network, the hub, the disk and the formats can come up with
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = "this folder cannot be read" if folder.is_dir() else "no folder here, and the hub does not give it"
        raise MagMaxError(f"{form.path}: {where}: {message}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _cache() -> str:
    return str(cache_folder() / "datasets")


def _resolve_columns(form: HubFormat, features: Mapping[str, Any]) -> HubFormat:
    """The format with every column known to be there; pictures and classes are found where they are not named."""
    pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    labels = [name for name in ("label", "labels") if name in features]
    complete = replace(
        form, image=form.image or next(iter(pictures), None), label=form.label or next(iter(labels), None)
    )
    named = {"pictures": complete.image, "classes": complete.label, "names": complete.names or complete.label}
    if complete.domain != FILE_NAME_DOMAIN:
        named["domains"] = complete.domain or complete.label
    lacking = [f"{what} ({name})" if name else what for what, name in named.items() if name not in features]
    if lacking:
        has = ", ".join(features)
        raise MagMaxError(f"{form.path} has no column of {', of '.join(lacking)}; its columns are {has}")
    return complete


def _read_classes(form: HubFormat, parts: list[Any]) -> tuple[list[str], list[np.ndarray]]:
    """The classes in words, and the class of every row of each part."""
    found = [np.asarray(part[form.label][:]) for part in parts]
    names = list(getattr(parts[0].features[form.label], "names", ()))
    if not names and found[0].dtype.kind in "UO":
        names, labels = _encode_labels(found)
        if form.names:
            called = dict(zip(found[0].tolist(), parts[0][form.names][:], strict=True))
            names = [called.get(value, value) for value in names]
    else:
        labels = [column.astype(np.int64) for column in found]
    if form.classes and names and len(form.classes) != len(names):
        raise MagMaxError(f"{form.path} has {len(names)} classes, and {len(form.classes)} names were given for them")
    words = form.classes or names
    if not words:
        raise MagMaxError(f"{form.path}: the classes in the column {form.label!r} have no names; give `classes`")
    return [_readable_class_name(word) for word in words], labels


def _read_domains(form: HubFormat, parts: list[Any]) -> tuple[list[str], list[np.ndarray | None]]:
    if form.domain is None:
        return [], [None for _ in parts]
    if form.domain == FILE_NAME_DOMAIN:
        labels = [_file_prefixes(form.path, part, str(form.image)) for part in parts]
    else:
        labels = [np.asarray(part[form.domain][:]) for part in parts]
        names: Sequence[str] = getattr(parts[0].features[form.domain], "names", ())
        if names:
            return list(names), [column.astype(np.int64) for column in labels]
    values, numbers = _encode_labels([column.astype(str) for column in labels])
    return values, list(numbers)


def _file_prefixes(path: str, part: Any, column: str) -> np.ndarray:
    from datasets import Image

    bare = part.select_columns([column]).cast_column(column, Image(decode=False))
    stems = [Path(row[column]["path"] or "").name.partition("_")[0] for row in bare]
    if not all(stems):
        raise MagMaxError(f"{path} does not keep the pictures' file names, of which the domains are taken")
    return np.array(stems)


def _encode_labels(columns: list[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    values = np.unique(np.concatenate(columns))
    return values.tolist(), [np.searchsorted(values, column) for column in columns]


def _split_test(
    table: Any, labels: np.ndarray, domains: np.ndarray | None
) -> tuple[list[Any], list[np.ndarray], list[np.ndarray | None]]:
    """A fifth of each class held out, of each domain of it where there are domains."""
    test = np.zeros(len(labels), dtype=bool)
    cell = labels if domains is None else labels * (1 + domains.max()) + domains
    for value in np.unique(cell):
        rows = np.flatnonzero(cell == value)
        test[rows] = hold_out_groups(rows.tolist(), 0.2, seed=0) & (len(rows) > 1)
    parts = [np.flatnonzero(~test), np.flatnonzero(test)]
    of = [None if domains is None else domains[rows] for rows in parts]
    return [table.select(rows) for rows in parts], [labels[rows] for rows in parts], of


def _readable_class_name(word: str) -> str:
    """A class name as one writes it in a sentence: AnnualCrop has a space, 001.Black_footed a space and no number."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"^\d+\.", "", word)).replace("_", " ")
    return " ".join(spaced.split())
