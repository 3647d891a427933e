"""FusionBench's two names for MagMax, with its signatures, defaults and mutation; the errors are ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MagMaxError
from .api import merge

BASE_NAME = "_pretrained_"


def magmax_merge(
    pretrained_model: Any, finetuned_models: Sequence[Any], scaling_factor: float = 1.0, inplace: bool = True
) -> Any:
    """Merge modules with MagMax into `pretrained_model`, or into a deep copy of it with inplace=False.

    Half precision is computed in float32 and rounded once, where FusionBench computes in half precision.

    Raises:
        ValueError: no fine-tuned model, or one whose tensors do not fit (every key and both shapes are named).
    """
    if not finetuned_models:
        raise MagMaxError("magmax_merge needs at least one fine-tuned model; the list is empty")
    merged = merge("magmax", dict(pretrained_model.state_dict()), list(finetuned_models), scaling_factor)
    model = pretrained_model if inplace else copy.deepcopy(pretrained_model)
    model.load_state_dict(merged)
    return model


class MagMaxAlgorithm:
    """FusionBench's method object: `run` merges a pool of models whose base is called `_pretrained_`."""

    def __init__(self, scaling_factor: float = 0.5, inplace: bool = True) -> None:
        self.scaling_factor = scaling_factor
        self.inplace = inplace

    def run(self, modelpool: Any) -> Any:
        """Merge a pool: a dict of modules, or an object with `load_model` and `model_names`.

        Raises:
            KeyError: the pool has no `_pretrained_`.
            ValueError: the pool has no other model, or models do not fit.
        """
        pool = modelpool if hasattr(modelpool, "load_model") else DictPool(modelpool)
        base = pool.load_model(BASE_NAME)
        models = [pool.load_model(name) for name in pool.model_names]
        return magmax_merge(base, models, self.scaling_factor, self.inplace)


class DictPool:
    """A dict or list of modules as a pool; names that begin and end with an underscore are special."""

    def __init__(self, models: Mapping[str, Any] | Sequence[Any]) -> None:
        pairs = models.items() if isinstance(models, Mapping) else ((str(n), m) for n, m in enumerate(models))
        self._models = dict(pairs)

    @property
    def model_names(self) -> list[str]:
        return [name for name in self._models if not (name.startswith("_") and name.endswith("_"))]

    def load_model(self, name: str) -> Any:
        if name not in self._models:
            raise KeyError(f"the pool has no model {name!r}; it has {', '.join(self._models) or 'none'}")
        return self._models[name]
