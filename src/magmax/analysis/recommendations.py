"""What to try next: plain rules from numbers to advice, each with the numbers it stands on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..continual.evaluation.tables import Paired
from ..continual.experiment import LAST, ZERO_SHOT
from .method_comparison import Method, Records, best_two, rivals
from .weight_statistics import WHOLE
from .weight_studies import Tallies

FEW_SEEDS = 3
LIKE_COINS, ONE_WAY = 0.8, 0.4
"""Sign conflicts, as a share of what coin flips would give: from here on there is no common direction; up to here
there is one."""
ONE_DIRECTION = 0.5
"""The mean cosine from which on task vectors count as nearly one."""
DOMINANT, UNHEARD = 2.0, 0.5
"""A task's contribution in units of an even share: more than this is much, less than this is little."""
FAR = 2.0
"""How many times as far as another a task vector may reach before magnitudes are no fair measure."""


@dataclass(frozen=True)
class Advice:
    """One thing to try or to know.

    Attributes:
        kind: "try" for a next step, "caution" for a limit of what the numbers can say, "good" for what needs nothing.
        headline: what to do or to know.
        because: the numbers behind it.
    """

    kind: str
    headline: str
    because: str


def about_weights(tallies: Tallies) -> list[Advice]:
    """What the task vectors alone suggest; of several chains together where it is the same."""
    told: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for chain in dict.fromkeys(origin.chain for origin in tallies):
        own = {origin: found for origin, found in tallies.items() if origin.chain == chain}
        for rule in (_signs, _directions, _shares, _lengths):
            for each in rule(own):
                told.setdefault((each.kind, each.headline), []).append((chain, each.because))
    found: list[Advice] = []
    for (kind, headline), reasons in told.items():
        chains = [chain for chain, _ in reasons if chain != "given"]
        where = f"{', '.join(chains)}: " if chains else ""
        because = " ".join(f"{chain}: {why}" if len(chains) > 1 else why for chain, why in reasons)
        found.append(Advice(kind, where + headline, because))
    if apart := {key for each in tallies.values() for key, why in each.apart.items() if "is not merged" not in why}:
        some = ", ".join(sorted(apart)[:3]) + (", ..." if len(apart) > 3 else "")
        found.append(
            Advice(
                "caution",
                "Some tensors were left out: look at `--mismatch` before you merge",
                f"{len(apart)} tensors are not in all models with one shape: {some}.",
            )
        )
    return found


def _signs(tallies: Tallies) -> Iterator[Advice]:
    tasks = len(next(iter(tallies.values())).tasks)
    if tasks < 2:
        return
    wholes = [found.layers()[WHOLE] for found in tallies.values()]
    share = float(np.mean([w.conflicts / w.shared if w.shared else 0.0 for w in wholes]))
    chance = 1 - 2.0 ** (1 - tasks)
    numbers = f"{share:.1%} of the shared elements are pulled both ways; coin flips would give {chance:.1%}."
    if share >= LIKE_COINS * chance:
        yield Advice(
            "try",
            "Choose signs instead of adding them up: `magmax` or `ties`, rather than `average` or `task_arithmetic`",
            f"{numbers} Sums of such changes cancel.",
        )
    elif share <= ONE_WAY * chance:
        yield Advice(
            "good",
            "The tasks agree in sign; `average` should do nearly as well as `magmax`, so compare both",
            f"{numbers} That is what sequential fine-tuning does.",
        )


def _directions(tallies: Tallies) -> Iterator[Advice]:
    tasks = len(next(iter(tallies.values())).tasks)
    if tasks < 2:
        return
    upper = np.triu_indices(tasks, 1)
    cosines = [found.layers()[WHOLE].cosines[upper] for found in tallies.values()]
    mean = float(np.nanmean(cosines)) if np.isfinite(cosines).any() else math.nan
    if mean > ONE_DIRECTION:
        yield Advice(
            "caution",
            f"Do not sum these: with `task_arithmetic` take a scaling factor near 1/{tasks}",
            f"the mean cosine of two task vectors is {mean:.2f}, and a sum goes the common way {tasks} times.",
        )


def _shares(tallies: Tallies) -> Iterator[Advice]:
    names = next(iter(tallies.values())).tasks
    wholes = [found.layers()[WHOLE].supplied for found in tallies.values()]
    if len(names) < 2 or not all(w.sum() for w in wholes):
        return
    shares = np.mean([w / w.sum() for w in wholes], axis=0)
    most, least = int(shares.argmax()), int(shares.argmin())
    if shares[most] * len(names) > DOMINANT or shares[least] * len(names) < UNHEARD:
        yield Advice(
            "try",
            f"If {names[least]} matters, give it a say: `magmax tune --prefer {_quoted(names[least])}=1`",
            f"{names[most]} supplies {shares[most]:.1%} of the merged elements, {names[least]} {shares[least]:.1%}; "
            f"even shares would be {1 / len(names):.1%}.",
        )


def _lengths(tallies: Tallies) -> Iterator[Advice]:
    names = next(iter(tallies.values())).tasks
    norms = np.mean([found.layers()[WHOLE].norms for found in tallies.values()], axis=0)
    most, least = int(norms.argmax()), int(norms.argmin())
    if norms[least] > 0 and norms[most] / norms[least] > FAR:
        yield Advice(
            "caution",
            f"Magnitudes are no fair measure here: was {names[most]} trained longer, or faster?",
            f"Its task vector is {norms[most] / norms[least]:.2g} times as long as that of {names[least]}, and MagMax "
            "takes the largest changes, whoever made them.",
        )


def about_methods(found: Sequence[Method], records: Records) -> list[Advice]:
    """What the accuracies suggest."""
    if not found:
        return []
    told: list[Advice] = []
    for rule in (_winner, _seeds, _worth, _factors, _harmed):
        told += rule(found, records)
    return told


def _winner(found: Sequence[Method], records: Records) -> Iterator[Advice]:
    pair = best_two(found)
    if pair is None or pair.difference.n < 2:
        return
    difference, half = 100 * pair.difference.mean, 100 * pair.difference.half
    numbers = (
        f"{difference:+.1f} points, 95 % interval {difference - half:+.1f} to {difference + half:+.1f} over "
        f"{pair.difference.n} paired seeds; t-test p = {pair.p_t:.2g}."
    )
    if clear(pair):
        yield Advice("good", f"{pair.ours} is ahead of the next best, {pair.other}", numbers)
    else:
        yield Advice("caution", f"{pair.ours} and {pair.other} cannot be told apart: choose by cost", numbers)


def clear(pair: Paired) -> bool:
    """Whether the interval of the difference leaves out zero."""
    return pair.difference.mean - pair.difference.half > 0


def _seeds(found: Sequence[Method], records: Records) -> Iterator[Advice]:
    count = len({record["seed"] for record in records})
    if count < FEW_SEEDS:
        yield Advice(
            "caution",
            f"Run at least {FEW_SEEDS} seeds before you believe a ranking",
            f"These are the numbers of {count} seed{'s' * (count > 1)}; a single one proves nothing.",
        )


def _worth(found: Sequence[Method], records: Records) -> Iterator[Advice]:
    """Merging against the last model of the same chain, and against not training at all."""
    ours = rivals(found)
    merged = [method for method in ours if method.rule not in (LAST, ZERO_SHOT)]
    unmerged = [method for method in ours if method.rule == LAST]
    last = next((method for method in unmerged if merged and method.chain == merged[0].chain), None)
    last = last or next(iter(unmerged), None)
    zero = next((method for method in ours if method.rule == ZERO_SHOT), None)
    if merged and last:
        gain = 100 * (merged[0].main.mean - last.main.mean)
        headline = "Merge: it keeps what the last model forgets" if gain > 0 else "Merging does not pay here yet"
        forgot = last.means.get("forgetting")
        because = f"{merged[0].name} is {abs(gain):.1f} points {'above' if gain > 0 else 'below'} {last.name}"
        because += f", which forgets {100 * forgot.mean:.1f} points" if forgot else ""
        yield Advice("good" if gain > 0 else "caution", headline, because + ".")
    if merged and zero and zero.main.mean >= merged[0].main.mean:
        yield Advice(
            "caution",
            "Train longer, or with a higher learning rate: the pre-trained model is still as good",
            f"zero-shot {zero.main.mean:.1%}, the best merge {merged[0].main.mean:.1%}.",
        )


def _factors(found: Sequence[Method], records: Records) -> Iterator[Advice]:
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
        told = "; ".join(f"the {side} for {', '.join(names)}" for side, names in sides.items())
        searched = ", ".join(f"{factor:g}" for factor in max(lists.values(), key=len))
        yield Advice(
            "try",
            "Search more scaling factors: the best ones lay at the end of the list",
            f"Of {searched}, held-out data mostly chose {told}.",
        )


def _harmed(found: Sequence[Method], records: Records) -> Iterator[Advice]:
    """Tasks on which the best merge is worse than the pre-trained model."""
    ours = rivals(found)
    best = next((method for method in ours if method.rule not in (LAST, ZERO_SHOT)), None)
    zero = next((method for method in ours if method.rule == ZERO_SHOT), None)
    if best is None or zero is None:
        return
    drops = {
        task: best.accuracy(best.tasks, task).mean - zero.accuracy(zero.tasks, task).mean
        for task in range(1, best.tasks + 1)
    }
    if harmed := {task: drop for task, drop in drops.items() if drop < -0.01}:
        worst = min(harmed, key=harmed.__getitem__)
        yield Advice(
            "try",
            f"Prefer task {worst} with `magmax tune`, or lower the scaling factor",
            f"{best.name} is {-100 * harmed[worst]:.1f} points below the pre-trained model on task {worst}"
            + (f", and below it on {len(harmed) - 1} more." if len(harmed) > 1 else "."),
        )


def in_order(advice: Sequence[Advice]) -> list[Advice]:
    """What to try, then what to beware of, then what is well."""
    order = {"try": 0, "caution": 1, "good": 2}
    return sorted(dict.fromkeys(advice), key=lambda each: order[each.kind])


def _quoted(name: str) -> str:
    return f"'{name}'" if " " in name else name
