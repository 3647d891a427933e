"""How far a merge's features fall short of each task's own, layer by layer, and the xi that makes up for it.

    .venv/bin/python benchmarks/features.py benchmarks/continual/{newsgroups-5,fashion-mnist-5}.yaml

Averages the checkpoints that `magmax bench` left in benchmarks/results/continual/NAME/training, measures 8 validation
examples of each task, with ratios of places (as published) and of whole samples, and writes
benchmarks/results/continual/magic-features.csv, and draws the first seed's to docs/magic.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import yaml
from harness.places import RESULTS

import magmax
from magmax.calibration import FeatureOptions, calibrate_features, draw
from magmax.continual.cells import samples_of, training_folder
from magmax.continual.context import build_context
from magmax.continual.experiment import Experiment

CSV_HEADER = ("benchmark", "seed", "training", "ratio", "layer", "kind", "xi", "merged_over_own")
TRAININGS, RATIOS = ("sequential", "independent"), ("place", "sample")
PLOTTED_BENCHMARK = "newsgroups-5"


def measure_layers(recipe: Path) -> Iterator[tuple[object, ...]]:
    """A row for each layer that is calibrated."""
    experiment = Experiment.model_validate(yaml.safe_load(recipe.read_text()))
    for seed in experiment.seeds:
        here = build_context(experiment, seed)
        encoder, samples = here.encoder, samples_of(here, here.tasks, 8)
        for training in TRAININGS:
            folder = training_folder(RESULTS / "continual" / recipe.stem, experiment, seed, training)
            paths = [folder / f"theta_{t}.safetensors" for t in range(1, len(here.tasks) + 1)]
            for ratio in RATIOS:
                encoder.model.load_state_dict(magmax.merge("average", here.base, paths))
                options = FeatureOptions(ratio=ratio)
                report = calibrate_features(
                    encoder.model, here.base, paths, samples, lambda model, items, run=encoder: run(items), options
                ).report
                if (recipe.stem, seed, ratio) == (PLOTTED_BENCHMARK, experiment.seeds[0], "place"):
                    draw(report, Path("docs/magic") / f"{training}.png")
                for layer in report.layers:
                    if layer.features and not layer.why:
                        short = mean(layer.features_before) / mean(layer.features)
                        about = recipe.stem, seed, training, ratio, layer.name, layer.kind
                        yield *about, round(layer.xi, 4), round(short, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    with (RESULTS / "continual" / "magic-features.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(CSV_HEADER)
        for recipe in parser.parse_args().recipes:
            table.writerows(measure_layers(recipe))


if __name__ == "__main__":
    main()
