"""What two processes do with one model cut over them: run by torchrun as `-m tests.continual.fsdp_ranks FOLDER`.

Also the parts of their recipe, which other processes take from here.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import save_file
from tests.continual.conftest import tiny_encoder
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from magmax.continual.data.datasets import Dataset, LabelledExamples
from magmax.continual.experiment import Experiment
from magmax.continual.models.text_encoder import TextEncoder
from magmax.continual.training.fit import FitSettings, fit
from magmax.continual.training.parallel import gather, shard
from magmax.continual.training.snapshot import FitSnapshot
from magmax.continual.training.trainer import ContinualTraining
from magmax.errors import MagMaxError

RECIPE: dict[str, Any] = {
    "data": "team_texts",
    "model": "team_encoder",
    "head": "team_head",
    "scenario": {"class_incremental": {"tasks": 2}},
    "fit": {"steps": 8, "batch": 7, "learning_rate": 0.003, "clip": 0.5},
    "training": ["sequential", {"lwf": {}}, {"ewc": {"samples": 6, "weight": 1000.0}}],
    "save_every": 3,
}
RUNS = ("sequential", "lwf", "ewc", "bfloat16")


def experiment(run: str, **changes: Any) -> Experiment:
    precision = {"precision": run} if run == "bfloat16" else {}
    return Experiment.model_validate({**RECIPE, **precision, **changes}).check()


def training(run: str, folder: Path, **changes: Any) -> ContinualTraining:
    return ContinualTraining(experiment(run, **changes), folder / run, "sequential" if run == "bfloat16" else run)


def encoder() -> TextEncoder:
    found = tiny_encoder(max_tokens=8)
    found.freeze_word_embeddings()
    return found


def texts() -> Dataset:
    """Texts of 4 classes; class c mostly uses the words 10c to 10c + 9."""

    def drawn(seed: int) -> LabelledExamples:
        random = np.random.default_rng(seed)
        labels = np.arange(48) % 4
        sizes = random.integers(3, 9, len(labels))
        words = [random.integers(10 * c, 10 * c + 10, n) for c, n in zip(labels, sizes, strict=True)]
        return LabelledExamples([" ".join(map(str, some)) for some in words], labels)

    return Dataset(drawn(1), drawn(2), [f"class {c}" for c in range(4)])


def head(encoder: TextEncoder, dataset: Dataset) -> Tensor:
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(len(dataset.classes), 16))).float()
    return 10 * nn.functional.normalize(rows, dim=-1)


def make_loss(encoder: TextEncoder) -> Any:
    rows = head(encoder, texts())
    return lambda items, labels: nn.functional.cross_entropy(encoder(items) @ rows.T, labels)


def module_structure(module: nn.Module) -> Any:
    """All that cutting changes of a module: classes, attributes, hooks and parameters, but not these' values."""

    def one(m: nn.Module) -> Any:
        hooks = {name: list(found) for name, found in vars(m).items() if "_hooks" in name}
        return type(m), sorted(vars(m)), hooks, [id(p) for p in m.parameters()]

    return [one(m) for m in module.modules()]


def check_shard_and_gather(team: Accelerator, folder: Path) -> None:
    """A model in a fit is cut, and afterwards it is as it was; what a process had of it goes into a file."""
    found, train = encoder(), texts().train
    before, elements = module_structure(found.model), sum(p.numel() for p in found.model.parameters())
    shares: list[float] = []

    def tell(done: int, total: int, note: str = "") -> None:
        shares.append(sum(p.to_local().numel() for p in found.model.parameters()) / elements)

    data = LabelledExamples(found.prepare(train.items), train.labels)
    fit(found.model, data, make_loss(found), FitSettings(steps=2), 0, progress=tell, team=team, parallel="fsdp")
    assert module_structure(found.model) == before
    copy.deepcopy(found.model)(torch.zeros(1, 2, dtype=torch.long))
    (folder / f"shares_{team.process_index}.json").write_text(json.dumps(shares))


class WeightDecayLoss:
    """A loss that computes with the weights themselves, and says so or not."""

    def __init__(self, reads_weights: bool) -> None:
        self.encoder, self.reads_weights = encoder(), reads_weights
        self.task_loss = make_loss(self.encoder)

    def __call__(self, items: Any, labels: Tensor) -> Tensor:
        return self.task_loss(items, labels) + sum(p.square().sum() for p in self.encoder.model.parameters())

    def fit(self, **how: Any) -> list[float]:
        train = texts().train
        data = LabelledExamples(self.encoder.prepare(train.items), train.labels)
        return fit(self.encoder.model, data, self, FitSettings(steps=3, learning_rate=0.01), 0, **how)


def check_weight_loss(team: Accelerator) -> None:
    """A loss that says that it reads weights has them whole; one that does not say so is told to."""
    alone, together = WeightDecayLoss(True).fit(), WeightDecayLoss(True).fit(team=team, parallel="fsdp")
    assert alone[2] < alone[0]
    assert together == pytest.approx(alone, rel=1e-5)
    with pytest.raises(MagMaxError, match="a loss that computes with weights needs reads_weights = True"):
        WeightDecayLoss(False).fit(team=team, parallel="fsdp")


def check_gradient_norm(team: Accelerator) -> None:
    """Gradients are clipped by the norm of all of them, not of a process's own: the same as where nothing is cut."""
    alone = encoder()
    cut = copy.deepcopy(alone)
    shard(cut.model, init_device_mesh("cpu", (2,)))
    for found in (alone, cut):
        found(found.prepare(texts().train.items[:8])).sum().backward()
    norms = [gather(nn.utils.clip_grad_norm_(found.model.parameters(), 1e-3)) for found in (alone, cut)]
    assert norms[0] > 0.1
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(alone.model.parameters(), cut.model.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(gather(theirs.grad), ours.grad, rtol=1e-4, atol=1e-9)


def save_distributed(team: Accelerator, folder: Path) -> None:
    """Two fine-tuned BERTs as users of FSDP2 cut and save them, and beside each its weights in one file."""
    for name, seed in (("cars", 1), ("digits", 2)):
        model = tiny_encoder().model
        for layer in model.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            ids = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(seed + 10 * team.process_index))
            model(ids).pooler_output.sum().backward()
            optimizer.step()
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / name)
        gathered = {key: gather(tensor).contiguous() for key, tensor in model.state_dict().items()}
        if team.is_main_process:
            save_file(gathered, folder / f"{name}.safetensors")


def train_until_killed(team: Accelerator, folder: Path) -> None:
    """The first process is killed when it has saved the second task's sixth step; the other one waits for it then."""
    save = FitSnapshot.save

    def saving(self: FitSnapshot, model: Any, optimizer: Any, losses: list[float], write: bool = True) -> None:
        save(self, model, optimizer, losses, write)
        if write and "step_2" in self.path.name and len(losses) == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    FitSnapshot.save = saving
    training("sequential", folder / "killed", parallel="fsdp").run(team=team)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    team = Accelerator(cpu=True)
    check_shard_and_gather(team, folder)
    check_gradient_norm(team)
    check_weight_loss(team)
    save_distributed(team, folder)
    for run in RUNS:
        training(run, folder / "team", parallel="fsdp").run(team=team)
    dist.barrier()
    (folder / "reached").touch()
    train_until_killed(team, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
