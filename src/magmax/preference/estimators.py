"""Preferences from what is known of the target: nothing, an emphasis, labels, or samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError, missing_extra, nearest_hint

Features = NDArray[np.floating[Any]]
FeaturePairs = Iterable[tuple[Features, Features]]
DistanceMethod = Literal["ot", "cos", "mmd"]

SOFTMAX_SCALES = {"ot": 100.0, "cos": 50.0, "mmd": 100.0}
"""What a distance is multiplied with before the softmax."""
MAX_SAMPLES = 500
SINKHORN_REGULARISATION = 0.1
SINKHORN_ITERATIONS = 100


def uniform_weights(tasks: int) -> list[float]:
    """The same from every task."""
    return geometric_weights(1.0, tasks)


def geometric_weights(a: float, tasks: int) -> list[float]:
    """Weights that move from early to late tasks as one number grows: w_t = a^t / sum_s a^s, t = 1..T.

    1 is uniform; a and 1/a mirror each other; 0 leaves the first task alone. The paper's own formula was not available.

    >>> geometric_weights(2, 3)
    [0.14285714285714285, 0.2857142857142857, 0.5714285714285714]

    Raises:
        MagMaxError: a below 0 or not finite, or no task.
    """
    if not 0 <= a < np.inf or tasks < 1:
        raise MagMaxError(f"a schedule needs a finite number of 0 or more, and a task; not {a} and {tasks} tasks")
    steps = np.arange(tasks) if a <= 1 else np.arange(tasks) - (tasks - 1)  # so that no power overflows
    return _normalise(np.power(float(a), steps))


def from_labels(labels: Iterable[Hashable], task_labels: Sequence[Collection[Hashable]]) -> list[float]:
    """w_t = s_t / sum_s s, s_t being how many target samples have a label of task t.

    A sample whose label is of no task does not count; one whose label is of several counts for each.

    >>> from_labels(["hockey", "hockey", "space", "baseball"], [{"space"}, {"hockey", "baseball"}])
    [0.25, 0.75]

    Raises:
        MagMaxError: no sample has a label of any task.
    """
    target_labels = list(labels)
    counts = np.array([sum(label in task_set for label in target_labels) for task_set in task_labels], float)
    if not counts.any():
        all_labels = sorted({str(label) for task_set in task_labels for label in task_set})
        raise MagMaxError(
            f"none of the {len(target_labels)} target samples has a label of any task; theirs are "
            f"{sorted({str(label) for label in target_labels})[:5]}, the tasks' {all_labels[:5]}"
        )
    return _normalise(counts)


def from_samples(pairs: FeaturePairs, method: DistanceMethod = "ot") -> list[float]:
    """Weights from how near the target is to each task, as that task's own encoder sees both.

    Args:
        pairs: for each task t, (X, Y): features of training samples of task t, shape (n, width), and of the target's
            samples, (m, width), both under encoder_t = theta_0 + tau_t. The first 500 of X are used.
        method: "ot": dist_t = sum(P * C), C the squared Euclidean distances / max(C), P Sinkhorn's plan between uniform
            weights (regularisation 0.1, 100 iterations), w = softmax(-100 dist). "cos": dist_t = 1 - cos(mean X,
            mean Y), w = softmax(-50 dist). "mmd": dist_t = the unbiased squared maximum mean discrepancy under
            exp(-|x - y|^2 / (2 s^2)), s the median distance of all pairs of samples, w = softmax(-100 dist).

    The first is Hiroshima et al., Tunable MagMax, arXiv 2605.20803, where its released code takes exp(-100 dist), which
    underflows, instead of the softmax, which is the same where it does not.

    Raises:
        MagMaxError: no samples, features of different widths or that are not finite, a method that is none.
    """
    if method not in SOFTMAX_SCALES:
        raise MagMaxError(f"there is no method {method!r}; {nearest_hint(method, list(get_args(DistanceMethod)))}")
    distance = cast(
        "Callable[[Features, Features], float]",
        {"ot": transport_distance, "cos": cosine_distance, "mmd": mmd_distance}[method],
    )
    distances = [distance(*_validate_features(*pair, number)) for number, pair in enumerate(pairs, start=1)]
    return softmax([-SOFTMAX_SCALES[method] * d for d in distances])


def from_all_methods(
    labels: Iterable[Hashable],
    task_labels: Sequence[Collection[Hashable]],
    pairs: Sequence[tuple[Features, Features]],
    on_failure: Callable[[str, str], object] = lambda method, why: None,
) -> dict[str, list[float]]:
    """A preference by `from_labels` and by each method of `from_samples`; `note` hears which failed, and why."""
    makers: dict[str, Callable[[], list[float]]] = {
        "label": lambda: from_labels(labels, task_labels),
        **{method: partial(from_samples, pairs, method) for method in get_args(DistanceMethod)},
    }
    preferences: dict[str, list[float]] = {}
    for method, maker in makers.items():
        try:
            preferences[method] = maker()
        except MagMaxError as error:
            on_failure(method, str(error))
    return preferences


def transport_distance(task_features: Features, target_features: Features) -> float:
    """The entropic transport cost between two samples, of squared distances relative to the largest."""
    try:
        import ot
    except ModuleNotFoundError as error:
        raise missing_extra("the method ot, unlike cos and mmd, needs POT", "preference") from error
    cost = squared_distances(task_features, target_features)
    cost /= cost.max() or 1.0
    plan: Any = ot.sinkhorn(
        ot.unif(len(task_features)),
        ot.unif(len(target_features)),
        cost,
        SINKHORN_REGULARISATION,
        numItermax=SINKHORN_ITERATIONS,
        stopThr=0,
        warn=False,
    )
    return float((np.asarray(plan) * cost).sum())


def cosine_distance(task_features: Features, target_features: Features) -> float:
    """1 - the cosine between the means of two samples."""
    one, other = task_features.mean(axis=0), target_features.mean(axis=0)
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return 1.0 - float(one @ other) / norms if norms else 1.0


def mmd_distance(task_features: Features, target_features: Features) -> float:
    """The unbiased squared maximum mean discrepancy, with a Gaussian kernel as wide as the median distance."""
    if min(len(task_features), len(target_features)) < 2:
        raise MagMaxError(
            f"mmd needs two samples of each task and of the target, not {len(task_features)} and {len(target_features)}"
        )
    both = np.concatenate([task_features, target_features])
    squares = squared_distances(both, both)
    width = float(np.median(squares[np.triu_indices(len(both), 1)])) or 1.0
    kernel = np.exp(-squares / (2 * width))
    n, m = len(task_features), len(target_features)
    within = (kernel[:n, :n].sum() - n) / (n * (n - 1)) + (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return float(within - 2 * kernel[:n, n:].mean())


def squared_distances(first: Features, second: Features) -> Features:
    """|x - y|^2 of all pairs: shape (n, m)."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.maximum(squares, 0)


def softmax(scores: Sequence[float]) -> list[float]:
    """exp(s_t) / sum_s exp(s); no task can underflow but against a far better one."""
    values = np.asarray(scores, float)
    return _normalise(np.exp(values - values.max()))


def _normalise(values: NDArray[Any]) -> list[float]:
    return (values / values.sum()).tolist()


def _validate_features(task_features: Any, target_features: Any, task_number: int) -> tuple[Features, Features]:
    """Both samples in float64, at most 500 of the first."""
    one, other = (np.asarray(sample, float) for sample in (task_features, target_features))
    if one.ndim != 2 or other.ndim != 2 or one.shape[1:] != other.shape[1:] or not len(one) or not len(other):
        raise MagMaxError(
            f"task {task_number}: features must be (samples, width), with some samples and one width; these have the "
            f"shapes "
            f"{list(one.shape)} and {list(other.shape)}"
        )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise MagMaxError(f"task {task_number}: its features hold NaN or infinity")
    return one[:MAX_SAMPLES], other
