"""Names that anyone may have written into a file: safe on a terminal, in a model card and in every message."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.robustness.files import small_model, write_safetensors

import magmax
from magmax import MagMaxError, Running, cli
from magmax.checkpoints import open_checkpoint
from magmax.errors import UnfinishedError, list_problems

HOSTILE = "w\x1b[2J\x1b]0;title\x07\r\n  - forged\x9b31m\u202etxt.exe\u2066\u2028<script>alert(1)</script>|`x`\x7f"
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line; returns the exit code and everything printed."""

    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["magmax", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out + err

    return command


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """A base and two models, one of a hostile name itself, with tensors of hostile names, merged and not merged."""
    paths = [tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "b\x1b[1m<b>\n.safetensors"]
    for seed, path in enumerate(paths):
        model = small_model(seed)
        write_safetensors(path, {HOSTILE: model["weight"], HOSTILE + "ids": model["position_ids"]}, {"tied": HOSTILE})
    return paths


def test_hostile_names_reach_no_terminal_raw(run: Command, hostile: list[Path], tmp_path: Path) -> None:
    base, *models = hostile
    state = tmp_path / "state"
    Running(state, "magmax", base).absorb(models[1])
    Running(state).label("x\x1b[3Jy\n")
    wrong = write_safetensors(tmp_path / "wrong.safetensors", {HOSTILE: np.ones(3, np.float32)})
    narrow = write_safetensors(tmp_path / "narrow.safetensors", {HOSTILE * 2: np.ones(3, np.float32)})
    for code, *words in (
        (0, "merge", "--base", base, *models, "--out", tmp_path / "out"),
        (0, "merge", "--base", base, *models, "--out", tmp_path / "dry", "--dry-run"),
        (2, "merge", "--base", base, wrong, narrow, "--out", tmp_path / "none"),
        (2, "merge", "--base", base, tmp_path / HOSTILE, "--out", tmp_path / "none"),
        (0, "checkpoint", "inspect", models[1]),
        (0, "checkpoint", "inspect", models[1], "--json"),
        (0, "checkpoint", "inspect", tmp_path / "out"),
        (0, "checkpoint", "diff", base, models[1]),
        (0, "checkpoint", "convert", models[1], "--out", tmp_path / "converted\x1b[1m"),
        (0, "running", "status", state),
        (0, "running", "restore", state, "x\x1b[3Jy\n"),
        (0, "running", "label", state, "\x1b[3J"),
    ):
        ended, printed = run(*words)
        assert ended == code, printed
        assert not CONTROLS.search(printed), (words, printed)
        assert "\n  - forged" not in printed
        assert len(printed.splitlines()) < 40


def test_hostile_names_are_plain_text_in_a_model_card(run: Command, hostile: list[Path], tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    base, *models = hostile
    assert run("merge", "--base", base, *models, "--out", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert not CONTROLS.search(card)
    body = card.partition("---\n# ")[2]
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render("# " + body)
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;" in html


def test_a_message_is_one_line_a_problem_and_survives_another_process() -> None:
    for error in (
        MagMaxError(f"x: {HOSTILE}"),
        list_problems("two", [HOSTILE, "b" * 100_000]),
        UnfinishedError("a\nb"),
    ):
        for said in (error, pickle.loads(pickle.dumps(error))):
            assert type(said) is type(error)
            assert str(said) == str(error)
            assert not CONTROLS.search(str(said))
            assert len(str(said)) < 10_000
    assert str(list_problems("two", ["a\nb", "c"])) == "two (2 problems)\n  - a\\nb\n  - c"
    assert list_problems("two", ["a\nb", "c"]).problems == ["a\\nb", "c"]
    assert "é 模型 \N{ZERO WIDTH JOINER}" in str(MagMaxError("é 模型 \N{ZERO WIDTH JOINER}"))


def test_a_very_long_name_is_cut_in_messages(tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", {"w" * 100_000 + "end": np.ones(3, np.float32)})
    model = write_safetensors(tmp_path / "model.safetensors", {"w" * 100_000 + "end": np.ones(4, np.float32)})
    with pytest.raises(MagMaxError, match=r"www\.\.\.www.*end.*\[4\].*\[3\]") as caught:
        magmax.merge("magmax", base, [model], out=tmp_path / "out.safetensors")
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_show_change_nothing(encoding: str, tmp_path: Path) -> None:
    """Tensors, files and folders named beyond the terminal's encoding, and a file name that is no UTF-8."""
    base = write_safetensors(tmp_path / "base.safetensors", {"模型": np.ones(3, np.float32), "ids": np.arange(3)})
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xc3-model.safetensors"))
    write_safetensors(model, {"模型": np.full(3, 2, np.float32), "ids": np.arange(3)})
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    for out in ("ausgabe-é", "é.safetensors"):
        words = ["merge", "--base", str(base), os.fsencode(model), "--out", str(tmp_path / out)]
        command = [sys.executable, "-c", "from magmax.cli import main; main()", *words]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
    merged = open_checkpoint(tmp_path / "ausgabe-é")
    assert merged.read("模型", 0, 3).tolist() == [1.5, 1.5, 1.5]
    provenance = json.loads((tmp_path / "ausgabe-é" / "provenance.json").read_text())
    assert provenance["inputs"][1]["name"] == "\\udcff\\udcc3-model"


CONFIGS: dict[str, bytes] = {
    "deep": b'{"dtype": "float32", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep without dtype": b"[" * 100_000 + b"]" * 100_000,
    "a list": b'["dtype"]',
    "text": b'"dtype"',
    "not UTF-8": b'{"dtype": "\xff"}',
    "not JSON": b"{",
    "half a character": b'{"dtype": "float32", "a\\ud800": 1}',
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("of", ["base", "model"])
def test_any_config_is_copied_or_refused_before_any_work(kind: str, of: str, run: Command, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "model")):
        write_safetensors(tmp_path / name / "model.safetensors", small_model(seed))
        (tmp_path / name / "config.json").write_bytes(CONFIGS[kind] if name == of else b'{"dtype": "float32"}')
    merge = ("merge", "--base", tmp_path / "base", tmp_path / "model", "--out", tmp_path / "out")
    code, printed = run(*merge, "--dtype", "bfloat16")
    if of == "base" and kind != "half a character":
        assert code == 2
        assert f"{tmp_path / 'base' / 'config.json'}: cannot be given the dtype" in printed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]
    else:
        assert code == 0, printed
    code, printed = run(*merge)
    assert code == 0, printed
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modules.json", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "huge"])
def test_a_small_file_that_is_a_pipe_or_huge_stops_nothing_for_long(
    name: str, kind: str, run: Command, tmp_path: Path
) -> None:
    for seed, folder in enumerate(("base", "model")):
        write_safetensors(tmp_path / folder / "model.safetensors", small_model(seed))
        if kind == "pipe":
            os.mkfifo(tmp_path / folder / name)
        else:
            (tmp_path / folder / name).touch()
            os.truncate(tmp_path / folder / name, 1 << 40)
    words = ("merge", "--base", tmp_path / "base", tmp_path / "model", "--out", tmp_path / "out")
    code, printed = run(*words)
    assert code == 0 or (code == 2 and f"/{name}: has more than 200,000,000 bytes" in printed), printed


def test_a_long_name_does_not_widen_every_line_of_a_table(run: Command, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"a" * 100_000: np.ones(1), "b": np.ones(1)})
    code, printed = run("checkpoint", "inspect", path)
    assert code == 0
    assert max(map(len, printed.splitlines())) < 1000


HALF = "w\ud800"


def test_half_a_character_in_a_name_is_refused_before_any_work(tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", small_model(0))
    with pytest.raises(MagMaxError, match="half a character"):
        magmax.merge("magmax", {HALF: np.ones(3)}, [{HALF: np.ones(3)}], out=tmp_path / "out.safetensors")
    content = json.dumps({HALF: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "half.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(4))
    with pytest.raises(MagMaxError, match=r"half\.safetensors: the file has a header that is not JSON"):
        magmax.merge("magmax", base, [path], out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"package": "p", "recipe": ' + '{"a": ' * 500 + "1" + "}" * 501 + ', "inputs": []}',
        "7",
        "{}",
        '{"package": 5, "recipe": {}, "inputs": []}',
        '{"package": "p", "recipe": [], "inputs": []}',
        '{"package": "p", "recipe": {}, "inputs": 3}',
        '{"package": "p", "recipe": {}, "inputs": [3, {}]}',
        '{"package": "p", "recipe": {}, "inputs": [{"name": {}, "xxh3_128": []}]}',
        '{"package": "\\u001b[2J\\n", "recipe": {"\\u001b": 1}, "inputs": [{"name": "\\u001b\\n", "xxh3_128": ""}]}',
    ],
)
def test_inspect_takes_any_provenance(content: str, run: Command, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", small_model(0), {"magmax": content})
    for words in ([], ["--json"]):
        code, printed = run("checkpoint", "inspect", path, *words)
        assert code == 0, printed
        assert not CONTROLS.search(printed)
