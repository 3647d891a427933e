"""Mutated inputs, and what must be true of each: a MagMaxError with words, or the right answer."""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from tests.robustness.files import data, entries, model, with_header, write, write_folder

from magmax import merge_adapters
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.lora.adapted_model import within
from magmax.errors import MagMaxError
from magmax.merging.api import merge
from magmax.merging.running.running_merge import Running
from magmax.recipes.recipe import load

LONGEST_MESSAGE = 20_000

NASTY = [
    None, True, False, 0, 1, -1, 2, 9, 36, 0.0, 9.0, 1e400, float("nan"), 2**31, 2**53, 2**63 - 1, 2**63, 10**4000,
    "", ".", "..", "/", "a/b", "../x", "\0", "\ud800", "é", "a" * 300, "__metadata__", "weight", "bias",
    "F32", "BF16", "F64", "F4", "I64", "F8_E4M3", "BOOL", "C64", "magmax", "base.safetensors", [], {}, [[]], [None],
    [0, 0], [0, 36], [36, 0], [1] * 70, {"a": 1}, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
]  # fmt: skip

BYTES = [
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"-",
    b"9",
    b"\\",
    b"\n",
    b"&a ",
    b"*a",
    b"!!int ",
    b"- ",
]


def mutated_tree(draw: random.Random, tree: Any) -> Any:
    """JSON with one value, key or entry changed."""
    tree = json.loads(json.dumps(tree))
    places = list(_places(tree))
    if not places or draw.random() < 0.02:
        return draw.choice(NASTY)
    holder, at = draw.choice(places)
    what = draw.randrange(6)
    if what == 0:
        del holder[at]
    elif what == 1 and isinstance(holder, dict):
        key = draw.choice([n for n in NASTY if isinstance(n, str)])
        holder[key] = holder.pop(at)
    elif what == 2 and type(holder[at]) is int:
        holder[at] += draw.choice([-36, -8, -4, -1, 1, 4, 8, 36, 2**40])
    elif what == 3:
        other, there = draw.choice(places)
        holder[at] = json.loads(json.dumps(other[there]))
    elif what == 4 and isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), draw.choice(NASTY))
    else:
        holder[at] = draw.choice(NASTY)
    return tree


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bytes with one stretch changed, inserted, cut out, or doubled."""
    at = draw.randrange(len(content) + 1)
    end = min(len(content), at + draw.choice([0, 1, 1, 2, 8, 40]))
    put = draw.choice(
        [b"", draw.choice(BYTES), bytes([draw.randrange(256)]), content[at:end] * 2, draw.choice(BYTES) * 3000]
    )
    return content[:at] if draw.random() < 0.05 else content[:at] + put + content[end:]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or index) of every value in a tree."""
    if isinstance(tree, dict | list):
        for at in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, at
            yield from _places(tree[at])


def header(draw: random.Random, folder: Path) -> None:
    """A mutated safetensors file is refused, or holds what the reference implementation reads, and can be merged."""
    tensors = model(1)
    told = {"__metadata__": {"format": "pt", "tied": "weight"}} | entries(tensors)
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        told = mutated_tree(draw, told)
    content = with_header(told, data(tensors))
    for _ in range(draw.choice([0, 0, 1, 2])):
        content = mutated_bytes(draw, content)
    path = folder / "mutated.safetensors"
    path.write_bytes(content)
    with refusals(path):
        opened = open_checkpoint(path)
        ours = {
            key: (s.dtype, list(s.shape), opened.read(key, 0, s.units).tobytes()) for key, s in opened.specs.items()
        }
        assert ours == {key: (t["dtype"], t["shape"], bytes(t["data"])) for key, t in deserialize(content)}
    base = write(folder / "base.safetensors", model(0))
    out = folder / "out.safetensors"
    for first, second in ((base, path), (path, base)):
        with refusals(path):
            merge("average", first, [second], 1.0, out=out)
            kept = dict(deserialize(out.read_bytes()))
            assert kept.keys() == dict(deserialize(first.read_bytes())).keys()


def index(draw: random.Random, folder: Path) -> None:
    """A mutated index is refused, or every tensor is the one of the file that the index names."""
    whole = model(1)
    shards = {"1.safetensors": {k: whole[k] for k in ("bias", "scale")}, "2.safetensors": {"weight": whole["weight"]}}
    told: Any = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, s in shards.items() for key in s}}
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        told = mutated_tree(draw, told)
    write_folder(folder / "model", shards)
    file = folder / "model" / "model.safetensors.index.json"
    content = json.dumps(told).encode()
    file.write_bytes(mutated_bytes(draw, content) if draw.random() < 0.4 else content)
    with refusals(folder / "model"):
        opened = open_checkpoint(folder / "model")
        named = json.loads(file.read_bytes())["weight_map"]
        for key, spec in opened.specs.items():
            assert opened.read(key, 0, spec.units).tobytes() == shards[named[key]][key].tobytes()
        assert opened.specs.keys() == {key for name in set(named.values()) for key in shards[name]}


RECIPES: list[Any] = [
    {"base": "base.safetensors", "models": ["a.safetensors", "b.safetensors"], "out": "out.safetensors"},
    {
        "base": "base.safetensors",
        "models": [{"path": "a.safetensors", "name": "first"}, "b.safetensors"],
        "rule": {"kth_magnitude": {"k": 2}},
        "scaling_factor": 0.5,
        "dtype": "float32",
        "mismatch": "strict",
        "allow_nonfinite": False,
        "out": "out",
    },
    {"base": "base.safetensors", "models": ["a.safetensors"], "rule": ["average"], "scaling_factor": 1},
    {"base": "b", "models": ["a"], "rule": {"_target_": "x.MagMaxAlgorithm", "scaling_factor": 0.3, "inplace": True}},
]
TEXTS = [
    "- ",
    "&a [*a]",
    "<<: {a: 1}",
    "!!python/object:os.system x",
    "!!int x",
    "!!timestamp x",
    "2020-99-99",
    "!!bool x",
    "=",
    "? a",
]
ASSIGNMENTS = [
    "scaling_factor=",
    "rule=",
    "rule.k=",
    "method.scaling_factor=",
    "models=",
    "models.0=",
    "base=",
    "x=",
    "rule.k.j=",
]


def recipe(draw: random.Random, folder: Path) -> None:
    """A mutated recipe is refused, or its plan says what YAML says."""
    told = draw.choice(RECIPES)
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        told = mutated_tree(draw, told)
    try:
        text = yaml.safe_dump(told, default_flow_style=draw.choice([True, False, None]))
    except (yaml.YAMLError, UnicodeError, ValueError):
        text = json.dumps(told)
    content = text.encode("utf-8", "surrogatepass")
    for _ in range(draw.choice([0, 0, 1, 2])):
        content = mutated_bytes(draw, content)
    if draw.random() < 0.1:
        content = content.replace(b"average", draw.choice(TEXTS).encode()).replace(b"2", draw.choice(TEXTS).encode())
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    words = [
        draw.choice(ASSIGNMENTS) + draw.choice([*TEXTS, "2", "[", "{}", "0.5", "nan"])
        for _ in range(draw.choice([0, 0, 1, 2]))
    ]
    for name in ("base", "a", "b"):
        write(folder / f"{name}.safetensors", model(ord(name[0])))
    with refusals(folder, named=False):
        plan = load(str(file), words)
        said = yaml.safe_load(content.decode())
        if not words:
            assert plan.base == within(str(folder), said["base"])
            assert len(plan.models) == len(plan.names) == len(said["models"])
        plan.job(str(folder / "out.safetensors"))


def state(draw: random.Random, folder: Path) -> None:
    """A running merge whose state file is mutated is refused, or absorbs on and gives a whole model."""
    base = write(folder / "base.safetensors", model(0))
    for number in (1, 2):
        write(folder / f"task{number}.safetensors", model(number))
    Running(folder / "state", "magmax", base).absorb(folder / "task1.safetensors")
    file = folder / "state" / "state.json"
    told = json.loads(file.read_text())
    for _ in range(draw.choice([1, 1, 2, 3])):
        told = mutated_tree(draw, told)
    content = json.dumps(told).encode()
    file.write_bytes(mutated_bytes(draw, content) if draw.random() < 0.4 else content)
    with refusals(folder, named=False):
        running = Running(folder / "state", None, base)
        running.status()
        running.absorb(folder / "task2.safetensors")
        running.result(out=folder / "out.safetensors")
        assert {key for key, _ in deserialize((folder / "out.safetensors").read_bytes())} == set(model(0))


PREFIX = "base_model.model."
SETTINGS: Any = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "rank_pattern": {"m.e": 2},
    "alpha_pattern": {"^m\\.(q|k)$": 5},
    "target_modules": ["q", "e"],
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "init_lora_weights": True,
}
HOSTILE = [
    "(a+)+$",
    "(.*.*.*.*.*.*.*.*.*)x",
    "(q|qq|m.q|.)*+",
    "(" * 60 + ")" * 60,
    "(?=(q+))\\1*x",
    "((.*)*)*b",
    "a" * 3000,
]


def tuned(seed: int) -> dict[str, NDArray[Any]]:
    """An adapter of `grounded`: a linear layer, an embedding, and a head that is saved in full or is not."""
    draw = np.random.default_rng(seed)
    shapes = {"m.q.lora_A.weight": (2, 5), "m.q.lora_B.weight": (6, 2), "m.e.lora_embedding_A": (2, 7),
              "m.e.lora_embedding_B": (4, 2), "head.weight": (3, 5)}  # fmt: skip
    made = {PREFIX + key: draw.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return made if seed % 2 else dict(list(made.items())[:-1])


def grounded() -> dict[str, NDArray[Any]]:
    shapes = {"m.q.weight": (6, 5), "m.e.weight": (7, 4), "head.weight": (3, 5)}
    return {key: np.random.default_rng(0).normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def floats(content: bytes) -> dict[str, NDArray[Any]]:
    """The float32 tensors of a safetensors file, as the reference implementation reads them."""
    read = [(key, t) for key, t in deserialize(content) if t["dtype"] == "F32"]
    return {key: np.frombuffer(bytes(t["data"]), np.float32).reshape(t["shape"]) for key, t in read}


def updates(settings: Any, stored: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """s * B A of both layers, as plain as can be; {} where the settings have an expression that is not safe to try."""

    def told(patterns: str, name: str, module: str) -> Any:
        for pattern, value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return settings.get(name, 8)

    every = [*(settings.get("rank_pattern") or {}), *(settings.get("alpha_pattern") or {})]
    if set(every) & set(HOSTILE):
        return {}
    found: dict[str, NDArray[Any]] = {}
    for module, first, second in (
        ("m.q", "lora_B.weight", "lora_A.weight"),
        ("m.e", "lora_embedding_A", "lora_embedding_B"),
    ):
        names = [f"{PREFIX}{module}.{name}" for name in (first, second)]
        if all(name in stored for name in names):
            one, two = (stored[name].astype("f8") for name in names)
            rank, alpha = told("rank_pattern", "r", module), told("alpha_pattern", "lora_alpha", module)
            scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
            found[module] = scale * (one.T @ two.T if "embedding" in first else one @ two)
    return found


def adapter(draw: random.Random, folder: Path) -> None:
    """An adapter whose settings or weights are mutated is refused, or is the base and its update, and can be merged."""
    tensors = tuned(draw.randrange(2))
    settings, told = SETTINGS, entries(tensors)
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        settings = mutated_tree(draw, settings)
    if draw.random() < 0.2 and isinstance(settings, dict):
        settings[draw.choice(["rank_pattern", "alpha_pattern", "target_modules"])] = {draw.choice(HOSTILE): 2}
    for _ in range(draw.choice([0, 0, 1, 2])):
        told = mutated_tree(draw, told)
    text, content = json.dumps(settings).encode(), with_header(told, data(tensors))
    text = mutated_bytes(draw, text) if draw.random() < 0.2 else text
    content = mutated_bytes(draw, content) if draw.random() < 0.2 else content
    path = folder / "mutated"
    path.mkdir()
    (path / "adapter_config.json").write_bytes(text)
    (path / "adapter_model.safetensors").write_bytes(content)
    base, start = write(folder / "base.safetensors", grounded()), grounded()
    expected: dict[str, NDArray[Any]] = {}
    with refusals(path):
        opened = open_checkpoint(path, base=open_checkpoint(base))
        stored = floats(content)
        expected = updates(json.loads(text), stored)
        for module, update in expected.items():
            key = f"{module}.weight"
            spec = opened.specs[key]
            ours = opened.read(key, 0, spec.units).reshape(spec.shape)
            assert np.allclose(ours, start[key] + update, rtol=1e-4, atol=1e-4, equal_nan=True)
        merge("magmax", base, [path], 1.0, out=folder / "out.safetensors", mismatch="base")
        assert {key for key, _ in deserialize((folder / "out.safetensors").read_bytes())} == set(start)
    other = folder / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(SETTINGS))
    write(other / "adapter_model.safetensors", tuned(2))
    with refusals(path, named=False):
        rule = draw.choice(["task_arithmetic", "magmax"])
        fits = merge_adapters(rule, [other, path], 5, folder / "merged", 1.0)
        if rule == "magmax" or not expected:
            return
        wanted = {key: update + expected.get(key, 0) for key, update in updates(SETTINGS, tuned(2)).items()}
        made = json.loads((folder / "merged" / "adapter_config.json").read_text())
        merged = floats((folder / "merged" / "adapter_model.safetensors").read_bytes())
        for module, update in updates(made, merged).items():
            assert np.linalg.norm(update - wanted[module]) <= fits[module].error + 1e-5 * fits[module].norm


class Trap:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def state_dict(draw: random.Random, folder: Path) -> None:
    """A mutated `.pt` file is refused, or holds what torch reads without running code; and no code runs."""
    sprung, path, out = folder / "sprung", folder / "mutated.pt", folder / "out.safetensors"
    tensors: dict[str, Any] = {key: torch.from_numpy(t) for key, t in model(1).items()}
    tensors["tied"] = tensors["weight"]
    content: Any = {"state_dict": tensors} if draw.random() < 0.3 else tensors
    if draw.random() < 0.3:
        content = {**content, "trap": Trap(str(sprung))}
    zipped = draw.random() < 0.7
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if zipped and draw.random() < 0.7:
        _rezipped(draw, path)
    for _ in range(draw.choice([0, 0, 1, 2])):
        path.write_bytes(mutated_bytes(draw, path.read_bytes()))
    base = write(folder / "base.safetensors", model(0))
    with refusals(path):
        opened = open_checkpoint(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        theirs = loaded["state_dict"] if isinstance(loaded.get("state_dict"), dict) else loaded
        assert opened.specs.keys() | opened.aliases.keys() == theirs.keys()
        for key, tensor in theirs.items():
            spec = opened.spec(key)
            assert spec.shape == tuple(tensor.shape)
            if tensor.nbytes < 1 << 20:
                ours = opened.read(opened.resolve(key), 0, spec.units)
                flat = tensor.contiguous().reshape(-1)
                assert ours.tobytes() == (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        merge("average", base, [path], 1.0, out=out, mismatch="base")
        assert {key for key, _ in deserialize(out.read_bytes())} == set(model(0))
    assert not sprung.exists()


def _rezipped(draw: random.Random, path: Path) -> None:
    """The archive with its pickle mutated, and its checksums right."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts:
            if draw.random() > 0.02:
                archive.writestr(name, mutated_bytes(draw, part) if name.endswith("data.pkl") else part)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "header": header,
    "index": index,
    "recipe": recipe,
    "state": state,
    "adapter": adapter,
    "pickle": state_dict,
}


@contextmanager
def refusals(path: Path, named: bool = True) -> Iterator[None]:
    """Takes a MagMaxError for an answer, if it says enough and not too much."""
    try:
        yield
    except MagMaxError as error:
        words = str(error)
        if not words or len(words) > LONGEST_MESSAGE or (named and path.name not in words):
            raise AssertionError(f"an error that says too little or too much: {words[:1000]!r}") from error
    except SafetensorError as error:
        raise AssertionError(f"the reference implementation refuses what was read: {error}") from error


def case(kind: str, seed: int) -> None:
    """One case, the same for the same kind and seed. Raises whatever breaks the law."""
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KINDS[kind](random.Random(f"{kind} {seed}"), Path(folder))
