"""Models on web servers, good and bad: the same bytes as from this disk, or an error that says what is wrong."""

from __future__ import annotations

import json
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.models import load_tensors, save_tensors, small_model
from tests.remote.web import WebServer, serve_files

import magmax
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.remote import filesystems, remote_file, urls
from magmax.errors import MagMaxError, UnfinishedError
from magmax.merging import pipeline
from magmax.merging.execution import pool as pool_module
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.execution.executors import process_pool

pytest.importorskip("aiohttp")
NAMES = ["base", "task1", "task2", "task3"]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch) -> None:
    """Blocks so small that every file has many, and no long waits between tries."""
    monkeypatch.setattr(remote_file, "FETCH_BYTES", 1 << 18)
    monkeypatch.setattr(remote_file, "FIRST_FETCH_BYTES", 1 << 12)
    monkeypatch.setattr(urls, "RETRY_WAIT", 0.001)


@pytest.fixture
def web(files):
    base, models = files
    content = {f"/{name}.safetensors": path.read_bytes() for name, path in zip(NAMES, [base, *models], strict=False)}
    with serve_files(WebServer(content)) as web:
        yield web


def merged(web: WebServer, out: Path, rule: str = "magmax", threads: int = 2, said: list[str] | None = None) -> bytes:
    base, *models = [f"{web.url}/{name}.safetensors" for name in NAMES]
    note = (said if said is not None else []).append
    magmax.merge(rule, base, models, out=out, execution=ExecutionOptions(threads, note=note))
    return out.read_bytes()


def at_home(files, out: Path, rule: str = "magmax") -> bytes:
    base, models = files
    magmax.merge(rule, base, models[:3], out=out)
    return out.read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rule", ["magmax", "ties"])
def test_merging_from_the_web_gives_the_bytes_of_merging_from_disk(web, files, tmp_path, rule, threads):
    ours = merged(web, tmp_path / "web.safetensors", rule, threads)
    assert ours == at_home(files, tmp_path / "home.safetensors", rule)


def test_other_processes_read_from_the_web_each_for_itself(web, files, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "SHARE_BYTES", 3_000_000)
    base, *models = [f"{web.url}/{name}.safetensors" for name in NAMES]
    with process_pool(2) as pool:
        magmax.merge("ties", base, models, out=tmp_path / "web.safetensors", executor=pool)
    assert (tmp_path / "web.safetensors").read_bytes() == at_home(files, tmp_path / "home.safetensors", "ties")


def test_a_server_that_fails_other_processes_for_good_is_told_and_the_merge_resumes(web, files, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "SHARE_BYTES", 3_000_000)
    base, *models = [f"{web.url}/{name}.safetensors" for name in NAMES]
    out = tmp_path / "web.safetensors"
    web.answers_before_break, web.broken_answers = 30, -1
    with process_pool(2) as pool:
        with pytest.raises(UnfinishedError, match=r"\w+\.safetensors: \S+: bytes [\d,]+ to [\d,]+: failed 5 times"):
            magmax.merge("magmax", base, models, out=out, executor=pool)
        assert not out.exists()
        web.broken_answers = 0
        magmax.merge("magmax", base, models, out=out, executor=pool)
    assert out.read_bytes() == at_home(files, tmp_path / "home.safetensors")


def test_every_byte_is_fetched_about_once_and_given_up_in_the_end(web, tmp_path, monkeypatch):
    opened = [open_checkpoint(f"{web.url}/{name}.safetensors") for name in NAMES]
    magmax.merge("magmax", opened[0], opened[1:], out=tmp_path / "m.safetensors", execution=ExecutionOptions(2))
    assert web.bytes_sent < 1.2 * sum(map(len, web.files.values()))
    assert not any(checkpoint._file._fetches for checkpoint in opened)


def test_memory_ahead_of_the_work_is_bounded(web, files, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "PREFETCH_BYTES", 300_000)
    most = 0
    begin = pipeline.Prefetcher.begin

    def watched(self, chunk):
        nonlocal most
        begin(self, chunk)
        most = max(most, self._bytes)

    monkeypatch.setattr(pipeline.Prefetcher, "begin", watched)
    assert merged(web, tmp_path / "web.safetensors") == at_home(files, tmp_path / "home.safetensors")
    assert 0 < most < 300_000 + 2_500_000  # the largest tensor of one model, in whole blocks


def test_broken_connections_and_a_busy_server_are_tried_again(web, files, tmp_path):
    web.broken_answers, web.busy_answers = 25, 3
    assert merged(web, tmp_path / "web.safetensors") == at_home(files, tmp_path / "home.safetensors")
    assert web.broken_answers == 0


def test_a_server_that_fails_for_good_is_an_error_that_names_file_tensor_and_bytes_and_the_merge_resumes(
    web, files, tmp_path
):
    out = tmp_path / "web.safetensors"
    web.answers_before_break, web.broken_answers = 30, -1
    with pytest.raises(UnfinishedError, match=r"\w+\.safetensors: \S+: bytes [\d,]+ to [\d,]+: failed 5 times"):
        merged(web, out, threads=1)
    assert not out.exists()
    web.broken_answers, said = 0, []
    assert merged(web, out, said=said) == at_home(files, tmp_path / "home.safetensors")
    assert any("resuming" in line for line in said)


@pytest.mark.parametrize(
    ("seconds_per_byte", "words"),
    [(0.02, r"sent \d+ bytes in 0\.2 s"), (5.0, r"failed 5 times \(nothing came for 0\.2 s\)")],
)
def test_a_server_that_sends_next_to_nothing_is_given_up_and_said(
    web, tmp_path, monkeypatch, caplog, seconds_per_byte, words
):
    monkeypatch.setattr(filesystems, "READ_TIMEOUT", 0.2)
    monkeypatch.setattr(urls, "PATIENCE", 0.1)
    web.seconds_per_byte = seconds_per_byte
    with pytest.raises(UnfinishedError, match=words):
        open_checkpoint(f"{web.url}/base.safetensors")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("magmax")]
    assert len(said) == 4
    assert all(f"{web.url}/base.safetensors" in line for line in said)
    assert said[0].endswith("try 2 of 5")


def test_a_server_without_ranges_is_refused(web, tmp_path):
    web.supports_ranges = False
    with pytest.raises(MagMaxError, match=r"base\.safetensors: the server sends whole files only.*download it first"):
        merged(web, tmp_path / "web.safetensors")
    assert web.bytes_sent < 2 * len(web.files["/base.safetensors"])


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("more", "sends more than the bytes"),
        ("fewer", "bytes came instead of"),
        ("elsewhere", "was asked for the bytes from"),
    ],
)
def test_a_server_that_sends_other_bytes_than_asked_for_is_caught(web, tmp_path, lie, words):
    web.range_error = lie
    with pytest.raises(MagMaxError, match=words):
        merged(web, tmp_path / "web.safetensors")
    assert not (tmp_path / "web.safetensors").exists()


def test_a_file_that_changes_during_the_merge_is_an_error_and_leaves_nothing(web, tmp_path):
    new = save_tensors(small_model(77), tmp_path / "new.safetensors").read_bytes()

    def swap(number: int) -> None:
        if number == 30:
            web.files["/task2.safetensors"] = new

    web.on_request = swap
    with pytest.raises(MagMaxError, match=r"task2\.safetensors: changed while it was read"):
        merged(web, tmp_path / "web.safetensors")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("web")] == []


def test_another_process_opens_the_same_file_or_none(web, files, tmp_path):
    content = pickle.dumps(open_checkpoint(f"{web.url}/task2.safetensors"))
    assert pickle.loads(content).specs == open_checkpoint(files[1][1]).specs
    web.files["/task2.safetensors"] = save_tensors(small_model(77), tmp_path / "new.safetensors").read_bytes()
    with pytest.raises(MagMaxError, match=r"task2\.safetensors: changed while it was read"):
        pickle.loads(content)


def test_what_is_not_there_or_not_safetensors_is_said(web, tmp_path):
    with pytest.raises(MagMaxError, match=r"/no\.safetensors: there is no such file"):
        open_checkpoint(f"{web.url}/no.safetensors")
    with pytest.raises(MagMaxError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors"):
        open_checkpoint(f"{web.url}/folder")
    with pytest.raises(MagMaxError, match="only safetensors are read from another machine; download it first"):
        open_checkpoint(f"{web.url}/old.pt")
    with pytest.raises(MagMaxError, match="adapters are not read from another machine"):
        open_checkpoint(f"{tmp_path}/base.safetensors+{web.url}/adapter")


def test_a_truncated_file_is_found_by_its_header(web):
    web.files["/cut.safetensors"] = web.files["/base.safetensors"][:-100]
    with pytest.raises(MagMaxError, match=r"cut\.safetensors: the file places .* it is truncated or corrupt"):
        open_checkpoint(f"{web.url}/cut.safetensors")


def test_secrets_of_a_url_are_in_no_message_and_no_output(web, tmp_path):
    secret = [f"{web.url}/{name}.safetensors?signature=hush" for name in NAMES]
    with pytest.raises(MagMaxError) as caught:
        open_checkpoint(f"{web.url.replace('://', '://user:hush@')}/no.safetensors?signature=hush")
    assert "hush" not in str(caught.value)
    magmax.merge("magmax", secret[0], secret[1:], out=tmp_path / "m.safetensors")
    assert b"hush" not in (tmp_path / "m.safetensors").read_bytes()


def sharded(folder: Path, seed: int) -> Path:
    """A model in two files with an index, its config and a tokenizer."""
    tensors = small_model(seed)
    halves = dict(list(tensors.items())[:4]), dict(list(tensors.items())[4:])
    names = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_tensors(half, folder / name)
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "seed": seed}))
    (folder / "vocab.txt").write_text("a\nb\n")
    return folder


@pytest.mark.parametrize("processes", [False, True])
def test_folders_with_an_index_and_their_small_files_come_from_the_web(processes, tmp_path):
    folders = [sharded(tmp_path / "models" / f"m{n}", n) for n in range(3)]
    content = {f"/{f.name}/{p.name}": p.read_bytes() for f in folders for p in f.iterdir()}
    magmax.merge("average", folders[0], folders[1:], out=tmp_path / "home")
    with serve_files(WebServer(content)) as web:
        base, *models = [f"{web.url}/{folder.name}" for folder in folders]
        models[-1] += "/model.safetensors.index.json"
        with process_pool(2) if processes else nullcontext() as pool:
            magmax.merge("average", base, models, out=tmp_path / "web", executor=pool)
    home, away = ({p.name: p.read_bytes() for p in (tmp_path / place).iterdir()} for place in ("home", "web"))
    provenance = [json.loads(folder.pop("provenance.json")) for folder in (home, away)]
    assert provenance[0] == provenance[1]
    assert home == away
    assert "vocab.txt" in away


def test_a_file_of_a_models_folder_brings_its_config(files, tmp_path):
    content = {
        "/m/diffusion_pytorch_model.safetensors": files[0].read_bytes(),
        "/one.safetensors": files[1][0].read_bytes(),
    }
    content["/m/config.json"], content["/config.json"] = b'{"_class_name": "UNet2DModel"}', b'{"colour": "blue"}'
    with serve_files(WebServer(content)) as web:
        base, model = f"{web.url}/m/diffusion_pytorch_model.safetensors", f"{web.url}/one.safetensors"
        magmax.merge("magmax", base, [model], out=tmp_path / "out")
        magmax.merge("magmax", model, [base], out=tmp_path / "other")
    assert (tmp_path / "out" / "config.json").read_bytes() == content["/m/config.json"]
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (tmp_path / "other" / "config.json").exists()


def test_an_index_that_places_a_tensor_wrongly_is_refused(tmp_path):
    folder = sharded(tmp_path / "m0", 0)
    content = {f"/m0/{path.name}": path.read_bytes() for path in folder.iterdir()}
    index = json.loads(content["/m0/model.safetensors.index.json"])
    index["weight_map"]["scale"] = "model-00001-of-00002.safetensors"
    content["/m0/model.safetensors.index.json"] = json.dumps(index).encode()
    with serve_files(WebServer(content)) as web, pytest.raises(MagMaxError, match="places scale in model-00001"):
        open_checkpoint(f"{web.url}/m0")


def test_one_base_from_the_web_and_models_from_disk(web, files, tmp_path):
    _, models = files
    magmax.merge("magmax", f"{web.url}/base.safetensors", models[:3], out=tmp_path / "both.safetensors")
    assert (tmp_path / "both.safetensors").read_bytes() == at_home(files, tmp_path / "home.safetensors")


def test_the_same_url_twice_is_refused(web, tmp_path):
    with pytest.raises(MagMaxError, match="name each model once"):
        magmax.merge(
            "magmax",
            f"{web.url}/base.safetensors",
            [f"{web.url}/task1.safetensors"] * 2,
            out=tmp_path / "m.safetensors",
        )


def test_an_absorbed_model_and_its_base_may_be_on_the_web(web, files, tmp_path):
    base, models = files
    running = magmax.Running(tmp_path / "state", "magmax", f"{web.url}/base.safetensors")
    for name in NAMES[1:]:
        running.absorb(f"{web.url}/{name}.safetensors")
    again = magmax.Running(tmp_path / "state")
    again.result(0.5, out=tmp_path / "result.safetensors")
    magmax.merge("magmax", base, models[:3], 0.5, out=tmp_path / "home.safetensors")
    ours, theirs = load_tensors(tmp_path / "result.safetensors"), load_tensors(tmp_path / "home.safetensors")
    assert all((ours[key].float() == theirs[key].float()).all() for key in theirs)
