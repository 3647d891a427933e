"""Random mix: each element from a task drawn at random, the control that shows what choosing by magnitude is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xxhash
from array_api_compat import array_namespace
from numpy.typing import NDArray

from .base import Address, Array, Rule, State, bits

WORDS_A_COUNT = 8
"""32-bit words that Philox makes from one value of its counter."""


@dataclass(frozen=True)
class RandomMix(Rule):
    """Each element from a task drawn uniformly, as a reservoir: task t replaces what is held with probability 1/t.

    The draw depends on (seed, tensor name, flat offset, t) and nothing else, so it is the same for every block size,
    thread count and machine. The probability is exact to 2^-32.
    """

    name: ClassVar[str] = "random_mix"
    scaling_factor: ClassVar[float] = 1.0
    selects: ClassVar[bool] = True
    paper: ClassVar[str] = "Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322, the RandMix baseline"

    seed: int = 0

    def step(self, state: State, task_vector: Array, task: int, at: Address) -> State:
        if not state:
            return (task_vector,)
        (held,) = state
        xp = array_namespace(held)
        drawn = draws(self.seed, at, task, math.prod(held.shape))
        width = np.int64 if held.dtype.itemsize == 8 else np.int32
        keep = -(drawn >= (1 << 32) // task).astype(width)
        place, new = bits(held), bits(task_vector)
        place ^= new
        place &= xp.reshape(xp.asarray(keep, device=getattr(held, "device", None)), held.shape)
        place ^= new
        return (held,)

    def finish(self, state: State, tasks: int) -> Array:
        return state[0]


def draws(seed: int, at: Address, stream: int, count: int) -> NDArray[np.uint32]:
    """`count` uniform 32-bit numbers, those of the elements at.offset, at.offset + 1, ... of the tensor at.key."""
    first, skip = divmod(at.offset, WORDS_A_COUNT)
    key = xxhash.xxh3_128_intdigest(f"{seed}\0{stream}\0{at.key}".encode())
    source = np.random.Philox(key=key, counter=first)
    words = source.random_raw(-(-(skip + count) // 2)).astype("<u8", copy=False).view("<u4")
    return words[skip : skip + count]
