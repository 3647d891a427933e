"""Whether models can be merged into a base, seen from their headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..checkpoints import Checkpoint
from ..errors import listed

Mismatch = Literal["strict", "base"]
"""What to do where a model's tensors are not the base's: refuse, or keep the base's tensor."""


def compare(base: Checkpoint, models: Sequence[Checkpoint], mismatch: Mismatch = "strict") -> dict[str, str]:
    """The tensors that will not be merged, key -> why: those of the base are carried over as they are.

    Raises:
        MagMaxError: under "strict", one error that lists every key that is missing, extra, or of another shape or kind
            in any model.
    """
    carried = {key: f"{spec.dtype} is not merged" for key, spec in base.specs.items() if not spec.floating}
    problems: list[str] = []
    for model in models:
        for key, problem in _differences(base, model).items():
            problems.append(problem)
            carried[key] = problem
    if problems and mismatch == "strict":
        problems.append("to keep the base's tensor wherever a model has no match: --mismatch base")
        raise listed(f"the models do not match {base.label}", problems)
    return carried


def _differences(base: Checkpoint, model: Checkpoint) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, ours in base.specs.items():
        theirs = model.specs.get(model.resolve(key))
        if theirs is None:
            found[key] = f"{model.label}: has no tensor {key}, which is {ours} in {base.label}"
        elif theirs.shape != ours.shape:
            found[key] = f"{model.label}: {key} has shape {list(theirs.shape)}, but {list(ours.shape)} in {base.label}"
        elif theirs.floating != ours.floating:
            found[key] = f"{model.label}: {key} is {theirs.dtype}, but {ours.dtype} in {base.label}"
        elif theirs.dtype == "F64" != ours.dtype and ours.floating:
            found[key] = f"{model.label}: {key} is F64, wider than {ours.dtype} in {base.label}; convert one of them"
    for key, theirs in model.specs.items():
        if key in base.aliases:
            found[key] = f"{model.label}: stores {key} apart, but in {base.label} it is tied to {base.aliases[key]}"
        elif key not in base.specs:
            found[key] = f"{model.label}: has a tensor {key}, {theirs}, that {base.label} has not"
    return found
