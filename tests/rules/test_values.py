"""Numbers that depend on the layer, the tensor's name and the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import Tensors, add_scaled, load_tensors, same_bytes, save_tensors

import magmax
from magmax import MagMaxError
from magmax.recipes import recipe
from magmax.rules import (
    Average,
    Dare,
    Elect,
    Filters,
    Layers,
    MagMax,
    NearSwap,
    PerModel,
    Prune,
    Sce,
    Slerp,
    TaskArithmetic,
    TensorPosition,
    Ties,
    chain,
    make_rule,
    rule_from,
    tensor_positions,
)
from magmax.rules.schedules import for_all_models, parse

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{n}.{p}" for n in range(4) for p in ("attn.w", "mlp.w")), "norm"]
GRADIENT = {"layers": [0.0, 1.0, 0.25]}
BY_NAME = [{"filter": "attn", "value": GRADIENT}, {"filter": "layers.3.", "value": 0.5}, {"value": 0.75}]


def stack(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(7, 9, generator=draw) for name in NAMES}


def by_name(name: str) -> float:
    """BY_NAME, written out as a person would compute it."""
    if "attn" in name:
        return float(np.interp(int(name.split(".")[2]) / 3, [0, 0.5, 1], [0, 1, 0.25]))
    return 0.5 if "layers.3." in name else 0.75


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_is_linear_between_its_numbers(numbers, depth):
    ours = Layers(tuple(numbers)).for_tensor(TensorPosition("w", depth))
    grid = np.linspace(0, 1, len(numbers)) if len(numbers) > 1 else [0.0]
    assert ours == pytest.approx(np.interp(depth, grid, numbers), abs=1e-12)


def test_the_first_filter_that_is_part_of_the_name_wins():
    value = parse([{"filter": "b", "value": 1}, {"filter": "ab", "value": 2}, {"filter": "*", "value": 3}])
    assert [value.for_tensor(TensorPosition(key, 0)) for key in ("ab", "a", "b.a")] == [1, 3, 1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.embed_tokens.weight", "model.norm.weight"),
        ("transformer.wte.weight", "transformer.ln_f.bias"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("bert.embeddings.LayerNorm.weight", "bert.pooler.dense.weight"),
        ("shared.weight", "lm_head.weight"),
        ("visual.conv1.weight", "visual.ln_post.weight"),
        ("visual.ln_pre.bias", "visual.proj"),
        ("vision_model.pre_layrnorm.weight", "vision_model.post_layernorm.weight"),
        ("cls_token", "pre_classifier.weight"),
        ("patch_embed.proj.weight", "fc_norm.weight"),
    ],
)
def test_tensors_outside_of_layers_lie_before_or_after_them_by_name(before, after):
    layers = [f"layers.{n}.w" for n in range(3)]
    found = tensor_positions([before, *layers, after])
    assert [found[name].depth for name in (before, *layers, after)] == [0, 0, 0.5, 1, 1]


def test_each_stack_of_layers_has_its_own_depth_and_the_outermost_number_counts():
    names = ["enc.1.w", "enc.2.experts.7.w", "enc.4.w", "dec.0.w", "dec.1.w", "head.0.w"]
    assert [place.depth for place in tensor_positions(names).values()] == [0, 0.5, 1, 0, 1, 1]


FORMS = [0.5, 1, GRADIENT, BY_NAME, [0.5, GRADIENT, BY_NAME], [{"layers": [0, 1]}, {"layers": [1, 0]}]]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_rule_is_described_as_it_was_written(form):
    rule = make_rule("task_arithmetic", {"weights": form})
    assert json.loads(json.dumps(rule.describe())) == {"task_arithmetic": {"weights": form}}
    assert rule_from(rule.describe()) == rule
    within = rule_from([{"dare": {"density": 0.5}}, rule.describe()])
    assert rule_from(within.describe()) == within


def test_a_rule_whose_numbers_are_plain_is_itself_everywhere():
    for rule in (MagMax(), Ties(density=PerModel((0.1, 0.2))), chain(Dare(density=0.5), Average())):
        assert rule.for_tensor(TensorPosition("w", 0.5)) is rule
    rule = chain(Dare(density=Layers((1, 0.5))), Average())
    assert rule.for_tensor(TensorPosition("w", 0.5)) == chain(Dare(density=0.75), Average())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (True, "a number, {layers"),
        ("0.5", "a number, {layers"),
        ([], "a number, {layers"),
        ({"layers": 0.5}, "a number, {layers"),
        ({"layers": []}, "a number, {layers"),
        ({"layers": [0.5, "1"]}, "a number, {layers"),
        ([{"filter": "x", "value": 1}], "whose last entry, and no other, has no filter"),
        ([{"value": 1}, {"filter": "x", "value": 1}], "whose last entry, and no other, has no filter"),
        ([{"value": 1, "fliter": "x"}], "a number, {layers"),
        ([{"filter": 3, "value": 1}, {"value": 2}], "a number, {layers"),
        ([{"value": [{"value": 1}]}], "a number, {layers"),
        ([0.5, [0.1, 0.2]], "a number, {layers"),
        (float("nan"), "a finite number, not nan"),
        ([0.5, float("inf")], r"a finite number, not inf in \[0.5, inf\]"),
        ({"layers": [0, float("inf")]}, "a finite number, not inf"),
    ],
)
def test_what_is_no_value_is_refused_in_words(wrong, words):
    with pytest.raises(MagMaxError, match=f"needs weights.*{words}"):
        make_rule("average", {"weights": wrong})


def test_numbers_out_of_range_are_refused_wherever_they_stand():
    for density in (1.5, Layers((0.5, -0.1)), PerModel((0.5, Filters((("a", 0.5), (None, 2))))), float("nan")):
        with pytest.raises(MagMaxError, match="ties needs density from 0 to 1, not"):
            Ties(density=density)
    with pytest.raises(MagMaxError, match="density above 0"):
        Dare(density=Layers((0.5, 0)))
    with pytest.raises(MagMaxError, match="needs seed to be int"):
        make_rule("dare", {"seed": [1, 2]})


def test_the_numbers_must_fit_the_models():
    vectors = [np.ones(3, np.float32)] * 2
    for rule in (TaskArithmetic(weights=PerModel((1, 2, 3))), chain(Prune(density=PerModel((0.1,))), MagMax())):
        with pytest.raises(MagMaxError, match="one for each model, but there are 2 models"):
            rule(vectors)
    with pytest.raises(MagMaxError, match="sum to zero"):
        Average(weights=PerModel((1, -1)))(vectors)
    with pytest.raises(MagMaxError, match="names its models"):
        make_rule("average", {"weights": {"cars": 1, "mnist": 2}})(vectors)


@pytest.mark.parametrize("rule", [Ties(density=Layers((0, 1))), chain(Dare(density=Layers((1, 0.5))), Ties())], ids=str)
def test_numbers_that_vary_need_questions_by_tensor(rule):
    with pytest.raises(MagMaxError, match="use span: tensor"):
        magmax.merge(rule, stack(0), [stack(1), stack(2)])


RULES = {
    "task_arithmetic": ({"task_arithmetic": {"weights": [BY_NAME, 0.5]}}, lambda w: TaskArithmetic(weights=w)),
    "average": ({"average": {"weights": [BY_NAME, 0.5]}}, lambda w: Average(weights=w)),
    "ties": ({"ties": {"weights": [BY_NAME, 0.5], "span": "tensor"}}, lambda w: Ties(weights=w, span="tensor")),
    "a chain": (
        [{"dare": {"density": 0.5}}, {"elect": {"weights": [BY_NAME, 0.5]}}],
        lambda w: chain(Dare(density=0.5), Elect(weights=w)),
    ),
}


@pytest.mark.parametrize("which", RULES)
def test_a_merge_of_files_takes_the_numbers_of_each_tensor(which, tmp_path):
    """Against one merge a tensor with the numbers that a person would put in, from a file and from shards."""
    written, plain = RULES[which]
    base, models = stack(0), [stack(1), stack(2)]
    wanted = {}
    for name in NAMES:
        rule = plain(PerModel((by_name(name), 0.5)))
        vectors = [model[name].reshape(-1) - base[name].reshape(-1) for model in models]
        wanted[name] = add_scaled(base[name], rule(vectors, key=name).reshape(7, 9), 0.7)
    paths = [save_tensors(model, tmp_path / f"{n}.safetensors") for n, model in enumerate((base, *models))]
    out = magmax.merge(rule_from(written), paths[0], paths[1:], 0.7, out=tmp_path / "out.safetensors")
    assert same_bytes(load_tensors(out), wanted)
    sharded = [shards(model, tmp_path / str(n)) for n, model in enumerate((base, *models))]
    out = magmax.merge(rule_from(written), sharded[0], sharded[1:], 0.7, out=tmp_path / "folder.safetensors")
    assert same_bytes(load_tensors(out), wanted)


def shards(tensors: Tensors, folder) -> str:
    names = sorted(tensors)
    files = {f"model-{n + 1:05}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, part in files.items():
        save_tensors({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def test_a_running_merge_takes_numbers_by_place_and_refuses_them_by_model(tmp_path):
    base, tasks = stack(0), [stack(n) for n in (1, 2, 3)]
    rule = rule_from({"task_arithmetic": {"weights": BY_NAME}})
    running = magmax.Running(tmp_path / "state", rule, base)
    for task in tasks:
        running.absorb(task)
    assert magmax.Running(tmp_path / "state", base=base).rule == rule
    assert same_bytes(running.result(), magmax.merge(rule, base, tasks))
    for refused in (TaskArithmetic(weights=PerModel((1, 2))), chain(Dare(density=PerModel((0.9, 0.8))), MagMax())):
        with pytest.raises(MagMaxError, match="does not know how many models"):
            magmax.Running(tmp_path / "other", refused, base)


def test_a_recipe_names_the_models_that_have_numbers(tmp_path):
    for n, name in enumerate(("base", "cars", "mnist")):
        save_tensors(stack(n), tmp_path / f"{name}.safetensors")
    file = tmp_path / "recipe.yaml"

    def plan(weights: str) -> recipe.MergeRequest:
        file.write_text(
            "base: base.safetensors\nmodels: [cars.safetensors, mnist.safetensors]\nout: out.safetensors\n"
            f"rule: [{{dare: {{density: 0.5}}}}, {{average: {{weights: {weights}}}}}]\n"
        )
        return recipe.load_recipe(str(file))

    rule = plan("{mnist: 0.5, cars: {layers: [0, 1]}}").rule
    assert rule == chain(Dare(density=0.5), Average(weights=PerModel((Layers((0, 1)), 0.5))))
    with pytest.raises(MagMaxError, match=r"no model 'minst'.*did you mean 'mnist'"):
        plan("{minst: 0.5, cars: 1}")
    with pytest.raises(MagMaxError, match="no number is given for mnist"):
        plan("{cars: 1}")
    with pytest.raises(MagMaxError, match=r"model.layers.3.attn.w: the weights of average sum to zero"):
        plan("[-0.5, [{filter: layers.3.attn, value: 0.5}, {value: 1}]]").job()
    assert not (tmp_path / "out.safetensors").exists()


def test_the_scaling_factor_may_depend_on_the_tensor(tmp_path):
    base, models = stack(0), [stack(1), stack(2)]
    for name, tensors in zip(("base", "cars", "mnist"), (base, *models), strict=True):
        save_tensors(tensors, tmp_path / f"{name}.safetensors")
    file = tmp_path / "recipe.yaml"
    head = "base: base.safetensors\nmodels: [cars.safetensors, mnist.safetensors]\nout: out.safetensors\n"
    file.write_text(f"{head}scaling_factor: {json.dumps(BY_NAME)}\n")
    recipe.load_recipe(str(file)).job().run()
    vectors = {name: MagMax()([model[name] - base[name] for model in models]) for name in NAMES}
    wanted = {name: add_scaled(base[name], vectors[name], by_name(name)) for name in NAMES}
    assert same_bytes(load_tensors(tmp_path / "out.safetensors"), wanted)
    running = magmax.Running(tmp_path / "state", MagMax(), base)
    for model in models:
        running.absorb(model)
    assert same_bytes(running.result(parse(BY_NAME)), wanted)
    for wrong, words in (("[1, 2]", "line 4: scaling_factor: must be a number.*not"), ("{layers: [.inf]}", "finite")):
        file.write_text(f"{head}scaling_factor: {wrong}\n")
        with pytest.raises(MagMaxError, match=words):
            recipe.load_recipe(str(file)).job()
    with pytest.raises(MagMaxError, match="one for all models"):
        magmax.merge(MagMax(), base, models, PerModel((1, 2)))


def test_the_number_of_each_model():
    assert for_all_models(0.5, 3) == [0.5] * 3
    assert for_all_models(PerModel((1, 2)), 2) == [1, 2]
    with pytest.raises(MagMaxError, match="resolve the rule first"):
        for_all_models(Layers((0, 1)), 2)


@pytest.mark.parametrize(("kind", "option"), [(Sce, "density"), (Slerp, "t"), (NearSwap, "t")])
def test_one_number_for_all_models_is_not_given_for_each(kind, option):
    for value in (PerModel((0.5, 0.5)), PerModel((Layers((0.5,)), 0.5)), parse({"a": 0.5, "b": 0.25})):
        with pytest.raises(MagMaxError, match=f"{kind.name} needs one {option} for all models, not one for each"):
            kind(**{option: value})
    assert getattr(kind(**{option: Layers((0.5, 0.25))}), option) == Layers((0.5, 0.25))


def test_a_gradient_of_nothing_or_of_an_unknown_kind_is_refused():
    with pytest.raises(MagMaxError, match="Layers needs at least one number"):
        Layers(())
    with pytest.raises(MagMaxError, match="outside to be ends or first, not 'frist'"):
        Layers((0.5,), outside="frist")  # pyright: ignore[reportArgumentType]
