"""What is copied beside a merged folder: the model's own small files, and nothing that merely lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from tests.models import magmax, reference_merge, save_tensors, small_model

from magmax import MagMaxError
from magmax.checkpoints import open_checkpoint
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.job import Job
from magmax.merging.merge_job import merge_job
from magmax.merging.model_files import find_outside_links, model_files
from magmax.merging.output_options import OutputOptions
from magmax.merging.provenance import Provenance, model_card
from magmax.rules import MagMax


def merge_of(base: Path, models: list[Path], out: Path, options: OutputOptions | None = None) -> Job:
    opened = [open_checkpoint(path) for path in (base, *models)]
    return merge_job(MagMax(), opened[0], opened[1:], out, options or OutputOptions())


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_files_at_the_top_and_in_the_known_folders_are_copied_and_no_others(tmp_path: Path) -> None:
    ours = {"config.json", "tokenizer.json", "merges.txt", "additional_chat_templates/tool_use.jinja"}
    modules = {"modules.json", "1_Pooling/config.json"}
    put(tmp_path, *ours, *modules)
    put(tmp_path, "model.safetensors", "model.safetensors.index.json", "provenance.json", "adapter_config.json")
    put(tmp_path, "lora/adapter_config.json", "checkpoint-500/trainer_state.json", "checkpoint-500/config.json")
    put(tmp_path, ".cache/x.json", ".hidden.json", "1_Pooling/deeper/config.json", "additional_chat_templates/.x.jinja")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]))
    assert model_files(tmp_path, None) == {name: tmp_path / name for name in ours | modules}


@pytest.mark.parametrize("content", ["", "[1]", '[{"path": "../outside"}]', '[{"path": ".."}]', "{}", '["path"]', "7"])
def test_modules_that_are_none_name_no_folder(content: str, tmp_path: Path) -> None:
    put(tmp_path, "outside/config.json", "base/config.json")
    (tmp_path / "base" / "modules.json").write_text(content)
    assert model_files(tmp_path / "base", None).keys() == {"config.json", "modules.json"}


# What the libraries load from the output


def test_a_model_of_diffusers_is_loaded_from_the_output_by_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    nets = [
        diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 4),
            norm_num_groups=2,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        for _ in range(3)
    ]  # fmt: skip
    folders = [tmp_path / f"net{n}" for n in range(3)]
    for net, folder in zip(nets, folders, strict=True):
        net.save_pretrained(folder)
        net.save_pretrained(folder, variant="non_ema")
    expected = reference_merge(magmax, nets[0].state_dict(), [net.state_dict() for net in nets[1:]], 0.5)
    for name, shard_bytes in {"whole": 1 << 40, "shards": 4_000}.items():
        job = merge_of(folders[0], folders[1:], tmp_path / name, OutputOptions(0.5, shard_bytes=shard_bytes))
        job.run()
        loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / name, low_cpu_mem_usage=False).state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
        assert "library_name: diffusers" in (tmp_path / name / "README.md").read_text()
    assert (tmp_path / "whole" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    merge_of(folders[0] / "diffusion_pytorch_model.safetensors", folders[1:], tmp_path / "file").run()
    assert diffusers.UNet2DModel.from_pretrained(tmp_path / "file", low_cpu_mem_usage=False)


@pytest.fixture
def sentence_models(tmp_path: Path) -> list[Path]:
    """A base and two models of sentence-transformers, with a dense layer in a folder of its own."""
    transformers = pytest.importorskip("transformers")
    sentences = pytest.importorskip("sentence_transformers")
    config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8)  # fmt: skip
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\nd\n")
    folders: list[Path] = []
    for number in range(3):
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
        transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
        word, dense = modules.Transformer(str(tmp_path / "bert")), modules.Dense(in_features=8, out_features=4)
        model = sentences.SentenceTransformer(modules=[word, modules.Pooling(8), dense], device="cpu")
        folders.append(tmp_path / f"sentence{number}")
        model.save_pretrained(str(folders[-1]))
    return folders


def test_all_modules_of_sentence_transformers_are_merged(sentence_models: list[Path], tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    states = [sentences.SentenceTransformer(str(folder), device="cpu").state_dict() for folder in sentence_models]
    assert any("linear.weight" in key for key in states[0])
    expected = reference_merge(magmax, states[0], states[1:], 0.5)
    for name, shard_bytes in {"whole": 1 << 40, "shards": 300}.items():
        options = OutputOptions(0.5, shard_bytes=shard_bytes)
        merge_of(sentence_models[0], sentence_models[1:], tmp_path / name, options).run()
        opened = open_checkpoint(tmp_path / name)
        assert opened.specs == open_checkpoint(sentence_models[0]).specs
    merge_of(sentence_models[0], sentence_models[1:], tmp_path / "again", OutputOptions(0.5)).run()
    loaded = sentences.SentenceTransformer(str(tmp_path / "again"), device="cpu").state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert "library_name: sentence-transformers" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(MagMaxError, match=r"has weights in 2_Dense/ too, which one file cannot hold; name a folder"):
        merge_of(sentence_models[0], sentence_models[1:], tmp_path / "out.safetensors")


def test_modules_beside_a_file_that_is_merged_are_copied_and_told(sentence_models: list[Path], tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    files = [folder / "model.safetensors" for folder in sentence_models]
    job = merge_of(files[0], files[1:], tmp_path / "out")
    assert any("copied as they are, not merged: 2_Dense/model.safetensors" in note for note in job.inputs[0].notes)
    job.run()
    dense = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / dense).read_bytes() == (sentence_models[0] / dense).read_bytes()
    assert sentences.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    (sentence_models[1] / dense).unlink()
    with pytest.raises(MagMaxError, match=r"has no tensor 2_Dense/linear"):
        merge_of(sentence_models[0], sentence_models[1:], tmp_path / "other")


# Code, licences, training files, metadata and the card


def test_code_of_auto_map_and_what_it_imports_is_copied_and_told(tmp_path: Path) -> None:
    base, model = tmp_path / "base", tmp_path / "model"
    put(base, "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "bpe.codes", "merges.txt", "dict.txt")
    put(base, "trainer_state.json", "all_results.json", "optimizer.pt", "training_args.bin", "random.png", "train.py")
    put(base, "helpers.py", "deeper.py", "custom_generate/generate.py", "tokenization_x.py")
    (base / "modeling_x.py").write_text("import torch\nfrom .helpers import f\nfrom transformers import x\n")
    (base / "helpers.py").write_text("from . import nothing\n    from .deeper import g\nimport .missing\n")
    auto_map = {"AutoModel": "modeling_x.XModel", "AutoConfig": "org/other--configuration_x.XConfig"}
    (base / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto_map}))
    (base / "generation_config.json").write_text(json.dumps({"auto_map": {"X": "gone.X"}}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for number, folder in enumerate((base, model)):
        save_tensors(small_model(number), folder / "model.safetensors")
    job = merge_of(base, [model], tmp_path / "out")
    said = "\n".join(job.inputs[0].notes)
    code = ["custom_generate/generate.py", "deeper.py", "helpers.py", "modeling_x.py", "tokenization_x.py"]
    assert f"code is copied, which runs only with trust_remote_code: {', '.join(code)}" in said
    assert "code that its auto_map names is not there: gone.py" in said
    assert "belong to its training: all_results.json, optimizer.pt, trainer_state.json, training_args.bin" in said
    job.run()
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names - {"model.safetensors", "README.md", "provenance.json", ".magmax-contents"} == {
        *code, "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "bpe.codes", "merges.txt", "dict.txt", "config.json",
        "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip


def test_hashes_of_the_bases_weights_are_not_carried_over(tmp_path: Path) -> None:
    stale = {
        "modelspec.hash_sha256": "0x1",
        "sshs_model_hash": "2",
        "sshs_legacy_hash": "3",
        "checksum": "4",
        "md5": "5",
    }
    kept = {"format": "pt", "modelspec.title": "base", "ss_learning_rate": "0.1"}
    tensors = {"w": torch.ones(3), "hash_table.weight": torch.ones(2)}
    safetensors.torch.save_file(tensors, tmp_path / "base.safetensors", {**stale, **kept})
    save_tensors({key: tensor + 1 for key, tensor in tensors.items()}, tmp_path / "one.safetensors")
    merge_of(tmp_path / "base.safetensors", [tmp_path / "one.safetensors"], tmp_path / "out.safetensors").run()
    metadata = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert {key: value for key, value in metadata.items() if key != "magmax"} == kept


def test_the_card_names_the_models_of_the_hub_and_the_library(tmp_path: Path) -> None:
    origins = [
        "hf://org/base@" + "a" * 40,
        "",
        "hf://org/base@" + "a" * 40 + "+hf://org/lora@" + "b" * 40,
        "hf://gpt2@c/x",
    ]
    provenance = Provenance({"rule": "magmax"}, ["base", "mine", "a", "b"], ["0"] * 4, origins)
    head = yaml.safe_load(model_card(provenance, ["F32"], [], {}, "transformers").split("---")[1])
    assert head == {
        "base_model": ["org/base", "org/lora", "gpt2"], "base_model_relation": "merge", "library_name": "transformers",
        "tags": ["merge", "magmax"],
    }  # fmt: skip
    provenance = Provenance({"rule": "magmax"}, ["base", "mine"], ["0"] * 2, ["", ""])
    assert yaml.safe_load(model_card(provenance, ["F32"], [], {}).split("---")[1]) == {"tags": ["merge", "magmax"]}


def test_a_name_of_weights_in_the_config_is_not_that_of_the_output(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "model")):
        save_tensors(small_model(number), tmp_path / name / "mine.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "x", "transformers_weights": "mine.safetensors"}')
    merge_of(tmp_path / "base", [tmp_path / "model"], tmp_path / "out").run()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "x"}
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_link_that_leads_out_of_the_folder_is_not_copied_and_that_is_noted(tmp_path: Path) -> None:
    """Whether it leads to a file, over another link, or to a folder; a link within the folder is the model's own."""
    base = tmp_path / "base"
    put(tmp_path, "secret.json", "base/config.json", "base/vocab-2.json", "base/tokenizer/vocab.json", "aside/x.json")
    save_tensors(small_model(0), base / "model.safetensors")
    save_tensors(small_model(1), tmp_path / "tuned.safetensors")
    (base / "vocab.json").symlink_to("vocab-2.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (base / "merges.txt").symlink_to("../secret.json")
    (base / "added_tokens.json").symlink_to("tokenizer.json")
    (base / "tokenizer" / "x.json").symlink_to(tmp_path / "secret.json")
    (base / "scheduler").symlink_to(tmp_path / "aside")
    notes: list[str] = []
    out = tmp_path / "out"
    merge_of(base, [tmp_path / "tuned.safetensors"], out).run(ExecutionOptions(note=notes.append))
    outside = ["added_tokens.json", "merges.txt", "scheduler", "tokenizer.json", "tokenizer/x.json"]
    assert notes == [f"{base}: {name} leads out of it, so it is not copied" for name in outside]
    copied = {str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".json", ".txt")}
    assert copied == {"config.json", "vocab-2.json", "vocab.json", "tokenizer/vocab.json", "provenance.json"}
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize("seen_through", ["itself", "a link"])
def test_a_folder_in_the_hubs_cache_links_to_its_own_blobs_alone(seen_through: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    put(tmp_path / "hub", "models--a--b/blobs/1", "models--a--b/blobs/2", "models--secret--c/blobs/3")
    put(tmp_path, "elsewhere/3", "x/snapshots/0123/config.json", "x/blobs/4")
    (snapshot / "tokenizer").mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "tokenizer" / "vocab.json").symlink_to("../../../blobs/2")
    (snapshot / "other.json").symlink_to("../../../models--secret--c/blobs/3")
    (snapshot / "secret.json").symlink_to(tmp_path / "elsewhere" / "3")
    (tmp_path / "link").symlink_to(snapshot)
    folder = snapshot if seen_through == "itself" else tmp_path / "link"
    assert model_files(folder, None).keys() == {"config.json", "tokenizer/vocab.json"}
    assert find_outside_links(folder) == ["other.json", "secret.json"]
    (tmp_path / "x" / "snapshots" / "0123" / "merges.txt").symlink_to("../../blobs/4")  # no cache of the hub
    assert model_files(tmp_path / "x" / "snapshots" / "0123", None).keys() == {"config.json"}


@pytest.mark.parametrize("module", ["2\nDense", "2_Dense/", "provenance.json", ".magmax-contents"])
def test_an_output_is_replaced_whatever_the_files_and_modules_of_its_base_are_called(
    module: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    (base / module).mkdir(parents=True)
    save_tensors({"a": torch.ones(2)}, base / "model.safetensors")
    save_tensors({"b": torch.ones(2)}, base / module / "model.safetensors")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": module}]))
    (base / "vocab\nof all.txt").write_text("a")
    model = tmp_path / "model.safetensors"
    save_tensors({"a": torch.zeros(2)}, model)
    out, options = tmp_path / "out", OutputOptions(mismatch="base")
    for _ in range(2):
        merge_job(MagMax(), open_checkpoint(base), [open_checkpoint(model)], out, options).run()
        assert (tmp_path / "out" / "vocab\nof all.txt").read_text() == "a"
        assert (tmp_path / "out" / module / "model.safetensors").is_file() == (module in ("2\nDense", "2_Dense/"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model.safetensors", "out"]
