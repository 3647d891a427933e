"""Rules of singular values against their published recipes in plain float64, and tensors merged as a whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests.models import load_tensors, same_bytes, save_tensors
from tests.rules.test_planned import flat, top
from tests.rules.test_planned import model as planned_model

import magmax
from magmax import MagMaxError, open_checkpoint
from magmax.checkpoints import blocks
from magmax.merging.cost import preview
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.merging.sweep import FactorSweep
from magmax.rules import Address, Average, Dare, IsoC, IsoCTS, Prune, TsvM, as_rule, chain
from magmax.rules.spectral.svd import leading_singular_vectors

TOLERANCE = {np.float32: 1e-6, np.float64: 1e-9}
"""Of the largest value; what is computed in float64 is good to about 1e-10 of it."""

SHAPES = {"conv": (8, 4, 3, 3), "row": (1, 30), "scale": (), "square": (24, 24), "tall": (130, 24), "wide": (16, 49)}
RULES = [IsoC(), IsoCTS(), IsoCTS(common=0.3), IsoCTS(common=1.0), TsvM()]


def isometry(matrix):
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def iso_c(matrices):
    u, s, vh = np.linalg.svd(sum(matrices), full_matrices=False)
    return u @ np.diag(np.full(len(s), s.mean())) @ vh


def iso_cts(matrices, common):
    """The common directions last, each task's before them in a place of its own."""
    rank, tasks = min(matrices[0].shape), len(matrices)
    each = round((rank - int(rank * common)) / tasks)
    kept = rank - each * tasks
    u, s, vh = np.linalg.svd(sum(matrices), full_matrices=False)
    left, right, spectrum = np.zeros_like(u), np.zeros_like(vh), np.zeros_like(s)
    left[:, each * tasks :], spectrum[each * tasks :], right[each * tasks :] = u[:, :kept], s[:kept], vh[:kept]
    for task, matrix in enumerate(matrices):
        own = slice(task * each, (task + 1) * each)
        rest = np.linalg.svd(matrix - u[:, :kept] @ u[:, :kept].T @ matrix, full_matrices=False)
        left[:, own], spectrum[own], right[own] = rest[0][:, :each], rest[1][:each], rest[2][:each]
    return spectrum.mean() * isometry(left) @ isometry(right)


def tsv_m(matrices):
    each = min(matrices[0].shape) // len(matrices)
    if not each:
        return sum(matrices) / len(matrices)
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = isometry(np.concatenate([u[:, :each] for u, _, _ in parts], axis=1))
    right = isometry(np.concatenate([vh[:each] for _, _, vh in parts]))
    return left @ np.diag(np.concatenate([s[:each] for _, s, _ in parts])) @ right


def defined(rule, vectors):
    """The rule on one tensor, by the definition."""
    vectors = [np.float64(v) for v in vectors]
    if vectors[0].ndim != 2:
        return sum(vectors) / len(vectors)
    if isinstance(rule, IsoCTS):
        return iso_cts(vectors, rule.common)
    return iso_c(vectors) if isinstance(rule, IsoC) else tsv_m(vectors)


def close(ours, wanted, dtype=np.float32):
    return ours.shape == wanted.shape and abs(np.float64(ours) - wanted).max() <= TOLERANCE[dtype] * abs(wanted).max()


def model(seed, dtype=np.float32):
    draws = np.random.default_rng(seed)
    return {key: np.asarray(draws.normal(size=shape), dtype) for key, shape in SHAPES.items()}


def model_files(tmp_path, count=3):
    tensors = [{key: torch.from_numpy(np.array(v)) for key, v in model(n).items()} for n in range(count + 1)]
    tensors = [{**t, "ids": torch.arange(40), "half": t["tall"].bfloat16()} for t in tensors]
    base, *tasks = [save_tensors(t, tmp_path / f"{n}.safetensors") for n, t in enumerate(tensors)]
    return base, tasks


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_rule_is_its_definition(rule, dtype, library, tasks):
    models = [model(n, dtype) for n in range(tasks)]
    for key in SHAPES:
        vectors = [m[key] for m in models]
        before = [v.copy() for v in vectors]
        merged = np.asarray(rule([library(v) for v in vectors]))
        assert merged.dtype == dtype
        assert close(merged, defined(rule, vectors), dtype), key
        assert all((now == then).all() for now, then in zip(vectors, before, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_files_merge_as_arrays_do_whatever_the_threads_and_slabs(rule, tmp_path, monkeypatch):
    base, tasks = model_files(tmp_path)
    out = magmax.merge(
        rule, base, tasks, 1.0, out=tmp_path / "usual.safetensors", execution=ExecutionOptions(threads=1)
    )
    merged, start, models = load_tensors(out), load_tensors(base), [load_tensors(t) for t in tasks]
    for key in (*SHAPES, "half"):
        wide = start[key].float()
        wanted = wide + torch.from_numpy(rule([(m[key].float() - wide).numpy() for m in models]))
        assert torch.equal(merged[key], wanted.to(start[key].dtype)), key
    assert (merged["ids"] == start["ids"]).all()
    assert same_bytes(magmax.merge(rule, start, models, 1.0), merged)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    other = magmax.merge(
        rule, base, tasks, 1.0, out=tmp_path / "other.safetensors", execution=ExecutionOptions(threads=4)
    )
    assert same_bytes(load_tensors(other), merged)


def test_digests_do_not_tell_whether_a_tensor_was_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    base, tasks = model_files(tmp_path)
    outs = [magmax.merge(rule, base, tasks, out=tmp_path / f"out-{rule}") for rule in ("iso_c", "magmax")]
    told = []
    for out in outs:
        with safe_open(out / "model.safetensors", "pt") as file:
            told.append(json.loads(file.metadata()["magmax"])["inputs"])
    assert told[0] == told[1]
    again = merge_job(
        as_rule("magmax"), open_checkpoint(base), [open_checkpoint(outs[0])], tmp_path / "x", OutputOptions()
    )
    tensors = json.loads((outs[0] / "provenance.json").read_text())["tensors"]
    assert again.run().input_digests[1] == blocks.checkpoint_digest(open_checkpoint(outs[0]).specs, tensors)


@pytest.mark.parametrize("shape", [(24, 24), (16, 49), (60, 12)])
@pytest.mark.parametrize("spread", [0, 2, 4, 9])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_singular_values_are_found_however_far_apart_they_lie(shape, spread, library):
    """A spread of 0 or 2 decades is taken from eigenvalues, one of 4 or 9 is not."""
    draws, rank = np.random.default_rng(spread), min(shape)
    left, right = (np.linalg.qr(draws.normal(size=(n, rank)))[0] for n in shape)
    values = 5 * np.logspace(0, -spread, rank) if spread else np.full(rank, 5.0)
    u, s, vh = (np.asarray(part) for part in leading_singular_vectors(library(left * values @ right.T), rank))
    assert abs(s - values).max() < 1e-10
    assert abs(u @ vh - left @ right.T).max() < 1e-10 * 10 ** max(0, spread - 4)
    count = rank // 3
    u, s, vh = (np.asarray(part) for part in leading_singular_vectors(library(left * values @ right.T), count))
    assert u.shape == (shape[0], count)
    assert abs(u * s @ vh - left[:, :count] * values[:count] @ right[:, :count].T).max() < 1e-9 or not spread


def test_iso_c_makes_the_spectrum_flat_and_keeps_its_sum():
    vectors = [np.random.default_rng(n).normal(size=(20, 31)) for n in range(3)]
    found = np.linalg.svd(IsoC()(vectors), compute_uv=False)
    assert np.allclose(found, np.linalg.svd(sum(vectors), compute_uv=False).mean())


def test_one_task_is_merged_into_itself_by_tsv_m_and_all_of_it_is_common():
    matrix = np.random.default_rng(0).normal(size=(12, 18))
    assert close(TsvM()([matrix]), matrix, np.float64)
    for common in (0.0, 0.5, 1.0):
        assert close(IsoCTS(common=common)([matrix]), IsoC()([matrix]), np.float64)


def test_tasks_that_do_not_meet_do_not_change_one_another():
    """In rows and columns of their own, each keeps its leading half, and tsv_m is their sum."""
    draws = np.random.default_rng(0)
    one, other = np.zeros((16, 20)), np.zeros((16, 20))
    one[:8, :10], other[8:, 10:] = draws.normal(size=(8, 10)), draws.normal(size=(8, 10))
    assert close(TsvM()([one, other]), one + other, np.float64)


def test_equal_tasks_merge_into_what_is_kept_of_one():
    matrix = np.random.default_rng(0).normal(size=(12, 18))
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    half = u[:, :6] * s[:6] @ vh[:6]
    assert close(TsvM()([matrix, matrix]), half, np.float64)
    assert close(TsvM()([matrix, np.zeros_like(matrix)]), half, np.float64)
    assert close(IsoC()([matrix, matrix]), 2 * IsoC()([matrix]), np.float64)
    assert np.isfinite(IsoCTS()([matrix, matrix])).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_directions_that_no_task_has_stay_untouched(rule):
    """Of low rank in, of low rank out; and of zeros, zeros."""
    draws = np.random.default_rng(0)
    left, right = np.linalg.qr(draws.normal(size=(20, 3)))[0], np.linalg.qr(draws.normal(size=(31, 3)))[0]
    vectors = [left @ draws.normal(size=(3, 3)) @ right.T for _ in range(2)]
    merged = rule(vectors)
    assert abs(merged - left @ left.T @ merged @ right @ right.T).max() < 1e-12
    assert abs(merged).max() > 0.01
    for shape in SHAPES.values():
        assert not rule([np.zeros(shape, np.float32)] * 3).any()
    assert rule([np.zeros((0, 7))] * 2).shape == (0, 7)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_rounding_adds_to_a_low_rank_has_no_direction_of_its_own(rule):
    """As of LoRA adapters: tuned weights stored in float32, less a base that is twenty times as large."""
    draws = np.random.default_rng(1)
    exact = [draws.normal(size=(40, 3)) @ draws.normal(size=(3, 60)) for _ in range(3)]
    base = (20 * draws.normal(size=(40, 60))).astype(np.float32)
    vectors = [(base + matrix.astype(np.float32)) - base for matrix in exact]
    wanted, merged = rule(exact), rule(vectors, base=base)
    assert np.linalg.norm(merged - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert np.linalg.matrix_rank(merged, tol=1e-4 * np.linalg.norm(merged)) == 9


def test_what_is_no_matrix_or_too_narrow_for_its_tasks_is_averaged():
    for shape in [(), (5,), (2, 3, 4), (8, 4, 3, 3)]:
        vectors = [np.random.default_rng(n).normal(size=shape).astype(np.float32) for n in range(3)]
        assert all(np.asarray(rule(vectors)).tobytes() == Average()(vectors).tobytes() for rule in RULES)
    narrow = [np.random.default_rng(n).normal(size=(2, 30)).astype(np.float32) for n in range(3)]
    assert (TsvM()(narrow) == Average()(narrow)).all()


def test_more_task_specific_directions_than_there_is_room_for_are_not_taken():
    vectors = [np.random.default_rng(n).normal(size=(8, 9)) for n in range(3)]
    found = np.linalg.svd(IsoCTS(common=0.0)(vectors), compute_uv=False)
    assert np.allclose(found, found[0])


@pytest.mark.parametrize("rule", [IsoC(), TsvM()], ids=str)
@pytest.mark.parametrize("span", ["model", "tensor"])
def test_pruning_before_a_whole_tensor_rule_keeps_what_it_keeps_before_any(rule, span, tmp_path, monkeypatch):
    """Of the many equal magnitudes at the cut, those in later slabs are dropped, though tensors come whole."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    base, *models = [planned_model(n, "coarse") for n in range(4)]
    merged = magmax.merge(chain(Prune(density=0.3, span=span), rule), base, models, 1.0)
    keys = sorted(base)
    ends = np.cumsum([base[key].numel() for key in keys])[:-1]

    def pruned(tuned):
        parts = np.split(flat(tuned) - flat(base), ends)
        if span == "tensor":
            return [top(part, round(0.3 * len(part))) for part in parts]
        return np.split(top(np.concatenate(parts), round(0.3 * sum(map(len, parts)))), ends)

    for key, vectors in zip(keys, zip(*map(pruned, models), strict=True), strict=True):
        wanted = base[key].numpy() + rule([v.reshape(tuple(base[key].shape)) for v in vectors])
        assert (merged[key].numpy() == wanted).all(), key


def test_dare_before_a_whole_tensor_rule_draws_as_it_does_slab_by_slab():
    base, *models = [model(n) for n in range(3)]
    merged = magmax.merge(chain(Dare(density=0.5), IsoC()), base, models, 1.0)
    vectors = [
        Dare(density=0.5).apply((m["tall"] - base["tall"]).reshape(-1), task, Address("tall", 0), None).reshape(130, 24)
        for task, m in enumerate(models, start=1)
    ]
    assert (merged["tall"] == base["tall"] + IsoC()(vectors)).all()


def test_a_sweep_of_a_whole_tensor_rule_is_the_merge_at_each_factor(tmp_path):
    base, tasks = model_files(tmp_path)
    models = [open_checkpoint(t) for t in tasks]
    names = ["one", "two", "three"]
    out = tmp_path / "out.safetensors"
    sweep = FactorSweep(IsoC(), open_checkpoint(base), models, names, out, OutputOptions(), [0.5], ExecutionOptions())
    with sweep.merged() as scaler:
        swept = scaler.write(0.5)
    single = tmp_path / "single.safetensors"
    merge_job(IsoC(), open_checkpoint(base), models, single, OutputOptions(0.5), names).run()
    assert swept.read_bytes() == single.read_bytes()


def test_the_dry_run_counts_a_tensor_of_every_model_and_no_threads(tmp_path):
    base, tasks = model_files(tmp_path)
    big = [save_tensors({"w": torch.zeros(4096, 2048) + n}, tmp_path / f"big{n}.safetensors") for n in range(3)]
    job = merge_job(
        IsoC(), open_checkpoint(big[0]), [open_checkpoint(b) for b in big[1:]], tmp_path / "o", OutputOptions()
    )
    assert preview(job, 1)["peak_memory"] == preview(job, 64)["peak_memory"]
    assert preview(job, 1)["peak_memory"] > 4096 * 2048 * (3 * 4 + 2 * 8)
    small = merge_job(
        IsoC(), open_checkpoint(base), [open_checkpoint(t) for t in tasks], tmp_path / "p", OutputOptions()
    )
    assert preview(small, 1)["peak_memory"] < preview(job, 1)["peak_memory"] / 10


@pytest.mark.parametrize("rule", [IsoC(), IsoCTS(), TsvM()], ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e200])
def test_what_has_no_singular_values_is_an_error_that_names_the_tensor(rule, bad):
    base, task = model(0, np.float64), model(1, np.float64)
    task["tall"][7, 7] = bad
    with pytest.raises(MagMaxError, match=f"tall: {rule.name} takes singular values"):
        magmax.merge(rule, base, [task], allow_nonfinite=True)


def test_a_fraction_that_is_none_is_an_error():
    with pytest.raises(MagMaxError, match=r"from 0 to 1, not 1\.5"):
        IsoCTS(common=1.5)


@pytest.mark.parametrize("rule", [IsoC(), IsoCTS(), TsvM()], ids=str)
@pytest.mark.parametrize("size", [1e-2, 7.5e-4, 7.5e-5])
def test_a_small_full_rank_fine_tuning_keeps_every_direction(rule, size):
    """Weights of N(0, 0.04), eight tasks that move them by a part of their length, everything stored in float32."""
    draws = np.random.default_rng(5)
    base = draws.normal(0, 0.2, (96, 96)).astype(np.float32)
    tuned = [(base + draws.normal(0, 0.2 * size, base.shape)).astype(np.float32) for _ in range(8)]
    vectors = [model - base for model in tuned]
    wanted = defined(rule, vectors)
    assert np.linalg.norm(rule(vectors, base=base) - wanted) < 3e-3 * np.linalg.norm(wanted)


def test_a_fine_tuning_within_the_rounding_of_the_weights_is_not_lost():
    base = np.random.default_rng(0).uniform(1, 2, (40, 40)).astype(np.float32)
    vector = np.random.default_rng(1).choice(np.float32([-(2**-23), 0, 2**-23]), base.shape)
    assert close(IsoC()([vector], base=base), iso_c([vector.astype(float)]), np.float32)
