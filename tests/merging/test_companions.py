"""What is copied beside a merged folder: the model's own small files, and nothing that merely lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.robustness.files import small_model, write_safetensors

import magmax
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.model_files import find_outside_links, model_files


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_files_at_the_top_and_in_the_known_folders_are_copied_and_no_others(tmp_path: Path) -> None:
    ours = {"config.json", "tokenizer.json", "merges.txt", "additional_chat_templates/tool_use.jinja"}
    modules = {"modules.json", "1_Pooling/config.json"}
    put(tmp_path, *ours, *modules)
    put(tmp_path, "model.safetensors", "model.safetensors.index.json", "provenance.json", "adapter_config.json")
    put(tmp_path, "lora/adapter_config.json", "checkpoint-500/trainer_state.json", "checkpoint-500/config.json")
    put(tmp_path, ".cache/x.json", ".hidden.json", "1_Pooling/deeper/config.json", "additional_chat_templates/.x.jinja")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]))
    assert model_files(tmp_path, None) == {name: tmp_path / name for name in ours | modules}


@pytest.mark.parametrize("content", ["", "[1]", '[{"path": "../outside"}]', '[{"path": ".."}]', "{}", '["path"]', "7"])
def test_modules_that_are_none_name_no_folder(content: str, tmp_path: Path) -> None:
    put(tmp_path, "outside/config.json", "base/config.json")
    (tmp_path / "base" / "modules.json").write_text(content)
    assert model_files(tmp_path / "base", None).keys() == {"config.json", "modules.json"}


def test_a_link_that_leads_out_of_the_folder_is_not_copied_and_that_is_noted(tmp_path: Path) -> None:
    """Whether it leads to a file, over another link, or to a folder; a link within the folder is the model's own."""
    base = tmp_path / "base"
    put(tmp_path, "secret.json", "base/config.json", "base/vocab-2.json", "base/tokenizer/vocab.json", "aside/x.json")
    write_safetensors(base / "model.safetensors", small_model(0))
    tuned = write_safetensors(tmp_path / "tuned.safetensors", small_model(1))
    (base / "vocab.json").symlink_to("vocab-2.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (base / "merges.txt").symlink_to("../secret.json")
    (base / "added_tokens.json").symlink_to("tokenizer.json")
    (base / "tokenizer" / "x.json").symlink_to(tmp_path / "secret.json")
    (base / "scheduler").symlink_to(tmp_path / "aside")
    notes: list[str] = []
    out = magmax.merge("magmax", base, [tuned], out=tmp_path / "out", execution=ExecutionOptions(note=notes.append))
    outside = ["added_tokens.json", "merges.txt", "scheduler", "tokenizer.json", "tokenizer/x.json"]
    assert notes == [f"{base}: {name} leads out of it, so it is not copied" for name in outside]
    copied = {str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".json", ".txt")}
    assert copied == {"config.json", "vocab-2.json", "vocab.json", "tokenizer/vocab.json", "provenance.json"}
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize("seen_through", ["itself", "a link"])
def test_a_folder_in_the_hubs_cache_links_to_its_own_blobs_alone(seen_through: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    put(tmp_path / "hub", "models--a--b/blobs/1", "models--a--b/blobs/2", "models--secret--c/blobs/3")
    put(tmp_path, "elsewhere/3", "x/snapshots/0123/config.json", "x/blobs/4")
    (snapshot / "tokenizer").mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "tokenizer" / "vocab.json").symlink_to("../../../blobs/2")
    (snapshot / "other.json").symlink_to("../../../models--secret--c/blobs/3")
    (snapshot / "secret.json").symlink_to(tmp_path / "elsewhere" / "3")
    (tmp_path / "link").symlink_to(snapshot)
    folder = snapshot if seen_through == "itself" else tmp_path / "link"
    assert model_files(folder, None).keys() == {"config.json", "tokenizer/vocab.json"}
    assert find_outside_links(folder) == ["other.json", "secret.json"]
    (tmp_path / "x" / "snapshots" / "0123" / "merges.txt").symlink_to("../../blobs/4")  # no cache of the hub
    assert model_files(tmp_path / "x" / "snapshots" / "0123", None).keys() == {"config.json"}
