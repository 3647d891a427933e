"""A checkpoint's weights in the module that its folder's config.json describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint
from ..checkpoints.memory import to_tensor
from ..checkpoints.renamed import RenamedCheckpoint
from ..errors import MagMaxError, missing_extra
from .pretrained import load_config
from .rescale import Coefficients, read_widened


@dataclass(frozen=True)
class LoadedModel:
    """A module that holds a checkpoint's weights, in float32 (float64 where they are).

    Attributes:
        names: for the key of each floating tensor in the module's state dict the checkpoint's name of it; one key alone
            for tensors that are tied.
    """

    module: nn.Module
    names: Mapping[str, str]

    def renamed(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint of the same model, by the module's keys."""
        present = {k: n for k, n in self.names.items() if checkpoint.resolve_alias(n) in checkpoint.specs}
        return RenamedCheckpoint(checkpoint, present)

    def in_files(self, coefficients: Coefficients) -> Coefficients:
        """Coefficients by the checkpoint's names."""
        return {self.names[key]: xi for key, xi in coefficients.items()}


def load_module(folder: Path, checkpoint: Checkpoint) -> LoadedModel:
    """Build what a folder's config.json describes, and put the checkpoint's weights in; no code of the folder is run.

    The class is the one that the config names, or its backbone, with a pooler or without: the first that finds all its
    weights in the checkpoint.

    Raises:
        MagMaxError: no config, an architecture that transformers has not, weights that are missing.
    """
    best: list[str] | None = None
    for module in _candidate_modules(folder):
        names, missing = _match_names(module, checkpoint)
        if not missing:
            _load_weights(module, checkpoint, names)
            float_names = {key: name for key, name in names.items() if module.state_dict()[key].is_floating_point()}
            return LoadedModel(module.eval(), _drop_tied(module, float_names))
        best = missing if best is None or len(missing) < len(best) else best
    told = ", ".join((best or [])[:3])
    raise MagMaxError(
        f"{checkpoint.label}: lacks {len(best or [])} weights of the model that {folder}/config.json describes "
        f"({told}); name the folder of the model's own architecture: --model FOLDER"
    )


def _candidate_modules(folder: Path) -> Iterator[nn.Module]:
    """The modules that a config may mean, with random weights."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise missing_extra(f"calibrating in feature space runs the model: it needs {error.name}", "train") from error
    backbone = partial(transformers.AutoModel.from_config, trust_remote_code=False)
    try:
        config: Any = load_config(folder, local_files_only=True)
        config.dtype = torch.float32
        named = [getattr(transformers, str(name), None) for name in config.architectures or []]
        models = [kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
        for make in [*models, backbone, partial(backbone, add_pooling_layer=False)]:
            module: nn.Module | None = None
            with suppress(TypeError), torch.random.fork_rng(devices=[]):  # not every model has a pooler to leave out
                module = make(config)
            if module is not None:
                yield module
    except MagMaxError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MagMaxError(f"{folder}: has no config.json of a model that transformers knows: {message}") from error


def _match_names(module: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """The checkpoint's name of each of the module's tensors, and those that it has not."""
    prefix = str(getattr(module, "base_model_prefix", "")) + "."
    state = module.state_dict()
    saved = _saved_names(module, state)
    renames: list[Callable[[str], str]] = [
        str,
        lambda key: prefix + key,
        lambda key: key.removeprefix(prefix),
        lambda key: saved.get(key, key),
    ]
    best: tuple[dict[str, str], list[str]] = {}, list(state)
    for rename in renames:
        names = {key: rename(key) for key in state if checkpoint.resolve_alias(rename(key)) in checkpoint.specs}
        there = {value.data_ptr() for key, value in state.items() if key in names}
        missing = [key for key, value in state.items() if key not in names and value.data_ptr() not in there]
        if len(missing) < len(best[1]):
            best = names, missing
    return best


def _saved_names(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what transformers calls the tensors in the files that it writes, where that is not what the module
    does.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 there was no difference
        return {}
    keys_by_storage = {(value.data_ptr(), value.shape): key for key, value in state.items()}
    saved = revert_weight_conversion(module, dict(state))  # pyright: ignore[reportArgumentType]
    places = {name: (value.data_ptr(), value.shape) for name, value in saved.items()}
    return {keys_by_storage[place]: name for name, place in places.items() if place in keys_by_storage}


def _load_weights(module: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    state = module.state_dict()
    for key, name in names.items():
        spec, value = checkpoint.spec(name), state[key]
        if tuple(value.shape) != spec.shape:
            raise MagMaxError(
                f"{checkpoint.label}: {name} has shape {list(spec.shape)}, but {list(value.shape)} in the model that "
                "the config describes; name the folder of the model's own architecture: --model FOLDER"
            )
        if spec.is_mergeable:
            value.copy_(torch.from_numpy(read_widened(checkpoint, name)).reshape(spec.shape))
        else:
            stored = checkpoint.read(checkpoint.resolve_alias(name), 0, spec.num_units)
            value.copy_(to_tensor(stored, spec, value))


def _drop_tied(module: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """One key for each tensor: the first by which the module knows it."""
    first: dict[int, str] = {}
    keys: dict[str, str] = {}
    for key, value in module.state_dict().items():
        first_key = first.setdefault(value.data_ptr(), key)
        if key in names:
            keys.setdefault(first_key, names[key])
    return keys
