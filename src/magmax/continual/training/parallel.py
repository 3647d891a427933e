"""One model on several processes: a copy of it on each (DDP), or a part of it on each (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import MagMaxError, list_problems
from ..experiment import Parallel

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh


def check_team(team: Accelerator | None, parallel: Parallel) -> None:
    """Raises MagMaxError where these processes cannot share a model in this way."""
    if parallel == "fsdp" and (team is None or team.num_processes < 2):
        raise MagMaxError(
            "parallel: fsdp cuts a model over several processes, and this is one; start it with torchrun "
            "--nproc-per-node 2 -m magmax.cli train RECIPE --out OUT, or leave parallel out"
        )
    if team and team.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise MagMaxError(
            f"accelerate is configured for {team.distributed_type.value}; let it start the processes only, and write "
            "parallel: fsdp into the recipe"
        )


@contextmanager
def distribute(
    step: nn.Module, team: Accelerator | None, parallel: Parallel, reads_weights: bool
) -> Iterator[nn.Module]:
    """Return what every process of a team calls instead of `step`; afterwards its modules are whole again.

    After an exception a model that was cut stays so: putting it together takes all processes, and one may be gone.

    Raises MagMaxError for processes and weights that `parallel` does not suit, and for weights used where they are cut.
    """
    check_team(team, parallel)
    if team is None:
        yield step
    elif parallel == "ddp":
        yield team.prepare(step)
        team.free_memory(step)
    else:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(team.device.type, (team.num_processes,))
        join = shard(step.to(team.device), mesh, reads_weights)
        try:
            yield step
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            raise MagMaxError(
                "weights of a layer were used outside of its forward pass, where parallel: fsdp has them cut; a loss "
                f"that computes with weights needs reads_weights = True, any other use needs parallel: ddp ({error})"
            ) from error
        join()


def shard(root: nn.Module, mesh: DeviceMesh, reads_weights: bool = False) -> Callable[[], None]:
    """Cuts a module's weights over the processes of a mesh, in place; returns what puts it back as it was.

    FSDP2: each of its `blocks` is a group, and the rest is one. A group's weights are whole, in their own type, while
    it computes, forward and backward; with `reads_weights` also in between, for a loss that takes them itself.
    Gradients are means over processes. Frozen weights are cut, too; frozen single numbers are not.

    Raises MagMaxError, with all problems at once, for weights that cannot be cut.
    """
    from torch.distributed._composable_state import _module_state_mapping  # pyright: ignore[reportPrivateUsage]
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    parts = [*layer_blocks(root), root]
    if problems := _sharding_problems(root, parts[:-1]):
        raise list_problems("these weights cannot be cut over processes; parallel: ddp leaves them whole", problems)
    before = [_OriginalModule(module) for module in root.modules()]
    numbers = {p for p in root.parameters() if p.ndim == 0}
    options: dict[str, Any] = {"ignored_params": numbers} if numbers else {}
    if reads_weights:
        options["reshard_after_forward"] = False
    for part in parts:
        parameters = [p for p in part.parameters() if p not in numbers and not isinstance(p, DTensor)]
        fully_shard(part, mesh=mesh, **options)
        for p in parameters:
            p.data = p.new_empty(0)
    for module in before:
        module.note_additions()

    def join() -> None:
        for buffer in root.buffers():
            torch.distributed.broadcast(buffer, 0)
        for module in before:
            module.restore()
            _module_state_mapping.pop(module.module, None)

    return join


def layer_blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of a deep model: the items of its outermost `ModuleList`s of several modules of one class."""
    if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(item) for item in module}) == 1:
        return [item for item in dict.fromkeys(module) if any(True for _ in item.parameters())]
    return list(dict.fromkeys(block for child in module.children() for block in layer_blocks(child)))


def gather(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes, which must all call this; itself, where it is not cut."""
    together = getattr(tensor, "full_tensor", None)
    return together() if together else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is; itself, where that is not cut. All processes must call this."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), mesh, like.placements)  # pyright: ignore[reportAttributeAccessIssue]


class _OriginalModule:
    """A module as it was before it was cut. FSDP2 has no way back of its own, and takes no module a second time."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.weights = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        held = vars(module).items()
        self.hooks = {name: dict(hooks) for name, hooks in held if "_hooks" in name and isinstance(hooks, dict)}
        self.names = set(vars(module))
        self.added: set[str] = set()

    def note_additions(self) -> None:
        """Return what cutting alone put into the module; what training puts there later is left."""
        self.added = set(vars(self.module)) - self.names

    def restore(self) -> None:
        """The same module and the same parameters, with the weights that they have now."""
        for name, weight in self.weights.items():
            current = self.module.get_parameter(name)
            if current is not weight:
                with torch.no_grad():
                    weight.data = gather(current)
                setattr(self.module, name, weight)
        for name, found in self.hooks.items():
            hooks: dict[Any, Any] = vars(self.module)[name]
            hooks.clear()
            hooks.update(found)
        for name in self.added:
            vars(self.module).pop(name, None)
        self.module.__class__ = self.kind


def _sharding_problems(root: nn.Module, parts: Sequence[nn.Module]) -> list[str]:
    """Why the weights cannot be cut, each with its name in the model."""
    part_of = {module: part for part in parts for module in part.modules()}
    problems: list[str] = []
    owners: dict[nn.Parameter, nn.Module] = {}
    for path, module in root.named_modules():
        part = part_of.get(module, root)
        for key, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            name = key.removeprefix("model.")
            if p.ndim == 0 and p.requires_grad:
                problems.append(f"{name}: is a single number; give it a dimension, or freeze it")
            elif not p.is_contiguous():
                problems.append(f"{name}: its elements do not lie in order; replace it with its .contiguous()")
            if owners.setdefault(p, part) is not part:
                problems.append(f"{name}: is shared with another layer")
    return problems
