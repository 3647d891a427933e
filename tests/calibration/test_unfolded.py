"""The unfolded form is the folded one where xi is one a layer, and place by place what was measured there."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.calibration.nets import Convolutions, SharedLayer, average_states, build_model, make_task_states  # noqa: E402
from tests.calibration.test_features import floats, mlp  # noqa: E402

from magmax.calibration import calibrate_features, calibration_hooks  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(mlp, (4, 5)), (Convolutions, (3, 6, 6)), (SharedLayer, (3, 5))],
    ids=["mlp", "convolutions", "twice"],
)
def test_per_layer_is_the_folded_model(kind, shape):
    model = build_model(kind)
    base, models = make_task_states(model)
    merged = average_states(base, models)
    model.load_state_dict(merged)
    found = calibrate_features(model, base, models, floats(*shape))
    folded = dict(model.state_dict())
    x = floats(2, *shape)[0][0]
    with torch.no_grad():
        expected = model(x)
        model.load_state_dict(merged)
        plain = model(x)
        with calibration_hooks(model, base, found, per="layer"):
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(model(x), plain)
    assert folded.keys() == merged.keys()


def test_per_place_each_token_and_each_channel_has_its_own():
    linear = build_model(lambda: torch.nn.Sequential(torch.nn.Linear(5, 7)))
    convolution = build_model(lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    for model, shape, dims in ((linear, (4, 5), (-1,)), (convolution, (3, 6, 6), (-2, -1))):
        base, models = make_task_states(model)
        merged = average_states(base, models)
        model.load_state_dict(merged)
        samples = floats(*shape)
        found = calibrate_features(model, base, models, samples)

        def features(state, x, model=model):
            model.load_state_dict(state)
            with torch.no_grad():
                return model(x[None])[0]

        means = []
        for own, items in zip(models, samples, strict=True):
            changes = [[features(s, x) - features(base, x) for s in (own, merged)] for x in items]
            means.append(sum(f_k.abs().sum(dims) / f_m.abs().sum(dims) for f_k, f_m in changes) / len(items))
        xi = sum(means) / len(means)
        assert found.report.layers[0].by_place == pytest.approx(xi.tolist(), rel=1e-9)
        x = samples[0][0]
        pre, full = features(base, x), features(merged, x)
        expected = pre + xi.reshape(-1, *(1 for _ in dims)) * (full - pre)
        with calibration_hooks(model, base, found), torch.no_grad():
            torch.testing.assert_close(model(x[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_tokens_beyond_those_measured_take_the_layers_own():
    model = build_model(lambda: torch.nn.Sequential(torch.nn.Linear(5, 7)))
    base, models = make_task_states(model)
    merged = average_states(base, models)
    model.load_state_dict(merged)
    found = calibrate_features(model, base, models, floats(2, 5))
    xi = found.report.layers[0]
    x = floats(6, 5)[0][0]
    with torch.no_grad():
        model.load_state_dict(base)
        pre = model(x)
        model.load_state_dict(merged)
        full = model(x)
        each = torch.tensor([*xi.by_place, *[xi.xi] * 4], dtype=torch.float64)[:, None]
        with calibration_hooks(model, base, found):
            torch.testing.assert_close(model(x[None])[0], pre + each * (full - pre), rtol=1e-9, atol=1e-9)
