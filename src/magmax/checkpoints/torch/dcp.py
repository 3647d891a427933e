"""Folders that torch.distributed.checkpoint wrote, read by range, without torch and without running anything.

`.metadata` is a pickle that says, for each tensor, its shape and type and the boxes ("chunks") it was cut into; each
chunk is a torch file of its own somewhere inside one of the `.distcp` files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from ...errors import MagMaxError, list_problems
from ..base import Checkpoint
from ..byte_ranges import RangeFile
from ..dtypes import BITS_PER_ELEMENT, TensorSpec
from ..safetensors import LENGTH_LIMIT
from .pickled_models import MODEL_KEYS
from .safe_unpickler import OpaqueObject, SafeUnpickler, WorkBudget
from .stored_tensors import UNSIGNED_DTYPES, StoredTensor, dtype_of
from .torch_file import TorchFile

METADATA_FILE = ".metadata"
MAX_METADATA_BYTES = 1 << 30
MAX_METADATA_STEPS = 200_000_000
"""Steps of a `.metadata`, which describes each part of each tensor on each of thousands of processes."""
MAX_CHUNKS = 1 << 16
Shape = tuple[int, ...]


class StoredBox(NamedTuple):
    """A box of a tensor, and the bytes of a file that hold it."""

    offsets: Shape
    sizes: Shape
    file: str
    begin: int
    length: int


class IndexBox(NamedTuple):
    """A run of a flattened tensor that is a box: these indices, then a range of the next one, then all of the rest."""

    leading_indices: Shape
    start: int
    stop: int


class DistributedCheckpoint(Checkpoint):
    """A torch.distributed checkpoint, or a part of one, as named tensors.

    Which tensors: those below `part` (a name such as "ema", or "app/model"); without it the model, which is what lies
    below "model" (or another of `MODEL_KEYS`) at any depth, if something does, and else everything that lies at the
    top. Names are those of the model's own state dict: without what leads to it. Everything else, such as the
    optimizer's state, is left out; `notes` say so.

    Memory stays constant: of each chunk exactly what a range needs is read.

    Raises:
        MagMaxError: a `.metadata` that calls what is not allowed; shards that are missing or cut; chunks that do not
            make up their tensor.
    """

    def __init__(self, folder: Path, label: str, part: tuple[str, ...] = ()) -> None:
        super().__init__(label, {})
        self.path = folder.joinpath(*part)
        self._metadata = folder / METADATA_FILE
        source = RangeFile(self._metadata)
        self._stamps[str(self._metadata)] = source.stamp
        if source.size > MAX_METADATA_BYTES:
            raise MagMaxError(f"{self._metadata}: has {source.size:,} bytes, too many for the metadata of a checkpoint")
        content = source.read_bytes(0, source.size)
        self._digest = xxhash.xxh3_128_hexdigest(content)
        metadata = _read_metadata(content, str(self._metadata))
        chosen = _select_entries(metadata, part, label)
        self._chunks: dict[str, list[StoredBox]] = {}
        problems: list[str] = []
        for name, key in chosen.items():
            if name in metadata.tensors:
                self.specs[key] = metadata.tensors[name][0]
                self._chunks[key], problems_here = _locate_chunks(name, metadata, label)
                problems += problems_here
        self._required_sizes: dict[str, int] = {}
        """Each file that is needed, and how many bytes it must have."""
        for chunk in (c for chunks in self._chunks.values() for c in chunks):
            self._required_sizes[chunk.file] = max(chunk.begin + chunk.length, self._required_sizes.get(chunk.file, 0))
        self._open_files: dict[str, RangeFile] = {}
        problems += self._check_files(folder)
        if problems:
            raise list_problems(f"{label} is not whole", problems)
        if not self.specs:
            raise MagMaxError(f"{label}: holds no tensor of a model")
        self._chunk_tensors: dict[tuple[str, int], StoredTensor] = {}
        self._add_notes(metadata, chosen)

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        spec = self.specs[key]
        if spec.is_mergeable:
            return self._read_elements(key, start, stop).view(spec.storage_dtype)
        size = BITS_PER_ELEMENT[spec.dtype] // 8
        first = start // size
        units = self._read_elements(key, first, -(-stop // size)).view(np.uint8)
        return units[start - first * size : stop - first * size]

    def files(self) -> list[Path]:
        return [self._metadata, *(self._metadata.parent / name for name in self._required_sizes)]

    def header_digests(self) -> list[str]:
        return [self._digest, *("" for _ in self._required_sizes)]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: another process opens it again."""
        return {**self.__dict__, "_metadata": self._metadata.absolute(), "_open_files": {}, "_chunk_tensors": {}}

    def _read_elements(self, key: str, start: int, stop: int) -> NDArray[Any]:
        spec = self.specs[key]
        elements = np.empty(stop - start, UNSIGNED_DTYPES[BITS_PER_ELEMENT[spec.dtype] // 8])
        at = 0
        for box in split_into_boxes(spec.shape, start, stop):
            depth = len(box.leading_indices)
            shape = (box.stop - box.start, *spec.shape[depth + 1 :])
            count = math.prod(shape)
            part = elements[at : at + count].reshape(shape)
            for chunk in self._chunks[key]:
                self._copy_chunk(key, chunk, box, part)
            at += count
        return elements

    def _copy_chunk(self, key: str, chunk: StoredBox, box: IndexBox, out: NDArray[Any]) -> None:
        """Put what `chunk` has of `box` into `out`, which is that box of the tensor."""
        if not chunk.offsets:
            out[:] = self._chunk_tensor(key, chunk).read_elements(0, 1)
            return
        depth = len(box.leading_indices)
        fixed = zip(box.leading_indices, chunk.offsets, chunk.sizes, strict=False)
        first = max(box.start, chunk.offsets[depth])
        last = min(box.stop, chunk.offsets[depth] + chunk.sizes[depth])
        if first >= last or not all(offset <= i < offset + size for i, offset, size in fixed):
            return
        inner = chunk.sizes[depth + 1 :]
        row = math.prod(inner)
        at = 0
        for i, offset, size in zip((*box.leading_indices, first), chunk.offsets, chunk.sizes, strict=False):
            at = at * size + i - offset
        content = self._chunk_tensor(key, chunk).read_elements(at * row, (at + last - first) * row)
        where = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[depth + 1 :], inner, strict=True))
        out[(slice(first - box.start, last - box.start), *where)] = content.reshape(last - first, *inner)

    def _chunk_tensor(self, key: str, chunk: StoredBox) -> StoredTensor:
        """A chunk's own tensor, once its headers are read."""
        place = chunk.file, chunk.begin
        if place not in self._chunk_tensors:
            label = f"{self._metadata.parent / chunk.file}, at byte {chunk.begin:,}"
            torch_file = TorchFile(self._open_file(chunk.file), chunk.begin, chunk.length, label)
            spec = TensorSpec(self.specs[key].dtype, chunk.sizes)
            if not isinstance(torch_file.root, StoredTensor) or torch_file.root.spec != spec:
                has = torch_file.root.spec if isinstance(torch_file.root, StoredTensor) else "no tensor"
                raise MagMaxError(f"{label}: holds {has}, but {spec} was promised for a part of {key}")
            self._chunk_tensors[place] = torch_file.locate_tensor(torch_file.root)
        return self._chunk_tensors[place]

    def _open_file(self, name: str) -> RangeFile:
        if name not in self._open_files:
            self._open_files[name] = RangeFile(self._metadata.parent / name)
        return self._open_files[name]

    def _check_files(self, folder: Path) -> list[str]:
        """Return what is wrong with the shards' files, as far as their sizes tell."""
        problems: list[str] = []
        for name, needed in sorted(self._required_sizes.items()):
            if Path(name).name != name:
                problems.append(f"{self._metadata}: names the file {name!r}, which is outside the folder")
            elif not (folder / name).is_file():
                problems.append(f"{self._metadata}: names {name}, which is not there; copy the whole folder again")
            elif (size := (folder / name).stat().st_size) < needed:
                problems.append(f"{folder / name}: has {size:,} bytes, but {needed:,} were promised; copy it again")
        return problems

    def _add_notes(self, metadata: DcpMetadata, selected: Mapping[str, str]) -> None:
        if left := [name for name in metadata.tensors if name not in selected]:
            tops = sorted({metadata.paths.get(name, (name,))[0] for name in left})
            more = ", ..." * (len(tops) > 5)
            self.notes.append(
                f"{self.label}: {len(left)} tensors beside the model left out ({', '.join(tops[:5])}{more})"
            )
        if inside := [name for name in metadata.non_tensors if name in selected]:
            self.notes.append(f"{self.label}: {', '.join(inside[:5])}: no tensors, left out")


def split_into_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[IndexBox]:
    """Elements start..stop of a flattened tensor as boxes, in order: at most two for each dimension but the last."""
    if start >= stop:
        return
    row = math.prod(shape[1:])
    if len(shape) < 2:
        yield IndexBox((), start, stop)
        return
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _boxes_in_row(first, shape, head, tail)
        return
    if head:
        yield from _boxes_in_row(first, shape, head, row)
        first += 1
    if first < last:
        yield IndexBox((), first, last)
    yield from _boxes_in_row(last, shape, 0, tail)


def _boxes_in_row(row: int, shape: Sequence[int], start: int, stop: int) -> Iterator[IndexBox]:
    return (
        IndexBox((row, *box.leading_indices), box.start, box.stop) for box in split_into_boxes(shape[1:], start, stop)
    )


class DcpMetadata(NamedTuple):
    """The content of a `.metadata` file.

    Attributes:
        tensors: name -> spec and the (offsets, sizes) of its chunks.
        non_tensors: the names of what is no tensor.
        paths: name -> where it was in the nested state dict, as far as it is told.
        locations: (name, offsets) -> file, first byte, length.
    """

    tensors: dict[str, tuple[TensorSpec, list[tuple[Shape, Shape]]]]
    non_tensors: list[str]
    paths: dict[str, tuple[str, ...]]
    locations: dict[tuple[str, Shape], tuple[str, int, int]]


def _read_metadata(content: bytes, label: str) -> DcpMetadata:
    """Parse a `.metadata`. Raises MagMaxError for any pickle that is not one."""
    budget = WorkBudget(label, MAX_METADATA_STEPS)
    root = SafeUnpickler(io.BytesIO(content), label, {}, budget=budget, max_bytes=MAX_METADATA_BYTES).load()
    metadata = DcpMetadata({}, [], {}, {})
    try:
        if not isinstance(root, OpaqueObject) or not root.name.endswith(".Metadata"):
            raise TypeError("it holds no Metadata")
        whole = root.attributes
        for name, entry in whole["state_dict_metadata"].items():
            if not isinstance(entry, OpaqueObject) or "chunks" not in entry.attributes:
                metadata.non_tensors.append(str(name))
                continue
            size, properties = _parse_shape(entry.attributes["size"]), entry.attributes["properties"]
            chunks = [
                (_parse_shape(c.attributes["offsets"]), _parse_shape(c.attributes["sizes"]))
                for c in entry.attributes["chunks"]
            ]
            metadata.tensors[str(name)] = TensorSpec(dtype_of(properties.state[0]), size), chunks
        for index, info in whole["storage_data"].items():
            at, where = index.attributes, info.attributes
            if where.get("transform_descriptors"):
                raise TypeError(f"{at['fqn']} was written through {where['transform_descriptors']}")
            place = str(where["relative_path"]), int(where["offset"]), int(where["length"])
            metadata.locations[str(at["fqn"]), _parse_shape(at.get("offset") or ())] = place
        paths = whole.get("planner_data")
        if isinstance(paths, dict):
            for name, path in cast("dict[Any, Any]", paths).items():
                metadata.paths[str(name)] = tuple(str(part) for part in path)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise MagMaxError(
            f"{label}: is not the metadata of a torch.distributed checkpoint that can be read ({error}); "
            "convert it where it was made: torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        ) from error
    return metadata


def _parse_shape(value: Any) -> Shape:
    if not isinstance(value, tuple) or any(
        type(n) is not int or not 0 <= n < LENGTH_LIMIT for n in cast("Shape", value)
    ):
        raise TypeError("a shape that is none")
    return cast("Shape", value)


def _select_entries(metadata: DcpMetadata, part: tuple[str, ...], label: str) -> dict[str, str]:
    """The entries below `part`, or those of the model: name in the checkpoint -> name in the model's state dict."""
    names = [*metadata.tensors, *metadata.non_tensors]
    paths = {name: metadata.paths.get(name, (name,)) for name in names}
    if part:
        flat = ".".join(part) + "."
        selected = {name: name.removeprefix(flat) for name in names if name.startswith(flat)}
        if not selected.keys() & metadata.tensors.keys():
            raise MagMaxError(f"{label}: holds nothing below {'/'.join(part)}; {_list_parts(metadata)}")
        return selected
    holders = {
        path[:depth]
        for path in (paths[name] for name in metadata.tensors)
        for depth in range(1, len(path))
        if path[depth - 1] in MODEL_KEYS
    }
    shortest = min((len(holder) for holder in holders), default=0)
    above = sorted(holder for holder in holders if len(holder) == shortest)
    if len(above) > 1:
        raise MagMaxError(f"{label}: holds several models; {_list_parts(metadata)}")
    holder = above[0] if above else ()
    if metadata.tensors and not holder and all(len(paths[name]) > 1 for name in metadata.tensors):
        raise MagMaxError(f"{label}: which part of it is the model cannot be told; {_list_parts(metadata)}")
    return {
        name: ".".join(path[shortest:])
        for name, path in paths.items()
        if (path[:shortest] == holder if holder else len(path) == 1)
    }


def _list_parts(metadata: DcpMetadata) -> str:
    paths = [metadata.paths.get(name, (name,)) for name in metadata.tensors]
    parts = sorted({"/".join(path[:depth]) for path in paths for depth in (1, 2) if len(path) > depth})
    return f"add one of its parts to the path: {', '.join(parts[:20]) or 'it has none'}"


def _locate_chunks(name: str, metadata: DcpMetadata, label: str) -> tuple[list[StoredBox], list[str]]:
    """A tensor's chunks that hold something, and what is wrong with them."""
    spec, cuts = metadata.tensors[name]
    chunks: list[StoredBox] = []
    for offsets, sizes in cuts:
        if 0 in sizes:
            continue
        place = metadata.locations.get((name, offsets)) or metadata.locations.get(
            (name, ()) if not any(offsets) else ("", ())
        )
        if place is None:
            return [], [f"{label}: does not say where the part of {name} from {list(offsets)} on is"]
        chunks.append(StoredBox(offsets, sizes, *place))
    if len(chunks) > MAX_CHUNKS:
        return [], [f"{label}: cuts {name} into {len(chunks):,} parts, where {MAX_CHUNKS:,} are the most"]
    if spec.numel >= LENGTH_LIMIT:
        return [], [f"{label}: describes {name} with more elements than any file can hold"]
    if any(len(c.offsets) != len(spec.shape) or len(c.sizes) != len(spec.shape) for c in chunks):
        return [], [f"{label}: the parts of {name} have not its {len(spec.shape)} dimensions"]
    low = np.array([c.offsets for c in chunks], np.int64).reshape(len(chunks), len(spec.shape))
    high = low + np.array([c.sizes for c in chunks], np.int64).reshape(low.shape)
    covered = sum(math.prod(c.sizes) for c in chunks)
    beyond = bool((high > np.array(spec.shape, np.int64)).any())
    twice = any(((low[:n] < high[n]) & (low[n] < high[:n])).all(1).any() for n in range(len(chunks)))
    if covered != spec.numel or beyond or twice:
        return [], [f"{label}: the parts of {name}, {spec}, do not make it up: {covered:,} of {spec.numel:,} elements"]
    return sorted(chunks), []


def find_dcp(path: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The folder of a torch.distributed checkpoint and the part of it that a path names, if it names one."""
    for folder in (path, *path.parents):
        if (folder / METADATA_FILE).is_file():
            weights = any(True for kind in ("*.safetensors", "*.bin") for _ in folder.glob(kind))
            return None if weights else (folder, path.parts[len(folder.parts) :])
        if folder.exists():
            return None
    return None
