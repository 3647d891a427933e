"""Sensitive tensors, those whose update must not grow: what was measured of them, kept in a small JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import MagMaxError

FORMAT = "magmax sensitivity 1"


class ScoreDrop(NamedTuple):
    """The score lost by growing one tensor's update, and the noise of that measurement.

    Attributes:
        drop: the metric before less the metric after; positive where growing hurts.
        noise: the drop that chance alone may show: half the width of the middle 95 % of its bootstrap distribution.
    """

    drop: float
    noise: float

    @property
    def is_significant(self) -> bool:
        """Return whether it is a drop beyond the noise."""
        return self.drop > self.noise


@dataclass(frozen=True)
class Sensitivity:
    """The score that a merged model loses where one tensor's update grows, and the tensors that must not grow.

    As a file: JSON with these attributes, `drops` as {tensor: {drop, noise}}, and the format's name under "format".

    Attributes:
        model: what was measured, in words that tell it from others: its digest, or its recipe's.
        metric: what was measured of it; more is better.
        factor: what the tensor's update was multiplied by.
        samples: on how many samples the metric was measured.
        drops: by tensor.
        sensitive: the tensors that may only shrink; each has a real drop.
    """

    model: str
    metric: str
    factor: float
    samples: int
    drops: Mapping[str, ScoreDrop]
    sensitive: Sequence[str]

    def __post_init__(self) -> None:
        if problem := self._find_problem():
            raise MagMaxError(f"not a sensitivity: {problem}")

    def _find_problem(self) -> str | None:
        for key, (drop, noise) in self.drops.items():
            if not (math.isfinite(drop) and math.isfinite(noise) and noise >= 0):
                return f"{key} has drop {drop} and noise {noise}; a drop is a finite number, a noise one of at least 0"
        for key in self.sensitive:
            if key not in self.drops:
                return f"{key} is called sensitive and was not measured"
            if not self.drops[key].is_significant:
                drop, noise = self.drops[key]
                return f"{key} is called sensitive, and its drop of {drop:g} lies within the noise of {noise:g}"
        if len(set(self.sensitive)) < len(self.sensitive):
            return "a tensor is called sensitive twice"
        return None

    def to_json(self) -> str:
        """The file's content."""
        drops = {key: drop._asdict() for key, drop in self.drops.items()}
        content = asdict(self) | {"drops": drops, "sensitive": list(self.sensitive)}
        return json.dumps({"format": FORMAT, **content}, indent=2, allow_nan=False) + "\n"


def largest_drops(drops: Mapping[str, ScoreDrop], count: int = 10) -> list[str]:
    """The tensors of largest drop, at most `count`, of those whose drop is real; of equal ones the first by name."""
    real = [key for key, drop in drops.items() if drop.is_significant]
    return sorted(real, key=lambda key: (-drops[key].drop, key))[:count]


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a `Sensitivity`'s file. Raises MagMaxError for one that cannot be read, or that is none."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MagMaxError(f"{path}: cannot be read as a JSON file of sensitive tensors: {reason}") from error
    try:
        if content["format"] != FORMAT:
            raise MagMaxError(f"it has the format {content['format']!r}; this magmax reads {FORMAT!r}")
        return Sensitivity(
            model=_typed(str, content["model"]),
            metric=_typed(str, content["metric"]),
            factor=_typed(float, content["factor"]),
            samples=_typed(int, content["samples"]),
            drops={_typed(str, key): _parse_drop(drop) for key, drop in content["drops"].items()},
            sensitive=[_typed(str, key) for key in content["sensitive"]],
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise MagMaxError(f"{path}: is no file of sensitive tensors ({type(error).__name__}: {error})") from error
    except MagMaxError as error:
        raise MagMaxError(f"{path}: {error}") from error


def _parse_drop(content: Mapping[str, Any]) -> ScoreDrop:
    return ScoreDrop(_typed(float, content["drop"]), _typed(float, content["noise"]))


def _typed(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{value!r} should be {kind.__name__}")
    return kind(value)
