"""The archive of Tunable MagMax: of every task what a preference is likely to need, in far fewer bytes than its model.

A folder: `model.safetensors` (or shards of it) and `archive.json`, which names the tasks, the base and its digest, the
options, and presets. For task t (from 0) and a tensor K of n elements, of which only the entries of largest magnitude
over the whole model are kept:

    t/kept/K     U8, ceil(n / 8)       a bit for each element, the first the most significant: whether it is kept
    t/starts/K   I64, ceil(n / GROUP_SIZE)  how many entries are kept before each group of GROUP_SIZE elements
    t/values/K   I8, BF16, F32 or F64  the entries of tau_t that are kept, in order
    t/scales/K   F32 or F64, ceil(n / GROUP_SIZE)  with 8 bits: an entry is value * scale of its group, in K's compute
                                                   type, which is the type of the scale

With top = 1 everything is kept, and `kept` and `starts` are left out. Entries that are not kept count as zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, TensorSpec, open_checkpoint
from ..checkpoints.base import read_small
from ..checkpoints.dtypes import widen
from ..checkpoints.journal import lock_folder
from ..checkpoints.lora.adapted_model import resolve_portable_path
from ..checkpoints.output_paths import replace_file
from ..checkpoints.writer import file_digest
from ..errors import MagMaxError, list_problems, nearest_hint
from ..merging.job import Job
from ..merging.merge_job import merge_job
from ..merging.output_options import OutputOptions
from ..rules import Rule
from ..rules.tunable.quotas import parse_weights

ARCHIVE_FORMAT = 1
GROUP_SIZE = 1024
ARCHIVE_FILE = "archive.json"
TENSOR_KINDS = ("kept", "starts", "values", "scales")


Presets = dict[str, dict[str, float]]


class ArchiveInfo:
    """The content of `archive.json`. Raises MagMaxError, with the reason alone, for anything else."""

    def __init__(self, content: Any) -> None:
        try:
            if content["format"] != ARCHIVE_FORMAT:
                raise ValueError(f"it has format {content['format']}; this magmax reads {ARCHIVE_FORMAT}")
            self.tasks = [str(name) for name in content["tasks"]]
            self.top, self.bits = float(content["top"]), int(content["bits"])
            self.presets: Presets = {
                str(name): {str(task): float(weight) for task, weight in weights.items()}
                for name, weights in content["presets"].items()
            }
            self.base_path, self.base_digest = content["base"]["path"], str(content["base"]["digest"])
            if not isinstance(self.base_path, str | None):
                raise ValueError("the path of its base is no text")
            self.models = [str(digest) for digest in content.get("models", [])]
            self.weights = {str(name): str(digest) for name, digest in content.get("weights", {}).items()}
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise MagMaxError(str(error)) from error
        self.told = content

    @classmethod
    def of(cls, folder: Path) -> ArchiveInfo:
        try:
            return cls(json.loads(read_small(folder / ARCHIVE_FILE)))
        except (OSError, RecursionError, ValueError) as error:
            raise MagMaxError(str(error)) from error

    def same_models(self, other: ArchiveInfo) -> bool:
        """Return whether both are of the same models, as far as they say."""
        return (self.tasks, self.models, self.base_digest) == (other.tasks, other.models, other.base_digest)


class Archive:
    """An archive on disk. Raises MagMaxError for a folder that holds none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._info = ArchiveInfo.of(folder)
        except MagMaxError as error:
            raise MagMaxError(f"{folder}: is not an archive ({error}); magmax archive create makes one") from error
        self.tasks, self.top, self.bits = self._info.tasks, self._info.top, self._info.bits
        self.presets = self._info.presets
        self.tensors = open_checkpoint(folder, mergeable=False)  # its codes look like a quantised model

    def check_weights(self) -> None:
        """Raise MagMaxError where a file of weights is not the one that was written; earlier versions noted no digest.

        The files are read for it, which is little beside the base that a merge from the archive reads.
        """
        files = {path.name: path for path in self.tensors.files() if not path.name.endswith(".json")}
        wanted = self._info.weights
        changed = [name for name in files | wanted if not _has_digest(files.get(name), wanted.get(name))]
        if wanted and changed:
            raise MagMaxError(
                f"{self.folder}: {', '.join(changed)}: not what was archived; it was changed or damaged: make the "
                "archive anew, or copy it again"
            )

    def base(self, base: str | None = None) -> Checkpoint:
        """Open the base: the path in the argument, or where the archive was made from."""
        if base is None and self._info.base_path is None:
            raise MagMaxError(f"{self.folder}: does not know where its base is; say --base BASE")
        return open_checkpoint(base or resolve_portable_path(self.folder, self._info.base_path))

    def models(self, base: Checkpoint) -> list[ArchivedTaskVector]:
        """Return each task's archived task vector. Raises MagMaxError for weights that were changed."""
        self.check_weights()
        return [ArchivedTaskVector(self, task, name, base) for task, name in enumerate(self.tasks)]

    def job(self, rule: Rule, out: Path, options: OutputOptions, base: str | None = None) -> Job:
        """Return the job of merging the archived task vectors into a file or folder outside the archive."""
        self.refuse_inside(out)
        opened = self.base(base)
        job = merge_job(rule, opened, self.models(opened), out, options, self.tasks)

        def same_base(digests: Sequence[str]) -> None:
            if digests[0] != self._info.base_digest:
                raise MagMaxError(f"{opened.label}: is not the base that {self.folder} was made with")

        return replace(job, check=same_base)

    def refuse_inside(self, out: Path) -> None:
        """Raise MagMaxError for an output that would spoil the archive."""
        if self.folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise MagMaxError(f"{out}: is the archive {self.folder} or inside it; choose another place for the output")

    def preset(self, name: str) -> dict[str, float]:
        if name not in self.presets:
            raise MagMaxError(f"{self.folder}: has no preset {name!r}; {nearest_hint(name, list(self.presets))}")
        return self.presets[name]

    def save_preset(self, name: str, preference: Mapping[str, float]) -> None:
        """Remember a preference under a name, beside those that others have stored meanwhile.

        Raises MagMaxError for weights that are none, and where the archive was made anew from other models.
        """
        parse_weights(preference)
        for task in preference:
            if task not in self.tasks:
                raise MagMaxError(f"{self.folder}: has no task {task!r}; {nearest_hint(task, self.tasks)}")
        with lock_folder(self.folder):
            now = Archive(self.folder)._info
            if not now.same_models(self._info):
                raise MagMaxError(f"{self.folder}: now holds other models; preset {name!r} is not stored: tune again")
            now.presets[name] = dict(preference)
            replace_file(
                self.folder / ARCHIVE_FILE, json.dumps(now.told | {"presets": now.presets}, indent=2).encode() + b"\n"
            )
        self.presets = now.presets


def _has_digest(file: Path | None, digest: str | None) -> bool:
    return file is not None and digest is not None and file_digest(file) == digest


class ArchivedTaskVector(Checkpoint):
    """A task vector as an archive keeps it; tensors that are not merged are read from the base."""

    is_task_vector = True

    def __init__(self, archive: Archive, task: int, name: str, base: Checkpoint) -> None:
        specs = {
            key: TensorSpec("F64" if spec.dtype == "F64" else "F32", spec.shape) if spec.is_mergeable else spec
            for key, spec in base.specs.items()
        }
        super().__init__(name, specs)
        self.aliases = dict(base.aliases)
        self._tensors, self._base, self._task, self._bits = archive.tensors, base, task, archive.bits
        self._sparse = archive.top < 1
        problems = [
            f"{archive.folder}: holds nothing of {key}, {spec}, with top {archive.top:g} and {archive.bits} bits"
            for key, spec in base.specs.items()
            if spec.is_mergeable and spec.numel and not self._has_valid_specs(key, spec)
        ]
        if problems:
            raise list_problems(f"{archive.folder} does not fit {base.label}", problems)

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        if not self.specs[key].is_mergeable:
            return self._base.read(key, start, stop)
        if start == stop:
            return np.zeros(0, self.specs[key].storage_dtype)
        first, last = start // GROUP_SIZE, -(-stop // GROUP_SIZE)
        end = min(last * GROUP_SIZE, self.specs[key].numel)
        places, total = np.arange(first * GROUP_SIZE, end), end - first * GROUP_SIZE
        value = first * GROUP_SIZE
        if self._sparse:
            mask = np.unpackbits(self._part("kept", key, first * GROUP_SIZE // 8, -(-end // 8)), count=total)
            places, value = np.flatnonzero(mask) + first * GROUP_SIZE, self._count_entries_before(key, first)
            if value < 0 or value + len(places) != self._count_entries_before(key, last):
                raise MagMaxError(
                    f"{self._tensors.label}: of {key} for {self.label}, kept and starts disagree; it is corrupt: "
                    "make the archive anew, or copy it again"
                )
        stored = self._values(key, value, value + len(places))
        dense = np.zeros(total, self.specs[key].storage_dtype)
        if self._bits == 8:
            kind = self._tensors.specs[f"{self._task}/scales/{key}"].storage_dtype
            scales = self._part("scales", key, kind.itemsize * first, kind.itemsize * last).view(kind)
            dense[places - first * GROUP_SIZE] = stored * scales[places // GROUP_SIZE - first].astype(dense.dtype)
        else:
            dense[places - first * GROUP_SIZE] = stored
        return dense[start - first * GROUP_SIZE : stop - first * GROUP_SIZE]

    def files(self) -> list[Path]:
        return self._tensors.files()

    def header_digests(self) -> list[str]:
        return self._tensors.header_digests()

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        return self._tensors.fingerprints(refresh)

    def _has_valid_specs(self, key: str, spec: TensorSpec) -> bool:
        part_specs = {kind: self._tensors.specs.get(f"{self._task}/{kind}/{key}") for kind in TENSOR_KINDS}
        kind, blocks = self.specs[key].dtype, -(-spec.numel // GROUP_SIZE)
        values = part_specs.pop("values")
        wanted = {
            "kept": TensorSpec("U8", (-(-spec.numel // 8),)) if self._sparse else None,
            "starts": TensorSpec("I64", (blocks,)) if self._sparse else None,
            "scales": TensorSpec(kind, (blocks,)) if self._bits == 8 else None,
        }
        if values is None or part_specs != wanted or values.dtype != {8: "I8", 16: "BF16"}.get(self._bits, kind):
            return False
        return len(values.shape) == 1 and values.numel <= spec.numel <= values.numel + spec.numel * self._sparse

    def _values(self, key: str, start: int, stop: int) -> NDArray[Any]:
        name = f"{self._task}/values/{key}"
        stored = self._tensors.read(name, start, stop)
        dtype = self._tensors.specs[name].dtype
        return stored.view(np.int8) if dtype == "I8" else widen(stored, dtype, self.specs[key].storage_dtype)

    def _count_entries_before(self, key: str, block: int) -> int:
        """Return how many entries are kept before a block, or in all."""
        if block * GROUP_SIZE >= self.specs[key].numel:
            return self._tensors.specs[f"{self._task}/values/{key}"].numel
        return int(self._part("starts", key, 8 * block, 8 * block + 8).view("<i8")[0])

    def _part(self, kind: str, key: str, start: int, stop: int) -> NDArray[Any]:
        """Bytes of one of the task's tensors."""
        name = f"{self._task}/{kind}/{key}"
        unit = self._tensors.specs[name].storage_dtype.itemsize
        return self._tensors.read(name, start // unit, stop // unit).view(np.uint8)
