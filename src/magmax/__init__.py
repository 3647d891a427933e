"""Merge fine-tuned models by magnitude, and learn new tasks for ever without forgetting."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import MagMaxError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoints import open_checkpoint
    from .engine.adapters import merge_adapters
    from .engine.fusion_bench import MagMaxAlgorithm, magmax_merge
    from .engine.merge import merge
    from .engine.running import Running

_HOMES = {
    "MagMaxAlgorithm": ".engine.fusion_bench",
    "Running": ".engine.running",
    "magmax_merge": ".engine.fusion_bench",
    "merge": ".engine.merge",
    "merge_adapters": ".engine.adapters",
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
