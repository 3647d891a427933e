"""Merging fine-tuned decoder language models, with and without MAGIC's calibration: perplexity per byte by domain."""

import json
from concurrent.futures import as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from cyclopts import App
from harness.decoder import (
    REFERENCE_CELL,
    LanguageConfig,
    cell_choices,
    cell_recipe,
    mean_perplexity,
    measure_sequence,
    prepare,
    read_cells,
)
from harness.machine import git_commit, hardware
from harness.places import BENCHMARKS, RESULTS, WORK
from rich.console import Console

from magmax.continual.training.weight_files import write_bytes
from magmax.merging.execution.executors import process_pool

app = App(help=__doc__)
console = Console(stderr=True)
COLUMNS = ("none", "chosen", "norm", "ellipsoid", "fsc", "dsc")
"""The rule as it is, at the scaling factor chosen for it (the one-scalar control), and calibrated."""


@app.default
def main(
    recipe: Path = BENCHMARKS / "language.yaml",
    *,
    out: Path = RESULTS / "language",
    work: Path = WORK / "language",
    jobs: int = 1,
    discard: bool = False,
) -> None:
    """Trains, merges and measures what is missing; writes OUT/cells.jsonl, OUT/results.json and OUT/results.md.

    Parameters
    ----------
    work
        Where the models go.
    jobs
        Chains trained and measured at once, each in a process of one thread.
    discard
        Delete a training's checkpoints, 17 MB each, once it is measured.
    """
    study = LanguageConfig.model_validate(yaml.safe_load(recipe.read_text()))
    prepare(
        study, work, lambda done, total, words="": console.print(f"pre-training: {done} of {total} {words}", end="\r")
    )
    told = study.model_dump(mode="json")
    with process_pool(jobs) as pool:
        todo = [
            pool.submit(measure_sequence, told, work, out, s, c, discard) for s in study.seeds for c in study.training
        ]
        for job in as_completed(todo):
            console.print(f"done: {job.result()}")
            write_results(study, out)


def write_results(config: LanguageConfig, out: Path) -> None:
    """Write the tables of all cells that are there."""
    recipes = [
        cell_recipe(config, seed, name, rule, how)
        for seed in config.seeds
        for name in config.training
        for rule, how in cell_choices(config)
    ]
    records = [record for record in read_cells(out, recipes) if record is not None]
    about = {"commit": git_commit(), "hardware": hardware(), "recipe": config.model_dump(mode="json")}
    write_bytes(json.dumps({**about, "records": records}, indent=1).encode() + b"\n", out / "results.json")
    write_bytes(render_markdown(config, records).encode(), out / "results.md")


def render_markdown(study: LanguageConfig, records: list[dict[str, Any]]) -> str:
    """Tables of perplexity per byte, lower is better, as mean ± standard deviation over seeds."""
    machine = hardware()
    lines = [
        "# Merged decoder language models: perplexity per byte, lower is better",
        f"Made by `benchmarks/language.py` at commit {git_commit()} on {machine['cpu']}, {machine['cores']} cores, one "
        f"thread a training. Pre-trained on {', '.join(study.pretraining)} ({study.pretrain.steps} steps of "
        f"{study.pretrain.batch} windows of {study.model.length} tokens), fine-tuned on {', '.join(study.domains)} "
        f"({study.tune.steps} steps each); seeds {', '.join(map(str, study.seeds))} order the domains and the windows.",
        "Geometric mean over the domains, mean ± standard deviation over seeds. `chosen`: no calibration, the scaling "
        "factor that is best on validation texts: what one number does. `norm`, `ellipsoid`: calibrate_weights at the "
        "rule's own factor. `fsc`, `dsc`: calibration in feature space. -: not measured.",
    ]
    for name in study.training:
        own = [record for record in records if record["recipe"]["training"] == name]
        lines += [f"## {name}", *_render_references(study, own), _rules_table(study, own)]
    lines += [
        f"## By text; {study.pretraining[0]} is what was pre-trained on",
        *(_domain_table(study, records, name) for name in study.training),
    ]
    return "\n\n".join(lines) + "\n"


def _render_references(study: LanguageConfig, records: list[dict[str, Any]]) -> list[str]:
    """What the models themselves do, before any merging."""
    found = [record for record in records if record["recipe"]["rule"] == REFERENCE_CELL]
    if not found:
        return []

    def of(pick: Any) -> str:
        return format_mean([mean_perplexity({d: pick(r, d) for d in study.domains}) for r in found])

    base = of(lambda r, d: r["perplexity"]["theta_0"][d])
    each = of(lambda r, d: r["perplexity"][f"theta_{r['order'].index(d) + 1}"][d])
    last = of(lambda r, d: r["perplexity"][f"theta_{len(r['order'])}"][d])
    cosine = format_mean([record["cosine"]["mean"] for record in found])
    return [
        f"Pre-trained {base}; each domain's own model {each}; the last model {last}. Mean cosine of two task vectors "
        f"{cosine}, over the tensors that are calibrated."
    ]


def _rules_table(study: LanguageConfig, records: list[dict[str, Any]]) -> str:
    rows = [["rule", "factor", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    for rule in dict.fromkeys(rule for rule, _ in cell_choices(study) if rule != REFERENCE_CELL):
        own = [record for record in records if record["recipe"]["rule"] == rule]
        plain = [record for record in own if record["recipe"]["calibration"] == "none"]
        factors = sorted({record["scaling_factor"] for record in plain})
        best = sorted({record["chosen"]["scaling_factor"] for record in plain})
        words = f"{_format_numbers(factors)}; chosen {_format_numbers(best)}" if plain else "-"
        cells = [
            format_mean([mean_perplexity(_select_domains(study, of)) for of in _column_values(own, name)])
            for name in COLUMNS
        ]
        rows.append([rule, words, *cells])
    return _markdown_table(rows)


def _domain_table(study: LanguageConfig, records: list[dict[str, Any]], name: str) -> str:
    rows = [[f"rule, {name}", "", *study.evaluated_texts], ["---"] * (2 + len(study.evaluated_texts))]
    for rule in dict.fromkeys(rule for rule, _ in cell_choices(study) if rule != REFERENCE_CELL):
        own = [r for r in records if (r["recipe"]["rule"], r["recipe"]["training"]) == (rule, name)]
        for column in COLUMNS:
            if found := _column_values(own, column):
                rows.append(
                    [rule, column, *(format_mean([of[text] for of in found]) for text in study.evaluated_texts)]
                )
    return _markdown_table(rows)


def _column_values(records: list[dict[str, Any]], name: str) -> list[dict[str, float]]:
    """The perplexities, by domain, of one column's cells."""
    if name == "chosen":
        return [record["chosen"]["perplexity"] for record in records if "chosen" in record]
    return [record["perplexity"] for record in records if record["recipe"]["calibration"] == name]


def _select_domains(study: LanguageConfig, of: dict[str, float]) -> dict[str, float]:
    return {domain: of[domain] for domain in study.domains}


def format_mean(numbers: list[float]) -> str:
    if not numbers:
        return "-"
    spread = f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.3f}{spread}"


def _format_numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _markdown_table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    app()
