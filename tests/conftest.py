from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import save_tensors, small_model


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and four fine-tuned models on disk."""
    base = save_tensors(small_model(0), tmp_path / "in" / "base.safetensors")
    return base, [save_tensors(small_model(n), tmp_path / "in" / f"task{n}.safetensors") for n in range(1, 5)]
