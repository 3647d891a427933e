"""Object stores: reading ranges from them, and outputs that appear there all at once."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from tests.models import load_tensors, save_tensors, small_model

import magmax
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.output_paths import OutputPath
from magmax.checkpoints.remote import remote_file, urls
from magmax.checkpoints.remote.upload import UPLOAD_MARKER, Upload
from magmax.cli import main
from magmax.errors import MagMaxError, UnfinishedError
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.execution.executors import process_pool
from magmax.merging.job import Job
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.rules import MagMax


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path) -> None:
    """A cache and a working directory of the test's own; short waits and small blocks."""
    monkeypatch.setenv("MAGMAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_file, "FETCH_BYTES", 1 << 18)
    monkeypatch.setattr(urls, "RETRY_WAIT", 0.001)


@pytest.fixture(scope="module")
def s3_server():
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["s3", "memory"])
def store(request, monkeypatch):
    """An empty folder in an object store: its URL."""
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        files.store.clear()
        yield "memory://models"
        files.store.clear()
        return
    endpoint = request.getfixturevalue("s3_server")
    for name, value in {"KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing"}.items():
        monkeypatch.setenv(f"AWS_{name}" if name.startswith("S") else f"AWS_ACCESS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = fsspec.filesystem("s3")
    bucket = f"bucket-{abs(hash(request.node.nodeid)) % 10**8}"
    files.mkdir(bucket)
    yield f"s3://{bucket}/models"


def put(url: str, content: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(content)
    return url


def there(url: str) -> dict[str, bytes]:
    """Every object in a folder, by its name."""
    files, top = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {name.removeprefix(top).lstrip("/"): files.cat_file(name) for name in files.find(top)}


@pytest.fixture
def deferring(store):
    """A store whose objects are not to be seen before they are committed."""
    if not store.startswith("s3"):
        pytest.skip("shows what is written to it at once")
    return store


@pytest.fixture
def inputs(store, files):
    base, models = files
    return [put(f"{store}/in/{path.name}", path.read_bytes()) for path in [base, *models]]


def test_merging_from_and_into_a_store_gives_the_bytes_of_merging_on_disk(store, inputs, files, tmp_path):
    base, models = files
    magmax.merge("magmax", base, models, out=tmp_path / "home.safetensors")
    told = magmax.merge(
        "magmax", inputs[0], inputs[1:], out=f"{store}/out/m.safetensors", execution=ExecutionOptions(3)
    )
    assert told == f"{store}/out/m.safetensors"
    assert there(f"{store}/out") == {"m.safetensors": (tmp_path / "home.safetensors").read_bytes()}
    assert list((tmp_path / "cache" / "outgoing").iterdir()) == []


@pytest.mark.parametrize("rule", ["magmax", "ties"])
def test_other_processes_read_from_a_store_and_what_they_merge_is_uploaded(deferring, inputs, files, tmp_path, rule):
    base, models = files
    magmax.merge(rule, base, models, out=tmp_path / "home.safetensors")
    with process_pool(2) as pool:
        magmax.merge(rule, inputs[0], inputs[1:], out=f"{deferring}/out/m.safetensors", executor=pool)
    assert there(f"{deferring}/out") == {"m.safetensors": (tmp_path / "home.safetensors").read_bytes()}


def test_a_folder_of_shards_is_uploaded_with_its_index_last(deferring, files, tmp_path, monkeypatch):
    base, models = files
    options = OutputOptions(shard_bytes=1_000_000)
    opened = [open_checkpoint(path) for path in [base, *models]]

    def job(out):
        return merge_job(MagMax(), opened[0], opened[1:], out, options)

    job(tmp_path / "home").run()
    committed: list[str] = []
    commit = Upload._commit

    def watched(self, file, source, to):
        assert "model.safetensors.index.json" not in there(f"{deferring}/out")
        commit(self, file, source, to)
        committed.append(source.name)

    monkeypatch.setattr(Upload, "_commit", watched)
    job(f"{deferring}/out").run()
    home = {path.name: path.read_bytes() for path in (tmp_path / "home").iterdir()}
    assert there(f"{deferring}/out") == home
    assert committed[-1] == "model.safetensors.index.json"
    again = open_checkpoint(f"{deferring}/out")
    assert again.specs == open_checkpoint(tmp_path / "home").specs
    with pytest.raises(MagMaxError, match=r"/out: is there already \(\d+ objects\); delete it"):
        job(f"{deferring}/out").run()


@pytest.mark.parametrize("by_an_earlier_version", [False, True])
def test_an_upload_that_fails_leaves_nothing_to_be_seen_and_is_taken_up_again(
    deferring, files, tmp_path, monkeypatch, by_an_earlier_version
):
    base, models = files
    out, said = f"{deferring}/out.safetensors", []
    written = Upload._write_uncommitted

    def broken(self, source, to):
        file = written(self, source, to)
        file.discard()
        if by_an_earlier_version:
            ready = source.with_name(f"{source.name}.ready")
            text = ready.read_text().replace('"unmerged"', '"carried"').replace('"partly_merged"', '"partly"')
            assert '"carried"' in text
            assert '"partly"' in text
            ready.write_text(text)
        raise UnfinishedError(f"{to}: the connection is gone")

    monkeypatch.setattr(Upload, "_write_uncommitted", broken)
    with pytest.raises(UnfinishedError, match="the connection is gone"):
        magmax.merge("magmax", base, models, out=out)
    assert there(deferring) == {}
    monkeypatch.setattr(Upload, "_write_uncommitted", written)
    monkeypatch.setattr(Job, "_make", None)
    magmax.merge("magmax", base, models, out=out, execution=ExecutionOptions(note=said.append))
    monkeypatch.undo()
    magmax.merge("magmax", base, models, out=tmp_path / "home.safetensors")
    assert there(deferring) == {"out.safetensors": (tmp_path / "home.safetensors").read_bytes()}
    assert said == ["resuming: the output is made already and is uploaded now"]


def test_a_merge_that_is_refused_leaves_no_mark(store, files, tmp_path):
    base, models = files
    bad = load_tensors(models[0])
    bad["layer.bias"][3] = float("nan")
    with pytest.raises(MagMaxError, match=r"layer\.bias holds 1 NaN"):
        magmax.merge("magmax", base, [save_tensors(bad, tmp_path / "bad.safetensors"), models[1]], out=f"{store}/out")
    assert there(store) == {}


def test_an_interrupted_folder_is_gone_on_with(store, files, tmp_path):
    base, models = files
    put(f"{store}/out/{UPLOAD_MARKER}", b"")
    put(f"{store}/out/model.safetensors", b"the beginning of something")
    magmax.merge("magmax", base, models, out=f"{store}/out")
    magmax.merge("magmax", base, models, out=tmp_path / "home")
    assert there(f"{store}/out") == {path.name: path.read_bytes() for path in (tmp_path / "home").iterdir()}


def test_an_object_that_is_replaced_during_the_merge_is_an_error(inputs, tmp_path):
    opened = [open_checkpoint(url) for url in inputs]
    other = save_tensors(small_model(77), tmp_path / "other.safetensors").read_bytes()
    put(inputs[2], other)
    with pytest.raises(MagMaxError, match=r"task2\.safetensors: changed while it was read"):
        magmax.merge("magmax", opened[0], opened[1:], out=tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_places_that_cannot_be_written_are_refused_before_any_work(store, inputs, tmp_path):
    with pytest.raises(MagMaxError, match="is one of the inputs"):
        magmax.merge("magmax", inputs[0], inputs[1:], out=inputs[0])
    with pytest.raises(MagMaxError, match="cannot be written to; merge into a folder and upload that"):
        magmax.merge("magmax", inputs[0], inputs[1:], out="https://example.invalid/m.safetensors")
    with pytest.raises(MagMaxError, match="is no URL of a store that magmax reads"):
        magmax.merge("magmax", inputs[0], inputs[1:], out="nonsense://place/m.safetensors")


def test_folders_are_read_as_on_disk(store, files):
    content = {number: path.read_bytes() for number, path in enumerate([files[0], *files[1]])}
    for name in ("consolidated.safetensors", "model.safetensors", "pytorch_model.bin", "trainer_state.json"):
        put(f"{store}/whole/{name}", content[0] if name == "model.safetensors" else b"")
    put(f"{store}/whole/config.json", b'{"model_type": "x"}')
    put(f"{store}/whole/modeling_x.py", b"")
    opened = open_checkpoint(f"{store}/whole")
    assert opened.specs == open_checkpoint(files[0]).specs
    assert "model.safetensors, as transformers does; left out: consolidated.safetensors" in opened.notes[0]
    assert sorted(p.name for p in opened.small_files_folder().iterdir()) == ["config.json", "modeling_x.py"]
    put(f"{store}/cut/model-00001-of-00002.safetensors", content[0])
    with pytest.raises(MagMaxError, match="holds shards and no index"):
        open_checkpoint(f"{store}/cut")
    with pytest.raises(MagMaxError, match="is shard 1 of 2"):
        open_checkpoint(f"{store}/cut/model-00001-of-00002.safetensors")
    put(f"{store}/fp8/model.safetensors", content[0])
    put(f"{store}/fp8/config.json", b'{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(MagMaxError, match=r"fp8: is quantised with fp8 \(quantization_config"):
        open_checkpoint(f"{store}/fp8")
    put(f"{store}/dense/model.safetensors", content[0])
    put(f"{store}/dense/2_Dense/model.safetensors", content[1])
    put(f"{store}/dense/modules.json", b'[{"path": ""}, {"path": "2_Dense"}]')
    with pytest.raises(MagMaxError, match="holds weights in 2_Dense too; download the folder first"):
        open_checkpoint(f"{store}/dense")


def test_folders_of_other_kinds_are_to_be_downloaded(store):
    put(f"{store}/adapter/adapter_config.json", b"{}")
    put(f"{store}/adapter/adapter_model.safetensors", b"")
    put(f"{store}/old/pytorch_model.bin", b"")
    with pytest.raises(MagMaxError, match="adapters are not read from another machine"):
        open_checkpoint(f"{store}/adapter")
    with pytest.raises(MagMaxError, match="holds no safetensors; it is not of safetensors: download it first"):
        open_checkpoint(f"{store}/old")
    with pytest.raises(MagMaxError, match="there is no such file"):
        open_checkpoint(f"{store}/nothing/here")


def test_a_dry_run_says_what_goes_over_the_network_and_a_recipe_may_name_urls(
    store, inputs, files, tmp_path, capsys, monkeypatch
):
    recipe = tmp_path / "recipes" / "r.yaml"
    recipe.parent.mkdir()
    models = [inputs[2], f"../in/{files[1][0].name}"]
    recipe.write_text(json.dumps({"base": inputs[0], "models": models, "out": f"{store}/r.safetensors"}))
    monkeypatch.setattr("sys.argv", ["magmax", "merge", str(recipe), "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    one = open_checkpoint(files[0]).nbytes
    assert f"over networks {2 * one:,} of these to read, " in capsys.readouterr().out
    assert "r.safetensors" not in there(store)
    monkeypatch.setattr("sys.argv", ["magmax", "merge", str(recipe)])
    with pytest.raises(SystemExit):
        main()
    assert "r.safetensors" in there(store)


def test_what_is_written_here_alone_takes_no_url():
    (problem,) = OutputPath(Path("s3://bucket/archive")).find_problems([])
    assert "is on another machine, and this is written here; name a path" in problem
