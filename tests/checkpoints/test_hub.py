"""Models by their ids on the hub: from its cache, laid out as it lays it out, and downloaded from a server like it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.checkpoints.hub_server import HubState, Repository, start_server
from tests.models import load_tensors, magmax, reference_merge, same_bytes, save_tensors, small_model

import magmax as package
from magmax import MagMaxError
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.remote import hub as hub_module
from magmax.checkpoints.remote.hub import HubId, needed_files, parse_hub_id
from magmax.cli import app
from magmax.merging.provenance import read_provenance

constants = pytest.importorskip("huggingface_hub.constants")

ONE, TWO, THREE, FOUR = (letter * 40 for letter in "abcd")


def weights(seed: int) -> bytes:
    return save({key: tensor.contiguous() for key, tensor in small_model(seed).items()})


def shards(seed: int) -> dict[str, bytes]:
    """A model in two shards and an index."""
    keys = sorted(small_model(seed))
    names = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(keys)}
    files = {
        name: save({key: small_model(seed)[key].contiguous() for key in keys if names[key] == name})
        for name in set(names.values())
    }
    return {**files, "model.safetensors.index.json": json.dumps({"weight_map": names}).encode()}


SMALL = {
    "config.json": b'{"model_type": "small"}', "tokenizer.json": b"{}",
    "modules.json": b'[{"path": "1_Pooling"}]', "1_Pooling/config.json": b"{}",
}  # fmt: skip
WASTE = {"pytorch_model.bin": b"x" * 5000, "tf_model.h5": b"x", "onnx/model.onnx": b"x", ".gitattributes": b"x"}


@pytest.fixture(scope="module")
def models() -> dict[str, Repository]:
    return {
        "org/base": Repository({ONE: {**SMALL, **WASTE, "model.safetensors": weights(0)}}, {"main": ONE}),
        "org/cars": Repository(
            {TWO: {**SMALL, **WASTE, **shards(1)}, ONE: {"model.safetensors": weights(5)}},
            {"main": TWO, "v1": ONE, "refs/pr/3": ONE},
        ),
        "org/mnist": Repository({THREE: {**SMALL, "tuned/model.safetensors": weights(2)}}, {"main": THREE}),
        "org/two": Repository({FOUR: {"a.safetensors": weights(3), "b.safetensors": weights(4)}}, {"main": FOUR}),
        "org/empty": Repository({FOUR: SMALL}, {"main": FOUR}),
        "org/gated": Repository({ONE: {"model.safetensors": weights(0)}}, {"main": ONE}, gated=True),
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and no hub in reach."""
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    hub_module._fetch_or_explain.cache_clear()
    return folder


@pytest.fixture
def online(cache: Path, models: dict[str, Repository], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
    """A hub in reach."""
    hub = HubState(models)
    server = start_server(hub)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    server.shutdown()
    server.server_close()


def fill(cache: Path, name: str, repository: Repository) -> None:
    """Lay out a model in the cache as the hub's own library does: blobs, snapshots that link to them, refs."""
    folder = cache / ("models--" + name.replace("/", "--"))
    for ref, commit in repository.refs.items():
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    (folder / "blobs").mkdir()
    for commit, files in repository.commits.items():
        for number, (file, content) in enumerate(files.items()):
            blob = folder / "blobs" / f"{commit[:30]}{number:010}"
            blob.write_bytes(content)
            link = folder / "snapshots" / commit / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture
def offline(cache: Path, models: dict[str, Repository]) -> Path:
    """The cache with every model in it."""
    for name, repository in models.items():
        fill(cache, name, repository)
    return cache


def names_of(path: Path) -> list[dict[str, Any]]:
    told = read_provenance(open_checkpoint(path).metadata)
    assert told is not None
    return [{key: value for key, value in source.items() if key != "xxh3_128"} for source in told["inputs"]]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs%2Fpr%2F3", HubId("org/name", "refs/pr/3")),
        ("Qwen/Qwen2.5-0.5B", HubId("Qwen/Qwen2.5-0.5B")),
        ("hf://org/name", HubId("org/name")),
        ("hf://org/name@v1/sub/folder", HubId("org/name", "v1", "sub/folder")),
        ("hf://org/name/file.safetensors", HubId("org/name", "", "file.safetensors")),
        ("hf://gpt2@main", HubId("gpt2", "main")),
        ("hf://here/name", HubId("here/name")),
        ("here/name", None),
        ("here/there", None),
        ("org/name.safetensors", None),
        ("org/recipe.yaml", None),
        ("org/name/sub", None),
        ("./org/name", None),
        ("../org/name", None),
        ("/org/name", None),
        ("~/name", None),
        ("name", None),
        ("org/", None),
        ("org/name/", None),
        ("-org/name", None),
        ("org/name.", None),
        ("", None),
    ],
)
def test_which_texts_are_ids(text: str, named: HubId | None, cache: Path) -> None:
    Path("here/there").mkdir(parents=True)
    assert parse_hub_id(text) == named
    if named:
        assert parse_hub_id(named.address) == named


@pytest.mark.parametrize(
    "text", ["hf://", "hf:///x", "hf://a b/c", "hf://org/name/../x", "hf://org/name@", "hf://.a/b"]
)
def test_what_hf_must_be_followed_by(text: str) -> None:
    with pytest.raises(MagMaxError, match=f"^{text}: is no id of the hub; write hf://NAME/MODEL"):
        open_checkpoint(text)


def test_a_path_that_is_there_always_wins(offline: Path) -> None:
    save_tensors({"mine": torch.ones(2)}, Path("org/base/model.safetensors"))
    assert open_checkpoint("org/base").specs.keys() == {"mine"}
    assert "mine" not in open_checkpoint("hf://org/base").specs
    with pytest.raises(MagMaxError, match=r"^org/cars: there is no such .*; for the model of the hub: hf://org/cars$"):
        open_checkpoint("org/cars")
    with pytest.raises(MagMaxError, match="there is no such file or folder"):
        open_checkpoint(Path("org/cars"))


def test_the_cache_serves_without_a_network(offline: Path) -> None:
    opened = open_checkpoint("org/cars")
    assert opened.specs.keys() == small_model(1).keys()
    assert opened.label == f"org/cars@{TWO[:12]}"
    assert opened.origin == f"hf://org/cars@{TWO}"
    for revision in ("v1", "refs%2Fpr%2F3", ONE):
        assert open_checkpoint(f"org/cars@{revision}").origin == f"hf://org/cars@{ONE}"
    assert open_checkpoint("hf://org/mnist/tuned").label == f"org/mnist@{THREE[:12]}/tuned"
    assert open_checkpoint("hf://org/two/b.safetensors").specs.keys() == small_model(4).keys()


def test_a_merge_by_ids_names_them_with_their_commits(offline: Path) -> None:
    models = ["org/cars", "hf://org/mnist/tuned"]
    app(["merge", "--base", "org/base", *models, "--out", "out"], exit_on_error=False, result_action="return_value")
    expected = reference_merge(magmax, small_model(0), [small_model(1), small_model(2)], 0.5)
    assert same_bytes(load_tensors(Path("out/model.safetensors")), expected)
    assert json.loads(Path("out/config.json").read_text()) == {"model_type": "small"}
    assert Path("out/1_Pooling/config.json").is_file()
    cars, mnist = f"org/cars@{TWO}", f"org/mnist@{THREE}/tuned"
    assert names_of(Path("out")) == [
        {"name": "base", "origin": f"hf://org/base@{ONE}"},
        {"name": cars, "origin": f"hf://{cars}"},
        {"name": mnist, "origin": f"hf://{mnist}"},
    ]
    every = b"".join(path.read_bytes() for path in Path("out").rglob("*") if path.is_file())
    assert str(offline).encode() not in every
    assert b"models--" not in every
    package.merge("magmax", "org/base", models, 0.5, "again")
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_recipes_sweeps_and_running_merges_take_ids(offline: Path) -> None:
    def run(*words: str) -> None:
        app([*words], exit_on_error=False, result_action="return_value")

    Path("sub").mkdir()
    save_tensors(small_model(2), Path("sub/local.safetensors"))
    Path("sub/recipe.yaml").write_text(
        "base: org/base\nmodels: [org/cars, {path: org/cars@v1, name: old}, local.safetensors]\nout: out.safetensors\n"
    )
    run("merge", "sub/recipe.yaml")
    others = [small_model(n) for n in (1, 5, 2)]
    assert same_bytes(load_tensors(Path("sub/out.safetensors")), reference_merge(magmax, small_model(0), others, 0.5))
    assert names_of(Path("sub/out.safetensors"))[1:] == [
        {"name": f"org/cars@{TWO}", "origin": f"hf://org/cars@{TWO}"},
        {"name": "old", "origin": f"hf://org/cars@{ONE}"},
        {"name": "local"},
    ]
    run("merge", "sub/recipe.yaml", "--base", "org/base", "--out", "flag.safetensors")
    assert Path("flag.safetensors").read_bytes() == Path("sub/out.safetensors").read_bytes()
    run("search", "sweep", "sub/recipe.yaml", "scaling_factor=0.5,0.7", "--out", "swept.safetensors")
    assert Path("swept-0.5.safetensors").read_bytes() == Path("sub/out.safetensors").read_bytes()
    for model in ("org/cars", "org/cars@v1", "sub/local.safetensors"):
        run("running", "absorb", "state", model, *(("--base", "org/base") if model == "org/cars" else ()))
    run("running", "result", "state", "--out", "absorbed.safetensors")
    assert same_bytes(load_tensors(Path("absorbed.safetensors")), load_tensors(Path("sub/out.safetensors")))
    told = json.loads(Path("state/state.json").read_text())
    assert f"hf://org/base@{ONE}" in json.dumps(told)
    assert str(offline) not in json.dumps(told)
    run("checkpoint", "inspect", "org/cars")
    run("checkpoint", "diff", "org/base", "org/cars")
    run("checkpoint", "convert", "org/cars", "--out", "cars.safetensors")
    assert same_bytes(load_tensors(Path("cars.safetensors")), small_model(1))


def test_adapters_by_id(cache: Path) -> None:
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    base = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    tuned = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    tuned.save_pretrained("made")
    adapter = {path.name: path.read_bytes() for path in Path("made").iterdir() if path.suffix != ".md"}
    fill(cache, "org/net", Repository({ONE: {"model.safetensors": save(base)}}, {"main": ONE}))
    fill(cache, "org/lora", Repository({TWO: adapter}, {"main": TWO}))
    Path("made").rename("local")
    save_tensors(base, Path("base.safetensors"))
    expected = open_checkpoint("base.safetensors+local")
    for text, origin in {
        "org/net+org/lora": f"hf://org/net@{ONE}+hf://org/lora@{TWO}",
        "hf://org/net@main+hf://org/lora": f"hf://org/net@{ONE}+hf://org/lora@{TWO}",
        "org/net+local": f"hf://org/net@{ONE}+local",
        "base.safetensors+org/lora": f"base.safetensors+hf://org/lora@{TWO}",
    }.items():
        opened = open_checkpoint(text)
        assert opened.origin == origin
        assert all(
            (opened.read(k, 0, s.num_units) == expected.read(k, 0, s.num_units)).all()
            for k, s in expected.specs.items()
        )
    app(
        ["checkpoint", "convert", "org/net+org/lora", "--out", "net.safetensors"],
        exit_on_error=False,
        result_action="return_value",
    )
    assert open_checkpoint("net.safetensors").specs == expected.specs
    package.merge("magmax", "org/net", ["org/lora"], 1.0, "out.safetensors")
    package.merge("magmax", "base.safetensors", ["local"], 1.0, "out2.safetensors")
    assert same_bytes(load_tensors(Path("out.safetensors")), load_tensors(Path("out2.safetensors")))
    with pytest.raises(MagMaxError, match=rf"org/lora@{TWO[:12]}: is an adapter.*: write BASE\+org/lora"):
        open_checkpoint("org/lora")


def test_only_what_is_needed_is_downloaded_and_only_once(online: HubState, cache: Path) -> None:
    opened = open_checkpoint("org/cars")
    assert opened.origin == f"hf://org/cars@{TWO}"
    assert all(opened.read(k, 0, s.num_units).size == s.num_units for k, s in opened.specs.items())
    assert online.downloads() == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "modules.json", "tokenizer.json",
    ]  # fmt: skip
    assert (cache / "models--org--cars/refs/main").read_text() == TWO
    online.requests.clear()
    open_checkpoint("org/cars")
    hub_module._fetch_or_explain.cache_clear()
    open_checkpoint(f"org/cars@{TWO}")
    assert not online.requests
    open_checkpoint("org/cars")
    assert not online.downloads()


def test_a_download_that_breaks_off_is_taken_up_again(online: HubState) -> None:
    online.cut_after = 1_000_000
    opened = open_checkpoint("org/base")
    assert all(opened.read(k, 0, s.num_units).size == s.num_units for k, s in opened.specs.items())
    assert len([path for verb, path in online.requests if verb == "GET" and path.startswith("/large/")]) == 2


def test_what_was_downloaded_serves_when_the_hub_is_gone(online: HubState, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("org/base")
    hub_module._fetch_or_explain.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert open_checkpoint("org/base").origin == f"hf://org/base@{ONE}"
    with pytest.raises(
        MagMaxError, match=r"^org/cars: cannot be had from http://127\.0\.0\.1:1 .*hf download org/cars"
    ):
        open_checkpoint("org/cars")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("org/nothing", r"no such model is at http.* or in the cache .*hub-cache; mend the name or.*HF_TOKEN"),
        ("org/base@v9", r"org/base has no revision 'v9'"),
        ("org/gated", r"is gated; accept its terms at http.*/org/gated and log in .*HF_TOKEN.*hub-cache"),
        ("org/two", r"holds 2 weight files and no index \(a\.safetensors, .*\); name one: hf://org/two/a\.safetensors"),
        ("org/empty", r"holds no weights .* it has config\.json"),
        ("hf://org/mnist/emma", r"mnist/emma: holds no weights"),
    ],
)
def test_refusals(text: str, words: str, online: HubState, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MagMaxError, match=words) as caught:
        open_checkpoint(text)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_offline_and_not_in_the_cache(cache: Path, models: dict[str, Repository]) -> None:
    words = r"^org/cars: is not, or not whole, in the cache .*hub-cache, and HF_HUB_OFFLINE.*hf download org/cars"
    with pytest.raises(MagMaxError, match=words):
        open_checkpoint("org/cars")
    fill(cache, "org/cars", models["org/cars"])
    (cache / f"models--org--cars/snapshots/{TWO}/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MagMaxError, match=words):
        open_checkpoint("org/cars")
    (cache / f"models--org--cars/snapshots/{TWO}/model.safetensors.index.json").unlink()
    with pytest.raises(MagMaxError, match=words):
        open_checkpoint("org/cars")


def test_which_files_are_needed() -> None:
    def chosen(*names: str, inside: str = "") -> list[str]:
        return needed_files(names, HubId("o/n", "", inside), lambda name: Path("/nowhere", name))

    assert chosen("pytorch_model.bin", "model.safetensors", "vocab.txt") == ["model.safetensors", "vocab.txt"]
    assert chosen("pytorch_model.bin", "training_args.bin", "a/b/c.json") == ["pytorch_model.bin"]
    assert chosen("open_clip.pt") == ["open_clip.pt"]
    adapter = ["adapter_model.safetensors", "adapter_config.json"]
    assert chosen("adapter_model.bin", *adapter) == adapter
    assert chosen("v/model.safetensors", "v/c.json", "model.safetensors", inside="v") == [
        "v/model.safetensors",
        "v/c.json",
    ]


LAYOUTS: dict[str, tuple[list[str], list[str]]] = {
    "two indexes": (
        ["model.safetensors.index.json", "consolidated.safetensors.index.json", "model-1-of-2.safetensors",
         "model-2-of-2.safetensors", "consolidated-1-of-2.safetensors", "config.json", "params.json"],
        ["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json",
         "params.json"],
    ),
    "open_clip": (
        ["model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin",
         "open_clip_config.json", "bpe.codes", "LICENSE"],
        ["LICENSE", "bpe.codes", "model.safetensors", "open_clip_config.json"],
    ),
    "diffusers": (
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "config.json"],
        ["config.json", "diffusion_pytorch_model.safetensors"],
    ),
    "a checkpoint of Trainer": (
        ["pytorch_model.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "config.json"],
        ["config.json", "pytorch_model.bin"],
    ),
    "an adapter with more files": (
        ["adapter_config.json", "adapter_model.safetensors", "optimizer.bin", "value_head.safetensors"],
        ["adapter_config.json", "adapter_model.safetensors"],
    ),
    "an adapter in default": (
        ["default/adapter_config.json", "default/adapter_model.bin"],
        ["default/adapter_config.json", "default/adapter_model.bin"],
    ),
    "sentence-transformers": (
        ["modules.json", "model.safetensors", "1_Pooling/config.json", "2_Dense/config.json",
         "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "onnx/model.onnx"],
        ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "model.safetensors",
         "modules.json"],
    ),
    "code": (
        ["model.safetensors", "modeling_x.py", "config.json"],
        ["config.json", "model.safetensors", "modeling_x.py"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("there", "wanted"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_files_of_each_layout(there: list[str], wanted: list[str], tmp_path: Path) -> None:
    content = {
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
        "model.safetensors.index.json": '{"weight_map": {"a": "model-1-of-2.safetensors", '
        '"b": "model-2-of-2.safetensors"}}',
    }

    def download(name: str) -> Path:
        path = tmp_path / name
        path.write_text(content.get(name, "{}"))
        return path

    assert sorted(needed_files(there, HubId("o/n"), download)) == wanted
    inside = [f"sub/{name}" for name in there]
    (tmp_path / "sub").mkdir()
    content |= {f"sub/{name}": text for name, text in content.items()}
    assert sorted(needed_files(inside, HubId("o/n", "", "sub"), download)) == [f"sub/{name}" for name in wanted]


def test_shards_without_an_index_are_not_a_model(models: dict[str, Repository], cache: Path) -> None:
    files = {"model-00001-of-00004.safetensors": weights(0), "config.json": b"{}"}
    fill(cache, "org/cut", Repository({ONE: files}, {"main": ONE}))
    with pytest.raises(MagMaxError, match="not whole, in the cache"):
        open_checkpoint("org/cut")
    with pytest.raises(MagMaxError, match="is shard 1 of 4 of a model"):
        open_checkpoint("hf://org/cut/model-00001-of-00004.safetensors")


def test_two_indexes_and_a_single_file_are_read_from_the_cache_with_their_config(cache: Path) -> None:
    mistral = {"consolidated.safetensors.index.json": b'{"weight_map": {"x": "missing.safetensors"}}'}
    files = {**shards(1), **mistral, "config.json": b'{"model_type": "small"}', "x.py": b"", "LICENSE": b"mine"}
    fill(cache, "org/two-indexes", Repository({ONE: files}, {"main": ONE}))
    opened = open_checkpoint("org/two-indexes")
    assert opened.specs.keys() == small_model(1).keys()
    assert "left out: consolidated.safetensors.index.json" in opened.notes[0]
    index = open_checkpoint("hf://org/two-indexes/model.safetensors.index.json")
    assert index.specs == opened.specs
    base = {"model.safetensors": weights(0), "config.json": b'{"model_type": "small"}'}
    fill(cache, "org/file", Repository({TWO: base}, {"main": TWO}))
    package.merge("magmax", "hf://org/file/model.safetensors", ["org/two-indexes"], 0.5, "out")
    assert json.loads(Path("out/config.json").read_text()) == {"model_type": "small"}
    head = Path("out/README.md").read_text().split("---")[1]
    assert "base_model:\n- org/file\n- org/two-indexes\nbase_model_relation: merge" in head


def test_the_command_over_the_network(online: HubState, cache: Path) -> None:
    """HF_HOME and HF_ENDPOINT as a user sets them, and the exit code; and that nothing here loads the library early."""
    env = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(cache.parent / "home")}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from magmax.cli import main; main()"
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, capture_output=True, text=True, env={**env, **more})

    done = run("merge", "--base", "org/base", "org/cars", "--out", "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert same_bytes(
        load_tensors(Path("out.safetensors")), reference_merge(magmax, small_model(0), [small_model(1)], 0.5)
    )
    assert (cache.parent / "home/hub/models--org--base/snapshots" / ONE).is_dir()
    again = run("checkpoint", "inspect", "org/cars", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    missing = run("checkpoint", "inspect", "org/mnist", HF_HUB_OFFLINE="1")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: org/mnist: is not, or not whole, in the cache ")
    lean = "import sys; sys.modules['huggingface_hub'] = None; import magmax; magmax.open_checkpoint(sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", lean, "out.safetensors"]).returncode == 0
    without = subprocess.run([sys.executable, "-c", lean, "org/base"], capture_output=True, text=True)
    assert "pip install '.[hub]'" in without.stderr
