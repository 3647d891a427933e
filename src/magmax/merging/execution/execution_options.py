"""How to work, as opposed to what to do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from ...errors import MagMaxError, missing_extra
from ..pipeline import Progress
from .pool import WorkerPool
from .shared_files import SharedFiles


@dataclass(frozen=True)
class ExecutionOptions:
    """Options of how a merge is executed: threads, executor, device, progress. None changes a byte of the output.

    Attributes:
        threads: chunks worked on at once; 0 means one for each processor.
        restart: forget an interrupted run instead of resuming it.
        progress: told of bytes read, as they are.
        note: told of things worth knowing, such as a resumption.
        executor: its workers work instead of threads of this process: a pool of threads or processes, or the executor
            of a Dask client, `client.get_executor(pure=False)`. Other processes open every file by its path or URL
            again, so that they need the inputs and the output's folder on a file system that all share, or a network.
        shared_files: what those workers must see; a job finds out.
        device: where rules merge: "cuda", "cuda:1" ..., or "cpu" for torch on the processors. By default numpy there.
            Rules that take singular values round otherwise on another device, and NaN that are let through may have
            other bits; all else has the same bytes.
    """

    threads: int = 0
    restart: bool = False
    progress: Progress = lambda _: None
    note: Callable[[str], None] = lambda _: None
    executor: Executor | None = None
    shared_files: SharedFiles | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise MagMaxError(f"threads must be 0 (one for each processor) or more, not {self.threads}")
        if self.device is not None:
            try:
                from .cuda import device_named
            except ImportError as error:
                raise missing_extra(f"device={self.device} needs {error.name}", "torch") from error
            device_named(self.device)

    @property
    def pool(self) -> WorkerPool:
        """Return the pool of workers that these options describe."""
        return WorkerPool(self.threads, self.executor, self.shared_files)
