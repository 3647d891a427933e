"""No recipe or folder can name code to be run, unless --allow-code is given, and then only code that lies beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from tests.continual import toys  # noqa: E402

import magmax  # noqa: E402
from magmax import cli  # noqa: E402
from magmax.continual import registry  # noqa: E402
from magmax.continual.experiment import Experiment  # noqa: E402
from magmax.continual.training.trainer import ContinualTraining  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

MARKING = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
PARTS = MARKING + "from tests.continual.toys import *\n\ndef score(path):\n    return 1.0\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as one downloads it: recipes, checkpoints, and a Python file that tells that it ran."""
    for name, value in (("base", 0.0), ("one", 1.0), ("half", 0.5)):
        save_file({"w": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    (tmp_path / "parts_of_test.py").write_text(PARTS)
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_modules() -> Any:
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("parts_of_test", "json_of_test")):
            del sys.modules[name]
    sys.path[:] = path


def write(file: Path, **content: Any) -> str:
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


def succeed(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(words)
    assert not ended.value.code


def experiment(folder: Path, **changes: Any) -> str:
    return write(folder / "experiment.yaml", **{**toys.RECIPE, "seeds": [0], "training": ["sequential"], **changes})


def search(folder: Path, score: Any) -> str:
    merge = {"base": "base.safetensors", "models": ["one.safetensors", "half.safetensors"], "rule": "magmax"}
    space = {"scaling_factor": {"low": 0, "high": 1}}
    return write(folder / "search.yaml", merge=merge, space=space, score=score, trials=2)


def study(folder: Path, **changes: Any) -> str:
    experiment(folder, validation=5, **changes)
    return write(folder / "study.yaml", experiment="experiment.yaml", training=["sequential"])


def run_folder(folder: Path, **changes: Any) -> str:
    """The folder of a training, whose recipe.json is changed."""
    run = folder / "run"
    ContinualTraining(Experiment(**toys.RECIPE, validation=3), run).run()
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, **changes}))
    (run / "parts_of_test.py").write_text(PARTS)
    return str(run)


HOSTILE = [
    "subprocess:getoutput",
    "os:system",
    "builtins:exec",
    "magmax.cli:run",
    "parts_of_test:blobs",
    "tests.continual.toys:blobs",
]
COMMANDS: dict[str, Callable[[Path, Any], list[str]]] = {
    "train": lambda f, name: ["train", experiment(f, data=name), "--out", str(f / "out")],
    "model": lambda f, name: ["train", experiment(f, model=name), "--out", str(f / "out")],
    "head": lambda f, name: ["bench", experiment(f, head=name), "--out", str(f / "out")],
    "scenario": lambda f, name: ["bench", experiment(f, scenario=name), "--out", str(f / "out")],
    "dry run": lambda f, name: ["bench", experiment(f, data=name), "--out", str(f / "out"), "--dry-run"],
    "eval": lambda f, name: ["eval", experiment(f, data=name), str(f / "base.safetensors")],
    "assigned": lambda f, name: ["train", experiment(f), f"data={name}", "--out", str(f / "out")],
    "search": lambda f, name: ["search", "run", search(f, name), "--out", str(f / "out")],
    "scored": lambda f, name: (
        experiment(f, model=name, validation=2),
        ["search", "run", search(f, {"experiment": "experiment.yaml"}), "--out", str(f / "out")],
    )[1],
    "environments": lambda f, name: ["study", "environments", study(f, data=name), "--out", str(f / "out")],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_recipe_names_code(command: str, name: str, folder: Path) -> None:
    with pytest.raises(MagMaxError, match=r"no recipe may run code.*--allow-code"):
        cli.run(COMMANDS[command](folder, name))
    assert not (folder / "ran").exists()
    assert not (folder / "out").exists()


@pytest.mark.parametrize("options", [None, {"cmd": "touch ran"}], ids=["bare", "options"])
def test_no_run_folder_names_code(options: Any, folder: Path) -> None:
    pytest.importorskip("nicegui")
    run = run_folder(folder, data={"subprocess:getoutput": options})
    with pytest.raises(MagMaxError, match="no recipe may run code"):
        cli.run(["ui", run, "--port", "0", "--no-browser"])
    run = run_folder(folder / "run" / "more", head="parts_of_test:head")
    with pytest.raises(MagMaxError, match="no recipe may run code"):
        cli.run(["ui", run, "--port", "0", "--no-browser"])
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        ("data", {"joined": {"of": {"a": {"subprocess:getoutput": {"cmd": "touch ran"}}}}}),
        ("data", {"joined": {"of": ["parts_of_test:blobs"]}}),
        ("data", {"long_tail": {"of": "parts_of_test:blobs"}}),
        ("model", {"trained_head": {"of": "parts_of_test:encoder"}}),
    ],
)
def test_no_option_names_code(kind: str, choice: Any, folder: Path) -> None:
    with pytest.raises(MagMaxError, match="no recipe may run code"):
        registry.build(kind, choice)
    assert not (folder / "ran").exists()


def test_code_beside_the_recipe_runs_where_it_is_allowed(folder: Path) -> None:
    """From another working directory, without PYTHONPATH, in worker processes too."""
    named = {key: f"parts_of_test:{part}" for key, part in (("data", "blobs"), ("model", "encoder"), ("head", "head"))}
    recipe = experiment(folder, **named, rules=["magmax"])
    succeed("bench", recipe, "--out", str(folder / "out"), "--allow-code")
    succeed("train", recipe, "--out", str(folder / "run"), "--allow-code")
    assert (folder / "ran").exists()
    usual = folder / "usual"
    usual.mkdir()
    succeed("train", experiment(usual), "--out", str(usual / "run"))
    merged = "merged.safetensors"
    assert (folder / "run" / merged).read_bytes() == (usual / "run" / merged).read_bytes()


def test_a_score_beside_the_recipe_runs_where_it_is_allowed(folder: Path) -> None:
    pytest.importorskip("optuna")
    words = ["search", "run", search(folder, "parts_of_test:score"), "--out", str(folder / "out"), "--allow-code"]
    done = subprocess.run([sys.executable, "-m", "magmax.cli", *words], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "best.yaml").exists()


def test_packages_beside_the_recipe_and_their_own_imports(folder: Path) -> None:
    package = folder / "parts_of_test_too"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("from parts_of_test import score\nfrom . import other\n")
    (package / "other.py").write_text("")
    with registry.code_from(folder):
        assert registry.find("score", "parts_of_test_too.inner:score")(Path()) == 1.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("subprocess:getoutput", "is no function in a Python file"),
        ("tests.continual.toys:blobs", "is no function in a Python file"),
        ("..parts_of_test:blobs", "is no function in a Python file"),
        ("/parts_of_test:blobs", "is no function in a Python file"),
        ("parts_of_test:toys.blobs", "is no function in a Python file"),
        ("parts_of_test:nowhere", "cannot be imported"),
        ("parts_of_test:WIDTH", "is no function, but int"),
        ("json:loads", "another module is called 'json'"),
        ("broken_parts_of_test:f", "cannot be imported: ZeroDivisionError"),
        ("parts_of_test", "there is no 'parts_of_test'"),
    ],
)
def test_only_functions_of_files_beside_the_recipe_are_allowed(name: str, words: str, folder: Path) -> None:
    (folder / "json.py").write_text(MARKING)
    (folder / "broken_parts_of_test.py").write_text("1 / 0")
    with registry.code_from(folder), pytest.raises(MagMaxError, match=words):
        registry.find("data", name)
    assert json.loads("1") == 1


def test_nothing_in_a_recipe_allows_code(folder: Path) -> None:
    for key in ("_code_folder", "code_folder", "allow_code"):
        recipe = experiment(folder, data="parts_of_test:blobs", **{key: str(folder)})
        with pytest.raises(MagMaxError, match=f"unknown key '{key}'"):
            cli.run(["train", recipe, "--out", str(folder / "out")])
        with pytest.raises(MagMaxError, match=f"unknown key '{key}'"):
            cli.run(["train", experiment(folder), f"{key}={folder}", "--out", str(folder / "out")])
    assert not (folder / "ran").exists()


def test_the_allowance_ends(folder: Path) -> None:
    with registry.code_from(folder):
        assert registry.find("score", "parts_of_test:score")
        with registry.code_from(None), pytest.raises(MagMaxError, match="no recipe may run code"):
            registry.find("score", "parts_of_test:score")
    with pytest.raises(MagMaxError, match="no recipe may run code"):
        registry.find("score", "parts_of_test:score")


def test_installed_packages_register_names() -> None:
    assert registry.build("data", {"toy_blobs": {"per_class": 2}}).classes == toys.blobs().classes
    with pytest.raises(MagMaxError, match="did you mean 'toy_blobs'"):
        registry.find("data", "toy_blob")


def test_workers_import_nothing_of_the_working_directory(folder: Path) -> None:
    """Python puts the working directory first for a worker; a user's own processes are as they were."""
    (folder / "multiprocessing.py").write_text(MARKING)
    script = folder / "elsewhere" / "run.py"
    script.parent.mkdir()
    script.write_text(
        "import os\nfrom magmax.merging.execution.executors import job_executor\n"
        "if __name__ == '__main__':\n    with job_executor(1, None) as workers:\n"
        "        print(workers.submit(os.getenv, 'PYTHONSAFEPATH', 'none').result())\n"
        "    print(os.environ.get('PYTHONSAFEPATH', 'none'))\n"
    )
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
    assert (done.stdout, (folder / "ran").exists()) == ("none\nnone\n", False), done.stderr


@pytest.mark.parametrize(
    "url",
    ["reference://w.safetensors::http://host/refs.json", "dask://host/w.safetensors", "s3://b/k::http://host/x.zip",
     "jupyter://host/w.safetensors", "generic://w.safetensors", "simplecache://x::s3://b/w.safetensors"],
)  # fmt: skip
def test_urls_only_fetch_bytes(url: str) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(MagMaxError, match="is no URL of a store that magmax reads"):
        magmax.merge("magmax", url, ["a.safetensors"])
