"""Adapters written by PEFT itself, against the model that its own merge_and_unload gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from magmax import MagMaxError, merge, merge_adapters
from magmax.checkpoints import open_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tied_llama(tied: bool = True) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Conv2d(4, 6, (3, 5))
        self.point = torch.nn.Conv2d(6, 8, 1)
        self.line = torch.nn.Conv1d(8, 8, 3)


CASES = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "all, rslora": (llama, {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "lm_head"],
            "rank_pattern": {"0.self_attn.q_proj": 5, "^lm_head": 2},
            "alpha_pattern": {r".*layers\.1.*k_proj": 3},
        },
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied embedding": (gpt2, {"target_modules": ["wte", "c_attn"]}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "transposed, found out": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "transposed, and a last module that is not": (gpt2, {"target_modules": ["attn.c_proj", "lm_head"]}),
    "a new head": (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "bias": "all"}),
    "biases": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "convolutions": (Convolutions, {"target_modules": ["wide", "point", "line"]}),
    "a tied head": (tied_llama, {"target_modules": ["lm_head", "q_proj"]}),
    "both of a tied pair, kept tied": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "an embedding that is not tied": (
        lambda: tied_llama(False),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
}


def save_base(model: Any, path: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(path)
        return path
    save_file(model.state_dict(), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("name", CASES)
def test_one_adapter_averaged_alone_is_merge_and_unload(tmp_path, name):
    make, settings = CASES[name]
    torch.manual_seed(0)
    model = make()
    base = save_base(model, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=9, init_lora_weights=True, **settings))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(tmp_path / "adapter")
        expected = tuned.merge_and_unload().state_dict()
    out = merge("average", base, [tmp_path / "adapter"], 1.0, tmp_path / "out")
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == open_checkpoint(base).specs.keys()
    moved = 0
    start = open_checkpoint(base)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)
        moved += not torch.equal(tensor.reshape(-1), torch.from_numpy(start.read(key, 0, start.spec(key).num_units)))
    assert moved >= 2


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_a_module_that_peft_parts_from_a_tied_one_is_refused(tmp_path, saved):
    model = tied_llama()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
        tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MagMaxError, match=r"saves .*weight in full, but .*base ties it to .*not tied"):
        merge("average", tmp_path / "base", [tmp_path / "adapter"], 1.0, tmp_path / "out")


def test_a_merged_folder_loads_and_answers_as_peft_does(tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, settings)
    tuned.save_pretrained(tmp_path / "adapter")
    merge("average", tmp_path / "base", [tmp_path / "adapter"], 1.0, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(words).logits, tuned.eval()(words).logits, rtol=1e-4, atol=1e-4)


TARGETS = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["down_proj", "v_proj"], "r": 7}),
    "rslora and patterns": (
        llama,
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "alpha_pattern": {r".*layers\.1.*": 3}},
        {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\.up_proj)", "rank_pattern": {"q_proj": 6}},
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["embed_tokens"], "r": 2}),
    "transposed": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "wte"]},
    ),
    "convolutions": (Convolutions, {"target_modules": ["wide", "point"]}, {"target_modules": ["point", "line"]}),
    "one layer": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]},
    ),
}


@pytest.mark.parametrize("rule", ["task_arithmetic", "magmax"])
@pytest.mark.parametrize("name", TARGETS)
def test_peft_loads_a_merged_adapter_and_its_weights_are_the_bases_plus_the_merged_updates(tmp_path, name, rule):
    make, *settings = TARGETS[name]
    torch.manual_seed(0)
    model = make()
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, options in enumerate(settings):
            copy = make()
            copy.load_state_dict(start)
            config = peft.LoraConfig(**{"r": 4, "lora_alpha": 9 - number, "init_lora_weights": True, **options})
            wrapped = peft.get_peft_model(copy, config)
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.3)
            wrapped.save_pretrained(tmp_path / f"adapter{number}")
            tuned.append(wrapped.merge_and_unload().state_dict())
        fits = merge_adapters(rule, [tmp_path / "adapter0", tmp_path / "adapter1"], 64, tmp_path / "merged", 0.8)
        assert max(fit.relative for fit in fits.values()) < 1e-6
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "merged")
        ranks = {key: p.shape for key, p in loaded.named_parameters() if "lora_" in key}
        stored = load_file(tmp_path / "merged" / "adapter_model.safetensors")
        assert {key.replace(".default", ""): shape for key, shape in ranks.items()} == {
            key: tensor.shape for key, tensor in stored.items() if "lora_" in key
        }
        merged = loaded.merge_and_unload().state_dict()
    for key, tensor in merged.items():
        if tensor.is_floating_point():
            one, two = (t[key] - start[key] for t in tuned)
            vector = one + two if rule == "task_arithmetic" else torch.where(two.abs() >= one.abs(), two, one)
            torch.testing.assert_close(tensor, start[key] + 0.8 * vector, rtol=1e-4, atol=1e-4)
