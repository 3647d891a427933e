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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from tests.robustness.files import (
    build_file,
    header_entries,
    small_model,
    tensor_data,
    write_safetensors,
    write_sharded,
)

from magmax import merge_adapters
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.lora.adapted_model import resolve_path
from magmax.checkpoints.torch.pickled_models import PickledModel
from magmax.errors import MagMaxError
from magmax.merging.api import merge
from magmax.merging.running.running_merge import Running
from magmax.recipes.recipe import load_recipe

MAX_MESSAGE_LENGTH = 20_000

HOSTILE_VALUES = [
    None, True, False, 0, 1, -1, 2, 9, 36, 0.0, 9.0, 1e400, float("nan"), 2**31, 2**53, 2**63 - 1, 2**63, 10**4000,
    "", ".", "..", "/", "a/b", "../x", "\0", "\ud800", "é", "a" * 300, "__metadata__", "weight", "bias",
    "F32", "BF16", "F64", "F4", "I64", "F8_E4M3", "BOOL", "C64", "magmax", "base.safetensors", [], {}, [[]], [None],
    [0, 0], [0, 36], [36, 0], [1] * 70, {"a": 1}, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
]  # fmt: skip

HOSTILE_BYTES = [
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


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """JSON with one value, key or entry changed."""
    tree = json.loads(json.dumps(tree))
    places = list(_iter_locations(tree))
    if not places or rng.random() < 0.02:
        return rng.choice(HOSTILE_VALUES)
    holder, at = rng.choice(places)
    what = rng.randrange(6)
    if what == 0:
        del holder[at]
    elif what == 1 and isinstance(holder, dict):
        key = rng.choice([n for n in HOSTILE_VALUES if isinstance(n, str)])
        holder[key] = holder.pop(at)
    elif what == 2 and type(holder[at]) is int:
        holder[at] += rng.choice([-36, -8, -4, -1, 1, 4, 8, 36, 2**40])
    elif what == 3:
        other, there = rng.choice(places)
        holder[at] = json.loads(json.dumps(other[there]))
    elif what == 4 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), rng.choice(HOSTILE_VALUES))
    else:
        holder[at] = rng.choice(HOSTILE_VALUES)
    return tree


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes with one stretch changed, inserted, cut out, or doubled."""
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice([0, 1, 1, 2, 8, 40]))
    put = rng.choice(
        [
            b"",
            rng.choice(HOSTILE_BYTES),
            bytes([rng.randrange(256)]),
            content[at:end] * 2,
            rng.choice(HOSTILE_BYTES) * 3000,
        ]
    )
    return content[:at] if rng.random() < 0.05 else content[:at] + put + content[end:]


def _iter_locations(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or index) of every value in a tree."""
    if isinstance(tree, dict | list):
        for at in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, at
            yield from _iter_locations(tree[at])


def check_header(rng: random.Random, folder: Path) -> None:
    """A mutated safetensors file is refused, or holds what the reference implementation reads, and can be merged."""
    tensors = small_model(1)
    told = {"__metadata__": {"format": "pt", "tied": "weight"}} | header_entries(tensors)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        told = mutate_tree(rng, told)
    content = build_file(told, tensor_data(tensors))
    for _ in range(rng.choice([0, 0, 1, 2])):
        content = mutate_bytes(rng, content)
    path = folder / "mutated.safetensors"
    path.write_bytes(content)
    with allow_refusal(path):
        opened = open_checkpoint(path)
        ours = {
            key: (s.dtype, list(s.shape), opened.read(key, 0, s.num_units).tobytes()) for key, s in opened.specs.items()
        }
        assert ours == {key: (t["dtype"], t["shape"], bytes(t["data"])) for key, t in deserialize(content)}
    base = write_safetensors(folder / "base.safetensors", small_model(0))
    out = folder / "out.safetensors"
    for first, second in ((base, path), (path, base)):
        with allow_refusal(path):
            merge("average", first, [second], 1.0, out=out)
            kept = dict(deserialize(out.read_bytes()))
            assert kept.keys() == dict(deserialize(first.read_bytes())).keys()


def check_index(rng: random.Random, folder: Path) -> None:
    """A mutated index is refused, or every tensor is the one of the file that the index names."""
    whole = small_model(1)
    shards = {"1.safetensors": {k: whole[k] for k in ("bias", "scale")}, "2.safetensors": {"weight": whole["weight"]}}
    told: Any = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, s in shards.items() for key in s}}
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        told = mutate_tree(rng, told)
    write_sharded(folder / "model", shards)
    file = folder / "model" / "model.safetensors.index.json"
    content = json.dumps(told).encode()
    file.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.4 else content)
    with allow_refusal(folder / "model"):
        opened = open_checkpoint(folder / "model")
        named = json.loads(file.read_bytes())["weight_map"]
        for key, spec in opened.specs.items():
            assert opened.read(key, 0, spec.num_units).tobytes() == shards[named[key]][key].tobytes()
        assert opened.specs.keys() == named.keys()


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
HOSTILE_YAML = [
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


def check_recipe(rng: random.Random, folder: Path) -> None:
    """A mutated recipe is refused, or its plan says what YAML says."""
    told = rng.choice(RECIPES)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        told = mutate_tree(rng, told)
    try:
        text = yaml.safe_dump(told, default_flow_style=rng.choice([True, False, None]))
    except (yaml.YAMLError, UnicodeError, ValueError):
        text = json.dumps(told)
    content = text.encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 1, 2])):
        content = mutate_bytes(rng, content)
    if rng.random() < 0.1:
        content = content.replace(b"average", rng.choice(HOSTILE_YAML).encode()).replace(
            b"2", rng.choice(HOSTILE_YAML).encode()
        )
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    words = [
        rng.choice(ASSIGNMENTS) + rng.choice([*HOSTILE_YAML, "2", "[", "{}", "0.5", "nan"])
        for _ in range(rng.choice([0, 0, 1, 2]))
    ]
    for name in ("base", "a", "b"):
        write_safetensors(folder / f"{name}.safetensors", small_model(ord(name[0])))
    with allow_refusal(folder, names_path=False):
        plan = load_recipe(str(file), words)
        said = yaml.safe_load(content.decode())
        if not words:
            assert plan.base == resolve_path(str(folder), said["base"])
            assert len(plan.models) == len(plan.names) == len(said["models"])
        plan.job(str(folder / "out.safetensors"))


def check_state(rng: random.Random, folder: Path) -> None:
    """A running merge whose state file is mutated is refused, or absorbs on and gives a whole model."""
    base = write_safetensors(folder / "base.safetensors", small_model(0))
    for number in (1, 2):
        write_safetensors(folder / f"task{number}.safetensors", small_model(number))
    Running(folder / "state", "magmax", base).absorb(folder / "task1.safetensors")
    file = folder / "state" / "state.json"
    told = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 2, 3])):
        told = mutate_tree(rng, told)
    content = json.dumps(told).encode()
    file.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.4 else content)
    with allow_refusal(folder, names_path=False):
        running = Running(folder / "state", None, base)
        running.status()
        running.absorb(folder / "task2.safetensors")
        running.result(out=folder / "out.safetensors")
        assert {key for key, _ in deserialize((folder / "out.safetensors").read_bytes())} == set(small_model(0))


PREFIX = "base_model.model."
ADAPTER_CONFIG: Any = {
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
HOSTILE_PATTERNS = [
    "(a+)+$",
    "(.*.*.*.*.*.*.*.*.*)x",
    "(q|qq|m.q|.)*+",
    "(" * 60 + ")" * 60,
    "(?=(q+))\\1*x",
    "((.*)*)*b",
    "a" * 3000,
]


def make_adapter(seed: int) -> dict[str, NDArray[Any]]:
    """An adapter of `grounded`: a linear layer, an embedding, and a head that is saved in full or is not."""
    draw = np.random.default_rng(seed)
    shapes = {"m.q.lora_A.weight": (2, 5), "m.q.lora_B.weight": (6, 2), "m.e.lora_embedding_A": (2, 7),
              "m.e.lora_embedding_B": (4, 2), "head.weight": (3, 5)}  # fmt: skip
    made = {PREFIX + key: draw.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return made if seed % 2 else dict(list(made.items())[:-1])


def make_adapter_base() -> dict[str, NDArray[Any]]:
    shapes = {"m.q.weight": (6, 5), "m.e.weight": (7, 4), "head.weight": (3, 5)}
    return {key: np.random.default_rng(0).normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def read_float_tensors(content: bytes) -> dict[str, NDArray[Any]]:
    """The float32 tensors of a safetensors file, as the reference implementation reads them."""
    read = [(key, t) for key, t in deserialize(content) if t["dtype"] == "F32"]
    return {key: np.frombuffer(bytes(t["data"]), np.float32).reshape(t["shape"]) for key, t in read}


def adapter_updates(settings: Any, stored: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """s * B A of both layers, as plain as can be; {} where the settings have an expression that is not safe to try."""

    def told(patterns: str, name: str, module: str) -> Any:
        for pattern, value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return settings.get(name, 8)

    every = [*(settings.get("rank_pattern") or {}), *(settings.get("alpha_pattern") or {})]
    if set(every) & set(HOSTILE_PATTERNS):
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


def check_adapter(rng: random.Random, folder: Path) -> None:
    """An adapter whose settings or weights are mutated is refused, or is the base and its update, and can be merged."""
    tensors = make_adapter(rng.randrange(2))
    settings, told = ADAPTER_CONFIG, header_entries(tensors)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        settings = mutate_tree(rng, settings)
    if rng.random() < 0.2 and isinstance(settings, dict):
        settings[rng.choice(["rank_pattern", "alpha_pattern", "target_modules"])] = {rng.choice(HOSTILE_PATTERNS): 2}
    for _ in range(rng.choice([0, 0, 1, 2])):
        told = mutate_tree(rng, told)
    text, content = json.dumps(settings).encode(), build_file(told, tensor_data(tensors))
    text = mutate_bytes(rng, text) if rng.random() < 0.2 else text
    content = mutate_bytes(rng, content) if rng.random() < 0.2 else content
    path = folder / "mutated"
    path.mkdir()
    (path / "adapter_config.json").write_bytes(text)
    (path / "adapter_model.safetensors").write_bytes(content)
    base, start = write_safetensors(folder / "base.safetensors", make_adapter_base()), make_adapter_base()
    expected: dict[str, NDArray[Any]] = {}
    with allow_refusal(path):
        opened = open_checkpoint(path, base=open_checkpoint(base))
        stored = read_float_tensors(content)
        expected = adapter_updates(json.loads(text), stored)
        for module, update in expected.items():
            key = f"{module}.weight"
            spec = opened.specs[key]
            ours = opened.read(key, 0, spec.num_units).reshape(spec.shape)
            assert np.allclose(ours, start[key] + update, rtol=1e-4, atol=1e-4, equal_nan=True)
        merge("magmax", base, [path], 1.0, out=folder / "out.safetensors", mismatch="base")
        assert {key for key, _ in deserialize((folder / "out.safetensors").read_bytes())} == set(start)
    other = folder / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    write_safetensors(other / "adapter_model.safetensors", make_adapter(2))
    with allow_refusal(path, names_path=False):
        rule = rng.choice(["task_arithmetic", "magmax"])
        fits = merge_adapters(rule, [other, path], 5, folder / "merged", 1.0)
        if rule == "magmax" or not expected:
            return
        wanted = {
            key: update + expected.get(key, 0)
            for key, update in adapter_updates(ADAPTER_CONFIG, make_adapter(2)).items()
        }
        made = json.loads((folder / "merged" / "adapter_config.json").read_text())
        merged = read_float_tensors((folder / "merged" / "adapter_model.safetensors").read_bytes())
        for module, update in adapter_updates(made, merged).items():
            assert np.linalg.norm(update - wanted[module]) <= fits[module].error + 1e-5 * fits[module].norm


class PickleTrap:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def check_state_dict(rng: random.Random, folder: Path) -> None:
    """A mutated `.pt` file is refused, or holds what torch reads without running code; and no code runs."""
    sprung, path, out = folder / "sprung", folder / "mutated.pt", folder / "out.safetensors"
    tensors: dict[str, Any] = {key: torch.from_numpy(t) for key, t in small_model(1).items()}
    tensors["tied"] = tensors["weight"]
    content: Any = {"state_dict": tensors} if rng.random() < 0.3 else tensors
    if rng.random() < 0.3:
        content = {**content, "trap": PickleTrap(str(sprung))}
    zipped = rng.random() < 0.7
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if zipped and rng.random() < 0.7:
        _mutate_zip(rng, path)
    for _ in range(rng.choice([0, 0, 1, 2])):
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    base = write_safetensors(folder / "base.safetensors", small_model(0))
    with allow_refusal(path):
        opened = open_checkpoint(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        theirs = loaded["state_dict"] if isinstance(loaded.get("state_dict"), dict) else loaded
        assert opened.specs.keys() | opened.aliases.keys() == theirs.keys()
        for key, tensor in theirs.items():
            spec = opened.spec(key)
            assert spec.shape == tuple(tensor.shape)
            if tensor.nbytes < 1 << 20:
                ours = opened.read(opened.resolve_alias(key), 0, spec.num_units)
                flat = tensor.contiguous().reshape(-1)
                assert ours.tobytes() == (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        merge("average", base, [path], 1.0, out=out, mismatch="base")
        assert {key for key, _ in deserialize(out.read_bytes())} == set(small_model(0))
    assert not sprung.exists()


TENSOR_PROGRAM = (
    b"(X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\n"
    b"X\1\0\0\x000X\3\0\0\0cpuK\x06tQK\0K\2K\3\x86K\3K\1\x86\x89ccollections\nOrderedDict\n)RtR"
)
OPCODE_PIECES = [
    *(bytes([opcode]) for opcode in b"N\x88}])\x8f(tldaesu\x85\x86\x87\x90\x91R\x81\x92bo012\x94\x93Q"),
    *(b"K\1", b"K\xff", b"J\xff\xff\xff\xff", b"G" + bytes(8), b"\x8a\x08" + bytes([1] * 8)),
    *(b"\x8a\x10" + bytes([7] * 16), b"X\1\0\0\0a", b"X\3\0\0\0\xed\xa0\x80", b"C\2ab", b"q\0", b"q\1", b"h\0", b"h\1"),
    *(b"p7\n", b"g7\n", b"p99999999999999999999\n", b"cx\nY\n", b"c__builtin__\nlist\n", b"c__builtin__\nset\n"),
    *(b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"ctorch\nSize\n"),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._tensor\n_rebuild_from_type_v2\n"),
    *(b"(N" + b"\x85" * 2000, b"]" + b"a" * 50, b"2" * 300, b"\x8d" + b"\xff" * 8),
]  # fmt: skip


def check_opcodes(rng: random.Random, folder: Path) -> None:
    """A pickle of opcodes drawn at random is refused, or its tensor is the one that torch reads; no code runs."""
    pieces = [rng.choice(OPCODE_PIECES) for _ in range(rng.choice([1, 3, 10, 40]))]
    whole = b"}" + TENSOR_PROGRAM + b"u" if rng.random() < 0.5 else b"}(" + TENSOR_PROGRAM[1:]
    pieces.insert(rng.randrange(len(pieces) + 1) if rng.random() < 0.5 else 0, whole)
    content = np.arange(6, dtype=np.float32).tobytes()
    path = folder / "mutated.pt"
    with zipfile.ZipFile(path, "w") as archive:
        records = {"data.pkl": b"\x80\2" + b"".join(pieces) + b".", "version": b"3\n", "data/0": content}
        for name, record in records.items():
            archive.writestr(f"c/{name}", record)
    with allow_refusal(path):
        opened = open_checkpoint(path)
        theirs: Any = {}
        with suppress(Exception):  # torch refuses some of what is harmless, such as unknown classes
            theirs = torch.load(path, weights_only=True)
        for key, spec in opened.specs.items():
            ours = opened.read(key, 0, spec.num_units)
            if isinstance(theirs, dict) and key in theirs:
                assert ours.tobytes() == theirs[key].contiguous().numpy().tobytes()
    with allow_refusal(path):
        taken = PickledModel(path, str(path))
        assert all(len(taken.read(key, 0, spec.num_units)) == spec.num_units for key, spec in taken.specs.items())


def _mutate_zip(rng: random.Random, path: Path) -> None:
    """The archive with its pickle mutated, and its checksums right."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts:
            if rng.random() > 0.02:
                archive.writestr(name, mutate_bytes(rng, part) if name.endswith("data.pkl") else part)


CHECKS: dict[str, Callable[[random.Random, Path], None]] = {
    "header": check_header,
    "index": check_index,
    "recipe": check_recipe,
    "state": check_state,
    "adapter": check_adapter,
    "pickle": check_state_dict,
    "opcodes": check_opcodes,
}


@contextmanager
def allow_refusal(path: Path, names_path: bool = True) -> Iterator[None]:
    """Takes a MagMaxError for an answer, if it says enough and not too much."""
    try:
        yield
    except MagMaxError as error:
        words = str(error)
        if not words or len(words) > MAX_MESSAGE_LENGTH or (names_path and path.name not in words):
            raise AssertionError(f"an error that says too little or too much: {words[:1000]!r}") from error
    except SafetensorError as error:
        raise AssertionError(f"the reference implementation refuses what was read: {error}") from error


def run_case(kind: str, seed: int) -> None:
    """One case, the same for the same kind and seed. Raises whatever breaks the law."""
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CHECKS[kind](random.Random(f"{kind} {seed}"), Path(folder))
