"""Which files of a folder are the model, as the libraries that wrote it decide; and folders that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.models import Tensors, load_tensors, magmax, reference_merge, same_bytes

import magmax as package
from magmax import MagMaxError
from magmax.checkpoints import open_adapter, open_checkpoint
from magmax.checkpoints.folder import choose_weights
from magmax.cli import app
from magmax.merging.convert import convert_job


def run(*words: object) -> None:
    app([str(word) for word in words], exit_on_error=False, result_action="return_value")


def model(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=draw) for name in ("a.weight", "b.weight", "c.weight")}


def save(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def write_config(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "small", **settings}))
    return folder


def save_sharded(tensors: Tensors, folder: Path, stem: str = "model", suffix: str = ".safetensors") -> Path:
    names = {key: f"{stem}-{n + 1:05}-of-{len(tensors):05}{suffix}" for n, key in enumerate(tensors)}
    for key, name in names.items():
        save({key: tensors[key]}, folder / name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def content(source: object) -> Tensors:
    """The tensors of a checkpoint, by our reader."""
    opened = open_checkpoint(source)
    return {
        key: torch.from_numpy(opened.read(key, 0, spec.num_units)).reshape(spec.shape)
        for key, spec in opened.specs.items()
    }


# Quantised checkpoints


CODES = {
    "block-scaled FP8": {
        "l.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(1, 1),
    },
    "FP8 of ComfyUI": {"l.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "l.scale_weight": torch.ones(())},
    "FP8 of DeepSeek's own code": {"l.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "l.scale": torch.ones(1)},
    "bitsandbytes 4 bit": {
        "l.weight": torch.zeros(8, 1, dtype=torch.uint8), "l.weight.absmax": torch.ones(1),
        "l.weight.quant_map": torch.ones(16),
        "l.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    },
    "bitsandbytes 8 bit": {"l.weight": torch.zeros(4, 4, dtype=torch.int8), "l.SCB": torch.ones(4)},
    "GPTQ": {
        "l.qweight": torch.zeros(2, 4, dtype=torch.int32), "l.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "l.scales": torch.ones(1, 4, dtype=torch.float16), "l.g_idx": torch.zeros(16, dtype=torch.int32),
    },
    "AWQ": {"l.qweight": torch.zeros(2, 4, dtype=torch.int32), "l.scales": torch.ones(1, 4, dtype=torch.float16)},
    "compressed-tensors": {
        "l.weight_packed": torch.zeros(4, 1, dtype=torch.int32), "l.weight_scale": torch.ones(4, 1),
        "l.weight_shape": torch.tensor([4, 8]),
    },
    "int8 of compressed-tensors": {"l.weight": torch.zeros(4, 4, dtype=torch.int8), "l.weight_scale": torch.ones(4, 1)},
    "MXFP4": {
        "e.gate_up_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
        "e.gate_up_proj_scales": torch.zeros(2, 4, 1, dtype=torch.uint8),
    },
    "NVFP4": {
        "l.weight": torch.zeros(4, 2, dtype=torch.uint8), "l.weight_scale": torch.ones(4).to(torch.float8_e4m3fn),
    },
    "quanto": {"l.weight._data": torch.zeros(4, 4, dtype=torch.int8), "l.weight._scale": torch.ones(4, 1)},
    "AQLM": {"l.codes": torch.zeros(4, 4, 1, dtype=torch.int8), "l.codebooks": torch.ones(1, 256, 1, 8)},
    "HQQ": {"l.W_q": torch.zeros(4, 4, dtype=torch.uint8), "l.scale": torch.ones(4, 1), "l.zero": torch.ones(4, 1)},
    "EETQ": {"l.weight": torch.zeros(4, 4, dtype=torch.int8), "l.weight_scales": torch.ones(4)},
    "MLX": {"l.weight": torch.zeros(4, 1, dtype=torch.uint32), "l.scales": torch.ones(4, 1)},
    "EXL2": {"l.q_weight": torch.zeros(4, 4, dtype=torch.int32), "l.q_scale": torch.zeros(4, 1, dtype=torch.int32)},
    "EXL3": {"l.trellis": torch.zeros(4, 4, dtype=torch.int16), "l.suh": torch.ones(4), "l.svh": torch.ones(4)},
    "QuIP#": {"l.Qidxs": torch.zeros(4, 4, dtype=torch.int16), "l.SU": torch.ones(4), "l.Wscale": torch.ones(())},
    "int8 with scales": {"l.weight_quant": torch.zeros(4, 4, dtype=torch.int8), "l.weight_scale": torch.ones(4)},
}  # fmt: skip
"""A quantised linear layer as each format stores it."""


NAMED = {
    "block-scaled FP8": "fp8 .*FineGrainedFP8Config", "bitsandbytes 4 bit": "bitsandbytes .*model.dequantize",
    "bitsandbytes 8 bit": "bitsandbytes .*model.dequantize", "GPTQ": "GPTQ or AWQ", "AWQ": "GPTQ or AWQ", "HQQ": "HQQ",
    "compressed-tensors": "compressed-tensors .*CompressedTensorsConfig", "MXFP4": "mxfp4 .*Mxfp4Config",
    "quanto": "quanto", "AQLM": "AQLM", "EXL2": "EXL2 or EXL3", "EXL3": "EXL2 or EXL3", "QuIP#": "QuIP#",
}  # fmt: skip
"""What is said of the formats that their tensors tell."""


@pytest.mark.parametrize("kind", CODES)
def test_codes_with_what_decodes_them_are_refused_as_base_and_as_model(kind: str, tmp_path: Path) -> None:
    layers = {key: tensor.clone() for key, tensor in CODES[kind].items()}
    paths = [save({**layers, "norm.weight": torch.randn(4)}, tmp_path / f"{n}.safetensors") for n in range(2)]
    said = f"with {NAMED[kind]}" if kind in NAMED else r"\(.*decoded by .*give the model that it was quantised from"
    for mismatch in ("strict", "base", "intersect"):
        with pytest.raises(MagMaxError, match=f"0.safetensors: is quantised {said}"):
            run("merge", "--base", paths[0], paths[1], "--mismatch", mismatch, "--out", tmp_path / "out.safetensors")
    plain = save({"norm.weight": torch.randn(4)}, tmp_path / "plain.safetensors")
    with pytest.raises(MagMaxError, match=r"1\.safetensors: is quantised"):
        run("merge", "--base", plain, paths[1], "--mismatch", "base", "--out", tmp_path / "out.safetensors")
    with pytest.raises(MagMaxError, match="base: is quantised"):
        package.merge("magmax", layers, [layers])
    assert not (tmp_path / "out.safetensors").exists()


def test_integers_and_scales_that_do_not_belong_together_are_merged() -> None:
    """Buffers of Swin, BERT, CLIP, BatchNorm and of norms with a parameter `scale`; float8 weights alone."""
    tensors = {
        "attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
        "attn.logit_scale": torch.randn(3, 1, 1),
        "embeddings.position_ids": torch.arange(9), "logit_scale": torch.randn(()),
        "layer_scale.lambda1": torch.randn(4),
        "norm.weight": torch.randn(4), "norm.num_batches_tracked": torch.tensor(3), "norm.scale": torch.randn(4),
        "index.table": torch.zeros(3, dtype=torch.int32), "index.scale": torch.randn(3),
        "mask": torch.ones(3, dtype=torch.bool),
        "quantised": torch.zeros(4).to(torch.float8_e4m3fn), "quantised_by": torch.randn(3),
        "vq.codebook": torch.randn(8, 4),
        "seq.position_scale": torch.randn(2), "seq.position": torch.arange(3), "k_proj.k_scale": torch.randn(()),
    }  # fmt: skip
    merged = package.merge(
        "magmax", tensors, [{k: t + 1 if t.is_floating_point() and t.itemsize > 1 else t for k, t in tensors.items()}]
    )
    assert merged.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantised with fp8 .*FineGrainedFP8Config\(dequantize=True\)",
        ),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantised with mxfp4 .*Mxfp4Config\(dequantize=True\)"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            r"with bitsandbytes \(quantization_config in its config.json\).*model.dequantize",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"quantised with awq \("),
        (
            {"compression_config": {"format": "int-quantized"}},
            r"with int-quantized \(compression_config in its config.json",
        ),
        ({"quantization": {"bits": 4, "group_size": 64}}, r"quantization in its config.json"),
    ],
)
def test_config_decides_also_where_tensors_do_not_tell(settings: dict, said: str, tmp_path: Path) -> None:
    save(model(0), write_config(tmp_path / "model", **settings) / "model.safetensors")
    for source in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        with pytest.raises(MagMaxError, match=said):
            open_checkpoint(source)
        with pytest.raises(MagMaxError, match="are not quantised any more, take that out of its config"):
            open_checkpoint(source)


@pytest.mark.parametrize(
    "value", [None, {}, {"load_in_8bit": False, "load_in_4bit": False, "quant_method": "bitsandbytes"}]
)
def test_empty_settings_of_quantisation_are_none(value: object, tmp_path: Path) -> None:
    save(model(0), write_config(tmp_path / "model", quantization_config=value) / "model.safetensors")
    assert open_checkpoint(tmp_path / "model").specs


def test_every_verb_refuses_what_is_quantised_and_inspect_shows_it(tmp_path: Path, capsys) -> None:
    bad = save(CODES["MXFP4"], tmp_path / "bad.safetensors")
    base = save(model(0), tmp_path / "base.safetensors")
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(f"merge_method: linear\nmodels:\n- {{model: {base}, parameters: {{weight: 1}}}}\n"
                      f"- {{model: {bad}, parameters: {{weight: 1}}}}\ndtype: float32\n")  # fmt: skip
    out = tmp_path / "out"
    for words in (
        ["merge", "--base", base, bad, "--out", out],
        ["merge", recipe, "--out", out],
        ["checkpoint", "convert", bad, "--out", out],
        ["checkpoint", "diff", base, bad],
        ["running", "absorb", out, bad, "--base", base],
        ["archive", "create", "--base", base, bad, "--out", out],
        ["search", "sweep", recipe, "scaling_factor=0.5", "--out", out],
    ):
        with pytest.raises(MagMaxError, match="is quantised"):
            run(*words)
    torch.save({"model": CODES["MXFP4"]}, tmp_path / "bad.pt")
    with pytest.raises(MagMaxError, match="is quantised"):
        convert_job(str(tmp_path / "bad.pt"), str(out))
    assert not out.exists()
    run("checkpoint", "inspect", bad)
    assert "gate_up_proj_blocks" in capsys.readouterr().out


def test_archives_and_running_merges_of_layers_with_a_scale_are_no_quantised_models(tmp_path: Path) -> None:
    """They hold codes under the names of the tensors, but are read as what they are."""
    layers = [
        {"l.weight": torch.randn(4, 3), "l.scale": torch.randn(4), "l.weight_scale": torch.randn(4)} for _ in range(3)
    ]
    base, *models = [save(tensors, tmp_path / f"{n}.safetensors") for n, tensors in enumerate(layers)]
    run("archive", "create", "--base", base, *models, "--out", tmp_path / "archive")
    running = package.Running(tmp_path / "state", "magmax", base, winners=True)
    for path in models:
        running.absorb(path)
    running.result(0.5, out=tmp_path / "result.safetensors")
    merged = load_tensors(tmp_path / "result.safetensors")
    assert same_bytes(merged, reference_merge(magmax, layers[0], layers[1:], 0.5))
    assert sum(package.Running(tmp_path / "state").status().shares) == pytest.approx(1)


# Shards and indexes


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00004.safetensors", "pytorch_model-00001-of-00002.bin", "foo-00002-of-00003.safetensors",
     "diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"],
)  # fmt: skip
def test_shards_without_an_index_are_refused_as_a_folder_and_as_a_file(name: str, tmp_path: Path) -> None:
    path = save(model(0), write_config(tmp_path / "model") / name)
    with pytest.raises(MagMaxError, match=r"holds shards and no index \(.*whole folder again"):
        open_checkpoint(tmp_path / "model")
    with pytest.raises(MagMaxError, match=r"is shard \d of \d of a model; name the folder"):
        open_checkpoint(path)


def test_a_shard_that_is_the_only_one_is_the_model(tmp_path: Path) -> None:
    path = save(model(0), tmp_path / "model" / "model-00001-of-00001.safetensors")
    assert same_bytes(content(tmp_path / "model"), model(0))
    assert same_bytes(content(path), model(0))


def test_the_index_decides_what_is_in_a_shard_as_in_transformers(tmp_path: Path) -> None:
    folder = save_sharded(model(0), tmp_path / "model")
    first, second, _ = sorted(folder.glob("*.safetensors"))
    save({**load_tensors(first), "extra": torch.ones(2), "b.weight": torch.zeros(4, 3)}, first)
    opened = open_checkpoint(folder)
    assert same_bytes(content(folder), model(0))
    assert opened.notes == [
        f"{first}: left out, since the index does not name them there: b.weight, extra"
    ] or opened.notes == [f"{first}: left out, since the index does not name them there: extra, b.weight"]
    save({"other": torch.ones(2)}, second)
    with pytest.raises(MagMaxError, match=r"places b\.weight in .*-00002-of-00003.safetensors, which does not hold it"):
        open_checkpoint(folder)


def test_an_index_can_be_named_itself(tmp_path: Path) -> None:
    folder = save_sharded(model(0), write_config(tmp_path / "model"))
    save(model(1), folder / "model.safetensors")
    assert same_bytes(content(folder / "model.safetensors.index.json"), model(0))


CHOICES = {
    "two indexes of Mistral": (
        ["consolidated.safetensors.index.json", "model.safetensors.index.json"], {}, "model.safetensors.index.json",
    ),
    "a stale index": (["model.safetensors", "model.safetensors.index.json"], {}, "model.safetensors"),
    "weights of Mistral's code": (["consolidated.safetensors", "model.safetensors"], {}, "model.safetensors"),
    "open_clip with transformers": (
        ["model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin"], {},
        "model.safetensors",
    ),
    "open_clip": (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], {}, "open_clip_model.safetensors"),
    "diffusers": (
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors",
         "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"], {"_class_name": "UNet2DModel"},
        "diffusion_pytorch_model.safetensors",
    ),
    "an index of diffusers beside a whole file": (
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"],
        {"_class_name": "UNet2DModel"}, "diffusion_pytorch_model.safetensors.index.json",
    ),
    "a model of diffusers beside one of transformers": (
        ["diffusion_pytorch_model.safetensors", "model.safetensors"], {"_class_name": "X"},
        "diffusion_pytorch_model.safetensors",
    ),
    "one variant": (["model.fp16.safetensors"], {}, "model.fp16.safetensors"),
    "a checkpoint of Trainer": (
        ["optimizer.pt", "pytorch_model.bin", "rng_state.pth", "rng_state_0.pth", "scheduler.pt", "training_args.bin"],
        {}, "pytorch_model.bin",
    ),
    "a checkpoint of accelerate": (
        ["optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl", "weights.safetensors"], {},
        "weights.safetensors",
    ),
    "a name in the config": (
        ["a.safetensors", "model.safetensors"], {"transformers_weights": "a.safetensors"}, "a.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("names", "config", "chosen"), CHOICES.values(), ids=CHOICES.keys())
def test_libraries_own_names_come_first_and_the_rest_is_told(names: list[str], config: dict, chosen: str) -> None:
    file = json.dumps(config).encode()
    found, notes = choose_weights(
        [*names, "config.json"], lambda name: file if name == "config.json" else None, "m", "m/"
    )
    others = [
        n for n in names if n != chosen and not n.startswith(("optim", "rng", "sched", "sampl", "random", "train"))
    ]
    assert found == chosen
    assert all(name in "".join(notes) for name in others)
    assert bool(notes) == bool(others)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["model.fp16.safetensors", "model.non_ema.safetensors"],
            r"2 weight files and no index \(.*; name one: m/model",
        ),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "several indexes"),
        (["v1-5-pruned.safetensors", "v1-5-pruned-emaonly.safetensors"], "2 weight files and no index"),
        (["model-00001-of-00002.safetensors", "pytorch_model.bin"], "shards and no index"),
        (["optimizer.pt", "training_args.bin"], "no weights"),
    ],
)
def test_no_choice_is_guessed(names: list[str], said: str) -> None:
    with pytest.raises(MagMaxError, match=said):
        choose_weights(names, lambda name: None, "m", "m/")


def test_what_transformers_loads_from_a_folder_of_many_files_is_what_is_merged(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8)  # fmt: skip
    models = [transformers.BertModel(config) for _ in range(3)]
    folders = [tmp_path / name for name in ("base", "one")]
    for net, folder in zip(models, folders, strict=False):
        net.save_pretrained(folder)
        save({"nothing": torch.ones(3)}, folder / "consolidated.safetensors")
        save(models[2].state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "missing.safetensors"}}')
        torch.save({}, folder / "optimizer.pt")
    package.merge("magmax", folders[0], [folders[1]], 1.0, tmp_path / "out")
    loaded = transformers.BertModel.from_pretrained(tmp_path / "out").state_dict()
    taken = [transformers.BertModel.from_pretrained(folder).state_dict() for folder in folders]
    expected = reference_merge(magmax, taken[0], taken[1:], 1.0)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    run(
        "merge",
        "--base",
        folders[0] / "model.safetensors",
        folders[1],
        "--scaling-factor",
        1,
        "--out",
        tmp_path / "file",
    )
    assert (tmp_path / "file" / "config.json").is_file()
    assert (tmp_path / "file" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_a_file_takes_only_the_companions_of_a_models_folder(tmp_path: Path) -> None:
    path = save(model(0), tmp_path / "downloads" / "base.safetensors")
    (path.parent / "config.json").write_text('{"editor": "vi"}')
    (path.parent / "notes.txt").write_text("mine")
    assert open_checkpoint(path).small_files_folder() is None
    write_config(path.parent)
    assert open_checkpoint(path).small_files_folder() == path.parent


# Adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    save({key: tensor.clone() for key, tensor in net.state_dict().items()}, tmp_path / "base.safetensors")
    tuned = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["optimizer.bin", "scheduler.bin", "training_args.bin", "rng_state_0.pth", "optimizer.pt"], ""),
        (["non_lora_trainables.bin"], "non_lora_trainables.bin"),
        (["value_head.safetensors", "value_head.bin"], "value_head.bin, value_head.safetensors"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_an_adapter_is_one_beside_other_files(files: list[str], told: str, adapter: Path, tmp_path: Path) -> None:
    expected = content(f"{tmp_path / 'base.safetensors'}+{adapter}")
    for name in files:
        save({"v_head.summary.weight": torch.ones(2, 2)}, adapter / name)
    for source in (f"{tmp_path / 'base.safetensors'}+{adapter}", adapter):
        opened = open_checkpoint(source, base=open_checkpoint(tmp_path / "base.safetensors"))
        assert same_bytes(content(opened), expected)
        assert told in "".join(opened.notes)
    assert open_adapter(adapter).factor_pairs


def test_an_adapter_in_a_folder_called_default_is_found(adapter: Path, tmp_path: Path) -> None:
    expected = content(f"{tmp_path / 'base.safetensors'}+{adapter}")
    adapter.rename(tmp_path / "moved")
    adapter.mkdir()
    (tmp_path / "moved").rename(adapter / "default")
    assert same_bytes(content(f"{tmp_path / 'base.safetensors'}+{adapter}"), expected)
    assert same_bytes(content(open_checkpoint(adapter, base=open_checkpoint(tmp_path / "base.safetensors"))), expected)
    shutil.copytree(adapter / "default", tmp_path / "both")
    shutil.copytree(adapter, tmp_path / "both", dirs_exist_ok=True)
    assert same_bytes(content(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'both'}"), expected)


def test_an_adapter_beside_a_whole_model_is_refused_as_ambiguous(adapter: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "base.safetensors", adapter / "model.safetensors")
    with pytest.raises(MagMaxError, match=r"holds an adapter \(adapter_model.safetensors\) and a whole model"):
        open_checkpoint(adapter)


# Folders of several models


def test_a_pipeline_of_diffusers_is_refused_and_its_models_are_named(tmp_path: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                 "text_encoder/model.safetensors", "v1-5-pruned.safetensors"):  # fmt: skip
        save(model(0), tmp_path / "pipeline" / name)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(MagMaxError, match=r"pipeline of diffusers.*\(text_encoder, unet, vae\); merge each by itself"):
        open_checkpoint(tmp_path / "pipeline")
    assert open_checkpoint(tmp_path / "pipeline" / "unet").specs
    (tmp_path / "pipeline" / "model_index.json").unlink()
    (tmp_path / "pipeline" / "v1-5-pruned.safetensors").unlink()
    with pytest.raises(MagMaxError, match=r"holds no weights, but the folders in it do \(text_encoder, unet, vae\)"):
        open_checkpoint(tmp_path / "pipeline")
