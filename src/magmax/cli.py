"""The command line: parse, call, print. Results go to stdout, progress and notes to stderr."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from . import __version__, learning
from .errors import MagMaxError

if TYPE_CHECKING:
    from pathlib import Path

    from .engine.job import Job, Outcome, Settings
    from .engine.running import Running
    from .plan import Plan

app = App(
    name="magmax",
    version=__version__,
    help="Merge fine-tuned models by magnitude, and learn new tasks without forgetting.",
)

app.command(learning.train)
app.command(learning.evaluate, name="eval")
app.command(learning.bench)
recipes = App(name="recipes", help="The recipes that come with magmax, and a check of your own.")
app.command(recipes)

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Mismatch = Literal["strict", "base", "intersect"]
Threads = Annotated[int, Parameter(help="Chunks worked on at once; 0 means one for each processor.")]
Restart = Annotated[bool, Parameter(negative="", help="Forget an interrupted run instead of resuming it.")]
DryRun = Annotated[bool, Parameter(negative="", help="Check everything and print the cost, but do nothing.")]
Nonfinite = Annotated[bool, Parameter(negative="", help="Let NaN and infinity through instead of refusing them.")]


@app.command
def merge(
    *models: str,
    base: str | None = None,
    out: str | None = None,
    rule: str | None = None,
    scaling_factor: float | None = None,
    dtype: Dtype | None = None,
    mismatch: Mismatch | None = None,
    adapter_rank: int | None = None,
    allow_nonfinite: Nonfinite = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
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
        A name, or with options "{kth_magnitude: {k: 2}}", or a chain "[{dare: {drop: 0.9}}, magmax]": see magmax rules.
    scaling_factor
        Multiplies the merged task vector. The rule's own by default.
    dtype
        The output's floating type. The base's by default.
    mismatch
        Where a model's tensors are not the base's: refuse (strict); keep the base's (base); or merge the leading rows
        that all have and keep the base's elsewhere, as for vocabularies of several sizes (intersect).
    adapter_rank
        Merge LoRA adapters into one adapter of at most this rank, a folder; there is no base then.
    """
    flags = {
        "base": base,
        "out": out,
        "rule": rule,
        "scaling_factor": scaling_factor,
        "dtype": dtype,
        "mismatch": mismatch,
        "adapter_rank": adapter_rank,
        "allow_nonfinite": allow_nonfinite or None,
    }
    from .engine.job import Settings

    plan = _plan(models, flags)
    _print_notes(plan)
    job = plan.job(settings=Settings(threads, note=_note))
    if dry_run:
        _print_preview(job, threads)
        return
    with _settings(job.read_bytes, f"merging {len(plan.models)} models", threads, restart) as settings:
        outcome = job.run(settings)
    for line in job.report():
        print(line)
    what = "models" if plan.adapter_rank is None else "adapters"
    _print_outcome(f"merged {len(plan.models)} {what} with {plan.rule.name}", outcome)


@app.command
def sweep(
    recipe: str,
    *assignments: str,
    evaluate: Annotated[str | None, Parameter(name="--eval")] = None,
    out: str | None = None,
    keep: Annotated[bool, Parameter(negative="", help="With --eval, keep each result instead of deleting it.")] = False,
    restart: Restart = False,
    threads: Threads = 0,
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

    from .engine.sweep import Sweep, factors
    from .recipe import load

    ranges = [a.partition("=")[2] for a in assignments if a.startswith(("scaling_factor=", "method.scaling_factor="))]
    if len(ranges) != 1:
        raise MagMaxError("a sweep needs one range, such as scaling_factor=0.1:1.0:0.1")
    plan = load(recipe, [a for a in assignments if not a.startswith(("scaling_factor=", "method.scaling_factor="))])
    _print_notes(plan)
    where = out or plan.out
    if where is None:
        raise MagMaxError("the recipe names no out; say where the results go: --out PATH")
    base, models, names = plan.opened()
    chosen = factors(ranges[0])
    rows: list[tuple[str, ...]] = []
    total = base.nbytes * (len(models) + 1) + 2 * base.nbytes * len(chosen)
    with _settings(total, f"sweeping {len(chosen)} scaling factors", threads, restart) as settings:
        rule = plan.preferred(base, models, settings) if plan.target else plan.rule
        work = Sweep(rule, base, models, names, Path(where), plan.options, chosen, settings)
        if evaluate is not None and (there := [str(work.path(f)) for f in chosen if work.path(f).exists()]):
            raise MagMaxError(
                f"{there[0]}: is there already, and would be deleted once it is scored; name another --out"
            )
        try:
            with work.merged() as scaler:
                for factor in chosen:
                    path = scaler.write(factor)
                    told = str(path) if evaluate is None else _scored(evaluate, path, keep)
                    rows.append((f"{factor:g}", told))
        finally:
            if rows:
                _print_table(["scaling_factor", "score" if evaluate else "path"], rows)


@app.command
def tune(
    *models: str,
    out: str,
    base: str | None = None,
    archive: str | None = None,
    prefer: Annotated[list[str] | None, Parameter(negative="")] = None,
    preset: str | None = None,
    save: str | None = None,
    target: str | None = None,
    samples: str | None = None,
    method: Literal["label", "ot", "cos", "mmd", "auto"] = "auto",
    encoder: str | None = None,
    span: Literal["model", "tensor"] = "model",
    selection: Literal["optimal", "random", "smallest"] = "optimal",
    seed: int = 0,
    scaling_factor: float | None = None,
    dtype: Dtype | None = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
) -> None:
    """Merge with MagMax, told how much to take from each model: the rule tunable.

    Parameters
    ----------
    models
        The fine-tuned models, as in merge; or none, with --archive.
    out
        A .safetensors file, or a folder.
    base
        The model that all of them were fine-tuned from. An archive knows where it was.
    archive
        An archive made by magmax archive, instead of the models.
    prefer
        NAME=WEIGHT, once for each model to take from; nothing is taken from the others. NAME is the model's file name
        without its suffix.
    preset
        A preference that was stored in the archive.
    save
        Store the preference in the archive under this name.
    target
        Instead: samples of what the merged model is for, a CSV with the columns text and label, or LABEL/NAME.txt.
    samples
        With target: the folder of training samples of each model, NAME.csv or NAME/LABEL/*.txt.
    method
        With target: how to make a preference of it; auto tries all on a held-out half of the samples.
    encoder
        With target: the encoder's folder in the Hugging Face layout, where BASE is not that.
    span
        Whether the quotas hold over the whole model or in every tensor.
    selection
        How elements are chosen under the quotas: for the most magnitude retained, or as published.
    seed
        Of the random numbers.
    scaling_factor
        Multiplies the merged task vector.
    dtype
        The output's floating type. The base's by default.
    """
    from pathlib import Path

    from .checkpoints import open_checkpoint
    from .engine.archive import Archive
    from .engine.merge import merge_job
    from .recipe import build

    if (archive is None) == (not models) or (archive is None and base is None):
        raise MagMaxError("tune needs --base BASE and the models, or --archive ARCHIVE")
    if archive is None and (preset or save):
        raise MagMaxError("presets are kept in archives: --preset and --save need --archive ARCHIVE")
    if sum(map(bool, (prefer, preset, target))) != 1:
        raise MagMaxError("tune needs --prefer NAME=WEIGHT (once for each model), or --preset NAME, or --target DATA")
    if (target is None) != (samples is None):
        raise MagMaxError("--target DATA and --samples FOLDER, the training samples of each model, go together")
    kept = Archive(Path(archive)) if archive else None
    opened = kept.base(base) if kept else open_checkpoint(str(base))
    inputs = kept.models(opened) if kept else [open_checkpoint(m, base=opened) for m in models]
    weights = kept.preset(preset) if kept and preset else _weights(prefer or [])
    content: dict[str, Any] = {
        "base": str(opened.path),
        "models": [{"path": name, "name": name} for name in kept.tasks] if kept else list(models),
        "rule": {"tunable": {"span": span, "selection": selection, "seed": seed, "preference": weights or []}},
        "target": {"data": target, "samples": samples, "method": method, "encoder": encoder} if target else None,
        "scaling_factor": scaling_factor,
        "dtype": dtype,
    }
    plan = build(content, "the command line", {}, "")
    total = 5 * (opened.nbytes + sum(model.nbytes for model in inputs))
    with _settings(total, f"tuning {len(inputs)} models", threads, restart) as settings:
        rule = plan.preferred(opened, inputs, settings)
        told = dict(zip(plan.names, rule.shares, strict=True))
        if kept:
            job = kept.job(rule, Path(out), plan.options, base)
        else:
            job = merge_job(rule, opened, inputs, Path(out), plan.options, plan.names)
        if dry_run:
            _print_preview(job, threads)
            return
        outcome = job.run(settings)
    if kept and save:
        kept.store(save, told)
    print("from each: " + ", ".join(f"{name} {share:.1%}" for name, share in told.items()))
    _print_outcome(f"tuned {len(inputs)} models", outcome)


@app.command
def archive(
    *models: str, base: str, out: str, top: float = 0.3, bits: Literal[8, 16, 32] = 8, threads: Threads = 0
) -> None:
    """Store of each model what magmax tune is likely to need, in far fewer bytes.

    Parameters
    ----------
    models
        The fine-tuned models, as in merge.
    base
        The model that all of them were fine-tuned from; tuning needs it again.
    out
        The archive's folder.
    top
        The fraction of each task vector to keep, its entries of largest magnitude.
    bits
        How many bits each takes; 32 keeps them exactly.
    """
    from pathlib import Path

    from .checkpoints import open_checkpoint
    from .engine.archiving import write_archive
    from .engine.merge import default_names

    opened = open_checkpoint(base)
    inputs = [open_checkpoint(model, base=opened) for model in models]
    size = opened.nbytes + sum(model.nbytes for model in inputs)
    with _settings(4 * size, f"archiving {len(inputs)} models", threads, False) as settings:
        made = write_archive(
            opened, inputs, default_names(list(models)), Path(out), top=top, bits=bits, settings=settings
        )
    size = made.tensors.nbytes
    print(f"archived {', '.join(made.tasks)}: {out} ({_size(size)}, {size / opened.nbytes:.2f} times the base)")


@app.command
def presets(archive: str) -> None:
    """List an archive's tasks and the preferences stored in it.

    Parameters
    ----------
    archive
        The archive's folder.
    """
    from pathlib import Path

    from .engine.archive import Archive

    found = Archive(Path(archive))
    rows = [(name, *(f"{weights.get(task, 0):g}" for task in found.tasks)) for name, weights in found.presets.items()]
    _print_table(["preset", *found.tasks], rows)


@app.command
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
    restart: Restart = False,
    threads: Threads = 0,
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
        Name the new generation, so that it is kept and can be restored.
    winners
        From the start, also map which task supplied each element.
    mismatch
        From the start, what to do where a model's tensors are not the base's: as in merge.
    """
    size = _running(state, base, rule, winners=winners, mismatch=mismatch, settings=None).opened(model).nbytes
    with _settings(3 * size, f"absorbing {model}", threads, restart) as settings:
        running = _running(state, base, rule, winners=winners, mismatch=mismatch, settings=settings)
        outcome = running.absorb(model, name, label)
    _print_outcome(f"absorbed {running.tasks[-1].name} as task {len(running.tasks)} of {state}", outcome)


@app.command
def result(
    state: str,
    *,
    out: str,
    base: str | None = None,
    scaling_factor: float | None = None,
    dtype: Dtype | None = None,
    allow_nonfinite: Nonfinite = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
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
    from pathlib import Path

    from .engine.merge import Options

    running = _running(state, base, None)
    job = running.result_job(Path(out), Options(scaling_factor, dtype, allow_nonfinite=allow_nonfinite))
    if dry_run:
        _print_preview(job, threads)
        return
    with _settings(job.read_bytes, "writing the result", threads, restart) as settings:
        outcome = job.run(settings)
    _print_outcome(f"wrote the merge of {len(running.tasks)} tasks with {running.rule.name}", outcome)


@app.command
def status(state: str) -> None:
    """Show a running merge: its rule, its tasks, its generations.

    Parameters
    ----------
    state
        The running merge's folder.
    """
    found = _running(state, None, None).status()
    ((name, options),) = found.rule.items()
    print(f"rule   {name} {options or ''}".rstrip())
    print(f"base   {found.base or 'in memory'}  {found.base_digest or ''}")
    tasks = found.current.tasks if found.current else []
    shares = [f"{share:.1%}" for share in found.shares] or [""] * len(tasks)
    header = ["task", "name", "digest", *(["supplies"] if found.shares else [])]
    rows = [
        (str(n), t.name, t.digest, *([s] if s else [])) for n, (t, s) in enumerate(zip(tasks, shares, strict=True), 1)
    ]
    _print_table(header, rows)
    current = found.current.number if found.current else None
    listed = [
        (f"{g.number}{' (current)' * (g.number == current)}", g.label or "", str(len(g.tasks)))
        for g in found.generations
    ]
    _print_table(["generation", "label", "tasks"], listed)


@app.command
def label(state: str, label: str) -> None:
    """Name the current generation of a running merge, so that it is kept.

    Parameters
    ----------
    state
        The running merge's folder.
    label
        The name to give.
    """
    running = _running(state, None, None)
    running.label(label)
    print(f"labelled the state after {len(running.tasks)} tasks {label!r}")


@app.command
def restore(state: str, which: str) -> None:
    """Go back to a generation of a running merge.

    Parameters
    ----------
    state
        The running merge's folder.
    which
        A generation's label or number.
    """
    running = _running(state, None, None)
    for dropped in running.restore(which):
        print(f"dropped generation {dropped.number} ({', '.join(t.name for t in dropped.tasks)}), which had no label")
    print(f"restored {which}: {', '.join(t.name for t in running.tasks)}")


@app.command
def inspect(checkpoint: str, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """List the tensors of a checkpoint and where it comes from; only headers are read.

    Parameters
    ----------
    checkpoint
        A file or folder.
    as_json
        Print JSON instead of a table.
    """
    from .checkpoints import open_checkpoint
    from .engine.survey import provenance_of

    opened = open_checkpoint(checkpoint)
    origin = provenance_of(opened)
    if as_json:
        tensors = {key: {"dtype": s.dtype, "shape": s.shape, "bytes": s.nbytes} for key, s in opened.specs.items()}
        _print_json(
            {
                "path": checkpoint,
                "bytes": opened.nbytes,
                "tensors": tensors,
                "tied": opened.aliases,
                "provenance": origin,
            }
        )
        return
    rows = [(key, s.dtype, "x".join(map(str, s.shape)) or "scalar", _size(s.nbytes)) for key, s in opened.specs.items()]
    _print_table(["tensor", "dtype", "shape", "size"], rows)
    for key, kept in opened.aliases.items():
        print(f"{key} is tied to {kept}")
    for note in opened.notes:
        print(note)
    elements = sum(s.elements for s in opened.specs.values())
    print(f"{len(opened.specs)} tensors, {elements:,} elements, {_size(opened.nbytes)}")
    print("provenance: none" if origin is None else f"provenance: {origin['package']}, {_compact(origin['recipe'])}")
    for source in (origin or {}).get("inputs", []):
        print(f"  {source['name']}  {source['xxh3_128']}  {source.get('origin', '')}".rstrip())


@app.command
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
    from .engine.convert import convert_job

    job = convert_job(old, out, part, strip, inert)
    if dry_run:
        _print_preview(job, threads)
        return
    with _settings(job.read_bytes, f"converting {old}", threads, restart) as settings:
        outcome = job.run(settings)
    _print_outcome(f"converted {old}", outcome)


@app.command
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

    from .checkpoints import open_checkpoint
    from .engine.survey import diff as measure

    start = open_checkpoint(base)
    end = open_checkpoint(model, base=start)
    with _settings(2 * start.nbytes, "comparing", threads, False) as settings:
        found = measure(start, end, threads, settings.progress)
    if as_json:
        _print_json({"norm": found.norm, "tensors": [asdict(m) for m in found.movements], "apart": found.apart})
        return
    movers = sorted(found.movements, key=lambda m: -m.norm)[:top] if top else found.movements
    rows = [(m.key, f"{m.norm:.6g}", f"{m.relative:.3g}", f"{m.changed:.1%}") for m in movers]
    _print_table(["tensor", "norm", "of the base's", "changed"], rows)
    for reason in found.apart.values():
        print(f"not compared: {reason}")
    print(f"task vector: L2 norm {found.norm:.6g} over {len(found.movements)} tensors")


@app.command
def rules() -> None:
    """List the merge rules and the transforms that can stand before them in a chain."""
    import dataclasses

    from .rules import Rule, StreamingRule, all_parts
    from .rules.values import FORMS

    rows: list[tuple[str, ...]] = []
    for name, kind in all_parts().items():
        part = kind()
        options = ", ".join(f"{f.name}={getattr(part, f.name)}" for f in dataclasses.fields(kind)) or "-"
        factor = f"{part.scaling_factor:g}" if isinstance(part, Rule) else "(transform)"
        memory = "a block" if isinstance(part, StreamingRule) or not isinstance(part, Rule) else "a block a model"
        memory = "a tensor a model" if isinstance(part, Rule) and part.whole else memory
        passes = part.passes_told if isinstance(part, Rule) else str(part.passes)
        rows.append((name, options, factor, passes, memory, kind.paper))
    header = ["name", "options", "scaling_factor", "extra passes", "memory", "paper"]
    _print_table(header, rows)
    print(f"Options that are fractions or weights, and scaling_factor, can be {FORMS}")
    print("Those of transforms, and weights, also a list of these, one for each model, or a map from model to number.")


@recipes.command
def ls() -> None:
    """List the shipped recipes."""
    from .recipe import shipped

    rows = [(path.stem, path.read_text().splitlines()[0].removeprefix("# ")) for path in shipped()]
    _print_table(["recipe", "what it does"], rows)


@recipes.command
def cp(name: str, to: str | None = None) -> None:
    """Copy a shipped recipe here, to be edited.

    Parameters
    ----------
    name
        A recipe's name, as in ls.
    to
        The new file; NAME.yaml in this folder by default. An existing file is never overwritten.
    """
    from pathlib import Path

    from .recipe import shipped
    from .rules import nearest

    known = {path.stem: path for path in shipped()}
    if name not in known:
        raise MagMaxError(f"there is no recipe {name!r}; {nearest(name, list(known))}")
    target = Path(to or f"{name}.yaml")
    try:
        with target.open("x") as file:
            file.write(known[name].read_text())
    except FileExistsError as error:
        raise MagMaxError(f"{target}: exists already; name another file") from error
    except OSError as error:
        raise MagMaxError(f"{target}: cannot be written: {error.strerror}") from error
    print(f"copied {name} to {target}; put in your paths, then: magmax merge {target}")


@recipes.command
def check(recipe: str, *assignments: str) -> None:
    """Check a recipe and all that it names, without doing anything.

    Parameters
    ----------
    recipe
        The recipe (.yaml).
    assignments
        As in merge: scaling_factor=0.7, rule.k=2.
    """
    from .recipe import load

    plan = load(recipe, assignments)
    _print_notes(plan)
    _print_preview(plan.job(plan.out or f"{recipe}-merged"), 0)


def main() -> None:
    """The `magmax` command: exit code 0, or 2 for input that cannot be used, 130 for an interruption."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except MagMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def _plan(words: tuple[str, ...], flags: dict[str, Any]) -> Plan:
    """The recipe that the command line names or spells out; flags stand above the recipe."""
    import os

    from .checkpoints.lora import seen_from
    from .recipe import build, is_override, load, merged_overrides

    given = {key: value for key, value in flags.items() if value is not None}
    assigned = [w for w in words if is_override(w) and not os.path.exists(w)]
    paths = [w for w in words if w not in assigned]
    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        here = os.path.dirname(paths[0])
        if "base" in given:
            given["base"] = seen_from(here, given["base"])
        if "out" in given:
            given["out"] = os.path.relpath(given["out"], here or ".")
        return load(paths[0], assigned, given)
    if "base" not in given and "adapter_rank" not in given:
        raise MagMaxError("merge needs --base BASE and the models, or a recipe (.yaml)")
    return build(merged_overrides({"models": paths, **given}, assigned), "the command line", {}, "")


def _weights(words: list[str]) -> dict[str, float]:
    """The preference that NAME=WEIGHT words spell."""
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = None
        if not name or weight is None:
            raise MagMaxError(f"--prefer needs NAME=WEIGHT, such as news=3, not {word!r}")
        if name in found:
            raise MagMaxError(f"--prefer names {name!r} twice; keep one")
        found[name] = weight
    return found


def _running(state: str, base: str | None, rule: str | None, **options: Any) -> Running:
    from pathlib import Path

    from .engine.running import Running
    from .recipe import parse_rule

    new = not (Path(state) / "state.json").exists()
    if new and "settings" not in options:
        raise MagMaxError(f"{state}: is not a running merge (it has no state.json); magmax absorb makes one")
    return Running(state, parse_rule(rule)[0] if rule else None, base, **options)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _settings(total: int, words: str, threads: int, restart: bool) -> Generator[Settings]:
    """Settings whose progress is a bar on stderr, where stderr is a terminal."""
    from .engine.job import Settings

    if not sys.stderr.isatty():
        yield Settings(threads, restart, note=_note)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=total)
        yield Settings(threads, restart, lambda count: bar.advance(task, count), _note)


def _scored(command: str, path: Path, keep: bool) -> str:
    """Run the user's evaluation on a result, and delete the result unless it is to be kept; the number it printed."""
    from .checkpoints.writer import remove

    try:
        done = subprocess.run([*shlex.split(command), path], stdout=subprocess.PIPE, text=True)
        lines = done.stdout.strip().splitlines()
        score: Any = json.loads(lines[-1]) if done.returncode == 0 and lines else None
        if type(score) not in (int, float):
            raise MagMaxError(f"{command} {path}: exit code {done.returncode}, and no JSON number as its last line")
        return f"{score:g}"
    except ValueError as error:
        if isinstance(error, MagMaxError):
            raise
        raise MagMaxError(
            f"{command} {path}: no JSON number as its last line, or unbalanced quotes ({error})"
        ) from error
    finally:
        if not keep:
            remove(path)


def _print_preview(job: Job, threads: int) -> None:
    if problems := job.problems():
        from .errors import listed

        raise listed("this would stop the merge", problems)
    cost = job.preview(threads)
    print(f"passes        {cost['passes']}")
    print(f"bytes to read {cost['read_bytes']:,}")
    print(f"bytes written {cost['write_bytes']:,}")
    print(f"disk needed   {cost['disk_needed']:,} of {cost['disk_free']:,} free")
    print(f"peak memory   about {_size(cost['peak_memory'])}{', a tensor of every model' * job.kernel.whole}")
    for note in dict.fromkeys(note for checkpoint in job.inputs for note in checkpoint.notes):
        print(note)
    _print_carried(job)
    print("no problem found; nothing was written")


def _print_outcome(words: str, outcome: Outcome) -> None:
    _print_carried(outcome)
    print(
        f"{words}: {outcome.path} ({outcome.seconds:.2f} s, {_size(outcome.read_bytes - outcome.reused_bytes)} read, "
        f"{_size(outcome.written_bytes)} written)"
    )


def _print_notes(plan: Plan) -> None:
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)


def _print_carried(work: Job | Outcome) -> None:
    for tensors, done in ((work.partly, "merged in part"), (work.carried, "not merged")):
        if tensors:
            print(f"{len(tensors)} tensors were {done}:")
            for key, why in tensors.items():
                print(f"  {key}: {why}")


def _print_table(header: list[str], rows: list[tuple[str, ...]]) -> None:
    """Plain columns, so that other programs can read them."""
    widths = [max(len(row[n]) for row in [tuple(header), *rows]) for n in range(len(header))]
    for row in [tuple(header), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _compact(content: Any) -> str:
    return json.dumps(content, separators=(", ", ": "))


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.4g} {unit}"
        amount /= 1000
    return f"{amount:.4g} TB"


if __name__ == "__main__":
    main()
