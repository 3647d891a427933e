"""The digests of a pass, gathered chunk by chunk in whatever order the chunks finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.blocks import checkpoint_digest, iter_chunks, tensor_digest


class DigestCollector:
    """Block digests of several streams (the inputs of a pass, then its outputs), joined into a digest per tensor.

    A tensor's block digests are held only until its last chunk is in.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], streams: int, whole: bool = False) -> None:
        self._specs = specs
        self._missing_chunks = {key: sum(1 for _ in iter_chunks(key, spec, whole)) for key, spec in specs.items()}
        self._parts: dict[str, dict[int, Sequence[bytes]]] = {}
        self.tensors: list[dict[str, str]] = [{} for _ in range(streams)]

    def digests(self, inputs: Sequence[Checkpoint]) -> list[str]:
        """One digest for each input, which are the first streams."""
        return [
            checkpoint_digest({key: checkpoint.spec(key) for key in tensors}, tensors)
            for checkpoint, tensors in zip(inputs, self.tensors, strict=False)
        ]

    def add_chunk(self, key: str, start: int, parts: Sequence[bytes]) -> None:
        """Take the joined block digests of one chunk: an entry per stream, empty where the stream was not touched."""
        self._parts.setdefault(key, {})[start] = parts
        self._missing_chunks[key] -= 1
        if self._missing_chunks[key]:
            return
        in_order = [part for _, part in sorted(self._parts.pop(key).items())]
        for stream, tensors in enumerate(self.tensors):
            if joined := b"".join(parts[stream] for parts in in_order):
                tensors[key] = tensor_digest(joined)
