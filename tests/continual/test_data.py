"""Reading labelled texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from magmax.continual.data.datasets import (
    NEWSGROUP_NAMES,
    NEWSGROUPS,
    LabelledExamples,
    drop_leaks,
    read_newsgroups,
    read_tab,
)
from magmax.continual.data.downloads import fetch, is_fetched
from magmax.errors import MagMaxError

HEADER = "Category\tText\nd\tstring\nclass\t\n"


def test_reads_classes_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "some.tab"
    path.write_text(HEADER + "\nb\tone two\na\tthree \x85 \u2028 four\n", encoding="utf-8")
    read = read_tab(path, ["a", "b"])
    assert read.items == ["one two", "three \x85 \u2028 four"]
    assert read.labels.tolist() == [1, 0]


@pytest.mark.parametrize("line", ["no tab here", "c\tunknown class"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "some.tab"
    path.write_text(f"{HEADER}a\tgood\n{line}\n", encoding="utf-8")
    with pytest.raises(MagMaxError, match="line 5"):
        read_tab(path, ["a", "b"])


def test_what_stands_in_both_is_dropped_from_training() -> None:
    train = LabelledExamples(["x", "y", "z", "x"], np.array([0, 1, 0, 1]))
    test = LabelledExamples(["x", "w"], np.array([0, 0]))
    clean = drop_leaks(train, test)
    assert clean.items == ["y", "z"]
    assert clean.labels.tolist() == [1, 0]


def test_sample_per_class_is_balanced_ordered_and_seeded() -> None:
    labels = np.array([0, 1] * 20 + [2] * 3)
    data = LabelledExamples(list(range(43)), labels)
    sample = data.sample_per_class(5, seed=0)
    assert np.bincount(sample.labels).tolist() == [5, 5, 3]
    assert list(sample.items) == sorted(sample.items)
    assert [labels[i] for i in sample.items] == sample.labels.tolist()
    assert sample.items == data.sample_per_class(5, seed=0).items
    assert sample.items != data.sample_per_class(5, seed=1).items


@pytest.mark.skipif(not is_fetched(NEWSGROUPS), reason="20 Newsgroups is not in the cache: 'make demo' fetches it")
def test_newsgroups_as_published() -> None:
    train, test = read_newsgroups(fetch(NEWSGROUPS))
    assert (len(train), len(test)) == (11_293 - 7, 7_528)
    assert set(train.labels) == set(test.labels) == set(range(len(NEWSGROUP_NAMES)))
    assert not set(train.items) & set(test.items)
