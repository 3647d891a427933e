"""What a recipe can name: data sets, models, heads and scenarios, each a name and a function that builds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from magmax.errors import MagMaxError
from magmax.rules import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from magmax.continual.data import Dataset
    from magmax.continual.encoder import Encoder
    from magmax.continual.scenario import Task

HERE = "magmax.continual"

DATA: dict[str, str | Callable[..., Dataset]] = {
    "newsgroups": f"{HERE}.data:newsgroups",
    "reuters52": f"{HERE}.texts:reuters52",
    "sentiments": f"{HERE}.texts:sentiments",
    "fashion_mnist": f"{HERE}.pictures:fashion_mnist",
    "digits": f"{HERE}.pictures:digits",
    "emoji": f"{HERE}.pictures:emoji",
    "hub": f"{HERE}.hub:hub",
    "images": f"{HERE}.hub:images",
    "pool": f"{HERE}.hub:pool",
    "joined": f"{HERE}.joining:joined",
    "long_tail": f"{HERE}.joining:long_tail",
}
"""name -> (**options) -> Dataset: raw items; the same for every seed of a benchmark."""

MODELS: dict[str, str | Callable[..., Encoder]] = {
    "minilm": f"{HERE}.encoder:minilm",
    "clip": f"{HERE}.vision:clip",
    "open_clip": f"{HERE}.open_clip:open_clip",
    "vit_s": f"{HERE}.vision:vit_s",
    "efficientnet_lite0": f"{HERE}.vision:efficientnet_lite0",
    "trained_head": f"{HERE}.trained_head:trained_head",
}
"""name -> (**options) -> Encoder with the weights theta_0; what must not be trained has requires_grad off."""

HEADS: dict[str, str | Callable[..., Tensor]] = {
    "zero_shot": f"{HERE}.heads:zero_shot",
    "nearest_class_mean": f"{HERE}.heads:nearest_class_mean",
    "trained": f"{HERE}.trained_head:trained",
}
"""name -> (encoder, dataset, **options) -> Tensor of shape (classes, width), frozen, made with theta_0."""

SCENARIOS: dict[str, str | Callable[..., Sequence[Task]]] = {
    "class_incremental": f"{HERE}.scenario:class_incremental_tasks",
    "domain_incremental": f"{HERE}.scenario:domain_incremental",
    "data_sets": f"{HERE}.scenario:data_sets",
}
"""name -> (dataset, seed, **options) -> the tasks, in order."""

TABLES: dict[str, Mapping[str, Any]] = {"data": DATA, "model": MODELS, "head": HEADS, "scenario": SCENARIOS}
"""The registries by the keys of a recipe."""

Choice = str | Mapping[str, Any]
"""As a recipe writes it: a name, or {name: {option: value}}; "package.module:function" is a name too."""


def build(kind: str, choice: Choice, *given: Any) -> Any:
    """Call the builder that the choice names with what is given and the choice's options.

    Builders are named by "module:function" until they are wanted, so that naming one imports nothing.
    Raises MagMaxError for a name that is none and for options that the builder does not have, with the nearest.
    """
    name, options = split(kind, choice)
    builder = find(kind, TABLES[kind], name)
    known = list(inspect.signature(builder).parameters)[len(given) :]
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "it takes none"
            raise MagMaxError(f"{kind}: {name} has no option {option!r}; {hint}")
    try:
        inspect.signature(builder).bind(*given, **options)
    except TypeError as error:
        raise MagMaxError(f"{kind}: {name}: {error}") from error
    return builder(*given, **options)


def split(kind: str, choice: Choice) -> tuple[str, dict[str, Any]]:
    """The name and the options of a choice."""
    if isinstance(choice, str):
        return choice, {}
    if len(choice) == 1:
        ((name, options),) = choice.items()
        if options is None or isinstance(options, Mapping):
            return str(name), dict(cast("Mapping[str, Any]", options or {}))
    raise MagMaxError(f"{kind}: expected a name or {{name: {{option: value}}}}, not {choice!r}")


def find(kind: str, table: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """The builder of that name, or the function that "package.module:function" names."""
    found = table.get(name, name if ":" in name else None)
    if found is None:
        raise MagMaxError(
            f"{kind}: there is no {name!r}; {nearest(name, list(table))}, or name a package.module:function"
        )
    if not isinstance(found, str):
        return found
    module, _, function = found.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise MagMaxError(f"{kind}: {name}: cannot be imported: {error}") from error
