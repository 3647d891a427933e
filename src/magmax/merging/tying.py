"""Tied tensors: one tensor under several names, of which each model may store another name, or several copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..checkpoints import Checkpoint
from ..checkpoints.blocks import iter_chunks
from ..checkpoints.renamed import RenamedCheckpoint

MAX_COMPARED = 8
"""Tensors are compared by content only where so few names differ: tied models lack one or two names, others many."""
FIRST_UNITS = 4096
"""How much of two tensors is compared first: different tensors of one shape differ there, almost always."""


@dataclass(frozen=True)
class TiedInputs:
    """A base and its models, each tied tensor under the base's name of it.

    Attributes:
        conflicts: for each model, key -> why a tensor that the base ties cannot be merged.
    """

    base: Checkpoint
    models: Sequence[Checkpoint]
    conflicts: Sequence[dict[str, str]]


def resolve_ties(base: Checkpoint, models: Sequence[Checkpoint], keep_copies: bool = False) -> TiedInputs:
    """Bring the tied tensors of models under the base's names.

    A group of names is tied where the base's file says so, or where the base stores equal copies and a model stores one
    of them only. In a tied group a model may store any one of the names, or equal copies.

    Args:
        keep_copies: leave the base as it is; each copy is then merged with the one tensor that a model stores.
    """
    copies = _find_copies(base, models)
    if not keep_copies:
        base = _with_ties(
            base, {k: copy for k, copy in copies.items() if all(_stored_once(m, k, copy) for m in models)}
        )
    views: list[Checkpoint] = []
    conflicts: list[dict[str, str]] = []
    for model in models:
        names = {key: key for key in [*model.specs, *model.aliases]}
        problems: dict[str, str] = {}
        for stored_name, group in _groups(base).items():
            _rename_group(base, model, stored_name, group, names, problems)
        lacking = {
            k: copy for k, copy in copies.items() if k in base.specs and model.resolve_alias(k) not in model.specs
        }
        names |= {key: copy for key, copy in lacking.items() if model.resolve_alias(copy) in model.specs}
        for group in _groups(model).values():
            if any(name in base.specs for name in group):  # the base may store another name of the group alone
                names = {k: name for k, name in names.items() if k not in group or k in base.specs or k in base.aliases}
        notes = _drop_repeated(base, model, names, problems)
        same = len(names) == len(model.specs) + len(model.aliases) and all(new == old for new, old in names.items())
        view = model if same else RenamedCheckpoint(model, names)
        view.notes += notes
        views.append(view)
        conflicts.append(problems)
    return TiedInputs(base, views, conflicts)


def tie_as_slots(base: Checkpoint, slot: Checkpoint) -> Checkpoint:
    """The base, tied as it was when a running merge began: what its slots lack is an equal copy of what they hold."""
    stored = [key for key, spec in base.specs.items() if spec.is_mergeable and key not in slot.specs]
    tied = {key: copy for key in stored if (copy := _find_copy(base, key, slot.specs))}
    return _with_ties(base, tied) if stored and len(tied) == len(stored) else base


def _groups(base: Checkpoint) -> dict[str, list[str]]:
    """Stored name -> all names of that tensor, for those that have several."""
    groups: dict[str, list[str]] = {}
    for alias, stored_name in base.aliases.items():
        groups.setdefault(stored_name, [stored_name]).append(alias)
    return groups


def _rename_group(
    base: Checkpoint,
    model: Checkpoint,
    stored_name: str,
    group: Sequence[str],
    names: dict[str, str],
    problems: dict[str, str],
) -> None:
    """Give what the model stores of a tied group the base's name; `names` and `problems` are updated."""
    stored = list(dict.fromkeys(s for name in group if (s := model.resolve_alias(name)) in model.specs))
    if not stored:
        return
    first, *others = stored
    for name in others:
        if not _equal(model, first, name):
            problems[name] = (
                f"{model.label}: stores {name} and {first} apart, with different values, but in {base.label} they are "
                "tied; untie them in the base, or tie them in the model"
            )
    for name in group:
        if name not in problems:
            names.pop(name, None)
    names |= {name: first for name in group if name not in problems}


def _drop_repeated(base: Checkpoint, model: Checkpoint, names: dict[str, str], problems: dict[str, str]) -> list[str]:
    """Leave out a tensor that the base lacks and that repeats another of the model; return what to say of it.

    Where the values differ and the base's config ties its embeddings, that is a problem of this tensor.
    """
    notes: list[str] = []
    extra = [k for k in model.specs if k in names and k not in base.specs and k not in base.aliases]
    if len(extra) > MAX_COMPARED:
        return notes
    for key in extra:
        if copy := _find_copy(model, key, base.specs):
            names.pop(key)
            notes.append(f"{model.label}: {key} equals {copy}, to which {base.label} ties it; it is read once")
        elif _config_ties(base) and (like := [k for k in _same_shape(model, key, base.specs) if _is_embedding(k)]):
            problems[key] = (
                f"{model.label}: stores {key} apart from {like[0]}, with different values, but {base.label} ties them "
                "(tie_word_embeddings in its config.json)"
            )
    return notes


def _find_copies(base: Checkpoint, models: Sequence[Checkpoint]) -> dict[str, str]:
    """What the base stores twice and a model stores once: the name that the model lacks -> the one that it has."""
    tied: dict[str, str] = {}
    for model in models:
        missing = [key for key in base.specs if model.resolve_alias(key) not in model.specs and key not in tied]
        if not 0 < len(missing) <= MAX_COMPARED or _config_ties(base) is False:
            continue
        present = [key for key in base.specs if model.resolve_alias(key) in model.specs]
        tied |= {key: copy for key in missing if (copy := _find_copy(base, key, present))}
    return tied


def _with_ties(base: Checkpoint, tied: Mapping[str, str]) -> Checkpoint:
    """The base with equal copies stored once."""
    if not tied:
        return base
    view = RenamedCheckpoint(base, {key: tied.get(key, key) for key in [*base.specs, *base.aliases]})
    view.notes += [
        f"{base.label}: {k} equals {c}, to which the models tie it; it is stored once" for k, c in tied.items()
    ]
    return view


def _stored_once(model: Checkpoint, key: str, copy: str) -> bool:
    """Return whether a model has one tensor, or equal ones, under two names."""
    first, second = model.resolve_alias(key), model.resolve_alias(copy)
    return first not in model.specs or second not in model.specs or first == second or _equal(model, first, second)


def _find_copy(checkpoint: Checkpoint, key: str, among: Iterable[str]) -> str | None:
    """The name of another tensor of the checkpoint with the same content: a matrix whose elements are not all equal."""
    return next((other for other in _same_shape(checkpoint, key, among) if _equal(checkpoint, key, other)), None)


def _same_shape(checkpoint: Checkpoint, key: str, among: Iterable[str]) -> list[str]:
    """The names of other matrices of the same type and shape."""
    spec = checkpoint.specs[key]
    if not spec.is_mergeable or len(spec.shape) < 2:
        return []
    return [k for k in among if k != key and checkpoint.find_spec(k) == spec]


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Compare the content of two tensors of a checkpoint; those whose elements are all equal tell nothing."""
    one, other = checkpoint.resolve_alias(one), checkpoint.resolve_alias(other)
    spec = checkpoint.specs[one]
    if checkpoint.specs[other] != spec:
        return False
    varied = False
    cuts = [(0, min(FIRST_UNITS, spec.num_units)), *((c.start, c.stop) for c in iter_chunks(one, spec))]
    for start, stop in cuts:
        ours, theirs = checkpoint.read(one, start, stop), checkpoint.read(other, start, stop)
        if ours.tobytes() != theirs.tobytes():
            return False
        varied = varied or bool((ours != ours[:1]).any())
    return varied


def _is_embedding(key: str) -> bool:
    """Return whether a name is one that transformers gives to an embedding of tokens."""
    return any(word in key for word in ("embed", "wte", "shared"))


def _config_ties(checkpoint: Checkpoint) -> bool | None:
    """What config.json says of tie_word_embeddings; None where it, or the file, is not there."""
    config = checkpoint.read_config()
    for place in (config, config.get("text_config"), config.get("decoder")):
        if isinstance(place, dict) and "tie_word_embeddings" in place:
            return bool(cast("dict[str, Any]", place)["tie_word_embeddings"])
    return None
