"""open_clip's models, by a stand-in for the library's interface: the library needs torchvision."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from magmax.continual.models.open_clip import open_clip  # noqa: E402
from magmax.continual.registry import code_from  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


class Tower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(3 * 4 * 4, 5)
        self.preprocess_cfg = {"size": (4, 4), "mean": MEAN, "std": STD}

    def forward(self, pixels: Any) -> Any:
        return self.proj(pixels.flatten(1))


class Whole(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, self.words = Tower(), torch.nn.Embedding(30, 5)
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def encode_text(self, tokens: Any) -> Any:
        return self.words(tokens).sum(1)


def library(whole: Whole, asked: list[Any]) -> SimpleNamespace:
    def create_model(name: str, pretrained: str | None) -> Whole:
        asked.append((name, pretrained))
        if name == "none":
            raise RuntimeError("no such model")
        return whole

    def tokenizer(texts: list[str]) -> Any:
        return torch.tensor([[len(word) for word in text.split()] for text in texts])

    return SimpleNamespace(create_model=create_model, get_tokenizer=lambda name: tokenizer)


def test_the_image_tower_is_trained_and_the_text_side_makes_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked = Whole(), []
    tower = whole.visual
    monkeypatch.setitem(sys.modules, "open_clip", library(whole, asked))
    encoder = open_clip("ViT-B-16", "weights.pt")
    assert asked == [("ViT-B-16", "weights.pt")]
    assert encoder.model is tower
    assert [name for name, p in encoder.model.named_parameters() if p.requires_grad] == ["proj.weight", "proj.bias"]
    assert not any(p.requires_grad for p in whole.parameters())
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    pixels = torch.from_numpy((picture / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.normalize(tower(pixels), dim=-1)
    torch.testing.assert_close(encoder(encoder.prepare([picture])), expected)
    texts = torch.nn.functional.normalize(whole.encode_text(torch.tensor([[1, 3], [3, 1]])), dim=-1)
    torch.testing.assert_close(encoder.words(["a cat", "dog a"]), texts)
    assert encoder.temperature == pytest.approx(np.exp(3))


def test_a_folder_has_its_own_weights_and_is_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setitem(sys.modules, "open_clip", library(Whole(), asked))
    with pytest.raises(MagMaxError, match=r"may name code.*--allow-code"):
        open_clip("local-dir:models/mine")
    assert not asked
    with code_from(tmp_path):
        open_clip("local-dir:models/mine")
    assert asked == [("local-dir:models/mine", None)]


def test_no_library_and_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MagMaxError, match=r"pip install open_clip_torch.*model clip"):
        open_clip()
    monkeypatch.setitem(sys.modules, "open_clip", library(Whole(), []))
    with pytest.raises(MagMaxError, match="does not give none with the weights openai: no such model"):
        open_clip("none")
