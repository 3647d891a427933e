"""Recipes: a merge as a YAML file, validated before any work."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import path as os_path
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from .checkpoints import Checkpoint, open_checkpoint
from .checkpoints.lora import base_and_adapter, within
from .engine.job import Job, Settings
from .engine.merge import Options, default_names, merge_job
from .errors import MagMaxError, listed
from .rules import Rule, Tunable, make_rule, nearest, rule_from

FUSION_BENCH = "MagMaxAlgorithm"


class Model(BaseModel):
    """A model of a recipe: where it is, and what it is called."""

    model_config = ConfigDict(extra="forbid")
    path: str
    name: str | None = None


class Target(BaseModel):
    """Where the preference of the rule tunable comes from. Paths are relative to the recipe's folder.

    Attributes:
        data: labelled texts of the target: a CSV with the columns text and label, or a folder of LABEL/NAME.txt.
        samples: the folder of the tasks' training samples, NAME.csv or NAME/ for each model's name.
        method: label, ot, cos, mmd, or auto to try all of them.
        encoder: the folder of the encoder in the Hugging Face layout; by default the base.
    """

    model_config = ConfigDict(extra="forbid")
    data: str
    samples: str
    method: Literal["label", "ot", "cos", "mmd", "auto"] = "auto"
    encoder: str | None = None
    max_tokens: int = 64


class Recipe(BaseModel):
    """A merge in words. Paths are relative to the recipe's folder.

    Attributes:
        base: the model that training started from.
        models: the fine-tuned models, as paths or as {path, name}; a LoRA adapter is its folder, or BASE+ADAPTER.
        rule: a name; {name: {option: value}}; a list of these, a chain; or FusionBench's method YAML or its path.
        scaling_factor: by default the rule's own.
        dtype: the output's floating type; by default the base's.
        mismatch: "strict" or "base".
        allow_nonfinite: let NaN and infinity through.
        target: for the rule tunable, where its preference comes from, if it is not written out.
        out: a `.safetensors` file or a folder.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    base: str
    models: list[str | Model]
    rule: str | dict[str, Any] | list[Any] = "magmax"
    scaling_factor: float | None = None
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    mismatch: Literal["strict", "base"] = "strict"
    allow_nonfinite: bool = False
    target: Target | None = None
    out: str | None = None

    @field_validator("models")
    @classmethod
    def _some(cls, models: list[str | Model]) -> list[str | Model]:
        if not models:
            raise ValueError("names no model")
        return models


@dataclass(frozen=True)
class Plan:
    """A recipe made ready: what `magmax.merge` would be given."""

    rule: Rule
    base: str
    models: Sequence[str]
    names: Sequence[str]
    options: Options
    out: str | None
    target: Target | None = None

    def job(self, out: str | None = None, settings: Settings | None = None) -> Job:
        """Open every input and check it. Raises MagMaxError for all that does not fit."""
        where = out or self.out
        if where is None:
            raise MagMaxError("the recipe names no out; say where the result goes: out=PATH")
        base = open_checkpoint(self.base)
        models = [open_checkpoint(m, base=base) for m in self.models]
        rule = self.preferred(base, models, settings) if self.target else self.rule
        return merge_job(rule, base, models, Path(where), self.options, self.names)

    def preferred(self, base: Checkpoint, models: Sequence[Checkpoint], settings: Settings | None = None) -> Tunable:
        """The rule, with the preference that comes from the target, if there is one."""
        if not isinstance(self.rule, Tunable):
            raise MagMaxError(f"a target says what the rule tunable prefers; the rule is {self.rule.name}")
        if self.target is None:
            return self.rule.named(self.names)
        if self.rule.preference:
            raise MagMaxError("the rule tunable has a preference, and a target to take one from; keep one of the two")
        from .preference.text import text_preference

        encoder = Path(self.target.encoder) if self.target.encoder else None
        weights = text_preference(
            self.target.method,
            Path(self.target.data),
            Path(self.target.samples),
            encoder,
            base,
            models,
            self.names,
            self.rule,
            self.options,
            settings or Settings(),
            self.target.max_tokens,
        )
        return replace(self.rule, preference=weights)


def load(file: str, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Plan:
    """Read, override and validate a recipe.

    Args:
        file: the YAML file.
        overrides: assignments such as "scaling_factor=0.7" or "rule.k=2"; FusionBench's "method." stands for "rule.".
        flags: keys that stand above the file and the overrides.

    Raises:
        MagMaxError: YAML that cannot be read, unknown keys (with line and nearest key), values of the wrong kind.
    """
    text = _text(file)
    content, tree = _yaml(text, file), yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(content, dict):
        raise MagMaxError(f"{file}: a recipe is a map with base, models, rule, scaling_factor and out")
    content = {**merged_overrides(content, overrides), **(flags or {})}
    return build(content, file, _lines(tree), os_path.dirname(file))


def shipped() -> list[Path]:
    """The recipes that come with the package."""
    return sorted((Path(__file__).parent / "recipes").glob("*.yaml"))


def build(content: Mapping[str, Any], file: str, lines: Mapping[str, int], folder: str) -> Plan:
    """A plan from a recipe's content; `lines` says where each key stands, for messages."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise listed(f"{file} is not a recipe", [_explained(file, lines, e) for e in error.errors()]) from error
    rule, factor = parse_rule(recipe.rule, folder)
    paths = [within(folder, m.path if isinstance(m, Model) else m) for m in recipe.models]
    own = [(base_and_adapter(path) or (path,))[-1] for path in paths]
    given = [m.name if isinstance(m, Model) else None for m in recipe.models]
    names = [name or default for name, default in zip(given, default_names(own), strict=True)]
    if len(set(names)) < len(names):
        raise MagMaxError(f"{file}: two models have one name; the names are {', '.join(names)}")
    scaling_factor = factor if recipe.scaling_factor is None else recipe.scaling_factor
    options = Options(scaling_factor, recipe.dtype, recipe.mismatch, recipe.allow_nonfinite)
    out = os_path.join(folder, recipe.out) if recipe.out is not None else None
    target = recipe.target
    if target is not None:
        moved = {key: os_path.join(folder, v) for key in ("data", "samples", "encoder") if (v := getattr(target, key))}
        target = target.model_copy(update=moved)
    return Plan(rule, within(folder, recipe.base), paths, names, options, out, target)


def parse_rule(given: Any, folder: str = "") -> tuple[Rule, float | None]:
    """A rule as recipes and the command line write it, and the scaling factor that came with it, if one did."""
    if isinstance(given, str) and given.endswith((".yaml", ".yml")):
        return parse_rule(_method_file(os_path.join(folder, given)), folder)
    if isinstance(given, str) and given.lstrip().startswith(("{", "[")):
        return parse_rule(_yaml(given, f"the rule {given!r}"), folder)
    if isinstance(given, dict) and "_target_" in given:
        return _fusion_bench(given)
    return rule_from(given), None


def _fusion_bench(method: Mapping[str, Any]) -> tuple[Rule, float | None]:
    """FusionBench's method YAML: its target, scaling_factor and inplace (which files have no use for)."""
    target = str(method["_target_"])
    if target.rpartition(".")[2] != FUSION_BENCH:
        raise MagMaxError(f"of FusionBench's methods only {FUSION_BENCH} is understood, not {target}")
    known = ["_target_", "scaling_factor", "inplace"]
    for key in method:
        if key not in known:
            raise MagMaxError(f"FusionBench's {FUSION_BENCH} has no option {key!r}; {nearest(key, known)}")
    factor = method.get("scaling_factor", 0.5)
    if type(factor) not in (int, float) or not abs(factor) < 1e300:
        raise MagMaxError(f"scaling_factor must be a finite number, not {reprlib.repr(factor)}")
    return make_rule("magmax"), float(factor)


def _method_file(file: str) -> Any:
    content = _yaml(_text(file), file)
    if not isinstance(content, dict):
        raise MagMaxError(f"{file}: is not a rule; FusionBench's method YAML has a _target_")
    return content


def _text(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise MagMaxError(f"{file}: cannot be read as YAML: {error}") from error


def _yaml(text: str, what: str) -> Any:
    """YAML as Python objects. Aliases, by which a few lines can stand for billions, are refused."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise MagMaxError(f"{what}: has an alias (*name); write its value out")
        return yaml.safe_load(text)
    except MagMaxError:
        raise
    except Exception as error:  # PyYAML raises KeyError, IndexError and others for scalars that are not what they claim
        raise MagMaxError(f"{what}: cannot be read as YAML: {error}") from error


def is_override(word: str) -> bool:
    """Whether a command-line word is an assignment such as `rule.k=2`."""
    return re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) is not None


def merged_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe's content with assignments put in; values are read as YAML."""
    result = dict(content)
    for word in overrides:
        name, _, text = word.partition("=")
        head, *rest = name.split(".")
        if head == "method" and rest:
            head = "scaling_factor" if rest == ["scaling_factor"] else "rule"
            rest = [] if head == "scaling_factor" else rest
        value = _yaml(text, word)
        if not rest:
            result[head] = value
        elif head == "rule" and len(rest) == 1:
            result["rule"] = _with_option(result.get("rule", "magmax"), rest[0], value)
        else:
            raise MagMaxError(f"cannot set {name}; write KEY=VALUE or rule.OPTION=VALUE")
    return result


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


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """The line of every key of a YAML tree, by its dotted name."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in found:
                raise MagMaxError(f"line {key.start_mark.line + 1}: {name} is given twice; keep one")
            found[name] = key.start_mark.line + 1
            found |= _lines(value, f"{name}.")
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            found[f"{prefix}{place}"] = item.start_mark.line + 1
            found |= _lines(item, f"{prefix}{place}.")
    return found


def _explained(file: str, lines: Mapping[str, int], error: Mapping[str, Any]) -> str:
    """One of pydantic's complaints, with the line it is about and the nearest valid key."""
    parts = [str(p) for p in error["loc"] if str(p) not in ("str", "Model")]
    name = ".".join(parts)
    line = next((lines[".".join(parts[:n])] for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in lines), None)
    where = f"{file}, line {line}" if line else file
    if error["type"] == "extra_forbidden":
        holder = Recipe if len(parts) == 1 else Target if parts[0] == "target" else Model
        known = list(holder.model_fields)
        return f"{where}: unknown key {name!r}; {nearest(parts[-1], known)}"
    if error["type"] == "missing":
        return f"{where}: {name} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {name}: {message[:1].lower()}{message[1:]}, not {reprlib.repr(error['input'])}"
