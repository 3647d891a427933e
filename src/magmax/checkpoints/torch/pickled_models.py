"""State dicts and whole models that torch.save wrote, read without torch, their classes, or running anything."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from ...errors import MagMaxError, list_problems
from ..base import Checkpoint, find_name_problem
from ..byte_ranges import RangeFile
from .safe_unpickler import OpaqueObject, describe
from .stored_tensors import StoredTensor, UnreadableTensor
from .torch_file import TorchFile

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
"""What savers call the model, where they save it beside other things."""
TORCHSCRIPT_PREFIX = "__torch__."
MAX_DEPTH = 100
MAX_VISITS = 1_000_000
MAX_NAME_LENGTH = 10_000
TENSORS = (StoredTensor, UnreadableTensor)
AnyTensor = StoredTensor | UnreadableTensor


class TorchCheckpoint(Checkpoint):
    """Tensors of a file that torch.save wrote, read by range."""

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(label, {})
        self.path = path
        self._tensors: dict[str, StoredTensor] = {}

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        return self._tensors[key].read_units(start, stop)

    def files(self) -> list[Path]:
        return [] if self.path is None else [self.path]

    def _open_file(self, path: Path, inert: Iterable[str] = ()) -> TorchFile:
        file = RangeFile(path, self.label)
        self._stamps[str(path)] = file.stamp
        return TorchFile(file, 0, file.size, self.label, inert)

    def _add_tensors(self, source: TorchFile, tensors: Mapping[str, AnyTensor]) -> None:
        """Take these tensors, tied ones once. Raises MagMaxError with each that cannot be read."""
        problems: list[str] = []
        seen: dict[str, str] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, UnreadableTensor):
                problems.append(f"{self.label}: {name} {tensor.problem}")
            elif problem := source.find_problem(tensor) or find_name_problem(name):
                problems.append(f"{self.label}: {name}, {tensor.spec}, {problem}")
            elif tensor.spec.numel and tensor.memory_key in seen:
                self.aliases[name] = seen[tensor.memory_key]
            else:
                seen[tensor.memory_key] = name
                self.specs[name], self._tensors[name] = tensor.spec, source.locate_tensor(tensor)
        if problems:
            raise list_problems(f"{self.label} holds tensors that cannot be read", problems)


class TorchStateDict(TorchCheckpoint):
    """A state dict in a file that torch.save wrote, by itself or under the key `state_dict`.

    Raises:
        MagMaxError: something else than a state dict, which `PickledModel` may find a model in; a pickle that would
            call what is not known; a file that is cut.
    """

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        source = self._open_file(path)
        root: Any = source.root
        nested = cast("dict[Any, Any]", root).get("state_dict") if isinstance(root, dict) else None
        root = cast("Any", nested if isinstance(nested, dict) else root)
        if source.is_torchscript or not isinstance(root, dict):
            what = "a TorchScript model" if source.is_torchscript else f"a whole object, {_describe_type(root)}"
            raise self._not_a_state_dict(what)
        tensors = cast("dict[Any, Any]", root)
        others = [
            f"{_key_name(key)} is {_describe_type(value)}, not a tensor"
            for key, value in tensors.items()
            if not isinstance(value, AnyTensor)
        ]
        others += [
            f"{_key_name(key)} is not a string, as a tensor's name is" for key in tensors if type(key) is not str
        ]
        if others:
            raise self._not_a_state_dict("; ".join(others[:5]) + "; ..." * (len(others) > 5))
        self._add_tensors(source, tensors)

    def _not_a_state_dict(self, content: str) -> MagMaxError:
        return MagMaxError(
            f"{self.label}: is not a state dict of named tensors ({content}). To take the model out of it, which runs "
            f"nothing of it: {convert_command(self.path or Path(self.label))}"
        )


def convert_command(path: Path) -> str:
    """Return the command that writes the model in a torch file as safetensors."""
    stem = path.name.partition(".")[0]
    return shlex.join(["magmax", "checkpoint", "convert", str(path), "--out", f"{stem}.safetensors"])


class PickledModel(TorchCheckpoint):
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
        super().__init__(path, label)
        source = self._open_file(path, inert)
        self._budget = source.budget
        self._add_tensors(
            source, self._collect_tensors(self._find_model(source.root, [p for p in part.split("/") if p]))
        )

    def _find_model(self, root: Any, part: list[str]) -> Any:
        """The part of `root` that is the model."""
        for name in part:
            inside = self._children(root)
            if name not in inside:
                raise MagMaxError(f"{self.label}: has no part {name!r}; {self._list_parts(root)}")
            root = inside[name]
        visited: dict[tuple[int, int], bool] = {}
        for level in itertools.count():
            if part or _is_module(root):
                break
            if level > MAX_DEPTH:
                raise self._cycle_error()
            holding = {
                name: value for name, value in self._children(root).items() if self._holds_tensors(value, visited)
            }
            direct = [name for name, value in holding.items() if isinstance(value, TENSORS)]
            nested = [name for name in holding if name not in direct]
            called = [name for name in nested if name in MODEL_KEYS]
            if not nested:
                break
            if len(called) != 1 and (direct or len(nested) > 1):
                raise MagMaxError(
                    f"{self.label}: which part of it is the model cannot be told; {self._list_parts(root)}"
                )
            name = called[0] if called else nested[0]
            if isinstance(root, OpaqueObject) and name == "vector":
                self.notes.append(
                    f"{self.label}: holds a task vector, what was added to a base; it is no model by itself"
                )
            root = holding[name]
        return root

    def _collect_tensors(self, model: Any) -> dict[str, AnyTensor]:
        """The model's tensors by name."""
        tensors: dict[str, AnyTensor] = {}
        problems: list[str] = []
        if _is_module(model):
            self._walk_module(model, "", tensors, problems, itertools.count())
        else:
            held = self._children(model)
            if isinstance(model, dict) and len(held) < len(cast("dict[Any, Any]", model)):
                raise MagMaxError(f"{self.label}: has two keys of one name, such as 1 and '1'; rename one")
            tensors = {name: value for name, value in held.items() if isinstance(value, TENSORS)}
            if left := [name for name in held if name not in tensors]:
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
        tensors: dict[str, AnyTensor],
        problems: list[str],
        visits: Iterator[int],
        depth: int = 0,
    ) -> None:
        attributes = module.attributes
        if module.name.startswith(TORCHSCRIPT_PREFIX):
            children = {n: v for n, v in self._children(attributes).items() if _is_module(v)}
            own = {n: v for n, v in self._children(attributes).items() if isinstance(v, StoredTensor)}
        else:
            passing = attributes.get("_non_persistent_buffers_set", set())
            if not isinstance(passing, set | frozenset):
                raise MagMaxError(
                    f"{self.label}: {prefix}_non_persistent_buffers_set is {_describe_type(passing)}, not a set"
                )
            buffers = {n: v for n, v in self._children(attributes.get("_buffers")).items() if n not in passing}
            own, children = (
                self._children(attributes["_parameters"]) | buffers,
                self._children(attributes["_modules"]),
            )
        for name, value in own.items():
            self._check_limits(depth, visits)
            if isinstance(value, TENSORS):
                tensors[prefix + name] = value
            elif value is not None:
                problems.append(
                    f"{self.label}: {prefix}{name} is {_describe_type(value)}, not a tensor that can be read"
                )
        for name, child in children.items():
            self._check_limits(depth, visits)
            if len(prefix) + len(name) > MAX_NAME_LENGTH:
                raise MagMaxError(f"{self.label}: has names of more than {MAX_NAME_LENGTH:,} characters")
            if _is_module(child):
                self._walk_module(child, f"{prefix}{name}.", tensors, problems, visits, depth + 1)
            elif child is not None:
                problems.append(f"{self.label}: {prefix}{name} is {_describe_type(child)}, not a module")

    def _children(self, value: Any) -> dict[str, Any]:
        """Return what a mapping or an object of an unknown class holds, by name."""
        if isinstance(value, dict):
            held = list(cast("dict[Any, Any]", value).items())
        elif isinstance(value, OpaqueObject):
            pairs = [cast("tuple[Any, ...]", item) for item in value.items if isinstance(item, tuple)]
            held = [*value.attributes.items(), *((pair[0], pair[1]) for pair in pairs if len(pair) == 2)]
        else:
            held = []
        self._budget.spend(3 * len(held) + 1)  # many objects may share one large mapping
        return {_key_name(name): part for name, part in held}

    def _holds_tensors(self, value: Any, visited: dict[tuple[int, int], bool], depth: int = 0) -> bool:
        """Return whether a tensor is in a value, or in what it holds, a few levels down."""
        if isinstance(value, TENSORS) or _is_module(value):
            return True
        place = id(value), depth
        if place not in visited:
            visited[place] = depth < 4 and any(
                self._holds_tensors(part, visited, depth + 1) for part in self._children(value).values()
            )
        return visited[place]

    def _list_parts(self, root: Any) -> str:
        visited: dict[tuple[int, int], bool] = {}
        names = [name for name, value in self._children(root).items() if self._holds_tensors(value, visited)]
        return f"choose one with --part: {', '.join(names[:20]) or 'none holds tensors'}"

    def _check_limits(self, depth: int, visits: Iterator[int]) -> None:
        if depth > MAX_DEPTH or next(visits) > MAX_VISITS:
            raise self._cycle_error()

    def _cycle_error(self) -> MagMaxError:
        return MagMaxError(f"{self.label}: its modules lie in one another without an end")


def _is_module(value: Any) -> bool:
    if not isinstance(value, OpaqueObject):
        return False
    names = {"_parameters", "_modules"}
    return value.name.startswith(TORCHSCRIPT_PREFIX) or any(names <= part.keys() for part in value.state_parts)


def _key_name(name: Any) -> str:
    """A key as a name; of what is neither text nor a number only the kind, for it may hold itself many times over."""
    if isinstance(name, str):
        return name
    return str(name) if isinstance(name, int) and name.bit_length() < 64 else describe(name)


def _describe_type(value: Any) -> str:
    return f"a {describe(value)}" if isinstance(value, OpaqueObject) else f"a {type(value).__name__}"
