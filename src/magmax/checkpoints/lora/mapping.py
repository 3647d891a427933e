"""A LoRA adapter matched to the base it was trained on: what each of its tensors does to which of the base's."""

from __future__ import annotations

from ...errors import MagMaxError, list_problems
from ..base import Checkpoint
from ..dtypes import TensorSpec
from .peft import UNSUPPORTED_HINTS, LowRankUpdate, PeftAdapter, StoredFactor


class AdapterMapping:
    """The tensors of an adapter's folder, matched to a base.

    Attributes:
        replacements: key -> the adapter's tensor that stands in its place (modules_to_save, biases, saved embeddings).
        updates: key -> what is added to it.
    """

    def __init__(self, adapter: PeftAdapter, base: Checkpoint) -> None:
        self._adapter, self._base = adapter, base
        self.replacements: dict[str, str] = {}
        self.updates: dict[str, LowRankUpdate] = {}
        self._square_keys: list[str] = []
        self._contradicting_key: str | None = None
        if problems := self._match():
            raise list_problems(f"{adapter.label} cannot be applied to {base.label}", problems)

    def source_spec(self, key: str) -> TensorSpec:
        """The spec of the tensor under `key` before any update: the adapter's copy, or the base's own."""
        return self._adapter.spec(self.replacements[key]) if key in self.replacements else self._base.specs[key]

    def _match(self) -> list[str]:
        """Fill `replacements` and `updates`; return all that cannot be used."""
        folder = self._adapter
        problems = list(folder.problems)
        names = _match_names(
            [f"{module}.weight" for module, _ in folder.factor_pairs], list(folder.replacements), self._base
        )
        self.replacements = {names[key]: name for key, name in folder.replacements.items()}
        for module, embedding in folder.factor_pairs:
            try:
                self._add_update(module, names[f"{module}.weight"], embedding)
            except MagMaxError as error:
                problems += error.problems
        if self._contradicting_key:
            problems += [
                f"{folder.label}: {key} is square, and whether it is stored transposed cannot be known: fan_in_fan_out "
                f"is {str(folder.fan_in_fan_out).lower()}, which is not so for {self._contradicting_key}; "
                f"{UNSUPPORTED_HINTS}"
                for key in self._square_keys
            ]
        return problems

    def _add_update(self, module: str, name: str, is_embedding: bool) -> None:
        """Note the update that a module's pair of factors makes. Raises MagMaxError where they do not fit."""
        folder, key = self._adapter, self._base.resolve_alias(name)
        name_a, name_b = folder.factor_names(module, is_embedding)
        if key not in self._base.specs and key not in self.replacements:
            raise MagMaxError(
                f"{folder.label}: targets {module}, but {self._base.label} has no tensor {name}; "
                "give the base that the adapter was trained on"
            )
        if key in self.updates:
            raise MagMaxError(f"{folder.label}: targets {key} of {self._base.label} twice; {UNSUPPORTED_HINTS}")
        weight, a, b = self.source_spec(key), folder.spec(name_a), folder.spec(name_b)
        joined = f"{folder.weights.label}: cannot join {name_a}, {a}, and {name_b}, {b}, with {key}, {weight}"
        kinds = {a.dtype, b.dtype}
        if not (weight.is_mergeable and a.is_mergeable and b.is_mergeable) or (
            "F64" in kinds and weight.dtype != "F64"
        ):
            raise MagMaxError(f"{joined} in {self._base.label}: these types do not go together; convert one of them")
        rank, scale = folder.rank_and_scale(module)
        rows, rest = weight.shape[:1], weight.shape[1:]
        units = (1,) * (len(rest) - 1)
        plain = rest != () and a.shape == (rank, *rest) and b.shape == (*rows, rank, *units)
        across = len(rest) == 1 and a.shape == (rank, *rows) and b.shape == (*rest, rank)
        if not across and (is_embedding or not plain):
            raise MagMaxError(
                f"{joined} in {self._base.label}, at rank {rank}: these shapes do not fit; "
                "give the base that the adapter was trained on"
            )
        if plain and across and not is_embedding:
            self._square_keys.append(key)
        elif not is_embedding and len(rest) == 1 and across != folder.fan_in_fan_out:
            self._contradicting_key = key
        transposed = across and (is_embedding or not plain or folder.fan_in_fan_out)
        by_a = StoredFactor(name_a, rank, a.numel // rank, is_rank_first=True)
        by_b = StoredFactor(name_b, rank, b.numel // rank, is_rank_first=False)
        self.updates[key] = LowRankUpdate(by_a, by_b, scale) if transposed else LowRankUpdate(by_b, by_a, scale)


def _match_names(targets: list[str], others: list[str], base: Checkpoint) -> dict[str, str]:
    """For each of an adapter's names the base's: its own or, as transformers finds them, all with a first part (such as
    `transformer.`) dropped or added, where that is what makes every target one of the base's tensors."""
    keys = base.specs.keys() | base.aliases.keys()
    firsts = {name.partition(".")[0] + "." for name in targets}
    changes = [("", ""), *((first, "") for first in sorted(firsts))]
    changes += [("", first) for first in sorted({key.partition(".")[0] + "." for key in keys})]
    wanted = [*targets, *others]
    for drop, add in changes:
        base_names = {name: name if name in keys else add + name.removeprefix(drop) for name in wanted}
        if keys.issuperset(base_names[name] for name in targets):
            return {name: new if new in keys else name for name, new in base_names.items()}
    return {name: name for name in wanted}
