"""Encoders: a model that turns items into unit feature vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...calibration.pretrained import load_model, load_tokenizer
from ..data.datasets import MINILM
from ..data.downloads import fetch
from ..progress import ProgressCallback, no_progress


class Encoder(Protocol):
    """The encoder that training and evaluation need: the module whose weights are merged, and features of items."""

    @property
    def model(self) -> nn.Module: ...

    def prepare(self, items: Sequence[Any], progress: ProgressCallback = no_progress) -> Sequence[Any]:
        """A data set's raw items (texts, images) as `__call__` takes them; done once, before any training."""
        ...

    def __call__(self, items: Sequence[Any]) -> Tensor:
        """Features of n items: shape (n, width), each row of length 1."""
        ...


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in this mode; afterwards each of its modules as it was, so that frozen batch norms stay frozen."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


@dataclass(frozen=True)
class Bfloat16Encoder:
    """An encoder that computes in bfloat16 what loses little by it (torch's autocast), with weights and features kept.

    On a processor with bfloat16 instructions about twice as fast to train; on one without, slower.
    """

    encoder: Encoder

    @property
    def model(self) -> nn.Module:
        return self.encoder.model

    def prepare(self, items: Sequence[Any], progress: ProgressCallback = no_progress) -> Sequence[Any]:
        return self.encoder.prepare(items, progress)

    def __call__(self, items: Sequence[Any]) -> Tensor:
        # Weights in a cache would go stale where the caller is inside an autocast of its own.
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, cache_enabled=False):
            return self.encoder(items).float()


@dataclass(frozen=True)
class TextEncoder:
    """A transformer over token ids: its last hidden states' mean over a text's tokens, scaled to length 1.

    `temperature` is the length of a zero-shot head's rows.
    """

    model: nn.Module
    tokenizer: Any
    max_tokens: int
    temperature: float = 20.0

    @classmethod
    def load(cls, folder: Path, max_tokens: int) -> TextEncoder:
        """The encoder in a folder in the Hugging Face layout; the network is never asked."""
        from transformers import AutoModel  # slow to import, and other encoders have no use for it

        with quiet_loading():
            model = load_model(AutoModel, folder, local_files_only=True, dtype=torch.float32)
        return cls(model, load_tokenizer(folder, local_files_only=True), max_tokens)

    def prepare(self, items: Sequence[str], progress: ProgressCallback = no_progress) -> list[list[int]]:
        """The token ids of each text."""
        return self.tokenize(items, progress)

    def tokenize(
        self, texts: Sequence[str], progress: ProgressCallback = no_progress, chunk: int = 500
    ) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to max_tokens."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), chunk):
            # A word is at least one token, so words beyond max_tokens cannot matter.
            short = [" ".join(text.split()[: self.max_tokens]) for text in texts[start : start + chunk]]
            ids += self.tokenizer(short, truncation=True, max_length=self.max_tokens)["input_ids"]
            progress(len(ids), len(texts))
        return ids

    def __call__(self, items: Sequence[Sequence[int]]) -> Tensor:
        """Features of n texts given as token ids: shape (n, width), each row of length 1."""
        longest = max(len(ids) for ids in items)
        tokens = torch.full((len(items), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(items):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        where = next(self.model.parameters()).device
        tokens, mask = tokens.to(where), mask.to(where)
        states = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1), dim=-1)

    def words(self, texts: Sequence[str]) -> Tensor:
        """Features of texts in plain words, for heads made of class names: shape (n, width), rows of length 1."""
        return self(self.tokenize(texts))

    def freeze_word_embeddings(self) -> None:
        """Keeps the word embeddings out of training (half of a small encoder's weights)."""
        embeddings: nn.Module = self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        embeddings.requires_grad_(False)


def minilm(max_tokens: int = 64, train_word_embeddings: bool = False) -> TextEncoder:
    """all-MiniLM-L6, fetched once; its word embeddings (half of its weights) stay as they are by default."""
    encoder = TextEncoder.load(fetch(MINILM), max_tokens)
    if not train_word_embeddings:
        encoder.freeze_word_embeddings()
    return encoder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' own bar and remarks, which would draw over ours; as it was afterwards."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
