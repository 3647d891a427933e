"""The small files that make a folder of weights a model: config, tokenizer, vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ..checkpoints import Checkpoint
from ..checkpoints.base import parse_json_object, read_small
from ..checkpoints.folder import TRAINING_STATE, find_modules, is_small_file, is_weight_file
from ..checkpoints.lora.peft import ADAPTER_CONFIG
from ..checkpoints.output_paths import OutputPath
from ..errors import MagMaxError

MAX_FILE_BYTES = 200_000_000
CODE_FOLDER = "custom_generate"
COMPONENT_FOLDERS = {
    CODE_FOLDER,
    "additional_chat_templates",
    "tokenizer",
    "tokenizer_2",
    "feature_extractor",
    "image_processor",
    "scheduler",
}
"""The folders in which transformers and diffusers keep what belongs to a model."""
DTYPE_SETTINGS = ("dtype", "torch_dtype")
CLASS_NAME = re.compile(r'(?<=")(\w+)\.\w+(?=")')
"""A class in an auto_map, MODULE.CLASS; those of other repositories have their id and -- before them."""
RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)
"""An import of a file beside it, as transformers looks for them."""
TORCH_DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def model_files(folder: Path, dtype: str | None, merged_modules: Sequence[str] = ()) -> dict[str, bytes | Path]:
    """Return name -> content or source of each file to copy from the base's folder; config.json gets `dtype`.

    Weights of modules that are not merged are copied too: without them the folder could not be loaded.
    """
    files: dict[str, bytes | Path] = {}
    code = find_code_files(folder)[0]
    for path in sorted(path for place in [folder, *_find_component_folders(folder)] for path in place.iterdir()):
        name = str(path.relative_to(folder))
        other = path.name in ("provenance.json", ADAPTER_CONFIG) or path.name.startswith(".")
        is_code = path.suffix == ".py"
        skipped = other or not is_small_file(name) or (is_code and name not in code)
        if path.is_file() and not skipped and path.stat().st_size <= MAX_FILE_BYTES and not leads_outside(path, folder):
            files[name] = path
    copied = {name: folder / name for name in find_copied_weights(folder, merged_modules)}
    files |= {name: path for name, path in copied.items() if not leads_outside(path, folder)}
    if dtype and "config.json" in files:
        files["config.json"] = _with_dtype(folder / "config.json", TORCH_DTYPE_NAMES[dtype])
    if "config.json" in files:
        files["config.json"] = _without_weights_name(files["config.json"])
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


def copy_notes(base: Checkpoint, target: OutputPath) -> list[str]:
    """Return what a user should know of the files that go beside an output.

    Raises MagMaxError for a base of several modules whose output is to be one file.
    """
    if not target.is_folder:
        if base.layout.modules:
            modules = ", ".join(base.layout.modules)
            raise MagMaxError(
                f"{target.path}: {base.label} has weights in {modules} too, which one file cannot hold; name a folder"
            )
        return []
    folder = base.small_files_folder()
    if folder is None:
        return []
    left_out = sorted(p.name for p in folder.iterdir() if TRAINING_STATE.fullmatch(p.name) and p.is_file())
    code, missing = find_code_files(folder)
    notes = {
        "code is copied, which runs only with trust_remote_code": code,
        "code that its auto_map names is not there": missing,
        "copied as they are, not merged": find_copied_weights(folder, base.layout.modules),
        "not copied, since they belong to its training": left_out,
    }
    return [f"{base.label}: {what}: {', '.join(names)}" for what, names in notes.items() if names]


def find_code_files(folder: Path) -> tuple[list[str], list[str]]:
    """The Python files that the model's settings name in auto_map, with those that these import; and those missing."""
    found: list[str] = []
    modules: list[str] = []
    for path in sorted(folder.glob("*config.json")):
        modules += CLASS_NAME.findall(json.dumps(_read_json(path).get("auto_map")))
    missing = sorted({f"{module}.py" for module in modules if not (folder / f"{module}.py").is_file()})
    while modules:
        name = f"{modules.pop()}.py"
        if name not in found and (folder / name).is_file():
            found.append(name)
            modules += RELATIVE_IMPORT.findall(read_small(folder / name).decode("utf-8", "replace"))
    generate = folder / CODE_FOLDER
    return sorted([*found, *(f"{CODE_FOLDER}/{path.name}" for path in generate.glob("*.py"))]), missing


def find_copied_weights(folder: Path, merged_modules: Sequence[str]) -> list[str]:
    """The weights of the modules of sentence-transformers in a folder that are not among the merged ones."""
    return [
        f"{module}/{path.name}"
        for module in _read_modules(folder)
        if f"{module}/" not in merged_modules and (folder / module).is_dir()
        for path in sorted((folder / module).iterdir())
        if is_weight_file(path.name)
    ]


def find_library(checkpoint: Checkpoint) -> str:
    """The library that loads a model, as its folder says: a `library_name` of the Hugging Face hub, or ""."""
    folder = checkpoint.small_files_folder()
    if folder is None:
        return ""
    config = _read_json(folder / "config.json")
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if "_class_name" in config:
        return "diffusers"
    if (folder / "open_clip_config.json").is_file() and checkpoint.layout.stem.startswith("open_clip"):
        return "open_clip"
    if "architecture" in config and "model_type" not in config:
        return "timm"
    return "transformers" if config else ""


def _find_component_folders(folder: Path) -> list[Path]:
    """The folders inside that belong to the model: known ones, and the modules that sentence-transformers names."""
    names = COMPONENT_FOLDERS | set(_read_modules(folder))
    there = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return [path for path in there if path.name in names]


def _read_modules(folder: Path) -> list[str]:
    path = folder / "modules.json"
    return find_modules(read_small(path) if path.is_file() else None)


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json_object(read_small(path) if path.is_file() else None)


def _without_weights_name(content: bytes | Path) -> bytes | Path:
    """The config without the name of a weight file, which is not that of the output."""
    config = parse_json_object(content if isinstance(content, bytes) else read_small(content))
    if config.pop("transformers_weights", None) is None:
        return content
    return json.dumps(config, indent=2).encode() + b"\n"


def _with_dtype(path: Path, dtype: str) -> bytes | Path:
    """The config with its dtype replaced, under either name, also in the configs inside of it (text_config, ...)."""
    try:
        text = path.read_text("utf-8")
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        replaced = json.dumps(_replace_dtype(config, dtype), indent=2)
    except (ValueError, RecursionError) as error:
        raise MagMaxError(
            f"{path}: cannot be given the dtype of the output ({error}); repair it, or merge without another dtype"
        ) from error
    return replaced.encode() + b"\n" if any(f'"{name}"' in text for name in DTYPE_SETTINGS) else path


def _replace_dtype(config: Any, dtype: str) -> Any:
    if not isinstance(config, dict):
        return config
    settings = cast("dict[str, Any]", config)
    return {k: dtype if k in DTYPE_SETTINGS else _replace_dtype(v, dtype) for k, v in settings.items()}
