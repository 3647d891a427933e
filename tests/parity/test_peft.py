"""Adapters written by PEFT itself, against the model that its own merge_and_unload gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from magmax import merge
from magmax.checkpoints import open_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
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
    "a new head": (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "bias": "all"}),
    "biases": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "convolutions": (Convolutions, {"target_modules": ["wide", "point", "line"]}),
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
        moved += not torch.equal(tensor.reshape(-1), torch.from_numpy(start.read(key, 0, start.spec(key).units)))
    assert moved >= 2


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
