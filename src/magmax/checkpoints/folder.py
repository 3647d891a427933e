"""Folders of weights as Hugging Face lays them out: one file, or shards with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import MagMaxError, listed
from .base import Checkpoint
from .memory import open_pickle
from .safetensors import SafetensorsFile, is_string_map

PICKLES = (".pt", ".pth", ".bin")
COMPANIONS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe"})
"""Endings of the small files that make a folder of weights a model: config, tokenizer, vocabulary."""


class Folder(Checkpoint):
    """Several weight files as one checkpoint; `index` says which file holds which tensor, if there is one."""

    def __init__(self, path: Path, label: str, shards: list[Checkpoint], index: Path | None) -> None:
        super().__init__(label, {})
        self.path, self._shards, self.index = path, shards, index
        self._holder: dict[str, Checkpoint] = {}
        problems: list[str] = []
        for shard in shards:
            self.metadata |= shard.metadata
            for key, spec in shard.specs.items():
                if key in self._holder:
                    problems.append(f"{label}: {key} is in both {self._holder[key].label} and {shard.label}")
                self._holder[key], self.specs[key] = shard, spec
        self.aliases = {k: v for shard in shards for k, v in shard.aliases.items() if k not in self.specs}
        if problems:
            raise listed(f"{label}: its files disagree", problems)

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._holder[key].read(key, start, stop)

    def files(self) -> list[Path]:
        return [*([self.index] if self.index else []), *(f for s in self._shards for f in s.files())]

    def header_digests(self) -> list[str]:
        return [*([""] if self.index else []), *(d for s in self._shards for d in s.header_digests())]


def open_folder(path: Path, label: str) -> Folder:
    """Open the weights in a folder. Raises MagMaxError where none, or no single reading of them, is found."""
    for kind in (".safetensors", ".bin"):
        indexes = sorted(path.glob(f"*{kind}.index.json"))
        if len(indexes) > 1:
            names = ", ".join(i.name for i in indexes)
            raise MagMaxError(f"{label}: has several indexes ({names}); name one folder a model")
        if indexes:
            return _indexed(path, label, indexes[0])
        if any(path.glob(f"*{kind}")):
            break
    found = sorted(path.glob("*.safetensors")) or sorted(f for k in PICKLES for f in path.glob(f"*{k}"))
    found = [f for f in found if f.name != "training_args.bin"]
    if not found and any(path.glob("*.distcp")):
        raise MagMaxError(f"{label}: holds shards of torch.distributed, but no .metadata; copy or save it again")
    if len(found) != 1:
        what = f"{len(found)} weight files and no index" if found else "no weights (.safetensors, .bin or .pt)"
        raise MagMaxError(f"{label}: the folder holds {what}; give the file itself, or a folder with an index")
    return Folder(path, label, [_open_file(found[0])], None)


def _open_file(file: Path) -> Checkpoint:
    label = str(file)
    return open_pickle(file, label) if file.suffix in PICKLES else SafetensorsFile(file, label)


def _indexed(path: Path, label: str, index: Path) -> Folder:
    where = weight_map(index)
    names = sorted(set(where.values()))
    problems = [f"{index}: names the file {n!r}, which is outside the folder" for n in names if Path(n).name != n]
    if not problems:
        there = {file.name for file in path.iterdir()}
        problems = [f"{index}: names {n}, which is not there" for n in names if n not in there]
    if problems:
        raise listed(f"{index} cannot be followed", problems)
    shards = [_open_file(path / name) for name in names]
    held = dict(zip(names, shards, strict=True))
    problems = [
        f"{index}: places {key} in {name}, which does not hold it"
        for key, name in where.items()
        if key not in held[name].specs and key not in held[name].aliases
    ]
    problems += [
        f"{path / name}: holds {key}, which {index.name} does not name there"
        for name, shard in held.items()
        for key in shard.specs
        if where.get(key) != name
    ]
    if problems:
        raise listed(f"{index} does not match its files", problems)
    return Folder(path, label, shards, index)


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says. Raises MagMaxError where it is none."""
    try:
        where: Any = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MagMaxError(f"{index}: is not an index with a weight_map ({error})") from error
    if not is_string_map(where) or not where:
        raise MagMaxError(f"{index}: its weight_map is not a map of tensor names to file names")
    return where
