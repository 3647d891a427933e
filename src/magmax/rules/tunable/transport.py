"""A transport problem from many elements to few tasks, in memory: prices, then a flow for the last few elements."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

MAX_SWEEPS = 60
SAMPLING_STEPS = (64, 8, 1)
"""Prices are first found on every 64th element, then on every 8th."""


def best_rows(net: Floats) -> Places:
    """The row of the largest entry of each column; of equal ones the last."""
    best, rows = net[0].copy(), np.zeros(net.shape[1], np.int16)
    beats = np.empty_like(rows)
    for number, row in enumerate(net[1:], start=1):  # several times as fast as argmax
        np.multiply(row >= best, np.int16(number), out=beats)
        np.maximum(rows, beats, out=rows)
        np.maximum(best, row, out=best)
    return rows.astype(np.intp)


def balance_prices(worth: Floats, wanted: NDArray[Any], prices: Floats) -> Floats:
    """Prices under which about `wanted` elements go to each task, an element going to argmax_t worth_t - price_t.

    One price after another is set so that its task gets what is wanted, the others' prices staying; only comparisons,
    sums and differences are used, so that every machine finds the same.
    """
    prices = prices.copy()
    for step in SAMPLING_STEPS:
        part = worth[:, ::step]
        if part.shape[1] < 64 * len(worth) and step > 1:
            continue
        counts = np.rint(wanted * (part.shape[1] / worth.shape[1])).astype(np.int64)
        least, best_prices = None, prices
        stale = 0
        for _ in range(MAX_SWEEPS):
            prices = _sweep_prices(part, counts, prices)
            off = int(np.abs(np.bincount(best_rows(part - prices[:, None]), minlength=len(worth)) - counts).sum())
            stale = stale + 1 if least is not None and off >= least else 0
            if least is None or off < least:
                least, best_prices = off, prices
            if off <= len(worth) + part.shape[1] // 10_000 or stale > 3:
                break
        prices = best_prices
    return prices


def _sweep_prices(worth: Floats, wanted: NDArray[np.int64], prices: Floats) -> Floats:
    """Each price in turn set for what is wanted of its task."""
    prices = prices.copy()
    later = _best_of_later(worth, prices)
    earlier = np.full(worth.shape[1], -np.inf)
    for task, count in enumerate(wanted.tolist()):
        best_other = np.maximum(earlier, later[task], out=later[task])
        prices[task] = _threshold(worth[task] - best_other, count, prices[task])
        np.maximum(earlier, worth[task] - prices[task], out=earlier)
    return prices


def _best_of_later(worth: Floats, prices: Floats) -> Floats:
    """For each task the most that an element is worth, less its price, to any task after it."""
    best = np.full_like(worth, -np.inf)
    for task in reversed(range(len(worth) - 1)):
        np.maximum(best[task + 1], worth[task + 1] - prices[task + 1], out=best[task])
    return best


def _threshold(lead: Floats, count: int, old: float) -> float:
    """A number that `count` of the leads exceed."""
    if not len(lead):
        return old
    if count <= 0:
        return float(np.nextafter(lead.max(), np.inf))
    if count >= len(lead):
        return float(np.nextafter(lead.min(), -np.inf))
    below, above = np.partition(lead, (len(lead) - count - 1, len(lead) - count))[[-count - 1, -count]]
    return float(below + (above - below) / 2)


def find_undecided(net: Floats, windows: Floats) -> tuple[Places, NDArray[np.bool_]]:
    """The best task of each element, and whether that leads some other task by no more than their window."""
    best = best_rows(net)
    leads = net.max(axis=0) - net
    leads[best, np.arange(len(best))] = np.inf
    return best, (leads <= windows.T[:, best]).any(axis=0)


def narrow_windows(net: Floats, windows: Floats, part: float) -> Floats:
    """For each ordered pair of tasks, by how much the first must lead the second for an element to be clear.

    `part` of the elements, at most, are not clear in some pair. In each pair it is a number of them that goes with the
    square root of what the lesser of the two tasks has, as does the error of prices that were found on a sample; and
    not a distance, as equal magnitudes may put most elements of one pair closer together than any of another.
    """
    at = best_rows(net)
    leads = {task: net[task, at == task] - net[:, at == task] for task in range(len(net)) if (at == task).any()}
    ordered = {task: np.sort(lead, axis=1) for task, lead in leads.items()}

    counts = np.bincount(at, minlength=len(net))

    def at_part(share: float) -> Floats:
        found = windows.copy()
        for task, lead in ordered.items():
            last = (share * np.sqrt(np.minimum(counts[task], counts))).astype(np.intp).clip(0, lead.shape[1] - 1)
            found[task] = np.minimum(found[task], lead[np.arange(len(net)), last])
        np.fill_diagonal(found, -1.0)
        return found

    low, high = 0.0, float(np.sqrt(net.shape[1]))
    for _ in range(16):
        middle = (low + high) / 2
        least = at_part(middle)
        near = sum(int((lead <= least[task][:, None]).any(axis=0).sum()) for task, lead in leads.items())
        low, high = (middle, high) if near <= part * net.shape[1] else (low, middle)
    found = at_part(low)
    np.fill_diagonal(found, 0.0)
    return found


def count_misplaced(worth: Floats, wanted: NDArray[np.int64], prices: Floats) -> int:
    """Return how many elements go to another task, under these prices, than they must for all to have what is
    wanted.
    """
    counts = np.bincount(best_rows(worth - prices[:, None]), minlength=len(worth))
    return int((counts - wanted).clip(0).sum())


def solve_exactly(worth: Floats, wanted: NDArray[np.int64], prices: Floats, reach: Floats) -> tuple[Floats, Places]:
    """The choice of most worth that gives each task just what is wanted, and prices that prove it.

    Of such prices some are given, if there are any, of which none rises against another by more than their `reach`.

    Starts from the choice under `prices`, the best for the counts it has, and moves one element after another along the
    cheapest chain of tasks from a surplus to a deficit (successive shortest paths).
    """
    at = best_rows(worth - prices[:, None])
    surplus = np.bincount(at, minlength=len(worth)) - wanted
    moves = int(surplus.clip(0).sum())
    columns = _candidate_moves(worth, at, moves)
    near, spot = worth[:, columns], at[columns]
    costs, movers = _move_costs(near, spot, prices)
    for _ in range(moves):
        chain = _cheapest_path(costs, surplus)
        for task, other in pairwise(chain):
            spot[movers[task, other]] = other
        surplus[chain[0]] -= 1
        surplus[chain[-1]] += 1
        costs, movers = _move_costs(near, spot, prices)
    at[columns] = spot
    change = _potentials(np.minimum(costs, reach))
    within = (change[:, None] - change <= costs).all()
    return prices + (change if within else _potentials(costs)), at


def _candidate_moves(worth: Floats, at: Places, moves: int) -> Places:
    """For each ordered pair of tasks the elements that may have to move, as many as there are moves and one."""
    candidates: set[int] = set()
    for task in range(len(worth)):
        elements_of_task = np.flatnonzero(at == task)
        for other in range(len(worth)):
            if other != task and len(elements_of_task):
                cost = worth[task, elements_of_task] - worth[other, elements_of_task]
                most = min(moves, len(elements_of_task) - 1)
                candidates.update(elements_of_task[np.argpartition(cost, most)[: most + 1]].tolist())
    return np.array(sorted(candidates), np.intp)


def _move_costs(worth: Floats, at: Places, prices: Floats) -> tuple[Floats, Places]:
    """For each ordered pair of tasks the least loss of moving an element from one to the other, and that element."""
    tasks = len(worth)
    costs, movers = np.full((tasks, tasks), np.inf), np.zeros((tasks, tasks), np.intp)
    for task in range(tasks):
        elements_of_task = np.flatnonzero(at == task)
        if len(elements_of_task):
            net = worth[:, elements_of_task] - prices[:, None]
            loss = net[task] - net
            first = loss.argmin(axis=1)
            movers[task] = elements_of_task[first]
            costs[task] = loss[np.arange(tasks), first]
    np.fill_diagonal(costs, np.inf)
    return costs, movers


def _cheapest_path(costs: Floats, surplus: NDArray[np.int64]) -> list[int]:
    """The chain of tasks of least total cost from one in surplus to one in deficit (Bellman and Ford)."""
    reach = np.where(surplus > 0, 0.0, np.inf)
    source = np.full(len(costs), -1)
    for _ in range(len(costs)):
        through = reach[:, None] + costs
        least = through.min(axis=0)
        better = least < reach
        if not better.any():
            break
        source[better] = through.argmin(axis=0)[better]
        reach = np.minimum(reach, least)
    chain = [int(np.where(surplus < 0, reach, np.inf).argmin())]
    while source[chain[0]] >= 0 and len(chain) <= len(costs):
        chain.insert(0, int(source[chain[0]]))
    return chain


def _potentials(costs: Floats) -> Floats:
    """The changes of price after which no move would gain anything."""
    change = np.zeros(len(costs))
    for _ in range(len(costs)):
        change = np.minimum(change, (costs + change).min(axis=1))
    return change
