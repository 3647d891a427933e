"""What a calibration measured and did, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one projection of an attention layer.

    Attributes:
        tensors: the keys of its weights.
        xi, measured: its coefficient, and what it was before any limit.
        why: why it was clipped, or left alone; empty otherwise.
        features: the mean magnitude ||F_k|| of the change of its features under each task's model.
        features_before, features_after: the same under the merged model, on that task's samples.
        by_samples: xi as the first 1, 2, 4 ... samples of each task would have it, on the same inputs.
        by_place: xi at each place of a call: a token's position, a channel.
        weights: the L2 norms of the task vectors, and of the merged one (the last), before the calibration.
        weight_after: the merged one's norm afterwards.
        cosine: the mean cosine of pairs of task vectors.
    """

    name: str
    kind: str
    tensors: Sequence[str]
    xi: float
    measured: float
    why: str = ""
    features: Sequence[float] = ()
    features_before: Sequence[float] = ()
    features_after: Sequence[float] = ()
    by_samples: Mapping[int, float] = field(default_factory=dict[int, float])
    by_place: Sequence[float] | None = None
    weights: Sequence[float] = ()
    weight_after: float = 0.0
    cosine: float | None = None


@dataclass(frozen=True)
class CalibrationReport:
    """All layers, and the modules that cannot be folded, with the reason.

    Attributes:
        names: what the models are called.
        notes: what else a user should know.
    """

    names: Sequence[str]
    layers: Sequence[LayerReport]
    left: Mapping[str, str]
    notes: Sequence[str] = ()

    def as_json(self) -> str:
        """As JSON; what is not finite is null."""
        layers = [asdict(layer) for layer in self.layers]
        content = {"models": self.names, "layers": layers, "left_alone": self.left, "notes": self.notes}
        return json.dumps(_replace_nonfinite(content), indent=2, allow_nan=False) + "\n"

    def lines(self) -> list[str]:
        """Return what is worth knowing at once: the range of xi, what was clipped or left alone and why."""
        xis = sorted(layer.xi for layer in self.layers if layer.xi != 1)
        lines = (
            [f"xi of {len(xis)} layers: {xis[0]:.3g} to {xis[-1]:.3g}, median {xis[len(xis) // 2]:.3g}"] if xis else []
        )
        lines += [f"{layer.name}: {layer.why}" for layer in self.layers if layer.why]
        for why in dict.fromkeys(self.left.values()):
            names = [name for name, reason in self.left.items() if reason == why]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left alone: {', '.join(names[:3])}{more} ({why})")
        return lines

    def rows(self) -> list[tuple[str, ...]]:
        """A table of what was done: layer, xi, features of tasks, merged before and after, and why."""
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            sizes = [_mean(layer.features), _mean(layer.features_before), _mean(layer.features_after)]
            cells = [f"{size:.4g}" if size is not None else "-" for size in sizes]
            rows.append((layer.name, f"{layer.xi:.4f}", *cells, layer.why))
        return rows


TABLE_HEADER = ["layer", "xi", "features", "merged", "calibrated", ""]


def clipped(xi: float, keys: Collection[str], sensitive: Collection[str] | None) -> tuple[float, str]:
    """The coefficient within its limits, and why it was moved: at most 1 where sensitive, at least 1 elsewhere."""
    if sensitive is None:
        return xi, ""
    if any(key in sensitive for key in keys):
        return (1.0, f"sensitive: clipped from {xi:.4g} to 1") if xi > 1 else (xi, "")
    return (1.0, f"not sensitive: raised from {xi:.4g} to 1") if xi < 1 else (xi, "")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _replace_nonfinite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _replace_nonfinite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace_nonfinite(value) for value in content]
    return content
