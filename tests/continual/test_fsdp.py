"""One model cut over two processes by FSDP2: it learns what one process learns, and what it saves merges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.continual import fsdp_ranks as ranks  # noqa: E402
from tests.continual.conftest import tiny_encoder  # noqa: E402
from tests.continual.test_resume import outcome  # noqa: E402
from torch import nn  # noqa: E402

from magmax import cli  # noqa: E402
from magmax.continual.training.fit import FitSettings, fit  # noqa: E402
from magmax.continual.training.parallel import check_team, layer_blocks, shard  # noqa: E402
from magmax.continual.training.weight_files import read_metadata, write_tensors  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

pytestmark = pytest.mark.timeout(600)  # two launches, which a busy machine slows down


def two_processes(*command: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *command]
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(start, env=there, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, until one of them was killed."""
    folder = tmp_path_factory.mktemp("fsdp")
    done = two_processes("tests.continual.fsdp_ranks", str(folder))
    assert (folder / "reached").exists(), done.stderr
    assert done.returncode != 0
    return folder


@pytest.mark.parametrize("run", ranks.RUNS)
def test_two_processes_with_half_a_model_each_end_where_one_does(run: str, folder: Path, tmp_path: Path) -> None:
    """The order of sums differs. In float32 weights agree within 1e-4 and losses within 1e-5 of their size; in
    bfloat16, where a sign of AdamW's small steps may turn, losses within 1e-2. Metrics agree within one example."""
    alone = ranks.training(run, tmp_path).run()
    ours, theirs = tmp_path / run, folder / "team" / run
    costs = [json.loads((where / "costs.json").read_text()) for where in (ours, theirs)]
    rel = 1e-2 if run == "bfloat16" else 1e-5
    assert [costs[0][t]["loss"] for t in "12"] == pytest.approx([costs[1][t]["loss"] for t in "12"], rel=rel)
    for name in ("theta_1", "theta_2") if run != "bfloat16" else ():
        here, there = (load_file(where / f"{name}.safetensors") for where in (ours, theirs))
        assert here.keys() == there.keys()
        for key, tensor in here.items():
            torch.testing.assert_close(tensor, there[key], rtol=0, atol=1e-4)
    found = json.loads((theirs / "metrics.json").read_text())
    for what, rows in alone.items():
        for i, row in rows.items():
            np.testing.assert_allclose(found[what][i]["tasks"], row["tasks"], atol=1 / 24 + 1e-9)


def test_the_runs_compared_differ_from_each_other_and_from_where_they_began(folder: Path) -> None:
    found = {run: load_file(folder / "team" / run / "theta_2.safetensors") for run in ranks.RUNS}
    found["begin"] = load_file(folder / "team" / "sequential" / "theta_0.safetensors")
    key, frozen = "encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"
    for one in found:
        for other in found:
            assert torch.equal(found[one][frozen], found[other][frozen])
            assert one == other or (found[one][key] - found[other][key]).abs().max() > 1e-3, (one, other)


def test_a_killed_training_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    killed, whole = folder / "killed" / "sequential", folder / "team" / "sequential"
    snapshot = killed / "step_2.safetensors"
    assert not (killed / "theta_2.safetensors").exists()
    told = read_metadata(snapshot)
    losses = json.loads(told["losses"])
    assert len(losses) == 6
    losses[0] += 8000  # a mark of this snapshot, which decides no weight
    write_tensors(load_file(snapshot), snapshot, {**told, "losses": json.dumps(losses)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(ranks.RECIPE))
    done = two_processes("magmax.cli", "train", str(recipe), "parallel=fsdp", "--out", str(killed), "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert outcome(killed) == outcome(whole)
    costs = [json.loads((where / "costs.json").read_text()) for where in (killed, whole)]
    assert costs[0]["2"]["loss"] - costs[1]["2"]["loss"] == pytest.approx(8000 / 8)


def test_each_process_has_half_of_the_model_while_it_trains(folder: Path) -> None:
    shares = [json.loads((folder / f"shares_{rank}.json").read_text()) for rank in range(2)]
    assert len(shares[0]) == 3
    for ours, theirs in zip(*shares, strict=True):
        assert ours + theirs == pytest.approx(1, abs=1e-12)
        assert ours == pytest.approx(0.5, abs=0.01)


def test_an_encoder_saved_by_fsdp2_merges_as_it_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    save_file({key: tensor.contiguous() for key, tensor in tiny_encoder().model.state_dict().items()}, "base")
    Path("base").rename("base.safetensors")
    for suffix, out in (("", "direct.safetensors"), (".safetensors", "gathered.safetensors")):
        told = f"magmax merge --base base.safetensors cars{suffix} digits{suffix} --out {out}"
        monkeypatch.setattr(sys, "argv", told.split())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    direct, gathered, cars = (load_file(f"{n}.safetensors") for n in ("direct", "gathered", "cars"))
    assert direct.keys() == gathered.keys() == cars.keys()
    assert all(torch.equal(direct[key], gathered[key]) for key in direct)
    assert any(not torch.equal(direct[key], tensor) for key, tensor in load_file("base.safetensors").items())


def test_one_process_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**ranks.RECIPE, "parallel": "fsdp"}))
    monkeypatch.setattr(sys, "argv", ["magmax", "train", str(recipe), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "over several processes, and this is one; start it with torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    found, train = ranks.encoder(), ranks.texts().train
    with pytest.raises(MagMaxError, match="and this is one"):
        fit(found.model, train, ranks.make_loss(found), FitSettings(steps=1), 0, parallel="fsdp")


def test_a_layout_that_is_none_is_refused(tmp_path: Path) -> None:
    from magmax.continual.experiment_file import read_experiment

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(ranks.RECIPE))
    with pytest.raises(MagMaxError, match=r"parallel: .*'ddp' or 'fsdp'"):
        read_experiment(str(recipe), ["parallel=zero"])


def test_a_training_begun_with_one_layout_may_go_on_with_the_other() -> None:
    told = [ranks.experiment("sequential", parallel=how).training_recipe(0, "sequential") for how in ("ddp", "fsdp")]
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_what_accelerate_would_cut_by_itself_is_refused(kind: str) -> None:
    from accelerate.utils import DistributedType

    team: Any = SimpleNamespace(num_processes=2, distributed_type=DistributedType(kind))
    with pytest.raises(MagMaxError, match=f"configured for {kind}; let it start the processes only"):
        check_team(team, "ddp")


class Odd(nn.Module):
    """All that cannot be cut: a trained number, a weight of two layers, one that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.layers[2].weight = self.layers[0].weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.turned = nn.Parameter(torch.zeros(2, 3).T)
        self.temperature = nn.Parameter(torch.tensor(2.0), requires_grad=False)


def test_weights_that_cannot_be_cut_are_all_named_and_left_alone() -> None:
    model, mesh = Odd(), Any
    before = ranks.module_structure(model)
    with pytest.raises(MagMaxError, match="parallel: ddp leaves them whole") as caught:
        shard(model, mesh)  # pyright: ignore[reportArgumentType]
    told = str(caught.value)
    assert "scale: is a single number; give it a dimension, or freeze it" in told
    assert "layers.2.weight: is shared with another layer" in told
    assert "turned: its elements do not lie in order" in told
    assert "temperature" not in told
    assert ranks.module_structure(model) == before


def test_blocks_are_the_layers_of_an_encoder_and_of_nothing_smaller() -> None:
    bert = tiny_encoder().model
    assert layer_blocks(nn.ModuleDict({"body": bert})) == list(bert.encoder.layer)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3)
    assert layer_blocks(plain) == list(plain.layers)
    nested = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])) for _ in range(2)])
    assert layer_blocks(nn.Sequential(nested)) == list(nested)
    assert layer_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Dropout(), nn.Dropout()]))) == []
