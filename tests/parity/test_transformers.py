"""What magmax writes, transformers loads: the same tensors, ties, configuration and dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import models as reference
from tests.models import reference_merge

import magmax
from magmax import open_checkpoint
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.rules import as_rule

transformers = pytest.importorskip("transformers")


def tiny(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForMaskedLM(config)


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    for seed in range(3):
        tiny(seed).save_pretrained(tmp_path / str(seed))
    return [tmp_path / str(seed) for seed in range(3)]


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 5_000])
def test_a_merged_folder_loads_with_equal_tensors_and_ties(folders, shard_bytes, tmp_path):
    base, *tasks = folders
    opened = [open_checkpoint(path) for path in (base, *tasks)]
    options = OutputOptions(shard_bytes=shard_bytes)
    merge_job(as_rule("magmax"), opened[0], opened[1:], tmp_path / "merged", options).run()
    model, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = reference_merge(reference.magmax, tiny(0).state_dict(), [tiny(n).state_dict() for n in (1, 2)], 0.5)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_written_dtype_is_the_loaded_one(folders, tmp_path):
    base, *tasks = folders
    magmax.merge("magmax", base, tasks, out=tmp_path / "merged", dtype="bfloat16")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_modules_of_transformers_merge_in_memory_as_their_files_do(folders, tmp_path):
    base, *tasks = folders
    magmax.merge("average", base, tasks, out=tmp_path / "merged")
    from_files = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged").state_dict()
    in_memory = magmax.merge("average", tiny(0), [tiny(1), tiny(2)]).state_dict()
    assert all(torch.equal(in_memory[key], tensor) for key, tensor in from_files.items())
