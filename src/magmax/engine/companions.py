"""The small files that make a folder of weights a model: config, tokenizer, vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoints.folder import COMPANIONS

LARGEST = 200_000_000
NAMES_OF_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def companions(folder: Path, dtype: str | None) -> dict[str, bytes | Path]:
    """Name -> content or source of each file to copy from the base's folder; config.json gets `dtype`, if given."""
    found: dict[str, bytes | Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        ours = path.name == "provenance.json" or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in COMPANIONS and not (hidden or ours) and path.stat().st_size <= LARGEST:
            found[str(name)] = path
    if dtype and "config.json" in found:
        found["config.json"] = _with_dtype(folder / "config.json", NAMES_OF_TYPES[dtype])
    return found


def _with_dtype(path: Path, dtype: str) -> bytes | Path:
    """The config with its dtype replaced, under whichever of its two names it has."""
    try:
        config = json.loads(path.read_text())
        names = [name for name in ("dtype", "torch_dtype") if name in config]
    except (ValueError, TypeError):
        return path
    return json.dumps(config | dict.fromkeys(names, dtype), indent=2).encode() + b"\n" if names else path
