"""A tiny encoder, made here and not downloaded, and texts that it can learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from magmax.continual.data.datasets import LabelledExamples  # noqa: E402
from magmax.continual.models.text_encoder import TextEncoder  # noqa: E402

WORDS = 40


class TinyTokenizer:
    """Words are numbers: "3 17" has the ids 4 and 18; 0 is padding."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [[1 + int(word) for word in text.split()][:max_length] for text in texts]}


def tiny_encoder(seed: int = 0, max_tokens: int = 8) -> TextEncoder:
    """A BERT of 2 layers and width 16 with random weights."""
    config = transformers.BertConfig(
        vocab_size=WORDS + 1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertModel(config).eval()
    return TextEncoder(model, TinyTokenizer(), max_tokens)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on models this small, most of all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoder() -> TextEncoder:
    return tiny_encoder()


@pytest.fixture
def make_encoder() -> Callable[..., TextEncoder]:
    return tiny_encoder


@pytest.fixture
def data(encoder: TextEncoder) -> LabelledExamples:
    """96 texts of 4 classes; class c mostly uses the words 10c to 10c + 9."""
    random = np.random.default_rng(0)
    labels = np.arange(96) % 4
    items: list[Any] = []
    for label in labels:
        words = random.integers(10 * label, 10 * label + 10, size=random.integers(3, 9))
        items.append(" ".join(map(str, words)))
    return LabelledExamples(encoder.tokenize(items), labels)


@pytest.fixture
def head(encoder: TextEncoder) -> Any:
    """Four unit rows, times 10."""
    random = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)
    return torch.from_numpy(10 * random / np.linalg.norm(random, axis=1, keepdims=True))
