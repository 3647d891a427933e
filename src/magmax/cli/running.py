"""The verbs of a running merge: absorb, result, status, label, restore."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import MagMaxError
from .common_options import (
    BatchNorm,
    DryRun,
    Dtype,
    Json,
    Mismatch,
    Nonfinite,
    Out,
    Rename,
    Restart,
    Scheduler,
    Strip,
    Threads,
    parse_renames,
)
from .console import print_json, print_line, print_result, print_table, progress_options, run_or_preview

if TYPE_CHECKING:
    from ..merging.running.running_merge import Running


def absorb(
    state: str,
    model: str,
    *,
    base: str | None = None,
    rule: str | None = None,
    name: str | None = None,
    label: str | None = None,
    winners: Annotated[bool, Parameter(negative="")] = False,
    mismatch: Mismatch | None = None,
    rename: Rename = (),
    strip: Strip = "",
    batch_norm: BatchNorm | None = None,
    restart: Restart = False,
    threads: Threads = 0,
    scheduler: Scheduler = None,
) -> None:
    """Add one more model to a running merge, in constant memory and disk.

    Parameters
    ----------
    state
        The running merge's folder; made by the first absorb.
    model
        The next task's fine-tuned model.
    base
        The model that training started from; needed once, and again only if it moved.
    rule
        The merge rule; needed at most once. magmax by default.
    name
        What to call the task; by default the model's file name.
    label
        Name the new version, so that it is kept and can be restored.
    winners
        From the start, also map which task supplied each element.
    mismatch
        From the start, what to do where a model's tensors are not the base's: as in merge, but for union.
    batch_norm
        From the start, what is made of the statistics of batch normalisation: as in merge.
    """
    renames = parse_renames(rename)
    options: dict[str, Any] = {"winners": winners, "mismatch": mismatch, "batch_norm": batch_norm}
    size = _open_running(state, base, rule, execution=None, **options).opened(model).nbytes
    with progress_options(3 * size, f"absorbing {model}", threads, restart, scheduler) as settings:
        running = _open_running(state, base, rule, execution=settings, **options)
        merge_result = running.absorb(model, name, label, rename=renames, strip=strip)
    print_result(f"absorbed {running.tasks[-1].name} as task {len(running.tasks)} of {state}", merge_result)


def result(
    state: str,
    *,
    out: Out,
    base: str | None = None,
    scaling_factor: float | None = None,
    dtype: Dtype | None = None,
    allow_nonfinite: Nonfinite = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
    scheduler: Scheduler = None,
) -> None:
    """Write the merged model of a running merge.

    Parameters
    ----------
    state
        The running merge's folder.
    out
        A .safetensors file, or a folder.
    base
        The base, if it moved.
    scaling_factor
        Multiplies the merged task vector. The rule's own by default.
    dtype
        The output's floating type. The base's by default.
    """

    from ..merging.output_options import OutputOptions

    running = _open_running(state, base, None)
    job = running.result_job(out, OutputOptions(scaling_factor, dtype, allow_nonfinite=allow_nonfinite))
    if merge_result := run_or_preview(job, "writing the result", threads, restart, dry_run, scheduler):
        print_result(f"wrote the merge of {len(running.tasks)} tasks with {running.rule.name}", merge_result)


def status(state: str, *, as_json: Json = False) -> None:
    """Show a running merge: its rule, its tasks, its versions.

    Parameters
    ----------
    state
        The running merge's folder.
    """
    state_now = _open_running(state, None, None).status()
    if as_json:
        print_json(asdict(state_now))
        return
    ((name, options),) = state_now.rule.items()
    print_line(f"rule   {name} {options or ''}".rstrip())
    print_line(f"base   {state_now.base or 'in memory'}  {state_now.base_digest or ''}")
    tasks = state_now.current.tasks if state_now.current else []
    shares = [f"{share:.1%}" for share in state_now.shares] or [""] * len(tasks)
    header = ["task", "name", "digest", *(["supplies"] if state_now.shares else [])]
    rows = [
        (str(n), t.name, t.digest, *([s] if s else [])) for n, (t, s) in enumerate(zip(tasks, shares, strict=True), 1)
    ]
    print_table(header, rows)
    current = state_now.current.number if state_now.current else None
    listed = [
        (f"{g.number}{' (current)' * (g.number == current)}", g.label or "", str(len(g.tasks)))
        for g in state_now.versions
    ]
    print_table(["version", "label", "tasks"], listed)


def label(state: str, label: str) -> None:
    """Name the current version of a running merge, so that it is kept.

    Parameters
    ----------
    state
        The running merge's folder.
    label
        The name to give.
    """
    running = _open_running(state, None, None)
    running.label(label)
    print_line(f"labelled the state after {len(running.tasks)} tasks {label!r}")


def restore(state: str, which: str) -> None:
    """Go back to a version of a running merge, and keep the one that it is at.

    A version without a label gets the label left-NUMBER, by which it can be restored in turn.

    Parameters
    ----------
    state
        The running merge's folder.
    which
        A version's label or number.
    """
    running = _open_running(state, None, None)
    if left := running.restore(which):
        print_line(f"kept version {left.number} ({', '.join(t.name for t in left.tasks)}), labelled {left.label!r}")
    print_line(f"restored {which}: {', '.join(t.name for t in running.tasks)}")


def _open_running(state: str, base: str | None, rule: str | None, **options: Any) -> Running:
    from pathlib import Path

    from ..merging.running.running_merge import Running
    from ..recipes.recipe import parse_rule

    new = not (Path(state) / "state.json").exists()
    if new and "execution" not in options:
        raise MagMaxError(f"{state}: is not a running merge (it has no state.json); magmax running absorb makes one")
    return Running(state, parse_rule(rule)[0] if rule else None, base, **options)
