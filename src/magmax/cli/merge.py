"""The verbs that merge: merge, sweep."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import MagMaxError
from .common_options import (
    BatchNorm,
    Device,
    DryRun,
    Dtype,
    Mismatch,
    Models,
    Nonfinite,
    OptionalOut,
    Rename,
    Restart,
    Scheduler,
    Strip,
    Threads,
    parse_renames,
)
from .console import print_line, print_note, print_notes, print_result, print_table, progress_options, run_or_preview

if TYPE_CHECKING:
    from pathlib import Path

    from ..recipes.request import MergeRequest


def merge(
    models: Models = (),
    *,
    base: str | None = None,
    out: OptionalOut = None,
    rule: str | None = None,
    scaling_factor: float | None = None,
    dtype: Dtype | None = None,
    keep_dtype: str = "",
    mismatch: Mismatch | None = None,
    rename: Rename = (),
    strip: Strip = "",
    adapter_rank: int | None = None,
    allow_nonfinite: Nonfinite = False,
    batch_norm: BatchNorm | None = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
    scheduler: Scheduler = None,
    device: Device = None,
) -> None:
    """Merge fine-tuned models into their base.

    Parameters
    ----------
    models
        The fine-tuned models: .safetensors files, folders, .pt/.bin state dicts, torch.distributed checkpoints, folders
        of PEFT LoRA adapters (of the base, or BASE+ADAPTER), ids of models on the Hugging Face hub. Or one recipe
        (.yaml). Then assignments such as scaling_factor=0.7 or rule.k=2.
    base
        The model that all of them were fine-tuned from.
    out
        A .safetensors file, or a folder for shards with the base's config and tokenizer beside them.
    rule
        A name, or with options "{kth_magnitude: {k: 2}}", or a chain "[{dare: {density: 0.1}}, magmax]": see magmax
        rules.
    scaling_factor
        Multiplies the merged task vector. The rule's own by default.
    dtype
        The output's floating type. The base's by default.
    keep_dtype
        A regular expression: tensors in whose names it is found keep the base's type, whatever --dtype is.
    mismatch
        Where a model's tensors are not the base's: refuse (strict); keep the base's (base); merge the leading rows
        that all have and keep the base's elsewhere, as for vocabularies of several sizes (intersect); or keep every row
        and tensor of the base and of all models, as for heads that grow (union).
    batch_norm
        What is made of the running means and variances of batch normalisation: their average over the models, which is
        the default; the base's; or the rule's result, with variances clipped at zero.
    adapter_rank
        Merge LoRA adapters into one adapter of at most this rank, a folder; there is no base then.
    """
    flags = {
        "base": base,
        "out": out,
        "rule": rule,
        "scaling_factor": scaling_factor,
        "dtype": dtype,
        "keep_dtype": keep_dtype or None,
        "mismatch": mismatch,
        "rename": parse_renames(rename) or None,
        "strip": strip or None,
        "batch_norm": batch_norm,
        "adapter_rank": adapter_rank,
        "allow_nonfinite": allow_nonfinite or None,
    }
    from ..merging.execution.execution_options import ExecutionOptions

    plan = _build_request(models, flags)
    print_notes(plan)
    if device and plan.adapter_rank is not None:
        print_note(f"adapters are merged by the processors alone, not on {device}")
    job = plan.job(execution=ExecutionOptions(threads, note=print_note, device=device))
    result = run_or_preview(job, f"merging {len(plan.models)} models", threads, restart, dry_run, scheduler, device)
    if result is None:
        return
    for line in job.report():
        print_line(line)
    what = "models" if plan.adapter_rank is None else "adapters"
    print_result(f"merged {len(plan.models)} {what} with {plan.rule.name}", result)


def sweep(
    recipe: str,
    *assignments: str,
    evaluate: Annotated[str | None, Parameter(name="--eval")] = None,
    out: OptionalOut = None,
    keep_results: Annotated[
        bool, Parameter(negative="", help="With --eval, keep each result instead of deleting it.")
    ] = False,
    restart: Restart = False,
    threads: Threads = 0,
    scheduler: Scheduler = None,
) -> None:
    """Merge once, then write or evaluate the result at many scaling factors.

    Parameters
    ----------
    recipe
        A merge recipe (.yaml).
    assignments
        scaling_factor=first:last:step, both ends included, or scaling_factor=a,b,c; other assignments as in merge.
    evaluate
        A command that is given the path of a result and prints a JSON number as its last line. Each result is deleted
        once it is scored, so that one at a time takes disk.
    out
        Where results go, with the factor put into the name; the recipe's out by default.
    """
    from pathlib import Path

    from ..merging.sweep import FactorSweep, parse_factors
    from ..recipes.recipe import load_recipe

    ranges = [a.partition("=")[2] for a in assignments if a.startswith(("scaling_factor=", "method.scaling_factor="))]
    if len(ranges) != 1:
        raise MagMaxError("a sweep needs one range, such as scaling_factor=0.1:1.0:0.1")
    plan = load_recipe(
        recipe, [a for a in assignments if not a.startswith(("scaling_factor=", "method.scaling_factor="))]
    )
    print_notes(plan)
    if plan.calibrate:
        raise MagMaxError(
            "a sweep does not calibrate; leave calibrate out, and calibrate its results: magmax calibrate"
        )
    where = out or plan.out
    if where is None:
        raise MagMaxError("the recipe names no out; say where the results go: --out PATH")
    base, models, names = plan.open_inputs()
    chosen = parse_factors(ranges[0])
    rows: list[tuple[str, ...]] = []
    total = base.nbytes * (len(models) + 1) + 2 * base.nbytes * len(chosen)
    words = f"sweeping {len(chosen)} scaling factors"
    with progress_options(total, words, threads, restart, scheduler) as settings:
        rule = plan.rule_with_preference(base, models, settings) if plan.target else plan.rule
        work = FactorSweep(rule, base, models, names, Path(where), plan.options, chosen, settings)
        if evaluate is not None and (there := [str(work.path(f)) for f in chosen if work.path(f).exists()]):
            raise MagMaxError(
                f"{there[0]}: is there already, and would be deleted once it is scored; name another --out"
            )
        try:
            with work.merged() as scaler:
                for factor in chosen:
                    path = scaler.write(factor)
                    result = str(path) if evaluate is None else _score_result(evaluate, path, keep_results)
                    rows.append((f"{factor:g}", result))
        finally:
            if rows:
                print_table(["scaling_factor", "score" if evaluate else "path"], rows)


def _build_request(words: tuple[str, ...], flags: dict[str, Any]) -> MergeRequest:
    """The recipe that the command line names or spells out; flags stand above the recipe."""
    import os

    from ..checkpoints.lora.adapted_model import relative_path
    from ..checkpoints.remote.urls import is_url
    from ..recipes.recipe import apply_overrides, build_request, load_recipe
    from ..yaml_documents import is_assignment

    options = {key: value for key, value in flags.items() if value is not None}
    assigned = [w for w in words if is_assignment(w) and not os.path.exists(w)]
    paths = [w for w in words if w not in assigned]
    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        folder = os.path.dirname(paths[0])
        if "base" in options:
            options["base"] = relative_path(folder, options["base"])
        if "out" in options and not is_url(options["out"]):
            options["out"] = os.path.relpath(options["out"], folder or ".")
        return load_recipe(paths[0], assigned, options)
    if "base" not in options and "adapter_rank" not in options:
        raise MagMaxError("merge needs --base BASE and the models, or a recipe (.yaml)")
    return build_request(apply_overrides({"models": paths, **options}, assigned), "the command line", {}, "")


def _score_result(command: str, path: Path, keep: bool) -> str:
    """Run the user's evaluation on a result, and delete the result unless it is to be kept; the number it printed."""
    from ..checkpoints.output_paths import delete_output

    try:
        done = subprocess.run([*shlex.split(command), path], stdout=subprocess.PIPE, text=True)
        lines = done.stdout.strip().splitlines()
        score: Any = json.loads(lines[-1]) if done.returncode == 0 and lines else None
        if type(score) not in (int, float):
            raise MagMaxError(f"{command} {path}: exit code {done.returncode}, and no JSON number as its last line")
        return f"{score:g}"
    except (ValueError, RecursionError) as error:
        if isinstance(error, MagMaxError):
            raise
        raise MagMaxError(
            f"{command} {path}: no JSON number as its last line, or unbalanced quotes ({error})"
        ) from error
    finally:
        if not keep:
            delete_output(path)
