"""What a worker must see to do its share: the same version, the same input files, and the folder of the output."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import xxhash

from ..._version import __version__
from ...checkpoints import Checkpoint
from ...checkpoints.output_paths import OutputPath, delete_output
from ...errors import UnfinishedError

HEAD_BYTES = 1 << 20
SHARED_FILES_HINT = (
    "a worker needs every input and the output's folder at the same paths, on a file system that all share"
)


class FileStamp(NamedTuple):
    """A file: its size, when it was changed, and the digest of its beginning, where a header is."""

    size: int
    mtime: int
    head: str = ""

    @classmethod
    def of_file(cls, path: str, thoroughly: bool) -> FileStamp:
        status = Path(path).stat()
        return cls(status.st_size, status.st_mtime_ns, _digest_head(path) if thoroughly else "")


@dataclass(frozen=True)
class SharedFiles:
    """The files that every worker must see, and the version that it must run.

    Attributes:
        files: every input file, by its absolute path.
        probe: a file in the output's working folder that is there while the work goes on, if there is one.
        version: of magmax.
    """

    files: Mapping[str, FileStamp] = field(default_factory=dict[str, FileStamp])
    probe: str = ""
    version: str = __version__

    @classmethod
    def of(cls, inputs: Iterable[Checkpoint]) -> SharedFiles:
        """The ground of a piece of work on these inputs."""
        paths = dict.fromkeys(str(path.absolute()) for checkpoint in inputs for path in checkpoint.files())
        return cls({path: FileStamp.of_file(path, thoroughly=True) for path in paths})

    @contextmanager
    def with_probe(self, target: OutputPath) -> Generator[SharedFiles]:
        """The ground with a probe in the output's working folder, until the block is left."""
        folder = target.working_folder.absolute()
        for old in folder.glob("probe-*"):
            delete_output(old)
        probe = folder / f"probe-{uuid4().hex}"
        probe.touch(exist_ok=False)
        try:
            yield replace(self, probe=str(probe))
        finally:
            probe.unlink(missing_ok=True)

    def problem(self) -> str:
        """Return what this process does not see as it must, in words; nothing if it sees everything."""
        if self.version != __version__:
            return f"has magmax {__version__}, and the work was begun with {self.version}; install the same"
        if self.probe and not os.path.exists(self.probe):
            return f"{self.probe}: is not there, as it must be while the output is written; {SHARED_FILES_HINT}"
        return self._find_changed(thoroughly=True)

    def check(self, thoroughly: bool) -> None:
        """In a worker: raise UnfinishedError if there is a problem; without `thoroughly` no file is opened."""
        missing = self.probe and not os.path.exists(self.probe)
        problem = self.problem() if thoroughly or missing else self._find_changed(thoroughly=False)
        if problem:
            raise UnfinishedError(f"{worker_name()}: {problem}")

    def _find_changed(self, thoroughly: bool) -> str:
        for path, wanted in self.files.items():
            try:
                stamp = FileStamp.of_file(path, thoroughly)
            except OSError as error:
                return f"{path}: {error.strerror}; {SHARED_FILES_HINT}"
            if stamp != (wanted if thoroughly else wanted._replace(head="")):
                return f"{path}: is another file than where the work was begun, or changed since; {SHARED_FILES_HINT}"
        return ""


def worker_name() -> str:
    """Return what messages call this process."""
    return f"worker {socket.gethostname()}, process {os.getpid()}"


def _digest_head(path: str) -> str:
    with Path(path).open("rb") as file:
        return xxhash.xxh3_128_hexdigest(file.read(HEAD_BYTES))
