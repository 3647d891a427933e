"""What mergekit's documentation says, tensor by tensor in plain torch: float64 on float32 task vectors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
LAYERS = 4
METHOD_DEFAULTS = {
    "linear": {"normalize": True},
    "ties": {"normalize": True},
    "della": {"normalize": True},
}
MODEL_DEFAULTS = {"lambda": 1.0, "density": 1.0, "gamma": 0.01, "scale": 1.0}


def setting_value(setting: Any, key: str) -> float | None:
    """A setting for one tensor: a number, a gradient, or the first filter that is a part of the name."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        fitting = (item["value"] for item in setting if item.get("filter", "*") == "*" or item["filter"] in key)
        return next((setting_value(value, key) for value in fitting), None)
    if isinstance(setting, list):
        depth = int(key.split(".")[2]) / (LAYERS - 1) if ".layers." in key else 0.0
        place = depth * (len(setting) - 1)
        low = min(int(place), len(setting) - 2)
        return setting[low] + (place - low) * (setting[low + 1] - setting[low])
    return None if setting is None else float(setting)


class ReferenceMerge:
    """A recipe over the models' tensors by their names."""

    def __init__(self, recipe: dict[str, Any], models: dict[str, Tensors]) -> None:
        self.recipe, self.models, self.method = recipe, models, recipe["merge_method"]
        listed = recipe["slices"][0]["sources"] if "slices" in recipe else recipe["models"]
        self.model_parameters = {self._model_name(item["model"]): item.get("parameters", {}) for item in listed}
        self.base_name = recipe.get("base_model")
        if self.base_name and self.method in ("linear", "karcher") and "models" in recipe:
            self.model_parameters.setdefault(self.base_name, {})

    @staticmethod
    def _model_name(model: Any) -> str:
        return model if isinstance(model, str) else model["model"]["path"]

    def parameter_value(self, name: str, key: str, model: str | None = None) -> float:
        levels = [self.model_parameters[model]] if model else []
        slices = [self.recipe["slices"][0].get("parameters", {})] if "slices" in self.recipe else []
        for level in [
            *levels,
            *slices,
            self.recipe.get("parameters", {}),
            METHOD_DEFAULTS.get(self.method, {}),
            MODEL_DEFAULTS,
        ]:
            found = setting_value(level.get(name), key)
            if found is not None:
                return found
        raise KeyError(name)

    def __call__(self, key: str) -> torch.Tensor:
        if self.method in ("linear", "passthrough", "karcher"):
            return getattr(self, self.method)(key)
        base = self.models[self.base_name][key]
        names = [name for name in self.model_parameters if name != self.base_name]
        deltas = {name: (self.models[name][key].float() - base.float()).double() for name in names}
        if hasattr(self, self.method):
            return getattr(self, self.method)(key, base.double(), deltas)
        return base.double() + self.parameter_value("lambda", key) * self.weighted_sum(key, deltas)

    def linear(self, key: str) -> torch.Tensor:
        weights = {name: self.parameter_value("weight", key, name) for name in self.model_parameters}
        total = sum(weight * self.models[name][key].double() for name, weight in weights.items())
        return total / sum(weights.values()) if self.parameter_value("normalize", key) else total

    def passthrough(self, key: str) -> torch.Tensor:
        (name,) = self.model_parameters
        return self.parameter_value("scale", key, name) * self.models[name][key].double()

    def weighted_sum(self, key: str, deltas: Tensors) -> torch.Tensor:
        """Thin out, weigh, elect, add up; the mean is over the weights that take part in an element."""
        weights = {name: self.parameter_value("weight", key, name) for name in deltas}
        kept = {name: self.sparsify(delta, key, name) for name, delta in deltas.items()}
        weighed = torch.stack([weights[name] * delta for name, delta in kept.items()])
        shares = torch.tensor(list(weights.values()), dtype=torch.float64).reshape(-1, *[1] * (weighed.dim() - 1))
        takes_part = torch.ones_like(weighed, dtype=torch.bool)
        if "ties" in self.method or self.method == "della":
            elected = torch.where(weighed.sum(0) >= 0, 1.0, -1.0)
            takes_part = weighed.sign() == elected
        total = (weighed * takes_part).sum(0)
        normalize = self.recipe.get("parameters", {}).get(
            "normalize", METHOD_DEFAULTS.get(self.method, {}).get("normalize")
        )
        if not normalize:
            return total
        divisor = (shares * takes_part).sum(0)
        return total / torch.where(divisor == 0, 1.0, divisor)

    def sparsify(self, delta: torch.Tensor, key: str, name: str) -> torch.Tensor:
        """The task vector with all but its share of entries zeroed; the random methods are tested by other means."""
        density = self.parameter_value("density", key, name)
        if density >= 1 or self.method == "task_arithmetic":
            return delta
        size = delta.numel()
        keep = round(density * size)
        ascending = delta.abs().flatten().argsort(stable=True)
        if self.method == "ties":
            chosen = ascending[size - keep :]
        else:
            smallest = max(0, size - keep - round(self.parameter_value("gamma", key, name) * size))
            chosen = ascending[smallest : smallest + keep]
        mask = torch.zeros(size, dtype=torch.float64)
        mask[chosen] = 1
        return delta * mask.reshape(delta.shape)

    def sce(self, key: str, base: torch.Tensor, deltas: Tensors) -> torch.Tensor:
        """Select the positions of most variance, weigh by mean squares, erase minority signs."""
        stacked = torch.stack(list(deltas.values()))
        variance = stacked.var(0, unbiased=False).flatten()
        keep = int(self.parameter_value("select_topk", key) * variance.count_nonzero())
        mask = torch.zeros_like(variance)
        mask[variance.argsort(descending=True)[:keep]] = 1
        stacked = stacked * mask.reshape(stacked.shape[1:])
        weights = stacked.square().flatten(1).mean(1)
        weights = (weights / weights.sum()).reshape(-1, *[1] * (stacked.dim() - 1))
        agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
        shares = (weights * agrees).sum(0)
        return base + (stacked * weights * agrees).sum(0) / shares.clamp(min=1e-6)

    def slerp(self, key: str, base: torch.Tensor, deltas: Tensors) -> torch.Tensor:
        (delta,) = deltas.values()
        t, other = self.parameter_value("t", key), base + delta
        cosine = torch.nn.functional.cosine_similarity(base.flatten(), other.flatten(), dim=0).item()
        if abs(cosine) > 0.9995:
            return (1 - t) * base + t * other
        angle = math.acos(cosine)
        return (math.sin((1 - t) * angle) * base + math.sin(t * angle) * other) / math.sin(angle)

    def nearswap(self, key: str, base: torch.Tensor, deltas: Tensors) -> torch.Tensor:
        """The other's value where the two are within t of each other, elsewhere a step of t towards it."""
        (delta,) = deltas.values()
        weight = (self.parameter_value("t", key) / delta.abs().clamp(min=1e-6)).clamp(0, 1)
        return weight * (base + delta) + (1 - weight) * base

    def model_stock(self, key: str, base: torch.Tensor, deltas: Tensors) -> torch.Tensor:
        flat = [delta.flatten() for delta in deltas.values()]
        cosines = [torch.nn.functional.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(flat, 2)]
        cosine, count = sum(cosines) / len(cosines), len(flat)
        ratio = count * cosine / (1 + (count - 1) * cosine)
        return base + ratio * sum(deltas.values()) / count

    def karcher(self, key: str) -> torch.Tensor:
        """Gradient descent on the sphere to the direction whose squared angles to the models' sum to least."""
        vectors = [self.models[name][key].double().flatten() for name in self.model_parameters]
        units = [vector / vector.norm() for vector in vectors]
        mean = sum(units) / sum(units).norm()
        for _ in range(100):
            tangent = torch.zeros_like(mean)
            for unit in units:
                dot = (mean @ unit).clamp(-1, 1)
                angle = dot.acos()
                if angle > 1e-9:
                    tangent += angle / angle.sin() * (unit - dot * mean) / len(units)
            step = tangent.norm()
            if step < 1e-12:
                break
            mean = step.cos() * mean + step.sin() * tangent / step
        length = sum(vector.norm() for vector in vectors) / len(vectors)
        return (length * mean).reshape(self.models[next(iter(self.model_parameters))][key].shape)
