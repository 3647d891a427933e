"""Workers beyond the threads of this process: pools of processes, and Dask clusters."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import SAME_COMMAND, MagMaxError, UnfinishedError, missing_extra

CONNECT_TIMEOUT_SECONDS = 20
SAFE_PATH, UNSET_IN_WORKERS = "PYTHONSAFEPATH", "MAGMAX_UNSET_IN_WORKERS"


def available_cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(workers: int) -> Executor:
    """Processes that begin from nothing, so that no thread of this one is copied into them; and that end with it."""
    from concurrent.futures import ProcessPoolExecutor

    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)


@contextmanager
def _safe_path() -> Generator[None]:
    """Keep Python processes that start meanwhile from importing what lies in the working directory.

    A worker starts as `python -c`, for which a multiprocessing.py of a downloaded folder comes before Python's own.
    """
    if SAFE_PATH in os.environ:
        yield
        return
    os.environ |= {SAFE_PATH: "1", UNSET_IN_WORKERS: SAFE_PATH}
    try:
        yield
    finally:
        _unset_safe_path()


def _unset_safe_path() -> None:
    """Take the variable away again, for the processes that a user's own code starts."""
    os.environ.pop(os.environ.pop(UNSET_IN_WORKERS, ""), None)


def _begin_worker() -> None:
    """In a worker of a pool: end once its parent is gone, which a pool's workers do not notice by themselves.

    An interruption reaches parent and workers at once; it is the parent that ends them, without their tracebacks.
    """
    _unset_safe_path()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def connect(address: str) -> tuple[Executor, Callable[[], object]]:
    """The executor of a Dask scheduler at an address, and what closes the connection."""
    try:
        from distributed import Client
    except ImportError as error:
        raise missing_extra("a scheduler needs Dask", "cluster") from error
    try:
        client: Any = Client(address, timeout=CONNECT_TIMEOUT_SECONDS)
    except (OSError, ValueError) as error:
        raise MagMaxError(f"--scheduler {address}: no Dask scheduler answers there: {error}") from error
    return client.get_executor(pure=False), client.close


@contextmanager
def scheduler_executor(address: str | None) -> Generator[Executor | None]:
    """The executor of a Dask scheduler while the block lasts; none without an address."""
    if address is None:
        yield None
        return
    executor, close = connect(address)
    try:
        yield executor
    finally:
        close()


@contextmanager
def job_executor(jobs: int, scheduler: str | None) -> Generator[Executor]:
    """The workers of a Dask scheduler, or so many processes of this machine, while the block lasts."""
    with scheduler_executor(scheduler) as executor:
        if executor is not None:
            yield executor
            return
    with _safe_path(), process_pool(jobs) as executor:
        try:
            yield executor
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):  # who interrupts does not wait for what has begun
                for worker in multiprocessing.active_children():
                    worker.terminate()
            raise


@dataclass(frozen=True)
class DaskCluster:
    """The Dask cluster behind an executor."""

    client: Any

    @classmethod
    def of(cls, executor: Executor | None) -> DaskCluster | None:
        """The cluster, if the executor is one's."""
        client = getattr(executor, "_client", None)
        return None if client is None else cls(client)

    @property
    def address(self) -> str:
        return str(self.client.scheduler.address) if self.client.scheduler else "the scheduler"

    def pickled(self, content: Any) -> bytes:
        """As Dask sends it: what is defined in a script or a notebook goes along."""
        from distributed.protocol import pickle

        return bytes(pickle.dumps(content))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]

    def wait(self) -> bool:
        """Return whether there is a worker, or one comes soon."""
        try:
            self.client.wait_for_workers(1, timeout=CONNECT_TIMEOUT_SECONDS)
        except TimeoutError:
            return False
        return True

    def threads(self) -> dict[str, int]:
        """Return how many threads each worker has, by its address. Raises UnfinishedError if the scheduler is lost."""
        try:
            return dict(self.client.nthreads())
        except (OSError, RuntimeError, AttributeError) as error:  # what a client raises that has lost its scheduler
            raise UnfinishedError(f"the Dask scheduler does not answer ({error}); {SAME_COMMAND}") from error

    def ask(self, question: Callable[[], str]) -> list[str]:
        """Return what the workers answer that is not "", each with the worker's address; an error counts as an
        answer.
        """
        answers: dict[str, Any] = self.client.run(question, on_error="return")
        return [f"worker {address}: {answer}" for address, answer in answers.items() if answer != ""]
