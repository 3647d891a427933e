"""Merge fine-tuned models by magnitude: continual learning by model merging."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import MagMaxError

if TYPE_CHECKING:
    from .checkpoints import open_checkpoint
    from .merging.adapters.adapter_merge import merge_adapters
    from .merging.api import merge
    from .merging.compat_fusion_bench import MagMaxAlgorithm, magmax_merge
    from .merging.running.running_merge import Running

_HOMES = {
    "MagMaxAlgorithm": ".merging.compat_fusion_bench",
    "Running": ".merging.running.running_merge",
    "magmax_merge": ".merging.compat_fusion_bench",
    "merge": ".merging.api",
    "merge_adapters": ".merging.adapters.adapter_merge",
    "open_checkpoint": ".checkpoints",
}

__all__ = [
    "MagMaxAlgorithm",
    "MagMaxError",
    "Running",
    "__version__",
    "magmax_merge",
    "merge",
    "merge_adapters",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
