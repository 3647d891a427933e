"""Who does the work: threads of this process, or the workers of an executor, in other processes or on other machines.

A share of the work is a task, pickled once, and some of its items; a worker sends back a small result and writes its
ranges of the output in place. The process that began the work alone keeps the journal.
"""

from __future__ import annotations

import pickle
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from ...errors import SAME_COMMAND, MagMaxError, UnfinishedError
from .executors import DaskCluster, available_cores
from .shared_files import SharedFiles

SHARE_BYTES = 64_000_000
"""How much of all inputs one share of the work reads, about."""
POLL_SECONDS = 2.0
NO_WORKER_TIMEOUT_SECONDS = 60.0
"""How long work waits for a cluster that has lost its last worker."""
IDLE_TIMEOUT_SECONDS = 30.0
"""After how long without work a worker closes the files of its last."""
WORKER_LOST_MESSAGE = (
    "a worker process ended before its share of the work was done (was it killed, for want of memory?); "
    f"{SAME_COMMAND}, with a new executor"
)

Item = TypeVar("Item")


class ShareTask(ABC):
    """The work done on each share of a job; all that it is made of can be pickled."""

    @property
    def is_exclusive(self) -> bool:
        """Return whether a process does one share at a time, whatever its threads. By default not."""
        return False

    @abstractmethod
    def __call__(self, items: Sequence[Any]) -> Any:
        """The result of a share, which is small."""


@dataclass(frozen=True)
class WorkerPool:
    """A pool of workers: threads of this process or the workers of an executor.

    Attributes:
        threads: of this process, where there is no executor; 0 means one for each processor.
        executor: its workers work instead: a pool of threads or processes, or a Dask cluster's.
        shared_files: what each worker must see.
    """

    threads: int = 0
    executor: Executor | None = None
    shared_files: SharedFiles | None = None

    @property
    def count(self) -> int:
        """Return how many threads of this process work, where there is no executor."""
        return self.threads or available_cores()

    def check_workers(self) -> None:
        """Raise UnfinishedError if a Dask cluster has no worker, or one that does not see what it must."""
        cluster = DaskCluster.of(self.executor)
        if cluster is None or self.shared_files is None:
            return
        if not cluster.wait():
            raise UnfinishedError(f"{cluster.address}: the scheduler has no workers; start some: dask worker ADDRESS")
        problems = cluster.ask(self.shared_files.problem)
        if problems:
            raise UnfinishedError("not every worker can do its share", *(f"  - {p}" for p in problems))

    def map_shares(
        self, task: ShareTask, items: Iterable[Item], cost: Callable[[Item], int], least: int = 0
    ) -> Generator[tuple[list[Item], Any]]:
        """Have the executor's workers do the task on all items; yields each share and its result as they come.

        Args:
            cost: bytes that an item reads.
            least: bytes that a share must read to be worth its result.

        Raises:
            UnfinishedError: the workers are lost, or one of them does not see what it must.
            MagMaxError: the work cannot be sent to other processes; and whatever a share raises.
        """
        submit, unpacked = self._make_submitter(task)
        queue = group_by_cost(items, cost, max(SHARE_BYTES, least))
        waiting: dict[Future[Any], list[Item]] = {}
        room = _Slots(self.executor)
        try:
            while True:
                while len(waiting) < room.most() and (share := next(queue, None)) is not None:
                    waiting[submit(share)] = share
                if not waiting:
                    return
                done = wait(waiting, POLL_SECONDS, FIRST_COMPLETED).done
                for future in done:
                    share = waiting.pop(future)
                    yield share, unpacked(wait_for_result(future))
        finally:
            wait([future for future in waiting if not future.cancel()])

    def _make_submitter(self, task: ShareTask) -> tuple[Callable[[list[Any]], Future[Any]], Callable[[Any], Any]]:
        """Return what hands in a share of the task, and what gives its result from what comes back."""
        executor = self.executor
        assert executor is not None
        if isinstance(executor, ThreadPoolExecutor):
            return partial(submit, executor, _run_task, task), lambda result: result
        cluster = DaskCluster.of(executor)
        packed, token = _pickle_task(task, cluster.pickled if cluster else pickle.dumps), uuid4().hex

        def submit_share(share: list[Any]) -> Future[Any]:
            return submit(executor, run_share, token, packed, self.shared_files, pickle.dumps(share))

        return submit_share, pickle.loads


def worker_slots(executor: Executor | None) -> int:
    """Return how many shares the workers of an executor do at once."""
    cluster = DaskCluster.of(executor)
    return sum(cluster.threads().values()) if cluster else getattr(executor, "_max_workers", available_cores())


class _Slots:
    """The number of shares under way at once: two for each thread of a worker, so that none waits for its next."""

    def __init__(self, executor: Executor | None) -> None:
        self._executor, self._cluster = executor, DaskCluster.of(executor)
        self._worker_slots, self._last_poll, self._last_alive = 1, 0.0, time.monotonic()

    def most(self) -> int:
        now = time.monotonic()
        if not self._last_poll or (self._cluster and now - self._last_poll > POLL_SECONDS):
            self._worker_slots, self._last_poll = worker_slots(self._executor), now
        if self._worker_slots:
            self._last_alive = now
        elif now - self._last_alive > NO_WORKER_TIMEOUT_SECONDS:
            raise UnfinishedError(
                f"the cluster has had no worker for {NO_WORKER_TIMEOUT_SECONDS:.0f} s; start some; {SAME_COMMAND}"
            )
        return 2 * max(1, self._worker_slots)


def group_by_cost(items: Iterable[Item], cost: Callable[[Item], int], most: int) -> Generator[list[Item]]:
    """Neighbouring items together, until they cost as much as a share may; a single one may cost more."""
    share: list[Item] = []
    total = 0
    for item in items:
        if share and total + cost(item) > most:
            yield share
            share, total = [], 0
        share.append(item)
        total += cost(item)
    if share:
        yield share


def run_share(token: str, packed: bytes, shared_files: SharedFiles | None, items: bytes) -> bytes:
    """In a worker: one share of the task that `packed` is; kept under its token for the shares to come.

    Items and result are pickled here, as Dask's own messages make tuples of named tuples.
    """
    if shared_files is not None:
        shared_files.check(thoroughly=token not in _task_cache)
    return pickle.dumps(_run_task(_load_task(token, packed), pickle.loads(items)))


def _run_task(task: ShareTask, items: Sequence[Any]) -> Any:
    with _exclusive_lock if task.is_exclusive else nullcontext():
        return task(items)


_exclusive_lock = threading.Lock()
_task_cache: dict[str, ShareTask] = {}
_cache_lock = threading.Lock()
_idle_timers: list[threading.Timer] = []


def _load_task(token: str, packed: bytes) -> ShareTask:
    """The task, whose files are opened once for all shares, and closed when no share has come for a while."""
    with _cache_lock:
        if token not in _task_cache:
            _task_cache.clear()
            _task_cache[token] = pickle.loads(zlib.decompress(packed))
        for timer in _idle_timers:
            timer.cancel()
        _idle_timers[:] = [threading.Timer(IDLE_TIMEOUT_SECONDS, _task_cache.clear)]
        _idle_timers[0].daemon = True
        _idle_timers[0].start()
        return _task_cache[token]


def _pickle_task(task: ShareTask, dumps: Callable[[ShareTask], bytes]) -> bytes:
    try:
        return zlib.compress(dumps(task), 1)
    except MagMaxError:
        raise
    except Exception as error:  # whatever a class of somebody else raises
        raise MagMaxError(
            f"the work cannot be sent to other processes ({error}); a rule, and all that it asks, must be made of "
            "what can be pickled"
        ) from error


def submit(executor: Executor, work: Callable[..., Any], *given: Any) -> Future[Any]:
    """Work handed to an executor. Raises UnfinishedError if it takes none."""
    try:
        return executor.submit(work, *given)
    except BrokenExecutor as error:
        raise UnfinishedError(WORKER_LOST_MESSAGE) from error
    except (RuntimeError, OSError) as error:  # an executor that is shut down; a client that is closed
        raise UnfinishedError(f"the executor takes no more work ({error}); {SAME_COMMAND}") from error


def wait_for_result(future: Future[Any]) -> Any:
    """Return what came of work handed to an executor. Raises UnfinishedError if its workers were lost."""
    try:
        return future.result()
    except CancelledError as error:
        raise UnfinishedError(
            f"the connection to the scheduler is lost, or it gave up the work; {SAME_COMMAND}"
        ) from error
    except BrokenExecutor as error:
        raise UnfinishedError(WORKER_LOST_MESSAGE) from error
    except ModuleNotFoundError as error:
        raise UnfinishedError(f"a worker lacks {error.name}; install the same magmax and extras there") from error
    except Exception as error:
        if type(error).__name__ == "KilledWorker":
            raise UnfinishedError(
                "one share of the work has ended several workers (for want of memory? --dry-run says what each "
                f"holds); {SAME_COMMAND}"
            ) from error
        raise
