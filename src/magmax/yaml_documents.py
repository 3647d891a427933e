"""YAML documents that are recipes: read as text, with the line of every key, and complained of in words."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .errors import MagMaxError, list_problems, nearest_hint
from .legacy import OLD_KEYS

MAX_CHARACTERS = 1_000_000
MAX_NODES = 100_000
"""Keys, values and lists of a document once each alias is replaced by what it stands for."""
MAX_DEPTH = 50
MAX_DIGITS = 3_000

Shape = TypeVar("Shape", bound=BaseModel)


class Yaml12Loader(yaml.SafeLoader):
    """A loader that reads numbers as YAML 1.2 does: 1:30 and 1_000 are words, 010 is ten, 1e-5 is a number.

    Dates are words too. yes, no, on and off are truth values, as in YAML 1.1 and in mergekit.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _construct_integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > MAX_DIGITS:  # Python refuses to print what is much larger
        raise ValueError(f"a whole number has more than {MAX_DIGITS:,} digits")
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(f"(?:{_INTEGER.pattern})$"), list("-+0123456789")
)
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789")
)
Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_integer)


class YamlDocument(NamedTuple):
    """A YAML map: its file, what it says, and the line of each key by its dotted name ("models.0.path")."""

    file: str
    content: Mapping[str, Any]
    lines: Mapping[str, int]

    def locate(self, *parts: str | int) -> str:
        """The file, with the line of this key, or of the nearest one above it."""
        names = (".".join(map(str, parts[:n])) for n in range(len(parts), 0, -1))
        line = next((self.lines[name] for name in names if name in self.lines), None)
        return f"{self.file}, line {line}" if line else self.file


def read_document(file: str) -> YamlDocument:
    """Read a file as a document.

    Raises:
        MagMaxError: no such file, no YAML, more of it than `parse_yaml` takes, a key given twice, something else than
            a map.
    """
    text = read_text(file)
    content, tree = parse_yaml(text, file), yaml.compose(text, Loader=Yaml12Loader)
    if not isinstance(content, dict):
        raise MagMaxError(
            f"{file}: holds no map of keys; a merge recipe has base, models and rule, an experiment data, model and "
            f"fit, a search "
            "merge and space"
        )
    return YamlDocument(file, content, _key_lines(tree, file))


def read_text(file: str) -> str:
    """A file's text, or an error that says why there is none."""
    try:
        with Path(file).open(encoding="utf-8") as stream:
            return stream.read(MAX_CHARACTERS + 1)
    except FileNotFoundError as error:
        raise MagMaxError(f"{file}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise MagMaxError(f"{file}: cannot be read as YAML: {error}") from error


def parse_yaml(text: str, source: str) -> Any:
    """YAML as Python objects. An alias counts as what it stands for, since a few lines of them can stand for billions.

    Raises:
        MagMaxError: no YAML; more than `MAX_CHARACTERS`, `MAX_NODES` or `MAX_DEPTH`; an alias of what it is in.
    """
    try:
        _check_bounds(text, source)
        return yaml.load(text, Loader=Yaml12Loader)
    except MagMaxError:
        raise
    except Exception as error:  # PyYAML raises KeyError, IndexError and others for scalars that are not what they claim
        raise MagMaxError(f"{source}: cannot be read as YAML: {' '.join(str(error).split())}") from error


class _Extent(NamedTuple):
    """The nodes of a value with its aliases replaced, and how many collections lie in one another in it."""

    nodes: int
    height: int


def _check_bounds(text: str, source: str) -> None:
    """Raise MagMaxError for YAML that is too long, too deep, or too large once its aliases are replaced."""
    if len(text) > MAX_CHARACTERS:
        raise MagMaxError(f"{source}: has more than {MAX_CHARACTERS:,} characters, too many for a recipe")
    anchors: dict[str, _Extent] = {}
    nodes = 0
    heights = [0]  # of the document and each collection that is open
    opened: list[tuple[str | None, int]] = []  # the anchor of each such collection, and the nodes before it
    for event in yaml.parse(text, Loader=Yaml12Loader):
        extent = _Extent(0, 0)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                line = event.start_mark.line + 1
                raise MagMaxError(f"{source}, line {line}: *{event.anchor} stands for nothing, or for what it is in")
            extent = anchors[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            heights.append(0)
            extent = _Extent(1, 0)
        elif isinstance(event, yaml.ScalarEvent):
            extent = _Extent(1, 0)
            if event.anchor:
                anchors[event.anchor] = extent
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            extent = _Extent(0, heights.pop() + 1)
            if anchor:
                anchors[anchor] = _Extent(nodes - before, extent.height)
        nodes += extent.nodes
        heights[-1] = max(heights[-1], extent.height)
        if nodes > MAX_NODES or len(opened) + extent.height > MAX_DEPTH:
            line = event.start_mark.line + 1
            raise MagMaxError(
                f"{source}, line {line}: has more than {MAX_NODES:,} values, or more than {MAX_DEPTH} lists and maps "
                "in one another"
            )


def validate(
    shape: type[Shape], document: YamlDocument, kind: str, valid_keys: Callable[[Sequence[str]], Sequence[str]]
) -> Shape:
    """Return the document as a `shape`, which errors call `kind`; `known` gives the valid keys beside a place."""
    try:
        return shape.model_validate(document.content)
    except ValidationError as error:
        problems = [_explain(document, e, valid_keys) for e in error.errors()]
        raise list_problems(f"{document.file} is not {kind}", problems) from error


def _key_lines(node: yaml.Node | None, file: str, prefix: str = "") -> dict[str, int]:
    """The line of every key of a YAML tree, by its dotted name."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in lines:
                raise MagMaxError(f"{file}, line {key.start_mark.line + 1}: {name} is given twice; keep one")
            lines[name] = key.start_mark.line + 1
            lines |= _key_lines(value, file, f"{name}.")
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            lines[f"{prefix}{place}"] = item.start_mark.line + 1
            lines |= _key_lines(item, file, f"{prefix}{place}.")
    return lines


def _explain(
    document: YamlDocument, error: Mapping[str, Any], valid_keys: Callable[[Sequence[str]], Sequence[str]]
) -> str:
    """One of pydantic's complaints, with the line it is about and the nearest valid key."""
    parts = [str(p) for p in error["loc"] if str(p) not in ("str", "RecipeModel")]
    name, where = ".".join(parts), document.locate(*parts)
    if error["type"] == "extra_forbidden":
        if name in OLD_KEYS:
            return f"{where}: {name} is now {OLD_KEYS[name]}"
        return f"{where}: unknown key {name!r}; {nearest_hint(parts[-1], list(valid_keys(parts)))}"
    if error["type"] == "missing":
        return f"{where}: {name} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {name}: {message[:1].lower()}{message[1:]}, not {reprlib.repr(error['input'])}"


def is_assignment(word: str) -> bool:
    """Return whether a command-line word is an assignment such as `rule.k=2`."""
    return re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) is not None


def assign(content: Any, word: str) -> dict[str, Any]:
    """The content with one assignment put in; the value is read as YAML."""
    if not is_assignment(word):
        raise MagMaxError(f"cannot read {word!r} as an assignment; write key=value, such as fit.steps=20")
    name, _, text = word.partition("=")
    *path, last = name.split(".")
    content = json.loads(json.dumps(content))
    place = content
    for part in path:
        if isinstance(place.get(part), str):
            place[part] = {place[part]: {}}
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise MagMaxError(f"{word}: {part} has no keys to set")
    place[last] = parse_yaml(text, word)
    return content
