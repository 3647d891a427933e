"""Frozen classification heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import MagMaxError, list_problems
from ..data.datasets import Dataset, rows_per_class
from .text_encoder import Encoder, TextEncoder, training_mode

DEFAULT_TEMPLATES = ("a message about {}", "a discussion of {}", "a question about {}")


class TextFeatureEncoder(Protocol):
    """An encoder that has features for words, in the space of its items' features."""

    @property
    def temperature(self) -> float: ...

    def words(self, texts: Sequence[str]) -> Tensor: ...


def zero_shot(
    encoder: TextFeatureEncoder,
    dataset: Dataset,
    templates: Sequence[str] | None = None,
    temperature: float | None = None,
) -> Tensor:
    """The zero-shot head of a data set's class names in the templates, or of its own prompts where it has any.

    `temperature`, the length of the rows, is by default the encoder's own: exp(logit_scale) for CLIP.
    """
    if templates is None:
        templates = DEFAULT_TEMPLATES
        prompts = dataset.prompts or [[t.format(name) for t in templates] for name in dataset.classes]
    else:
        _check_templates(templates)
        prompts = [[t.format(name) for t in templates] for name in dataset.classes]
    return prompt_head(encoder, prompts, encoder.temperature if temperature is None else temperature)


@torch.no_grad()
def prompt_head(
    encoder: TextFeatureEncoder, prompts: Sequence[Sequence[str]], temperature: float, batch: int = 256
) -> Tensor:
    """A head made of sentences: row c is `temperature * n(mean of encoder.words(prompts[c]))`, n scaling to 1.

    Shape (classes, width). Raises MagMaxError where a class has no sentence.
    """
    silent = [c for c, class_prompts in enumerate(prompts) if not class_prompts]
    if silent or not prompts:
        raise MagMaxError(f"a zero-shot head needs a sentence for every class; the classes {silent} have none")
    texts = [text for class_prompts in prompts for text in class_prompts]
    features = torch.cat([encoder.words(texts[i : i + batch]) for i in range(0, len(texts), batch)])
    means = [part.mean(0) for part in features.split([len(class_prompts) for class_prompts in prompts])]
    return temperature * nn.functional.normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def nearest_class_mean(
    encoder: Encoder,
    dataset: Dataset,
    per_class: int = 100,
    temperature: float = 20.0,
    domain: str | None = None,
    seed: int = 0,
) -> Tensor:
    """A head without words: row c is `temperature * n(mean of the features of class c's training examples)`.

    The features are theta_0's, of at most `per_class` random examples, seen as in evaluation; the head is frozen. A
    class's row needs only its own task's data. With domains, all of them are averaged over, later ones too, unless
    `domain` names the one to take. Raises MagMaxError where a class has no training example.
    """
    data = dataset.train
    if domain is not None:
        if domain not in dataset.domains or data.domains is None:
            raise MagMaxError(f"nearest_class_mean: there is no domain {domain!r} among {list(dataset.domains)}")
        data = data.pick(np.flatnonzero(data.domains == list(dataset.domains).index(domain)))
    count = np.bincount(data.labels, minlength=len(dataset.classes))
    problems = [
        f"class {c} ({dataset.classes[c]}) has no training example" for c in np.flatnonzero(count == 0).tolist()
    ]
    if problems:
        raise list_problems("there is no mean of nothing", problems)
    data = data.pick(rows_per_class(data.labels, per_class, seed))
    items = encoder.prepare(data.items)
    with training_mode(encoder.model, False):
        features = torch.cat([encoder(items[i : i + 64]).cpu().double() for i in range(0, len(items), 64)])
    labels = torch.from_numpy(data.labels)
    sums = torch.zeros(len(dataset.classes), features.shape[1], dtype=features.dtype).index_add_(0, labels, features)
    return (temperature * nn.functional.normalize(sums, dim=-1)).float()


def _check_templates(templates: Sequence[str]) -> None:
    bare = [t for t in templates if "{}" not in t]
    if bare or not templates:
        raise MagMaxError(f"each template needs a {{}} where the class name goes; these have none: {bare}")


@torch.no_grad()
def zero_shot_head(encoder: TextEncoder, names: Sequence[str], templates: Sequence[str], temperature: float) -> Tensor:
    """A head made of class names: logits are `features @ head.T`, before any training.

    Row c is `temperature * n(mean over templates of n(encoder(template with names[c])))`, n scaling to 1.
    Shape (classes, width). Compute it with theta_0 and keep it: the head is never trained.
    Raises MagMaxError where a template has no `{}` for the name.
    From CLIP (Radford et al., ICML 2021), whose text tower is here the encoder itself.
    """
    _check_templates(templates)
    with training_mode(encoder.model, False):
        total = sum(encoder(encoder.tokenize([t.format(name) for name in names])) for t in templates)
    assert isinstance(total, Tensor)
    return temperature * nn.functional.normalize(total, dim=-1)
