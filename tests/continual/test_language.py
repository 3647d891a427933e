"""Decoder language models: tokens, loss and perplexity against plain definitions, and the benchmark on a toy."""

from __future__ import annotations

import importlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from magmax import MagMaxError
from magmax.continual import language
from magmax.continual.data.datasets import LabelledExamples
from magmax.continual.language import (
    CORPORA,
    NextTokenLoss,
    TextCorpus,
    bytes_of,
    corpus,
    llama,
    perplexity_per_byte,
    split_validation,
    train_tokenizer,
    windows,
)
from magmax.continual.training.fit import FitSettings, fit
from magmax.continual.training.weight_files import load_weights

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def speech(words: str, count: int, seed: int = 0) -> list[str]:
    """Sentences of a few words, é and 雪 among them."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice([*words.split(), "é", "雪"], 9)) for _ in range(count)]


TEXTS = speech("the cat sat on a mat", 60)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 280)


@pytest.fixture
def model() -> torch.nn.Module:
    return llama(280, 16, 2, 2, 12, seed=0)


def test_tokens_give_back_every_text_and_its_bytes(tokenizer):
    for text in (*TEXTS, "Ünseen LETTERS, \t and\n lines 🙂"):
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded.ids) == text
        whole = windows(tokenizer, [text], 1)
        assert bytes_of(tokenizer, whole) == len((text + "\n").encode())


def test_windows_are_the_texts_in_order_without_the_rest(tokenizer):
    data = windows(tokenizer, TEXTS, 12)
    stream = [n for text in TEXTS for n in tokenizer.encode(text + "\n").ids]
    assert np.concatenate([item[1:] for item in data.items]).tolist() == stream[: len(stream) // 12 * 12]
    assert {int(item[0]) for item in data.items} == {tokenizer.token_to_id("<s>")}
    some = windows(tokenizer, TEXTS, 12, most=5)
    apart = [n * len(data) // 5 for n in range(5)]
    assert all((ours == data.items[n]).all() for ours, n in zip(some.items, apart, strict=True))
    with pytest.raises(MagMaxError, match="fill no window of 12"):
        windows(tokenizer, ["a"], 12)


@pytest.mark.parametrize("batch", [1, 7])
def test_perplexity_is_that_of_each_token_after_those_before_it(tokenizer, model, batch):
    data = windows(tokenizer, TEXTS[:8], 12)
    nats = 0.0
    for item in data.items:
        for place in range(1, len(item)):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(item[None, :place])).logits[0, -1].double()
            nats -= torch.log_softmax(logits, -1)[item[place]].item()
    text = tokenizer.decode([n for item in data.items for n in item[1:]])
    wanted = math.exp(nats / len(text.encode()))
    assert perplexity_per_byte(NextTokenLoss(model), tokenizer, data, batch) == pytest.approx(wanted, rel=1e-5)


def test_the_loss_is_the_architectures_own_and_bfloat16_is_near(tokenizer, model):
    data = windows(tokenizer, TEXTS, 12)
    tokens = torch.from_numpy(np.stack(data.items[:6]))
    ours = NextTokenLoss(model)(data.items[:6], torch.zeros(6))
    assert ours.item() == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=1e-6)
    half = NextTokenLoss(model, "bfloat16")(data.items[:6], torch.zeros(6))
    assert half.dtype == torch.float32
    assert half.item() != ours.item()
    assert half.item() == pytest.approx(ours.item(), rel=1e-2)


def test_fitting_teaches_the_text_and_a_seed_draws_the_same_weights(tokenizer, model):
    again = llama(280, 16, 2, 2, 12, seed=0).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    data = windows(tokenizer, TEXTS, 12)
    before = perplexity_per_byte(NextTokenLoss(model), tokenizer, data)
    fit(model, data, NextTokenLoss(model), FitSettings(30, 8, 1e-2), 0)
    assert perplexity_per_byte(NextTokenLoss(model), tokenizer, data) < before / 2


def test_a_tenth_of_the_training_texts_is_set_aside_neighbours_together():
    texts = [str(n) for n in range(400)]
    found = split_validation(texts, ["test"])
    assert sorted([*found.train, *found.validation], key=int) == texts
    assert found.validation == [str(n) for start in range(72, 400, 80) for n in range(start, start + 8)]
    assert found.test == ["test"]


def test_each_domain_has_its_own_texts_whatever_their_rating(monkeypatch):
    data = LabelledExamples(["a", "b", "c", "d"], np.zeros(4, np.int64), np.array([0, 2, 1, 2]))
    asked = []
    monkeypatch.setattr(language, "fetch", lambda source: source)
    monkeypatch.setattr(language, "read_sentiments", lambda folder, least: asked.append(least) or (data, data))
    assert corpus("movies") == TextCorpus(["b", "d"], [], ["b", "d"])
    assert corpus("products").train == ["c"]
    assert set(asked) == {0.0}
    with pytest.raises(MagMaxError, match="no texts 'movie'; did you mean 'movies'"):
        corpus("movie")


@pytest.fixture
def benchmark(monkeypatch) -> Any:
    """The benchmark's command on texts of its own, in threads."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = importlib.import_module("language")
    words = {"general": "a b c d e f g", "one": "a cat sat", "two": "f g hat"}
    for name, of in words.items():
        made = TextCorpus(speech(of, 80, 1), speech(of, 30, 2), speech(of, 30, 3))
        monkeypatch.setitem(CORPORA, name, lambda made=made: made)
    monkeypatch.setattr(command, "process_pool", ThreadPoolExecutor)
    return command


RECIPE = {
    "pretraining": ["general"],
    "domains": ["one", "two"],
    "model": {"vocabulary": 270, "width": 16, "layers": 1, "heads": 2, "length": 12},
    "pretrain": {"steps": 20, "batch": 4, "learning_rate": 0.01},
    "tune": {"steps": 6, "batch": 4, "learning_rate": 0.01},
    "seeds": [0, 1],
    "training": ["sequential", "independent"],
    "rules": ["average", {"ties": {"density": 0.5}}, "tunable"],
    "calibrations": ["none", "norm"],
    "samples": 3,
    "factors": [0.3, 1.0],
    "windows": {"validation": 5, "test": 9},
    "precision": "float32",
}


def run(benchmark: Any, folder: Path, discard: bool = False, **changes: Any) -> list[dict[str, Any]]:
    """The lines of the file of cells after a run, in the order in which they were written."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    benchmark.main(folder / "recipe.yaml", out=folder / "out", work=folder / "work", discard=discard)
    return [json.loads(line) for line in (folder / "out" / "cells.jsonl").read_text().splitlines()]


def test_the_benchmark_measures_what_it_says_and_only_what_is_missing(benchmark, tmp_path):
    first = run(benchmark, tmp_path)
    assert len(first) == 2 * 2 * (1 + 3 * 2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("theta_*")}
    every = ["none", "norm", "ellipsoid", "fsc", "dsc"]
    second = run(benchmark, tmp_path, calibrations=every)
    assert second[: len(first)] == first
    assert len(second) == len(first) + 2 * 2 * 3 * 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for record in second:
        check(record, tmp_path / "work")
    table = (tmp_path / "out" / "results.md").read_text()
    assert "## sequential" in table
    assert table.count("| average | 1; chosen") == 2
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["records"]) == len(second)
    third = run(benchmark, tmp_path, calibrations=every, discard=True)
    assert third == second
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    other = run(benchmark, tmp_path, tune=RECIPE["tune"] | {"steps": 3}, discard=True)
    assert len(other) == len(second) + len(first)
    assert not list((tmp_path / "work").glob("*seed*"))


def test_in_feature_space_one_number_a_tensor_in_weight_space_is_undone(benchmark, tmp_path):
    cells = run(
        benchmark, tmp_path, rules=["average"], calibrations=["none", "fsc", "dsc"], seeds=[0], training=["sequential"]
    )
    found = {r["recipe"]["calibration"]: r["perplexity"] for r in cells if r["recipe"]["rule"] == "average"}
    for domain in ("one", "two"):
        assert found["dsc"][domain] == pytest.approx(found["fsc"][domain], rel=1e-4)
        assert found["fsc"][domain] != pytest.approx(found["none"][domain], rel=1e-4)


def check(record: dict[str, Any], work: Path) -> None:
    """The average of the checkpoints as plainly as can be, on the test texts; the factor is the best of those tried."""
    recipe = record["recipe"]
    seed = recipe["seed"]
    assert sorted(record["order"]) == ["one", "two"]
    if recipe["rule"] == "references":
        assert set(record["perplexity"]) == {"theta_0", "theta_1", "theta_2"}
        assert 0 < record["cosine"]["mean"] <= 1
        return
    if recipe["calibration"] == "none":
        assert record["search"][f"{record['chosen']['scaling_factor']:g}"] == min(record["search"].values())
    if (recipe["rule"], recipe["calibration"]) != ("average", "none"):
        return
    paths = [work / f"{recipe['training']}-seed{seed}" / f"theta_{n}.safetensors" for n in (1, 2)]
    one, two = map(load_file, paths)
    model = llama(270, 16, 1, 2, 12, seed=0)
    model.load_state_dict({key: (one[key] + two[key]) / 2 for key in one})
    tokenizer = train_tokenizer(speech("a b c d e f g", 80, 1), 270)
    for domain, words in (("one", "a cat sat"), ("two", "f g hat")):
        data = windows(tokenizer, speech(words, 30, 3), 12, most=9)
        found = perplexity_per_byte(NextTokenLoss(model), tokenizer, data)
        assert record["perplexity"][domain] == pytest.approx(found, rel=1e-5)
        assert record["test_bytes"][domain] == bytes_of(tokenizer, data)


@pytest.mark.parametrize("training", ["sequential", "independent"])
def test_a_chain_fine_tunes_from_where_it_says(training, benchmark, tmp_path):
    cells = run(benchmark, tmp_path, rules=["average"], calibrations=["none"], seeds=[0], training=[training])
    work = tmp_path / "work"
    found = load_file(work / f"{training}-seed0" / "theta_2.safetensors")
    model = llama(270, 16, 1, 2, 12, seed=0)
    load_weights(
        model,
        work / f"{training}-seed0" / "theta_1.safetensors"
        if training == "sequential"
        else work / "theta_0.safetensors",
    )
    tokenizer = train_tokenizer(speech("a b c d e f g", 80, 1), 270)
    (domain,) = {record["order"][1] for record in cells}
    data = windows(tokenizer, speech("a cat sat" if domain == "one" else "f g hat", 80, 1), 12)
    fit(model, data, NextTokenLoss(model), FitSettings(**RECIPE["tune"]), [0, 2])
    assert all(torch.equal(tensor, found[key]) for key, tensor in model.state_dict().items())
