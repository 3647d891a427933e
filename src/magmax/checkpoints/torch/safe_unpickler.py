"""Pickles read as data: an interpreter of our own, which has no way to import or to call what a pickle names.

Names stay names (`GlobalName`), objects of any class become `OpaqueObject`s of what the pickle says of them, and a
call is made
only if it is in a table of pure functions of ours; any other is refused, with its name.
"""

from __future__ import annotations

import pickletools
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, cast

from ...errors import MagMaxError
from ..byte_ranges import BoundedStream

MAX_PICKLE_BYTES = 1 << 28
MAX_STEPS = 10_000_000
"""Steps for one file, an opcode or a copied item each. A tensor takes about 40: this is enough for 250,000."""
SECONDS_PER_STEP = 1e-5
"""Five times what a step takes; only a pickle made to be slow, such as one whose keys collide, needs more."""
MAX_KEY_NUMBER = 1 << 24
"""Numbers from here on are not hashed: a pickle could choose them so that looking one up compares it with all."""
CHARACTERS_PER_STEP = 64
STEPS_AT_ONCE = 1000

LITERAL_OPCODES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUE_OPCODES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8",
}  # fmt: skip


class GlobalName(NamedTuple):
    """The name of a class or function, "module.name"; never looked up."""

    name: str


@dataclass(eq=False)
class OpaqueObject:
    """An object of a class that is not known here: the class's name and all that the pickle would have given it."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list[Any])

    @property
    def state_parts(self) -> list[dict[str, Any]]:
        """The object's `__dict__` and, in a second dict, its slots; as many of them as the pickle has."""
        parts = cast("tuple[Any, ...]", self.state)[:2] if isinstance(self.state, tuple) else (self.state,)
        return [cast("dict[str, Any]", part) for part in parts if isinstance(part, dict)]

    @property
    def attributes(self) -> dict[str, Any]:
        """The object's `__dict__` and slots, copied."""
        return {name: value for part in self.state_parts for name, value in part.items()}


CallTable = Mapping[str, Callable[..., Any]]


class WorkBudget:
    """A bound on the steps that reading one file takes, and so on its memory; and on the time of these steps."""

    def __init__(self, label: str, steps: int = MAX_STEPS) -> None:
        self._label, self._left = label, steps
        self._deadline = time.monotonic() + steps * SECONDS_PER_STEP

    def spend(self, steps: int) -> None:
        """Take steps off. Raises MagMaxError where none are left."""
        self._left -= steps
        if self._left < 0 or time.monotonic() > self._deadline:
            raise MagMaxError(f"{self._label}: this pickle takes more work than any checkpoint, which is refused")


def _constructor(kind: Callable[..., Any]) -> Callable[..., Any]:
    def copied(items: Any = ()) -> Any:
        return kind(items)

    return copied


def _hashable(key: Any) -> Any:
    """Return a key that is safe to hash: text and small numbers as they are, anything else by its identity.

    To hash nested tuples overflows the stack, and the hashes of tuples and of large numbers can be made to collide.
    """
    if isinstance(key, list | dict | set | bytearray):
        raise TypeError("a key that cannot be hashed")
    if key is None or isinstance(key, str | bytes | bool | GlobalName | OpaqueObject):
        return key
    small = type(key) is int and 0 <= key < MAX_KEY_NUMBER
    return cast("object", key) if small else OpaqueObject(f"builtins.{type(cast('object', key)).__name__}", (key,))


def _hashable_items(keys: Iterable[Any]) -> list[Any]:
    return [_hashable(key) for key in keys]


def _make_dict(*args: Any) -> dict[Any, Any]:
    items: Any = args[-1] if args and not isinstance(args[-1], GlobalName | None) else ()  # a defaultdict's factory
    pairs: Any = cast("dict[Any, Any]", items).items() if isinstance(items, dict) else items
    return {_hashable(key): value for key, value in pairs}


def _make_set(items: Any = ()) -> set[Any]:
    return set(_hashable_items(items))


def _make_frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_hashable_items(items))


def _make_bytes(content: Any = b"") -> bytes:
    if not isinstance(content, bytes):
        raise TypeError("bytes made of something else")
    return content


def _encode(text: str, codec: str = "latin1") -> bytes:
    if codec != "latin1":
        raise ValueError("bytes in another codec than latin1")
    return text.encode("latin1")


def _check_text(text: Any) -> str:
    if type(text) is not str:
        raise TypeError("a name that is no text")
    return text


def _reconstruct(kind: GlobalName, *_: Any) -> OpaqueObject:
    return OpaqueObject(kind.name)


def _new_object(kind: GlobalName, *args: Any) -> OpaqueObject:
    return OpaqueObject(kind.name, args)


_PLAIN_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_dict,
    "collections.defaultdict": _make_dict,
    "dict": _make_dict, "list": _constructor(list), "tuple": _constructor(tuple), "set": _make_set,
    "frozenset": _make_frozenset, "bytearray": _make_bytes, "complex": complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstruct, "copyreg.__newobj__": _new_object,
    "torch.Size": _constructor(tuple), "torch.serialization._get_layout": _check_text,
}  # fmt: skip
PLAIN_CALLS: CallTable = _PLAIN_CALLS
"""Calls that make plain data; the names of builtins are without their module."""

INERT_CALLS = frozenset({
    "getattr", "functools.partial", "torch.device", "argparse.Namespace", "uuid.UUID", "datetime.datetime",
    "datetime.timedelta", "decimal.Decimal", "types.SimpleNamespace", "numpy.dtype", "random.Random",
    *(f"pathlib{sub}.{kind}" for sub in ("", "._local") for kind in ("PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"numpy.{c}.multiarray.{f}" for c in ("core", "_core") for f in ("scalar", "_reconstruct")),
    "torchvision.transforms.functional.InterpolationMode", "torchvision.transforms.InterpolationMode",
    "PIL.Image.Resampling", "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING", "torch._C.Generator", "torch._C._nn.gelu",
})  # fmt: skip
"""Calls that are kept as records of themselves: settings, paths, enums, whose values nobody needs here."""


class SafeUnpickler:
    """One pickle, run opcode by opcode over a stack of plain data.

    Args:
        stream: read from where it stands to the end of the pickle.
        label: what messages call the file.
        calls: functions to be called, by the name that the pickle gives them, beyond `PLAIN_CALLS`.
        inert: calls to be kept as records, beyond `INERT_CALLS`.
        persistent_load: returns what a persistent id stands for.
        budget: the work that the pickle may take; by default that of a file of its own.
        max_bytes: the bytes that it may have.

    Raises:
        MagMaxError: a call that is not in the tables; a pickle that is cut, corrupt, or made to take all memory or
            time.
    """

    def __init__(
        self,
        stream: IO[bytes],
        label: str,
        calls: CallTable,
        inert: Iterable[str] = (),
        persistent_load: Callable[[Any], Any] | None = None,
        budget: WorkBudget | None = None,
        max_bytes: int = MAX_PICKLE_BYTES,
    ) -> None:
        self._stream: Any = BoundedStream(stream, max_bytes)
        self._label, self._persistent_load = label, persistent_load
        self._budget = budget or WorkBudget(label)
        self._calls, self._inert = {**PLAIN_CALLS, **calls}, INERT_CALLS | set(inert)
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        push, pop, marked = self._push, self._pop, self._pop_to_mark
        self._handlers: dict[str, Callable[[Any], None]] = {
            **{name: self._push_literal(value) for name, value in LITERAL_OPCODES.items()},
            **dict.fromkeys(VALUE_OPCODES, push),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), self._memoize),
            **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), lambda arg: push(self._memo[arg])),
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            "MEMOIZE": lambda _: self._memoize(len(self._memo)),
            "MARK": lambda _: self._push_mark(),
            "POP": lambda _: self._discard(),
            "POP_MARK": lambda _: self._discard_to_mark(),
            "DUP": lambda _: push(self._stack[-1]),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_SET": lambda _: push(set()),
            "EMPTY_TUPLE": lambda _: push(()),
            "DICT": lambda _: self._build_dict(marked()),
            "LIST": lambda _: push(marked()),
            "FROZENSET": lambda _: push(_make_frozenset(marked())),
            "TUPLE": lambda _: push(tuple(marked())),
            "TUPLE1": lambda _: self._build_tuple(1),
            "TUPLE2": lambda _: self._build_tuple(2),
            "TUPLE3": lambda _: self._build_tuple(3),
            "APPEND": lambda _: self._extend([pop()]),
            "APPENDS": lambda _: self._extend(marked()),
            "ADDITEMS": lambda _: self._extend(marked()),
            "SETITEM": lambda _: self._set_items([pop(), pop()][::-1]),
            "SETITEMS": lambda _: self._set_items(marked()),
            "GLOBAL": lambda arg: self._push_global(*arg.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._push_global(*[pop(), pop()][::-1]),
            "REDUCE": lambda _: self._call(*[pop(), pop()][::-1]),
            "NEWOBJ": lambda _: self._new_object(*[pop(), pop()][::-1]),
            "NEWOBJ_EX": lambda _: self._new_object(*[pop(), pop(), pop()][:0:-1]),
            "INST": lambda arg: self._instance([GlobalName(arg.replace(" ", ".", 1)), *marked()]),
            "OBJ": lambda _: self._instance(marked()),
            "BUILD": lambda _: self._set_state(pop()),
            "PERSID": lambda arg: self._load_persistent(arg),
            "BINPERSID": lambda _: self._load_persistent(pop()),
        }

    def load(self) -> Any:
        """The object that the pickle describes."""
        try:
            for number, (opcode, arg, _) in enumerate(pickletools.genops(self._stream)):
                if number % STEPS_AT_ONCE == 0:
                    self._budget.spend(STEPS_AT_ONCE)
                handler = self._handlers.get(opcode.name)
                if handler is None:
                    raise MagMaxError(f"{self._label}: this pickle uses {opcode.name}, which is refused")
                handler(arg)
            if len(self._stack) != 1 or self._marks:
                raise ValueError("it leaves more or less than one object")
            return self._stack[0]
        except MagMaxError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            message = str(error) or type(error).__name__
            raise MagMaxError(f"{self._label}: holds no whole pickle ({message[:200]}); is it truncated?") from error

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        return self._stack.pop()

    def _push_literal(self, value: Any) -> Callable[[Any], None]:
        return lambda _: self._push(value)

    def _memoize(self, number: int) -> None:
        if not 0 <= number < 1 << 32:
            raise ValueError("a memo of a number that no pickler gives")
        self._memo[number] = self._stack[-1]

    def _push_mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[Any]:
        """Return what was pushed since the last mark."""
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _discard(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_to_mark()

    def _discard_to_mark(self) -> None:
        self._pop_to_mark()

    def _build_tuple(self, count: int) -> None:
        parts = tuple(self._stack[-count:])
        if len(parts) < count:
            raise ValueError("a tuple of too few parts")
        self._stack[-count:] = [parts]

    def _push_global(self, module: Any, name: Any) -> None:
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        builtin = module in ("builtins", "__builtin__")
        module = "copyreg" if module == "copy_reg" else module
        self._push(GlobalName(name if builtin else f"{module}.{name}"))

    def _call(self, function: Any, args: Any) -> None:
        if not isinstance(args, tuple):
            raise ValueError("arguments that are no tuple")
        arguments = cast("tuple[Any, ...]", args)
        if isinstance(function, GlobalName) and function.name in self._calls:
            self._budget.spend(len(arguments) + sum(_copied_items(argument) for argument in arguments))
            self._push(self._calls[function.name](*arguments))
        elif isinstance(function, GlobalName) and function.name in self._inert:
            self._push(OpaqueObject(function.name, arguments))
        else:
            name = describe(function)
            remedy = (
                "save it with torch.save, not with pickle"
                if name == "torch.storage._load_from_bytes"
                else "if that only makes a setting, and no weights, take the model out of the file: "
                f"magmax checkpoint convert {shlex.quote(self._label)} --out NEW.safetensors --inert {name}"
            )
            raise MagMaxError(
                f"{self._label}: this pickle would call {name}, which is refused; it did not run; {remedy}"
            )

    def _new_object(self, kind: Any, args: Any) -> None:
        if not isinstance(kind, GlobalName) or kind.name in self._calls:
            self._call(kind, args)
        else:
            self._push(OpaqueObject(kind.name, args))

    def _instance(self, parts: list[Any]) -> None:
        self._call(parts[0], tuple(parts[1:]))

    def _set_state(self, state: Any) -> None:
        top = self._stack[-1]
        if isinstance(top, OpaqueObject):
            top.state = state
        elif not isinstance(top, dict | list | set):  # what a subclass of these has besides holds no weights
            raise MagMaxError(f"{self._label}: this pickle would change {describe(top)}, which is refused")

    def _set_items(self, pairs: list[Any]) -> None:
        into = self._stack[-1]
        items = list(zip(pairs[::2], pairs[1::2], strict=True))
        if isinstance(into, OpaqueObject):
            into.items += items
        else:
            for start in range(0, len(items), STEPS_AT_ONCE):  # in pieces, to look at the clock in between
                cast("dict[Any, Any]", into).update(_make_dict(items[start : start + STEPS_AT_ONCE]))
                self._budget.spend(1)

    def _extend(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if isinstance(into, set):
            cast("set[Any]", into).update(_hashable_items(items))
        else:
            cast("list[Any]", into.items if isinstance(into, OpaqueObject) else into).extend(items)

    def _build_dict(self, pairs: list[Any]) -> None:
        self._push({})
        self._set_items(pairs)

    def _load_persistent(self, identity: Any) -> None:
        if self._persistent_load is None:
            raise MagMaxError(f"{self._label}: this pickle speaks of things outside of it, which is refused")
        self._push(self._persistent_load(identity))


def _copied_items(argument: Any) -> int:
    """Return the steps for a call that copies an argument."""
    if isinstance(argument, list | tuple | dict | set | frozenset):
        return len(cast("list[Any]", argument))
    return len(argument) // CHARACTERS_PER_STEP if isinstance(argument, str | bytes | bytearray) else 0


def describe(value: Any, depth: int = 9) -> str:
    """Return the words that messages use for an object of a pickle."""
    if (
        depth
        and isinstance(value, OpaqueObject)
        and value.name == "getattr"
        and [type(a) for a in value.args[1:]] == [str]
    ):
        return f"{describe(value.args[0], depth - 1)}.{value.args[1]}"
    if isinstance(value, GlobalName | OpaqueObject):
        return value.name if "." in value.name else f"builtins.{value.name}"
    return f"an object of type {type(value).__name__}"
