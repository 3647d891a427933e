"""What a recipe can name: data sets, models, heads and scenarios, each a name and a function that builds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from ..errors import MagMaxError
from ..rules import nearest_hint

if TYPE_CHECKING:
    from torch import Tensor

    from .data.datasets import Dataset
    from .data.scenarios import Task
    from .models.text_encoder import Encoder

PACKAGE = "magmax.continual"

DATASETS: dict[str, str | Callable[..., Dataset]] = {
    "newsgroups": f"{PACKAGE}.data.datasets:newsgroups",
    "reuters52": f"{PACKAGE}.data.texts:reuters52",
    "sentiments": f"{PACKAGE}.data.texts:sentiments",
    "fashion_mnist": f"{PACKAGE}.data.pictures:fashion_mnist",
    "digits": f"{PACKAGE}.data.pictures:digits",
    "emoji": f"{PACKAGE}.data.pictures:emoji",
    "hub": f"{PACKAGE}.data.hub_datasets:hub",
    "images": f"{PACKAGE}.data.hub_datasets:images",
    "pool": f"{PACKAGE}.data.hub_datasets:pool",
    "joined": f"{PACKAGE}.data.combine:joined_datasets",
    "long_tail": f"{PACKAGE}.data.combine:long_tail",
}
"""name -> (**options) -> Dataset: raw items; the same for every seed of a benchmark."""

MODELS: dict[str, str | Callable[..., Encoder]] = {
    "minilm": f"{PACKAGE}.models.text_encoder:minilm",
    "clip": f"{PACKAGE}.models.vision:clip",
    "open_clip": f"{PACKAGE}.models.open_clip:open_clip",
    "vit_s": f"{PACKAGE}.models.vision:vit_s",
    "efficientnet_lite0": f"{PACKAGE}.models.vision:efficientnet_lite0",
    "trained_head": f"{PACKAGE}.models.trained_head:trained_head",
}
"""name -> (**options) -> Encoder with the weights theta_0; what must not be trained has requires_grad off."""

HEADS: dict[str, str | Callable[..., Tensor]] = {
    "zero_shot": f"{PACKAGE}.models.heads:zero_shot",
    "nearest_class_mean": f"{PACKAGE}.models.heads:nearest_class_mean",
    "trained": f"{PACKAGE}.models.trained_head:trained",
}
"""name -> (encoder, dataset, **options) -> Tensor of shape (classes, width), frozen, made with theta_0."""

SCENARIOS: dict[str, str | Callable[..., Sequence[Task]]] = {
    "class_incremental": f"{PACKAGE}.data.scenarios:class_incremental_tasks",
    "domain_incremental": f"{PACKAGE}.data.scenarios:domain_incremental",
    "data_sets": f"{PACKAGE}.data.scenarios:data_sets",
}
"""name -> (dataset, seed, **options) -> the tasks, in order."""

REGISTRIES: dict[str, Mapping[str, Any]] = {"data": DATASETS, "model": MODELS, "head": HEADS, "scenario": SCENARIOS}
"""The registries by the keys of a recipe."""

Choice = str | Mapping[str, Any]
"""As a recipe writes it: a name, or {name: {option: value}}; "package.module:function" is a name too."""


def build(kind: str, choice: Choice, *given: Any) -> Any:
    """Call the builder that the choice names with what is given and the choice's options.

    Builders are named by "module:function" until they are wanted, so that naming one imports nothing.
    Raises MagMaxError for a name that is none and for options that the builder does not have, with the nearest.
    """
    name, options = split(kind, choice)
    builder = find(kind, REGISTRIES[kind], name)
    parameters = list(inspect.signature(builder).parameters)[len(given) :]
    for option in options:
        if option not in parameters:
            hint = nearest_hint(option, parameters) if parameters else "it takes none"
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
    target = table.get(name, name if ":" in name else None)
    if target is None:
        raise MagMaxError(
            f"{kind}: there is no {name!r}; {nearest_hint(name, list(table))}, or name a package.module:function"
        )
    if not isinstance(target, str):
        return target
    module, _, function = target.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise MagMaxError(f"{kind}: {name}: cannot be imported: {error}") from error
