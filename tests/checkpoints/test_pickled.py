"""Whole pickled models, converted where their classes are gone; and pickles that would run something, and do not."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import Tensors, load_tensors, magmax, reference_merge, same_bytes, save_tensors, tensor_bytes

import magmax as package
from magmax import MagMaxError
from magmax.checkpoints.renamed import Renaming
from magmax.checkpoints.torch import pickled_models
from magmax.checkpoints.torch.pickled_models import PickledModel, TorchStateDict
from magmax.checkpoints.torch.torch_file import LEGACY_MAGIC
from magmax.merging.convert import convert_job

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SOURCE = """
import argparse
import enum
import functools
import torch


class Interpolation(enum.Enum):
    BICUBIC = "bicubic"


def to_rgb(image):
    return image


class Resize:
    __slots__ = ("size", "how")

    def __init__(self):
        self.size, self.how = 224, functools.partial(to_rgb)


class Block(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.ln = torch.nn.LayerNorm(4).to(kind)
        self.proj = torch.nn.Parameter(torch.randn(3, 4, 5).permute(2, 0, 1).to(kind))
        self.register_parameter("bias", None)


class ImageEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict({"a": Block(torch.float16), "b": Block(torch.bfloat16)})
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 3, bias=False), torch.nn.Sequential(torch.nn.ReLU())])
        self.head = torch.nn.Linear(4, 3)
        self.head.weight = self.blocks[0].weight
        whole = torch.randn(10, 6)
        self.upper, self.lower = torch.nn.Parameter(whole[2:5]), torch.nn.Parameter(whole[::2, 1:4])
        self.extra = torch.nn.ParameterList([torch.randn(2), torch.randn(())])
        self.register_buffer("mask", torch.rand(7) > 0.5)
        self.register_buffer("count", torch.arange(12).reshape(3, 4).t())
        self.register_buffer("tiny", torch.arange(9).to(torch.uint16))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("expanded", torch.randn(3, 1).expand(3, 4))
        self.register_buffer("nothing", torch.zeros(0, 2))
        self.preprocess, self.args = [Resize(), torch.nn.functional.relu], argparse.Namespace(lr=0.1, device="cuda")
        self.big = torch.nn.Parameter(torch.randn(300, 700).t())


class TaskVector:
    def __init__(self, vector):
        self.vector = vector
"""


@pytest.fixture
def research(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with research code; `gone()` makes as if it had never been installed."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "research_modeling.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(folder)
    module = importlib.import_module("research_modeling")

    def gone() -> None:
        (folder / "research_modeling.py").unlink()
        del sys.modules["research_modeling"]
        importlib.invalidate_caches()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("research_modeling")

    module.__dict__["gone"] = gone
    torch.manual_seed(0)
    yield module
    sys.modules.pop("research_modeling", None)


def convert(path: Path, out: Path, **options: Any) -> Tensors:
    convert_job(str(path), str(out), **options).run()
    return load_tensors(out)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_without_its_class_gives_its_state_dict(zipped: bool, research: ModuleType, tmp_path: Path) -> None:
    model = research.ImageEncoder()
    expected = model.state_dict()
    assert "passing" not in expected
    path = tmp_path / "finetuned.pt"
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    research.gone()
    with pytest.raises(MagMaxError, match=r"magmax checkpoint convert .*finetuned\.pt --out finetuned\.safetensors"):
        package.open_checkpoint(path)
    opened = PickledModel(path, "old", inert=["research_modeling.Interpolation"])
    assert [*opened.specs, *opened.aliases] == [k for k in expected if k != "head.weight"] + ["head.weight"]
    assert opened.aliases == {"head.weight": "blocks.0.weight"}
    assert same_bytes(
        convert(path, tmp_path / "new.safetensors"), {k: v for k, v in expected.items() if k != "head.weight"}
    )
    again = package.open_checkpoint(tmp_path / "new.safetensors")
    assert again.aliases == {"head.weight": "blocks.0.weight"}


def test_ranges_of_strided_tensors(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "transposed": torch.randn(40, 50, generator=draw).t(),
        "strided": torch.randn(9, 8, 7, generator=draw)[1::3, ::2, 2:5],
        "far": torch.randn(3, 200_000, generator=draw).t(),
        "bits": (torch.rand(20, 30, generator=draw) > 0.5).t(),
        "whole": torch.randint(0, 99, (6, 5), generator=draw).t(),
        "half": torch.randn(5, 6, generator=draw).bfloat16().t(),
    }
    torch.save(tensors, tmp_path / "t.pt")
    opened = PickledModel(tmp_path / "t.pt", "t")
    for key, tensor in tensors.items():
        spec, content = opened.spec(key), tensor_bytes(tensor)
        size, step = spec.storage_dtype.itemsize, max(1, spec.num_units // 7)
        for start in range(0, spec.num_units, step):
            for stop in (start + 1, min(start + step + 3, spec.num_units), spec.num_units):
                assert opened.read(key, start, stop).tobytes() == content[start * size : stop * size], (key, start)


def test_converted_models_merge(research: ModuleType, tmp_path: Path) -> None:
    models = [research.ImageEncoder() for _ in range(3)]
    for number, model in enumerate(models):
        torch.save(model, tmp_path / f"old{number}.pt")
    dicts = [{k: v for k, v in m.state_dict().items() if k != "head.weight"} for m in models]
    research.gone()
    paths = [tmp_path / f"new{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        convert(tmp_path / f"old{number}.pt", path)
    package.merge("magmax", paths[0], paths[1:], 0.5, tmp_path / "out.safetensors")
    assert same_bytes(load_tensors(tmp_path / "out.safetensors"), reference_merge(magmax, dicts[0], dicts[1:], 0.5))


def test_data_parallel_is_noted_and_its_prefix_can_be_taken_off(research: ModuleType, tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    path = tmp_path / "parallel.pt"
    torch.save(torch.nn.DataParallel(net), path)
    opened = PickledModel(path, "p")
    assert opened.specs.keys() == {"module.weight", "module.bias"}
    job = convert_job(str(path), str(tmp_path / "as-it-is.safetensors"))
    assert "--strip module." in job.inputs[0].notes[0]
    stripped = convert(path, tmp_path / "new.safetensors", renaming=Renaming(strip="module."))
    assert same_bytes(stripped, dict(net.state_dict()))
    with pytest.raises(MagMaxError, match=r"no tensor's name begins with 'modul:'; the first is module\.weight"):
        convert(path, tmp_path / "new.safetensors", renaming=Renaming(strip="modul:"))


def test_where_the_model_is_among_other_things(research: ModuleType, tmp_path: Path) -> None:
    net, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    adam.step()
    path = tmp_path / "c.pt"

    def read(content: Any, part: str = "") -> PickledModel:
        torch.save(content, path)
        return PickledModel(path, "c", part)

    def same(opened: PickledModel, expected: torch.nn.Module | Tensors) -> bool:
        state = expected.state_dict() if isinstance(expected, torch.nn.Module) else expected
        return {k: opened.read(k, 0, s.num_units).tobytes() for k, s in opened.specs.items()} == {
            k: tensor_bytes(v.detach()) for k, v in state.items()
        }

    beside = {"epoch": np.float64(3), "optimizer": adam.state_dict(), "when": Path("/x"), "best": np.arange(3)}
    assert same(read({"state_dict": net.state_dict(), **beside}), net)
    assert same(read({"model": net, "ema": ema, **beside}), net)
    assert same(read({"model": net, "ema": ema, **beside}, "ema"), ema)
    assert same(read({"net": net, "epoch": 3}), net)
    assert same(read({"all": {"net": net, "ema": ema}}, "all/ema"), ema)
    assert same(read(OrderedDict(net.state_dict())), net)
    assert same(read({**net.state_dict(), "_extra_state": None}), net)
    vector = read(research.TaskVector(dict(net.state_dict())))
    assert same(vector, net)
    assert "task vector" in vector.notes[0]
    with pytest.raises(MagMaxError, match=r"cannot be told; choose one with --part: net, ema"):
        read({"net": net, "ema": ema})
    with pytest.raises(MagMaxError, match=r"has no part 'emma'; choose one with --part: net, ema"):
        read({"net": net, "ema": ema}, "emma")
    for empty in ([1, 2], 5, {"epoch": 3}, {}, "text", torch.nn.ReLU(), [net]):
        with pytest.raises(MagMaxError, match="no tensor of a model"):
            read(empty)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    net = Net()
    torch.jit.save(torch.jit.script(net), tmp_path / "clip.pt")
    assert same_bytes(convert(tmp_path / "clip.pt", tmp_path / "new.safetensors"), dict(net.state_dict()))


def test_a_setting_of_an_unknown_kind_is_refused_by_name_or_kept_as_a_note(
    research: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    torch.save({"model": {"w": torch.ones(2)}, "how": research.Interpolation.BICUBIC}, path)
    research.gone()
    with pytest.raises(MagMaxError, match=r"would call research_modeling\.Interpolation, which is refused; it did not"):
        PickledModel(path, "c")
    opened = PickledModel(path, "c", inert=["research_modeling.Interpolation"])
    assert opened.specs.keys() == {"w"}


@pytest.mark.filterwarnings("ignore")
def test_all_tensors_of_kinds_that_cannot_be_read_are_named_with_a_remedy(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    kinds = {
        "sparse": (torch.ones(4).to_sparse(), "to_dense"),
        "rows": (torch.ones(4, 4).to_sparse_csr(), "to_dense"),
        "codes": (quantised, "dequantize"),
        "ragged": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        "empty": (torch.ones(2, device="meta"), "meta device"),
        "wide": (torch.ones(2, dtype=torch.complex128), "ComplexDoubleStorage"),
        "bits": (torch.ones(2).to(torch.uint8).view(torch.bits8), "bits8"),
    }
    torch.save({"fine": torch.ones(2), **{name: tensor for name, (tensor, _) in kinds.items()}}, tmp_path / "c.pt")
    for opened in (PickledModel, TorchStateDict):
        with pytest.raises(MagMaxError, match="7 problems") as caught:
            opened(tmp_path / "c.pt", "c")
        lines = str(caught.value).splitlines()[1:]
        for line, (name, (_, words)) in zip(lines, kinds.items(), strict=True):
            assert line.startswith(f"  - c: {name}")
            assert words in line


def test_a_dtensor_is_named_with_what_to_save_instead(tmp_path: Path) -> None:
    script = """if True:
        import os, sys, torch
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        store = torch.distributed.FileStore(sys.argv[1] + ".store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        part = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        torch.save({"plain": torch.ones(2), "w": part}, sys.argv[1])
    """
    path = tmp_path / "c.pt"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True)
    for opened in (PickledModel, TorchStateDict):
        with pytest.raises(MagMaxError, match=r"^c: w is a DTensor, .*full_tensor\(\)"):
            opened(path, "c")


class Call:
    """Pickled as a call of any function with any arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __call__(self) -> None:
        """A pickler wants what is called to be callable."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Built(Call):
    """Made by a call, and then given a state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (*self.call, {"weight": 1})


GADGETS: dict[str, Callable[[str], Any]] = {
    "posix.mkdir": lambda canary: Call(os.mkdir, canary),
    "posix.system": lambda canary: Call(os.system, f"mkdir {canary}"),
    "builtins.eval": lambda canary: Call(eval, f"__import__('os').mkdir({canary!r})"),
    "builtins.exec": lambda canary: Call(exec, f"import os; os.mkdir({canary!r})"),
    "builtins.map": lambda canary: Call(list, Call(map, os.mkdir, [canary])),
    "subprocess.Popen": lambda canary: Call(subprocess.Popen, ["mkdir", canary]),
    "builtins.open": lambda canary: Built(open, canary, "w"),
    "importlib.import_module": lambda canary: Call(importlib.import_module, canary),
    "posix.mkdir ": lambda canary: Call(partial(os.mkdir, canary)),
    "pathlib.Path.mkdir": lambda canary: Call(Call(getattr, Path(canary), "mkdir")),
    "builtins.__import__": lambda canary: Call(Call(getattr, Call(__import__, "os"), "mkdir"), canary),
    "torch.load": lambda canary: Call(torch.load, canary),
    "torch._utils._rebuild_device_tensor_from_numpy": lambda canary: Call(
        torch._utils._rebuild_device_tensor_from_numpy, canary, torch.float32, "cpu", False
    ),
}


@pytest.mark.parametrize("name", GADGETS)
@pytest.mark.parametrize("way", ["zip", "legacy"])
@pytest.mark.parametrize("inside", ["model", "key", "state"])
def test_a_hostile_pickle_is_refused_by_name_and_never_runs(name: str, way: str, inside: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    gadget = GADGETS[name](str(canary))
    content: Any = {"weight": torch.ones(4), "extra": gadget}
    if inside == "key":
        content = OrderedDict([("weight", torch.ones(4)), (gadget, 1)])
    if inside == "state":
        content = torch.nn.Linear(2, 2)
        content.gadget = gadget
    path = tmp_path / "hostile.pt"
    torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(MagMaxError, match=r"this pickle would (call|change) .*, which is refused") as caught:
        convert_job(str(path), str(tmp_path / "out.safetensors")).run()
    words = "partial" if name.endswith(" ") else name.rpartition(".")[2]
    assert words in str(caught.value)
    assert not canary.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.pt"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["posix.mkdir", "builtins.eval", "pathlib.Path.mkdir", "builtins.__import__"])
def test_every_protocol_of_bare_pickles(protocol: int, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    hostile = pickle.dumps(GADGETS[name](str(canary)), protocol)
    (tmp_path / "bare.pkl").write_bytes(hostile)
    with pytest.raises(MagMaxError, match="which is refused"):
        PickledModel(tmp_path / "bare.pkl", "bare")
    assert not canary.exists()
    pickle.loads(hostile)
    assert canary.exists()


RAW = {
    "INST": b"(S'mkdir {}'\niposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nS'mkdir {}'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "a name by memo": b"cposix\nsystem\np0\n0(S'mkdir {}'\ntp1\n0g0\ng1\nR.",
    "no arguments": b"cposix\nsystem\nS'mkdir {}'\nR.",
    "a buffer": b"\x80\x05\x97.",
    "an empty stack": b"R.",
    "no mark": b"t.",
    "an unknown memo": b"g7\n.",
    "nothing": b"",
    "no end": b"N",
    "too much": b"NN.",
    "a huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a huge string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x00abc.",
    "many bytes": b"c__builtin__\nbytearray\n(I99999999999\ntR.",
    "an unhashable key": b"}]Ns.",
    "a key without end": b"}N" + b"\x85" * 100_000 + b"Ns.",
    "a set without end": b"\x80\x04\x8f(N" + b"\x85" * 100_000 + b"\x90.",
    "a mapping without end": b"ccollections\nOrderedDict\n](N" + b"\x85" * 100_000 + b"Ntat\x85R.",
    "a name without end": b"c__builtin__\ngetattr\np0\n" * 1 + b"p1\n" + b"0g0\n(g1\nS'x'\ntRp1\n" * 20_000 + b"(tR.",
    "nested without end": b"(" * 100_000 + b".",
}


@pytest.mark.parametrize("name", RAW)
def test_pickles_no_pickler_would_write(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "raw.pt").write_bytes(RAW[name].replace(b"{}", str(canary).encode()))
    with pytest.raises(MagMaxError, match=r"^raw: "):
        PickledModel(tmp_path / "raw.pt", "raw")
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_conjugated_and_negated_views_are_read_as_the_values_that_torch_gives(zipped: bool, tmp_path: Path) -> None:
    z = torch.tensor([[1 + 2j, -0.0 - 3j], [torch.inf + 0j, 5 - 6j]])
    lazy = {
        "conj": z.conj(),
        "neg": torch._neg_view(z),
        "both": torch._neg_view(z.conj()),
        "transposed": z.conj().t(),
        **{str(k)[6:]: torch._neg_view(torch.tensor([1.0, -2.0, 0.0, -torch.inf]).to(k)) for k in FLOATS},
        "imag": z.clone().conj().imag,
    }
    torch.save(lazy, tmp_path / "lazy.pt", _use_new_zipfile_serialization=zipped)
    expected = {name: tensor.resolve_conj().resolve_neg().contiguous() for name, tensor in lazy.items()}
    assert same_bytes(expected, convert(tmp_path / "lazy.pt", tmp_path / "lazy.safetensors"))
    torch.save({"w": torch._neg_view(torch.arange(3))}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(MagMaxError, match=r"^whole: w, I64 \[3\], is a negated view of whole numbers"):
        PickledModel(tmp_path / "whole.pt", "whole")


def zipped(path: Path, **records: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"c/{name.replace('__', '.')}", content)


DOUBLED = b"N" + b"q\x00h\x00\x86" * 30
"""A tuple of two of a tuple of two of ..., 30 deep: to print or to hash it would take minutes."""
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\n%bX\x03\0\0\0cpuK\x01tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % b"X\x01\0\0\x000" + b"K\0K\x01\x85K\x01\x85\x89}tR"
HOSTILE = {
    "a storage's key": STORAGE % DOUBLED + b".",
    "a tensor's type": TENSOR.replace(b"_v2", b"_v3").replace(b"tR", DOUBLED + b"tR") + b".",
    "a tensor's flags": TENSOR.replace(b"tR", DOUBLED + b"tR") + b".",
    "a codec": b"c_codecs\nencode\nX\0\0\0\0" + DOUBLED + b"\x86R.",
    "a layout": b"ctorch.serialization\n_get_layout\n" + DOUBLED + b"\x85R.",
    "a called name": b"c__builtin__\ngetattr\nN" + DOUBLED + b"\x86R)R.",
    "a key": b"}c__builtin__\ngetattr\n" + DOUBLED + b"\x85RNs.",
    "a mapping of itself": b"}q\x01(" + b"".join(b"M" + bytes([n, 1]) + b"h\x01" for n in range(200)) + b"u.",
    "a model that is itself": b"}q\x01(X\x05\0\0\0modelh\x01X\x01\0\0\0w" + TENSOR + b"u.",
    "a short item": b"cx\nY\n)\x81(NNu0cx\nY\n)\x81()\x85e.",
    "an item that cannot be hashed": b"cx\nY\n)\x81(]N\x86e.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_small_files_that_hold_one_thing_many_times_are_refused_at_once(name: str, tmp_path: Path) -> None:
    zipped(tmp_path / "h.pt", data__pkl=b"\x80\x02" + HOSTILE[name], **{"data/0": bytes(4)})
    with pytest.raises(MagMaxError, match=r"^h: "):
        PickledModel(tmp_path / "h.pt", "h")


def test_modules_that_share_their_modules_many_times_over_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickled_models, "MAX_VISITS", 10_000)
    net = torch.nn.Sequential()
    for _ in range(40):
        net = torch.nn.Sequential(net, net)
    torch.save(net, tmp_path / "dag.pt")
    with pytest.raises(MagMaxError, match="without an end"):
        PickledModel(tmp_path / "dag.pt", "dag")


def test_records_that_would_inflate_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    for name in ("byteorder", "data.pkl"):
        with zipfile.ZipFile(tmp_path / "big.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"c/{name}", bytes(100_000))
            archive.writestr("c/data.pkl", b"N.") if name == "byteorder" else None
        with pytest.raises(MagMaxError, match=rf"^big: the file holds c/{name} compressed"):
            PickledModel(tmp_path / "big.pt", "big")
    zipped(tmp_path / "long.pt", data__pkl=b"N.", byteorder=bytes(7))
    with pytest.raises(MagMaxError, match="byteorder of 7 bytes"):
        PickledModel(tmp_path / "long.pt", "long")


@pytest.mark.parametrize("passing", [None, 3, "w"])
def test_a_module_whose_passing_buffers_are_no_set_is_refused(passing: Any, tmp_path: Path) -> None:
    net = torch.nn.BatchNorm1d(2)
    net._non_persistent_buffers_set = passing  # pyright: ignore[reportAttributeAccessIssue]
    torch.save(net, tmp_path / "p.pt")
    with pytest.raises(MagMaxError, match=r"^p: _non_persistent_buffers_set is a .*, not a set"):
        PickledModel(tmp_path / "p.pt", "p")


@pytest.mark.parametrize("keys", [[["0"]], ["0"], [{}], 5])
def test_legacy_files_with_a_storage_that_cannot_be_are_refused(keys: Any, tmp_path: Path) -> None:
    head = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little_endian": True})]
    stored = b"\x80\x02" + TENSOR.replace(b"K\x01tQ", b"K\x01NtQ") + b"."
    (tmp_path / "old.pt").write_bytes(b"".join([*head, stored, pickle.dumps(keys, 2), (2**63).to_bytes(8, "little")]))
    with pytest.raises(MagMaxError, match="ends before its last tensor" if keys == ["0"] else "that nothing names"):
        PickledModel(tmp_path / "old.pt", "old")


def test_modules_in_one_another_without_end_are_refused(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 1))
    net._modules["0"]._modules["again"] = net
    torch.save(net, tmp_path / "loop.pt")
    with pytest.raises(MagMaxError, match="without an end"):
        PickledModel(tmp_path / "loop.pt", "loop")


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_and_damaged_files(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(torch.nn.Linear(30, 30), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for size in (0, 1, 2, 50, 300, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(MagMaxError, match=r"^cut: "):
            PickledModel(path, "cut")
    draw = np.random.default_rng(0)
    for _ in range(150):
        spoiled = bytearray(content)
        for place in draw.integers(0, min(len(content), 2500), 3):
            spoiled[place] = draw.integers(256)
        path.write_bytes(spoiled)
        try:
            opened = PickledModel(path, "cut")
            [opened.read(key, 0, spec.num_units) for key, spec in opened.specs.items()]
        except MagMaxError:
            pass


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_that_lies_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    class Lying:
        def __init__(self, *change: Any) -> None:
            self.change = change

        def __reduce__(self) -> tuple[Any, ...]:
            offset, shape, strides = self.change
            args = (torch.ones(6).storage(), offset, shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, args

    for change in (
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (7,), (1,)),
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (2,), ()),
    ):
        torch.save({"w": Lying(*change)}, tmp_path / "c.pt")
        with pytest.raises(MagMaxError, match=r"^c: "):
            PickledModel(tmp_path / "c.pt", "c")


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    torch.save(net, tmp_path / "old.pt")
    save_tensors(dict(net.state_dict()), tmp_path / "expected.safetensors")
    run = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'magmax'; from magmax.cli import main; main()"

    def magmax_says(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", run, *words], cwd=tmp_path, capture_output=True, text=True)

    done = magmax_says("checkpoint", "convert", "old.pt", "--out", "new.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("converted old.pt: new.safetensors")
    assert same_bytes(load_tensors(tmp_path / "new.safetensors"), load_tensors(tmp_path / "expected.safetensors"))
    folder = magmax_says("checkpoint", "convert", "new.safetensors", "--out", "folder")
    assert folder.returncode == 0, folder.stderr
    assert same_bytes(
        load_tensors(tmp_path / "folder" / "model.safetensors"), load_tensors(tmp_path / "expected.safetensors")
    )
    wrong = magmax_says("checkpoint", "convert", "new.safetensors", "--out", "again.safetensors", "--part", "model")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "are for pickles" in wrong.stderr
