"""Adapters merged into an adapter, against the dense definition in float64: updates first, then a plain SVD."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import Tensors, average, magmax, task_arithmetic

from magmax import MagMaxError, merge, merge_adapters
from magmax.checkpoints import open_checkpoint
from magmax.cli import main
from magmax.merging.adapters.truncation import FactorPair, nearest_to_dense, nearest_to_sum, sum_error
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.recipes.recipe import build_request
from magmax.rules import Dare, Layers, Ties, chain, make_rule
from magmax.rules.kth_magnitude import KthMagnitude

PREFIX = "base_model.model."
SHAPES = {
    "m.q": (20, 12),
    "m.k": (9, 9),
    "m.wide": (3, 40_000),
    "m.conv": (6, 4, 3, 5),
    "m.embed": (31, 8),
    "q": (5, 7),
}
RANKS = (
    {"m.q": 3, "m.k": 3, "m.embed": 3},
    {"m.q": 5, "m.conv": 2, "m.wide": 4, "m.k": 1},
    {"m.q": 2, "m.embed": 6, "q": 1},
)
"""The targets of three adapters, and at what ranks."""


def factors(module: str, rank: int, draw: torch.Generator, dtype: torch.dtype) -> Tensors:
    rows, *rest = SHAPES[module]
    a, b = torch.randn(rank, *rest, generator=draw), torch.randn(rows, rank, *[1] * (len(rest) - 1), generator=draw)
    names = "lora_A.weight", "lora_B.weight"
    if "embed" in module:
        a, b, names = b.T.contiguous(), a.T.contiguous(), ("lora_embedding_A", "lora_embedding_B")
    return {f"{PREFIX}{module}.{name}": t.to(dtype) for name, t in zip(names, (a, b), strict=True)}


def written(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", "target_modules": ["q", "k"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return three(tmp_path)


def three(folder: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    made = []
    for number, ranks in enumerate(RANKS):
        draw = torch.Generator().manual_seed(number)
        tensors = {key: t for m, r in ranks.items() for key, t in factors(m, r, draw, dtype).items()}
        patterns = {"rank_pattern": {f"^{m}": r for m, r in ranks.items()}, "alpha_pattern": {"^m.q": number + 1}}
        made.append(written(folder / f"task{number}", tensors, use_rslora=number == 1, **patterns))
    return made


def told(settings: dict[str, Any], patterns: str, name: str, module: str) -> float:
    """A module's own setting, under its name as the tests or as magmax writes it, or the one for all modules."""
    own = settings.get(patterns, {})
    return own.get(f"^{module}", own.get(f"^{module}".replace(".", r"\."), settings[name]))


def updates(folder: Path, wide: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """s * B A of every module as a matrix of (rows, columns) in the layout of the weight; zero where there is none."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = {key.removeprefix(PREFIX): t for key, t in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for module, (rows, *rest) in SHAPES.items():
        matrix = torch.zeros(rows, math.prod(rest), dtype=wide)
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if f"{module}.{a}" in tensors:
                at, bt = tensors[f"{module}.{a}"].to(wide), tensors[f"{module}.{b}"].to(wide)
                rank = told(settings, "rank_pattern", "r", module)
                alpha = told(settings, "alpha_pattern", "lora_alpha", module)
                scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
                product = at.T @ bt.T if "embedding" in a else bt.reshape(rows, -1) @ at.reshape(len(at), -1)
                matrix = scale * product
        found[module] = matrix
    return found


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


LINEAR = {"average": average, "task_arithmetic": task_arithmetic}
PLAIN = {**LINEAR, "magmax": magmax}


@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("name", PLAIN)
def test_the_result_is_the_truncated_svd_of_the_merged_updates(adapters, tmp_path, name, rank):
    fits = merge_adapters(name, adapters, rank, tmp_path / "out", 0.7)
    found = updates(tmp_path / "out")
    every = [updates(folder) for folder in adapters]
    assert fits.keys() == SHAPES.keys()
    errors, norms = [], []
    for module in SHAPES:
        merged = 0.7 * PLAIN[name]([own[module] for own in every])
        best = truncated(merged, rank)
        norm = merged.norm().item()
        assert (found[module] - best).norm() <= 2e-6 * norm  # float32 factors of float64 (or, dense, float32) updates
        assert fits[module].norm == pytest.approx(norm, rel=1e-6)
        assert fits[module].error == pytest.approx((merged - found[module]).norm().item(), abs=1e-6 * norm)
        errors.append(fits[module].error)
        norms.append(fits[module].norm)
        if name in LINEAR:
            assert fits[module].rank == min(rank, *merged.shape, sum(own.get(module, 0) for own in RANKS))
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())["adapter"]
    assert told["relative_error"] == pytest.approx(math.hypot(*errors) / math.hypot(*norms), rel=1e-5)
    assert told["layers"]["m.q"]["rank"] == fits["m.q"].rank
    if rank == 100:
        assert told["relative_error"] < 1e-6


def test_the_linear_way_and_the_dense_way_agree(adapters, tmp_path, monkeypatch):
    merge_adapters("average", adapters, 3, tmp_path / "thin", 0.7)
    monkeypatch.setattr("magmax.rules.Average.linear", False)
    merge_adapters("average", adapters, 3, tmp_path / "dense", 0.7)
    thin, dense = updates(tmp_path / "thin"), updates(tmp_path / "dense")
    for module in SHAPES:
        assert (thin[module] - dense[module]).norm() <= 2e-6 * thin[module].norm()


@pytest.mark.parametrize("rule", [Ties(), Ties(density=0.4, span="tensor"), KthMagnitude(k=2), "random_mix", "magmax",
                                  chain(Dare(density=0.5), Ties())], ids=str)  # fmt: skip
def test_every_rule_merges_the_updates_as_it_merges_models_of_a_base_of_zeros(adapters, tmp_path, rule):
    """Whole-model questions are asked of all layers, and random draws are those of a merge into the base."""
    merge_adapters(rule, adapters, 40, tmp_path / "out")
    found = updates(tmp_path / "out")
    base = {f"{m}.weight": torch.zeros(shape) for m, shape in SHAPES.items()}
    whole = merge(rule, base, adapters)
    for module in set(SHAPES) - {"m.wide"}:
        expected = whole[f"{module}.weight"].flatten(1).double()
        assert (found[module] - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("given", [None, "float32", "bfloat16", "float16"])
def test_types_and_what_rounding_costs(tmp_path, given):
    folders = three(tmp_path, torch.bfloat16)
    fits = merge_adapters("average", folders, 100, tmp_path / "out", dtype=given)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kind = getattr(torch, given or "bfloat16")
    assert {t.dtype for t in tensors.values()} == {kind}
    found, every = updates(tmp_path / "out"), [updates(folder) for folder in folders]
    for module, fit in fits.items():
        error = (average([own[module] for own in every]) - found[module]).norm().item()
        assert fit.error == pytest.approx(error, rel=1e-4, abs=1e-9 * fit.norm)
        assert fit.relative < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[kind]


def test_adapters_of_several_types_give_float32(tmp_path):
    one, *_ = three(tmp_path / "full")
    _, two, _ = three(tmp_path / "half", torch.float16)
    merge_adapters("average", [one, two], 3, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_one_adapter_alone_is_itself(adapters, tmp_path):
    fits = merge_adapters("average", adapters[:1], 3, tmp_path / "out")
    assert max(fit.relative for fit in fits.values()) < 1e-6
    before, after = updates(adapters[0]), updates(tmp_path / "out")
    for module in RANKS[0]:
        torch.testing.assert_close(after[module], before[module], rtol=1e-5, atol=1e-5)


def test_an_update_of_zeros_has_factors_of_zeros_and_no_error(tmp_path):
    tensors = {key: t * 0 for key, t in factors("m.q", 3, torch.Generator(), torch.float32).items()}
    zero = written(tmp_path / "zero", tensors)
    for rule in ("average", "magmax"):
        fits = merge_adapters(rule, [zero], 2, tmp_path / rule)
        assert (fits["m.q"].norm, fits["m.q"].relative) == (0, 0)
        assert not any(t.any() for t in load_file(tmp_path / rule / "adapter_model.safetensors").values())


def test_the_result_is_read_as_an_adapter_of_its_base(adapters, tmp_path):
    merge_adapters("task_arithmetic", adapters, 100, tmp_path / "out", 1.0)
    base = {f"{m}.weight": torch.randn(shape) for m, shape in SHAPES.items()}
    ours = merge("average", base, [tmp_path / "out"], 1.0)
    theirs = merge("task_arithmetic", base, adapters, 1.0)
    for key in base:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4)
    assert open_checkpoint(tmp_path / "out" / "adapter_model.safetensors", mergeable=False).metadata["format"] == "pt"


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (12, 12)])
def test_no_product_of_the_rank_is_nearer(shape, rank):
    draw = np.random.default_rng(rank)
    whole = FactorPair(draw.normal(size=(9, shape[0])), draw.normal(size=(9, shape[1])))
    dense = whole.left.T @ whole.right
    least = np.linalg.norm(np.linalg.svd(dense)[1][rank:])
    for near in (nearest_to_sum(whole, rank), nearest_to_dense(dense, rank)):
        error = np.linalg.norm(dense - near.left.T @ near.right)
        assert error == pytest.approx(least, abs=1e-7 * np.linalg.norm(dense))
        assert sum_error(whole, near) == pytest.approx(error, abs=1e-12 * np.linalg.norm(dense))


def same_tree(one: Path, other: Path) -> bool:
    names = {p.name for p in one.iterdir()}
    return names == {p.name for p in other.iterdir()} and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names
    )


def test_the_same_job_gives_the_same_folder_at_any_number_of_threads(adapters, tmp_path):
    for threads in (1, 3):
        merge_adapters(Ties(), adapters, 3, tmp_path / f"out{threads}", execution=ExecutionOptions(threads=threads))
    assert same_tree(tmp_path / "out1", tmp_path / "out3")


def test_an_interrupted_merge_goes_on_layer_by_layer(adapters, tmp_path, monkeypatch):
    merge_adapters("magmax", adapters, 3, tmp_path / "whole")
    import magmax.merging.adapters.adapter_kernel as layerwise

    real, left = layerwise.nearest_to_dense, [3]

    def failing(*given: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(layerwise, "nearest_to_dense", failing)
    with pytest.raises(KeyboardInterrupt):
        merge_adapters("magmax", adapters, 3, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left[0] = 10**9
    notes: list[str] = []
    merge_adapters("magmax", adapters, 3, tmp_path / "out", execution=ExecutionOptions(note=notes.append))
    assert [note.partition(":")[0] for note in notes] == ["resuming"]
    assert left[0] == 10**9 - (len(SHAPES) - 2)
    assert same_tree(tmp_path / "out", tmp_path / "whole")


def test_an_embeddings_own_weights_are_carried_over_if_all_adapters_have_the_same(tmp_path):
    embedding = torch.randn(31, 8)
    frozen = {f"{PREFIX}m.embed.base_layer.weight": embedding}
    one = written(tmp_path / "one", plain("m.embed") | frozen)
    two = written(tmp_path / "two", {**plain("m.q"), **plain("m.embed"), **frozen})
    three = written(tmp_path / "three", plain("m.q"))
    merge_adapters("average", [three, one, two], 3, tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(found[f"{PREFIX}m.embed.base_layer.weight"], embedding)
    other = written(tmp_path / "other", plain("m.embed") | {f"{PREFIX}m.embed.base_layer.weight": embedding + 1})
    with pytest.raises(MagMaxError, match=r"other: .*m\.embed\.base_layer\.weight is not what it is in .*one; th"):
        merge_adapters("average", [three, one, other], 3, tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def plain(module: str = "m.q", rank: int = 3) -> Tensors:
    return factors(module, rank, torch.Generator().manual_seed(5), torch.float32)


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        ({**plain(), PREFIX + "head.weight": torch.ones(2)}, {}, r"saves .*head\.weight in full.*give --base BASE"),
        ({f"{PREFIX}m.q.lora_A.weight": torch.ones(3, 4), f"{PREFIX}m.q.lora_B.weight": torch.ones(9, 3)}, {},
         r"m\.q is of shape \[9, 4\], but \[20, 12\]"),
        (plain(rank=4), {}, r"lora_A\.weight, F32 \[4, 12\], .* are not the factors of an update at rank 3"),
        ({key: t / 0 for key, t in plain().items()}, {}, "holds NaN or infinity"),
        (plain(), {"use_dora": True}, "use_dora is True"),
        (dict(list(plain().items())[:1]), {}, "but not the lora_B to it"),
        ({**plain(), **{key.removeprefix(PREFIX): t for key, t in plain().items()}}, {}, "are one factor"),
        ({}, {}, "holds no tensor of an adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(adapters, tmp_path, tensors, settings, words):
    bad = written(tmp_path / "bad", tensors, **settings)
    for rule in ("average", "ties"):
        with pytest.raises(MagMaxError, match=words):
            merge_adapters(rule, [adapters[0], bad], 3, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "task0", "task1", "task2"]


def test_places_twins_and_ranks_are_refused(adapters, tmp_path):
    with pytest.raises(MagMaxError, match="same file"):
        merge_adapters("average", [adapters[0], adapters[0]], 3, tmp_path / "out")
    copy = written(tmp_path / "copy", load_file(adapters[0] / "adapter_model.safetensors"),
                   **json.loads((adapters[0] / "adapter_config.json").read_text()))  # fmt: skip
    with pytest.raises(MagMaxError, match="holds the same tensors"):
        merge_adapters("average", [adapters[0], copy], 3, tmp_path / "out")
    for rank in (0, -1, 2.0, True):
        with pytest.raises(MagMaxError, match="positive whole number"):
            merge_adapters("average", adapters, rank, tmp_path / "out")
    with pytest.raises(MagMaxError, match="an adapter is a folder"):
        merge_adapters("average", adapters, 3, tmp_path / "out.safetensors")
    with pytest.raises(MagMaxError, match="is one of the inputs"):
        merge_adapters("average", adapters, 3, adapters[0])
    with pytest.raises(MagMaxError, match="no dtype 'bfloat'; did you mean 'bfloat16'"):
        merge_adapters("average", adapters, 3, tmp_path / "out", dtype="bfloat")
    with pytest.raises(MagMaxError, match=r"give the adapter alone: .*task0"):
        merge_adapters("average", [f"{tmp_path}/base+{adapters[0]}"], 3, tmp_path / "out")
    with pytest.raises(MagMaxError, match="is not the folder of a LoRA adapter"):
        merge_adapters("average", [tmp_path], 3, tmp_path / "elsewhere" / "out")


def test_the_config_names_just_the_modules_and_keeps_what_all_agree_on(adapters, tmp_path):
    merge_adapters("average", adapters, 4, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(SHAPES)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 4, "CAUSAL_LM")
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^m\\.conv": 2, "^q": 1, "^m\\.wide": 3}
    named = [written(tmp_path / f"n{n}", plain("m.q") | plain("m.k") if n else plain("m.q")) for n in (0, 1)]
    merge_adapters("average", named, 4, tmp_path / "named")
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["rank_pattern"]) == (["k", "q"], {"^m\\.k": 3})


def command(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["magmax", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


def test_on_the_command_line_and_in_recipes(adapters, tmp_path, monkeypatch, capsys):
    merge_adapters("magmax", adapters, 3, tmp_path / "python")
    words = ("merge", *adapters, "--adapter-rank", 3)
    code, out, _ = command(monkeypatch, capsys, *words, "--out", tmp_path / "cli", "--dry-run")
    assert (code, (tmp_path / "cli").exists()) == (0, False)
    assert "no problem found" in out
    code, out, _ = command(monkeypatch, capsys, *words, "--out", tmp_path / "cli")
    assert code == 0
    assert "layer    rank  relative error\n" in out
    assert "all 6 layers: relative error 0." in out
    assert f"merged 3 adapters with magmax: {tmp_path / 'cli'} (" in out
    assert same_tree(tmp_path / "cli", tmp_path / "python")
    content = {"models": [str(a) for a in adapters], "adapter_rank": 3, "out": str(tmp_path / "recipe")}
    build_request(content, "recipe.yaml", {}, "").job().run()
    assert same_tree(tmp_path / "recipe", tmp_path / "python")
    code, _, err = command(monkeypatch, capsys, *words, "--base", tmp_path, "--out", tmp_path / "no")
    assert (code, "has no base; leave it out, or leave out adapter_rank" in err) == (2, True)
    code, _, err = command(monkeypatch, capsys, *words, "--allow-nonfinite", "--out", tmp_path / "no")
    assert (code, "has no allow_nonfinite" in err) == (2, True)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("models: [task0, task1]\nadapter_rank: 3\nout: swept\n")
    code, _, err = command(monkeypatch, capsys, "search", "sweep", recipe, "scaling_factor=0.1,0.2")
    assert (code, "has no base" in err) == (2, True)


def test_a_gradient_over_layers_is_refused_as_adapters_do_not_tell_their_number(adapters, tmp_path):
    gradient = make_rule("task_arithmetic", {"weights": {"layers": [0.1, 1]}})
    with pytest.raises(MagMaxError, match="how many layers"):
        merge_adapters(gradient, adapters, 3, tmp_path / "out")
    with pytest.raises(MagMaxError, match="how many layers"):
        merge_adapters("average", adapters, 3, tmp_path / "out", Layers((0.1, 1)))
    assert not (tmp_path / "out").exists()
