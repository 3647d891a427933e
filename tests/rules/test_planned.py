"""Rules that look at the whole model, against their definitions over one long vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import Tensors, load_tensors, same_bytes, save_tensors

import magmax
from magmax import MagMaxError
from magmax.checkpoints import blocks
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.rules import Dare, MagMax, Prune, Ties, chain, selection
from magmax.rules.statistics import Address, Block, Scope

DENSITIES = [0.0, 0.01, 0.2, 0.5, 0.9, 1.0]


def model(seed: int, kind: str) -> Tensors:
    """A few tensors whose task vectors have many equal magnitudes (coarse) or none (fine)."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (40, 30), "a.weight": (7, 11), "c": (), "d": (500,), "empty": (0, 3)}
    fine = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    return fine if kind == "fine" else {key: (2 * tensor).round() for key, tensor in fine.items()}


def flat(tensors: Tensors) -> np.ndarray:
    """All elements in the order of tensor name and flat offset."""
    return np.concatenate([tensors[key].numpy().reshape(-1) for key in sorted(tensors)])


def top(vector: np.ndarray, count: int) -> np.ndarray:
    order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
    kept = np.zeros(len(vector), bool)
    kept[order[:count]] = True
    return np.where(kept, vector, np.float32(0))


def ties(vectors: list[np.ndarray], density: float) -> np.ndarray:
    trimmed = [top(v, round(density * len(v))) for v in vectors]
    total = np.zeros_like(vectors[0])
    for vector in trimmed:
        total = total + vector
    majority = -1.0 if (total > 0).sum() < (total < 0).sum() else 1.0
    sign = np.where(total == 0, majority, np.sign(total))
    merged = np.zeros_like(vectors[0])
    count = np.zeros_like(vectors[0])
    for vector in trimmed:
        agrees = (vector != 0) & (np.sign(vector) == sign)
        merged = merged + np.where(agrees, vector, np.float32(0))
        count = count + agrees
    return merged / np.maximum(count, 1)


def per_tensor(rule, base: Tensors, models: list[Tensors]) -> np.ndarray:
    parts = [flat({"x": base[key]}) for key in sorted(base)]
    moved = [[flat({"x": m[key]}) for m in models] for key in sorted(base)]
    return np.concatenate([rule([m - b for m in ms]) for b, ms in zip(parts, moved, strict=True)])


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("span", ["model", "tensor"])
def test_ties_is_its_definition_bit_for_bit(kind, density, span):
    base, models = model(0, kind), [model(n, kind) for n in (1, 2, 3)]
    merged = magmax.merge(Ties(density=density, span=span), base, models, 1.0)
    if span == "model":
        wanted = ties([flat(m) - flat(base) for m in models], density)
    else:
        wanted = per_tensor(lambda v: ties(v, density), base, models)
    assert (flat(merged) == flat(base) + wanted).all()


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("keep", DENSITIES)
def test_pruning_keeps_exactly_so_many(which, keep):
    base, models = model(0, "coarse"), [model(1, "coarse")]
    pruned = chain(Prune(density=keep, which=which), MagMax())
    kept = flat(magmax.merge(pruned, base, models, 1.0)) - flat(base)
    vector = flat(models[0]) - flat(base)
    count = round(keep * len(vector))
    wanted = top(vector, count) if which == "top" else vector - top(vector, len(vector) - count)
    assert (kept == wanted).all()


@pytest.mark.parametrize(
    "rule",
    [Ties(), Ties(span="tensor"), chain(Prune(density=0.3), MagMax()), chain(Dare(density=0.5), MagMax())],
    ids=str,
)
@pytest.mark.parametrize("slab", [64, 1 << 10])
def test_slabs_and_threads_change_no_byte(rule, slab, tmp_path, monkeypatch):
    paths = [save_tensors(model(n, "coarse"), tmp_path / f"{n}.safetensors") for n in range(4)]
    usual = magmax.merge(rule, paths[0], paths[1:], out=tmp_path / "usual.safetensors")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", slab)
    out = magmax.merge(
        rule, paths[0], paths[1:], out=tmp_path / "other.safetensors", execution=ExecutionOptions(threads=3)
    )
    assert same_bytes(load_tensors(out), load_tensors(usual))
    in_memory = magmax.merge(rule, *split([load_tensors(p) for p in paths]))
    assert same_bytes(in_memory, load_tensors(usual))


def split(models):
    return models[0], models[1:]


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60), st.integers(0, 70), st.booleans())
@settings(deadline=None)
def test_the_k_largest_are_found_exactly_in_any_blocks(values, keep, wide):
    vector = np.array(values, np.float64 if wide else np.float32)
    blocks = [Block(Address(f"{n:02}", 0), [part]) for n, part in enumerate(np.array_split(vector, 7)) if len(part)]
    (cut,) = answer(selection.request_largest([keep], Scope(1, len(vector), wide)), blocks)
    kept = np.concatenate([cut.mask(block.task_vectors[0], block.address) for block in blocks]) != 0
    assert (np.where(kept, vector, 0) == top(vector, keep)).all()
    assert kept.sum() == min(keep, len(vector))


def answer(plan, blocks):
    """Carry out a plan over several blocks, without the engine."""
    reply = None
    while True:
        try:
            fold = plan.send(reply)
        except StopIteration as end:
            return end.value
        counts = [fold.initial() for _ in blocks]
        for block, into in zip(blocks, counts, strict=True):
            fold.update(Block(block.address, [d.copy() for d in block.task_vectors]), into)
        reply = {b.address: c for b, c in zip(blocks, counts, strict=True)} if fold.per_block else sum(counts)


def test_a_misleading_sample_costs_passes_but_not_exactness(monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", 1)
    base = {"w": torch.zeros(300_000)}
    task = {"w": torch.cat([torch.full((5,), 1e-30), torch.randn(299_995, generator=torch.Generator().manual_seed(0))])}
    merged = magmax.merge(Ties(density=0.1), base, [task], 1.0)
    assert (flat(merged) == top(flat(task), 30_000)).all()


def test_dare_keeps_the_mean_and_the_share():
    vector = np.ones(200_000, np.float32)
    dropped = chain(Dare(density=0.1), MagMax())([vector])
    share = np.count_nonzero(dropped) / len(vector)
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.1)} or np.allclose(np.unique(dropped), [0, 10], rtol=1e-6)
    assert abs(share - 0.1) < 5 * np.sqrt(0.09 / len(vector))


def test_dare_drops_other_entries_for_other_tasks_and_seeds():
    vectors = [np.ones(1000, np.float32)] * 2
    first, second = (Dare(density=0.5).apply(np.ones(1000, np.float32), t, Address("w", 0), None) for t in (1, 2))
    assert 0.3 < (first != second).mean() < 0.7
    one, other = (chain(Dare(density=0.5, seed=s), MagMax())(vectors) for s in (0, 1))
    assert (one != other).any()


def test_a_chain_that_asks_nothing_is_absorbed_exactly(tmp_path):
    base, tasks = model(0, "fine"), [model(n, "fine") for n in (1, 2, 3)]
    rule = chain(Dare(density=0.5), MagMax())
    running = magmax.Running(tmp_path / "state", rule, base)
    for task in tasks:
        running.absorb(task)
    again = magmax.Running(tmp_path / "state", base=base)
    assert again.rule == rule
    assert same_bytes(again.result(), magmax.merge(rule, base, tasks))


@pytest.mark.parametrize("rule", [Ties(), chain(Prune(), MagMax())], ids=str)
def test_a_rule_that_needs_all_models_cannot_run_over_tasks(rule, tmp_path):
    with pytest.raises(MagMaxError, match=r"looks at all models at once.*magmax, average"):
        magmax.Running(tmp_path / "state", rule, model(0, "fine"))


def test_on_agreeing_signs_ties_is_the_mean_of_the_nonzero():
    vectors = [np.abs(np.random.default_rng(n).normal(size=99)).astype(np.float32) for n in range(3)]
    vectors[0][:50] = 0
    total = (vectors[0] + vectors[1]) + vectors[2]
    count = np.float32(3) - (vectors[0] == 0)
    assert (Ties(density=1.0)(vectors) == total / count).all()


def test_numpy_and_torch_give_the_same_bytes():
    vectors = [np.random.default_rng(n).integers(-3, 4, 400).astype(np.float32) for n in range(4)]
    for rule in (Ties(density=0.3), chain(Prune(density=0.4), Ties()), chain(Dare(), MagMax())):
        assert rule(vectors).tobytes() == rule([torch.from_numpy(v) for v in vectors]).numpy().tobytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ties(density=1.5),
        lambda: Prune(density=-1),
        lambda: Dare(density=0.0),
        lambda: chain(MagMax(), Dare()),
        chain,
    ],
)
def test_what_makes_no_sense_is_an_error(make):
    with pytest.raises(MagMaxError):
        make()


def test_parts_of_a_chain_that_ask_over_different_spans_are_refused():
    with pytest.raises(MagMaxError, match="over one span"):
        chain(Prune(span="tensor"), Ties(span="model"))


def test_arrays_of_any_shape_are_pruned_as_they_lie_in_memory():
    square = np.float32([[1, 1], [0, 0], [0, 5], [5, 5]])
    for rule in (chain(Prune(density=0.5), MagMax()), Ties(density=0.5)):
        assert (rule([square]) == rule([square.reshape(-1)]).reshape(4, 2)).all()
        assert np.count_nonzero(rule([square])) == 4


def test_the_same_transform_twice_would_draw_the_same_numbers_and_is_refused():
    with pytest.raises(MagMaxError, match="twice"):
        chain(Dare(density=0.5), Dare(density=0.5), MagMax())
    chain(Dare(density=0.5), Dare(density=0.5, seed=1), MagMax())
