"""On the command line every refusal is exit code 2, words on stderr, nothing on stdout, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.robustness.conftest import read_folder
from tests.robustness.files import small_model, write_safetensors

from magmax import Running, cli

CommandLine = Callable[[Path], list[object]]


def merge(*words: object) -> CommandLine:
    return lambda folder: (
        ["merge", "--base", folder / "base.safetensors", "--out", folder / "out.safetensors"]
        + [
            folder / word if isinstance(word, str) and word.endswith((".safetensors", ".pt")) else word
            for word in words
        ]
    )


def in_folder(*words: str) -> CommandLine:
    """A command line in which words with a stroke in front are paths."""
    return lambda folder: [folder / word[1:] if word.startswith("/") else word for word in words]


REFUSED: dict[str, tuple[CommandLine, str]] = {
    "another shape": (merge("narrow.safetensors"), "weight has shape [20, 7], but [20, 8]"),
    "nan": (merge("nan.safetensors"), "1 NaN"),
    "cut": (merge("cut.safetensors"), "truncated"),
    "not there": (merge("nowhere.safetensors"), "no such file"),
    "twice": (merge("tuned.safetensors", "tuned.safetensors"), "two models have one name"),
    "no model": (merge(), "names no model"),
    "unknown rule": (merge("tuned.safetensors", "--rule", "magmaxx"), "did you mean 'magmax'"),
    "a rule that is no YAML": (merge("tuned.safetensors", "--rule", "{magmax: ["), "magmax"),
    "a rule with wrong options": (merge("tuned.safetensors", "--rule", "{kth_magnitude: {q: 2}}"), "q"),
    "a rule whose options are a number": (merge("tuned.safetensors", "--rule", "{kth_magnitude: 2}"), "kth_magnitude"),
    "an option of options that are none": (
        merge("tuned.safetensors", "--rule", "{kth_magnitude: 2}", "rule.k=2"),
        "kth_magnitude",
    ),
    "an assignment that is no YAML": (merge("tuned.safetensors", "scaling_factor=["), "scaling_factor"),
    "an assignment of text": (merge("tuned.safetensors", "scaling_factor=much"), "scaling_factor"),
    "an infinite factor": (merge("tuned.safetensors", "--scaling-factor", "inf"), "finite"),
    "an empty path": (merge("tuned.safetensors", ""), "error: "),
    "two empty paths": (merge("", ""), "error: "),
    "onto the base": (
        in_folder("merge", "--base", "/base.safetensors", "/tuned.safetensors", "--out", "/base.safetensors"),
        "is one of the inputs",
    ),
    "a name that is too long": (
        in_folder("merge", "--base", "/base.safetensors", "/tuned.safetensors", "--out", "/" + "x" * 300),
        "too long",
    ),
    "an output without a name": (
        in_folder("merge", "--base", "/base.safetensors", "/tuned.safetensors", "--out", "/empty/.."),
        "name",
    ),
    "dry run": (merge("narrow.safetensors", "--dry-run"), "weight has shape"),
    "absorb what does not fit": (in_folder("running", "absorb", "/state", "/narrow.safetensors"), "weight has shape"),
    "absorb again": (in_folder("running", "absorb", "/state", "/tuned.safetensors"), "absorbed already"),
    "absorb by another rule": (
        in_folder("running", "absorb", "/state", "/other.safetensors", "--rule", "average"),
        "average",
    ),
    "absorb into a model": (
        in_folder("running", "absorb", "/base.safetensors", "/tuned.safetensors", "--base", "/base.safetensors"),
        "is not a running merge",
    ),
    "absorb with a label like a number": (
        in_folder("running", "absorb", "/state", "/other.safetensors", "--label", "7"),
        "label",
    ),
    "the result of nothing": (
        in_folder("running", "result", "/empty", "--out", "/out.safetensors"),
        "is not a running merge",
    ),
    "the status of nothing": (in_folder("running", "status", "/nowhere"), "is not a running merge"),
    "the status of a damaged state": (in_folder("running", "status", "/damaged"), "state"),
    "restore what is not there": (in_folder("running", "restore", "/state", "best"), "'best'"),
    "inspect what is cut": (in_folder("checkpoint", "inspect", "/cut.safetensors"), "truncated"),
    "inspect nothing": (in_folder("checkpoint", "inspect", "/nowhere"), "no such file"),
    "diff with what is cut": (in_folder("checkpoint", "diff", "/base.safetensors", "/cut.safetensors"), "truncated"),
    "a recipe that is not there": (in_folder("merge", "/nowhere.yaml"), "nowhere.yaml"),
    "a recipe that is no YAML": (in_folder("merge", "/broken.yaml"), "broken.yaml"),
    "a recipe with a key too many": (in_folder("merge", "/extra.yaml"), "line 4"),
    "a sweep without a range": (in_folder("search", "sweep", "/extra.yaml"), "range"),
    "a sweep of nothing": (in_folder("search", "sweep", "/good.yaml", "scaling_factor=1:0:0"), "1:0:0"),
    "a sweep without end": (in_folder("search", "sweep", "/good.yaml", "scaling_factor=0:1e9:1e-9"), "1e9"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = write_safetensors(tmp_path / "base.safetensors", small_model(0))
    tuned = write_safetensors(tmp_path / "tuned.safetensors", small_model(1))
    write_safetensors(tmp_path / "other.safetensors", small_model(2))
    write_safetensors(tmp_path / "narrow.safetensors", small_model(3) | {"weight": np.ones((20, 7), np.float32)})
    bad = small_model(4)
    bad["bias"][2] = np.nan
    write_safetensors(tmp_path / "nan.safetensors", bad)
    (tmp_path / "cut.safetensors").write_bytes(tuned.read_bytes()[:-5])
    (tmp_path / "broken.yaml").write_text("base: [")
    good = "base: base.safetensors\nmodels: [tuned.safetensors]\nout: out.safetensors\n"
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "extra.yaml").write_text(good + "scale: 3\n")
    (tmp_path / "empty").mkdir()
    for name in ("state", "damaged"):
        Running(tmp_path / name, "magmax", base).absorb(tuned)
    (tmp_path / "damaged" / "state.json").write_text('{"format": 1, "rule": []}')
    return tmp_path


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_code_2_and_words_on_stderr(
    words: CommandLine,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["magmax", *map(str, words(folder))])
    before = read_folder(folder)
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert said in err
    assert "Traceback" not in err
    assert "merged" not in out
    assert read_folder(folder) == before
