"""The verbs that look at checkpoints, convert them, and list the rules: inspect, convert, diff, rules."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from .common_options import DryRun, Restart, Threads
from .console import compact, format_bytes, print_json, print_result, print_table, progress_options, run_or_preview


def inspect(checkpoint: str, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """List the tensors of a checkpoint and where it comes from; only headers are read.

    Parameters
    ----------
    checkpoint
        A file or folder.
    as_json
        Print JSON instead of a table.
    """
    from ..checkpoints import open_checkpoint
    from ..merging.inspection import provenance_of

    opened = open_checkpoint(checkpoint)
    origin = provenance_of(opened)
    if as_json:
        tensors = {key: {"dtype": s.dtype, "shape": s.shape, "bytes": s.nbytes} for key, s in opened.specs.items()}
        print_json(
            {
                "path": checkpoint,
                "bytes": opened.nbytes,
                "tensors": tensors,
                "tied": opened.aliases,
                "provenance": origin,
            }
        )
        return
    rows = [
        (key, s.dtype, "x".join(map(str, s.shape)) or "scalar", format_bytes(s.nbytes))
        for key, s in opened.specs.items()
    ]
    print_table(["tensor", "dtype", "shape", "size"], rows)
    for key, kept in opened.aliases.items():
        print(f"{key} is tied to {kept}")
    for note in opened.notes:
        print(note)
    elements = sum(s.numel for s in opened.specs.values())
    print(f"{len(opened.specs)} tensors, {elements:,} elements, {format_bytes(opened.nbytes)}")
    print("provenance: none" if origin is None else f"provenance: {origin['package']}, {compact(origin['recipe'])}")
    for source in (origin or {}).get("inputs", []):
        print(f"  {source['name']}  {source['xxh3_128']}  {source.get('origin', '')}".rstrip())


def convert(
    old: str,
    out: str,
    *,
    part: str = "",
    strip: str = "",
    inert: tuple[str, ...] = (),
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
) -> None:
    """Write any checkpoint as safetensors; whole models in old pickles too, of which nothing is run.

    Parameters
    ----------
    old
        A file written by torch.save: of a module, of a state dict, or of an object that holds one, whose classes need
        not be installed. Or any other checkpoint.
    out
        A .safetensors file, or a folder.
    part
        Where in the pickle the model is, where that cannot be told: a name, or names with / between them.
    strip
        Keep the tensors whose names begin with this, and take it off: module. for what DataParallel saved.
    inert
        A function that the pickle calls only to make a setting, no weights: noted instead of refused, and not run.
    """
    from ..merging.convert import convert_job

    job = convert_job(old, out, part, strip, inert)
    if outcome := run_or_preview(job, f"converting {old}", threads, restart, dry_run):
        print_result(f"converted {old}", outcome)


def diff(
    base: str,
    model: str,
    *,
    top: int = 10,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    threads: Threads = 0,
) -> None:
    """Show how far a model moved from its base, tensor by tensor.

    Parameters
    ----------
    base
        The base.
    model
        The fine-tuned model.
    top
        How many of the largest movers to show; 0 shows every tensor, in the order of the base.
    as_json
        Print JSON instead of a table.
    """
    from dataclasses import asdict

    from ..checkpoints import open_checkpoint
    from ..merging.inspection import diff as measure

    start = open_checkpoint(base)
    end = open_checkpoint(model, base=start)
    with progress_options(2 * start.nbytes, "comparing", threads, False) as settings:
        found = measure(start, end, threads, settings.progress)
    if as_json:
        print_json({"norm": found.norm, "tensors": [asdict(m) for m in found.movements], "apart": found.incomparable})
        return
    movers = sorted(found.movements, key=lambda m: -m.norm)[:top] if top else found.movements
    rows = [(m.key, f"{m.norm:.6g}", f"{m.relative:.3g}", f"{m.changed:.1%}") for m in movers]
    print_table(["tensor", "norm", "of the base's", "changed"], rows)
    for reason in found.incomparable.values():
        print(f"not compared: {reason}")
    print(f"task vector: L2 norm {found.norm:.6g} over {len(found.movements)} tensors")


def rules() -> None:
    """List the merge rules and the transforms that can stand before or after them in a chain."""
    import dataclasses

    from ..rules import MergedTransform, Rule, StreamingRule, TaskVectorTransform, all_components
    from ..rules.schedules import ACCEPTED_FORMS

    rows: list[tuple[str, ...]] = []
    for name, kind in all_components().items():
        part = kind()
        options = ", ".join(f"{f.name}={getattr(part, f.name)}" for f in dataclasses.fields(kind)) or "-"
        place = "(after)" if isinstance(part, MergedTransform) else "(transform)"
        factor = f"{part.scaling_factor:g}" if isinstance(part, Rule) else place
        memory = "a block" if isinstance(part, TaskVectorTransform | StreamingRule) else "a block a model"
        memory = "a tensor a model" if isinstance(part, Rule) and part.whole_tensor else memory
        passes = part.passes_in_words if isinstance(part, Rule) else str(part.passes)
        rows.append((name, options, factor, passes, memory, kind.paper))
    header = ["name", "options", "scaling_factor", "extra passes", "memory", "paper"]
    print_table(header, rows)
    print(f"Options that are fractions or weights, and scaling_factor, can be {ACCEPTED_FORMS}")
    print("Those of transforms, and weights, also a list of these, one for each model, or a map from model to number.")
