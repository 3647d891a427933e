"""Folders of weights as Hugging Face lays them out: one file, or shards with an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from numpy.typing import NDArray

from ..errors import MagMaxError, list_problems
from .base import Checkpoint, WeightLayout, parse_json_object, read_small
from .lora.peft import ADAPTER_CONFIG, WEIGHT_FILES
from .remote.remote_file import RemoteFile, map_parallel
from .remote.remote_folder import RemoteFolder, RemoteModelFile
from .safetensors import SafetensorsFile, check_index_names, read_weight_map, refuse_wrong_index
from .torch.pickled_models import TorchStateDict

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
SMALL_FILE_ENDINGS = (
    ".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe", ".codes", ".tokenizer", ".py",
)  # fmt: skip
"""Endings of the small files that make a folder of weights a model: config, tokenizer, vocabulary, code."""
LICENCE_NAME = re.compile(r"(licen[cs]e|notice|copying|copyright|use_policy)([._-].*)?", re.IGNORECASE)
TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state)([._-].*)?"
    r"|(all|train|eval|predict|test)_results.*\.(json|txt)"
)
"""Files of a training beside the weights: no weights, and nothing that the model needs."""
TRANSFORMERS_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
DIFFUSERS_NAMES = (
    "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model.bin",
)  # fmt: skip
"""What a library loads from a folder: the first of these that is there."""
OTHER_NAMES = {
    "open_clip_model.safetensors": "open_clip", "open_clip_pytorch_model.bin": "open_clip",
    "consolidated.safetensors.index.json": "Mistral's code", "consolidated.safetensors": "Mistral's code",
}  # fmt: skip
INDEX_NAME = re.compile(r"(.+)\.(safetensors|bin)\.index(\.\w+)?\.json")
SHARD_NAME = re.compile(r"(.*?)[-_.](\d+)-of-(\d+)(?=[-_.]).*")
LISTED_NAMES = 5
TRAINING_FOLDER = re.compile(r"\..*|checkpoint-\d+|global_step\d+|onnx|openvino|runs")
OUTPUT_NAMES = ("README.md", "provenance.json")
"""What an output has beside weights, so that no module can be called so."""
DEFAULT_ADAPTER = "default"
"""The name that PEFT gives to an adapter, and some trainers to its folder."""


class WeightPart(NamedTuple):
    """The weight files of a model, or of one of its modules.

    Attributes:
        files: file name -> the opened file.
        index_path: the index on this machine, if there is one.
        weight_map: tensor name -> file name, as the index says.
        prefix: what the names of the tensors get before them.
    """

    files: Mapping[str, Checkpoint]
    index_path: Path | None = None
    weight_map: Mapping[str, str] | None = None
    prefix: str = ""

    @property
    def paths(self) -> list[Path]:
        """The files on this machine, the index first."""
        return [*filter(None, [self.index_path]), *(path for file in self.files.values() for path in file.files())]


class WeightsFolder(Checkpoint):
    """Several weight files as one checkpoint; an index, where there is one, decides which tensors there are."""

    def __init__(
        self, path: Path | None, label: str, parts: Sequence[WeightPart], remote: RemoteFolder | None = None
    ) -> None:
        super().__init__(label, {})
        self.path, self._parts, self._remote = path, parts, remote
        self.url = remote.url if remote else ""
        self._files = [file for part in parts for file in part.files.values()]
        self._places: dict[str, tuple[Checkpoint, str]] = {}
        problems: list[str] = []
        for part in parts:
            problems += self._add_part(part)
        if problems:
            raise list_problems(f"{label}: its files disagree", problems)
        modules = tuple(part.prefix for part in parts if part.prefix)
        self.layout = WeightLayout.of_file(next(iter(parts[0].files)))._replace(modules=modules)

    def _add_part(self, part: WeightPart) -> list[str]:
        """Take in the tensors of a part that its index names, and return what is wrong with them."""
        problems: list[str] = []
        for file_name, file in part.files.items():

            def is_placed(name: str, there: str = file_name) -> bool:
                return part.weight_map is None or part.weight_map.get(name) == there

            aliases = {alias: key for alias, key in file.aliases.items() if is_placed(alias)}
            tied = set(aliases.values())
            placed = {key: spec for key, spec in file.specs.items() if is_placed(key) or key in tied}
            for key, spec in placed.items():
                if (name := part.prefix + key) in self._places:
                    problems.append(f"{self.label}: {name} is in both {self._places[name][0].label} and {file.label}")
                self._places[name], self.specs[name] = (file, key), spec
            if extra := [key for key in file.specs if key not in placed]:
                shown = ", ".join(extra[:5]) + ", ..." * (len(extra) > 5)
                self.notes.append(f"{file.label}: left out, since the index does not name them there: {shown}")
            if not part.prefix:
                self.metadata |= {k: v for k, v in file.metadata.items() if k not in file.aliases or k in aliases}
            self.aliases |= {part.prefix + alias: part.prefix + key for alias, key in aliases.items()}
        self.aliases = {alias: key for alias, key in self.aliases.items() if alias not in self.specs}
        return problems

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        file, name = self._places[key]
        return file.read(name, start, stop)

    def files(self) -> list[Path]:
        return [path for part in self._parts for path in part.paths]

    def header_digests(self) -> list[str]:
        digests = [
            [""] * bool(p.index_path) + [d for f in p.files.values() for d in f.header_digests()] for p in self._parts
        ]
        return [digest for each in digests for digest in each]

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        if self._remote is None:
            own = super().fingerprints(refresh)
            return own | {name: stamp for file in self._files for name, stamp in file.fingerprints(refresh).items()}
        fingerprints = map_parallel(lambda file: file.fingerprints(refresh), self._files)
        return self._remote.fingerprints(refresh) | {
            name: stamp for stamps in fingerprints for name, stamp in stamps.items()
        }

    def small_files_folder(self) -> Path | None:
        return self._remote.download_model_files(is_small_file) if self._remote else super().small_files_folder()

    def read_small_file(self, name: str) -> bytes | None:
        return self._remote.read_small_file(name) if self._remote else super().read_small_file(name)

    def prefetch(self, key: str, start: int, stop: int) -> int:
        file, name = self._places[key]
        return file.prefetch(name, start, stop)

    def release_prefetched(self, key: str, start: int, stop: int) -> int:
        file, name = self._places[key]
        return file.release_prefetched(name, start, stop)


def is_small_file(name: str) -> bool:
    """Return whether a file belongs to a model without being weights, by its name: config, tokenizer, licence, code."""
    name = PurePosixPath(name).name
    if INDEX_NAME.fullmatch(name) or TRAINING_STATE.fullmatch(name):
        return False
    return name.endswith(SMALL_FILE_ENDINGS) or LICENCE_NAME.fullmatch(name) is not None


def is_weight_file(name: str) -> bool:
    """Return whether a file holds weights of a model, by its name."""
    return name.endswith((".safetensors", *PICKLE_SUFFIXES)) and not TRAINING_STATE.fullmatch(name)


def find_shard(name: str) -> tuple[int, int] | None:
    """Return the number of a shard and of how many it is one, as its file name says; None for a whole model's file."""
    match = SHARD_NAME.fullmatch(name)
    return (int(match[2]), int(match[3])) if match and int(match[3]) > 1 else None


def choose_weights(
    names: Iterable[str], read: Callable[[str], bytes | None], label: str, place: str
) -> tuple[str, list[str]]:
    """Return the file or index that holds the weights of a folder, and what the user should know of the choice.

    transformers' and diffusers' own names come first, in their order; otherwise the only one that is there.

    Args:
        names: the files of the folder.
        read: returns the content of one of them, or None.
        label: how messages begin.
        place: what to put before a name to open it.

    Raises:
        MagMaxError: no weights, shards without an index, or several files of which none comes first.
    """
    names = sorted(names)
    indexes = [name for name in names if INDEX_NAME.fullmatch(name)]
    weights = [name for name in names if is_weight_file(name)]
    config = parse_json_object(read("config.json") if "config.json" in names else None)
    if (named := config.get("transformers_weights")) in (*indexes, *weights):
        return str(named), _note_others(label, str(named), "as config.json says", [*indexes, *weights])
    transformers = dict.fromkeys(TRANSFORMERS_NAMES, "transformers")
    diffusers = dict.fromkeys(DIFFUSERS_NAMES, "diffusers")
    known = (diffusers | transformers if "_class_name" in config else transformers | diffusers) | OTHER_NAMES
    shards = [name for name in weights if find_shard(name)]
    is_cut = any(name.endswith(".safetensors") for name in shards) and not any(".safetensors." in n for n in indexes)
    for name, library in known.items():
        if name in names and not (is_cut and ".bin" in name):
            return name, _note_others(label, name, f"as {library} does", [*indexes, *weights])
    if shards and (is_cut or not indexes):
        raise MagMaxError(
            f"{label} holds shards and no index ({shorten(shards)}), so that the rest of the model may be missing; "
            "copy or download the whole folder again"
        )
    for kind in (indexes, [n for n in weights if n.endswith(".safetensors")], weights):
        if len(kind) == 1:
            return kind[0], _note_others(label, kind[0], "", [*indexes, *weights])
        if kind:
            what = "several indexes" if kind is indexes else f"{len(kind)} weight files and no index"
            raise MagMaxError(f"{label} holds {what} ({shorten(kind)}); name one: {place}{kind[0]}")
    raise MagMaxError(f"{label} holds no weights (.safetensors, .bin or .pt); it has {shorten(names) or 'no files'}")


def _note_others(label: str, chosen: str, reason: str, names: Sequence[str]) -> list[str]:
    """Say which weights of a folder are not read: all but the chosen file, or the shards of the chosen index."""
    index = INDEX_NAME.fullmatch(chosen)
    shards = index[1] if index else chosen
    others = [n for n in names if n != chosen and not ((m := SHARD_NAME.fullmatch(n)) and m[1].startswith(shards))]
    if not others:
        return []
    return [f"{label} is read from {chosen}{f', {reason}' * bool(reason)}; left out: {shorten(others)}"]


def shorten(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:LISTED_NAMES]) + ", ..." * (len(names) > LISTED_NAMES)


def find_adapter(names: Sequence[str], label: str) -> str:
    """Return the weight file of the LoRA adapter among the files of a folder, or "" where it is no adapter's folder.

    Optimizer, value head and other files beside it do not matter. Raises MagMaxError for a whole model beside it.
    """
    found = next((name for name in WEIGHT_FILES if name in names), "") if ADAPTER_CONFIG in names else ""
    whole = [name for name in names if name in (*TRANSFORMERS_NAMES, *DIFFUSERS_NAMES)]
    if found and whole:
        raise MagMaxError(
            f"{label} holds an adapter ({found}) and a whole model ({whole[0]}); move one into another folder"
        )
    return found


def find_modules(content: bytes | None) -> list[str]:
    """Return the folders that the modules.json of sentence-transformers names beside the model's own."""
    try:
        modules: Any = json.loads(content or b"[]")
        paths = [str(PurePosixPath(str(module["path"]))) for module in modules]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    names = [path for path in paths if PurePosixPath(path).name == path]
    return [name for name in names if name not in OUTPUT_NAMES and not name.startswith(".")]


def open_folder(path: Path, label: str) -> WeightsFolder:
    """Open the weights in a folder. Raises MagMaxError where none, or no single reading of them, is found."""

    def read(name: str) -> bytes | None:
        return read_small(path / name) if (path / name).is_file() else None

    names = list_files(path)
    modules = [name for name in find_modules(read("modules.json")) if (path / name).is_dir()]
    module_names = {name: [n for n in list_files(path / name) if is_weight_file(n)] for name in modules}
    with_weights = [name for name, files in module_names.items() if files]
    parts: list[WeightPart] = []
    notes: list[str] = []
    if not with_weights or any(map(is_weight_file, names)):
        components = _find_components(path, label, names)
        chosen, notes = choose_weights(names, read, f"{label}: the folder", f"{label}/")
        if others := [name for name in components if name not in with_weights]:
            notes.append(f"{label}: left out, since only the weights beside its config are read: {shorten(others)}")
        parts.append(_open_part(path, chosen))
    for name in with_weights:
        if deeper := sorted(p for p in (path / name).glob("*/*") if is_weight_file(p.name)):
            raise MagMaxError(f"{label}: modules in modules are not supported: {deeper[0].relative_to(path)}")
        chosen, more = choose_weights(module_names[name], lambda _: None, f"{label}/{name}:", f"{label}/{name}/")
        parts.append(_open_part(path / name, chosen, f"{name}/"))
        notes += more
    opened = WeightsFolder(path, label, parts)
    opened.notes[:0] = notes
    return opened


def open_index(path: Path, label: str) -> WeightsFolder:
    """Open the shards that an index names."""
    return WeightsFolder(path.parent, label, [_open_part(path.parent, path.name)])


def list_files(path: Path) -> list[str]:
    """The names of the files in a folder."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_file())


def _find_components(path: Path, label: str, names: Sequence[str]) -> list[str]:
    """Return the folders in a folder that hold weights, but for those of its own training.

    Raises MagMaxError where these are the only weights, or a pipeline's models.
    """
    below = [f for f in path.glob("*/*") if is_weight_file(f.name) and not TRAINING_FOLDER.fullmatch(f.parent.name)]
    components = sorted({file.parent.name for file in below})
    if "model_index.json" in names and components:
        raise MagMaxError(
            f"{label}: is a pipeline of diffusers, several models in one folder ({shorten(components)}); "
            f"merge each by itself: --base {label}/{components[0]}"
        )
    if any(name.endswith(".distcp") for name in names) and not any(map(is_weight_file, names)):
        raise MagMaxError(f"{label}: holds shards of torch.distributed, but no .metadata; copy or save it again")
    if components and not any(map(is_weight_file, names)):
        raise MagMaxError(
            f"{label}: the folder holds no weights, but the folders in it do ({shorten(components)}); "
            f"name one of these: {label}/{components[0]}"
        )
    return components


def _open_part(folder: Path, chosen: str, prefix: str = "") -> WeightPart:
    """Open the file, or all files of the index, in a folder."""
    if not INDEX_NAME.fullmatch(chosen):
        return WeightPart({chosen: _open_weight_file(folder / chosen)}, prefix=prefix)
    index = folder / chosen
    weight_map = read_weight_map(index)
    names = sorted(set(weight_map.values()))
    check_index_names(str(index), names)
    there = {entry.name for entry in folder.iterdir()}
    if problems := [f"{index}: names {name}, which is not there" for name in names if name not in there]:
        raise list_problems(f"{index} cannot be followed", problems)
    files = {name: _open_weight_file(folder / name) for name in names}
    refuse_wrong_index(str(index), weight_map, files)
    return WeightPart(files, index, weight_map, prefix)


def _open_weight_file(file: Path) -> Checkpoint:
    label = str(file)
    return TorchStateDict(file, label) if file.suffix in PICKLE_SUFFIXES else SafetensorsFile(file, label)


def open_remote(url: str, label: str) -> Checkpoint:
    """Open a `.safetensors` file on another machine, or a folder of these with its index, or that index itself.

    Raises:
        MagMaxError: nothing there, or another kind of model, which has to be downloaded first.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    if name.endswith(".safetensors"):
        opened = RemoteModelFile(url, label, is_small_file)
        opened.layout = WeightLayout.of_file(name)
        return opened
    if Path(name).suffix in (*PICKLE_SUFFIXES, ".pkl", ".ckpt", ".distcp", ".gguf"):
        raise MagMaxError(f"{label}: only safetensors are read from another machine; download it first")
    away = RemoteFolder(url)
    known = [n for n in (*TRANSFORMERS_NAMES, *DIFFUSERS_NAMES, *OTHER_NAMES) if ".safetensors" in n]
    names = [away.index_name] if away.index_name else away.find_names(known)
    chosen, notes = choose_weights(names, away.read_small_file, f"{away.url}: the folder", f"{away.url}/")
    if ".safetensors" not in chosen:
        raise MagMaxError(f"{away.url}: the folder holds no safetensors; it is not of safetensors: download it first")
    for name in find_modules(away.read_small_file("modules.json")):
        if away.has_weights_in(name):
            raise MagMaxError(f"{away.url}: holds weights in {name} too; download the folder first")
    opened = WeightsFolder(None, label, [_open_remote_part(away, chosen)], away)
    opened.notes[:0] = notes
    return opened


def _open_remote_part(away: RemoteFolder, chosen: str) -> WeightPart:
    if not INDEX_NAME.fullmatch(chosen):
        return WeightPart({chosen: SafetensorsFile(RemoteFile(away.url_of(chosen)))})
    weight_map = away.read_weight_map(chosen)
    names = sorted(set(weight_map.values()))
    check_index_names(away.index_url, names)
    files = map_parallel(lambda name: SafetensorsFile(RemoteFile(away.url_of(name))), names)
    files = dict(zip(names, files, strict=True))
    refuse_wrong_index(away.index_url, weight_map, files)
    return WeightPart(files, weight_map=weight_map)
