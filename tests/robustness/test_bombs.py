"""What would take all memory, time or descriptors: refused in words, soon, or done within the bounds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests.robustness.files import read_tensor_bytes, small_model, write_safetensors, write_sharded

import magmax
from magmax import MagMaxError
from magmax.checkpoints import open_checkpoint

HASH_PERIOD = 2**61 - 1
"""Python gives numbers that differ by a multiple of this the same hash."""


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def tuples(count: int) -> bytes:
    """That many tuples of -1 and -2, which have the same hash."""
    return b"".join(b"(" + b"".join(number(-1 - (n >> bit & 1)) for bit in range(14)) + b"tN" for n in range(count))


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\x01\x85K\x01\x85\x89}tR"
SHAPE = b"K\x01\x85K\x01\x85"
HUGE_SHAPE = number(2**40) * 2 + b"\x86K\0K\0\x86"
LONG_LIST = b"](" + b"N" * 20_000 + b"eq\x01"
COPY = b"0](" + b"c__builtin__\nlist\nh\x01\x85R" * 20_000 + b"e."
NUMBERED = b"".join(text(str(n)) + b"N" for n in range(20_000))
BOMBS = {
    "nested tuples as a key": b"}N" + b"\x85" * 200_000 + b"Ns.",
    "nested tuples in a key": b"}(NN" + b"\x85" * 200_000 + b"tNs.",
    "nested sets as a key": b"}" + b"(" * 20_000 + b"N" + b"\x91" * 20_000 + b"Ns.",
    "numbers of one hash as keys": b"}(" + b"".join(number(n * HASH_PERIOD) + b"N" for n in range(30_000)) + b"u.",
    "numbers of one hash in a set": b"\x8f(" + b"".join(number(n * HASH_PERIOD) for n in range(30_000)) + b"\x90.",
    "tuples of one hash as keys": b"}(" + tuples(8_000) + b"u.",
    "memo numbers of one hash": b"N" + b"".join(b"p%d\n" % (n * HASH_PERIOD) for n in range(30_000)) + b".",
    "a long list copied": LONG_LIST + COPY,
    "a long list as arguments": LONG_LIST + b"c__builtin__\ntuple\nh\x01\x85Rq\x02" + COPY.replace(b"h\1\x85", b"h\2"),
    "a long text encoded": text("a" * 20_000_000) + b"q\x010](" + b"c_codecs\nencode\nh\x01\x85R" * 20_000 + b"e.",
    "a long shape": LONG_LIST + TENSOR.replace(SHAPE, b"h\x01h\x01") * 5_000 + b".",
    "long flags": b"}(" + NUMBERED + b"uq\x01" + TENSOR.replace(b"}tR", b"}h\x01tR") * 9 + b".",
    "modules that share their parameters": b"}(" + NUMBERED + b"uq\x010}q\x020}(" + b"".join(
        text(f"m{n}") + b"cx\nM\n)\x81}(X\x0b\0\0\0_parametersh\x01X\x08\0\0\0_modulesh\x02ub" for n in range(5_000)
    ) + b"uq\x030cx\nM\n)\x81}(X\x0b\0\0\0_parametersh\x02X\x08\0\0\0_modulesh\x03ub.",
    "objects that share their state": b"}(" + NUMBERED + b"uq\x010}(" + b"".join(
        text(f"m{n}") + b"cx\nM\n)\x81h\x01b" for n in range(5_000)
    ) + b"u.",
    "a promise of much text": b"\x8d" + (2**40).to_bytes(8, "little") + b"abc.",
    "a tensor of 2**80 elements": b"}(" + text("w") + TENSOR.replace(SHAPE, HUGE_SHAPE) + b"u.",
    "half a character": b"}(X\x03\0\0\0\xed\xa0\x80" + TENSOR + b"u.",
}  # fmt: skip


def write_archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("c/data.pkl", b"\x80\x02" + pickled)
        archive.writestr("c/data/0", bytes(4))
    return path


@pytest.mark.timeout(120)
def test_files_made_to_take_all_memory_or_time_are_refused(tmp_path: Path) -> None:
    """In a process of 1.5 GB, which has 90 seconds for all of them together."""
    for name, pickled in BOMBS.items():
        write_archive(tmp_path / f"{name}.pt", pickled)
    write_archive(tmp_path / "compressed.pt", b"}(" + bytes(500_000_000) + b"u.", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "compressed.pt").stat().st_size < 500_000
    script = """if True:
        import json, pathlib, resource, sys
        from magmax import MagMaxError
        from magmax.checkpoints import open_checkpoint
        from magmax.checkpoints.torch.pickled_models import PickledModel
        resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (90,) * 2)
        errors = {}
        for path in pathlib.Path(sys.argv[1]).glob("*.pt"):
            for way in (open_checkpoint, lambda path: PickledModel(path, str(path))):
                try:
                    way(path)
                except MagMaxError as error:
                    errors.setdefault(path.stem, []).append(str(error))
        print(json.dumps(errors))
    """
    limits = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=limits)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout)
    assert errors.keys() == {*BOMBS, "compressed"}
    for name, (first, second) in errors.items():
        for words in (first, second):
            assert f"{name}.pt: " in words
            assert len(words) < 3_000


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        for top in ("a", "b"):
            archive.writestr(f"{top}/data.pkl", b"}.")
    with pytest.raises(MagMaxError, match=r"c\.pt: the file has two records of one name"):
        open_checkpoint(tmp_path / "c.pt")


def test_a_strided_tensor_of_a_file_that_is_cut_meanwhile_is_an_error(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.arange(4_000_000.0).reshape(2000, 2000).t()}, tmp_path / "c.pt")
    opened = open_checkpoint(tmp_path / "c.pt")
    expected = np.arange(4_000_000, dtype=np.float32).reshape(2000, 2000).T.reshape(-1)
    assert np.array_equal(opened.read("w", 700, 5000), expected[700:5000])
    os.truncate(tmp_path / "c.pt", 1_000_000)
    with pytest.raises(MagMaxError, match="copy or download it again"):
        opened.read("w", 700, 5000)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, suffix: str, inside: bool, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    path = model / f"model{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(path))
        server.close()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(MagMaxError, match=f"{kind}|holds no weights"):
        open_checkpoint(model if inside else path)


def test_more_files_than_may_be_open_at_once(tmp_path: Path) -> None:
    """Four models of 40 files each, where a process may have 100 files open; and the CLI raises the soft limit."""
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b", "c"):
        shards = {f"{n}.safetensors": {f"w{n}": rng.normal(size=3).astype(np.float32)} for n in range(40)}
        write_sharded(tmp_path / name, shards)
    models = [tmp_path / name for name in "abc"]
    magmax.merge("average", tmp_path / "base", models, out=tmp_path / "expected.safetensors")
    library = """if True:
        import resource, sys, magmax
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        magmax.merge("average", sys.argv[1], sys.argv[2:5], out=sys.argv[5])
    """
    command = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        sys.argv[1:] = ["merge", "--rule", "average", "--base", *sys.argv[1:5], "--out", sys.argv[5]]
        from magmax.cli import main
        main()
    """
    for script in (library, command):
        out = tmp_path / "out.safetensors"
        words = [str(path) for path in (tmp_path / "base", *models, out)]
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert read_tensor_bytes(out) == read_tensor_bytes(tmp_path / "expected.safetensors")
        out.unlink()


def test_a_file_replaced_while_its_descriptor_is_closed_is_an_error(tmp_path: Path) -> None:
    script = """if True:
        import os, resource, sys
        from magmax import MagMaxError
        from magmax.checkpoints import open_checkpoint
        os.chdir(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        opened = [open_checkpoint(f"{n}.safetensors") for n in range(30)]
        os.rename("new.safetensors", "0.safetensors")
        try:
            opened[0].read("bias", 0, 9)
        except MagMaxError as error:
            print(error)
        print(opened[1].read("bias", 0, 9).tobytes() == opened[29].read("bias", 0, 9).tobytes())
    """
    for name in (*range(30), "new"):
        write_safetensors(tmp_path / f"{name}.safetensors", small_model(1))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "0.safetensors: was replaced while it was read; start again\nTrue\n", done.stderr


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_changes_neither_the_output_nor_the_exit_code(closed: int, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        write_safetensors(tmp_path / f"{name}.safetensors", small_model(seed))
    script = "import os, sys; os.close(int(sys.argv.pop(1))); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    main = ["-c", "from magmax.cli import main; main()", "merge", "--base", "base.safetensors", "a.safetensors"]
    for out, code in (("out.safetensors", 0), ("base.safetensors", 2)):
        words = [sys.executable, "-c", script, str(closed), *main, "--out", out]
        assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == code
    magmax.merge("magmax", tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], out=tmp_path / "b.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
