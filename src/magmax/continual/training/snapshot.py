"""The state of a fit between two steps, in one file, so that a killed fit goes on and ends in the same bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .parallel import gather, shard_like
from .weight_files import MADE_FROM, read_metadata, write_tensors


@dataclass
class FitSnapshot:
    """Model, optimizer and losses after every `every` steps; the data's order follows from the seed and the step.

    A file that was made from something else (`made_from`: whatever decides the result, in words or as a digest) is
    not used. `seconds` adds up the time that the fit took, over all its lives.
    """

    path: Path
    every: int = 100
    made_from: str = ""
    seconds: float = 0.0
    _start_time: float = field(default_factory=time.monotonic)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float], write: bool = True) -> None:
        """Write the state if it is time to; a kill leaves the last one.

        Of several processes all call this, and one writes: what is cut over them is put together.
        """
        if not self.every or len(losses) % self.every:
            return
        named = {f"model/{key}": tensor for key, tensor in model.state_dict().items()}
        for place, state in optimizer.state_dict()["state"].items():
            named |= {f"optimizer/{place}/{name}": value for name, value in state.items()}
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in named.items():
            whole = gather(tensor)
            if write:
                tensors[name] = whole.detach().cpu()
        if write:
            metadata = {MADE_FROM: self.made_from, "losses": json.dumps(losses), "seconds": str(self.spent())}
            write_tensors(tensors, self.path, metadata)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put the saved state into model and optimizer; the losses until then, none where there is no such state."""
        metadata = read_metadata(self.path)
        if metadata.get(MADE_FROM) != self.made_from or "losses" not in metadata:
            return []
        tensors = load_file(self.path)
        now = model.state_dict()
        model.load_state_dict(
            {key: shard_like(tensor, now[key]) for key, tensor in _strip_prefix("model/", tensors).items()}
        )
        content = optimizer.state_dict()
        content["state"] = {}
        weights = optimizer.param_groups[0]["params"]
        for name, value in _strip_prefix("optimizer/", tensors).items():
            place, _, key = name.partition("/")
            weight = weights[int(place)]
            value = shard_like(value, weight) if value.shape == weight.shape else value
            content["state"].setdefault(int(place), {})[key] = value
        optimizer.load_state_dict(content)
        self.seconds = float(metadata["seconds"])
        return json.loads(metadata["losses"])

    def spent(self) -> float:
        """Seconds of fitting so far."""
        return self.seconds + time.monotonic() - self._start_time

    def remove(self) -> None:
        """Once the result itself is saved."""
        self.path.unlink(missing_ok=True)


def _strip_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
