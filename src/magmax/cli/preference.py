"""The verbs of preferences: tune, archive, presets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from cyclopts import Parameter

from ..errors import MagMaxError
from .common_options import (
    BatchNorm,
    DryRun,
    Dtype,
    Json,
    Mismatch,
    Models,
    Nonfinite,
    Out,
    Rename,
    Restart,
    Scheduler,
    Strip,
    Threads,
    parse_renames,
)
from .console import format_bytes, print_json, print_line, print_preview, print_result, print_table, progress_options


def tune(
    models: Models = (),
    *,
    out: Out,
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
    mismatch: Mismatch | None = None,
    rename: Rename = (),
    strip: Strip = "",
    allow_nonfinite: Nonfinite = False,
    batch_norm: BatchNorm | None = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
    scheduler: Scheduler = None,
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
        An archive made by magmax archive create, instead of the models.
    prefer
        NAME=WEIGHT, once for each model to take from; nothing is taken from the others. NAME is the model's file name
        without its suffix; of models in folders of their own, the folder's name.
    preset
        A preference that was stored in the archive.
    save
        Store the preference in the archive under this name.
    target
        Instead: samples of what the merged model is for, a CSV with the columns text and label, or LABEL/NAME.txt.
    samples
        With target: the folder of training samples of each model, NAME.csv or NAME/LABEL/*.txt. Only the methods label
        and auto need labels, here and of the target.
    method
        With target: how to make a preference of it. label needs no encoder; auto tries all, each on the half of the
        samples that it was not made of.
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
    mismatch
        Where a model's tensors are not the base's, as in merge. An archive was made of what is in all of them.
    batch_norm
        As in merge.
    """
    from pathlib import Path

    from ..checkpoints import open_checkpoint
    from ..checkpoints.renamed import Renaming
    from ..merging.matching import match_to_base
    from ..merging.merge_job import merge_job
    from ..preference.archive import Archive
    from ..recipes.recipe import build_request

    if (archive is None) == (not models) or (archive is None and base is None):
        raise MagMaxError("tune needs --base BASE and the models, or --archive ARCHIVE")
    if archive is not None and (mismatch or rename or strip):
        raise MagMaxError("an archive's tensors are the base's: --mismatch, --rename and --strip are for models")
    if archive is None and (preset or save):
        raise MagMaxError("presets are kept in archives: --preset and --save need --archive ARCHIVE")
    if sum(map(bool, (prefer, preset, target))) != 1:
        raise MagMaxError("tune needs --prefer NAME=WEIGHT (once for each model), or --preset NAME, or --target DATA")
    if (target is None) != (samples is None):
        raise MagMaxError("--target DATA and --samples FOLDER, the training samples of each model, go together")
    opened_archive = Archive(Path(archive)) if archive else None
    if opened_archive:
        opened_archive.refuse_inside(Path(out))
    opened = opened_archive.base(base) if opened_archive else open_checkpoint(str(base))
    if opened_archive:
        inputs = opened_archive.models(opened)
    else:
        inputs = Renaming(strip, parse_renames(rename)).apply_to_some([open_checkpoint(m, base=opened) for m in models])
        match = match_to_base(opened, inputs, mismatch or "strict")
        opened, inputs = match.base, list(match.models)
    weights = opened_archive.preset(preset) if opened_archive and preset else _parse_preference(prefer or [])
    content: dict[str, Any] = {
        "base": base or str(opened.path),
        "models": [{"path": name, "name": name} for name in opened_archive.tasks] if opened_archive else list(models),
        "rule": {"tunable": {"span": span, "selection": selection, "seed": seed, "preference": weights or []}},
        "target": {"data": target, "samples": samples, "method": method, "encoder": encoder} if target else None,
        "scaling_factor": scaling_factor,
        "dtype": dtype,
        "mismatch": mismatch or "strict",
        "allow_nonfinite": allow_nonfinite,
        "batch_norm": batch_norm or "average",
    }
    plan = build_request(content, "the command line", {}, "")
    total = 5 * (opened.nbytes + sum(model.nbytes for model in inputs))
    with progress_options(total, f"tuning {len(inputs)} models", threads, restart, scheduler) as settings:
        rule = plan.rule_with_preference(opened, inputs, settings)
        shares = dict(zip(plan.names, rule.shares, strict=True))
        weights_by_name = dict(zip(plan.names, cast("Sequence[float]", rule.preference), strict=True))
        if opened_archive:
            job = opened_archive.job(rule, Path(out), plan.options, base)
        else:
            job = merge_job(rule, opened, inputs, out, plan.options, plan.names)
        if dry_run:
            print_preview(job, threads, scheduler)
            return
        result = job.run(settings)
    if opened_archive and save:
        opened_archive.save_preset(save, weights_by_name)
    print_line("from each: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print_result(f"tuned {len(inputs)} models", result)


def create(
    models: Models = (),
    *,
    base: str,
    out: Out,
    density: float = 0.3,
    bits: Literal[8, 16, 32] = 8,
    rename: Rename = (),
    strip: Strip = "",
    threads: Threads = 0,
) -> None:
    """Store of each model what magmax tune is likely to need, in far fewer bytes.

    Parameters
    ----------
    models
        The fine-tuned models, as in merge.
    base
        The model that all of them were fine-tuned from; tuning needs it again.
    out
        The archive's folder. An archive that is there is replaced; its presets are kept where the models have the same
        names, in the same order, and else it is refused.
    density
        The fraction of each task vector to keep, its entries of largest magnitude.
    bits
        How many bits each takes; 32 keeps them exactly.
    """
    from pathlib import Path

    from ..checkpoints import open_checkpoint
    from ..checkpoints.renamed import Renaming
    from ..merging.model_names import default_names
    from ..preference.archive_writer import write_archive

    opened = open_checkpoint(base)
    renaming = Renaming(strip, parse_renames(rename))
    inputs = renaming.apply_to_some([open_checkpoint(model, base=opened) for model in models])
    size = opened.nbytes + sum(model.nbytes for model in inputs)
    with progress_options(4 * size, f"archiving {len(inputs)} models", threads, False) as settings:
        written = write_archive(
            opened,
            inputs,
            default_names(list(models)),
            Path(out),
            top=density,
            bits=bits,
            base_given=base,
            execution=settings,
        )
    size = written.tensors.nbytes
    print_line(
        f"archived {', '.join(written.tasks)}: {out} ({format_bytes(size)}, {size / opened.nbytes:.2f} times the base)"
    )


def presets(archive: str, *, as_json: Json = False) -> None:
    """List an archive's tasks and the preferences stored in it.

    Parameters
    ----------
    archive
        The archive's folder.
    """
    from pathlib import Path

    from ..preference.archive import Archive

    opened = Archive(Path(archive))
    if as_json:
        print_json({"tasks": opened.tasks, "presets": dict(opened.presets)})
        return
    rows = [(name, *(f"{weights.get(task, 0):g}" for task in opened.tasks)) for name, weights in opened.presets.items()]
    print_table(["preset", *opened.tasks], rows)


def _parse_preference(words: list[str]) -> dict[str, float]:
    """The preference that NAME=WEIGHT words spell."""
    weights: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = None
        if not name or weight is None:
            raise MagMaxError(f"--prefer needs NAME=WEIGHT, such as news=3, not {word!r}")
        if name in weights:
            raise MagMaxError(f"--prefer names {name!r} twice; keep one")
        weights[name] = weight
    return weights
