"""A small decoder language model: real text by domain, its tokens, the loss, and perplexity per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from ..errors import MagMaxError
from ..rules import nearest_hint
from .data.datasets import NEWSGROUPS, LabelledExamples, read_newsgroups
from .data.downloads import fetch
from .data.texts import REUTERS, SENTIMENT_DOMAINS, SENTIMENTS, read_reuters, read_sentiments

BOS_TOKEN = "<s>"
"""The token that every window begins with."""
TEXTS_PER_GROUP = 8
"""Neighbouring texts that go to the same part together: the sentences of one review or editorial are neighbours."""


@dataclass(frozen=True)
class TextCorpus:
    """The texts of a domain: to train on, to choose numbers on, and to measure on; none stands in two of them."""

    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]


def newsgroup_texts() -> TextCorpus:
    """Messages in lower case without punctuation."""
    train, test = read_newsgroups(fetch(NEWSGROUPS))
    return split_validation(train.items, test.items)


def newswire_texts() -> TextCorpus:
    """Newswire stories in lower case without punctuation."""
    train, test = read_reuters(fetch(REUTERS))
    return split_validation(train.items, test.items)


def sentiment_texts(domain: str) -> TextCorpus:
    """Sentences of tweets, product reviews, film reviews or editorials, whatever their rating."""
    number = SENTIMENT_DOMAINS.index(domain)
    train, test = (
        [
            text
            for text, of in zip(data.items, data.domains if data.domains is not None else (), strict=True)
            if of == number
        ]
        for data in read_sentiments(fetch(SENTIMENTS), least=0.0)
    )
    return split_validation(train, test)


CORPORA: dict[str, Callable[[], TextCorpus]] = {
    "newsgroups": newsgroup_texts,
    "newswire": newswire_texts,
    **{domain: lambda domain=domain: sentiment_texts(domain) for domain in SENTIMENT_DOMAINS},
}


def corpus(name: str) -> TextCorpus:
    """The texts of a domain by its name. Raises MagMaxError for a name that is none."""
    if name not in CORPORA:
        raise MagMaxError(f"there are no texts {name!r}; {nearest_hint(name, list(CORPORA))}")
    return CORPORA[name]()


def split_validation(train: Sequence[str], test: Sequence[str], share: int = 10) -> TextCorpus:
    """One part in `share` of the training texts, always the same, is set aside for choosing numbers on."""
    aside = [place // TEXTS_PER_GROUP % share == share - 1 for place in range(len(train))]
    training = [text for text, out in zip(train, aside, strict=True) if not out]
    return TextCorpus(training, [text for text, out in zip(train, aside, strict=True) if out], test)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding of bytes: of every text the tokens give back the bytes, and so their number."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, texts: Sequence[str], length: int, most: int | None = None) -> LabelledExamples:
    """The texts, a line each, cut into windows of BEGIN and `length` tokens; what is left at the end is dropped.

    Items of shape (length + 1,), the labels all 0. Of more than `most`, so many at equal distances are taken.

    Raises MagMaxError for texts that fill no window.
    """
    tokens = np.concatenate([[], *(encoded.ids for encoded in tokenizer.encode_batch([t + "\n" for t in texts]))])
    count = len(tokens) // length
    if count == 0:
        raise MagMaxError(f"texts of {len(tokens)} tokens fill no window of {length}; give more, or a shorter window")
    cut = tokens[: count * length].astype(np.int64).reshape(count, length)
    if most is not None and count > most:
        cut = cut[np.arange(most) * count // most]
    begin = np.full((len(cut), 1), tokenizer.token_to_id(BOS_TOKEN))
    return LabelledExamples(list(np.hstack([begin, cut])), np.zeros(len(cut), np.int64))


def bytes_of(tokenizer: Tokenizer, data: LabelledExamples) -> int:
    """The bytes that windows stand for: a token of bytes is written with one letter for each of them."""
    sizes = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for letters, number in tokenizer.get_vocab().items():
        sizes[number] = len(letters)
    return int(sum(sizes[item[1:]].sum() for item in data.items))


def llama(vocabulary: int, width: int, layers: int, heads: int, length: int, seed: int) -> nn.Module:
    """An untrained model of the Llama architecture, its weights drawn from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length + 1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class NextTokenLoss:
    """The mean cross-entropy in nats of each token after those before it in its window: what `fit` minimises."""

    model: nn.Module
    precision: Literal["float32", "bfloat16"] = "float32"

    def __call__(self, items: Sequence[Any], labels: Tensor) -> Tensor:
        tokens = torch.from_numpy(np.stack(items)).to(labels.device)
        with torch.autocast(
            labels.device.type, torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=False
        ):
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def perplexity_per_byte(loss: NextTokenLoss, tokenizer: Tokenizer, data: LabelledExamples, batch: int = 32) -> float:
    """exp(nats / bytes) over all windows: what two models of different tokens can be compared by; 2 is 1 bit a byte."""
    nats = 0.0
    where = next(loss.model.parameters()).device
    for start in range(0, len(data), batch):
        rows = data.pick(np.arange(start, min(start + batch, len(data))))
        labels = torch.from_numpy(rows.labels).to(where)
        nats += float(loss(rows.items, labels)) * sum(len(item) - 1 for item in rows.items)
    return math.exp(nats / bytes_of(tokenizer, data))
