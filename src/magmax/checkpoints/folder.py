"""Folders of weights as Hugging Face lays them out: one file, or shards with an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from numpy.typing import NDArray

from ..errors import MagMaxError, list_problems
from .base import Checkpoint
from .memory import open_state_dict_file
from .remote.remote_file import RemoteFile, map_parallel
from .remote.remote_folder import RemoteFolder, parse_weight_map
from .safetensors import SafetensorsFile

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
SMALL_FILE_ENDINGS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe"})
"""Endings of the small files that make a folder of weights a model: config, tokenizer, vocabulary."""


class WeightsFolder(Checkpoint):
    """Several weight files as one checkpoint; `index_path` says which file holds which tensor, if there is one."""

    def __init__(
        self,
        path: Path | None,
        label: str,
        shards: Sequence[Checkpoint],
        index_path: Path | None,
        remote: RemoteFolder | None = None,
    ) -> None:
        super().__init__(label, {})
        self.path, self._shards, self.index_path, self._remote = path, shards, index_path, remote
        self.url = remote.url if remote else ""
        self._shard_of: dict[str, Checkpoint] = {}
        problems: list[str] = []
        for shard in shards:
            self.metadata |= shard.metadata
            for key, spec in shard.specs.items():
                if key in self._shard_of:
                    problems.append(f"{label}: {key} is in both {self._shard_of[key].label} and {shard.label}")
                self._shard_of[key], self.specs[key] = shard, spec
        self.aliases = {k: v for shard in shards for k, v in shard.aliases.items() if k not in self.specs}
        if problems:
            raise list_problems(f"{label}: its files disagree", problems)

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._shard_of[key].read(key, start, stop)

    def files(self) -> list[Path]:
        return [*([self.index_path] if self.index_path else []), *(f for s in self._shards for f in s.files())]

    def header_digests(self) -> list[str]:
        return [*([""] if self.index_path else []), *(d for s in self._shards for d in s.header_digests())]

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        if self._remote is None:
            index = super().fingerprints(refresh) if self.index_path else {}
            return index | {name: s for shard in self._shards for name, s in shard.fingerprints(refresh).items()}
        fingerprints = map_parallel(lambda shard: shard.fingerprints(refresh), self._shards)
        return self._remote.fingerprints(refresh) | {
            name: stamp for shard in fingerprints for name, stamp in shard.items()
        }

    def small_files_folder(self) -> Path | None:
        return self._remote.download_model_files(SMALL_FILE_ENDINGS) if self._remote else super().small_files_folder()

    def prefetch(self, key: str, start: int, stop: int) -> int:
        return self._shard_of[key].prefetch(key, start, stop)

    def release_prefetched(self, key: str, start: int, stop: int) -> int:
        return self._shard_of[key].release_prefetched(key, start, stop)


def open_folder(path: Path, label: str) -> WeightsFolder:
    """Open the weights in a folder. Raises MagMaxError where none, or no single reading of them, is found."""
    for kind in (".safetensors", ".bin"):
        indexes = sorted(path.glob(f"*{kind}.index.json"))
        if len(indexes) > 1:
            names = ", ".join(i.name for i in indexes)
            raise MagMaxError(f"{label}: has several indexes ({names}); name one folder a model")
        if indexes:
            return _open_indexed(path, label, indexes[0])
        if any(path.glob(f"*{kind}")):
            break
    weight_files = sorted(path.glob("*.safetensors")) or sorted(f for k in PICKLE_SUFFIXES for f in path.glob(f"*{k}"))
    weight_files = [f for f in weight_files if f.name != "training_args.bin"]
    if not weight_files and any(path.glob("*.distcp")):
        raise MagMaxError(f"{label}: holds shards of torch.distributed, but no .metadata; copy or save it again")
    if len(weight_files) != 1:
        what = (
            f"{len(weight_files)} weight files and no index"
            if weight_files
            else "no weights (.safetensors, .bin or .pt)"
        )
        raise MagMaxError(f"{label}: the folder holds {what}; give the file itself, or a folder with an index")
    return WeightsFolder(path, label, [_open_weight_file(weight_files[0])], None)


def _open_weight_file(file: Path) -> Checkpoint:
    label = str(file)
    return open_state_dict_file(file, label) if file.suffix in PICKLE_SUFFIXES else SafetensorsFile(file, label)


def _open_indexed(path: Path, label: str, index: Path) -> WeightsFolder:
    where = read_weight_map(index)
    names = sorted(set(where.values()))
    check_index_names(str(index), names)
    there = {file.name for file in path.iterdir()}
    if problems := [f"{index}: names {n}, which is not there" for n in names if n not in there]:
        raise list_problems(f"{index} cannot be followed", problems)
    shards = [_open_weight_file(path / name) for name in names]
    refuse_wrong_index(str(index), where, dict(zip(names, shards, strict=True)))
    return WeightsFolder(path, label, shards, index)


def open_remote(url: str, label: str) -> Checkpoint:
    """Open a `.safetensors` file on another machine, or a folder of these with its index, or that index itself.

    Raises:
        MagMaxError: nothing there, or another kind of model, which has to be downloaded first.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    if name.endswith(".safetensors"):
        return SafetensorsFile(RemoteFile(url), label)
    if Path(name).suffix in (*PICKLE_SUFFIXES, ".pkl", ".ckpt", ".distcp", ".gguf"):
        raise MagMaxError(f"{label}: only safetensors are read from another machine; download it first")
    away = RemoteFolder(url)
    where = away.read_weight_map()
    if where is None:
        return WeightsFolder(None, label, [SafetensorsFile(RemoteFile(away.find_single_file()))], None, away)
    names = sorted(set(where.values()))
    check_index_names(away.index_url, names)
    shards = map_parallel(lambda name: SafetensorsFile(RemoteFile(away.url_of(name))), names)
    refuse_wrong_index(away.index_url, where, dict(zip(names, shards, strict=True)))
    return WeightsFolder(None, label, shards, None, away)


def check_index_names(index: str, names: Sequence[str]) -> None:
    """Raise MagMaxError where an index names files that are not beside it."""
    problems = [f"{index}: names the file {n!r}, which is outside the folder" for n in names if Path(n).name != n]
    if problems:
        raise list_problems(f"{index} cannot be followed", problems)


def refuse_wrong_index(index: str, weight_map: Mapping[str, str], shards: Mapping[str, Checkpoint]) -> None:
    """Raise MagMaxError where the files of an index do not hold just what it says."""
    problems = [
        f"{index}: places {key} in {name}, which does not hold it"
        for key, name in weight_map.items()
        if key not in shards[name].specs and key not in shards[name].aliases
    ]
    problems += [
        f"{shard.label}: holds {key}, which {PurePosixPath(index).name} does not name there"
        for name, shard in shards.items()
        for key in shard.specs
        if weight_map.get(key) != name
    ]
    if problems:
        raise list_problems(f"{index} does not match its files", problems)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says. Raises MagMaxError where it is none."""
    try:
        return parse_weight_map(index.read_text("utf-8"), str(index))
    except (OSError, ValueError) as error:
        if isinstance(error, MagMaxError):
            raise
        raise MagMaxError(f"{index}: is not an index with a weight_map ({error})") from error
