"""Small models with a layer of every kind, in float64, and fine-tuned and merged weights for them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.groups = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.group_norm = nn.GroupNorm(2, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.group_norm(self.groups(x)))
        return self.last(x.mean((2, 3)))


class Attention(nn.Module):
    """q, k and v of one width; `separate`: keys and values of another width."""

    def __init__(self, separate: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=5 if separate else None, vdim=5)
        if not separate:
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.separate = separate
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        other = x[..., :5] if self.separate else x
        return self.last(x + self.attention(x, other, other, need_weights=False)[0])


class SharedLayer(nn.Module):
    """A layer that is called twice, with others before, between and after its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.shared, self.between, self.after = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(torch.tanh(self.before(x))))
        return self.after(torch.tanh(self.shared(torch.tanh(self.between(x)))))


class ScaleNorm(nn.Module):
    """Llama's kind of norm, found by its parameters alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class NonAffineNorm(ScaleNorm):
    """Of the same shape, and not affine in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.square()


class TiedEmbedding(nn.Module):
    """Token ids, with the word embeddings shared by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.norm, self.mix = ScaleNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.token = nn.Parameter(torch.zeros(6))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1])[None]) + self.token
        return self.head(torch.tanh(self.mix(self.norm(x))))


def build_model(model_class: type[nn.Module], *args: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(*args).double().eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
    return model


def make_task_states(model: nn.Module, tasks: int = 2, size: float = 0.1) -> tuple[State, list[State]]:
    """The base's weights, and task after task's: floating parameters moved at random, buffers as they are."""
    base = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    models = []
    for task in range(tasks):
        draw = torch.Generator().manual_seed(100 + task)
        moved = {id(p): size * torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in model.parameters()}
        models.append({key: v + moved[id(parameters[key])] if key in parameters else v for key, v in base.items()})
    return base, models


def average_states(base: State, models: list[State]) -> State:
    return {k: v + sum(m[k] - v for m in models) / len(models) if v.is_floating_point() else v for k, v in base.items()}


def copy_with_state(model: nn.Module, state: State) -> nn.Module:
    result = copy.deepcopy(model)
    result.load_state_dict(state)
    return result
