"""What to try next: plain rules from numbers to advice, each with the numbers it stands on."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoints.lora.adapted_model import split_base_and_adapter
from ..continual.evaluation.tables import PairedComparison
from ..continual.experiment import LAST_CHECKPOINT, ZERO_SHOT
from ..merging.model_names import default_names
from .method_comparison import MethodResult, Records, compare_best_two, competing_methods
from .weight_statistics import WHOLE_MODEL, WeightStatistics
from .weight_studies import StatisticsByOrigin

MIN_SEEDS = 3
RANDOM_CONFLICTS, LOW_CONFLICTS = 0.8, 0.4
"""Sign conflicts, as a share of what chance would give: from here on there is no common direction; up to here
there is one."""
HIGH_COSINE = 0.5
"""The mean cosine from which on task vectors count as nearly one."""
HIGH_SHARE, LOW_SHARE = 2.0, 0.5
"""A task's contribution in units of an even share: more than this is much, less than this is little."""
HIGH_NORM_RATIO = 2.0
"""How many times as far as another a task vector may reach before magnitudes are no fair measure."""


@dataclass(frozen=True)
class Recommendation:
    """One thing to try or to know.

    Attributes:
        kind: "try" for a next step, "caution" for a limit of what the numbers can say, "good" for what needs nothing.
        headline: what to do or to know.
        evidence: the numbers behind it.
    """

    kind: str
    headline: str
    evidence: str


def recommend_from_weights(statistics: StatisticsByOrigin) -> list[Recommendation]:
    """Return what the task vectors alone suggest; of several trainings together where it is the same."""
    reasons_by_advice: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for training in dict.fromkeys(origin.training for origin in statistics):
        selected = {
            origin: recommendations for origin, recommendations in statistics.items() if origin.training == training
        }
        for rule in (_check_signs, _check_directions, _check_shares, _check_norms):
            for each in rule(selected):
                reasons_by_advice.setdefault((each.kind, each.headline), []).append((training, each.evidence))
    recommendations: list[Recommendation] = []
    for (kind, headline), reasons in reasons_by_advice.items():
        trainings = [training for training, _ in reasons if training != "given"]
        where = f"{', '.join(trainings)}: " if trainings else ""
        because = " ".join(f"{training}: {why}" if len(trainings) > 1 else why for training, why in reasons)
        recommendations.append(Recommendation(kind, where + headline, because))
    if apart := {
        key for each in statistics.values() for key, why in each.left_out.items() if "is not merged" not in why
    }:
        some = ", ".join(sorted(apart)[:3]) + (", ..." if len(apart) > 3 else "")
        recommendations.append(
            Recommendation(
                "caution",
                "Some tensors were left out: a merge needs to know what to do with them (mismatch)",
                f"{len(apart)} tensors are not in all models with one shape: {some}.",
            )
        )
    return recommendations


def _check_signs(statistics: StatisticsByOrigin) -> Iterator[Recommendation]:
    tasks = len(next(iter(statistics.values())).task_names)
    if tasks < 2:
        return
    wholes = [tallies.by_layer()[WHOLE_MODEL] for tallies in statistics.values()]
    share = float(np.mean([w.conflicts / w.shared if w.shared else 0.0 for w in wholes]))
    expected = [each.expected_conflicts() for each in statistics.values()]
    chance, kind = float(np.mean([layers[WHOLE_MODEL] for layers, _ in expected])), expected[0][1]
    numbers = f"{share:.1%} of the shared elements are pulled both ways; {kind} would give {chance:.1%}."
    if share >= RANDOM_CONFLICTS * chance:
        yield Recommendation(
            "try",
            "Choose signs instead of adding up: the rules magmax or ties, rather than average or task_arithmetic",
            f"{numbers} Sums of such changes cancel.",
        )
    elif share <= LOW_CONFLICTS * chance:
        yield Recommendation(
            "good",
            "The tasks agree in sign; the rule average should do nearly as well as magmax, so compare both",
            numbers,
        )


def _check_directions(statistics: StatisticsByOrigin) -> Iterator[Recommendation]:
    tasks = len(next(iter(statistics.values())).task_names)
    if tasks < 2:
        return
    upper = np.triu_indices(tasks, 1)
    cosines = [tallies.by_layer()[WHOLE_MODEL].cosines[upper] for tallies in statistics.values()]
    mean = float(np.nanmean(cosines)) if np.isfinite(cosines).any() else math.nan
    if mean > HIGH_COSINE:
        yield Recommendation(
            "caution",
            f"Do not sum these: with the rule task_arithmetic take a scaling factor near 1/{tasks}",
            f"the mean cosine of two task vectors is {mean:.2f}, and a sum goes the common way {tasks} times.",
        )


def _check_shares(statistics: StatisticsByOrigin) -> Iterator[Recommendation]:
    names = next(iter(statistics.values())).task_names
    wholes = [tallies.by_layer()[WHOLE_MODEL].winner_counts for tallies in statistics.values()]
    if len(names) < 2 or not all(w.sum() for w in wholes):
        return
    shares = np.mean([w / w.sum() for w in wholes], axis=0)
    most, least = int(shares.argmax()), int(shares.argmin())
    if shares[most] * len(names) > HIGH_SHARE or shares[least] * len(names) < LOW_SHARE:
        command = _tune_command(next(iter(statistics.values())), shares.tolist(), least)
        yield Recommendation(
            "try",
            f"If {names[least]} matters, give it an even share" + (f": `{command}`" if command else ""),
            f"{names[most]} supplies {shares[most]:.1%} of the merged elements, {names[least]} {shares[least]:.1%}; "
            f"even shares would be {1 / len(names):.1%}.",
        )


def _check_norms(statistics: StatisticsByOrigin) -> Iterator[Recommendation]:
    names = next(iter(statistics.values())).task_names
    norms = np.mean([tallies.by_layer()[WHOLE_MODEL].norms for tallies in statistics.values()], axis=0)
    most, least = int(norms.argmax()), int(norms.argmin())
    if norms[least] > 0 and norms[most] / norms[least] > HIGH_NORM_RATIO:
        yield Recommendation(
            "caution",
            f"Magnitudes are no fair measure here: was {names[most]} trained longer, or faster?",
            f"Its task vector is {norms[most] / norms[least]:.2g} times as long as that of {names[least]}, and MagMax "
            "takes the largest changes, whoever made them.",
        )


def recommend_from_accuracies(methods: Sequence[MethodResult], records: Records) -> list[Recommendation]:
    """Return what the accuracies suggest."""
    if not methods:
        return []
    recommendations: list[Recommendation] = []
    for rule in (_check_best_method, _check_seed_count, _check_merging_gain, _check_factor_range, _check_harmed_tasks):
        recommendations += rule(methods, records)
    return recommendations


def _check_best_method(methods: Sequence[MethodResult], records: Records) -> Iterator[Recommendation]:
    pair = compare_best_two(methods)
    if pair is None or pair.difference.n < 2:
        return
    difference, half = 100 * pair.difference.mean, 100 * pair.difference.half
    numbers = (
        f"{difference:+.1f} points, 95 % interval {difference - half:+.1f} to {difference + half:+.1f} over "
        f"{pair.difference.n} paired seeds; t-test p = {pair.p_t:.2g}."
    )
    if is_significant(pair):
        yield Recommendation("good", f"{pair.ours} is ahead of the next best, {pair.other}", numbers)
    else:
        yield Recommendation("caution", f"{pair.ours} and {pair.other} cannot be told apart: choose by cost", numbers)


def is_significant(pair: PairedComparison) -> bool:
    """Return whether the interval of the difference leaves out zero."""
    return pair.difference.mean - pair.difference.half > 0


def _check_seed_count(methods: Sequence[MethodResult], records: Records) -> Iterator[Recommendation]:
    count = len({record["seed"] for record in records})
    if count < MIN_SEEDS:
        yield Recommendation(
            "caution",
            f"Run at least {MIN_SEEDS} seeds before you believe a ranking",
            f"These are the numbers of {count} seed{'s' * (count > 1)}; a single one proves nothing.",
        )


def _check_merging_gain(methods: Sequence[MethodResult], records: Records) -> Iterator[Recommendation]:
    """Merging against the last model of the same training, and against not training at all."""
    ours = competing_methods(methods)
    merged = [method for method in ours if method.rule not in (LAST_CHECKPOINT, ZERO_SHOT)]
    unmerged = [method for method in ours if method.rule == LAST_CHECKPOINT]
    last = next((method for method in unmerged if merged and method.training == merged[0].training), None)
    last = last or next(iter(unmerged), None)
    zero = next((method for method in ours if method.rule == ZERO_SHOT), None)
    if merged and last:
        gain = 100 * (merged[0].average_accuracy.mean - last.average_accuracy.mean)
        headline = "Merge: it keeps what the last model forgets" if gain > 0 else "Merging does not pay here yet"
        forgot = last.means.get("forgetting")
        because = f"{merged[0].name} is {abs(gain):.1f} points {'above' if gain > 0 else 'below'} {last.name}"
        because += f", which forgets {100 * forgot.mean:.1f} points" if forgot else ""
        yield Recommendation("good" if gain > 0 else "caution", headline, because + ".")
    if merged and zero and zero.average_accuracy.mean >= merged[0].average_accuracy.mean:
        yield Recommendation(
            "caution",
            "Train longer, or with a higher learning rate: the pre-trained model is still as good",
            f"zero-shot {zero.average_accuracy.mean:.1%}, the best merge {merged[0].average_accuracy.mean:.1%}.",
        )


def _check_factor_range(methods: Sequence[MethodResult], records: Records) -> Iterator[Recommendation]:
    """A factor chosen at the end of the list that was searched."""
    edges: dict[str, list[float]] = {}
    lists: dict[str, list[float]] = {}
    for record in records:
        search = {float(factor): score for factor, score in (record.get("search") or {}).items()}
        if len(search) > 1:
            best = max(search, key=search.__getitem__)
            lists[record["method"]] = sorted(search)
            if best in (min(search), max(search)):
                edges.setdefault(record["method"], []).append(best)
    sides: dict[str, list[str]] = {}
    for method, chosen in edges.items():
        if len(chosen) * 2 > sum(record["method"] == method for record in records):
            sides.setdefault("largest" if max(chosen) == lists[method][-1] else "smallest", []).append(method)
    if sides:
        edges_text = "; ".join(f"the {side} for {', '.join(names)}" for side, names in sides.items())
        searched = ", ".join(f"{factor:g}" for factor in max(lists.values(), key=len))
        yield Recommendation(
            "try",
            "Search more scaling factors: the best ones lay at the end of the list",
            f"Of {searched}, held-out data mostly chose {edges_text}.",
        )


def _check_harmed_tasks(methods: Sequence[MethodResult], records: Records) -> Iterator[Recommendation]:
    """Tasks on which the best merge is worse than the pre-trained model."""
    ours = competing_methods(methods)
    best = next((method for method in ours if method.rule not in (LAST_CHECKPOINT, ZERO_SHOT)), None)
    zero = next((method for method in ours if method.rule == ZERO_SHOT), None)
    if best is None or zero is None:
        return
    drops = {
        task: best.accuracy(best.num_tasks, task).mean - zero.accuracy(zero.num_tasks, task).mean
        for task in range(1, best.num_tasks + 1)
    }
    if harmed := {task: drop for task, drop in drops.items() if drop < -0.01}:
        worst = min(harmed, key=harmed.__getitem__)
        yield Recommendation(
            "try",
            f"Prefer task {worst} (the rule tunable), or lower the scaling factor",
            f"{best.name} is {-100 * harmed[worst]:.1f} points below the pre-trained model on task {worst}"
            + (f", and below it on {len(harmed) - 1} more." if len(harmed) > 1 else "."),
        )


def sort_recommendations(recommendations: Sequence[Recommendation]) -> list[Recommendation]:
    """Return what to try, then what to beware of, then what is well."""
    order = {"try": 0, "caution": 1, "good": 2}
    return sorted(dict.fromkeys(recommendations), key=lambda each: order[each.kind])


def _tune_command(statistics: WeightStatistics, shares: Sequence[float], least: int) -> str:
    """The command that merges the same models, one of them with an even share and the others with what is left.

    Nothing, where the models cannot be named on a command line.
    """
    if not all(map(_can_be_named, statistics.sources)):
        return ""
    base, *models = statistics.sources
    even = 1 / len(models)
    left = (1 - even) / max(sum(shares) - shares[least], 1e-12)
    wanted = [even if task == least else share * left for task, share in enumerate(shares)]
    names = default_names([(split_base_and_adapter(model) or (model,))[-1] for model in models])
    prefer = [f"--prefer={name}={share:.3f}" for name, share in zip(names, wanted, strict=True)]
    mismatch = ["--mismatch", "base"] * any("is not merged" not in why for why in statistics.left_out.values())
    out = "tuned" if Path(base).is_dir() else "tuned.safetensors"
    return shlex.join(["magmax", "tune", *models, "--base", base, *prefer, *mismatch, "--out", out])


def _can_be_named(source: str) -> bool:
    """Return whether a command line can name a checkpoint: a file, a folder, a URL, an id on the hub, base+adapter."""
    return os.path.exists(source) or "/" in source or "+" in source
