"""Whole models in pickles, as torch.save(model) leaves them, read without their classes and with nothing run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from ...errors import MagMaxError, list_problems
from ..base import Checkpoint
from ..byte_ranges import RangeFile
from .safe_unpickler import OpaqueObject, describe
from .torch_file import StoredTensor, TorchFile

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
"""What savers call the model, where they save it beside other things."""
TORCHSCRIPT_PREFIX = "__torch__."
MAX_DEPTH = 100
MAX_VISITS = 1_000_000


class PickledModel(Checkpoint):
    """The tensors of a model in a torch file, under the names that its `state_dict()` would give them.

    A module is known by its `_parameters`, `_buffers` and `_modules`, whatever its class: parameters, persistent
    buffers and then its modules' own, each name after the names of what it is in. What a class does beyond that when
    its state dict is taken is not known here. Of a TorchScript module every tensor is taken. A mapping of names to
    tensors is a state dict.

    Args:
        part: the model's place in what was pickled, such as "ema" or "state/model"; by default the module itself, or
            what is called by one of `MODEL_KEYS`, or the one thing there that holds tensors.
        inert: calls of the pickle to be kept as notes of themselves, beyond those known to be harmless.

    Raises:
        MagMaxError: a pickle that would call what is not known, or holds no model, or several; a parameter of a kind
            that cannot be read; a file that is cut.
    """

    def __init__(self, path: Path, label: str, part: str = "", inert: Iterable[str] = ()) -> None:
        super().__init__(label, {})
        self.path = path
        file = RangeFile(path, label)
        source = TorchFile(file, 0, file.size, label, inert)
        tensors = self._collect_tensors(self._find_model(source.root, [p for p in part.split("/") if p]))
        self._tensors: dict[str, StoredTensor] = {}
        seen: dict[tuple[Any, ...], str] = {}
        for name, tensor in tensors.items():
            if tensor.spec.numel and tensor.memory_key in seen:
                self.aliases[name] = seen[tensor.memory_key]
                continue
            seen[tensor.memory_key] = name
            self.specs[name], self._tensors[name] = tensor.spec, source.locate_tensor(tensor)

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._tensors[key].read_units(start, stop)

    def files(self) -> list[Path]:
        return [] if self.path is None else [self.path]

    def _find_model(self, root: Any, part: list[str]) -> Any:
        """The part of `root` that is the model."""
        for name in part:
            inside = _named_children(root)
            if name not in inside:
                raise MagMaxError(f"{self.label}: has no part {name!r}; {_list_parts(root)}")
            root = inside[name]
        visited: dict[tuple[int, int], bool] = {}
        for level in itertools.count():
            if part or _is_module(root):
                break
            if level > MAX_DEPTH:
                raise self._cycle_error()
            holding = {name: value for name, value in _named_children(root).items() if _holds_tensors(value, visited)}
            direct = [name for name, value in holding.items() if isinstance(value, StoredTensor)]
            nested = [name for name in holding if name not in direct]
            called = [name for name in nested if name in MODEL_KEYS]
            if not nested:
                break
            if len(called) != 1 and (direct or len(nested) > 1):
                raise MagMaxError(f"{self.label}: which part of it is the model cannot be told; {_list_parts(root)}")
            name = called[0] if called else nested[0]
            if isinstance(root, OpaqueObject) and name == "vector":
                self.notes.append(
                    f"{self.label}: holds a task vector, what was added to a base; it is no model by itself"
                )
            root = holding[name]
        return root

    def _collect_tensors(self, model: Any) -> dict[str, StoredTensor]:
        """The model's tensors by name."""
        tensors: dict[str, StoredTensor] = {}
        problems: list[str] = []
        if _is_module(model):
            self._walk_module(model, "", tensors, problems, itertools.count())
        else:
            for name, value in _named_children(model).items():
                if isinstance(value, StoredTensor):
                    tensors[name] = value
            if left := [name for name in _named_children(model) if name not in tensors]:
                self.notes.append(f"{self.label}: {', '.join(left[:5])}: no tensors, left out")
        if problems:
            raise list_problems(f"{self.label} cannot be read as a model", problems)
        if not tensors:
            raise MagMaxError(f"{self.label}: holds {_describe_type(model)}, and no tensor of a model in it")
        return tensors

    def _walk_module(
        self,
        module: OpaqueObject,
        prefix: str,
        tensors: dict[str, StoredTensor],
        problems: list[str],
        visits: Iterator[int],
        depth: int = 0,
    ) -> None:
        attributes = module.attributes
        if module.name.startswith(TORCHSCRIPT_PREFIX):
            children = {n: v for n, v in _named_children(attributes).items() if _is_module(v)}
            own = {n: v for n, v in _named_children(attributes).items() if isinstance(v, StoredTensor)}
        else:
            passing = attributes.get("_non_persistent_buffers_set", set())
            if not isinstance(passing, set | frozenset):
                raise MagMaxError(
                    f"{self.label}: {prefix}_non_persistent_buffers_set is {_describe_type(passing)}, not a set"
                )
            buffers = {n: v for n, v in _named_children(attributes.get("_buffers")).items() if n not in passing}
            own, children = (
                _named_children(attributes["_parameters"]) | buffers,
                _named_children(attributes["_modules"]),
            )
        for name, value in own.items():
            self._check_limits(depth, visits)
            if isinstance(value, StoredTensor):
                tensors[prefix + name] = value
            elif value is not None:
                problems.append(
                    f"{self.label}: {prefix}{name} is {_describe_type(value)}, not a tensor that can be read"
                )
        for name, child in children.items():
            self._check_limits(depth, visits)
            if _is_module(child):
                self._walk_module(child, f"{prefix}{name}.", tensors, problems, visits, depth + 1)
            elif child is not None:
                problems.append(f"{self.label}: {prefix}{name} is {_describe_type(child)}, not a module")

    def _check_limits(self, depth: int, visits: Iterator[int]) -> None:
        if depth > MAX_DEPTH or next(visits) > MAX_VISITS:
            raise self._cycle_error()

    def _cycle_error(self) -> MagMaxError:
        return MagMaxError(f"{self.label}: its modules lie in one another without an end")


def _is_module(value: Any) -> bool:
    if not isinstance(value, OpaqueObject):
        return False
    return value.name.startswith(TORCHSCRIPT_PREFIX) or {"_parameters", "_modules"} <= value.attributes.keys()


def _named_children(value: Any) -> dict[str, Any]:
    """Return what a mapping or an object of an unknown class holds, by name."""
    if isinstance(value, dict):
        held = list(cast("dict[Any, Any]", value).items())
    elif isinstance(value, OpaqueObject):
        pairs = [cast("tuple[Any, ...]", item) for item in value.items if isinstance(item, tuple)]
        held = [*value.attributes.items(), *((pair[0], pair[1]) for pair in pairs if len(pair) == 2)]
    else:
        held = []
    return {_key_name(name): part for name, part in held}


def _key_name(name: Any) -> str:
    """A key as a name; of what is neither text nor a number only the kind, for it may hold itself many times over."""
    if isinstance(name, str):
        return name
    return str(name) if isinstance(name, int) and name.bit_length() < 64 else describe(name)


def _holds_tensors(value: Any, cache: dict[tuple[int, int], bool], depth: int = 0) -> bool:
    """Return whether a tensor is in a value, or in what it holds, a few levels down; what is `known` is not sought
    again.
    """
    if isinstance(value, StoredTensor) or _is_module(value):
        return True
    place = id(value), depth
    if place not in cache:
        cache[place] = depth < 4 and any(
            _holds_tensors(part, cache, depth + 1) for part in _named_children(value).values()
        )
    return cache[place]


def _list_parts(root: Any) -> str:
    visited: dict[tuple[int, int], bool] = {}
    names = [name for name, value in _named_children(root).items() if _holds_tensors(value, visited)]
    return f"choose one with --part: {', '.join(names[:20]) or 'none holds tensors'}"


def _describe_type(value: Any) -> str:
    return f"a {describe(value)}" if isinstance(value, OpaqueObject) else f"a {type(value).__name__}"
