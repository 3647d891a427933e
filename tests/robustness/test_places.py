"""Where an output may go: never onto, into or around what it is made from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.robustness.files import read_tensor_bytes, small_model, write_safetensors, write_sharded

import magmax
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.output_paths import OutputPath
from magmax.merging.convert import convert_job
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.output_options import OutputOptions
from magmax.merging.sweep import FactorSweep
from magmax.preference.archive import Archive
from magmax.preference.archive_writer import write_archive
from magmax.rules import MagMax

Refusal = Callable[..., str]


def merge(base: Path, model: Path, out: Path | str) -> None:
    magmax.merge("magmax", base, [model], out=out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in a folder."""
    write_safetensors(tmp_path / "folder" / "model.safetensors", small_model(2))
    return tmp_path / "folder"


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("way", ["itself", "link", "link to its folder", "detour"])
def test_an_input_is_never_overwritten(
    way: str, which: str, base: Path, tuned: Path, refused: Refusal, tmp_path: Path
) -> None:
    victim = {"base": base, "tuned": tuned}[which]
    link = tmp_path / "link.safetensors"
    link.symlink_to(victim)
    (tmp_path / "aside").symlink_to(tmp_path)
    (tmp_path / "deep").mkdir()
    out = {
        "itself": victim,
        "link": link,
        "link to its folder": tmp_path / "aside" / victim.name,
        "detour": tmp_path / "deep" / ".." / victim.name,
    }[way]
    assert f"{out}: is one of the inputs" in refused(merge, base, tuned, out)


def test_a_file_that_magmax_did_not_write_is_not_replaced(
    base: Path, tuned: Path, tmp_path: Path, refused: Refusal
) -> None:
    """Another model, a hard link to an input, anything with that name; an empty file and an own output are."""
    out = tmp_path / "out.safetensors"
    for make in (lambda: os.link(base, out), lambda: shutil.copy(tuned, out), lambda: out.write_bytes(b"\xff" * 99)):
        make()
        before = out.read_bytes()
        assert "magmax did not write it" in refused(merge, base, tuned, out)
        assert out.read_bytes() == before
        out.unlink()
    out.touch()
    for _ in range(2):
        merge(base, tuned, out)
        assert read_tensor_bytes(out).keys() == read_tensor_bytes(base).keys()


def test_a_folder_of_an_input_is_never_overwritten(base: Path, tuned: Path, folder: Path, refused: Refusal) -> None:
    assert "is one of the inputs" in refused(merge, folder, tuned, folder)
    assert "is one of the inputs" in refused(merge, folder / "model.safetensors", tuned, folder)
    (folder / "provenance.json").write_text("{}")
    assert "is one of the inputs" in refused(merge, folder, tuned, folder)


def test_a_folder_above_an_input_is_never_overwritten(tuned: Path, tmp_path: Path, refused: Refusal) -> None:
    """Even if it looks like an earlier output, which may be replaced."""
    deep = write_safetensors(tmp_path / "models" / "deep" / "base.safetensors", small_model(0))
    (tmp_path / "models" / "provenance.json").write_text("{}")
    assert "holds one" in refused(merge, deep, tuned, tmp_path / "models")


@pytest.mark.parametrize("name", ["out.safetensors", "sub/out.safetensors", "out"])
def test_nothing_is_put_into_a_folder_that_is_an_input(name: str, tuned: Path, folder: Path, refused: Refusal) -> None:
    """It would change the model that the folder is."""
    assert f"is inside {folder}" in refused(merge, folder, tuned, folder / name)


def test_an_output_beside_an_input_file_is_fine(base: Path, tuned: Path, tmp_path: Path) -> None:
    merge(base, tuned, tmp_path / "out.safetensors")
    merge(base, tuned, tmp_path / "out")


def test_a_folder_that_magmax_did_not_write_is_left_alone(
    base: Path, tuned: Path, tmp_path: Path, refused: Refusal
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("precious")
    assert "holds files that magmax did not write" in refused(merge, base, tuned, tmp_path / "thesis")


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(
    base: Path, tuned: Path, tmp_path: Path, refused: Refusal
) -> None:
    (tmp_path / "out").write_text("a file")
    assert "is a file" in refused(merge, base, tuned, tmp_path / "out")
    (tmp_path / "out.safetensors").mkdir()
    assert "is a folder" in refused(merge, base, tuned, tmp_path / "out.safetensors")


def test_a_folder_below_a_file_is_refused(base: Path, tuned: Path, tmp_path: Path, refused: Refusal) -> None:
    assert str(tuned) in refused(merge, base, tuned, tuned / "out.safetensors")


@pytest.mark.parametrize("out", [".", "..", "/", "./"])
def test_a_place_without_a_name_of_its_own_is_refused(
    out: str, base: Path, tuned: Path, refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "name" in refused(merge, base, tuned, out)


def test_a_name_longer_than_names_can_be_is_refused(base: Path, tuned: Path, tmp_path: Path, refused: Refusal) -> None:
    assert "too long" in refused(merge, base, tuned, tmp_path / ("x" * 300)).lower()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_only_safetensors_are_written(suffix: str, base: Path, tuned: Path, tmp_path: Path, refused: Refusal) -> None:
    assert "only safetensors" in refused(merge, base, tuned, tmp_path / f"out{suffix}")


def test_a_users_own_backup_of_an_output_survives_the_next_merge(base: Path, tuned: Path, tmp_path: Path) -> None:
    out, backup = tmp_path / "out", tmp_path / "out.old"
    merge(base, tuned, out)
    shutil.copytree(out, backup)
    kept = {path.name: path.read_bytes() for path in backup.iterdir()}
    write_safetensors(tuned, small_model(3))
    merge(base, tuned, out)
    assert {path.name: path.read_bytes() for path in backup.iterdir()} == kept


def test_an_output_can_be_merged_anew_and_nothing_is_left_beside_it(base: Path, tuned: Path, tmp_path: Path) -> None:
    for name in ("out.safetensors", "out"):
        merge(base, tuned, tmp_path / name)
        write_safetensors(tuned, small_model(3))
        merge(base, tuned, tmp_path / name)
        target = OutputPath(tmp_path / name)
        assert not any(path.exists() for path in (target.partial_path, target.journal_path, target.replaced))


def test_more_than_the_disk_holds_is_refused_before_any_work(
    base: Path, tuned: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=100))
    words = refused(merge, base, tuned, tmp_path / "out.safetensors")
    assert "bytes of disk, but 100 are free" in words


def rewrite(path: Path) -> None:
    """In place, the last bytes, and the time of modification set back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size - 4)
        file.write(b"\0\0\0}" if path.suffix == ".json" else b"\0\0\0\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rename_over(path: Path) -> None:
    """Another file of the same content under the name."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base in two shards with an index and a config, two models, two adapters, an archive and a running merge."""
    halves = [{k: v for k, v in small_model(0).items() if (k == "weight") == first} for first in (True, False)]
    write_sharded(tmp_path / "base", {f"model-0000{n}-of-00002.safetensors": half for n, half in enumerate(halves, 1)})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"dtype": "float32", "note": "        "}))
    for number in (1, 2):
        write_safetensors(tmp_path / f"{number}.safetensors", small_model(number))
        draw = np.random.default_rng(number)
        factors = {"lora_A": draw.normal(size=(2, 8)), "lora_B": draw.normal(size=(20, 2))}
        names = {f"base_model.model.layer.{name}.weight": value.astype("f4") for name, value in factors.items()}
        write_safetensors(tmp_path / f"adapter{number}" / "adapter_model.safetensors", names)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "revision": "        "}
        (tmp_path / f"adapter{number}" / "adapter_config.json").write_text(json.dumps(config))
    opened = open_checkpoint(tmp_path / "base")
    models = [open_checkpoint(tmp_path / f"{number}.safetensors") for number in (1, 2)]
    write_archive(opened, models, ["1", "2"], tmp_path / "archive")
    magmax.Running(tmp_path / "state", "magmax", tmp_path / "base").absorb(tmp_path / "1.safetensors")
    return tmp_path


def merge_family(family: Path, execution: ExecutionOptions) -> None:
    models = [family / "1.safetensors", family / "2.safetensors"]
    magmax.merge("magmax", family / "base", models, out=family / "out", execution=execution)


def convert_family(family: Path, execution: ExecutionOptions) -> None:
    convert_job(str(family / "base"), str(family / "out")).run(execution)


def sweep_family(family: Path, execution: ExecutionOptions) -> None:
    base, models = open_checkpoint(family / "base"), [open_checkpoint(family / f"{n}.safetensors") for n in (1, 2)]
    sweep = FactorSweep(MagMax(), base, models, ["1", "2"], family / "out", OutputOptions(), [0.5], execution)
    with sweep.merged() as writer:
        writer.write(0.5)


def archive_family(family: Path, execution: ExecutionOptions) -> None:
    base, models = open_checkpoint(family / "base"), [open_checkpoint(family / f"{n}.safetensors") for n in (1, 2)]
    write_archive(base, models, ["1", "2"], family / "out", execution=execution)


def tune_family(family: Path, execution: ExecutionOptions) -> None:
    Archive(family / "archive").job(MagMax(), family / "out", OutputOptions()).run(execution)


def absorb_family(family: Path, execution: ExecutionOptions) -> None:
    magmax.Running(family / "state", execution=execution).absorb(family / "2.safetensors")


def result_family(family: Path, execution: ExecutionOptions) -> None:
    magmax.Running(family / "state", execution=execution).result(out=family / "out")


def merge_family_adapters(family: Path, execution: ExecutionOptions) -> None:
    magmax.merge_adapters("magmax", [family / f"adapter{n}" for n in (1, 2)], 2, family / "out", execution=execution)


INDEX, SHARD = "base/model.safetensors.index.json", "base/model-00001-of-00002.safetensors"
VERSION = "state/generation-000001/model.safetensors"
INPUTS = {
    merge_family: ("1.safetensors", INDEX, SHARD, "base/config.json"),
    convert_family: (INDEX, SHARD, "base/config.json"),
    sweep_family: ("2.safetensors", INDEX, SHARD),
    archive_family: ("1.safetensors", INDEX, SHARD),
    tune_family: ("archive/model.safetensors", INDEX, SHARD),
    absorb_family: ("2.safetensors", INDEX, SHARD, VERSION),
    result_family: (INDEX, SHARD, "base/config.json", VERSION),
    merge_family_adapters: ("adapter2/adapter_config.json", "adapter1/adapter_model.safetensors"),
}


@pytest.mark.parametrize("change", [rewrite, rename_over, Path.unlink])
@pytest.mark.parametrize(
    ("work", "changed"), [pytest.param(w, c, id=f"{w.__name__}-{c}") for w, each in INPUTS.items() for c in each]
)
def test_an_input_that_changes_amid_the_work_is_an_error_and_nothing_is_published(
    work: Callable[[Path, ExecutionOptions], None], changed: str, change: Callable[[Path], None], family: Path
) -> None:
    pending = [family / changed]
    names = {path.name for path in family.iterdir()} - {changed}

    def progress(_: int) -> None:
        if pending:
            change(pending.pop())

    with pytest.raises(magmax.MagMaxError, match="changed while it was read") as caught:
        work(family, ExecutionOptions(threads=1, progress=progress))
    assert str(family / changed) in str(caught.value)
    assert {path.name for path in family.iterdir()} - {changed} == names
    assert json.loads((family / "state" / "state.json").read_text())["current"] == 1
