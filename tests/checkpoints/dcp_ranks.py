"""What two processes save with torch.distributed.checkpoint: run as `dcp_ranks.py FOLDER RANK`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

RANKS = 2
ROWS = (Shard(0),)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 2)
        self.model = torch.nn.ModuleDict({"head": torch.nn.Linear(5, 1)})
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mean", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["head"](self.conv(x).mean((2, 3)))


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    net = Net()
    fully_shard(net)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    whole = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, optimizer)}
    dcp.save(whole, checkpoint_id=folder / "fsdp")

    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    draw = torch.Generator().manual_seed(1)

    def spread(*shape: int, kind: torch.dtype = torch.float32, mesh=line, how=ROWS) -> torch.Tensor:
        return distribute_tensor(torch.randn(*shape, generator=draw).to(kind), mesh, list(how))

    tensors = {
        "rows": spread(5, 7),
        "rows.one": spread(1, 4),
        "rows.transposed": distribute_tensor(torch.randn(6, 8, generator=draw).t(), line, [Shard(0)]),
        "columns": spread(4, 9, how=[Shard(1)]),
        "last": spread(3, 4, 5, kind=torch.bfloat16, how=[Shard(2)]),
        "middle": spread(3, 5, 6, kind=torch.float16, how=[Shard(1)]),
        "flat": spread(11, kind=torch.float64),
        "whole": spread(4, 4, how=[Replicate()]),
        "square": spread(5, 7, mesh=square, how=[Shard(0), Shard(1)]),
        "wide": spread(2, 600, how=[Shard(1)]),
        "numbers": distribute_tensor(torch.arange(35).reshape(5, 7), line, [Shard(1)]),
        "mask": distribute_tensor(torch.rand(7, 3, generator=draw) > 0.5, line, [Shard(0)]),
        "scalar": torch.tensor(1.5),
        "nothing": torch.zeros(0, 3),
    }
    dcp.save(tensors, checkpoint_id=folder / "tensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
