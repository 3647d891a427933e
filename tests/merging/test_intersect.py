"""Models whose tensors have more or fewer rows than the base's: the rows that all have are merged, the rest is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests import models as plain
from tests.models import Tensors, load_tensors, same_bytes, save_tensors, tensor_bytes
from tests.rules.test_planned import flat, ties

from magmax import MagMaxError, Running, merge
from magmax.checkpoints import blocks, open_checkpoint
from magmax.cli import main
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.recipes.recipe import build_request
from magmax.rules import (
    BUILT_IN,
    Block,
    Breadcrumbs,
    Dare,
    Della,
    IsoC,
    KthMagnitude,
    MagMax,
    NearSwap,
    Prune,
    RandomMix,
    Rule,
    Slerp,
    Ties,
    Tunable,
    chain,
)
from magmax.rules.statistics import Array, Counts, Reduction, Scope, Statistics, StatisticsRequest

RULES = [
    "magmax", "average", "task_arithmetic", KthMagnitude(k=2), RandomMix(), Ties(), Ties(0.5, span="tensor"),
    chain(Prune(density=0.3), MagMax()), chain(Dare(density=0.6), Ties(0.4)), chain(Prune(0.5, "bottom"), Ties()),
]  # fmt: skip
NEEDED = {"kth_magnitude": {"k": 2}, "tunable": {"preference": (1, 2, 1)}}
EVERY = [
    *RULES, *(kind(**NEEDED.get(kind.name, {})) for kind in BUILT_IN.values() if issubclass(kind, Rule)),
    Tunable((1, 2, 1), span="tensor"),
    chain(Della(span="tensor"), MagMax()), chain(Breadcrumbs(), IsoC()),
]  # fmt: skip
STREAMING = [rule for rule in RULES if isinstance(rule, str | KthMagnitude | RandomMix)]


def model(seed: int, rows: int, head: int | None = 9, dtype: torch.dtype = torch.float32) -> Tensors:
    """Integers make equal magnitudes common; the embedding is cut into many slabs."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=draw).to(dtype)

    made = {"embed": some(rows, 24), "bias": some(rows), "layer": some(48, 33), "ids": torch.arange(4)}
    return made if head is None else {**made, "head": some(head, 5, 2)}


BASE = model(0, 130)
MODELS = [model(1, 137), model(2, 101, 7), model(3, 130, 12)]
"""Of the embedding 101 rows are in all of them, of the head 7."""
ROWS = {"embed": 101, "bias": 101, "head": 7}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)


def cut(tensors: Tensors, rows: dict[str, int]) -> Tensors:
    return {key: t[: rows[key]].clone() if key in rows else t for key, t in tensors.items()}


def expected(
    rule: Any, base: Tensors, models: list[Tensors], rows: dict[str, int], factor: float, **options: Any
) -> Tensors:
    """Cut everything to the rows that all have, merge that, and put the base's other rows behind."""
    small = merge(rule, cut(base, rows), [cut(m, rows) for m in models], factor, **options)
    return {key: torch.cat([t, base[key][rows[key] :].to(t.dtype)]) if key in rows else t for key, t in small.items()}


@pytest.mark.parametrize("name", ["magmax", "average", "task_arithmetic"])
def test_they_are_the_definition_written_in_torch(name):
    found = merge(name, BASE, MODELS, 0.5, mismatch="intersect")
    small = plain.reference_merge(getattr(plain, name), cut(BASE, ROWS), [cut(m, ROWS) for m in MODELS], 0.5)
    for key, tensor in BASE.items():
        rows = ROWS.get(key, len(tensor))
        assert tensor_bytes(found[key][:rows]) == tensor_bytes(small[key])
        assert tensor_bytes(found[key][rows:]) == tensor_bytes(tensor[rows:])


def test_ties_counts_what_is_merged_and_nothing_else():
    def floats(tensors: Tensors) -> Tensors:
        return {key: t for key, t in cut(tensors, ROWS).items() if key != "ids"}

    found = merge(Ties(0.3), BASE, MODELS, 1.0, mismatch="intersect")
    start = flat(floats(BASE))
    wanted = start + ties([flat(floats(m)) - start for m in MODELS], 0.3)
    assert (flat(floats(found)) == wanted).all()


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_the_rows_that_all_have_are_merged_as_if_there_were_no_others(rule, tmp_path):
    models = MODELS[1:2] if isinstance(rule, Slerp | NearSwap) else MODELS
    wanted = expected(rule, BASE, models, ROWS, 0.5)
    assert same_bytes(merge(rule, BASE, models, 0.5, mismatch="intersect"), wanted)
    base = save_tensors(BASE, tmp_path / "base.safetensors")
    files = [save_tensors(m, tmp_path / f"task{n}.safetensors") for n, m in enumerate(models)]
    for threads in (1, 3):
        out = tmp_path / f"out{threads}.safetensors"
        merge(rule, base, files, 0.5, out, mismatch="intersect", execution=ExecutionOptions(threads=threads))
        assert same_bytes(load_tensors(out), wanted)


@dataclass(frozen=True)
class Shapes(Reduction):
    """Adds up the shape of every block, as the block tells it."""

    def initial(self) -> Counts:
        return np.zeros(4, np.int64)

    def update(self, block: Block, into: Counts) -> None:
        assert block.shape is not None
        into[: len(block.shape)] += block.shape


@dataclass(frozen=True)
class Asking(Rule):
    """A rule of whole tensors, which asks for their shapes before it merges."""

    name: ClassVar[str] = "asking"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""

    @property
    def passes(self) -> int:
        return 1

    @property
    def whole_tensor(self) -> bool:
        return True

    def statistics(self, scope: Scope) -> StatisticsRequest:
        return (yield Shapes())

    def merge(self, block: Block, answer: Statistics) -> Array:
        assert answer.tolist() == [101 + 101 + 48 + 7, 24 + 33 + 5, 2, 0]
        assert (
            block.shape == {"embed": (101, 24), "bias": (101,), "layer": (48, 33), "head": (7, 5, 2)}[block.address.key]
        )
        return block.task_vectors[0]


def test_whole_tensors_have_the_shape_of_what_is_merged_when_asked_and_when_merged():
    found = merge(Asking(), BASE, MODELS, mismatch="intersect")
    assert tensor_bytes(found["embed"]) == tensor_bytes(torch.cat([MODELS[0]["embed"][:101], BASE["embed"][101:]]))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_types(given, dtype):
    base, *models = ({k: t.to(given) if t.is_floating_point() else t for k, t in m.items()} for m in (BASE, *MODELS))
    base["embed"][-1, -1] = -0.0
    found = merge("magmax", base, models, 0.5, mismatch="intersect", dtype=dtype)
    assert same_bytes(found, expected("magmax", base, models, ROWS, 0.5, dtype=dtype))


def test_a_missing_tensor_and_other_shapes_are_the_bases():
    models = [
        model(1, 130, None),
        {**model(2, 130), "layer": torch.zeros(48, 34)},
        {**model(3, 0), "extra": torch.ones(2)},
    ]
    with pytest.raises(MagMaxError, match="nothing would be merged"):
        merge("average", BASE, models, 1.0, mismatch="intersect")
    found = merge(
        "average",
        {**BASE, "more": torch.zeros(2)},
        [{**m, "more": torch.ones(2)} for m in models],
        1.0,
        mismatch="intersect",
    )
    assert found.keys() == {*BASE, "more"}
    assert all(tensor_bytes(found[key]) == tensor_bytes(BASE[key]) for key in BASE)
    models[2] = {**model(3, 130), "layer": torch.zeros(47, 33)}
    found = merge("average", BASE, models, 1.0, mismatch="intersect")
    assert all(tensor_bytes(found[key]) == tensor_bytes(BASE[key]) for key in ("layer", "head"))
    assert tensor_bytes(found["embed"]) != tensor_bytes(BASE["embed"])


def test_tied_weights_are_merged_in_part_and_stay_tied():
    def tied(tensors: Tensors) -> Tensors:
        return {**tensors, "tied": tensors["embed"]}

    found = merge("magmax", tied(BASE), [tied(m) for m in MODELS], 0.5, mismatch="intersect")
    assert found["tied"] is found["embed"]
    assert tensor_bytes(found["embed"]) == tensor_bytes(expected("magmax", BASE, MODELS, ROWS, 0.5)["embed"])


def test_nan_among_rows_that_are_not_merged_is_nobodys_business_and_elsewhere_refused():
    base, models = {k: t.clone() for k, t in BASE.items()}, [{k: t.clone() for k, t in m.items()} for m in MODELS]
    base["embed"][101], models[0]["embed"][101] = torch.nan, torch.nan
    assert torch.isnan(merge("magmax", base, models, mismatch="intersect")["embed"][101]).all()
    models[0]["embed"][100, 0] = torch.nan
    with pytest.raises(MagMaxError, match="embed holds"):
        merge("magmax", base, models, mismatch="intersect")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_nan_and_infinity_among_kept_rows_are_named_as_the_bases_own_where_they_must_be_converted(dtype, bad):
    base = {key: t.clone() for key, t in BASE.items()}
    base["embed"][101, 3] = bad
    with pytest.raises(MagMaxError, match="embed: what is kept of the base as it is holds NaN or infinity"):
        merge("magmax", base, MODELS, mismatch="intersect", dtype=dtype)
    found = merge("magmax", base, MODELS, mismatch="intersect", dtype=dtype, allow_nonfinite=True)
    wanted = base["embed"][101:].to(found["embed"].dtype)
    torch.testing.assert_close(found["embed"][101:], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[Path]]:
    folder = tmp_path / "base"
    save_tensors(BASE, folder / "model.safetensors")
    return folder, [save_tensors(m, tmp_path / f"task{n}.safetensors") for n, m in enumerate(MODELS)]


def test_every_touched_tensor_is_named_on_the_terminal_in_the_card_and_in_the_provenance(
    files, tmp_path, monkeypatch, capsys
):
    base, models = files
    save_tensors({**load_tensors(models[0]), "extra": torch.ones(2)}, models[0])
    thin = load_tensors(models[2])
    del thin["layer"]
    save_tensors(thin, models[2])
    words = ["merge", "--base", base, *models, "--mismatch", "intersect", "--out", tmp_path / "out"]
    for more in (["--dry-run"], []):
        monkeypatch.setattr("sys.argv", ["magmax", *map(str, [*words, *more])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        told = capsys.readouterr().out
        assert "3 tensors were merged in part:\n" in told
        line = "  embed: 101 of 130 rows merged, the other 29 kept from the base, the further rows of models left out "
        assert line + f"({models[0]} has 137, {models[1]} has 101)\n" in told
        assert "  head: 7 of 9 rows merged, the other 2 kept" in told
        assert f"{models[2]}: has no tensor layer" in told
        assert "has a tensor extra" in told
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "## Tensors that were merged in part\n\n* `bias`: 101 of 130 rows\n* `embed`: 101 of 130 rows\n* `head`" in card
    )
    recipe = json.loads((tmp_path / "out" / "provenance.json").read_text())["recipe"]
    assert recipe["merged_rows"] == {"bias": [101, 130], "embed": [101, 130], "head": [7, 9]}
    assert recipe["not_merged"] == ["extra", "layer"]
    assert str(tmp_path) not in json.dumps(recipe)


def test_a_recipe_and_a_sweep(files, tmp_path, monkeypatch, capsys):
    _, models = files
    content = {"base": "base", "models": [m.name for m in models], "mismatch": "intersect", "out": "out.safetensors"}
    for rule in ("magmax", "ties"):
        wanted = expected(rule, BASE, MODELS, ROWS, 0.5)
        given = {**content, "rule": rule, "scaling_factor": 0.5}
        build_request(given, "here", {}, str(tmp_path)).job().run()
        assert same_bytes(load_tensors(tmp_path / "out.safetensors"), wanted)
        (tmp_path / "r.yaml").write_text(json.dumps({**content, "rule": rule}))
        monkeypatch.setattr("sys.argv", ["magmax", "search", "sweep", str(tmp_path / "r.yaml"), "scaling_factor=0.5,1"])
        with pytest.raises(SystemExit):
            main()
        capsys.readouterr()
        assert same_bytes(load_tensors(tmp_path / "out-0.5.safetensors"), wanted)


def test_an_unknown_word_is_refused():
    with pytest.raises(MagMaxError, match="mismatch must be one of strict, base, intersect, union, not 'intersct'"):
        merge("magmax", BASE, [MODELS[2]], mismatch="intersct")


@pytest.mark.parametrize("winners", [False, True])
@pytest.mark.parametrize("rule", STREAMING, ids=str)
def test_absorbed_one_by_one_they_are_the_batch(rule, winners, files, tmp_path):
    base, models = files
    if winners and rule != "magmax":
        return
    gone = load_tensors(models[0])
    del gone["layer"]
    models = [
        *models,
        save_tensors(model(7, 140), tmp_path / "late.safetensors"),
        save_tensors(gone, tmp_path / "gone.safetensors"),
    ]
    running = Running(tmp_path / "state", rule, base, winners=winners, mismatch="intersect")
    for number, task in enumerate(models, start=1):
        running.absorb(task)
        again = Running(tmp_path / "state")
        if isinstance(rule, KthMagnitude) and number < 2:
            continue
        again.result(0.5, tmp_path / "running.safetensors")
        merge(rule, base, models[:number], 0.5, tmp_path / "batch.safetensors", mismatch="intersect")
        assert same_bytes(load_tensors(tmp_path / "running.safetensors"), load_tensors(tmp_path / "batch.safetensors"))
    if winners:
        assert sum(again.status().shares) == pytest.approx(1)
    with pytest.raises(MagMaxError, match="was begun with mismatch intersect, not strict"):
        Running(tmp_path / "state", mismatch="strict")


def test_a_running_merge_keeps_the_bases_where_any_model_did_not_match(files, tmp_path):
    base, models = files
    running = Running(tmp_path / "state", "magmax", base, mismatch="base")
    for task in models:
        running.absorb(task)
    out = running.result(0.5, tmp_path / "out")
    merge("magmax", base, models, 0.5, tmp_path / "batch.safetensors", mismatch="base")
    assert same_bytes(load_tensors(out / "model.safetensors"), load_tensors(tmp_path / "batch.safetensors"))
    assert json.loads((out / "provenance.json").read_text())["recipe"]["not_merged"] == ["bias", "embed", "head"]


def test_a_strict_state_is_written_as_it_always_was(files, tmp_path):
    base, _ = files
    Running(tmp_path / "state", "magmax", base).absorb(save_tensors(model(5, 130), tmp_path / "task.safetensors"))
    told = json.loads((tmp_path / "state" / "state.json").read_text())
    assert (told["format"], "mismatch" in told, "extents" in told["generations"][0]) == (1, False, False)


def test_a_state_that_merges_what_the_base_has_not_is_damaged(files, tmp_path):
    base, models = files
    Running(tmp_path / "state", "magmax", base, mismatch="intersect").absorb(models[1])
    file = tmp_path / "state" / "state.json"
    for extents in ({"embed": 10**9}, {"nothing": 1}, {"embed": -1}, {"embed": "1"}, 3, None):
        told = json.loads(file.read_text())
        told["generations"][0]["extents"] = extents
        file.write_text(json.dumps(told))
        with pytest.raises(MagMaxError, match=r"damaged|not the state"):
            Running(tmp_path / "state").absorb(models[0])


def test_an_adapter_with_a_resized_embedding(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    prefix = "base_model.model.embed"
    resized = torch.cat([BASE["embed"], torch.ones(7, 24)])
    tensors = {f"{prefix}.base_layer.weight": resized, f"{prefix}.lora_embedding_A": torch.randn(2, 137),
               f"{prefix}.lora_embedding_B": torch.randn(24, 2)}  # fmt: skip
    save_tensors(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    base = {"embed.weight": BASE["embed"]}
    found = merge("average", base, [folder], 1.0, mismatch="intersect")["embed.weight"]
    a, b = tensors[f"{prefix}.lora_embedding_A"], tensors[f"{prefix}.lora_embedding_B"]
    torch.testing.assert_close(found, (resized + a.T @ b.T)[:130])
    assert open_checkpoint(folder, base=open_checkpoint(base)).spec("embed.weight").shape == (137, 24)
