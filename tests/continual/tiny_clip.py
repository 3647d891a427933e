"""A CLIP of 2 small layers with random weights, in the hub's layout: config, weights, tokenizer, preprocessor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

SIZE = 32


def save_tiny_clip(folder: Path, seed: int = 0, **preprocessor: object) -> Path:
    """Writes the model; its tokenizer knows letters and the end of a word."""
    tower = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.-"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 20, "bos_token_id": start, "eos_token_id": end}
    config = CLIPConfig(
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
        text_config={**tower, **text, "pad_token_id": end},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    side = {"height": SIZE, "width": SIZE}
    view = {"size": {"shortest_edge": SIZE}, "crop_size": side, "resample": 3, "do_center_crop": True}
    view |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}
    contents = {
        "preprocessor_config.json": view | {"image_processor_type": "CLIPImageProcessor"} | preprocessor,
        "vocab.json": {token: i for i, token in enumerate(vocabulary)},
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 20},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder
