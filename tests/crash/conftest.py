from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.crash.harness import Nursery


@pytest.fixture(scope="session")
def child() -> Iterator[Nursery]:
    """Does a piece of work in a process of its own, on a disk that may fail."""
    nursery = Nursery()
    yield nursery
    nursery.close()
