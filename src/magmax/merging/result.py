"""What came of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeResult:
    """What was done: where, from how many bytes, into how many, in how many seconds, and the digests."""

    path: Path | str
    seconds: float
    read_bytes: int
    written_bytes: int
    reused_bytes: int
    unmerged: Mapping[str, str]
    partly_merged: Mapping[str, str]
    input_digests: Sequence[str]
    sink_digests: Sequence[str]
