"""What every verb prints: results to stdout, progress and notes to stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import MAX_WORD_CHARACTERS, MagMaxError, escape_controls, shorten

if TYPE_CHECKING:
    from ..continual.progress import BarFactory
    from ..merging.execution.execution_options import ExecutionOptions
    from ..merging.job import Job
    from ..merging.result import MergeResult
    from ..recipes.request import MergeRequest


_is_quiet = False


@contextmanager
def quiet_output(quiet: bool) -> Generator[None]:
    """Print no progress and no notes until the block is left."""
    global _is_quiet  # of the process, since notes come from any of its threads
    before, _is_quiet = _is_quiet, quiet
    logger = logging.getLogger("magmax")
    level = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _is_quiet = before
        logger.setLevel(level)


def print_line(text: object) -> None:
    """Print a line to stdout; names in it come from files that anyone may have written."""
    print(escape_controls(str(text)))


def print_note(text: str) -> None:
    """Print a note to stderr."""
    if not _is_quiet:
        print(escape_controls(text), file=sys.stderr)


def progress_bars() -> AbstractContextManager[BarFactory]:
    """Return bars on stderr for work that reports several steps; none where output is quiet."""
    from ..continual.progress import bars, no_bars

    return nullcontext(no_bars) if _is_quiet else bars()


@contextmanager
def progress_options(
    total: int, words: str, threads: int, restart: bool, scheduler: str | None = None, device: str | None = None
) -> Generator[ExecutionOptions]:
    """Settings with the workers of a scheduler, if one is named; their progress is a bar on stderr, if that is a
    terminal."""
    from ..merging.execution.execution_options import ExecutionOptions
    from ..merging.execution.executors import scheduler_executor

    with scheduler_executor(scheduler) as executor, _progress_bar(total, words) as progress:
        yield ExecutionOptions(threads, restart, progress, print_note, executor, device=device)


@contextmanager
def _progress_bar(total: int, words: str) -> Generator[Callable[[int], None]]:
    """Return what moves a bar on stderr, or nothing where stderr is no terminal."""
    if _is_quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(escape_controls(words)), total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)
            done = bar.tasks[0].completed
            if done > total:  # a rule may read its inputs once more than it usually does
                bar.update(task, total=done)

        yield advance


def run_or_preview(
    job: Job,
    words: str,
    threads: int,
    restart: bool,
    dry_run: bool,
    scheduler: str | None = None,
    device: str | None = None,
) -> MergeResult | None:
    """Do the job under a bar of these words; or, on a dry run, print what it would cost."""
    if dry_run:
        print_preview(job, threads, scheduler)
        return None
    with progress_options(job.read_bytes, words, threads, restart, scheduler, device) as settings:
        return job.run(settings)


def print_preview(job: Job, threads: int, scheduler: str | None = None) -> None:
    """The cost of a job; refuses one that could not run."""
    from ..merging.cost import preview, preview_of_workers
    from ..merging.execution.executors import scheduler_executor

    if problems := job.problems():
        from ..errors import list_problems

        raise list_problems("this would stop the merge", problems)
    cost = preview(job, threads)
    print_line(f"passes        {cost['passes']}")
    print_line(f"bytes to read {cost['read_bytes']:,}")
    print_line(f"bytes written {cost['write_bytes']:,}")
    if cost["read_remotely"] or cost["write_remotely"]:
        print_line(f"over networks {cost['read_remotely']:,} of these to read, {cost['write_remotely']:,} to write")
    print_line(f"disk needed   {cost['disk_needed']:,} of {cost['disk_free']:,} free")
    whole = ", a tensor of every model" * job.kernel.whole_tensor
    if scheduler is None:
        print_line(f"peak memory   about {format_bytes(cost['peak_memory'])}{whole}")
    else:
        with scheduler_executor(scheduler) as executor:
            workers = preview_of_workers(job, executor)
        for (threads, held), count in sorted(Counter(workers).items()):
            print_line(
                f"workers       {count}, {threads} shares at once, peak memory about {format_bytes(held)} each{whole}"
            )
    print_line(f"time          {_format_times(job, threads)}")
    for note in job.all_notes():
        print_line(note)
    print_unmerged(job)
    print_line("no problem found; nothing was written")


def _format_times(job: Job, threads: int) -> str:
    """Return how long a job would take on some disks, and on none."""
    from ..merging.cost import DISK_SPEEDS_MB_S, job_cost

    cost = job_cost(job, threads)
    processors = cost.processor_seconds / cost.threads
    times = ", ".join(f"{format_seconds(cost.seconds(speed))} at {speed:,}" for speed in DISK_SPEEDS_MB_S)
    network = "the network, " * bool(sum(checkpoint.remote_bytes for checkpoint in job.inputs) or job.target.url)
    besides = f"{network}{'singular values, ' * job.kernel.whole_tensor}".removesuffix(", ").replace(", ", " and ")
    limits = f"; beside {besides}" * bool(besides)
    return f"about {times} MB/s of disk, {format_seconds(processors)} of {cost.threads} processors{limits}"


def print_result(words: str, result: MergeResult) -> None:
    """Return what was written, and what it took."""
    print_unmerged(result)
    read, written = format_bytes(result.read_bytes - result.reused_bytes), format_bytes(result.written_bytes)
    print_line(f"{words}: {result.path} ({result.seconds:.2f} s, {read} read, {written} written)")


def print_notes(plan: MergeRequest) -> None:
    """Return what a recipe wants its user to know."""
    for note in plan.notes:
        print_note(f"note: {note}")


def print_unmerged(work: Job | MergeResult) -> None:
    """The tensors that were not merged, or not as a whole, and why."""
    for tensors, done in ((work.partly_merged, "merged in part"), (work.unmerged, "not merged")):
        if tensors:
            print_line(f"{len(tensors)} tensors were {done}:")
            for key, why in tensors.items():
                print_line(f"  {key}: {why}")


def print_table(header: list[str], rows: list[tuple[str, ...]]) -> None:
    """Plain columns, so that other programs can read them."""
    lines = [
        tuple(shorten(escape_controls(cell), MAX_WORD_CHARACTERS) for cell in row) for row in [tuple(header), *rows]
    ]
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(content: Any) -> None:
    """Content as JSON."""
    print(json.dumps(content, indent=2))


def compact(content: Any) -> str:
    """Content as JSON on one line."""
    return json.dumps(content, separators=(", ", ": "))


def format_seconds(seconds: float) -> str:
    """Seconds in words, such as 16 min."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def format_bytes(count: int) -> str:
    """A count of bytes in words, such as 352.9 MB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.4g} {unit}"
        amount /= 1000
    return f"{amount:.4g} TB"


def check_counts(jobs: int, threads: int) -> None:
    """Raise MagMaxError for a number of processes below 1, or of threads below 0."""
    if jobs < 1 or threads < 0:
        raise MagMaxError("--jobs is a whole number from 1 on, and --threads from 0 on")
