"""Frozen classification heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from magmax.continual.data import Dataset
from magmax.continual.encoder import TextEncoder
from magmax.errors import MagMaxError

TEMPLATES = ("a message about {}", "a discussion of {}", "a question about {}")


def zero_shot(
    encoder: TextEncoder, dataset: Dataset, templates: Sequence[str] = TEMPLATES, temperature: float = 20.0
) -> Tensor:
    """The zero-shot head of a data set's class names."""
    return zero_shot_head(encoder, dataset.classes, templates, temperature)


@torch.no_grad()
def zero_shot_head(encoder: TextEncoder, names: Sequence[str], templates: Sequence[str], temperature: float) -> Tensor:
    """A head made of class names: logits are `features @ head.T`, before any training.

    Row c is `temperature * n(mean over templates of n(encoder(template with names[c])))`, n scaling to 1.
    Shape (classes, width). Compute it with theta_0 and keep it: the head is never trained.
    Raises MagMaxError where a template has no `{}` for the name.
    From CLIP (Radford et al., ICML 2021), whose text tower is here the encoder itself.
    """
    bare = [t for t in templates if "{}" not in t]
    if bare or not templates:
        raise MagMaxError(f"each template needs a {{}} where the class name goes; these have none: {bare}")
    training = encoder.model.training
    encoder.model.eval()
    total = sum(encoder(encoder.tokenize([t.format(name) for name in names])) for t in templates)
    encoder.model.train(training)
    assert isinstance(total, Tensor)
    return temperature * nn.functional.normalize(total, dim=-1)
