"""LoRA adapters in PEFT's layout, against the dense definition: bit for bit in float32, closely in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.models import Tensors, load_tensors, same_bytes, save_tensors, tensor_bytes

from magmax import MagMaxError, Running, merge
from magmax.calibration.calibration_job import calibrate_job
from magmax.checkpoints import blocks, open_checkpoint
from magmax.checkpoints.lora.adapted_model import split_base_and_adapter
from magmax.checkpoints.renamed import Renaming
from magmax.checkpoints.safetensors import SafetensorsFile
from magmax.cli import main
from magmax.merging.convert import convert_job
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.recipes.recipe import build_request, load_recipe

RANK = 3
PREFIX = "base_model.model."


def base_model(dtype: torch.dtype = torch.float32) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "m.q.weight": (20, 12),
        "m.q.bias": (20,),
        "m.square.weight": (16, 16),
        "m.across.weight": (10, 14),
        "m.embed.weight": (31, 8),
        "m.conv.weight": (6, 4, 3, 5),
        "m.wide.weight": (2, 300_000),
        "m.deep.weight": (3000, 130),
        "m.norm.weight": (12,),
        "head.weight": (5, 12),
    }
    made = {key: torch.randn(shape, generator=draw).to(dtype) for key, shape in shapes.items()}
    return {**made, "m.steps": torch.arange(4)}


def pair(
    module: str, a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(a, generator=draw).to(dtype),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(b, generator=draw).to(dtype),
    }


def linear(module: str, out: int, into: int, rank: int = RANK, **options: Any) -> Tensors:
    return pair(module, (rank, into), (out, rank), **options)


def adapter(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 7, "bias": "none", "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def folded(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s * (B A), dense, each product and sum rounded on its own, k = 0, 1, ... in order."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    b, a = b.to(wide), a.to(wide)
    total = b[:, :1] * a[:1]
    for k in range(1, len(a)):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    return weight.to(wide) + torch.tensor(scale, dtype=wide) * total.reshape(weight.shape)


def presented(source: Any, base: Path | None = None) -> Tensors:
    """Every tensor of a checkpoint, read in canonical slabs."""
    model = open_checkpoint(source, base=None if base is None else open_checkpoint(base))
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found: Tensors = {}
    for key, spec in model.specs.items():
        parts = [model.read(key, *cut) for chunk in blocks.iter_chunks(key, spec) for cut in chunk.blocks(spec)]
        units = torch.from_numpy(np.concatenate(parts))
        found[key] = units.view(types.get(spec.dtype, torch.int64)).reshape(spec.shape)
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tensors(base_model(), tmp_path / "base.safetensors")


ALL = {
    **linear("m.q", 20, 12),
    **linear("m.across", 14, 10),
    **linear("m.wide", 2, 300_000),
    **linear("m.deep", 3000, 130),
}


@pytest.mark.parametrize("half", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_element_is_the_fold_of_the_definition(tmp_path, dtype, half):
    model = base_model(dtype)
    del model["m.across.weight"]
    tensors = {key: t.to(half) for key, t in ALL.items() if "across" not in key}
    folder = adapter(tmp_path / "task", tensors)
    path = save_tensors(model, tmp_path / "base.safetensors")
    if half == torch.float64 != dtype:
        with pytest.raises(MagMaxError, match="these types do not go together"):
            open_checkpoint(f"{path}+{folder}")
        return
    found = presented(f"{path}+{folder}")
    assert found.keys() == model.keys()
    for key, weight in model.items():
        name = PREFIX + key.removesuffix("weight")
        if name + "lora_A.weight" not in tensors:
            assert tensor_bytes(found[key]) == tensor_bytes(weight)
            assert found[key].dtype == weight.dtype
            continue
        b, a = tensors[name + "lora_B.weight"], tensors[name + "lora_A.weight"]
        expected = folded(weight, b, a, 7 / RANK)
        assert found[key].dtype == expected.dtype
        assert tensor_bytes(found[key]) == tensor_bytes(expected)
        dense = weight.double() + 7 / RANK * (b.double() @ a.double())
        torch.testing.assert_close(found[key].double(), dense, rtol=1e-5, atol=1e-5)


def test_any_range_is_a_part_of_the_whole(base, tmp_path):
    model = open_checkpoint(f"{base}+{adapter(tmp_path / 'task', ALL)}")
    draw = np.random.default_rng(0)
    for key in ("m.q.weight", "m.across.weight", "m.wide.weight", "m.deep.weight"):
        units = model.spec(key).num_units
        whole = model.read(key, 0, units)
        for _ in range(8):
            start, stop = sorted(draw.integers(0, units + 1, 2).tolist())
            assert model.read(key, start, stop).tobytes() == whole[start:stop].tobytes()
        assert not len(model.read(key, 3, 3))
        model.read(key, 0, 9)[:] = 0
        assert model.read(key, 0, units).tobytes() == whole.tobytes()


@pytest.mark.parametrize("slab", [1 << 8, 1 << 13, 1 << 20])
@pytest.mark.parametrize("tile", [1 << 7, 1 << 16])
def test_slabs_tiles_and_threads_change_no_byte(base, tmp_path, monkeypatch, slab, tile):
    folder = adapter(tmp_path / "task", {**ALL, **embedding()})
    whole = presented(f"{base}+{folder}")
    merge("average", base, [folder], 1.0, tmp_path / "one.safetensors", execution=ExecutionOptions(threads=1))
    monkeypatch.setattr("magmax.checkpoints.blocks.BLOCK_ELEMENTS", slab)
    monkeypatch.setattr("magmax.checkpoints.lora.product.TILE_ELEMENTS", tile)
    assert same_bytes(presented(f"{base}+{folder}"), whole)
    merge("average", base, [folder], 1.0, tmp_path / "four.safetensors", execution=ExecutionOptions(threads=4))
    assert same_bytes(load_tensors(tmp_path / "four.safetensors"), load_tensors(tmp_path / "one.safetensors"))


def embedding(module: str = "m.embed", count: int = 31, width: int = 8) -> Tensors:
    draw = torch.Generator().manual_seed(2)
    return {
        f"{PREFIX}{module}.lora_embedding_A": torch.randn(RANK, count, generator=draw),
        f"{PREFIX}{module}.lora_embedding_B": torch.randn(width, RANK, generator=draw),
    }


def test_embeddings_are_transposed(base, tmp_path):
    tensors = embedding()
    a, b = tensors.values()
    found = presented(adapter(tmp_path / "task", tensors, fan_in_fan_out=True), base)
    assert tensor_bytes(found["m.embed.weight"]) == tensor_bytes(
        folded(base_model()["m.embed.weight"], a.T, b.T, 7 / RANK)
    )


def test_a_saved_embedding_is_what_its_update_is_added_to(base, tmp_path):
    resized = torch.randn(31, 8)
    tensors = {**embedding(), PREFIX + "m.embed.base_layer.weight": resized}
    a, b = embedding().values()
    found = presented(adapter(tmp_path / "task", tensors), base)
    assert tensor_bytes(found["m.embed.weight"]) == tensor_bytes(folded(resized, a.T, b.T, 7 / RANK))


@pytest.mark.parametrize("flag", [True, False])
def test_weights_stored_transposed(base, tmp_path, flag):
    tensors = linear("m.square", 16, 16) | (linear("m.across", 14, 10) if flag else linear("m.q", 20, 12))
    a, b = (tensors[f"{PREFIX}m.square.lora_{side}.weight"] for side in "AB")
    found = presented(adapter(tmp_path / "task", tensors, fan_in_fan_out=flag), base)
    left, right = (a.T, b.T) if flag else (b, a)
    assert tensor_bytes(found["m.square.weight"]) == tensor_bytes(
        folded(base_model()["m.square.weight"], left, right, 7 / RANK)
    )
    if flag:
        a, b = linear("m.across", 14, 10).values()
        assert tensor_bytes(found["m.across.weight"]) == tensor_bytes(
            folded(base_model()["m.across.weight"], a.T, b.T, 7 / RANK)
        )


def test_a_square_weight_among_contradicting_ones_is_refused(base, tmp_path):
    tensors = linear("m.square", 16, 16) | linear("m.q", 20, 12)
    with pytest.raises(MagMaxError, match=r"m\.square\.weight is square.*fan_in_fan_out is true.*for m\.q\.weight"):
        presented(adapter(tmp_path / "task", tensors, fan_in_fan_out=True), base)


def test_a_square_weight_of_a_base_with_transposed_ones_needs_a_known_architecture(tmp_path):
    model = {
        "h.c_proj.weight": torch.randn(12, 12),
        "h.c_fc.weight": torch.randn(12, 48),
        "h.c_fc.bias": torch.ones(48),
    }
    model["lm_head.weight"] = torch.randn(30, 12)
    save_tensors(model, tmp_path / "base" / "model.safetensors")
    tensors = linear("h.c_proj", 12, 12) | linear("lm_head", 30, 12)
    folder = adapter(tmp_path / "task", tensors)
    for config in ({}, {"model_type": "gpt_neox"}, {"model_type": "gpt2", "auto_map": {"AutoModel": "x.Y"}}):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        with pytest.raises(MagMaxError, match=r"h\.c_proj\.weight is square.*is false, .*for h\.c_fc\.weight"):
            presented(folder, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    a, b = linear("h.c_proj", 12, 12).values()
    assert tensor_bytes(presented(folder, tmp_path / "base")["h.c_proj.weight"]) == tensor_bytes(
        folded(model["h.c_proj.weight"], a.T, b.T, 7 / RANK)
    )


def test_convolutions(base, tmp_path):
    tensors = pair("m.conv", (RANK, 4, 3, 5), (6, RANK, 1, 1))
    a, b = tensors.values()
    found = presented(adapter(tmp_path / "task", tensors), base)["m.conv.weight"]
    weight = base_model()["m.conv.weight"]
    assert tensor_bytes(found) == tensor_bytes(folded(weight, b.reshape(6, RANK), a.reshape(RANK, -1), 7 / RANK))
    dense = torch.nn.functional.conv2d(a.double().transpose(0, 1), b.double()).transpose(0, 1)
    torch.testing.assert_close(found.double(), weight.double() + 7 / RANK * dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stabilised", [False, True])
def test_ranks_and_alphas_by_pattern(base, tmp_path, stabilised):
    tensors = linear("m.q", 20, 12, rank=5) | linear("m.square", 16, 16)
    settings = {"rank_pattern": {"q": 5}, "alpha_pattern": {"^m.squ.*": 2.5}, "use_rslora": stabilised}
    found = presented(adapter(tmp_path / "task", tensors, **settings), base)
    for key, rank, alpha in (("m.q", 5, 7), ("m.square", RANK, 2.5)):
        a, b = (tensors[f"{PREFIX}{key}.lora_{side}.weight"] for side in "AB")
        scale = alpha / (math.sqrt(rank) if stabilised else rank)
        assert tensor_bytes(found[f"{key}.weight"]) == tensor_bytes(folded(base_model()[f"{key}.weight"], b, a, scale))


def test_modules_and_biases_saved_in_full_stand_in_the_place_of_the_base(base, tmp_path):
    head, bias, norm = torch.randn(5, 12), torch.randn(20), torch.randn(12)
    tensors = {
        **linear("m.q", 20, 12),
        PREFIX + "head.weight": head,
        PREFIX + "m.q.base_layer.bias": bias,
        PREFIX + "m.norm.modules_to_save.weight": norm,
        PREFIX + "m.norm.original_module.weight": torch.zeros(12),
    }
    folder = adapter(tmp_path / "task", tensors, bias="all", modules_to_save=["head", "norm"])
    found = presented(folder, base)
    assert [tensor_bytes(found[k]) for k in ("head.weight", "m.q.bias", "m.norm.weight")] == [
        tensor_bytes(head),
        tensor_bytes(bias),
        tensor_bytes(norm),
    ]


def test_a_saved_module_that_the_base_has_not_is_an_extra_tensor(base, tmp_path):
    tensors = {**linear("m.q", 20, 12), PREFIX + "score.weight": torch.ones(2, 12)}
    folder = adapter(tmp_path / "task", tensors, modules_to_save=["score"])
    with pytest.raises(MagMaxError, match=r"has a tensor score\.weight(.|\n)*--mismatch base"):
        merge("magmax", base, [folder], out=tmp_path / "out.safetensors")
    merge("magmax", base, [folder], out=tmp_path / "out.safetensors", mismatch="base")
    assert load_tensors(tmp_path / "out.safetensors").keys() == base_model().keys()


@pytest.mark.parametrize("drop", [True, False])
def test_names_are_found_with_a_leading_part_more_or_fewer(tmp_path, drop):
    model = {"h.q.weight": torch.randn(20, 12), "h.q.bias": torch.zeros(20)}
    model = model if drop else {f"bert.{key}": tensor for key, tensor in model.items()}
    base = save_tensors(model, tmp_path / "base.safetensors")
    module = "bert.h.q" if drop else "h.q"
    tensors = {
        **linear(module, 20, 12),
        f"{PREFIX}{module}.bias": torch.ones(20),
        PREFIX + "score.weight": torch.ones(1),
    }
    found = presented(adapter(tmp_path / "task", tensors), base)
    assert found.keys() == {*model, "score.weight"}
    key, bias = model
    a, b = linear(module, 20, 12).values()
    assert tensor_bytes(found[key]) == tensor_bytes(folded(model[key], b, a, 7 / RANK))
    assert tensor_bytes(found[bias]) == tensor_bytes(torch.ones(20))


def test_tied_weights_are_tuned_once(tmp_path):
    model = {"embed.weight": torch.randn(31, 8)}
    model["head.weight"] = model["embed.weight"]
    opened = open_checkpoint(model)
    folder = adapter(tmp_path / "task", linear("head", 31, 8))
    tuned = open_checkpoint(folder, base=opened)
    assert (list(tuned.specs), tuned.aliases) == (["embed.weight"], {"head.weight": "embed.weight"})
    adapter(tmp_path / "task", {**linear("head", 31, 8), **embedding("embed")})
    with pytest.raises(MagMaxError, match=r"targets embed\.weight.*twice"):
        open_checkpoint(folder, base=opened)


Q = linear("m.q", 20, 12)
HALF = dict([next(iter(Q.items()))])


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        (Q, {"use_dora": True}, r"adapter_config\.json: use_dora is True.*merge_and_unload"),
        (Q, {"peft_type": "LOHA"}, r"adapter_config\.json: peft_type is 'LOHA'.*only 'LORA'"),
        (Q, {"target_parameters": ["w"]}, "target_parameters is"),
        (Q, {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base"),
        (Q, {"r": 0}, r"the rank r of m\.q is 0"),
        (Q, {"r": True}, r"the rank r of m\.q is True"),
        (Q, {"lora_alpha": "big"}, r"lora_alpha of m\.q is 'big'"),
        (Q, {"lora_alpha": math.inf}, r"lora_alpha of m\.q is inf"),
        (Q, {"rank_pattern": {"(": 3}}, r"rank_pattern has a bad expression '\('"),
        (Q, {"rank_pattern": 3}, "rank_pattern is 3; it must be a map"),
        (Q, {"r": 4}, r"F32 \[3, 12\].*F32 \[20, 3\].*F32 \[20, 12\].*at rank 4.*do not fit"),
        (HALF, {}, r"holds base_model\.model\.m\.q\.lora_A\.weight, but not the lora_B to it"),
        (linear("m.nothing", 20, 12), {}, r"targets m\.nothing, but .*base\.safetensors has no tensor m\.nothing\.wei"),
        (linear("m.q", 20, 13), {}, r"F32 \[3, 13\].*m\.q\.weight, F32 \[20, 12\] in .*do not fit"),
        (linear("m.norm", 12, 12), {}, r"m\.norm\.weight, F32 \[12\]"),
        (pair("m.conv", (RANK, 4, 3, 5), (6, 1, 1, 1)), {}, "do not fit"),
        (embedding("m.embed", 8, 31), {}, "do not fit"),
        ({**Q, PREFIX + "m.q.lora_magnitude_vector": torch.ones(20)}, {}, "lora_magnitude_vector is of a kind that is"),
        ({**Q, PREFIX + "m.q.lora_B.bias": torch.ones(20)}, {}, r"lora_B\.bias is of a kind that is"),
        ({**Q, PREFIX + "m.e.token_adapter.trainable_tokens_delta": torch.ones(2)}, {}, "is of a kind that is"),
        ({}, {}, "holds no tensor of an adapter"),
        (Q, {"use_new_thing": True}, r"use_new_thing is True, a setting that is not known"),
        (Q, {"use_new_thing": False, "later": None, "more": []} | {"enable_lora": [True]}, r"enable_lora is \[True\]"),
        (Q, {"peft_type": "P_TUNING"}, r"'P_TUNING'.*nothing can be merged"),
        (Q, {"r": 4}, r"the factors are of rank 3: correct r or rank_pattern in .*adapter_config\.json"),
        (Q, {"rank_pattern": {"q": 5}}, r"the factors are of rank 3: correct r or rank_pattern"),
        (pair("m.conv", (RANK, 8, 3, 5), (6, RANK, 1, 1)), {}, "a convolution of 2 groups is not supported"),
        (pair("m.steps", (RANK, 4), (4, RANK)), {}, r"no tensor m\.steps\.weight"),
        ({f"{PREFIX}m.q.lora_A.mine.weight": torch.ones(3, 12)}, {}, r"carry the name of an adapter \(mine\)"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(base, tmp_path, tensors, settings, words):
    with pytest.raises(MagMaxError, match=words):
        open_checkpoint(f"{base}+{adapter(tmp_path / 'task', tensors, **settings)}")


def test_all_problems_are_listed_at_once(base, tmp_path):
    folder = adapter(tmp_path / "task", {**HALF, **linear("m.other", 2, 2)})
    with pytest.raises(MagMaxError, match=r"\(2 problems\)"):
        open_checkpoint(f"{base}+{folder}")


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"peft_type": ["LORA"]}', "\udcff"])
def test_settings_that_are_none(base, tmp_path, text):
    folder = adapter(tmp_path / "task", Q)
    (folder / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MagMaxError, match=r"adapter_config\.json: "):
        open_checkpoint(f"{base}+{folder}")


def test_an_adapter_without_tensors_or_base(base, tmp_path):
    folder = adapter(tmp_path / "task", Q)
    with pytest.raises(MagMaxError, match=r"task: is an adapter.*write BASE\+.*task"):
        open_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MagMaxError, match=r"has adapter_config\.json, but no adapter_model\.safetensors"):
        open_checkpoint(folder, base=open_checkpoint(base))


def test_adapters_saved_as_pickles(base, tmp_path):
    folder = adapter(tmp_path / "task", Q)
    expected = presented(folder, base)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Q, folder / "adapter_model.bin")
    assert same_bytes(presented(folder, base), expected)


def test_a_folder_with_weights_of_its_own_is_a_model(base, tmp_path):
    folder = adapter(tmp_path / "task", Q)
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    assert list(open_checkpoint(folder, base=open_checkpoint(base)).specs) == sorted(Q)


def test_a_plus_is_a_join_only_where_no_file_has_that_name(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "task+1", Q)
    assert split_base_and_adapter("base.safetensors+task+1") == ("base.safetensors", "task+1")
    assert split_base_and_adapter("task+1") is None
    assert split_base_and_adapter("base.safetensors+") is None
    with pytest.raises(MagMaxError, match=r"there is no such file"):
        open_checkpoint("base.safetensors+nowhere")
    save_tensors(base_model(), tmp_path / "base.safetensors+task+1")
    assert split_base_and_adapter("base.safetensors+task+1") is None


def test_an_interrupted_merge_is_known_by_the_files_of_both(base, tmp_path):
    folder = adapter(tmp_path / "task", Q)
    model = open_checkpoint(f"{base}+{folder}")
    assert model.files() == [base, folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    before = model.header_digests()
    assert len(before) == 3
    adapter(tmp_path / "task", Q, lora_alpha=8)
    after = open_checkpoint(f"{base}+{folder}").header_digests()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Two adapters and a full model."""
    tasks = [adapter(tmp_path / f"task{n}", linear("m.q", 20, 12, seed=n) | embedding()) for n in (1, 2)]
    full = {key: t + 1 if t.is_floating_point() else t for key, t in base_model().items()}
    return [*tasks, save_tensors(full, tmp_path / "full" / "model.safetensors")]


def test_adapters_and_models_merge_as_their_dense_equals(base, tmp_path, three):
    dense = [save_tensors(presented(t, base), tmp_path / f"dense{n}.safetensors") for n, t in enumerate(three[:2])]
    for rule in ("magmax", "average", "ties"):
        merge(rule, base, three, 0.5, tmp_path / "ours.safetensors")
        merge(rule, base, [*dense, three[2]], 0.5, tmp_path / "dense.safetensors")
        assert same_bytes(load_tensors(tmp_path / "ours.safetensors"), load_tensors(tmp_path / "dense.safetensors"))


def test_a_half_precision_base_is_tuned_in_float32(tmp_path):
    model = base_model(torch.bfloat16)
    base = save_tensors(model, tmp_path / "base.safetensors")
    folders = [adapter(tmp_path / f"task{n}", linear("m.q", 20, 12, seed=n)) for n in (1, 2)]
    merge("average", base, folders, 1.0, tmp_path / "out.safetensors")
    weight = model["m.q.weight"]
    vectors = [
        folded(weight, *reversed(linear("m.q", 20, 12, seed=n).values()), 7 / RANK) - weight.float() for n in (1, 2)
    ]
    expected = (weight.float() + (vectors[0] + vectors[1]) / 2).bfloat16()
    assert tensor_bytes(load_tensors(tmp_path / "out.safetensors")["m.q.weight"]) == tensor_bytes(expected)


def test_absorbed_one_by_one_they_are_the_batch(base, tmp_path, three):
    merge("magmax", base, three, 0.5, tmp_path / "batch.safetensors")
    running = Running(tmp_path / "state", "magmax", base)
    for model in three:
        running.absorb(model)
    running.result(0.5, tmp_path / "running.safetensors")
    assert [task.name for task in running.tasks] == ["task1", "task2", "full"]
    assert same_bytes(load_tensors(tmp_path / "running.safetensors"), load_tensors(tmp_path / "batch.safetensors"))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_running_merge_remembers_both_halves_of_its_base(base, tmp_path, three, monkeypatch, depth):
    monkeypatch.chdir(tmp_path)
    start = "+".join(["base.safetensors", "task1", "task2"][: depth + 1])
    Running(Path("deep") / "state", "magmax", start).absorb("full")
    monkeypatch.chdir(tmp_path / "deep")
    running = Running("state")
    assert running.status().base == "+".join(["../../base.safetensors", "../../task1", "../../task2"][: depth + 1])
    running.result(0.5, "running.safetensors")
    monkeypatch.chdir(tmp_path)
    merge("magmax", start, ["full"], 0.5, "batch.safetensors")
    assert same_bytes(load_tensors(Path("deep/running.safetensors")), load_tensors(Path("batch.safetensors")))
    Path("task1").rename("gone")
    with pytest.raises(MagMaxError, match=r"no longer at .*say where it is|is no such file"):
        Running("deep/state").result(0.5, "again.safetensors")


def test_a_running_merge_does_not_remember_what_it_cannot_open_again(base, tmp_path, three):
    start = open_checkpoint(f"{base}+{three[0]}")
    Running(tmp_path / "state", "magmax", start).absorb(three[2])
    with pytest.raises(MagMaxError, match="needs the base"):
        Running(tmp_path / "state").result(0.5, tmp_path / "out.safetensors")
    Running(tmp_path / "state", base=start).result(0.5, tmp_path / "out.safetensors")


def test_names_and_the_same_adapter_twice(base, tmp_path, three):
    with pytest.raises(MagMaxError, match="same file"):
        merge("magmax", base, [three[0], f"{base}+{three[0]}"], out=tmp_path / "out.safetensors")
    again = adapter(tmp_path / "copy", linear("m.q", 20, 12, seed=1) | embedding())
    with pytest.raises(MagMaxError, match="same tensors"):
        merge("magmax", base, [three[0], again], out=tmp_path / "out.safetensors")


def test_recipes_find_both_halves_beside_themselves(base, tmp_path, three, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(
        "base: base.safetensors\nmodels: [task1, base.safetensors+task2]\nscaling_factor: 0.5\nout: ours.safetensors\n"
    )
    plan = load_recipe(str(tmp_path / "recipe.yaml"))
    assert list(plan.names) == ["task1", "task2"]
    plan.job().run()
    merge("magmax", base, three[:2], 0.5, tmp_path / "plain.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    content = {"base": "base.safetensors", "models": ["base.safetensors+task1", "task2"]}
    assert list(build_request(content, "here", {}, "").names) == ["task1", "task2"]


def test_an_in_memory_base_and_an_adapter(tmp_path, three):
    model = base_model()
    result = merge("average", model, [three[0]], 1.0)
    tuned = presented(three[0], save_tensors(model, tmp_path / "again.safetensors"))["m.q.weight"]
    torch.testing.assert_close(result["m.q.weight"], tuned)


def test_on_the_command_line(base, tmp_path, three, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def magmax(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["magmax", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    magmax("merge", "task1", "base.safetensors+task2", "--base", "base.safetensors", "--out", "cli.safetensors")
    merge("magmax", base, three[:2], out=tmp_path / "plain.safetensors")
    assert Path("cli.safetensors").read_bytes() == Path("plain.safetensors").read_bytes()

    magmax("running", "absorb", "state", "task1", "--base", "base.safetensors")
    magmax("running", "absorb", "state", "task2")
    magmax("running", "result", "state", "--out", "running.safetensors")
    assert same_bytes(load_tensors(Path("running.safetensors")), load_tensors(Path("plain.safetensors")))

    assert "m.q.weight" in magmax("checkpoint", "diff", "base.safetensors", "task1")
    assert "m.q.weight" in magmax("checkpoint", "inspect", "base.safetensors+task1")
    Path("sweep.yaml").write_text("base: base.safetensors\nmodels: [task1, task2]\nout: swept.safetensors\n")
    magmax("search", "sweep", "sweep.yaml", "scaling_factor=0.5,1")
    merge("magmax", base, three[:2], 1.0, tmp_path / "plain.safetensors")
    assert same_bytes(load_tensors(Path("swept-1.safetensors")), load_tensors(Path("plain.safetensors")))


def folder_of_base(path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A base as transformers saves it, with a config and a tokenizer beside the weights."""
    path.mkdir()
    save_file(base_model(dtype), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text('{"model_type": "toy", "dtype": "bfloat16"}')
    (path / "tokenizer.json").write_text("{}")
    return path


def rounded(folder: Path, base: Path) -> Tensors:
    """The tensors of base+adapter in the base's types."""
    kinds = load_tensors(base / "model.safetensors")
    return {key: tensor.to(kinds[key].dtype) for key, tensor in presented(folder, base).items()}


def test_converted_it_has_the_config_tokenizer_and_types_of_its_base(tmp_path):
    base = folder_of_base(tmp_path / "base")
    folder = adapter(tmp_path / "task", Q | embedding() | {PREFIX + "m.norm.weight": torch.randn(12)})
    convert_job(f"{base}+{folder}", str(tmp_path / "out")).run()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    weights = tmp_path / "out" / "model.safetensors"
    assert same_bytes(load_tensors(weights), rounded(folder, base))
    assert SafetensorsFile(weights).metadata["format"] == "pt"
    convert_job(f"{base}+{folder}", str(tmp_path / "renamed"), renaming=Renaming(rename={"^m[.]": "n."})).run()
    renamed = load_tensors(tmp_path / "renamed" / "model.safetensors")
    assert {key.replace("n.", "m.", 1): t.dtype for key, t in renamed.items()} == {
        key: t.dtype for key, t in load_tensors(weights).items()
    }


def test_a_value_beyond_the_bases_type_is_refused(tmp_path):
    base = folder_of_base(tmp_path / "base", torch.float16)
    folder = adapter(tmp_path / "task", {key: tensor * 1000 for key, tensor in Q.items()})
    with pytest.raises(MagMaxError, match=r"m\.q\.weight: the values overflow F16"):
        convert_job(f"{base}+{folder}", str(tmp_path / "out")).run()


@pytest.mark.parametrize("kind", ["merge", "running", "mergekit's base", "mergekit's first model", "calibrate"])
def test_as_the_base_of_a_merge_it_gives_config_tokenizer_and_types(tmp_path, monkeypatch, kind):
    base = folder_of_base(tmp_path / "base")
    adapter(tmp_path / "task", Q)
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        moved = {k: t + number * (t.is_floating_point()) for k, t in base_model(torch.bfloat16).items()}
        save_tensors(moved, tmp_path / f"model{number}" / "model.safetensors")
    models = ["model1", "model2"]
    if kind == "merge":
        merge("average", "base+task", models, 1.0, "out")
    elif kind == "running":
        running = Running("state", "average", "base+task")
        for model in models:
            running.absorb(model)
        running.result(1.0, "out")
    elif kind == "calibrate":
        names = ["base", "model1", "base+task", "model2"]
        first, *others = [open_checkpoint(name) for name in names]
        calibrate_job(first, others[1], [others[0], others[2]], Path("out"), {"m.q.bias": np.full((), 0.5)}, {}).run()
    else:
        named = {"mergekit's base": ["model1", "model2"], "mergekit's first model": ["base+task", "model1"]}[kind]
        method = {"mergekit's base": "task_arithmetic\nbase_model: base+task"}.get(kind, "linear")
        entries = "".join(f"- model: {name}\n  parameters: {{weight: 0.5}}\n" for name in named)
        (tmp_path / "recipe.yaml").write_text(f"merge_method: {method}\nmodels:\n{entries}")
        load_recipe("recipe.yaml", flags={"out": "out"}).job().run()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    kinds = {key: tensor.dtype for key, tensor in load_tensors(base / "model.safetensors").items()}
    assert {k: t.dtype for k, t in load_tensors(tmp_path / "out" / "model.safetensors").items()} == kinds


def other_base(path: Path, tensors: Tensors) -> Path:
    return save_tensors(tensors, path / "other.safetensors")


def test_names_that_another_version_of_transformers_gives_are_named(tmp_path):
    base = other_base(tmp_path, {"language_model.model.layers.0.mlp.up.weight": torch.ones(20, 12)})
    folder = adapter(tmp_path / "task", linear("model.language_model.layers.0.mlp.up", 20, 12))
    words = r"it has language_model\.model\.layers.*from 'language_model\.model\.' to 'model\.language_model\.'"
    with pytest.raises(MagMaxError, match=words):
        open_checkpoint(f"{base}+{folder}")


@pytest.mark.parametrize(
    ("key", "spec", "module", "words"),
    [
        ("a.attn.in_proj_weight", torch.ones(36, 12), "a.attn", "MultiheadAttention"),
        ("a.experts.gate_up_proj", torch.ones(2, 8, 4), "a.experts.0.gate_proj", "experts as one tensor"),
        ("m.q.weight", torch.ones(120, 1, dtype=torch.uint8), "m.q", "stored as U8.*before it was quantised"),
    ],
)
def test_a_base_that_stores_a_weight_otherwise_is_named(tmp_path, key, spec, module, words):
    base = open_checkpoint({key: spec})
    with pytest.raises(MagMaxError, match=words):
        open_checkpoint(adapter(tmp_path / "task", linear(module, 36, 12)), base=base)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",
        "unet.down_blocks.0.attn1.to_q.lora_A.weight",
        "unet.mid_block.attn1.processor.to_q_lora.down.weight",
        "text_encoder.layers.0.q_proj.lora_linear_layer.up.weight",
        "lora_unet_mid_block.hada_w1_a",
    ],
)
def test_a_file_of_kohya_or_diffusers_is_named(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save_tensors({name: torch.ones(2, 4)}, tmp_path / "style.safetensors")
    for source in ("style.safetensors", "base.safetensors+style.safetensors"):
        with pytest.raises(MagMaxError, match=r"style\.safetensors: is a LoRA file without PEFT's"):
            open_checkpoint(source, base=open_checkpoint(base))
    open_checkpoint("style.safetensors", mergeable=False)


def test_the_weight_file_of_an_adapter_names_its_folder(base, tmp_path):
    folder = adapter(tmp_path / "task", Q)
    for source in (folder / "adapter_model.safetensors", f"{base}+{folder / 'adapter_model.safetensors'}"):
        with pytest.raises(MagMaxError, match=r"holds the weights of an adapter; give its folder, .*task"):
            open_checkpoint(source, base=open_checkpoint(base))
