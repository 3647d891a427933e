from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tests.models import save_tensors, small_model

ENTRY_POINTS = """\
[magmax.data]
toy_blobs = tests.continual.toys:blobs
team_texts = tests.continual.fsdp_ranks:texts
[magmax.model]
toy_encoder = tests.continual.toys:encoder
toy_batch_norm_encoder = tests.continual.toys:batch_norm_encoder
team_encoder = tests.continual.fsdp_ranks:encoder
[magmax.head]
toy_head = tests.continual.toys:head
team_head = tests.continual.fsdp_ranks:head
[magmax.score]
peak = tests.search.scores:peak
two_tasks = tests.search.scores:two_tasks
slow_peak = tests.search.scores:slow_peak
nan_score = tests.search.scores:nan_score
moody = tests.search.scores:moody
"""
"""What an installed package would register, so that recipes of tests may name it, in worker processes too."""


def pytest_configure(config: pytest.Config) -> None:
    installed = tempfile.TemporaryDirectory(prefix="magmax-tests-")
    config.add_cleanup(installed.cleanup)
    metadata = Path(installed.name) / "magmax_test_parts-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: magmax-test-parts\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    root = Path(__file__).parents[1]
    sys.path += [str(root), installed.name]
    places = [str(root / "src"), str(root), installed.name, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and four fine-tuned models on disk."""
    base = save_tensors(small_model(0), tmp_path / "in" / "base.safetensors")
    return base, [save_tensors(small_model(n), tmp_path / "in" / f"task{n}.safetensors") for n in range(1, 5)]
