"""Tunable MagMax against its definition over one long vector, and against exact solvers of the transport problem."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from tests.models import load_tensors, same_bytes, save_tensors
from tests.rules.test_planned import flat, model

import magmax
from magmax import MagMaxError
from magmax.checkpoints import blocks, open_checkpoint
from magmax.merging.cost import preview
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.rules import MagMax, Prune, Rule, TaskVectorTransform, Tunable, chain
from magmax.rules.random import random_words
from magmax.rules.statistics import Address
from magmax.rules.tunable import dual_prices, windows
from magmax.rules.tunable.quotas import quotas

SELECTIONS = ["optimal", "random", "smallest"]
PREFERENCES = [(1, 1, 1), (8, 1, 1), (0, 1, 3), (1, 0, 2), (0, 0, 1), (1, 3, 9), (9, 3, 1), (5, 1, 0)]


def last_of_largest(magnitudes: np.ndarray, among: list[int]) -> np.ndarray:
    """argmax over some rows, of equal ones the last."""
    return np.array([max(among, key=lambda t: (column[t], t)) for column in magnitudes.T], int)


def published(vectors: np.ndarray, quota: list[int], keys, smallest: bool) -> np.ndarray:
    """The paper's selection, step by step, over vectors of elements that moved; keys(stream) are random numbers."""
    size, among = np.abs(vectors), [t for t, n in enumerate(quota) if n]
    win = last_of_largest(size, among)

    def take(members, count: int, order) -> list[int]:
        return sorted(members, key=lambda p: (-int(order[p]) if order.dtype.kind != "f" else -order[p], p))[:count]

    for task in among[:0:-1]:
        members = np.flatnonzero(win == task).tolist()
        kept = take(members, quota[task], size[task] if smallest else keys(task + 1))
        gone = sorted(set(members) - set(kept))
        win[gone] = last_of_largest(size[:, gone], [t for t in among if t < task])
    first, *rest = among
    members = np.flatnonzero(win == first).tolist()
    released = sorted(set(members) - set(take(members, quota[first], size[first] if smallest else keys(first + 1))))
    need = {t: quota[t] - int((win == t).sum()) for t in rest}
    label = dict(zip(released, last_of_largest(size[:, released], rest), strict=True))
    left = set(released)
    for task in rest:
        given = take([p for p in released if label[p] == task], need[task], keys(0))
        win[given] = task
        need[task] -= len(given)
        left -= set(given)
    queue = take(left, len(left), keys(len(vectors) + 1))
    for task in rest:
        win[queue[: need[task]]] = task
        queue = queue[need[task] :]
    return win


def expected(base, models, preference, smallest: bool, seed: int) -> np.ndarray:
    vectors = np.array([flat(m) - flat(base) for m in models])
    moved = (vectors != 0).any(axis=0)

    def keys(stream: int) -> np.ndarray:
        parts = [random_words("tunable", seed, stream, Address(key, 0), base[key].numel()) for key in sorted(base)]
        return np.concatenate(parts)[moved] >> 1

    merged = np.zeros_like(vectors[0])
    win = published(vectors[:, moved], quotas(preference, int(moved.sum())), keys, smallest)
    merged[moved] = vectors[:, moved][win, np.arange(len(win))]
    return merged


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("selection", ["random", "smallest"])
@pytest.mark.parametrize("span", ["model", "tensor"])
def test_the_published_selection_is_its_definition_bit_for_bit(kind, preference, selection, span):
    base, models = model(0, kind), [model(n, kind) for n in (1, 2, 3)]
    rule = Tunable(preference=preference, selection=selection, span=span, seed=5)
    merged = magmax.merge(rule, base, models, 1.0)
    for keys in [list(base)] if span == "model" else [[key] for key in base if base[key].numel()]:
        start = {k: base[k] for k in keys}
        ends = [{k: m[k] for k in keys} for m in models]
        ours = flat({k: merged[k] for k in keys})
        assert (ours == flat(start) + expected(start, ends, preference, selection == "smallest", 5)).all()


def supplied(base, models, merged) -> tuple[np.ndarray, np.ndarray]:
    """For every element that moved, which tasks' element was taken: (task, element), and the vectors."""
    vectors = np.array([flat(m) - flat(base) for m in models])
    moved = (vectors != 0).any(axis=0)
    taken = flat(merged) - flat(base)
    assert not taken[~moved].any()
    return vectors[:, moved] == taken[moved], vectors[:, moved]


@given(
    st.lists(st.sampled_from([0, 0.5, 1, 2, 7]), min_size=4, max_size=4).filter(any),
    st.sampled_from(SELECTIONS),
    st.sampled_from(["tensor", "model"]),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_task_supplies_exactly_its_quota_verbatim(preference, selection, span, seed):
    base = {key: torch.zeros_like(tensor) for key, tensor in model(0, "fine").items()}
    models = [model(10 * seed + n, "fine") for n in range(4)]
    frozen = torch.arange(500) < 200
    for tuned in models:
        tuned["d"][frozen] = 0
    merged = magmax.merge(Tunable(preference=preference, span=span, selection=selection), base, models, 1.0)
    for keys in [list(base)] if span == "model" else [[key] for key in base if base[key].numel()]:
        part = [{k: m[k] for k in keys} for m in (base, *models, merged)]
        from_task, vectors = supplied(part[0], part[1:-1], part[-1])
        assert (from_task.sum(axis=0) == 1).all()
        assert from_task.sum(axis=1).tolist() == quotas(preference, vectors.shape[1])


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_magmaxs_own_counts_give_magmax(kind, selection):
    base, models = model(0, kind), [model(n, kind) for n in (1, 2, 3)]
    vectors = np.array([flat(m) - flat(base) for m in models])
    wins = last_of_largest(np.abs(vectors[:, (vectors != 0).any(axis=0)]), [0, 1, 2])
    rule = Tunable(preference=np.bincount(wins, minlength=3).tolist(), selection=selection)
    assert same_bytes(magmax.merge(rule, base, models), magmax.merge("magmax", base, models))


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_optimal_retains_as_much_as_an_exact_solver(kind, tasks, monkeypatch):
    base, *models = (
        {k: t[:200] for k, t in model(n, kind).items() if k in ("a.weight", "d")} for n in range(tasks + 1)
    )
    preference = [3, 1, 0.5, 7, 0, 1][:tasks]
    told: list[str] = []
    merged = magmax.merge(
        Tunable(preference=preference), base, models, 1.0, execution=ExecutionOptions(note=told.append)
    )
    vectors = np.array([flat(m) - flat(base) for m in models])
    sizes = np.abs(vectors[:, (vectors != 0).any(axis=0)]).astype(np.float64)
    rows = np.repeat(np.arange(tasks), quotas(preference, sizes.shape[1]))
    best = sizes[rows][linear_sum_assignment(sizes[rows], maximize=True)].sum()
    ours = np.abs(flat(merged).astype(np.float64) - flat(base)).sum()
    assert ours == pytest.approx(best, rel=1e-6)  # the merge rounds base + tau to float32
    words = told[0].split()
    assert [float(words[2]), float(words[9])] == pytest.approx([best, best], rel=1e-8)
    for other in ("random", "smallest"):
        theirs = magmax.merge(Tunable(preference=preference, selection=other), base, models, 1.0)
        assert ours >= (1 - 1e-6) * np.abs(flat(theirs).astype(np.float64) - flat(base)).sum()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ["random", "halves", "same", "tiny quota", "mostly frozen", "wide"])
def test_what_is_found_on_a_sample_ends_at_the_same_choice(kind, selection, monkeypatch):
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(4, 60_000)).astype(np.float32) * np.float32([[1], [2], [1], [3]])
    if kind == "halves":  # as in bfloat16: few magnitudes, mostly equal
        vectors = np.round(vectors).astype(np.float32)
    if kind == "same":
        vectors[1:] = vectors[0]
    if kind == "mostly frozen":
        vectors[:, draw.random(60_000) < 0.995] = 0
    if kind == "wide":
        vectors = vectors * (1 + 2.0**-40)
    rule = Tunable(preference=[2, 1, 4, 1e-4] if kind == "tiny quota" else [2, 1, 4, 3], selection=selection)
    everything = rule(list(vectors))
    monkeypatch.setattr(dual_prices, "ROOM", 1 << (10 if kind == "mostly frozen" else 14))
    monkeypatch.setattr(dual_prices, "LEAST_ROOM", 1 << 12)
    monkeypatch.setattr(windows, "ROOM", 1)
    monkeypatch.setattr(windows, "LEAST", 1 << (7 if kind == "mostly frozen" else 12))
    assert (rule(list(vectors)) == everything).all()


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("ratio", [1.5, 2, 5])
def test_prices_of_steep_preferences_are_found_without_holding_everything(halved, ratio, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(12, 200_000)).astype(np.float32) * 3
    vectors = list(np.round(vectors * 4) / 4 if halved else vectors)
    monkeypatch.setattr(dual_prices, "ROOM", 1)
    monkeypatch.setattr(dual_prices, "LEAST_ROOM", 1 << 14)
    held: list[int] = []
    read = dual_prices.UndecidedElements.read.__func__

    def noted(cls: type, replies: Any, tasks: int) -> Any:
        found = read(cls, replies, tasks)
        held.append(len(found.keys))
        return found

    monkeypatch.setattr(dual_prices.UndecidedElements, "read", classmethod(noted))
    rule = Tunable(preference=[ratio**-t for t in range(12)])
    tau = rule(vectors)
    assert max(held) < 100_000
    monkeypatch.setattr(dual_prices, "LEAST_ROOM", 1 << 20)
    best = rule(vectors)
    assert np.abs(tau).sum(dtype=float) == pytest.approx(np.abs(best).sum(dtype=float), rel=1e-5)
    assert np.abs(tau).sum(dtype=float) > np.abs(replace(rule, selection="smallest")(vectors)).sum(dtype=float)


def test_one_huge_element_leaves_the_others_their_best_choice():
    vectors = np.random.default_rng(0).normal(size=(2, 5000)).astype(np.float32)
    usual = Tunable(preference=[3, 1])(list(vectors))
    vectors[0, 0] = 1e30
    found = Tunable(preference=[3, 1])(list(vectors))
    assert np.abs(found[1:]).sum() == pytest.approx(np.abs(usual[1:]).sum(), rel=1e-3)


@pytest.mark.parametrize("margin", [0.0, 1e9])
@pytest.mark.parametrize("selection", ["random", "smallest"])
def test_wrong_guesses_cost_rounds_but_no_byte(selection, margin, monkeypatch):
    vectors = list(np.random.default_rng(0).integers(-9, 10, (4, 30_000)).astype(np.float32))
    rule = Tunable(preference=[2, 1, 4, 3], selection=selection)
    everything = rule(vectors)
    monkeypatch.setattr(windows, "ROOM", 1)
    monkeypatch.setattr(windows, "LEAST", 1 << 10)
    monkeypatch.setattr(windows, "MARGIN", margin)
    assert (rule(vectors) == everything).all()


def sharded(path: Path, folder: Path) -> Path:
    """The same model as a folder with a file for each tensor."""
    tensors = load_tensors(path)
    where = {key: f"{key}.safetensors" for key in tensors}
    for key, name in where.items():
        save_tensors({key: tensors[key]}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("span", ["model", "tensor"])
@pytest.mark.parametrize("slab", [64, 1 << 10])
def test_slabs_threads_and_shards_change_no_byte(selection, span, slab, tmp_path, monkeypatch):
    monkeypatch.setattr(dual_prices, "ROOM", 1 << 10)
    monkeypatch.setattr(dual_prices, "LEAST_ROOM", 1 << 12)
    monkeypatch.setattr(windows, "ROOM", 1)
    monkeypatch.setattr(windows, "LEAST", 1 << 10)
    rule = Tunable(preference=[3, 1, 1], selection=selection, span=span)
    paths = [save_tensors(model(n, "coarse"), tmp_path / f"{n}.safetensors") for n in range(4)]
    usual = magmax.merge(rule, paths[0], paths[1:], out=tmp_path / "usual.safetensors")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", slab)
    out = magmax.merge(
        rule,
        paths[0],
        [sharded(paths[1], tmp_path / "sharded"), *paths[2:]],
        out=tmp_path / "o.safetensors",
        execution=ExecutionOptions(threads=3),
    )
    assert same_bytes(load_tensors(out), load_tensors(usual))
    assert same_bytes(
        magmax.merge(rule, load_tensors(paths[0]), [load_tensors(p) for p in paths[1:]]), load_tensors(usual)
    )


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_keep_their_quotas(selection, dtype):
    base = {"a": torch.zeros(400, dtype=dtype), "b": torch.zeros(50)}
    models = [{k: torch.randn(len(v)).to(v.dtype) for k, v in base.items()} for _ in range(3)]
    merged = magmax.merge(Tunable(preference=[1, 2, 5], selection=selection), base, models, 1.0)
    counts = [sum(int((merged[k] == m[k]).sum()) for k in base) for m in models]
    everywhere = sum(int(((models[0][k] == models[1][k]) | (models[1][k] == models[2][k])).sum()) for k in base)
    assert sum(counts) >= 450
    assert np.abs(np.array(counts) - quotas([1, 2, 5], 450)).max() <= everywhere + sum(counts) - 450


@pytest.mark.parametrize("selection", SELECTIONS)
def test_numpy_and_torch_give_the_same_bytes(selection):
    vectors = [np.random.default_rng(n).integers(-3, 4, 400).astype(np.float32) for n in range(4)]
    rule = Tunable(preference=[0.3, 1, 1, 1], selection=selection)
    assert rule(vectors).tobytes() == rule([torch.from_numpy(v) for v in vectors]).numpy().tobytes()
    if selection != "smallest":  # which draws for little but the first task's surplus
        assert (rule(vectors) != replace(rule, seed=1)(vectors)).any()


def test_it_stands_at_the_end_of_a_chain():
    vectors = [np.random.default_rng(n).normal(size=300).astype(np.float32) for n in range(3)]
    merged = chain(Prune(density=0.5), Tunable(preference=[1, 1, 2]))(vectors)
    pruned = np.array([chain(Prune(density=0.5), MagMax())([v]) for v in vectors])
    moved = (pruned != 0).any(axis=0)
    counts = [(merged[moved] == v[moved]).sum() for v in pruned]
    assert counts == quotas([1, 1, 2], int(moved.sum()))


def test_infinities_and_nan_where_they_are_let_through():
    vectors = [np.random.default_rng(n).normal(size=40).astype(np.float32) for n in range(2)]
    vectors[0][3], vectors[1][5] = np.inf, np.nan
    for selection in SELECTIONS:
        merged = Tunable(preference=[1, 1], selection=selection)(vectors)
        assert sum(merged[p].tobytes() == vectors[0][p].tobytes() for p in range(40)) == 20


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(any), st.integers(0, 10**12))
def test_quotas_are_whole_and_within_one_of_the_share(weights, elements):
    whole = quotas(weights, elements)
    assert sum(whole) == elements
    for count, weight in zip(whole, weights, strict=True):
        assert abs(count - elements * (weight / sum(weights))) <= 1 + elements * 1e-12
        assert weight or not count


def test_left_over_elements_go_to_the_largest_remainders_first():
    assert quotas([1, 1, 1, 0], 11) == [4, 4, 3, 0]
    assert quotas([0.5, 2, 1], 10) == [1, 6, 3]  # 1.43, 5.71, 2.86


@pytest.mark.parametrize(
    ("preference", "words"),
    [
        ([1, -1], "number 2: -1 is not"),
        ([1, float("nan")], "nan is not"),
        ([1, float("inf")], "inf is not"),
        ([0, 0], "all of these are 0"),
        ([1, "2"], "'2' is not"),
        ({"a": -1}, "a: -1 is not"),
        ({"a": 0}, "all of these are 0"),
        ("news", "not 'news'"),
        (3, "not 3"),
    ],
)
def test_what_is_no_preference_is_refused(preference, words):
    with pytest.raises(MagMaxError, match=words):
        Tunable(preference=preference)


def test_a_preference_must_fit_the_models(tmp_path):
    base, *models = (
        save_tensors(model(n, "fine"), tmp_path / f"{name}.safetensors")
        for n, name in enumerate(["base", "news", "sport"])
    )
    for wrong in ([1], [1, 2, 3], ()):
        with pytest.raises(MagMaxError, match=f"each of the 2 models, not {len(wrong)}"):
            magmax.merge(Tunable(preference=wrong), base, models, out=tmp_path / "out.safetensors")
    with pytest.raises(MagMaxError, match="did you mean 'sport'"):
        magmax.merge(Tunable(preference={"sprot": 1}), base, models, out=tmp_path / "out.safetensors")
    with pytest.raises(MagMaxError, match="models with names"):
        Tunable(preference={"a": 1, "b": 1})([np.ones(3, np.float32)] * 2)
    with pytest.raises(MagMaxError, match="with one there is nothing to prefer"):
        magmax.merge(Tunable(preference=[1]), base, models[:1], out=tmp_path / "out.safetensors")
    for word in ("selection", "span"):
        with pytest.raises(MagMaxError, match=word):
            Tunable(preference=[1], **{word: "bogus"})
    named = magmax.merge(Tunable(preference={"sport": 3, "news": 1}), base, models, out=tmp_path / "a.safetensors")
    listed = magmax.merge(Tunable(preference=[1, 3]), base, models, out=tmp_path / "b.safetensors")
    assert named.read_bytes() == listed.read_bytes()


@dataclass(frozen=True)
class Remembering(TaskVectorTransform):
    """A transform whose questions take memory."""

    name: ClassVar[str] = "remembering"
    paper: ClassVar[str] = ""

    @property
    def memory(self) -> int:
        return 1000

    def apply(self, delta: Any, task: int, at: Address, answer: Any) -> Any:
        return delta


@dataclass(frozen=True)
class Forgetful(Tunable):
    """The rule, if its questions took no memory."""

    memory: ClassVar[int] = 0


def test_the_preview_tells_the_memory_of_the_questions(tmp_path):
    files = (save_tensors({"w": torch.ones(3) * n}, tmp_path / f"{n}.safetensors") for n in range(3))
    base, *models = map(open_checkpoint, files)

    def told(rule: Rule, threads: int) -> int:
        job = merge_job(rule, base, models, tmp_path / "out.safetensors", OutputOptions())
        return preview(job, threads)["peak_memory"]

    for threads in (1, 6):
        free = told(Forgetful((1, 2)), threads)
        held = Tunable((1, 2)).memory
        assert held > 100_000_000
        random = Tunable((1, 2), selection="random")
        assert told(random, threads) - free == random.memory > 100_000_000
        assert told(Tunable((1, 2)), threads) - free == held
        assert told(Tunable((1, 2), span="tensor"), threads) - free == threads * held
        assert told(chain(Remembering(), Tunable((1, 2))), threads) - free == 1000 + held
