"""The file of finished cells: several processes append to it, and what a killed one left harms nobody."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from magmax.continual.cell_store import CellStore
from magmax.errors import MagMaxError

COUNT = 50


def record(digest: str, **more: Any) -> dict[str, Any]:
    return {"digest": digest, "seed": 0, "value": 0.1, **more}


def append_many(out: Path, name: str, begin: Any) -> None:
    begin.wait()
    for n in range(COUNT):
        CellStore(out).append(record(f"{name}-{n}", words="ä" * (n * 200)))


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    """A store of two records."""
    found = CellStore(tmp_path / "out")
    for digest in "ab":
        found.append(record(digest))
    return found


def add(store: CellStore, text: str) -> None:
    with store.file.open("a") as file:
        file.write(text)


def test_a_record_is_a_line_and_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "out")
    assert (store.exists(), store.records(), store.find("a")) == (False, [], None)
    given = record("a", value=0.1 + 0.2, words="two\nlines \u2028", rows={"1": [1e-300, float("nan")]})
    store.append(given)
    (found,) = store.records()
    assert json.dumps(found) == json.dumps(given)
    assert store.file.read_bytes() == json.dumps(given, separators=(",", ":")).encode() + b"\n"
    assert store.exists()


def test_two_processes_append_at_once_and_every_record_is_whole(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    begin = spawn.Barrier(2)
    writers = [spawn.Process(target=append_many, args=(tmp_path, name, begin)) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = CellStore(tmp_path).by_digest()
    assert found == {
        f"{name}-{n}": record(f"{name}-{n}", words="ä" * (n * 200)) for name in ("one", "two") for n in range(COUNT)
    }
    assert len(CellStore(tmp_path).file.read_bytes().splitlines()) == 2 * COUNT


@pytest.mark.parametrize("torn", ['{"digest":"c","val', '{"digest":"c"}', "\0\0\0", '{"digest":\n', "[1]\n", "\n"])
def test_a_torn_last_line_is_ignored_and_cut_by_the_next_writer(store: CellStore, torn: str) -> None:
    whole = store.file.read_bytes()
    add(store, torn)
    assert [each["digest"] for each in store.records()] == ["a", "b"]
    assert store.file.read_bytes() == whole + torn.encode(), "a reader changes nothing"
    store.append(record("d"))
    assert [each["digest"] for each in store.records()] == ["a", "b", "d"]
    assert store.file.read_bytes().startswith(whole + b'{"digest":"d"')


def test_a_file_that_holds_a_torn_line_alone_begins_anew(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    add(store, '{"digest":"a"')
    assert store.records() == []
    store.append(record("b"))
    assert store.records() == [record("b")]


@pytest.mark.parametrize("garbage", ["{", "", "[1, 2]", "<<<<<<< HEAD"])
def test_garbage_before_the_last_line_is_refused_with_its_place(store: CellStore, garbage: str) -> None:
    add(store, f"{garbage}\n{json.dumps(record('d'))}\n")
    with pytest.raises(MagMaxError, match=r"cells\.jsonl, line 3: is not a JSON object"):
        store.records()


def test_a_later_record_takes_the_place_of_an_earlier_one(store: CellStore) -> None:
    store.append(record("a", value=0.5))
    assert store.records() == [record("a", value=0.5), record("b")]
    assert store.find("a") == record("a", value=0.5)


def test_without_a_digest_the_recipe_tells_records_apart(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    for seed, value in ((0, 0.1), (1, 0.2), (0, 0.3)):
        store.append({"recipe": {"seed": seed}, "value": value})
    assert [each["value"] for each in store.records()] == [0.3, 0.2]


def test_the_files_of_an_earlier_version_are_read_beneath_the_lines(tmp_path: Path) -> None:
    store, folder = CellStore(tmp_path), tmp_path / "cells"
    folder.mkdir()
    for digest in "ab":
        (folder / f"magmax-seed0-{digest}.json").write_text(json.dumps(record(digest), indent=2) + "\n")
    (folder / "average-seed0-c.json").write_text("{")  # damaged: measured again
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert store.exists()
    assert store.records() == [record("a"), record("b")]
    store.append(record("b", value=0.5))
    store.append(record("c"))
    assert store.records() == [record("a"), record("b", value=0.5), record("c")]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.file.mkdir()
    with pytest.raises(MagMaxError, match=r"cells\.jsonl: cannot be read: Is a directory"):
        store.records()
    with pytest.raises(MagMaxError, match=r"cells\.jsonl: is a folder, which is not written to"):
        store.append(record("a"))


def test_what_a_full_disk_left_is_no_record(store: CellStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    class Full:
        """A file that takes ten bytes and then no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: Any) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            self.room -= (written := self.file.write(content[: self.room]))
            return written

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Full(real(path, *args, **options)))
    with pytest.raises(
        MagMaxError, match=r"cannot be written: No space left on device \(\d+ bytes\); the same command"
    ):
        store.append(record("c", words="long" * 10))
    monkeypatch.undo()
    assert [each["digest"] for each in store.records()] == ["a", "b"]
    store.append(record("c"))
    assert [each["digest"] for each in store.records()] == ["a", "b", "c"]
