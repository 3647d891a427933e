"""Preferences: how many elements each task is to supply."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

from ...errors import MagMaxError

MAX_WEIGHT = 1e300
Weights = tuple[float, ...]
NamedWeights = tuple[tuple[str, float], ...]


def parse_weights(content: Any) -> Weights | NamedWeights:
    """A preference as it was written, checked: weights in the models' order, or (name, weight) pairs.

    Raises MagMaxError for what is neither a list nor a map, and for a weight that is no finite number of 0 or more.
    """
    if isinstance(content, Mapping):
        named = cast("Mapping[Any, Any]", content)
        pairs = tuple((str(name), _check_weight(weight, f"{name}: ")) for name, weight in named.items())
        _require_positive([weight for _, weight in pairs])
        return pairs
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise MagMaxError(f"a preference is a list of weights or a map of names to weights, not {content!r}")
    items = list(cast("Sequence[Any]", content))
    if items and all(isinstance(item, tuple | list) for item in items):
        return parse_weights({str(name): weight for name, weight in items})
    weights = tuple(_check_weight(weight, f"number {n}: ") for n, weight in enumerate(items, start=1))
    if weights:
        _require_positive(weights)
    return weights


def _check_weight(weight: Any, where: str) -> float:
    if type(weight) not in (int, float) or not 0 <= weight <= MAX_WEIGHT:
        raise MagMaxError(
            f"a preference needs weights that are finite numbers, 0 or more; {where}{reprlib.repr(weight)} is not"
        )
    return float(weight)


def _require_positive(weights: Sequence[float]) -> None:
    if not any(weights):
        raise MagMaxError("a preference needs a weight above 0; all of these are 0")


def quotas(weights: Sequence[float], elements: int) -> list[int]:
    """Whole numbers with the sum `elements`, in proportion to the weights, by the largest-remainder method.

        n_t = floor(q_t),  q_t = d * w_t / sum(w)

    What is left goes to the largest q_t - n_t, one each, to earlier tasks first. A weight of 0 gives 0. The
    arithmetic is exact.

    >>> quotas([1, 1, 1, 0], 11)
    [4, 4, 3, 0]
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [elements * weight / sum(exact) for weight in exact]
    whole = [math.floor(share) for share in shares]
    left = elements - sum(whole)
    for task in sorted(range(len(shares)), key=lambda t: (whole[t] - shares[t], t))[:left]:
        whole[task] += 1
    return whole
