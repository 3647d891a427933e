"""The studies of weights against definitions one element at a time."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.analysis import naive
from tests.models import Tensors, save_tensors

from magmax.analysis import weight_statistics as tallying
from magmax.analysis.recommendations import recommend_from_weights
from magmax.analysis.weight_statistics import WHOLE_MODEL, collect_weight_statistics, layer_name
from magmax.analysis.weight_studies import (
    ModelsOrigin,
    conflicts_study,
    consistency_study,
    contribution_study,
    cosine_study,
    norms_study,
    run_weight_study,
)
from magmax.checkpoints import open_checkpoint
from magmax.cli import run
from magmax.errors import MagMaxError

NAMES = ["cars", "mnist", "eurosat"]


def model(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Small whole numbers, so that ties and zeros are common; one tensor is of several slabs in one of the tests."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "block.10.weight": torch.randint(-3, 4, (30, 17), generator=draw).to(dtype),
        "block.9.weight": torch.randn(40, 9, generator=draw).to(dtype),
        "block.9.bias": torch.randint(-1, 2, (40,), generator=draw).to(dtype),
        "embed.tokens.weight": torch.randint(-1, 2, (50, 8), generator=draw).to(dtype),
        "position_ids": torch.arange(9),
    }


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def given(request: pytest.FixtureRequest):
    """(tally, task vectors, tensors)"""
    base, models = model(0, request.param), [model(n, request.param) for n in (1, 2, 3)]
    opened = [open_checkpoint(each) for each in (base, *models)]
    return collect_weight_statistics(opened[0], opened[1:], NAMES), naive.task_vectors(base, models)


def keys_of(layer: str, vectors: naive.Vectors) -> list[str]:
    return [key for key in vectors if layer in (WHOLE_MODEL, layer_name(key))]


def test_layers_come_in_their_order(given) -> None:
    assert list(given[0].by_layer()) == [WHOLE_MODEL, "block.9", "block.10", "embed.tokens"]


def test_conflicts(given) -> None:
    found, vectors = given
    records = conflicts_study({ModelsOrigin(): found}).records
    assert len(records) == 4
    for record in records:
        shared, both = naive.count_conflicts(naive.element_columns(vectors, keys_of(record["layer"], vectors)))
        assert (record["shared"], record["conflicts"]) == (shared, both)
        assert record["share"] == both / shared
        moved = [
            sum(value != 0 for value in c) for c in naive.element_columns(vectors, keys_of(record["layer"], vectors))
        ]
        assert record["expected"] == pytest.approx(np.mean([1 - 2.0 ** (1 - k) for k in moved if k >= 2]))


def test_contribution(given) -> None:
    found, vectors = given
    records = contribution_study({ModelsOrigin(): found}).records
    for layer in found.by_layer():
        columns = naive.element_columns(vectors, keys_of(layer, vectors))
        expected = naive.count_winners(columns)
        own = [record for record in records if record["layer"] == layer]
        assert [record["task"] for record in own] == NAMES
        assert [record["elements"] for record in own] == expected
        assert [record["share"] for record in own] == [count / sum(expected) for count in expected]
        assert sum(record["magnitude"] for record in own) == pytest.approx(1, abs=1e-12)


def test_agreement_and_magnitude(given) -> None:
    found, vectors = given
    columns = naive.element_columns(vectors, list(vectors))
    groups = naive.group_by_agreement(columns)
    records = consistency_study({ModelsOrigin(): found}).records
    assert [record["agreeing"] for record in records] == [0, 1, 2, 3]
    for record in records:
        own = groups.get(record["agreeing"], [])
        assert record["elements"] == len(own)
        assert record["largest"] == pytest.approx(np.mean([max(map(abs, c)) for c in own]), rel=1e-6)
        assert record["average"] == pytest.approx(np.mean([np.mean(np.abs(c)) for c in own]), rel=1e-6)


def test_cosines_and_norms(given) -> None:
    found, vectors = given
    angles = {(r["layer"], r["task"], r["other"]): r["cosine"] for r in cosine_study({ModelsOrigin(): found}).records}
    lengths = {(r["layer"], r["task"]): r["norm"] for r in norms_study({ModelsOrigin(): found}).records}
    for layer in found.by_layer():
        rows = [np.concatenate([vectors[key][t] for key in keys_of(layer, vectors)]) for t in range(3)]
        for t, one in enumerate(NAMES):
            assert lengths[layer, one] == pytest.approx(np.linalg.norm(rows[t]), rel=1e-6)
            for u, other in enumerate(NAMES):
                expected = rows[t] @ rows[u] / np.linalg.norm(rows[t]) / np.linalg.norm(rows[u])
                assert angles[layer, one, other] == pytest.approx(expected, abs=1e-6)


def test_only_the_largest_count_where_that_is_asked() -> None:
    base, models = model(0), [model(n) for n in (1, 2, 3)]
    opened = [open_checkpoint(each) for each in (base, *models)]
    found = collect_weight_statistics(opened[0], opened[1:], NAMES, top=0.3)
    vectors = naive.trim(naive.task_vectors(base, models), 0.3)
    record = conflicts_study({ModelsOrigin(): found}, 0.3).records[0]
    assert (record["shared"], record["conflicts"]) == naive.count_conflicts(
        naive.element_columns(vectors, list(vectors))
    )


def test_slabs_and_threads_change_nothing(tmp_path: Path) -> None:
    """A tensor of several slabs in a file, on several threads, is the same as its pieces by hand."""
    draw = torch.Generator().manual_seed(5)
    base, *models = [{"w": torch.randn(3, 300_000, generator=draw)} for _ in range(4)]
    paths = [save_tensors(each, tmp_path / f"{n}.safetensors") for n, each in enumerate([base, *models])]
    opened = [open_checkpoint(path) for path in paths]
    one, four = (collect_weight_statistics(opened[0], opened[1:], NAMES, threads=count) for count in (1, 4))
    vectors = [(m["w"] - base["w"]).numpy().reshape(-1) for m in models]
    whole = tallying.block_statistics(vectors, base["w"].numpy().reshape(-1))
    for found in (one, four):
        counts = found.by_tensor["w"]
        assert (counts.shared, counts.conflicts) == (whole.shared, whole.conflicts)
        assert counts.winner_counts.tolist() == whole.winner_counts.tolist()
        np.testing.assert_allclose(counts.inner_products, whole.inner_products, rtol=1e-12)
    assert np.array_equal(one.by_tensor["w"].inner_products, four.by_tensor["w"].inner_products)


def test_digests_are_those_of_a_merge(files, tmp_path: Path) -> None:
    import magmax
    from magmax.merging.inspection import provenance_of

    base, tasks = files
    out = magmax.merge("magmax", base, tasks, out=tmp_path / "merged.safetensors")
    opened = [open_checkpoint(path) for path in (base, *tasks)]
    names = [path.stem for path in tasks]
    told = provenance_of(open_checkpoint(out)) or {}
    assert collect_weight_statistics(opened[0], opened[1:], names).input_digests == {
        i["name"]: i["xxh3_128"] for i in told["inputs"]
    }


def test_tensors_that_do_not_fit_are_left_out_and_named() -> None:
    base, one, two = model(0), model(1), model(2)
    two["block.9.bias"] = torch.zeros(3)
    found = collect_weight_statistics(open_checkpoint(base), [open_checkpoint(one), open_checkpoint(two)], NAMES[:2])
    assert "block.9.bias" not in found.by_tensor
    assert "shape [3]" in found.left_out["block.9.bias"]
    assert any("left out" in advice.headline for advice in recommend_from_weights({ModelsOrigin(): found}))


def test_nothing_to_study() -> None:
    base = open_checkpoint(model(0))
    with pytest.raises(MagMaxError, match="at least one fine-tuned model"):
        collect_weight_statistics(base, [], [])
    with pytest.raises(MagMaxError, match="is it a model of this base"):
        collect_weight_statistics(base, [open_checkpoint({"other": torch.zeros(3)})], ["other"])
    alone = {ModelsOrigin(): collect_weight_statistics(base, [open_checkpoint(model(1))], ["one"])}
    with pytest.raises(MagMaxError, match="at least two fine-tuned models"):
        run_weight_study("conflicts", alone)
    assert run_weight_study("norms", alone).records


def test_advice_follows_the_numbers() -> None:
    """Opposite task vectors call for a choice of signs; equal directions for caution with sums."""
    base = {"w": torch.zeros(1000)}
    draw = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for models, wanted, kind in (
        ([draw, -draw], "Choose signs", "try"),
        ([draw, 1.1 * draw], "Do not sum", "caution"),
        ([draw, 5 * draw], "no fair measure", "caution"),
    ):
        opened = [open_checkpoint({"w": vector}) for vector in models]
        advice = recommend_from_weights(
            {ModelsOrigin(): collect_weight_statistics(open_checkpoint(base), opened, ["a", "b"])}
        )
        assert any(wanted in each.headline and each.kind == kind for each in advice), advice


def whole_conflicts(base: Tensors, models: list[Tensors], top: float | None = None) -> tuple[dict, str]:
    opened = [open_checkpoint(each) for each in (base, *models)]
    found = collect_weight_statistics(opened[0], opened[1:], [f"t{n}" for n in range(len(models))], top)
    study = conflicts_study({ModelsOrigin(): found}, top)
    return study.records[0], study.findings[0]


def random_vectors(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 60_000, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(("top", "wanted"), [(None, 0.9375), (0.2, 0.559)])
def test_conflicts_expected_of_models_trained_apart(top, wanted) -> None:
    vectors = random_vectors(5)
    record, said = whole_conflicts({"w": torch.zeros(60_000)}, [{"w": vector} for vector in vectors], top)
    assert record["expected"] == pytest.approx(wanted, abs=0.003)
    assert record["share"] == pytest.approx(wanted, abs=0.01)
    assert f"(coin flips: {record['expected']:.1%})" in said


@pytest.mark.parametrize("top", [None, 0.2])
@pytest.mark.parametrize("count", [2, 5])
def test_conflicts_expected_of_models_trained_one_after_another(count, top) -> None:
    models = [{"w": vector} for vector in torch.stack(random_vectors(count)).cumsum(0)]
    record, said = whole_conflicts({"w": torch.zeros(60_000)}, models, top)
    assert record["share"] == pytest.approx(record["expected"], abs=0.01)
    if top is None:
        assert record["expected"] == pytest.approx(1 - 2 * math.comb(2 * count, count) / 4**count, abs=0.005)
    assert f"(random steps one after another: {record['expected']:.1%})" in said


def test_the_advice_to_prefer_a_model_is_a_command_that_gives_it_its_share(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "my models"
    strengths = {"theta=1": 0.2, "theta_2": 1.0, "theta_3": 1.1}
    paths = [save_tensors({"w": torch.zeros(60_000)}, folder / "base.safetensors")]
    for (name, strength), vector in zip(strengths.items(), random_vectors(3), strict=True):
        paths.append(save_tensors({"w": strength * vector}, folder / f"{name}.safetensors"))
    base, *models = [open_checkpoint(path) for path in paths]
    found = {ModelsOrigin(): collect_weight_statistics(base, models, list(strengths))}
    (headline,) = [each.headline for each in recommend_from_weights(found) if "tune" in each.headline]
    program, *words = shlex.split(headline.partition("`")[2].rpartition("`")[0])
    assert program == "magmax"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert not ended.value.code
    tuned = open_checkpoint(tmp_path / "tuned.safetensors").read("w", 0, 60_000)
    vectors = [model.read("w", 0, 60_000) for model in models]
    share = np.mean(np.isclose(tuned, 0.5 * vectors[0]) & ~np.isclose(tuned, 0.5 * vectors[1]))
    assert share == pytest.approx(1 / 3, abs=0.01)
    assert "theta=1" in capsys.readouterr().out
