"""What came of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge: path, seconds, bytes read, written and reused, unmerged tensors and digests."""

    path: Path | str
    seconds: float
    read_bytes: int
    written_bytes: int
    reused_bytes: int
    unmerged: Mapping[str, str]
    partly_merged: Mapping[str, str]
    input_digests: Sequence[str]
    sink_digests: Sequence[str]
