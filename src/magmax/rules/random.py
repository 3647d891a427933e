"""Random numbers with an address: the same seed gives the same numbers, whatever the schedule."""

from __future__ import annotations

import math

import numpy as np
import xxhash
from numpy.typing import NDArray

from .contract import as_signed_bits
from .statistics import Address, Array, namespace

WORDS_PER_COUNTER = 8
"""32-bit words that Philox makes from one value of its counter."""


def random_words(purpose: str, seed: int, stream: int, address: Address, count: int) -> NDArray[np.uint32]:
    """`count` uniform 32-bit numbers, those of the elements at.offset, at.offset + 1, ... of the tensor at.key."""
    first, skip = divmod(address.offset, WORDS_PER_COUNTER)
    key = xxhash.xxh3_128_intdigest(f"{purpose}\0{seed}\0{stream}\0{address.key}".encode())
    source = np.random.Philox(key=key, counter=first)
    words = source.random_raw(-(-(skip + count) // 2)).astype("<u8", copy=False).view("<u4")
    return words[skip : skip + count]


def random_mask(
    like: Array, probability: float | NDArray[np.float64], purpose: str, seed: int, stream: int, address: Address
) -> Array:
    """Signed integers of the width of `like`: all ones with the given probability (exact to 2^-32), else all zeros.

    The probability is one for all elements, or a flat array of one for each.
    """
    xp = namespace(like)
    drawn = random_words(purpose, seed, stream, address, math.prod(like.shape))
    width = np.int64 if like.dtype.itemsize == 8 else np.int32
    mask = -(drawn < np.rint(probability * 2.0**32)).astype(width)
    return xp.reshape(xp.asarray(mask, device=getattr(like, "device", None)), like.shape)


def keep_at_random(
    task_vector: Array, keep: float | NDArray[np.float64], purpose: str, seed: int, stream: int, address: Address
) -> Array:
    """Zero each entry with probability 1 - keep, in place."""
    bits = as_signed_bits(task_vector)
    bits &= random_mask(task_vector, keep, purpose, seed, stream, address)
    return task_vector
