"""Folders of torch.distributed.checkpoint, really saved, against what torch itself reads from them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoints.dcp_ranks import RANKS
from tests.models import (
    Tensors,
    load_tensors,
    magmax,
    reference_merge,
    same_bytes,
    save_tensors,
    small_model,
    tensor_bytes,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import magmax as package
from magmax import MagMaxError
from magmax.checkpoints import Checkpoint, open_checkpoint
from magmax.checkpoints.torch.dcp import split_into_boxes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes saved."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("dcp_ranks.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, str(script), str(folder), str(rank)], env=env, stderr=subprocess.PIPE)
        for rank in range(RANKS)
    ]
    told = [process.communicate(timeout=200)[1].decode() for process in running]
    assert all(process.returncode == 0 for process in running), told
    return folder


def save(content: Any, folder: Path, **how: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, storage_writer=FileSystemWriter(folder, **how))
    return folder


def truth(folder: Path, tmp_path: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, tmp_path / "truth.pt")
    return torch.load(tmp_path / "truth.pt", weights_only=False)


def check(opened: Checkpoint, expected: Tensors) -> None:
    """The same tensors, read whole and from every place to every other, in steps."""
    assert opened.specs.keys() == expected.keys()
    for key, tensor in expected.items():
        spec = opened.spec(key)
        assert spec.shape == tuple(tensor.shape), key
        content, size = tensor_bytes(tensor), spec.storage_dtype.itemsize
        assert opened.read(key, 0, spec.num_units).tobytes() == content, key
        step = max(1, spec.num_units // 12)
        for start in range(0, spec.num_units, step):
            for stop in range(start + 1, spec.num_units + 1, step):
                assert opened.read(key, start, stop).tobytes() == content[start * size : stop * size], (key, start)


def test_chunks_along_any_dimension_are_put_together(ranks: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(ranks / "tensors")
    check(opened, truth(ranks / "tensors", tmp_path))
    assert not opened.notes


def test_a_model_sharded_by_fsdp_is_read_without_its_optimizer(ranks: Path, tmp_path: Path) -> None:
    expected = truth(ranks / "fsdp", tmp_path)
    opened = open_checkpoint(ranks / "fsdp")
    assert {"conv.weight", "model.head.bias", "steps"} <= opened.specs.keys()
    check(opened, expected["model"])
    left = sum(len(state) for state in expected["optim"]["state"].values())
    assert opened.notes == [f"{ranks / 'fsdp'}: {left} tensors beside the model left out (optim)"]


def test_another_part_is_chosen_by_its_path(ranks: Path, tmp_path: Path) -> None:
    state = truth(ranks / "fsdp", tmp_path)["optim"]["state"]
    opened = open_checkpoint(ranks / "fsdp" / "optim" / "state")
    check(opened, {f"{name}.{key}": t for name, of in state.items() for key, t in of.items()})


def test_one_process_saves_what_merges(tmp_path: Path) -> None:
    base, models = small_model(0), [small_model(1), small_model(2)]
    save_tensors(base, tmp_path / "base.safetensors")
    folders = [save({"app": {"model": m, "step": 3}}, tmp_path / f"m{n}") for n, m in enumerate(models)]
    package.merge("magmax", tmp_path / "base.safetensors", folders, 0.5, tmp_path / "out.safetensors")
    assert same_bytes(load_tensors(tmp_path / "out.safetensors"), reference_merge(magmax, base, models, 0.5))
    from_base = save(base, tmp_path / "base")
    package.merge("magmax", from_base, folders, 0.5, tmp_path / "out2")
    assert same_bytes(load_tensors(tmp_path / "out2" / "model.safetensors"), load_tensors(tmp_path / "out.safetensors"))


def test_a_running_merge_remembers_a_part_as_its_base(tmp_path: Path) -> None:
    base, models = small_model(0), [small_model(1), small_model(2)]
    folder = save({"ema": base, "model": models[0]}, tmp_path / "both")
    running = package.Running(tmp_path / "state", "magmax", folder / "ema")
    running.absorb(folder)
    running = package.Running(tmp_path / "state")
    running.absorb(save_tensors(models[1], tmp_path / "last.safetensors"))
    running.result(0.5, tmp_path / "out.safetensors")
    assert same_bytes(load_tensors(tmp_path / "out.safetensors"), reference_merge(magmax, base, models, 0.5))


@pytest.mark.parametrize("how", [{"thread_count": 3}, {"single_file_per_rank": False}, {"sync_files": False}])
def test_any_number_of_files(how: dict[str, Any], tmp_path: Path) -> None:
    tensors = small_model(3)
    check_whole = open_checkpoint(save(tensors, tmp_path / "c", **how))
    for key, tensor in tensors.items():
        assert check_whole.read(key, 0, check_whole.spec(key).num_units).tobytes() == tensor_bytes(tensor)


def test_which_tensors_are_the_model(tmp_path: Path) -> None:
    one, two = {"w.x": torch.ones(2)}, {"w.x": torch.zeros(2)}
    flat = open_checkpoint(save({**one, "optimizer": {"state": two}}, tmp_path / "flat"))
    assert flat.specs.keys() == {"w.x"}
    assert "optimizer" in flat.notes[0]
    both = save({"model": one, "ema": {"model": two}}, tmp_path / "both")
    assert open_checkpoint(both).read("w.x", 0, 2).tolist() == [1, 1]
    assert open_checkpoint(both / "ema" / "model").read("w.x", 0, 2).tolist() == [0, 0]
    assert open_checkpoint(f"{both}/ema").specs.keys() == {"model.w.x"}
    with pytest.raises(MagMaxError, match=r"holds several models.*a, a/model, b, b/model"):
        open_checkpoint(save({"a": {"model": one}, "b": {"model": two}}, tmp_path / "twins"))
    with pytest.raises(MagMaxError, match=r"which part of it is the model cannot be told.*: net, opt"):
        open_checkpoint(save({"net": one, "opt": two}, tmp_path / "unknown"))
    with pytest.raises(MagMaxError, match=r"holds nothing below emma.*: ema, ema/model, model"):
        open_checkpoint(both / "emma")
    with pytest.raises(MagMaxError, match=r"holds no tensor"):
        open_checkpoint(save({"model": {"step": 3}}, tmp_path / "none"))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return save({"w": torch.arange(5000.0).reshape(50, 100), "v": torch.ones(3)}, tmp_path / "whole")


def test_missing_and_cut_shards_are_one_clear_error(whole: Path) -> None:
    shard = whole / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(MagMaxError, match=r"__0_0.distcp: has .* bytes, but .* were promised; copy it again"):
        open_checkpoint(whole)
    shard.unlink()
    with pytest.raises(MagMaxError, match=r"names __0_0\.distcp, which is not there"):
        open_checkpoint(whole)
    (whole / ".metadata").unlink()
    shard.write_bytes(content)
    with pytest.raises(MagMaxError, match=r"no \.metadata"):
        open_checkpoint(whole)


def test_a_damaged_shard_is_refused(whole: Path) -> None:
    shard = whole / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[:400] = bytes(400)
    opened_early = open_checkpoint(whole)
    shard.write_bytes(content)
    with pytest.raises(MagMaxError, match=r"__0_0.distcp, at byte 0"):
        [opened_early.read(key, 0, 3) for key in opened_early.specs]


def test_a_cut_metadata_is_refused(whole: Path) -> None:
    content = (whole / ".metadata").read_bytes()
    for size in (0, 1, 20, len(content) // 2, len(content) - 1):
        (whole / ".metadata").write_bytes(content[:size])
        with pytest.raises(MagMaxError, match=r"\.metadata: "):
            open_checkpoint(whole)


def test_a_spoiled_metadata_is_read_right_or_refused(whole: Path) -> None:
    content = (whole / ".metadata").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(400):
        spoiled = bytearray(content)
        for place in draw.integers(0, len(content), 2):
            spoiled[place] = draw.integers(256)
        (whole / ".metadata").write_bytes(spoiled)
        try:
            opened = open_checkpoint(whole)
            [opened.read(key, 0, spec.num_units) for key, spec in opened.specs.items()]
        except MagMaxError:
            pass


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_metadata_with_code_in_it_is_refused_and_never_runs(whole: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((whole / ".metadata").read_bytes())
    metadata.planner_data = {"w": Trap(tmp_path / "sprung")}
    (whole / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(MagMaxError, match=r"would call posix.mkdir, which is refused"):
        open_checkpoint(whole)
    assert not (tmp_path / "sprung").exists()


def damaged(whole: Path, change: Any) -> None:
    metadata = pickle.loads((whole / ".metadata").read_bytes())
    change(metadata)
    (whole / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(MagMaxError):
        open_checkpoint(whole).read("w", 0, 5000)


def test_a_metadata_that_lies_is_refused(whole: Path) -> None:
    def of(metadata: Any) -> Any:
        return metadata.state_dict_metadata["w"]

    def place(metadata: Any) -> Any:
        return next(info for index, info in metadata.storage_data.items() if index.fqn == "w")

    untouched = (whole / ".metadata").read_bytes()
    for change in (
        lambda m: setattr(of(m), "size", torch.Size([50, 101])),
        lambda m: setattr(of(m).chunks[0], "sizes", torch.Size([49, 100])),
        lambda m: setattr(of(m).chunks[0], "sizes", torch.Size([51, 100])),
        lambda m: setattr(of(m).chunks[0], "offsets", torch.Size([1, 0])),
        lambda m: of(m).chunks.append(of(m).chunks[0]),
        lambda m: of(m).chunks.clear(),
        lambda m: setattr(of(m).properties, "dtype", torch.float64),
        lambda m: setattr(place(m), "relative_path", "../whole/__0_0.distcp"),
        lambda m: setattr(place(m), "offset", 1),
        lambda m: setattr(place(m), "offset", -1),
        lambda m: setattr(place(m), "transform_descriptors", ["zstd"]),
        lambda m: setattr(of(m), "size", torch.Size([2**62, 2**62])),
        lambda m: m.storage_data.clear(),
    ):
        (whole / ".metadata").write_bytes(untouched)
        damaged(whole, change)


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_make_up_their_range(shape: list[int], data: st.DataObject) -> None:
    count = int(np.prod(shape))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole = np.arange(count).reshape(shape)
    found = list(split_into_boxes(shape, start, stop))
    parts = [
        whole[box.leading_indices][box.start : box.stop].reshape(-1) if shape else whole.reshape(1) for box in found
    ]
    assert np.concatenate([*parts, np.zeros(0, int)]).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
