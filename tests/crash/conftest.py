from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.crash.harness import ForkServer


@pytest.fixture(scope="session")
def child() -> Iterator[ForkServer]:
    """Does a piece of work in a process of its own, on a disk that may fail."""
    nursery = ForkServer()
    yield nursery
    nursery.close()
