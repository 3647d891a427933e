"""Folders of weights as Hugging Face lays them out: one file, or shards with an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from numpy.typing import NDArray

from ..errors import MagMaxError, listed
from .base import Checkpoint
from .memory import open_pickle
from .remote.remote_file import RemoteFile, in_parallel
from .remote.remote_folder import RemoteFolder, weight_map_of
from .safetensors import SafetensorsFile

PICKLES = (".pt", ".pth", ".bin")
COMPANIONS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe"})
"""Endings of the small files that make a folder of weights a model: config, tokenizer, vocabulary."""


class Folder(Checkpoint):
    """Several weight files as one checkpoint; `index` says which file holds which tensor, if there is one."""

    def __init__(
        self,
        path: Path | None,
        label: str,
        shards: Sequence[Checkpoint],
        index: Path | None,
        away: RemoteFolder | None = None,
    ) -> None:
        super().__init__(label, {})
        self.path, self._shards, self.index, self._away = path, shards, index, away
        self.url = away.url if away else ""
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

    def fingerprints(self, again: bool = False) -> dict[str, list[object]]:
        if self._away is None:
            return super().fingerprints(again)
        found = in_parallel(lambda shard: shard.fingerprints(again), self._shards)
        return self._away.fingerprints(again) | {name: stamp for shard in found for name, stamp in shard.items()}

    def folder(self) -> Path | None:
        return self._away.companions(COMPANIONS) if self._away else super().folder()

    def hold(self, key: str, start: int, stop: int) -> int:
        return self._holder[key].hold(key, start, stop)

    def release(self, key: str, start: int, stop: int) -> int:
        return self._holder[key].release(key, start, stop)


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
    refuse_outside(str(index), names)
    there = {file.name for file in path.iterdir()}
    if problems := [f"{index}: names {n}, which is not there" for n in names if n not in there]:
        raise listed(f"{index} cannot be followed", problems)
    shards = [_open_file(path / name) for name in names]
    refuse_mismatch(str(index), where, dict(zip(names, shards, strict=True)))
    return Folder(path, label, shards, index)


def open_remote(url: str, label: str) -> Checkpoint:
    """Open a `.safetensors` file on another machine, or a folder of these with its index, or that index itself.

    Raises:
        MagMaxError: nothing there, or another kind of model, which has to be downloaded first.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    if name.endswith(".safetensors"):
        return SafetensorsFile(RemoteFile(url), label)
    if Path(name).suffix in (*PICKLES, ".pkl", ".ckpt", ".distcp", ".gguf"):
        raise MagMaxError(f"{label}: only safetensors are read from another machine; download it first")
    away = RemoteFolder(url)
    where = away.weight_map()
    if where is None:
        return Folder(None, label, [SafetensorsFile(RemoteFile(away.only()))], None, away)
    names = sorted(set(where.values()))
    refuse_outside(away.index_url, names)
    shards = in_parallel(lambda name: SafetensorsFile(RemoteFile(away.inside(name))), names)
    refuse_mismatch(away.index_url, where, dict(zip(names, shards, strict=True)))
    return Folder(None, label, shards, None, away)


def refuse_outside(index: str, names: Sequence[str]) -> None:
    """Raise MagMaxError where an index names files that are not beside it."""
    problems = [f"{index}: names the file {n!r}, which is outside the folder" for n in names if Path(n).name != n]
    if problems:
        raise listed(f"{index} cannot be followed", problems)


def refuse_mismatch(index: str, where: Mapping[str, str], held: Mapping[str, Checkpoint]) -> None:
    """Raise MagMaxError where the files of an index do not hold just what it says."""
    problems = [
        f"{index}: places {key} in {name}, which does not hold it"
        for key, name in where.items()
        if key not in held[name].specs and key not in held[name].aliases
    ]
    problems += [
        f"{shard.label}: holds {key}, which {PurePosixPath(index).name} does not name there"
        for name, shard in held.items()
        for key in shard.specs
        if where.get(key) != name
    ]
    if problems:
        raise listed(f"{index} does not match its files", problems)


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says. Raises MagMaxError where it is none."""
    try:
        return weight_map_of(index.read_text("utf-8"), str(index))
    except (OSError, ValueError) as error:
        if isinstance(error, MagMaxError):
            raise
        raise MagMaxError(f"{index}: is not an index with a weight_map ({error})") from error
