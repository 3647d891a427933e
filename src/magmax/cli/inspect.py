"""The commands of checkpoints: inspect, diff, convert."""

from __future__ import annotations

from .common_options import DryRun, Json, Out, Rename, Restart, Strip, Threads, parse_renames
from .console import (
    compact,
    format_bytes,
    print_json,
    print_line,
    print_result,
    print_table,
    progress_options,
    run_or_preview,
)


def inspect(checkpoint: str, *, as_json: Json = False) -> None:
    """List the tensors of a checkpoint and where it comes from; only headers are read.

    Parameters
    ----------
    checkpoint
        A file or folder.
    """
    from ..checkpoints import open_checkpoint
    from ..merging.inspection import provenance_of

    opened = open_checkpoint(checkpoint, mergeable=False)
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
    for key, stored_key in opened.aliases.items():
        print_line(f"{key} is tied to {stored_key}")
    for note in opened.notes:
        print_line(note)
    elements = sum(s.numel for s in opened.specs.values())
    print_line(f"{len(opened.specs)} tensors, {elements:,} elements, {format_bytes(opened.nbytes)}")
    print_line(
        "provenance: none" if origin is None else f"provenance: {origin['package']}, {compact(origin['recipe'])}"
    )
    for source in (origin or {}).get("inputs", []):
        print_line(f"  {source['name']}  {source['xxh3_128']}  {source.get('origin', '')}".rstrip())


def convert(
    model: str,
    *,
    out: Out,
    part: str = "",
    strip: Strip = "",
    rename: Rename = (),
    inert: tuple[str, ...] = (),
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
) -> None:
    """Write any checkpoint as safetensors; whole models in old pickles too, of which nothing is run.

    Parameters
    ----------
    model
        A file written by torch.save: of a module, of a state dict, or of an object that holds one, whose classes need
        not be installed. Or any other checkpoint.
    out
        A .safetensors file, or a folder.
    part
        Where in the pickle the model is, where that cannot be told: a name, or names with / between them.
    inert
        A function that the pickle calls only to make a setting, no weights: noted instead of refused, and not run.
    """
    from ..checkpoints.renamed import Renaming
    from ..merging.convert import convert_job

    job = convert_job(model, out, part, Renaming(strip, parse_renames(rename)), inert)
    if result := run_or_preview(job, f"converting {model}", threads, restart, dry_run):
        print_result(f"converted {model}", result)


def diff(
    base: str,
    model: str,
    *,
    limit: int = 10,
    rename: Rename = (),
    strip: Strip = "",
    as_json: Json = False,
    threads: Threads = 0,
) -> None:
    """Show how far a model moved from its base, tensor by tensor.

    Parameters
    ----------
    base
        The base.
    model
        The fine-tuned model.
    limit
        How many of the largest movers to show; 0 shows every tensor, in the order of the base.
    """
    from dataclasses import asdict

    from ..checkpoints import open_checkpoint
    from ..checkpoints.renamed import Renaming
    from ..merging.inspection import diff as measure

    start = open_checkpoint(base)
    end = Renaming(strip, parse_renames(rename)).apply(open_checkpoint(model, base=start))
    with progress_options(2 * start.nbytes, "comparing", threads, False) as settings:
        difference = measure(start, end, threads, settings.progress)
    if as_json:
        print_json(
            {
                "norm": difference.norm,
                "tensors": [asdict(m) for m in difference.movements],
                "apart": difference.incomparable,
            }
        )
        return
    movers = sorted(difference.movements, key=lambda m: -m.norm)[:limit] if limit else difference.movements
    rows = [(m.key, f"{m.norm:.6g}", f"{m.relative:.3g}", f"{m.changed:.1%}") for m in movers]
    print_table(["tensor", "norm", "of the base's", "changed"], rows)
    for reason in difference.incomparable.values():
        print_line(f"not compared: {reason}")
    print_line(f"task vector: L2 norm {difference.norm:.6g} over {len(difference.movements)} tensors")
