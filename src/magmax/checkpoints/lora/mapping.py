"""A LoRA adapter matched to the base it was trained on: what each of its tensors does to which of the base's."""

from __future__ import annotations

from ...errors import MagMaxError, listed
from ..base import Checkpoint
from ..dtypes import Spec
from .peft import INSTEAD, Factor, PeftFolder, Update


class Adapter:
    """The tensors of an adapter's folder, matched to a base.

    Attributes:
        copies: key -> the adapter's tensor that stands in its place (modules_to_save, biases, saved embeddings).
        updates: key -> what is added to it.
    """

    def __init__(self, folder: PeftFolder, base: Checkpoint) -> None:
        self._folder, self._base = folder, base
        self.copies: dict[str, str] = {}
        self.updates: dict[str, Update] = {}
        self._square: list[str] = []
        self._against: str | None = None
        if problems := self._match():
            raise listed(f"{folder.label} cannot be applied to {base.label}", problems)

    def source(self, key: str) -> Spec:
        """The spec of the tensor under `key` before any update: the adapter's copy, or the base's own."""
        return self._folder.spec(self.copies[key]) if key in self.copies else self._base.specs[key]

    def _match(self) -> list[str]:
        """Fill `copies` and `updates`; return all that cannot be used."""
        folder = self._folder
        problems = list(folder.problems)
        names = _names([f"{module}.weight" for module, _ in folder.pairs], list(folder.copies), self._base)
        self.copies = {names[key]: name for key, name in folder.copies.items()}
        for module, embedding in folder.pairs:
            try:
                self._add(module, names[f"{module}.weight"], embedding)
            except MagMaxError as error:
                problems.append(str(error))
        if self._against:
            problems += [
                f"{folder.label}: {key} is square, and whether it is stored transposed cannot be known: fan_in_fan_out "
                f"is {str(folder.transposed).lower()}, which is not so for {self._against}; {INSTEAD}"
                for key in self._square
            ]
        return problems

    def _add(self, module: str, name: str, embedding: bool) -> None:
        """Note the update that a module's pair of factors makes. Raises MagMaxError where they do not fit."""
        folder, key = self._folder, self._base.resolve(name)
        name_a, name_b = folder.pair(module, embedding)
        if key not in self._base.specs and key not in self.copies:
            raise MagMaxError(
                f"{folder.label}: targets {module}, but {self._base.label} has no tensor {name}; "
                "give the base that the adapter was trained on"
            )
        if key in self.updates:
            raise MagMaxError(f"{folder.label}: targets {key} of {self._base.label} twice; {INSTEAD}")
        weight, a, b = self.source(key), folder.spec(name_a), folder.spec(name_b)
        joined = f"{folder.weights.label}: cannot join {name_a}, {a}, and {name_b}, {b}, with {key}, {weight}"
        kinds = {a.dtype, b.dtype}
        if not (weight.floating and a.floating and b.floating) or ("F64" in kinds and weight.dtype != "F64"):
            raise MagMaxError(f"{joined} in {self._base.label}: these types do not go together; convert one of them")
        rank, scale = folder.rank_and_scale(module)
        rows, rest = weight.shape[:1], weight.shape[1:]
        units = (1,) * (len(rest) - 1)
        plain = rest != () and a.shape == (rank, *rest) and b.shape == (*rows, rank, *units)
        across = len(rest) == 1 and a.shape == (rank, *rows) and b.shape == (*rest, rank)
        if not across and (embedding or not plain):
            raise MagMaxError(
                f"{joined} in {self._base.label}, at rank {rank}: these shapes do not fit; "
                "give the base that the adapter was trained on"
            )
        if plain and across and not embedding:
            self._square.append(key)
        elif not embedding and len(rest) == 1 and across != folder.transposed:
            self._against = key
        transposed = across and (embedding or not plain or folder.transposed)
        by_a = Factor(name_a, rank, a.elements // rank, rank_first=True)
        by_b = Factor(name_b, rank, b.elements // rank, rank_first=False)
        self.updates[key] = Update(by_a, by_b, scale) if transposed else Update(by_b, by_a, scale)


def _names(targets: list[str], others: list[str], base: Checkpoint) -> dict[str, str]:
    """For each of an adapter's names the base's: its own or, as transformers finds them, all with a first part (such as
    `transformer.`) dropped or added, where that is what makes every target one of the base's tensors."""
    keys = base.specs.keys() | base.aliases.keys()
    firsts = {name.partition(".")[0] + "." for name in targets}
    changes = [("", ""), *((first, "") for first in sorted(firsts))]
    changes += [("", first) for first in sorted({key.partition(".")[0] + "." for key in keys})]
    wanted = [*targets, *others]
    for drop, add in changes:
        found = {name: name if name in keys else add + name.removeprefix(drop) for name in wanted}
        if keys.issuperset(found[name] for name in targets):
            return {name: new if new in keys else name for name, new in found.items()}
    return {name: name for name in wanted}
