"""Over random architectures: a merge is its definition to the byte, whatever the files, the cuts and the threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import models as plain
from tests.models import Tensors, load_tensors, save_tensors

from magmax import merge
from magmax.checkpoints import blocks
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.rules import KthMagnitude, MagMax, Prune, Ties, chain

SHAPES = st.sampled_from(
    [(), (1,), (0,), (0, 3), (3, 0), (7,), (1, 1), (2, 90), (1, 200), (5, 3), (40, 2), (3, 2, 4), (65,)]
)
NAMES = st.text("ab._é0", min_size=1, max_size=4)
KINDS = st.sampled_from(
    [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)


@dataclass(frozen=True)
class World:
    """A base and its models, of the same shapes; a tensor's type in the models may be narrower than in the base."""

    base: Tensors
    models: list[Tensors]
    tied: dict[str, str]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    architecture = draw(st.dictionaries(NAMES, st.tuples(SHAPES, KINDS), min_size=1, max_size=5))
    seed = draw(st.integers(0, 10**6))
    coarse = draw(st.booleans())

    def model(number: int) -> Tensors:
        numbers = torch.Generator().manual_seed(10 * seed + number)
        made: Tensors = {"~": torch.full((2,), number / 3)}  # no two models are the same
        for key, (shape, kind) in architecture.items():
            values = torch.randn(shape, generator=numbers) * (2 if coarse else 1)
            made[key] = (values.round() if coarse else values).to(kind)
        return made

    count = draw(st.integers(1, 4))
    floating = [key for key, (shape, kind) in architecture.items() if kind.is_floating_point]
    narrow = draw(st.sets(st.sampled_from(floating))) if floating else set()
    made = [model(number) for number in range(count + 1)]
    for tensors in made[1:]:
        tensors |= {key: tensors[key].to(torch.bfloat16) for key in narrow}
    tied = {"z" + key: key for key in draw(st.sets(st.sampled_from(sorted(architecture)), max_size=1))}
    return World(made[0], made[1:], {new: key for new, key in tied.items() if made[0][key].numel()})


def top(vectors: Tensors, keep: int, largest: bool = True) -> Tensors:
    """The `keep` entries of largest magnitude (or all but these), equal ones by name, then offset; others are zero."""
    places = [(-abs(v), key, at) for key, t in vectors.items() for at, v in enumerate(t.reshape(-1).tolist())]
    chosen = {(key, at) for _, key, at in sorted(places)[:keep]}
    kept: Tensors = {}
    for key, tensor in vectors.items():
        mask = torch.tensor([((key, at) in chosen) == largest for at in range(tensor.numel())], dtype=torch.bool)
        kept[key] = torch.where(mask.reshape(tensor.shape), tensor, torch.zeros_like(tensor))
    return kept


def elect(trimmed: Sequence[Tensors]) -> Tensors:
    """TIES after the trim: the sign of the sum, most elements' sign where that is zero, the mean of what agrees."""
    totals = {key: plain.task_arithmetic([t[key] for t in trimmed]) for key in trimmed[0]}
    votes = sum(int((t > 0).sum()) - int((t < 0).sum()) for t in totals.values())
    merged: Tensors = {}
    for key, total in totals.items():
        sign = torch.where(total == 0, torch.full_like(total, -1.0 if votes < 0 else 1.0), total.sign())
        agreeing = [torch.where(t[key].sign() == sign, t[key], torch.zeros_like(total)) for t in trimmed]
        count = sum((a != 0).to(total.dtype) for a in agreeing)
        merged[key] = plain.task_arithmetic(agreeing) / torch.clamp(count, min=1)
    return merged


def vectors_of(world: World) -> list[Tensors]:
    floating = [key for key, t in world.base.items() if t.is_floating_point()]
    moved = {key: plain.task_vectors(world.base[key], [m[key] for m in world.models]) for key in floating}
    return [{key: moved[key][task] for key in floating} for task in range(len(world.models))]


def pruned(vectors: list[Tensors], keep: float, which: str) -> list[Tensors]:
    elements = sum(t.numel() for t in vectors[0].values())
    count = round(keep * elements)
    return [top(v, count if which == "top" else elements - count, which == "top") for v in vectors]


def each(rule: Any) -> Any:
    return lambda vectors: {key: rule([v[key] for v in vectors]) for key in vectors[0]}


RULES: dict[str, tuple[Any, Any]] = {
    "magmax": (MagMax(), each(plain.magmax)),
    "average": ("average", each(plain.average)),
    "task_arithmetic": ("task_arithmetic", each(plain.task_arithmetic)),
    "kth_magnitude": (KthMagnitude(k=1), each(lambda vectors: plain.kth_magnitude(vectors, 1))),
    "ties": (Ties(density=0.4), lambda vectors: elect(pruned(vectors, 0.4, "top"))),
    "ties by tensor": (
        Ties(density=0.4, span="tensor"),
        lambda vectors: {k: elect(pruned([{k: v[k]} for v in vectors], 0.4, "top"))[k] for k in vectors[0]},
    ),
    "prune": (chain(Prune(density=0.3), MagMax()), lambda vectors: each(plain.magmax)(pruned(vectors, 0.3, "top"))),
    "prune the top": (
        chain(Prune(density=0.3, which="bottom"), MagMax()),
        lambda vectors: each(plain.magmax)(pruned(vectors, 0.3, "bottom")),
    ),
}


def defined(name: str, world: World, factor: float) -> Tensors:
    """base + factor * rule(task vectors), in plain torch."""
    merged = RULES[name][1](vectors_of(world)) if any(t.is_floating_point() for t in world.base.values()) else {}
    return {key: plain.add_scaled(t, merged[key], factor) if key in merged else t for key, t in world.base.items()}


def as_folder(tensors: Tensors, folder: Path, parts: int) -> Path:
    """Shards with an index, the tensors dealt out in turn."""
    names = [f"{part}.safetensors" for part in range(parts)]
    where = {key: names[place % parts] for place, key in enumerate(sorted(tensors))}
    for name in set(where.values()):
        save_tensors({key: t for key, t in tensors.items() if where[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def as_pickle(tensors: Tensors, place: Path) -> Path:
    torch.save(tensors, place.with_suffix(".pt"))
    return place.with_suffix(".pt")


WRITERS: dict[str, Callable[[Tensors, Path], Path]] = {
    "file": lambda tensors, place: save_tensors(tensors, place.with_suffix(".safetensors")),
    "folder": lambda tensors, place: as_folder(tensors, place, 2),
    "pickle": as_pickle,
}


def same_numbers(ours: Tensors, theirs: Tensors) -> bool:
    """Equal to the bit, but for the sign of zero, in which definitions by a sum from zero differ."""
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == t.dtype and ours[k].shape == t.shape and torch.equal(ours[k], t) for k, t in theirs.items()
    )


@given(
    worlds(),
    st.sampled_from(sorted(RULES)),
    st.sampled_from([1.0, 0.5, 0.3, 0.0]),
    st.sampled_from([1, 5, 64, 1 << 18]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from(sorted(WRITERS)),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_a_merge_is_its_definition_however_it_is_read_cut_and_shared_out(
    world: World, name: str, factor: float, slab: int, chunk: int, kind: str, threads: int
) -> None:
    rule, wanted = RULES[name][0], defined(name, world, factor)
    with_ties = [m | {new: m[key] for new, key in world.tied.items()} for m in (world.base, *world.models)]
    in_memory = merge(rule, with_ties[0], with_ties[1:], factor)
    assert all(in_memory[new] is in_memory[key] for new, key in world.tied.items())
    assert same_numbers({key: in_memory[key] for key in wanted}, wanted)
    with TemporaryDirectory() as where, patch.multiple(blocks, BLOCK_ELEMENTS=slab, BLOCKS_PER_CHUNK=chunk):
        paths: list[Path] = []
        for number, tensors in enumerate((world.base, *world.models)):
            place = Path(where) / f"in{number}"
            paths.append(WRITERS[kind](tensors, place))
        out = Path(where) / "out.safetensors"
        merge(rule, paths[0], paths[1:], factor, out, execution=ExecutionOptions(threads=threads))
        assert plain.same_bytes(load_tensors(out), {key: in_memory[key] for key in wanted})
