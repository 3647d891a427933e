"""The verb that gives a merged model its magnitudes back: calibrate."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import MagMaxError
from .common_options import DryRun, Out, Restart, Threads
from .console import print_line, print_preview, print_result, progress_options


def calibrate(
    merged: str,
    *,
    base: str,
    models: Annotated[list[str], Parameter(consume_multiple=True, negative="")],
    out: Out,
    space: Literal["weight", "feature", "dual"] = "dual",
    samples: str | None = None,
    n: int = 8,
    seed: int = 0,
    model: str | None = None,
    norm: Literal["l1", "l2"] | None = None,
    form: Literal["norm", "ellipsoid"] = "norm",
    per: Literal["tensor", "row"] | None = None,
    guard: float = 1.0,
    ratio: Literal["place", "sample"] = "place",
    inputs: Literal["calibrated", "merged"] = "calibrated",
    sensitive: str | None = None,
    max_tokens: int = 64,
    any_model: Annotated[bool, Parameter(negative="")] = False,
    report: str | None = None,
    plot: str | None = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    threads: Threads = 0,
) -> None:
    """Give a merged model's weights, or features, the magnitude that they have in the models it was made of.

    Parameters
    ----------
    merged
        The merged model, made by whatever rule.
    base
        The model that all of them were fine-tuned from.
    models
        The fine-tuned models that were merged.
    out
        A .safetensors file, or a folder: an ordinary checkpoint, which costs nothing at inference.
    space
        weight needs no data; feature runs the model on a few samples of each task; dual does one after the other.
    samples
        The folder of each model's unlabelled samples: NAME.csv with a column text, or NAME/ of .txt files or pictures.
        Take them from the training data, never from what the result is scored on.
    n
        How many samples of each task are used.
    seed
        Of the draw of these samples.
    model
        The folder of the model's config and tokenizer, where neither MERGED nor BASE is one.
    norm
        Of a magnitude; by default l2 of weights, l1 of features.
    form
        In weight space: equal norms, or the released code's ellipsoid, which supposes orthogonal task vectors.
    per
        In weight space: one coefficient for each tensor (the norm's default) or each of its rows (the ellipsoid's).
    guard
        In weight space: leave tensors alone where the mean of the task vectors' cosine matrix is above this.
    ratio
        In feature space: of magnitudes at each place (token, channel), as published, or of whole samples, where places
        that the merge hardly moves count for little.
    inputs
        In feature space: a layer sees what the calibrated layers before it make, or what the merged ones made.
    sensitive
        A file of sensitive tensors, whose update may only shrink; every other may then only grow.
    max_tokens
        The tokens of a text that are used.
    any_model
        Calibrate even what does not look like a merge of these models.
    report
        Write what was measured of each layer to this JSON file.
    plot
        Draw it to this .png, .svg or .pdf file.
    """
    from pathlib import Path

    from ..calibration.calibration_job import calibrate_job
    from ..calibration.options import CalibrationOptions, prepare_calibration
    from ..calibration.plot import check_plot, draw
    from ..checkpoints import open_checkpoint
    from ..checkpoints.output_paths import delete_output, kind_of, replace_file
    from ..merging.matching import match_to_base
    from ..merging.model_names import default_names

    if plot:
        check_plot(Path(plot))
    for place in filter(None, (report, plot)):
        if not Path(place).absolute().parent.is_dir():
            raise MagMaxError(f"{place}: there is no folder {Path(place).parent}; make it first")
        if kind_of(Path(place)) not in (None, "file"):
            raise MagMaxError(f"{place}: is a {kind_of(Path(place))}, which is not replaced by a file; move it")
    if n < 1 or max_tokens < 1 or seed < 0:
        raise MagMaxError(f"n and max_tokens are 1 or more, and seed 0 or more; not {n}, {max_tokens} and {seed}")
    chosen = CalibrationOptions(
        space=space, samples=samples, n=n, seed=seed, model=model, norm=norm, form=form, per=per, guard=guard,
        ratio=ratio, inputs=inputs, sensitive=sensitive, max_tokens=max_tokens, any_model=any_model,
    )  # fmt: skip
    opened = open_checkpoint(base)
    start = open_checkpoint(merged, base=opened)
    others = [open_checkpoint(path, base=opened) for path in models]
    names = default_names([other.source for other in others])
    match = match_to_base(opened, [start, *others])
    opened, (start, *others) = match.base, match.models
    ready = prepare_calibration(chosen, opened, start, others, names)
    checkpoints = opened, start, others, Path(out)
    if dry_run:
        print_preview(calibrate_job(*checkpoints, {}, chosen.provenance(), names), threads)
        return
    total = 2 * (opened.nbytes + start.nbytes + sum(other.nbytes for other in others))
    with progress_options(total, f"calibrating {merged}", threads, restart) as settings:
        calibrated = ready.measure(settings)
        result = calibrate_job(*checkpoints, calibrated.coefficients, chosen.provenance(), names).run(settings)
    if report:
        replace_file(Path(report), calibrated.report.as_json().encode())
    if plot:
        delete_output(Path(plot))  # its other names, if it has any, keep their content
        draw(calibrated.report, Path(plot))
    for line in calibrated.report.lines():
        print_line(line)
    print_result(f"calibrated {len(calibrated.coefficients)} tensors in {space} space", result)
