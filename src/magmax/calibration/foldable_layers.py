"""Layers that can be folded: those whose features are affine in their own weights, whatever their input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Kind = Literal["linear", "conv", "norm", "embedding"]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module's call: by place, and by name."""
Change = Callable[[Mapping[str, Tensor], Inputs], Tensor]

LINEAR_TYPES: tuple[type[nn.Module], ...] = (nn.Linear,)
CONV_TYPES: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
NORM_TYPES: tuple[type[nn.Module], ...] = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
LAYER_TYPES: Mapping[Kind, tuple[type[nn.Module], ...]] = {
    "linear": LINEAR_TYPES,
    "conv": CONV_TYPES,
    "norm": NORM_TYPES,
    "embedding": (nn.Embedding,),
}


@dataclass(frozen=True)
class ParameterRows:
    """A parameter, or some rows of it (None: all)."""

    parameter: nn.Parameter
    rows: tuple[int, int] | None = None

    @property
    def values(self) -> Tensor:
        """A view of the values in the module."""
        whole = self.parameter.detach()
        return whole if self.rows is None else whole[self.rows[0] : self.rows[1]]

    @property
    def place(self) -> tuple[int, tuple[int, int] | None]:
        """Equal for two pieces that are one and the same weights."""
        return id(self.parameter), self.rows


@dataclass(frozen=True, eq=False)
class FoldablePart:
    """The weights of a layer, or of a projection inside one, that share one coefficient.

    Attributes:
        pieces: its parameters, by their names in the layer.
        change: the change of its features when its parameters change by so much: layer(x; theta + delta) -
            layer(x; theta), the same for every theta.
        sure: whether `change` is known to be exact; otherwise `is_affine` says so for an input.
    """

    name: str
    kind: Kind
    module: nn.Module
    pieces: Mapping[str, ParameterRows]
    change: Change
    sure: bool = True

    @property
    def compute(self) -> torch.dtype:
        """The type its features are measured in."""
        return torch.float64 if next(iter(self.pieces.values())).parameter.dtype == torch.float64 else torch.float32

    def magnitudes(self, features: Tensor, squared: bool = False, whole: bool = False) -> Tensor:
        """The L1 norm (or L2) of the features at every place: a token's, a channel's of a convolution, a norm's whole.

        Features of an input of one sample, as the layer gives them; the result is flat. `whole`: of all of it at once.
        """
        if whole or self.kind == "norm":
            flat = features.reshape(1, -1)
        elif self.kind == "conv":
            flat = features.flatten(-(next(iter(self.pieces.values())).parameter.dim() - 2)).flatten(0, -2)
        else:
            flat = features.reshape(-1, features.shape[-1])
        flat = flat.double()
        return flat.square().sum(-1).sqrt() if squared else flat.abs().sum(-1)

    def is_affine(self, base: Mapping[str, Tensor], delta: Mapping[str, Tensor], inputs: Inputs) -> bool:
        """Whether, for this input, features move by `change` from the base as from zero; to 1 part in 1000."""
        there = {name: base[name] + delta[name] for name in base}
        moved = run_with_parameters(self.module, there, inputs) - run_with_parameters(self.module, base, inputs)
        scale = run_with_parameters(self.module, base, inputs).abs().max() + moved.abs().max()
        return bool((moved - self.change(delta, inputs)).abs().max() <= 1e-3 * moved.abs().max() + 1e-5 * scale)


@dataclass(frozen=True, eq=False)
class LayerStage:
    """Parts that see one call at one time; `inputs` makes each part's own input of the call's."""

    parts: Sequence[FoldablePart]
    inputs: Callable[[Inputs], Sequence[Inputs]]


@dataclass(frozen=True, eq=False)
class FoldableLayer:
    """A module whose calls are watched. A later stage sees what the earlier ones, calibrated, make of the input."""

    name: str
    module: nn.Module
    stages: Sequence[LayerStage]


def find_foldable_layers(model: nn.Module) -> tuple[list[FoldableLayer], dict[str, str]]:
    """The layers that can be folded, and why each other module that owns parameters cannot, by name."""
    sites: list[FoldableLayer] = []
    left: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or module in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(module.out_proj)
            sites.append(_split_attention(name, module))
            if extra := [key for key in ("bias_k", "bias_v") if getattr(module, key) is not None]:
                left[name] = f"{' and '.join(extra)} of MultiheadAttention cannot be folded"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            left[name] = "an Embedding with max_norm is not affine in its weights"
        elif kind := _layer_kind(module, parameters):
            part = _make_layer(name, kind, module, parameters)
            sites.append(FoldableLayer(name, module, [LayerStage([part], lambda inputs: [inputs])]))
        else:
            left[name or type(module).__name__] = (
                f"{type(module).__name__} with {', '.join(parameters)} is no kind of layer that can be folded"
            )
    return sites, left


def run_with_parameters(module: nn.Module, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """The module's features with other parameters, in their type."""
    like = next(iter(parameters.values()))
    buffers = {k: b.to(like.dtype) for k, b in module.named_buffers(recurse=False) if b.is_floating_point()}
    args, kwargs = cast_inputs(inputs, like.dtype)
    return functional_call(module, {**buffers, **parameters}, args, kwargs)


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with floating tensors in this type."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, inputs[0])), {key: cast(value) for key, value in inputs[1].items()}


def _layer_kind(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Kind | None:
    for kind, types in LAYER_TYPES.items():
        if isinstance(module, types):
            return kind
    if type(module).__name__ == "Conv1D" and set(parameters) == {"weight", "bias"} and parameters["weight"].dim() == 2:
        return "linear"  # GPT-2's, whose weight is (inputs, outputs)
    one_dimensional = all(parameter.dim() == 1 for parameter in parameters.values())
    if (
        one_dimensional
        and "weight" in parameters
        and set(parameters) <= {"weight", "bias"}
        and not any(module.children())
    ):
        return "norm"  # such as Llama's
    return None


def _make_layer(name: str, kind: Kind, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> FoldablePart:
    sure = any(type(module).forward is ancestor.forward for ancestor in _matching_types(module, LAYER_TYPES[kind]))

    def change(delta: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        moved = run_with_parameters(module, delta, inputs)
        if sure:
            return moved
        return moved - run_with_parameters(
            module, {key: torch.zeros_like(value) for key, value in delta.items()}, inputs
        )

    pieces = {key: ParameterRows(parameter) for key, parameter in parameters.items()}
    return FoldablePart(name or type(module).__name__, kind, module, pieces, change, sure)


def _matching_types(module: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[type[nn.Module]]:
    return (kind for kind in types if isinstance(module, kind))


def _split_attention(name: str, module: nn.MultiheadAttention) -> FoldableLayer:
    """q, k and v on the layer's inputs; then the output projection, on what the heads make of them."""
    prefix, width = f"{name}." if name else "", module.embed_dim
    first: list[FoldablePart] = []
    for place, letter in enumerate("qkv"):
        rows = (place * width, (place + 1) * width)
        separate: Any = getattr(module, f"{letter}_proj_weight")
        if separate is None:
            pieces = {"weight": ParameterRows(_require_parameter(module.in_proj_weight), rows)}
        else:
            pieces = {"weight": ParameterRows(separate)}
        if module.in_proj_bias is not None:
            pieces["bias"] = ParameterRows(_require_parameter(module.in_proj_bias), rows)
        first.append(FoldablePart(f"{prefix}{letter}", "linear", module, pieces, _projection_change))
    output_parameters = module.out_proj.named_parameters()
    last = {key: ParameterRows(parameter) for key, parameter in output_parameters}
    out = FoldablePart(f"{prefix}out_proj", "linear", module, last, _projection_change)

    def queries(inputs: Inputs) -> list[Inputs]:
        arguments = dict(zip(("query", "key", "value"), inputs[0], strict=False)) | inputs[1]
        return [((arguments[word],), {}) for word in ("query", "key", "value")]

    def heads(inputs: Inputs) -> list[Inputs]:
        weight = module.out_proj.weight
        output_parameters = {"out_proj.weight": torch.eye(width, dtype=weight.dtype, device=weight.device)}
        if module.out_proj.bias is not None:
            output_parameters["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        return [((functional_call(module, output_parameters, *inputs)[0],), {})]

    return FoldableLayer(name, module, [LayerStage(first, queries), LayerStage([out], heads)])


def _require_parameter(parameter: nn.Parameter | None) -> nn.Parameter:
    assert parameter is not None
    return parameter


def _projection_change(delta: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    args, _ = cast_inputs(inputs, delta["weight"].dtype)
    return nn.functional.linear(args[0], delta["weight"], delta.get("bias"))
