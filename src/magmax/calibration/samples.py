"""Texts of tasks from CSV files and folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import MagMaxError, nearest_hint


class LabelledTexts(NamedTuple):
    """Texts and the label of each."""

    texts: list[str]
    labels: list[str]

    def pick(self, rows: Sequence[int]) -> LabelledTexts:
        return LabelledTexts([self.texts[row] for row in rows], [self.labels[row] for row in rows])


def read_samples(path: Path, labelled: bool = True) -> LabelledTexts:
    """Texts: a CSV whose first line names the columns text and label, or a folder of LABEL/NAME.txt.

    Unlabelled ones need no label: the column text, or a folder with .txt files anywhere in it. Raises MagMaxError where
    it is neither, or holds no sample.
    """
    columns = ("text", "label") if labelled else ("text",)
    columns_text = f"the column{'s' * labelled} {' and '.join(columns)}"
    if path.is_dir():
        files = sorted(path.glob("*/*.txt" if labelled else "**/*.txt"))
        texts = LabelledTexts([file.read_text("utf-8") for file in files], [file.parent.name for file in files])
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise MagMaxError(f"{path}: cannot be read as a CSV with {columns_text}: {error}") from error
        for line, row in enumerate(rows, start=2):
            if any(row.get(column) is None for column in columns):
                raise MagMaxError(f"{path}, line {line}: needs {columns_text}; it has {sorted(map(str, row))}")
        texts = LabelledTexts([row["text"] for row in rows], [row.get("label") or "" for row in rows])
    if not texts.texts:
        raise MagMaxError(f"{path}: holds no sample; give a CSV with {columns_text}, or LABEL/NAME.txt")
    return texts


def sample_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return where each task's samples are: FOLDER/NAME.csv, or a folder FOLDER/NAME. Raises MagMaxError where one
    lacks.
    """
    paths: list[Path] = []
    for name in names:
        places = [place for place in (folder / f"{name}.csv", folder / name) if place.exists()]
        if not places:
            there = sorted(place.stem for place in folder.glob("*"))
            hint = nearest_hint(name, there) if there else "the folder is empty, or not there"
            raise MagMaxError(f"{folder}: has no samples of {name!r} ({name}.csv, or a folder {name}); {hint}")
        paths.append(places[0])
    return paths
