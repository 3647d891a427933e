from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

MODEL_NAMES = ("base", "poet", "coder", "doctor")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder of small Llamas as transformers saves them, with an adapter and tokenizers of one vocabulary."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    start = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    tokenizer = {"model": {"vocab": {f"word{n}": n for n in range(47)}}, "added_tokens": [{"content": "<s>", "id": 47}]}
    for seed, name in enumerate(MODEL_NAMES):
        draw = torch.Generator().manual_seed(seed)
        noise = {k: 0.02 * torch.randn(v.shape, generator=draw) for k, v in start.items()}
        base.load_state_dict({k: v + (seed > 0) * noise[k] for k, v in start.items()})
        base.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    base.load_state_dict(start)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(folder / "speaker")
    return folder
