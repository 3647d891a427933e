"""A state dict as a torch module, for rivals that merge modules."""

import torch
from in_memory import load
from torch import nn


def build_module(path: str) -> nn.Module:
    """Nested modules whose state dict is the file's, name for name."""
    root = nn.Module()
    for name, tensor in load(path).items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def module_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
