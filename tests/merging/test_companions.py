"""What is copied beside a merged folder: the model's own small files, and nothing that merely lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from magmax.merging.model_files import model_files


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
