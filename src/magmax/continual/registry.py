"""What a recipe can name: data sets, models, heads, scenarios and scores, each a name and a function.

This is the one place that turns a name of a recipe into a function. A recipe may come from anybody, so a name means
what is registered here or what an installed package registers as an entry point, and nothing else. Only inside
`code_from`, which stands for the user's --allow-code, may it also be a function in a Python file of one folder.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module, invalidate_caches
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
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

REGISTRIES: dict[str, Mapping[str, Any]] = {
    "data": DATASETS,
    "model": MODELS,
    "head": HEADS,
    "scenario": SCENARIOS,
    "score": {},
}
"""The registries by the keys of a recipe. A score has none: (path of a model) -> number or {task: number}."""
PARTS = ("data", "model", "head", "scenario")
"""The keys of an experiment that name a builder."""
ENTRY_POINT_GROUPS = {kind: f"magmax.{kind}" for kind in REGISTRIES}

Choice = str | Mapping[str, Any]
"""As a recipe writes it: a name, or {name: {option: value}}."""

_code_folder: ContextVar[Path | None] = ContextVar("_code_folder", default=None)


@contextmanager
def code_from(folder: Path | None) -> Generator[None]:
    """Let "module:function" name a function in a Python file of this folder until the block is left; None: nowhere."""
    token = _code_folder.set(folder)
    try:
        yield
    finally:
        _code_folder.reset(token)


def allows_code() -> bool:
    """Return whether this is inside `code_from` with a folder: the user trusts the recipe to run code."""
    return _code_folder.get() is not None


def build(kind: str, choice: Choice, *given: Any) -> Any:
    """Call the builder that the choice names with what is given and the choice's options.

    Builders are named by "module:function" until they are wanted, so that naming one imports nothing.
    Raises MagMaxError for a name that is none and for options that the builder does not have, with the nearest.
    """
    name, options = split(kind, choice)
    builder = find(kind, name)
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


def find(kind: str, name: str) -> Callable[..., Any]:
    """The function that a name means: registered, of an installed package, or in the folder of `code_from`.

    Raises MagMaxError for any other name; nothing is imported for it.
    """
    target = REGISTRIES[kind].get(name)
    if callable(target):
        return target
    if target is not None:
        module, _, function = str(target).partition(":")
        return _load(kind, name, lambda: getattr(import_module(module), function))
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUPS[kind])}
    if name in installed:
        return _load(kind, name, installed[name].load)
    if ":" in name:
        return _find_in_folder(kind, name)
    names = sorted({*REGISTRIES[kind], *installed})
    hint = nearest_hint(name, names) if names else "write module:function"
    raise MagMaxError(f"{kind}: there is no {name!r}; {hint}")


def _find_in_folder(kind: str, name: str) -> Callable[..., Any]:
    """The function of a name such as my_parts:blobs, in a file of the folder whose code the user allowed."""
    folder = _code_folder.get()
    instead = f"or have an installed package register it as an entry point of {ENTRY_POINT_GROUPS[kind]!r}"
    if folder is None:
        raise MagMaxError(
            f"{kind}: {name!r} names Python code, and no recipe may run code that you did not ask for; if you trust "
            f"its author, put the file beside the recipe and add --allow-code, {instead}"
        )
    module, _, function = name.partition(":")
    parts = module.split(".")
    stem = folder.joinpath(*parts)
    files = [stem.with_name(f"{stem.name}.py"), stem / "__init__.py"]
    if not all(part.isidentifier() for part in (*parts, function)) or not any(map(Path.is_file, files)):
        raise MagMaxError(
            f"{kind}: {name!r} is no function in a Python file of {folder}; with --allow-code, my_file:my_function "
            f"means my_function in my_file.py beside the recipe; put it there, {instead}"
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end, so that no file there stands in for an installed module
    invalidate_caches()
    if not _lies_in(parts[0], folder):
        raise MagMaxError(f"{kind}: {name}: another module is called {parts[0]!r}; rename the one in {folder}")
    found = _load(kind, name, lambda: getattr(import_module(module), function))
    if not callable(found):
        raise MagMaxError(f"{kind}: {name}: is no function, but {type(found).__name__}")
    return found


def _lies_in(module: str, folder: Path) -> bool:
    """Return whether importing a top-level module takes it from this folder."""
    try:
        spec = find_spec(module)
    except ValueError:  # of a module without a spec, such as __main__
        return False
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places if place)


def _load(kind: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except MagMaxError:
        raise
    except Exception as error:  # of a user's file, or of an installed package, anything
        message = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise MagMaxError(f"{kind}: {name}: cannot be imported: {message}") from error
