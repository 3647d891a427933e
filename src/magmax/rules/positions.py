"""Where a tensor lies in a model, told from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

INPUT_PATTERN = re.compile(r"(?<!un)emb(?!ed_out)|wte|wpe|shared|token|patch|conv|stem|position|_pre\b|\bpre_l")
"""What a tensor outside of layers has in its name if it stands before them."""


class TensorPosition(NamedTuple):
    """A tensor's name, how deep in the model it lies (0 at the first layer, 1 at the last), and whether in a layer."""

    key: str
    depth: float
    in_layer: bool = True


def tensor_positions(names: Iterable[str]) -> dict[str, TensorPosition]:
    """Every tensor's place; the depth comes from the names alone.

    The first component that is a number tells the layer, and what stands before it the stack of layers. The depth is
    the layer's rank among those of its stack, over their number less one. A tensor outside of every stack of at least
    two layers lies at 0 if its name tells of embeddings, tokens, patches or a stem, else at 1 (final norms, heads).
    """
    keys = list(names)
    stacks: dict[str, set[int]] = {}
    for stack, layer in filter(None, map(_parse_layer, keys)):
        stacks.setdefault(stack, set()).add(layer)
    ranks = {stack: {n: rank for rank, n in enumerate(sorted(layers))} for stack, layers in stacks.items()}

    def depth(name: str) -> float:
        stack, layer = _parse_layer(name) or ("", 0)
        if len(ranks.get(stack, ())) < 2 or _parse_layer(name) is None:
            return 0.0 if INPUT_PATTERN.search(name.lower()) else 1.0
        return ranks[stack][layer] / (len(ranks[stack]) - 1)

    return {name: TensorPosition(name, depth(name), _parse_layer(name) is not None) for name in keys}


def _parse_layer(name: str) -> tuple[str, int] | None:
    parts = name.split(".")
    where = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    return None if where is None else (".".join(parts[:where]) + ".", int(parts[where]))
