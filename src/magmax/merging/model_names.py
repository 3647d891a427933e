"""Default names of models, from their paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.base import HUB_PREFIX

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


COMMON_NAMES = {"model", "pytorch_model", "adapter_model", "diffusion_pytorch_model"}
"""File names that say nothing of the model."""


def default_names(paths: Sequence[str]) -> list[str]:
    """For each path the first part that tells it from the others, without its suffix; for a model of the hub its id."""
    local = [path for path in paths if not path.startswith(HUB_PREFIX)]
    if len(local) < len(paths):
        local_names = iter(default_names(local)) if local else iter(())
        return [path.removeprefix(HUB_PREFIX) if path.startswith(HUB_PREFIX) else next(local_names) for path in paths]
    parts = [Path(path).parts or ("",) for path in paths]
    if len(paths) == 1:
        names = [_strip_weight_suffix(part) for part in reversed(parts[0])]
        return [next((name for name in names if name not in COMMON_NAMES), names[0])]
    for column in range(max(map(len, parts), default=0)):
        words = [p[min(column, len(p) - 1)] for p in parts]
        if len(set(words)) == len(words):
            return [_strip_weight_suffix(word) for word in words]
    longest = max(map(len, parts), default=0)
    first = next((c for c in range(longest) if len({p[min(c, len(p) - 1)] for p in parts}) > 1), 0)
    return [_strip_weight_suffix("/".join(p[first:] or p[-1:])) for p in parts]


def _strip_weight_suffix(name: str) -> str:
    """A file's name without the suffix that says it holds weights."""
    return next((name.removesuffix(s) for s in WEIGHT_SUFFIXES if name.endswith(s)), name)
