"""Recipes: what they accept, what they refuse, and how they say it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models import save_tensors, small_model

from magmax import MagMaxError
from magmax.recipes.recipe import load_recipe, parse_rule
from magmax.rules import Average, KthMagnitude, MagMax
from magmax.yaml_documents import parse_yaml

WHOLE = """\
base: models/base
models:
  - models/cars/model.safetensors
  - path: models/mnist/model.safetensors
    name: digits
rule: {kth_magnitude: {k: 2}}
scaling_factor: 0.4
dtype: bfloat16
out: merged
"""


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def test_a_recipe_says_everything_a_merge_needs(tmp_path):
    (tmp_path / "models").mkdir()
    plan = load_recipe(written(tmp_path, WHOLE))
    assert plan.rule == KthMagnitude(k=2)
    assert plan.base == str(tmp_path / "models/base")
    assert plan.models[0] == str(tmp_path / "models/cars/model.safetensors")
    assert plan.names == ["cars", "digits"]
    assert (plan.options.scaling_factor, plan.options.dtype) == (0.4, "bfloat16")
    assert plan.out == str(tmp_path / "merged")


def test_assignments_stand_above_the_file(tmp_path):
    plan = load_recipe(written(tmp_path, WHOLE), ["scaling_factor=0.7", "rule.k=1", "out=elsewhere"])
    assert plan.rule == KthMagnitude(k=1)
    assert plan.options.scaling_factor == 0.7
    assert plan.out == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("rule", "meant"),
    [
        ("average", (Average(), None)),
        ({"kth_magnitude": {"k": 3}}, (KthMagnitude(k=3), None)),
        ({"magmax": None}, (MagMax(), None)),
        (["magmax"], (MagMax(), None)),
        ("{kth_magnitude: {k: 3}}", (KthMagnitude(k=3), None)),
        ({"_target_": "fusion_bench.method.MagMaxAlgorithm", "scaling_factor": 0.3, "inplace": True}, (MagMax(), 0.3)),
        ({"_target_": "fusion_bench.method.MagMaxAlgorithm"}, (MagMax(), 0.5)),
    ],
)
def test_a_rule_can_be_written_in_several_ways(rule, meant):
    assert parse_rule(rule) == meant


def test_fusion_benchs_method_file_is_a_rule(tmp_path):
    (tmp_path / "magmax.yaml").write_text(
        "_target_: fusion_bench.method.MagMaxAlgorithm\nscaling_factor: 0.6\ninplace: true\n"
    )
    plan = load_recipe(written(tmp_path, "base: b\nmodels: [m]\nrule: magmax.yaml\nout: o\n"))
    assert (plan.rule, plan.options.scaling_factor) == (MagMax(), 0.6)
    assert load_recipe(str(tmp_path / "recipe.yaml"), ["method.scaling_factor=0.2"]).options.scaling_factor == 0.2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "base: b\nmodels: [m]\nscaling_facter: 1\n",
            r"line 3: unknown key 'scaling_facter'; did you mean 'scaling_factor'",
        ),
        ("base: b\nmodels:\n  - {path: m, nam: x}\n", r"line 3: unknown key 'models\.0\.nam'; did you mean 'name'"),
        ("models: [m]\n", "base is missing"),
        ("base: b\nmodels: []\n", "line 2: models: names no model"),
        ("base: b\nmodels: [m]\nscaling_factor: big\n", "line 3: scaling_factor"),
        ("base: b\nmodels: [m]\ndtype: int8\n", "line 3: dtype"),
        ("base: b\nmodels: [m]\nrule: magmaks\n", "no rule 'magmaks'; did you mean 'magmax'"),
        ("base: b\nmodels: [m]\nrule: {kth_magnitude: {kk: 2}}\n", "no option 'kk'; did you mean 'k'"),
        ("base: b\nmodels: [m]\nrule: {kth_magnitude: {k: two}}\n", "k to be int, not 'two'"),
        ("base: b\nmodels: [m]\nrule: {kth_magnitude: {k: 0}}\n", "k of at least 1, not 0"),
        ("base: b\nmodels: [m]\nrule: [magmax, average]\n", "then one merge rule, .* this one is magmax, average"),
        (
            "base: b\nmodels: [m]\nrule: {_target_: x.SlerpAlgorithm}\n",
            "only MagMaxAlgorithm is understood, not x.SlerpAlgorithm",
        ),
        ("base: b\nmodels: [m, m]\n", "two models have one name"),
        ("base: b\nmodels: [m]\nout: x\nout: y\n", "line 4: out is given twice"),
        ("- a\n- b\n", "holds no map of keys"),
        ("base: [b\n", "cannot be read as YAML"),
        ("base: b\nmodels: [{path: m, name: x}, {path: n, name: x}]\n", "two models have one name; the names are x, x"),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_the_nearest_word(text, words, tmp_path):
    with pytest.raises(MagMaxError, match=words):
        load_recipe(written(tmp_path, text))


def test_every_unknown_key_is_named_at_once(tmp_path):
    with pytest.raises(MagMaxError) as caught:
        load_recipe(written(tmp_path, "base: b\nmodels: [m]\noutt: 1\nscale: 2\n"))
    assert "'outt'" in str(caught.value)
    assert "'scale'" in str(caught.value)


def test_an_assignment_to_nothing_is_an_error(tmp_path):
    with pytest.raises(MagMaxError, match=r"cannot set base\.path"):
        load_recipe(written(tmp_path, WHOLE), ["base.path=x"])


@pytest.mark.parametrize("line", [f"scaling_factor: 1{400 * '0'}", f"rule: {{average: {{weights: 1{400 * '0'}}}}}"])
def test_a_number_beyond_all_floats_is_refused(tmp_path, line):
    (tmp_path / "recipe.yaml").write_text(
        f"base: base.safetensors\nmodels: [a.safetensors]\nout: o.safetensors\n{line}\n"
    )
    for number, name in enumerate(("base", "a")):
        save_tensors(small_model(number), tmp_path / f"{name}.safetensors")
    with pytest.raises(MagMaxError, match="finite"):
        load_recipe(str(tmp_path / "recipe.yaml")).job()


def test_a_recipe_of_mergekit_moe_is_refused_by_its_name(tmp_path):
    (tmp_path / "moe.yaml").write_text(
        "base_model: base\ngate_mode: hidden\ndtype: bfloat16\nexperts:\n"
        "  - source_model: poet\n    positive_prompts: [write]\n  - source_model: coder\n"
    )
    with pytest.raises(MagMaxError, match=r"moe\.yaml: is a recipe of mergekit-moe.*run mergekit-moe"):
        load_recipe(str(tmp_path / "moe.yaml"))


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-1", 0.1), ("010", 10), ("0o10", 8), ("0x10", 16), (".5", 0.5), ("+1.", 1), ("1E2", 100), ("-0.25", -0.25)],
)
def test_numbers_are_those_of_yaml_1_2(written, meant, tmp_path):
    (tmp_path / "r.yaml").write_text(f"{{base: b, models: [m], scaling_factor: {written}}}")
    assert load_recipe(str(tmp_path / "r.yaml")).options.scaling_factor == meant


@pytest.mark.parametrize("written", ["1:30", "1_000", "0b11", "2024-01-01", "1:30.5", "yes"])
def test_what_yaml_1_1_alone_takes_for_a_number_is_refused(written, tmp_path):
    (tmp_path / "r.yaml").write_text(f"{{base: b, models: [m], scaling_factor: {written}}}")
    with pytest.raises(MagMaxError, match="scaling_factor: must be a number"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_the_home_folder_is_where_a_shell_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "r.yaml").write_text("{base: ~/b, models: [~/m, x~y], out: ~/out}")
    plan = load_recipe(str(tmp_path / "r.yaml"))
    assert (plan.base, plan.models[0], plan.out) == ("/home/me/b", "/home/me/m", "/home/me/out")
    assert plan.models[1] == f"{tmp_path}/x~y"


def test_an_anchor_stands_for_its_value_wherever_it_is_named(tmp_path):
    text = "base: b\nmodels: &all [{path: m, name: &n one}, {path: o, name: two}]\nout: o\nrule: {magmax: &none {}}\n"
    plain = "base: b\nmodels: [{path: m, name: one}, {path: o, name: two}]\nout: o\nrule: {magmax: {}}\n"
    (tmp_path / "anchors.yaml").write_text(text)
    (tmp_path / "plain.yaml").write_text(plain)
    with_anchors, without = (load_recipe(str(tmp_path / f"{name}.yaml")) for name in ("anchors", "plain"))
    assert (with_anchors.names, with_anchors.rule) == (without.names, without.rule)
    assert parse_yaml("a: &a {x: [1, 2]}\nb: [*a, *a]\nc: {<<: *a, y: 3}", "f") == {
        "a": {"x": [1, 2]},
        "b": [{"x": [1, 2]}, {"x": [1, 2]}],
        "c": {"x": [1, 2], "y": 3},
    }


BILLION = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40))
CHAIN = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} {'[' * 40}*a{n - 1}{']' * 40}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BILLION, "more than 100,000 values"),
        (MERGES, "more than 100,000 values"),
        (CHAIN, "50 lists and maps in one another"),
        ("[" * 100_000, "50 lists and maps in one another"),
        ("{a: " * 100_000, "50 lists and maps in one another"),
        ("- " * 100_000, "50 lists and maps in one another"),
        ("? " * 100_000, "50 lists and maps in one another"),
        ("a: &a [*a]", r"line 1: \*a stands for nothing, or for what it is in"),
        ("a: *b", r"line 1: \*b stands for nothing"),
        ("x: 0x" + "f" * 5_000, "a whole number has more than 3,000 digits"),
        ("x: " + "y" * 2_000_000, "more than 1,000,000 characters"),
    ],
)
def test_yaml_beyond_its_bounds_is_refused_at_once(text, words, tmp_path):
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(MagMaxError, match=rf"merge\.yaml.*{words}"):
        load_recipe(str(tmp_path / "merge.yaml"))
    with pytest.raises(MagMaxError, match=words):
        parse_yaml(text, "rule.k")
