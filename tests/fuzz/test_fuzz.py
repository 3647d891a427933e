"""A slice of what `python -m tests.fuzz.run` tries."""

from __future__ import annotations

import pytest
from tests.fuzz.laws import CHECKS, run_case


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("slice_number", range(3))
def test_a_mutated_input_is_refused_in_words_or_read_right(kind: str, slice_number: int) -> None:
    for seed in range(slice_number * 50, slice_number * 50 + 50):
        run_case(kind, seed)
