"""An archive is its definition, and re-tuning from it is a merge of what it kept."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from tests.models import Tensors, load_tensors, same_bytes, save_tensors, small_model

import magmax
from magmax import MagMaxError
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.journal import lock_folder
from magmax.checkpoints.writer import OutputDraft
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.output_options import OutputOptions
from magmax.preference.archive import Archive
from magmax.preference.archive_writer import write_archive
from magmax.rules import MagMax, Tunable

BLOCK = 1024


def vectors(base: Tensors, tuned: Tensors) -> Tensors:
    return {
        k: tuned[k].float() - base[k].float() for k, t in base.items() if t.dtype in (torch.float32, torch.bfloat16)
    }


def kept(vector: Tensors, top: float, bits: int) -> Tensors:
    """What an archive keeps of a task vector, written plainly."""
    sizes = torch.cat([v.abs().reshape(-1) for v in vector.values()])
    least = sizes.sort(descending=True).values[round(top * len(sizes)) - 1]
    found = {}
    for key, values in vector.items():
        flat = torch.where(values.abs() >= least, values, 0.0).reshape(-1)
        if bits == 16:
            flat = flat.to(torch.bfloat16).float()
        for start in range(0, len(flat) if bits == 8 else 0, BLOCK):
            part = flat[start : start + BLOCK]
            scale = part.abs().max() / torch.tensor(127.0)
            flat[start : start + BLOCK] = torch.round(part / scale) * scale if scale > 0 else 0.0
        found[key] = flat.reshape(values.shape)
    return found


@pytest.fixture
def archived(files, tmp_path):
    def make(top: float, bits: int, **options) -> Archive:
        base, tasks = files
        models = [open_checkpoint(task) for task in tasks]
        names = [task.stem for task in tasks]
        out = tmp_path / f"archive-{top}-{bits}"
        return write_archive(open_checkpoint(base), models, names, out, top=top, bits=bits, **options)

    return make


@pytest.mark.parametrize("top", [0.3, 1])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_an_archive_keeps_what_its_definition_says(top, bits, archived, files):
    base, tasks = files
    archive = archived(top, bits, execution=ExecutionOptions(threads=2))
    opened = open_checkpoint(base)
    start = load_tensors(base)
    for task, model in zip(tasks, archive.models(opened), strict=True):
        wanted = kept(vectors(start, load_tensors(task)), top, bits)
        for key, tensor in wanted.items():
            count = tensor.numel()
            whole = model.read(key, 0, count)
            assert (whole == tensor.reshape(-1).numpy()).all(), key
            for first, last in ((0, count // 2), (count // 3, count), (count // 2, min(count, count // 2 + 1))):
                assert (model.read(key, first, last) == whole[first:last]).all()


def test_the_whole_in_32_bits_tunes_to_the_very_same_bytes(archived, files, tmp_path):
    base, tasks = files
    rule = Tunable(preference=[3, 1, 1, 0])
    archive = archived(1, 32)
    archive.job(rule, tmp_path / "ours.safetensors", OutputOptions()).run()
    theirs = magmax.merge(rule, base, tasks, out=tmp_path / "theirs.safetensors")
    assert same_bytes(load_tensors(tmp_path / "ours.safetensors"), load_tensors(theirs))


def test_a_part_in_8_bits_is_near_the_exact_merge_in_far_fewer_bytes(archived, files, tmp_path):
    base, tasks = files
    archive = archived(0.5, 8)
    archive.job(MagMax(), tmp_path / "ours.safetensors", OutputOptions(scaling_factor=1.0)).run()
    theirs = load_tensors(magmax.merge("magmax", base, tasks, 1.0, tmp_path / "theirs.safetensors"))
    start = load_tensors(base)["wide.weight"]
    ours, exact = (t["wide.weight"] - start for t in (load_tensors(tmp_path / "ours.safetensors"), theirs))
    assert (ours - exact).norm() < 0.2 * exact.norm()
    floats = sum(t.nbytes for t in load_tensors(base).values() if t.dtype == torch.float32)
    assert archive.tensors.nbytes < 4 * floats * (1 / 8 + 0.5 + 12 / 1024 + 0.01) / 4 * 1.01


def test_threads_change_no_byte(archived, files, tmp_path):
    one = (archived(0.3, 8, execution=ExecutionOptions(threads=1)).folder / "model.safetensors").read_bytes()
    assert (archived(0.3, 8, execution=ExecutionOptions(threads=3)).folder / "model.safetensors").read_bytes() == one


def test_presets_are_stored_listed_and_told_apart(archived):
    archive = archived(0.3, 8)
    archive.save_preset("cars first", {"task1": 3, "task2": 1})
    archive.save_preset("even", dict.fromkeys(archive.tasks, 1))
    again = Archive(archive.folder)
    assert list(again.presets) == ["cars first", "even"]
    assert again.preset("cars first") == {"task1": 3, "task2": 1}
    with pytest.raises(MagMaxError, match="did you mean 'even'"):
        again.preset("evne")
    with pytest.raises(MagMaxError, match="did you mean 'task1'"):
        again.save_preset("x", {"tsk1": 1})
    with pytest.raises(MagMaxError, match="0 or more"):
        again.save_preset("x", {"task1": -1})
    assert list(Archive(archive.folder).presets) == ["cars first", "even"]


def test_an_archive_made_anew_keeps_its_presets(archived):
    archived(0.3, 8).save_preset("cars first", {"task1": 3, "task2": 1})
    notes = []
    again = archived(0.3, 8, execution=ExecutionOptions(note=notes.append))
    assert again.presets == {"cars first": {"task1": 3, "task2": 1}}
    assert notes == [f"{again.folder}: replaced; presets kept: 1"]


def test_presets_for_other_models_are_not_lost(archived, files):
    archive = archived(0.3, 8)
    archive.save_preset("cars first", {"task1": 3, "task2": 1})
    before = {path: path.read_bytes() for path in archive.folder.iterdir()}
    base, models = open_checkpoint(files[0]), [open_checkpoint(task) for task in files[1][:2]]
    reads = []
    with pytest.raises(
        MagMaxError, match=r"presets \(cars first\) for other models \(task1, task2, task3, task4\); name"
    ):
        write_archive(
            base, models, ["task1", "task2"], archive.folder, execution=ExecutionOptions(progress=reads.append)
        )
    (archive.folder / "archive.json").write_text("{")
    with pytest.raises(
        MagMaxError, match=r"archive\.json: cannot be read .* and may hold presets; name another folder"
    ):
        write_archive(
            base, models, ["task1", "task2"], archive.folder, execution=ExecutionOptions(progress=reads.append)
        )
    (archive.folder / "archive.json").write_bytes(before[archive.folder / "archive.json"])
    assert {path: path.read_bytes() for path in archive.folder.iterdir()} == before
    assert not reads


def test_a_preset_stored_while_the_archive_is_made_anew_is_kept(archived):
    archive = archived(0.3, 8)

    def store(number: int) -> None:
        if not archive.presets:
            archive.save_preset("meanwhile", {"task1": 1})

    assert archived(0.3, 8, execution=ExecutionOptions(progress=store)).presets == {"meanwhile": {"task1": 1}}


def test_presets_stored_by_two_are_all_kept(archived):
    ours = archived(0.3, 8)
    theirs = Archive(ours.folder)
    theirs.save_preset("theirs", {"task1": 1})
    ours.save_preset("ours", {"task2": 1})
    assert list(Archive(ours.folder).presets) == list(ours.presets) == ["theirs", "ours"]


def test_a_preset_for_an_archive_made_anew_is_stored_if_the_models_are_the_same(archived, files):
    before = archived(0.3, 8)
    base, models = open_checkpoint(files[0]), [open_checkpoint(task) for task in files[1]]
    write_archive(base, models, before.tasks, before.folder, top=0.5, bits=16)
    before.save_preset("mine", {"task1": 1})
    again = Archive(before.folder)
    assert (again.top, again.bits, list(again.presets)) == (0.5, 16, ["mine"])
    write_archive(base, models[::-1], before.tasks, before.folder)
    with pytest.raises(MagMaxError, match="now holds other models; preset 'x' is not stored: tune again"):
        before.save_preset("x", {"task1": 1})
    assert list(Archive(before.folder).presets) == ["mine"]


def test_a_preset_waits_for_nobody_who_holds_the_archive(archived):
    archive = archived(0.3, 8)
    with lock_folder(archive.folder), pytest.raises(MagMaxError, match="another magmax is writing this output"):
        archive.save_preset("x", {"task1": 1})


@pytest.mark.parametrize("out", ["", "tuned.safetensors", "deep/tuned", "../link/tuned.safetensors"])
def test_an_output_inside_the_archive_is_refused(out, archived):
    archive = archived(0.3, 8)
    (archive.folder.parent / "link").symlink_to(archive.folder)
    before = sorted(archive.folder.rglob("*"))
    with pytest.raises(MagMaxError, match=r"is the archive .* or inside it; choose another place"):
        archive.job(MagMax(), archive.folder / out, OutputOptions())
    assert sorted(archive.folder.rglob("*")) == before


def test_another_base_is_refused_before_anything_is_written(archived, tmp_path):
    other = save_tensors(small_model(99), tmp_path / "other.safetensors")
    with pytest.raises(MagMaxError, match="is not the base"):
        archived(0.3, 8).job(MagMax(), tmp_path / "o.safetensors", OutputOptions(), str(other)).run()
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(("top", "bits"), [(0, 8), (1.1, 8), (0.3, 4), (float("nan"), 8)])
def test_options_out_of_range_are_refused(top, bits, archived):
    with pytest.raises(MagMaxError, match="an archive needs"):
        archived(top, bits)


def test_an_archive_of_nothing_or_of_one_model_twice_is_refused(files, tmp_path):
    base, tasks = (open_checkpoint(files[0]), [open_checkpoint(task) for task in files[1]])
    for models, names in (([], []), (tasks[:2], ["a", "a"]), ([tasks[0], tasks[0]], ["a", "b"])):
        with pytest.raises(MagMaxError, match=r"needs models|same file"):
            write_archive(base, models, names, tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


def test_a_folder_that_is_no_archive_is_refused(tmp_path, archived):
    with pytest.raises(MagMaxError, match="is not an archive"):
        Archive(tmp_path)
    archive = archived(0.3, 8)
    about = json.loads((archive.folder / "archive.json").read_text())
    (archive.folder / "archive.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(MagMaxError, match="it has format 2"):
        Archive(archive.folder)
    for changed in ({"presets": {"p": {"cars": 10**400}}}, {"base": {"path": ["base"], "digest": ""}}):
        (archive.folder / "archive.json").write_text(json.dumps(about | changed))
        with pytest.raises(MagMaxError, match="is not an archive"):
            Archive(archive.folder)


@pytest.mark.parametrize("told", [{"bits": 8}, {"bits": 32}, {"top": 1.0}])
def test_an_archive_that_is_not_what_it_says_is_refused(told, archived):
    archive = archived(0.3, 16)
    about = json.loads((archive.folder / "archive.json").read_text())
    (archive.folder / "archive.json").write_text(json.dumps(about | told))
    with pytest.raises(MagMaxError, match=r"holds nothing of wide\.weight, F32"):
        Archive(archive.folder).job(MagMax(), archive.folder.parent / "o.safetensors", OutputOptions())


def as_an_earlier_version_wrote_it(archive: Archive) -> Archive:
    """Without the digests of its weights."""
    about = json.loads((archive.folder / "archive.json").read_text())
    del about["weights"]
    (archive.folder / "archive.json").write_text(json.dumps(about))
    return archive


@pytest.mark.parametrize("damage", ["a bit", "other weights", "another file"])
def test_weights_that_were_changed_are_refused_before_they_are_used(damage, archived, tmp_path):
    archive, other = archived(0.3, 8), archived(1, 8)
    path = archive.folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "another file":
        path.rename(path.with_name("weights.safetensors"))
    else:
        path.write_bytes(content if damage == "a bit" else (other.folder / "model.safetensors").read_bytes())
    with pytest.raises(MagMaxError, match=r"model\.safetensors.*: not what was archived; it was changed or damaged"):
        Archive(archive.folder).job(MagMax(), tmp_path / "o.safetensors", OutputOptions())
    assert not (tmp_path / "o.safetensors").exists()


def test_an_archive_without_digests_is_read(archived, tmp_path):
    archive = archived(0.3, 8)
    archive.job(MagMax(), tmp_path / "ours.safetensors", OutputOptions()).run()
    old = as_an_earlier_version_wrote_it(archive)
    Archive(old.folder).job(MagMax(), tmp_path / "theirs.safetensors", OutputOptions()).run()
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_of_two_archives_at_one_place_the_second_is_refused_and_the_first_is_whole(archived, files, tmp_path):
    """Whenever the second begins, and whether or not an archive is there."""
    for begun_at in (1, 2, 3):
        refusals, calls = [], iter(range(begun_at))

        def second(_, refusals=refusals, calls=calls):
            if next(calls, None) is None and not refusals:
                with pytest.raises(MagMaxError) as caught:
                    archived(0.3, 8)
                refusals.append(str(caught.value))

        first = archived(0.3, 8, execution=ExecutionOptions(threads=1, progress=second))
        assert refusals == [f"{first.folder}: another magmax is writing this output; wait for it to end"]
        Archive(first.folder).job(MagMax(), tmp_path / "o.safetensors", OutputOptions()).run()
        assert {path.name for path in first.folder.iterdir()} == {
            *(".magmax-contents", "archive.json", "model.safetensors"),
        }
        assert not list(tmp_path.glob("*magmax*"))


@pytest.mark.parametrize("part", ["kept", "starts"])
def test_a_damaged_archive_is_refused_as_it_is_read(part, archived, tmp_path):
    archive = as_an_earlier_version_wrote_it(archived(0.3, 8))
    tensors = load_tensors(archive.folder / "model.safetensors")
    tensors[f"2/{part}/wide.weight"][256] ^= 1
    save_tensors(tensors, archive.folder / "model.safetensors")
    with pytest.raises(MagMaxError, match=r"of wide\.weight for task3, kept and starts disagree; it is corrupt"):
        Archive(archive.folder).job(MagMax(), tmp_path / "o.safetensors", OutputOptions()).run()
    assert not (tmp_path / "o.safetensors").exists()


def test_half_precision_is_archived_as_its_task_vectors(tmp_path):
    draw = np.random.default_rng(0)
    models = [{"w": torch.from_numpy(draw.normal(size=3000).astype(np.float32)).bfloat16()} for _ in range(3)]
    paths = [save_tensors(m, tmp_path / f"{n}.safetensors") for n, m in enumerate(models)]
    opened = [open_checkpoint(p) for p in paths]
    archive = write_archive(opened[0], opened[1:], ["a", "b"], tmp_path / "archive", top=1, bits=32)
    archive.job(MagMax(), tmp_path / "ours.safetensors", OutputOptions()).run()
    theirs = magmax.merge("magmax", paths[0], paths[1:], out=tmp_path / "theirs.safetensors")
    assert same_bytes(load_tensors(tmp_path / "ours.safetensors"), load_tensors(theirs))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_float64_beyond_the_range_of_float32(bits, tmp_path):
    base = save_tensors({"w": torch.zeros(4, dtype=torch.float64)}, tmp_path / "base.safetensors")
    wide = torch.tensor([1e200, -3e199, 0, 1e190], dtype=torch.float64)
    model = open_checkpoint(save_tensors({"w": wide}, tmp_path / "wide.safetensors"))

    def archive():
        return write_archive(open_checkpoint(base), [model], ["a"], tmp_path / "archive", top=1, bits=bits)

    if bits == 16:
        with pytest.raises(MagMaxError, match=r"wide\.safetensors: w differs from the base by more than 3\.39e\+38"):
            archive()
        assert not (tmp_path / "archive").exists()
        return
    read = archive().models(open_checkpoint(base))[0].read("w", 0, 4)
    assert np.abs(read - wide.numpy()).max() <= (1e200 / 254 * (1 + 1e-9) if bits == 8 else 0)


def test_the_same_weights_under_two_paths_are_refused(files, tmp_path):
    base, tasks = files
    copy = shutil.copy(tasks[0], tmp_path / "copy.safetensors")
    models = [open_checkpoint(path) for path in (tasks[0], copy)]
    with pytest.raises(MagMaxError, match=r"copy\.safetensors: holds the same tensors as .*name each model once"):
        write_archive(open_checkpoint(base), models, ["a", "b"], tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize("code", [errno.EFBIG, errno.ENOSPC])
def test_a_full_disk_is_explained_and_nothing_is_left(code, files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(OutputDraft, "write", full)
    model = open_checkpoint(files[1][0])
    with pytest.raises(MagMaxError, match="File too large" if code == errno.EFBIG else "no space left.*begins anew"):
        write_archive(open_checkpoint(files[0]), [model], ["a"], tmp_path / "archive")
    assert not [path for path in tmp_path.iterdir() if "archive" in path.name]


def test_a_base_with_an_adapter_is_remembered_as_both(tmp_path, monkeypatch):
    draw = np.random.default_rng(1)

    def tensor(*shape):
        return torch.from_numpy(draw.normal(size=shape).astype(np.float32))

    save_tensors({"q.weight": tensor(8, 6)}, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.q.lora_{n}.weight": tensor(*s) for n, s in (("A", (2, 6)), ("B", (8, 2)))}
    save_tensors(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    model = open_checkpoint(save_tensors({"q.weight": tensor(8, 6)}, tmp_path / "model.safetensors"))
    monkeypatch.chdir(tmp_path)
    given = "base.safetensors+adapter"
    opened = open_checkpoint(given)
    write_archive(opened, [model], ["a"], tmp_path / "made" / "archive", base_given=given)
    monkeypatch.chdir("/")
    again = Archive(tmp_path / "made" / "archive").base()
    assert (
        again.read("q.weight", 0, 48)
        == open_checkpoint(f"{tmp_path}/base.safetensors+{tmp_path}/adapter").read("q.weight", 0, 48)
    ).all()
    Archive(tmp_path / "made" / "archive").job(MagMax(), tmp_path / "out.safetensors", OutputOptions()).run()
