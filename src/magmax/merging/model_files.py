"""The small files that make a folder of weights a model: config, tokenizer, vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoints.folder import SMALL_FILE_ENDINGS
from ..checkpoints.lora.peft import ADAPTER_CONFIG

MAX_FILE_BYTES = 200_000_000
COMPONENT_FOLDERS = {
    "additional_chat_templates",
    "tokenizer",
    "tokenizer_2",
    "feature_extractor",
    "image_processor",
    "scheduler",
}
"""The folders in which transformers and diffusers keep what belongs to a model."""
TORCH_DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def model_files(folder: Path, dtype: str | None) -> dict[str, bytes | Path]:
    """Return name -> content or source of each file to copy from the base's folder; config.json gets `dtype`."""
    files: dict[str, bytes | Path] = {}
    for path in sorted(path for place in [folder, *_find_component_folders(folder)] for path in place.iterdir()):
        other = path.name in ("provenance.json", ADAPTER_CONFIG) or path.name.endswith(".index.json")
        skipped = other or path.name.startswith(".") or path.suffix not in SMALL_FILE_ENDINGS
        if path.is_file() and not skipped and path.stat().st_size <= MAX_FILE_BYTES and not leads_outside(path, folder):
            files[str(path.relative_to(folder))] = path
    if dtype and "config.json" in files:
        files["config.json"] = _with_dtype(folder / "config.json", TORCH_DTYPE_NAMES[dtype])
    return files


def find_outside_links(folder: Path) -> list[str]:
    """Return the names of links that lead out of a model's folder and so are not copied from it."""
    links = [path for place in [folder, *_find_component_folders(folder)] for path in place.iterdir()]
    return sorted(str(path.relative_to(folder)) for path in links if path.is_symlink() and leads_outside(path, folder))


def leads_outside(path: Path, folder: Path) -> bool:
    """Return whether a path in a model's folder leads out of it, to a file that its owner may not mean to publish.

    In the cache of the hub, the links of a model to its own blobs do not.
    """
    real, root = path.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return False
    snapshots = (place.parent for place in (root, *root.parents) if place.parent.name == "snapshots")
    cached = next((s.parent for s in snapshots if s.parent.name.startswith("models--")), None)
    return cached is None or real.parent != cached / "blobs"


def _find_component_folders(folder: Path) -> list[Path]:
    """The folders inside that belong to the model: known ones, and the modules that sentence-transformers names."""
    names = set(COMPONENT_FOLDERS)
    try:
        named: Any = json.loads((folder / "modules.json").read_text("utf-8"))
        names |= {str(module["path"]) for module in named}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    there = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return [path for path in there if path.name in names]


def _with_dtype(path: Path, dtype: str) -> bytes | Path:
    """The config with its dtype replaced, under whichever of its two names it has."""
    try:
        config = json.loads(path.read_text())
        names = [name for name in ("dtype", "torch_dtype") if name in config]
    except (ValueError, TypeError):
        return path
    return json.dumps(config | dict.fromkeys(names, dtype), indent=2).encode() + b"\n" if names else path
