"""Recipes: a merge as a YAML file, validated before any work."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from os import path as os_path
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, field_validator

from ..calibration.options import CalibrationOptions
from ..checkpoints.lora.adapted_model import resolve_path, split_base_and_adapter
from ..checkpoints.remote.urls import is_url
from ..checkpoints.renamed import Renaming
from ..errors import MagMaxError
from ..merging.model_names import default_names
from ..merging.output_options import OutputOptions
from ..rules import Number, Rule, make_rule, nearest_hint, parse, rule_from
from ..rules.schedules import ACCEPTED_FORMS
from ..yaml_documents import YamlDocument, parse_yaml, read_document, read_text, validate
from . import mergekit
from .request import InputRenamings, MergeRequest, TargetSamples, expand_home

FUSION_BENCH_CLASS = "MagMaxAlgorithm"


class RecipeModel(BaseModel):
    """A model of a recipe: where it is, and what it and its tensors are called.

    Attributes:
        rename, strip: as in the recipe, for this model alone.
    """

    model_config = ConfigDict(extra="forbid")
    path: str
    name: str | None = None
    rename: dict[str, str] = {}
    strip: str = ""


class MergeRecipe(BaseModel):
    """A merge in words. Paths are relative to the recipe's folder.

    Attributes:
        base: the model that training started from, as a path or as {path, rename, strip}.
        models: the fine-tuned models, as paths or as {path, name, rename, strip}; a LoRA adapter is its folder, or
            BASE+ADAPTER.
        rule: a name; {name: {option: value}}; a list of these, a chain; or FusionBench's method YAML or its path.
        scaling_factor: a number, or one by layer or tensor as options of rules have; by default the rule's own.
        dtype: the output's floating type; by default the base's.
        keep_dtype: a regular expression: tensors in whose names it is found keep the base's type, whatever dtype is.
        mismatch: "strict", "base", "intersect" or "union".
        rename: {regular expression: replacement}, for tensor names of the models that have them and that name none.
        strip: a prefix; of the models whose tensor names begin with it, only these tensors are used, without it.
        allow_nonfinite: let NaN and infinity through.
        batch_norm: "average", "base" or "clip", for running means and variances; see `OutputOptions`.
        adapter_rank: merge LoRA adapters, without a base, into one adapter of at most this rank.
        target: for the rule tunable, where its preference comes from, if it is not written out.
        calibrate: how the merged model gets its magnitudes back; see `CalibrationOptions`.
        out: a `.safetensors` file or a folder.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    base: str | RecipeModel | None = None
    models: list[str | RecipeModel]
    rule: str | dict[str, Any] | list[Any] = "magmax"
    scaling_factor: Any = None
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    keep_dtype: str = ""
    mismatch: Literal["strict", "base", "intersect", "union"] = "strict"
    rename: dict[str, str] = {}
    strip: str = ""
    allow_nonfinite: bool = False
    batch_norm: Literal["average", "base", "clip"] = "average"
    adapter_rank: int | None = None
    target: TargetSamples | None = None
    calibrate: CalibrationOptions | None = None
    out: str | None = None

    @field_validator("models")
    @classmethod
    def _some(cls, models: list[str | RecipeModel]) -> list[str | RecipeModel]:
        if not models:
            raise ValueError("names no model")
        return models

    @field_validator("scaling_factor")
    @classmethod
    def _number(cls, factor: Any) -> Number | None:
        try:
            return None if factor is None else cast("Number", parse(factor, per_model=False))
        except MagMaxError as error:
            raise ValueError(f"must be {ACCEPTED_FORMS}") from error


def load_recipe(file: str, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> MergeRequest:
    """Read, override and validate a recipe, ours or mergekit's.

    Args:
        file: the YAML file.
        overrides: assignments such as "scaling_factor=0.7" or "rule.k=2"; FusionBench's "method." stands for "rule.".
        flags: keys that stand above the file and the overrides.

    Raises:
        MagMaxError: YAML that cannot be read, unknown keys (with line and nearest key), values of the wrong kind.
    """
    document = read_document(file)
    if mergekit.is_mergekit(document.content):
        return mergekit.build_request(document, overrides, flags or {}, os_path.dirname(file))
    if {"experts", "gate_mode"} & document.content.keys():
        raise MagMaxError(
            f"{file}: is a recipe of mergekit-moe, which builds a mixture of experts from whole models; nothing here "
            "does: run mergekit-moe"
        )
    content = {**apply_overrides(document.content, overrides), **(flags or {})}
    return build_request(content, file, document.lines, os_path.dirname(file))


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package."""
    return sorted((Path(__file__).parent / "shipped").glob("*.yaml"))


def build_request(content: Mapping[str, Any], file: str, lines: Mapping[str, int], folder: str) -> MergeRequest:
    """A plan from a recipe's content; `lines` says where each key stands, for messages."""
    recipe = validate(MergeRecipe, YamlDocument(file, content, lines), "a merge recipe", _valid_keys)
    if recipe.adapter_rank is None and recipe.base is None:
        raise MagMaxError(f"{file}: base is missing")
    if recipe.adapter_rank is not None:
        for key in ("base", "mismatch", "rename", "strip", "allow_nonfinite", "batch_norm", "calibrate"):
            if key in recipe.model_fields_set:
                raise MagMaxError(
                    f"{file}: a merge of adapters into an adapter has no {key}; leave it out, or leave out adapter_rank"
                )
    rule, factor = parse_rule(recipe.rule, folder)
    paths = [resolve_path(folder, expand_home(m.path if isinstance(m, RecipeModel) else m)) for m in recipe.models]
    adapter_paths = [(split_base_and_adapter(path) or (path,))[-1] for path in paths]
    chosen_names = [m.name if isinstance(m, RecipeModel) else None for m in recipe.models]
    names = [name or default for name, default in zip(chosen_names, default_names(adapter_paths), strict=True)]
    if len(set(names)) < len(names):
        raise MagMaxError(
            f"{file}: two models have one name; the names are {', '.join(names)}; name each model once, or, in a "
            "recipe, give them names"
        )
    rule = rule.for_models(names)
    scaling_factor = factor if recipe.scaling_factor is None else recipe.scaling_factor
    options = OutputOptions(
        scaling_factor, recipe.dtype, recipe.mismatch, recipe.allow_nonfinite,
        keep_dtype=recipe.keep_dtype, batch_norm=recipe.batch_norm,
    )  # fmt: skip
    out = recipe.out if recipe.out is None or is_url(recipe.out) else _path(folder, recipe.out)
    if isinstance(recipe.base, RecipeModel) and recipe.base.name is not None:
        raise MagMaxError(f"{file}: the base is called base; take its name out")
    base_given = recipe.base.path if isinstance(recipe.base, RecipeModel) else recipe.base
    base = resolve_path(folder, expand_home(base_given)) if base_given is not None else None
    renamings = InputRenamings(
        Renaming(recipe.strip, recipe.rename),
        Renaming(recipe.base.strip, recipe.base.rename) if isinstance(recipe.base, RecipeModel) else Renaming(),
        [Renaming(m.strip, m.rename) if isinstance(m, RecipeModel) else Renaming() for m in recipe.models],
    )
    target = recipe.target
    if target is not None:
        moved = {key: _path(folder, v) for key in ("data", "samples", "encoder") if (v := getattr(target, key))}
        target = target.model_copy(update=moved)
    calibrate = recipe.calibrate
    if calibrate is not None:
        moved = {key: _path(folder, v) for key in ("samples", "model", "sensitive") if (v := getattr(calibrate, key))}
        calibrate = calibrate.model_copy(update=moved)
    rank = recipe.adapter_rank
    return MergeRequest(
        rule, base, paths, names, options, out,
        renamings=renamings, adapter_rank=rank, target=target, calibrate=calibrate,
    )  # fmt: skip


def _path(folder: str, path: str) -> str:
    """A path as seen from here, which a recipe in `folder` wrote."""
    return os_path.join(folder, expand_home(path))


def _valid_keys(parts: Sequence[str]) -> list[str]:
    kind = (
        MergeRecipe
        if len(parts) == 1
        else {"target": TargetSamples, "calibrate": CalibrationOptions}.get(parts[0], RecipeModel)
    )
    return list(kind.model_fields)


def parse_rule(content: Any, folder: str = "") -> tuple[Rule, float | None]:
    """A rule as recipes and the command line write it, and the scaling factor that came with it, if one did."""
    if isinstance(content, str) and content.endswith((".yaml", ".yml")):
        return parse_rule(_read_method_file(_path(folder, content)), folder)
    if isinstance(content, str) and content.lstrip().startswith(("{", "[")):
        return parse_rule(parse_yaml(content, f"the rule {content!r}"), folder)
    if isinstance(content, dict) and "_target_" in content:
        return _parse_fusion_bench(content)
    return rule_from(_with_resolved_paths(content, folder)), None


def _with_resolved_paths(rule: Any, folder: str) -> Any:
    """A rule's content, the path of its sensitive tensors as seen from here instead of from the folder."""
    if isinstance(rule, list):
        return [_with_resolved_paths(part, folder) for part in cast("list[Any]", rule)]
    if not isinstance(rule, dict):
        return rule
    options = {name: _with_resolved_paths(option, folder) for name, option in cast("dict[str, Any]", rule).items()}
    path = options.get("sensitive")
    return {**options, "sensitive": _path(folder, path)} if isinstance(path, str) else options


def _parse_fusion_bench(method: Mapping[str, Any]) -> tuple[Rule, float | None]:
    """FusionBench's method YAML: its target, scaling_factor and inplace (which files have no use for)."""
    target = str(method["_target_"])
    if target.rpartition(".")[2] != FUSION_BENCH_CLASS:
        raise MagMaxError(f"of FusionBench's methods only {FUSION_BENCH_CLASS} is understood, not {target}")
    keys = ["_target_", "scaling_factor", "inplace"]
    for key in method:
        if key not in keys:
            raise MagMaxError(f"FusionBench's {FUSION_BENCH_CLASS} has no option {key!r}; {nearest_hint(key, keys)}")
    factor = method.get("scaling_factor", 0.5)
    if type(factor) not in (int, float) or not abs(factor) < 1e300:
        raise MagMaxError(f"scaling_factor must be a finite number, not {reprlib.repr(factor)}")
    return make_rule("magmax"), float(factor)


def _read_method_file(file: str) -> Any:
    content = parse_yaml(read_text(file), file)
    if not isinstance(content, dict):
        raise MagMaxError(f"{file}: is not a rule; FusionBench's method YAML has a _target_")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe's content with assignments put in; values are read as YAML."""
    result = dict(content)
    for word in overrides:
        name, _, text = word.partition("=")
        result = with_value(result, name, parse_yaml(text, word))
    return result


def with_value(content: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The recipe's content with a value put in: by a key, by rule.OPTION, or by rule.PART.OPTION of a chain."""
    head, *rest = name.split(".")
    if head == "method" and rest:
        head = "scaling_factor" if rest == ["scaling_factor"] else "rule"
        rest = [] if head == "scaling_factor" else rest
    if not rest:
        return {**content, head: value}
    rule = content.get("rule", "magmax")
    if head == "rule" and len(rest) == 1:
        return {**content, "rule": _with_option(rule, rest[0], value)}
    if head == "rule" and len(rest) == 2 and isinstance(rule, list):
        parts = [part if isinstance(part, str) else next(iter(part), "") for part in rule]
        if rest[0] not in parts:
            raise MagMaxError(f"cannot set {name}: the chain has no part {rest[0]!r}; {nearest_hint(rest[0], parts)}")
        place = parts.index(rest[0])
        return {**content, "rule": [*rule[:place], _with_option(rule[place], rest[1], value), *rule[place + 1 :]]}
    raise MagMaxError(f"cannot set {name}; write KEY=VALUE or rule.OPTION=VALUE, or rule.PART.OPTION=VALUE of a chain")


def _with_option(rule: Any, option: str, value: Any) -> Any:
    if isinstance(rule, list) and len(rule) == 1:
        return [_with_option(rule[0], option, value)]
    if isinstance(rule, str):
        return {rule: {option: value}}
    if isinstance(rule, dict) and "_target_" in rule:
        return {**rule, option: value}
    if isinstance(rule, dict) and len(rule) == 1:
        ((name, options),) = rule.items()
        if options is None or isinstance(options, dict):
            return {name: {**(options or {}), option: value}}
    raise MagMaxError(f"cannot set the option {option} of {rule!r}")
