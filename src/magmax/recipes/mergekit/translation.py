"""From a mergekit recipe to a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ...checkpoints.lora.adapted_model import resolve_path, split_base_and_adapter
from ...checkpoints.remote.hub import parse_hub_id
from ...checkpoints.remote.urls import is_url
from ...checkpoints.renamed import Renaming
from ...errors import MagMaxError, list_problems
from ...merging.model_names import default_names
from ...merging.output_options import OutputOptions
from ...rules import nearest_hint
from ...yaml_documents import YamlDocument, parse_yaml, validate
from ..request import InputRenamings, MergeRequest, expand_home
from .architecture_checks import ArchitectureCheck
from .methods import ALL_PARAMETERS, MERGE_METHODS, UNSUPPORTED_METHODS, MergekitMethod
from .parameters import ParameterLevel, ParameterLookup
from .schema import MergekitModel, MergekitRecipe, valid_keys

MAGMAX_KEYS = ("out", "mismatch", "keep_dtype", "rename", "strip", "allow_nonfinite", "batch_norm")
"""What assignments and flags may say beyond mergekit's own keys."""


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Return whether a document is a mergekit recipe: no other has this key, and every one of theirs has it."""
    return "merge_method" in content


def build_request(
    document: YamlDocument, overrides: Sequence[str], flags: Mapping[str, Any], folder: str
) -> MergeRequest:
    """A plan from a mergekit recipe.

    Args:
        document: the recipe.
        overrides: assignments to its keys, to `parameters.NAME`, or to one of `MAGMAX_KEYS`.
        flags: what the command line sets.
        folder: where the recipe lies; models are looked for in the current folder and then there.

    Raises:
        MagMaxError: unknown keys and parameters, values that do not fit, models that are nowhere, and everything of
            mergekit's that has no equal here: each with its line, all that can be seen at once.
    """
    content, ours = _apply_overrides(document.content, overrides, flags)
    recipe = validate(
        MergekitRecipe, YamlDocument(document.file, content, document.lines), "a merge recipe of mergekit", valid_keys
    )
    return _Translation(document, recipe, folder).request(ours)


def _apply_overrides(
    content: Mapping[str, Any], overrides: Sequence[str], flags: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's content with the assignments and flags put in, and those that are ours."""
    theirs, ours = dict(content), {}
    for word in overrides:
        name, _, text = word.partition("=")
        value, (head, *rest) = parse_yaml(text, word), name.split(".")
        if name in MAGMAX_KEYS:
            ours[name] = value
        elif head == "parameters" and len(rest) == 1:
            theirs["parameters"] = {**(theirs.get("parameters") or {}), rest[0]: value}
        elif name in MergekitRecipe.model_fields and name not in ("models", "slices"):
            theirs[name] = value
        else:
            options = [*MergekitRecipe.model_fields, *MAGMAX_KEYS, *(f"parameters.{p}" for p in ALL_PARAMETERS)]
            raise MagMaxError(f"cannot set {name} of a mergekit recipe; {nearest_hint(name, options)}")
    for name, value in flags.items():
        if name in MAGMAX_KEYS:
            ours[name] = value
        elif name == "dtype":
            theirs["out_dtype"] = value
        else:
            raise MagMaxError(
                f"--{name.replace('_', '-')} cannot be set beside a mergekit recipe, which says it itself"
            )
    return theirs, ours


class _Translation:
    """A translation of a mergekit recipe into a merge request; collects problems and notes."""

    def __init__(self, document: YamlDocument, recipe: MergekitRecipe, folder: str) -> None:
        self.document, self.recipe, self.folder = document, recipe, folder
        self.problems: list[str] = []
        self.notes: list[str] = []

    def request(self, ours: Mapping[str, Any]) -> MergeRequest:
        method = self._method()
        inputs, shared, base = self._inputs()
        levels = {place: ParameterLevel((*place, "parameters"), i.parameters or {}) for place, i in inputs.items()}
        merged = {place: i.model for place, i in inputs.items() if method.counted or i.model != base}
        if method.counted and base and base not in merged.values() and self.recipe.slices is None:
            merged["base_model",] = base
            levels["base_model",] = ParameterLevel(("base_model",), {})
        self._count(method, base, merged)
        if self.recipe.slices and base and not method.counted and base not in [each.model for each in inputs.values()]:
            where = self.document.locate("slices", 0, "sources")
            self.problems.append(f"{where}: the base model {base} is not among the sources; mergekit needs it there")
        for place, level in levels.items():
            is_merged = place in merged
            self._parameters(
                method, level, method.own if is_merged else {}, "a model's own" if is_merged else "the base's own"
            )
        for level in shared:
            self._parameters(method, level, {**method.shared, **method.own}, "every model's")
        ranges = self._ranges(inputs)
        self._keys()
        paths = [self._located(model, place) for place, model in merged.items()]
        start = self._located(base, ("base_model",)) if base else (paths or [""])[0]
        if self.problems:
            raise list_problems(f"{self.document.file} cannot be merged here", self.problems)
        parameters = ParameterLookup(self.document, shared, [[levels[place]] for place in merged])
        return MergeRequest(
            rule=self._rule(method, parameters),
            base=start,
            models=paths,
            names=self._names(paths),
            options=self._options(method, parameters, ours),
            out=self._out(ours.get("out")),
            renamings=InputRenamings(Renaming(ours.get("strip", ""), ours.get("rename", {}))),
            check=self._fitness(method, ranges),
            notes=self.notes,
        )

    def _method(self) -> MergekitMethod:
        name, where = self.recipe.merge_method, self.document.locate("merge_method")
        if name in UNSUPPORTED_METHODS:
            raise MagMaxError(f"{where}: not supported here: merge_method {name}; {UNSUPPORTED_METHODS[name]}")
        if name not in MERGE_METHODS:
            hint = nearest_hint(name, [*MERGE_METHODS, *UNSUPPORTED_METHODS])
            raise MagMaxError(f"{where}: there is no merge_method {name!r}; {hint}")
        return MERGE_METHODS[name]

    def _inputs(self) -> tuple[dict[tuple[str | int, ...], MergekitModel], list[ParameterLevel], str | None]:
        """The models by their place, the levels of parameters that they share, and the base, if there is one."""
        recipe, everyone = self.recipe, ParameterLevel(("parameters",), self.recipe.parameters or {})
        if recipe.modules is not None:
            where = self.document.locate("modules")
            raise MagMaxError(f"{where}: not supported here: modules; one recipe merges one model, with the key models")
        if (recipe.models is None) == (recipe.slices is None):
            which = "both models and slices" if recipe.models is not None else "neither models nor slices"
            raise MagMaxError(f"{self.document.file}: has {which}; a recipe has one of them")
        if recipe.slices is None:
            inputs = {("models", n): each for n, each in enumerate(recipe.models or [])}
            return inputs, [everyone], recipe.base_model
        if len(recipe.slices) != 1:
            where = self.document.locate("slices")
            raise MagMaxError(f"{where}: not supported here: a model put together of {len(recipe.slices)} slices; "
                              "one slice with all layers, or models, is")  # fmt: skip
        (only,) = recipe.slices
        inputs = {("slices", 0, "sources", n): each for n, each in enumerate(only.sources)}
        shared = [ParameterLevel(("slices", 0, "parameters"), only.parameters or {}), everyone]
        return inputs, shared, only.base_model or recipe.base_model

    def _count(self, method: MergekitMethod, base: str | None, merged: Mapping[Any, str]) -> None:
        name, where = self.recipe.merge_method, self.document.locate("slices" if self.recipe.slices else "models")
        if base is None and not method.counted:
            self.problems.append(f"{self.document.locate('merge_method')}: {name} needs a base_model")
        if twice := sorted({model for model in merged.values() if list(merged.values()).count(model) > 1}):
            self.problems.append(f"{where}: {', '.join(twice)} is given twice; name each model once")
        most = method.most or len(merged)
        if not method.least <= len(merged) <= most:
            wanted = f"{'exactly' if method.most == method.least else 'at least'} {method.least}"
            beside = "" if method.counted else " beside the base"
            self.problems.append(f"{where}: {name} merges {wanted}{beside}, not {len(merged)}")

    def _parameters(self, method: MergekitMethod, level: ParameterLevel, used: Mapping[str, Any], whose: str) -> None:
        """Unknown parameters are problems; those that have no effect in mergekit either are notes."""
        for name, value in level.settings.items():
            where = self.document.locate(*level.place, name)
            if name not in ALL_PARAMETERS:
                options = list({**method.shared, **method.own})
                self.problems.append(
                    f"{where}: unknown parameter {name!r}; {nearest_hint(name, options or ALL_PARAMETERS)}"
                )
            elif name == "int8_mask" and value:
                self.notes.append(f"{where}: int8_mask saves memory in mergekit, and changes nothing here")
            elif name not in used and value is not None:
                self.notes.append(
                    f"{where}: {name} has no effect as {whose} parameter of {self.recipe.merge_method}, in mergekit too"
                )

    def _ranges(self, inputs: Mapping[tuple[str | int, ...], MergekitModel]) -> list[tuple[str, list[int]]]:
        for place, model in inputs.items():
            if place[0] == "slices" and model.layer_range is None:
                self.problems.append(f"{self.document.locate(*place)}: layer_range is missing")
        return [
            (self.document.locate(*place, "layer_range"), model.layer_range)
            for place, model in inputs.items()
            if model.layer_range is not None
        ]

    def _keys(self) -> None:
        """Keys of which only some values have an equal here."""
        recipe = self.recipe
        if recipe.dtype == "float64":
            self.problems.append(
                f"{self.document.locate('dtype')}: not supported here: float64 arithmetic on narrower models; leave "
                "dtype "
                "out (models stored in float64 are computed in it), or write out_dtype: float64"
            )
        if recipe.tokenizer is not None and recipe.tokenizer_source is not None:
            self.problems.append(f"{self.document.locate('tokenizer')}: has a tokenizer_source beside it; keep one")
        extra = [key for key in recipe.tokenizer or {} if key != "source"] if isinstance(recipe.tokenizer, dict) else []
        for key in extra:
            where = self.document.locate("tokenizer", key)
            self.problems.append(f"{where}: not supported here: tokenizer.{key}; the base's tokenizer is copied")

    def _rule(self, method: MergekitMethod, parameters: ParameterLookup) -> Any:
        try:
            return method.rule(parameters)
        except MagMaxError as error:
            if str(error).startswith(self.document.file):
                raise
            key = "parameters" if self.recipe.parameters else "merge_method"
            raise MagMaxError(f"{self.document.locate(key)}: {error}") from error

    def _options(self, method: MergekitMethod, parameters: ParameterLookup, ours: Mapping[str, Any]) -> OutputOptions:
        factor = parameters.number("lambda", 1.0) if "lambda" in method.shared else 1.0
        mismatch, allowed = ours.get("mismatch", "strict"), ours.get("allow_nonfinite", False)
        if mismatch not in ("strict", "base"):
            raise MagMaxError(f"mismatch is strict or base, not {mismatch!r}")
        if mismatch == "base" and method.counted:
            where, name = self.document.locate("merge_method"), self.recipe.merge_method
            raise MagMaxError(f"{where}: mismatch: base needs a base that the models start from; {name} has none")
        dtype, keep_dtype = self.recipe.out_dtype or self.recipe.dtype, str(ours.get("keep_dtype", ""))
        statistics = ours.get("batch_norm", "average")
        return OutputOptions(factor, dtype, mismatch, bool(allowed), keep_dtype=keep_dtype, batch_norm=statistics)

    def _names(self, paths: Sequence[str]) -> list[str]:
        names = default_names([(split_base_and_adapter(path) or (path,))[-1] for path in paths])
        return names if len(set(names)) == len(names) else [f"{n} {name}" for n, name in enumerate(names, start=1)]

    def _fitness(self, method: MergekitMethod, ranges: Sequence[tuple[str, list[int]]]) -> ArchitectureCheck:
        recipe, document = self.recipe, self.document
        key = "tokenizer" if recipe.tokenizer is not None else "tokenizer_source"
        return ArchitectureCheck(
            counted=method.counted,
            untyped=None if recipe.dtype or recipe.out_dtype else document.locate("merge_method"),
            ranges=ranges,
            tokenizer=document.locate(key) if recipe.tokenizer or recipe.tokenizer_source else None,
            template=(document.locate("chat_template"), str(recipe.chat_template)) if recipe.chat_template else None,
        )

    def _out(self, out: object) -> str | None:
        if out is None or is_url(str(out)):
            return out if out is None else str(out)
        return os.path.join(self.folder, expand_home(str(out)))

    def _located(self, model: str, place: tuple[str | int, ...]) -> str:
        """Return where a model lies: as given, which is from the current folder, as mergekit has it; or from the
        recipe's.
        """
        model = expand_home(model)
        halves = split_base_and_adapter(model) or (model,)
        if all(map(os.path.lexists, halves)):
            return model
        beside = resolve_path(self.folder, model)
        if all(map(os.path.lexists, split_base_and_adapter(beside) or (beside,))):
            return beside
        if is_url(model) or all(parse_hub_id(half, self.folder) for half in model.split("+")):
            return model
        where = self.document.locate(*place)
        self.problems.append(f"{where}: there is no {model}, neither in the current folder nor beside the recipe")
        return model
