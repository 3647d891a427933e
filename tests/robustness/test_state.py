"""A running merge that is given what is not its own, or whose files are not what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.robustness.files import small_model, write_safetensors

import magmax
from magmax import Running

Refusal = Callable[..., str]


@pytest.fixture
def state(base: Path, tuned: Path, tmp_path: Path) -> Path:
    """A running merge of one task, "tuned"."""
    Running(tmp_path / "state", "magmax", base).absorb(tuned)
    return tmp_path / "state"


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return write_safetensors(tmp_path / "second.safetensors", small_model(2))


def absorb(state: Path, tuned: Path, rule: str | None = None, base: Path | None = None) -> None:
    Running(state, rule, base).absorb(tuned)


def result(state: Path, out: Path) -> None:
    Running(state).result(out=out)


def test_another_rule_is_refused_with_both(state: Path, second: Path, refused: Refusal) -> None:
    words = refused(absorb, state, second, "average")
    assert str(state) in words
    assert "magmax" in words
    assert "average" in words


def test_another_base_is_refused(state: Path, second: Path, tmp_path: Path, refused: Refusal) -> None:
    other = write_safetensors(tmp_path / "other.safetensors", small_model(7))
    assert "the base is not the one it was begun with" in refused(absorb, state, second, None, other)


def test_a_base_that_changed_is_refused(
    state: Path, second: Path, base: Path, refused: Refusal, tmp_path: Path
) -> None:
    write_safetensors(base, small_model(7))
    assert "the base is not the one it was begun with" in refused(absorb, state, second)
    assert "the base is not the one it was begun with" in refused(result, state, tmp_path / "out.safetensors")


def test_a_base_that_is_gone_is_asked_for(state: Path, second: Path, base: Path, refused: Refusal) -> None:
    base.rename(base.with_name("moved.safetensors"))
    words = refused(absorb, state, second)
    assert str(base) in words
    assert "--base" in words
    absorb(state, second, None, base.with_name("moved.safetensors"))


def test_a_state_is_not_begun_without_a_base(tuned: Path, tmp_path: Path, refused: Refusal) -> None:
    assert "needs the base" in refused(absorb, tmp_path / "state", tuned)


def test_a_model_that_does_not_fit_leaves_the_state_alone(state: Path, tmp_path: Path, refused: Refusal) -> None:
    bad = small_model(2) | {"weight": np.ones((8, 20), np.float32)}
    words = refused(absorb, state, write_safetensors(tmp_path / "bad.safetensors", bad))
    assert "weight has shape [8, 20], but [20, 8]" in words


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_with_bad_values_leaves_the_state_alone(
    value: float, state: Path, tmp_path: Path, refused: Refusal
) -> None:
    bad = small_model(2)
    bad["weight"][3, 3] = value
    assert "weight holds" in refused(absorb, state, write_safetensors(tmp_path / "bad.safetensors", bad))


def test_a_task_is_absorbed_once(state: Path, tuned: Path, tmp_path: Path, refused: Refusal) -> None:
    assert "was absorbed already, as 'tuned'" in refused(absorb, state, tuned)
    assert "was absorbed already" in refused(
        absorb, state, write_safetensors(tmp_path / "copy.safetensors", small_model(1))
    )


def test_the_base_is_no_task(state: Path, base: Path, refused: Refusal) -> None:
    assert "is the same file as" in refused(absorb, state, base)


def test_what_is_no_state_is_refused_and_left_alone(base: Path, tuned: Path, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("precious")
    assert "is not a running merge" in refused(absorb, tmp_path / "thesis", tuned, None, base)
    assert "is not a running merge" in refused(absorb, base, tuned, None, base)


def test_a_flipped_bit_of_a_version_is_found(state: Path, second: Path, tmp_path: Path, refused: Refusal) -> None:
    weights = state / "generation-000001" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "changed or damaged" in refused(absorb, state, second)
    assert "changed or damaged" in refused(result, state, tmp_path / "out.safetensors")


def test_a_cut_or_missing_version_is_found(state: Path, second: Path, refused: Refusal) -> None:
    weights = state / "generation-000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in refused(absorb, state, second)
    weights.unlink()
    assert str(weights.parent) in refused(absorb, state, second)
    shutil.rmtree(weights.parent)
    assert "version 1 is missing" in refused(absorb, state, second)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda s: [s],
    "null": lambda s: None,
    "empty": lambda s: {},
    "another format": lambda s: s | {"format": 99},
    "no rule": lambda s: {k: v for k, v in s.items() if k != "rule"},
    "a rule that is text": lambda s: s | {"rule": "magmax"},
    "a rule that is a list": lambda s: s | {"rule": [["magmax", {}]]},
    "two rules": lambda s: s | {"rule": {"magmax": {}, "average": {}}},
    "an unknown rule": lambda s: s | {"rule": {"magmin": {}}},
    "options that are a number": lambda s: s | {"rule": {"magmax": 5}},
    "no base": lambda s: s | {"base": None},
    "a base path that is a number": lambda s: s | {"base": s["base"] | {"path": 5}},
    "a current version that is not listed": lambda s: s | {"current": 7},
    "a current version that is text": lambda s: s | {"current": "1"},
    "a current version that is a list": lambda s: s | {"current": [1]},
    "no versions": lambda s: s | {"generations": []},
    "versions that are a number": lambda s: s | {"generations": 1},
    "a version that is text": lambda s: s | {"generations": ["1"]},
    "a version without a number": lambda s: s | {"generations": [s["generations"][0] | {"number": None}]},
    "tasks that are null": lambda s: s | {"generations": [s["generations"][0] | {"tasks": None}]},
    "tasks that are text": lambda s: s | {"generations": [s["generations"][0] | {"tasks": ["tuned"]}]},
    "slots that are null": lambda s: s | {"generations": [s["generations"][0] | {"slots": None}]},
    "a map of winners that it never had": lambda s: s | {"winners": True},
    "winners that are a number": lambda s: s | {"winners": 3},
    "no slots": lambda s: s | {"generations": [s["generations"][0] | {"slots": []}]},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_state_file_that_is_none_is_refused_by_name(
    change: Callable[[dict[str, Any]], Any], state: Path, second: Path, refused: Refusal
) -> None:
    file = state / "state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    words = refused(absorb, state, second)
    assert str(state) in words or "magmin" in words


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000])
def test_a_state_file_that_is_not_json_is_refused_by_name(
    text: bytes, state: Path, second: Path, refused: Refusal
) -> None:
    (state / "state.json").write_bytes(text)
    assert str(state / "state.json") in refused(absorb, state, second)


def test_a_state_file_that_is_a_folder_is_refused(state: Path, second: Path, refused: Refusal) -> None:
    (state / "state.json").unlink()
    (state / "state.json").mkdir()
    assert str(state) in refused(absorb, state, second)


def test_an_object_that_did_not_see_the_last_absorption_loses_nothing(
    state: Path, second: Path, tmp_path: Path
) -> None:
    """Two processes opened the state; the one that comes second must not undo what the first has done."""
    third = write_safetensors(tmp_path / "third.safetensors", small_model(3))
    Running(state).label("first")
    early, late = Running(state), Running(state)
    early.absorb(second)
    try:
        late.absorb(third)
        wanted = ["tuned", "second", "third"]
    except magmax.MagMaxError:
        wanted = ["tuned", "second"]
    assert [task.name for task in Running(state).tasks] == wanted


def test_labels_of_a_stale_object_lose_nothing(state: Path, second: Path) -> None:
    early, late = Running(state), Running(state)
    early.absorb(second)
    try:
        late.label("good")
    except magmax.MagMaxError:
        assert "good" not in [g.label for g in Running(state).status().versions]
    assert [task.name for task in Running(state).tasks] == ["tuned", "second"]
    Running(state).result(out=state.with_name("out.safetensors"))


def test_a_version_that_is_not_there_cannot_be_restored(state: Path, refused: Refusal) -> None:
    words = refused(Running(state).restore, "best")
    assert "'best'" in words
    assert "it has 1" in words
