"""Coefficients are those of the definition, computed plainly; folding is exact; nothing else is touched."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.calibration import naive  # noqa: E402
from tests.calibration.nets import (  # noqa: E402
    Attention,
    Convolutions,
    NonAffineNorm,
    ScaleNorm,
    SharedLayer,
    TiedEmbedding,
    average_states,
    build_model,
    copy_with_state,
    make_task_states,
)
from torch import nn  # noqa: E402

from magmax import MagMaxError  # noqa: E402
from magmax.calibration import FeatureOptions, calibrate_features, run_items  # noqa: E402
from magmax.calibration.weight_space import measure_gram  # noqa: E402
from magmax.checkpoints import open_checkpoint  # noqa: E402
from magmax.checkpoints.memory import StateDict  # noqa: E402


def floats(*shape: int, tasks: int = 2, count: int = 2):
    draw = torch.Generator().manual_seed(7)
    return [[torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(count)] for _ in range(tasks)]


def tokens(lengths: list[list[int]], vocabulary: int = 11):
    draw = np.random.default_rng(3)
    return [[draw.integers(0, vocabulary, length).tolist() for length in own] for own in lengths]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 3))


NETS = {
    "linear": (mlp, (), ["0", "2", "3"], floats(4, 5)),
    "convolutions": (Convolutions, (), ["first", "norm", "groups", "group_norm", "last"], floats(3, 6, 6)),
    "twice": (SharedLayer, (), ["before", "shared", "between", "after"], floats(3, 5)),
    "words": (TiedEmbedding, (), ["embed", "places", "norm", "mix"], tokens([[4, 7], [2, 5]])),
}


@pytest.mark.parametrize("sequential", [True, False], ids=["calibrated inputs", "merged inputs"])
@pytest.mark.parametrize("ratio", ["place", "sample"])
@pytest.mark.parametrize("name", NETS)
def test_as_defined(name, ratio, sequential):
    """float64; norms are ratios of sums of about a hundred terms, so 1e-9 is ample."""
    kind, given, layers, samples = NETS[name]
    model = build_model(kind, *given)
    base, models = make_task_states(model)
    merged = average_states(base, models)
    xis, state = naive.reference_calibration(model, base, merged, models, samples, run_items, layers, sequential, ratio)
    model.load_state_dict(merged)
    options = FeatureOptions(ratio=ratio, inputs="calibrated" if sequential else "merged")
    found = calibrate_features(model, base, models, samples, options=options)
    told = {layer.name: layer for layer in found.report.layers}
    for layer in layers:
        assert told[layer].xi == pytest.approx(xis[layer], rel=1e-9), layer
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-9, atol=1e-9, msg=key)


def plain_attention(model: Attention, state: dict, x: torch.Tensor) -> torch.Tensor:
    """What the output projection of the attention layer is given, step by step."""
    weights = [state[f"attention.{n}_proj_weight"] for n in "qkv"] if model.separate else None
    weights = weights or state["attention.in_proj_weight"].chunk(3)
    other = x[..., :5] if model.separate else x
    q, k, v = (
        (y @ w.T + b).reshape(len(x), 2, 4).transpose(0, 1)
        for y, w, b in zip((x, other, other), weights, state["attention.in_proj_bias"].chunk(3), strict=True)
    )
    return (torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v).transpose(0, 1).reshape(len(x), 8)


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_attention_by_its_projections(separate):
    """norm, then q, k and v on its output, then the output projection on the calibrated heads, then the last layer."""
    model = build_model(Attention, separate)
    base, models = make_task_states(model)
    merged, samples = average_states(base, models), floats(4, 8)
    state = dict(merged)

    def cut(s: dict, letter: str) -> tuple:
        if letter == "out":
            return s["attention.out_proj.weight"], s["attention.out_proj.bias"]
        place = "qkv".index(letter)
        weight = s[f"attention.{letter}_proj_weight"] if separate else s["attention.in_proj_weight"].chunk(3)[place]
        return weight, s["attention.in_proj_bias"].chunk(3)[place]

    def xi_of(letter: str, inputs) -> float:
        means = []
        for own, items in zip(models, samples, strict=True):
            change = [[a - b for a, b in zip(cut(s, letter), cut(base, letter), strict=True)] for s in (own, merged)]
            f_k, f_m = (torch.cat([(inputs(x) @ w.T + b).abs().sum(-1) for x in items]) for w, b in change)
            means.append((f_k / f_m).mean())
        return float(torch.stack(means).mean())

    model.load_state_dict(merged)
    norm_xi, after_norm = naive.reference_calibration(
        build_model(Attention, separate), base, merged, models, samples, run_items, ["norm"]
    )

    def normed(x):
        return nn.functional.layer_norm(x, (8,), after_norm["norm.weight"], after_norm["norm.bias"])

    expected = {"norm": norm_xi["norm"]}
    for letter in "qkv":
        narrow = separate and letter != "q"
        expected[f"attention.{letter}"] = xi_of(letter, lambda x, narrow=narrow: normed(x)[..., : 5 if narrow else 8])
    state = {**after_norm}
    for name in [key for key in state if "in_proj" in key or "_proj_weight" in key]:
        rows = torch.tensor([expected[f"attention.{n}"] for n in "qkv"], dtype=torch.float64).repeat_interleave(8)
        if name[10:] in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            rows = rows[:1] * 0 + expected[f"attention.{name[10]}"]
        rows = rows if state[name].dim() == 1 else rows[:, None]
        state[name] = base[name] + rows * (merged[name] - base[name])
    expected["attention.out_proj"] = xi_of("out", lambda x: plain_attention(model, state, normed(x)))

    found = calibrate_features(model, base, models, samples)
    told = {layer.name: layer.xi for layer in found.report.layers}
    assert told.keys() == {*expected, "last"}
    for name, xi in expected.items():
        assert told[name] == pytest.approx(xi, rel=1e-9), name
    for name, value in state.items():
        if "in_proj" in name or "_proj_weight" in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


def all_layers():
    yield "convolutions", build_model(Convolutions), floats(3, 6, 6, tasks=1)
    yield "attention", build_model(Attention), floats(4, 8, tasks=1)
    yield "separate attention", build_model(Attention, True), floats(4, 8, tasks=1)
    yield "words", build_model(TiedEmbedding), tokens([[4, 7, 9]])


@pytest.mark.parametrize("s", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(("name", "model", "samples"), list(all_layers()))
def test_a_task_alone_gets_its_magnitude_back(name, model, samples, s):
    """Of one task scaled by s, xi is 1/s in every layer, and the calibrated model is the task's own."""
    base, (task,) = make_task_states(model, 1)
    merged = {k: v + s * (task[k] - v) if v.is_floating_point() else v for k, v in base.items()}
    model.load_state_dict(merged)
    found = calibrate_features(model, base, [task], samples)
    reached = [layer for layer in found.report.layers if not layer.why]
    assert len(reached) >= 4
    for layer in reached:
        assert layer.xi == pytest.approx(1 / s, rel=1e-6), layer.name
        keys = [key for key in layer.tensors if ".in_proj" not in key]
        for key in keys:
            torch.testing.assert_close(model.state_dict()[key], task[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "model", "samples"), list(all_layers()))
def test_folded_is_base_plus_xi_times_the_rest(name, model, samples):
    """For every layer and any input: folded(x) = pre(x) + xi (merged(x) - pre(x))."""
    base, models = make_task_states(model, 2)
    merged = average_states(base, models)
    start, before = copy_with_state(model, base), copy_with_state(model, merged)
    model.load_state_dict(merged)
    found = calibrate_features(model, base, models, samples * 2)
    compared = 0
    for layer in found.report.layers:
        if layer.why or layer.name.startswith("attention."):
            continue
        (args,) = naive.capture_inputs(model, layer.name, samples[0][-1], run_items)[:1]
        with torch.no_grad():
            pre, full, made_of = (m.get_submodule(layer.name)(*args) for m in (start, before, model))
        torch.testing.assert_close(made_of, pre + layer.xi * (full - pre), rtol=1e-9, atol=1e-9)
        compared += 1
    assert compared >= 2


def test_weights_that_two_layers_share_are_calibrated_once_and_what_cannot_be_folded_is_named():
    model = build_model(TiedEmbedding)
    base, models = make_task_states(model)
    merged = average_states(base, models)
    model.load_state_dict(merged)
    found = calibrate_features(model, base, models, tokens([[4], [5]])).report
    told = {layer.name: layer for layer in found.layers}
    assert told["head"].why == "shares embed.weight with embed, and is calibrated there"
    assert told["head"].xi == 1
    assert model.head.weight is model.embed.weight
    assert list(found.left) == ["TiedEmbedding"]
    assert found.lines()[-1].startswith("left alone: TiedEmbedding (TiedEmbedding with token is no kind of layer")
    assert "head: shares embed.weight with embed, and is calibrated there" in found.lines()
    assert "token" in found.left["TiedEmbedding"]
    assert torch.equal(model.token, merged["token"])


def test_layers_that_no_sample_reaches_or_that_do_not_move_are_left_as_they_are():
    model = build_model(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)))
    base, models = make_task_states(model)
    for each in models:
        each["1.weight"], each["1.bias"] = base["1.weight"], base["1.bias"]
    merged = average_states(base, models)
    model.load_state_dict(merged)
    run = lambda m, items: [m[1](m[0](item)) for item in items]  # noqa: E731
    found = calibrate_features(model, base, models, floats(2, 3), run)
    told = {layer.name: layer.why for layer in found.report.layers}
    assert told == {"0": "", "1": "the merge does not move it", "2": "the samples do not reach it"}
    assert set(found.coefficients) == {"0.weight", "0.bias"}
    assert torch.equal(model[2].weight, merged["2.weight"])


def test_a_norm_is_known_by_its_weight_and_only_if_its_features_are_affine_in_it():
    model = build_model(lambda: nn.Sequential(nn.Linear(6, 6), ScaleNorm(6), NonAffineNorm(6), nn.Linear(6, 2)))
    base, models = make_task_states(model)
    merged = average_states(base, models)
    xis, _ = naive.reference_calibration(model, base, merged, models, floats(2, 6), run_items, ["0"])
    model.load_state_dict(merged)
    told = {layer.name: layer for layer in calibrate_features(model, base, models, floats(2, 6)).report.layers}
    assert told["0"].xi == pytest.approx(xis["0"], rel=1e-9)
    assert (told["1"].kind, told["1"].why) == ("norm", "")
    assert told["2"].why == "the features of this NonAffineNorm are not affine in its weights"
    assert torch.equal(model[2].weight, merged["2.weight"])


def test_sensitive_layers_only_shrink_and_others_only_grow():
    model = build_model(mlp)
    base, (task,) = make_task_states(model, 1)
    for key, sensitive, factor, expected in [
        ("0.weight", ["0.weight"], 0.5, [1, 2, 2]),
        ("3.bias", ["3.bias"], 2.0, [1, 1, 0.5]),
    ]:
        merged = {k: v + factor * (task[k] - v) for k, v in base.items()}
        model.load_state_dict(merged)
        options = FeatureOptions(sensitive=sensitive)
        layers = calibrate_features(model, base, [task], floats(4, 5, tasks=1), options=options).report.layers
        assert [layer.xi for layer in layers] == pytest.approx(expected), key
        assert [bool(layer.why) for layer in layers] == [xi == 1 for xi in expected]
        assert [layer.measured for layer in layers] == pytest.approx([1 / factor] * 3)


def test_how_xi_varies_with_the_number_of_samples():
    """The report's xi of n samples is that of a first layer calibrated with the first n alone; so is the last one."""
    model = build_model(mlp)
    base, models = make_task_states(model)
    merged, samples = average_states(base, models), floats(4, 5, count=5)
    model.load_state_dict(merged)
    first = calibrate_features(model, base, models, samples).report.layers[0]
    assert list(first.by_samples) == [1, 2, 4, 5]
    for count, xi in first.by_samples.items():
        model.load_state_dict(merged)
        alone = calibrate_features(model, base, models, [own[:count] for own in samples]).report.layers[0]
        assert alone.xi == pytest.approx(xi, rel=1e-12)


class Counted(StateDict):
    """A checkpoint that knows how many bytes of what it gave are still held by someone."""

    held = 0
    most = 0

    def read(self, key, start, stop):
        units = super().read(key, start, stop)
        Counted.held += units.nbytes
        Counted.most = max(Counted.most, Counted.held)
        weakref.finalize(units, self.given_back, units.nbytes)
        return units

    @staticmethod
    def given_back(size: int) -> None:
        Counted.held -= size


def test_a_layer_at_a_time_is_read_however_many_models():
    """Beside the module, which holds one model: the base's layer and one task's. Never a second model's weights."""
    wide = 600
    model = build_model(lambda: nn.Sequential(*(nn.Linear(wide, wide) for _ in range(8))))
    base, models = make_task_states(model, 5, 0.01)
    merged = average_states(base, models)
    layer = wide * (wide + 1) * 8
    model.load_state_dict(merged)
    gram = measure_gram(open_checkpoint(base), open_checkpoint(merged), [open_checkpoint(m) for m in models], "abcde")
    Counted.held = Counted.most = 0
    counted = [Counted(state, f"model {n}") for n, state in enumerate([base, *models])]
    calibrate_features(model, counted[0], counted[1:], floats(1, wide, tasks=5, count=1), gram=gram)
    assert layer < Counted.most < 2.1 * layer
    assert Counted.held == 0


def test_a_model_that_is_training_goes_on_training_and_keeps_no_hook():
    model = build_model(Convolutions)
    base, models = make_task_states(model)
    model.load_state_dict(average_states(base, models))
    model.train()
    calibrate_features(model, base, models, floats(3, 6, 6))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.norm.running_mean, base["norm.running_mean"])


def refused(base, models, samples, merged=None, model=None, **options) -> str:
    model = model or build_model(mlp)
    model.load_state_dict(merged or average_states(base, models))
    with pytest.raises(MagMaxError) as caught:
        calibrate_features(model, base, models, samples, options=FeatureOptions(**options))
    assert not any(module._forward_pre_hooks for module in model.modules())
    return str(caught.value)


def test_what_cannot_be_calibrated_is_refused():
    base, models = make_task_states(build_model(mlp))
    samples = floats(4, 5)
    assert "each model needs samples of its task: 2 models, samples of 1" in refused(base, models, samples[:1])
    assert "there are no samples of model 2" in refused(base, models, [samples[0], []])
    assert "model 1, sample 1: Sequential cannot be run on this list" in refused(base, models, [[[1, 2]], [[3]]])
    wrong_width = floats(4, 6)
    assert "sample 1: Sequential cannot be run on this Tensor" in refused(base, models, wrong_width)
    assert "model 1: has the base's weights" in refused(base, [base, models[1]], samples)
    assert "the merged model: has the base's weights" in refused(base, models, samples, merged=base)
    assert "features are not finite" in refused(base, models, [[samples[0][0] * torch.inf], samples[1]])
    lacking = {key: value for key, value in models[1].items() if key != "3.bias"}
    assert "model 2: has no tensor 3.bias" in refused(base, [models[0], lacking], samples, merged=models[0])


def test_what_is_not_a_merge_of_these_is_refused_unless_told_otherwise():
    model = build_model(lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 3)))
    base, (first, second, other) = make_task_states(model, 3)
    samples = floats(4, 5)
    said = refused(base, [first, second], samples, merged=other, model=model)
    assert "is not a merge of model 1, model 2" in said
    assert "--any-model" in said
    model.load_state_dict(other)
    found = calibrate_features(model, base, [first, second], samples, options=FeatureOptions(any_model=True))
    assert all(layer.xi > 0 for layer in found.report.layers)


def test_an_error_in_the_middle_of_a_model_stops_all_samples():
    """Raised once some samples wait for a layer: no thread is left behind."""
    import threading

    model = build_model(mlp)
    base, models = make_task_states(model)
    model.load_state_dict(average_states(base, models))
    runs: list[int] = []

    def run(model, items):
        runs.append(1)
        if len(runs) == 7:
            raise KeyError("spent")
        run_items(model, items)

    with pytest.raises(KeyError, match="spent"):
        calibrate_features(model, base, models, floats(4, 5), run)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("turn")]
