"""Reuters-52 and the sentiments, from tiny files of the same format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from magmax.continual.data.datasets import hold_out_groups
from magmax.continual.data.texts import (
    REUTERS,
    REUTERS_NAMES,
    SENTIMENT_DOMAINS,
    SENTIMENTS,
    read_reuters,
    read_sentiments,
)
from magmax.errors import MagMaxError

HEADER = "Category\tText\nd\tstring\nclass\t\n"


def test_reuters_drops_from_training_what_is_tested(tmp_path: Path) -> None:
    (tmp_path / "r52-train.tab").write_text(HEADER + "tea\tleaves\nzinc\tore\ntea\tboth\n")
    (tmp_path / "r52-test.tab").write_text(HEADER + "tea\tboth\n")
    train, test = read_reuters(tmp_path)
    names = list(REUTERS_NAMES)
    assert (train.items, [names[c] for c in train.labels]) == (["leaves", "ore"], ["tea", "zinc"])
    assert test.items == ["both"]
    assert len(names) == 52
    assert names == sorted(names)


def write_sentiments(folder: Path, **lines: str) -> None:
    for domain in SENTIMENT_DOMAINS:
        (folder / f"{domain}.txt").write_bytes(lines.get(domain, "1\t1.0\tfine\r\n2\t-1.0\tbad").encode())


def test_the_sign_of_the_rating_is_the_class_and_the_file_the_domain(tmp_path: Path) -> None:
    movies = "1\t2.5\tclichés &amp; all\r\n2\t-0.3\tno\r\n3\t0.29\tneither\r\n4\t-4\tawful"
    write_sentiments(tmp_path, movies=movies)
    train, test = read_sentiments(tmp_path)
    both = [*zip(train.items, train.labels, train.domains, strict=True)]  # pyright: ignore
    both += [*zip(test.items, test.labels, test.domains, strict=True)]  # pyright: ignore
    mine = {(text, int(label)) for text, label, domain in both if SENTIMENT_DOMAINS[domain] == "movies"}
    assert mine == {("clichés & all", 1), ("no", 0), ("awful", 0)}
    assert not set(train.items) & set(test.items)


def test_the_sentences_of_a_document_stay_together(tmp_path: Path) -> None:
    lines = "\n".join(f"{document}_{i}\t1.0\t{document} says {i}" for document in range(20) for i in range(4))
    write_sentiments(tmp_path, editorials=lines)
    train, test = read_sentiments(tmp_path)
    documents = [{text.split()[0] for text in data.items if "says" in text} for data in (train, test)]
    assert not documents[0] & documents[1]
    assert len(documents[1]) == 4  # a fifth


@pytest.mark.parametrize("line", ["1\t0.5", "1\tgood\ttext", "one line without tabs"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    write_sentiments(tmp_path, tweets=f"1\t1.0\tfine\n{line}\n")
    with pytest.raises(MagMaxError, match=r"tweets.txt, line 2"):
        read_sentiments(tmp_path)


def test_held_out_groups_are_whole_seeded_and_at_least_one() -> None:
    groups = [i // 3 for i in range(60)]
    test = hold_out_groups(groups, 0.2, seed=0)
    assert test.sum() == 12
    assert all(len({bool(test[i]) for i in range(60) if groups[i] == g}) == 1 for g in set(groups))
    assert (test == hold_out_groups(groups, 0.2, seed=0)).all()
    assert (test != hold_out_groups(groups, 0.2, seed=1)).any()
    assert hold_out_groups(["only"], 0.2, seed=0).tolist() == [True]


def test_two_sources_of_one_package_have_folders_of_their_own() -> None:
    assert REUTERS.folder
    assert all(len(file.sha256) == 64 for source in (REUTERS, SENTIMENTS) for file in source.files.values())
    assert np.unique([file.inside for file in SENTIMENTS.files.values()]).size == 4
