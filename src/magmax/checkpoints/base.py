"""What every kind of checkpoint can do: name its tensors and read any range of one."""

from __future__ import annotations

import json
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple, cast

from numpy.typing import NDArray

from ..errors import MagMaxError
from .dtypes import TensorSpec

HUB_PREFIX = "hf://"
MODEL_CONFIG_KEYS = ("model_type", "architectures", "architecture", "_class_name")
"""What one of transformers, timm and diffusers writes into the config.json of a model."""
MAX_SMALL_FILE_BYTES = 200_000_000
"""The most that is read of a file that is taken into memory whole."""


class WeightLayout(NamedTuple):
    """The names of a model's weight files in a folder.

    Attributes:
        stem: how they begin, which is what a library looks for.
        modules: the folders that hold weights of the modules of sentence-transformers, each with a / at its end; the
            names of their tensors begin with it.
    """

    stem: str = "model"
    modules: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, name: str) -> WeightLayout:
        """The layout of an output that a library finds where it found a file of this name."""
        stems = {"diffusion_pytorch_model": "diffusion_pytorch_model", "open_clip_": "open_clip_model"}
        stems["consolidated"] = "consolidated"
        return cls(next((stem for start, stem in stems.items() if name.startswith(start)), "model"))


def find_name_problem(name: str) -> str | None:
    """Return why a tensor cannot have this name, if so."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "has a name with half a character (a lone surrogate), which no file can store; rename it"
    return None


class Checkpoint(ABC):
    """Named tensors, read in flat ranges; nothing is held in memory beyond their names and shapes.

    Attributes:
        label: what messages call it (its path as given, or a word such as "model 2").
        path: the file or folder on this machine, or None.
        url: where it is on another machine, without anything secret, or "".
        specs: key -> (dtype, shape), in the order of the file.
        aliases: key -> the key in `specs` whose storage it shares (tied weights).
        metadata: the header's own strings.
        notes: what a user should know of how it was read.
        origin: its id on the hub with the commit, as hf://..., or those of base+adapter; "" for what never was there.
        layout: the names of its weight files, as an output like it should have them.
        is_task_vector: whether the floating tensors are task vectors, to be added to a base.
    """

    label: str
    path: Path | None = None
    url: str = ""
    specs: dict[str, TensorSpec]
    aliases: dict[str, str]
    metadata: dict[str, str]
    notes: list[str]
    origin: str = ""
    layout: WeightLayout = WeightLayout()
    is_task_vector: bool = False

    def __init__(self, label: str, specs: dict[str, TensorSpec]) -> None:
        self.label, self.specs, self.aliases, self.metadata, self.notes = label, specs, {}, {}, []
        self._stamps: dict[str, list[object]] = {}

    @abstractmethod
    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        """Units start..stop of the flattened tensor, in `specs[key].storage`; the caller may overwrite them."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file on this machine that the tensors and their names come from."""

    @property
    def source(self) -> str:
        """Return what a name for it is made from: where it was downloaded from, its path, or its label."""
        last = self.origin.rpartition("+")[2]
        return last if last.startswith(HUB_PREFIX) else str(self.path or self.url or self.label)

    @property
    def is_on_disk(self) -> bool:
        """Return whether it is in files, here or elsewhere, and not in memory."""
        return self.path is not None or bool(self.url)

    @property
    def output_specs(self) -> dict[str, TensorSpec]:
        """The tensors as an output stores them: as in `specs`, or narrower where these are computed in a wider type."""
        return self.specs

    @property
    def remote_bytes(self) -> int:
        """Return how many of its bytes come from another machine, as far as tensors go."""
        return self.nbytes if self.url else 0

    def small_files_folder(self) -> Path | None:
        """The folder on this machine with the small files that belong to the model, if it has any.

        A file has those of its folder where this is a model's.
        """
        if self.path is None or self.path.is_dir():
            return self.path
        return self.path.parent if describes_model(self.path.parent) else None

    def read_small_file(self, name: str) -> bytes | None:
        """Read a small file of the model, such as config.json, if it has one."""
        folder = self.small_files_folder()
        return read_small(folder / name) if folder is not None and (folder / name).is_file() else None

    def read_config(self) -> dict[str, Any]:
        """Read the model's config.json; empty where it has none that is a JSON object."""
        return parse_json_object(self.read_small_file("config.json"))

    def header_digests(self) -> list[str]:
        """One digest per file of `files()` of what can be known without reading tensors."""
        return ["" for _ in self.files()]

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        """File -> its stamp (or size and ETag), and the digest of its header: these tell that it is unchanged.

        Args:
            refresh: ask the disk or another machine again, instead of taking the answer of when the file was opened.
        """
        fingerprints: dict[str, list[object]] = {}
        for path, header in zip(self.files(), self.header_digests(), strict=True):
            now = file_stamp(path) if refresh or str(path) not in self._stamps else []
            fingerprints[str(path)] = [*(now if refresh else self._stamps.setdefault(str(path), now)), header]
        return fingerprints

    def check_unchanged(self) -> None:
        """Raise MagMaxError if a file is no longer what it was when it was opened."""
        before, now = self.fingerprints(), self.fingerprints(refresh=True)
        for name in before:
            if before[name] != now[name]:
                raise changed_file_error(name)

    def prefetch(self, key: str, start: int, stop: int) -> int:
        """Begin to fetch units start..stop, which are to be read soon, and keep them until `release`.

        Returns the bytes of memory that are taken for it: none where files are on this machine, the default.
        """
        return 0

    def release_prefetched(self, key: str, start: int, stop: int) -> int:
        """Give up what `prefetch` kept, once for each call of it; returns the bytes of memory that this frees."""
        return 0

    def spec(self, key: str) -> TensorSpec:
        return self.specs[self.resolve_alias(key)]

    def find_spec(self, key: str) -> TensorSpec | None:
        """Return the type and shape of a possibly tied tensor; None where there is none of this name."""
        return self.specs.get(self.resolve_alias(key))

    def resolve_alias(self, key: str) -> str:
        """The key under which a possibly tied tensor is stored."""
        return self.aliases.get(key, key)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label!r}, {len(self.specs)} tensors, {self.nbytes:,} bytes)"


def describes_model(folder: Path) -> bool:
    """Return whether a folder is that of one model: many other programs have a config.json too."""
    if (folder / "open_clip_config.json").is_file():
        return True
    config = folder / "config.json"
    return any(key in parse_json_object(read_small(config) if config.is_file() else None) for key in MODEL_CONFIG_KEYS)


def read_small(path: Path) -> bytes:
    """Read a file whole. Raises OSError for none, MagMaxError for a pipe, which has no end, and one far too large."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise MagMaxError(f"{path}: is not a regular file; put the file itself there, or delete it")
        if status.st_size > MAX_SMALL_FILE_BYTES:
            raise MagMaxError(f"{path}: has more than {MAX_SMALL_FILE_BYTES:,} bytes; it is damaged: copy it again")
        return file.read()


def parse_json_object(content: bytes | None) -> dict[str, Any]:
    """Return the object that a JSON text is; an empty one for anything else."""
    try:
        parsed: Any = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}


class CheckpointView(Checkpoint):
    """A checkpoint that presents the tensors of another otherwise; its files, and what belongs to them, are the
    other's.
    """

    def __init__(self, checkpoint: Checkpoint, specs: dict[str, TensorSpec]) -> None:
        super().__init__(checkpoint.label, specs)
        self.path, self.url, self.origin = checkpoint.path, checkpoint.url, checkpoint.origin
        self.layout, self.is_task_vector = checkpoint.layout, checkpoint.is_task_vector
        self.notes = list(checkpoint.notes)
        self.metadata = {k: v for k, v in checkpoint.metadata.items() if k not in checkpoint.aliases}
        self._checkpoint = checkpoint

    def files(self) -> list[Path]:
        return self._checkpoint.files()

    def header_digests(self) -> list[str]:
        return self._checkpoint.header_digests()

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        return self._checkpoint.fingerprints(refresh)

    def small_files_folder(self) -> Path | None:
        return self._checkpoint.small_files_folder()


def file_stamp(path: Path) -> list[object]:
    """What the system says of a file, by which a change is noticed: size, time of modification, inode, time of change.

    The last two tell of another file under the same name, and of a time of modification that was set back.
    """
    try:
        status = path.stat()
    except OSError as error:
        return [error.strerror]
    return stamp_of(status)


def stamp_of(status: os.stat_result) -> list[object]:
    """The stamp of a file, from what `os.stat` returned."""
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def changed_file_error(label: str) -> MagMaxError:
    """The error for a file that is no longer what it was when it was opened."""
    return MagMaxError(f"{label}: changed while it was read; wait until nothing writes it, and start again")
