"""MAGIC in weight space against its definition in float64, row by row, after every kind of rule."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models import load_tensors, same_bytes, save_tensors

import magmax
from magmax import MagMaxError, merge_adapters, open_checkpoint
from magmax.checkpoints import blocks
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.recipes.recipe import load_recipe, parse_rule
from magmax.rules import (
    Average,
    CalibrateWeights,
    Dare,
    IsoC,
    KthMagnitude,
    MagMax,
    Prune,
    Sce,
    Slerp,
    TaskArithmetic,
    Ties,
    TsvM,
    Tunable,
    chain,
    rule_from,
)
from magmax.rules.transforms.calibrate_weights import is_calibrated
from magmax.rules.transforms.sensitive_tensors import ScoreDrop, Sensitivity, largest_drops, read_sensitivity

SHAPES = {
    "embed_tokens.weight": (7, 6),
    "conv.weight": (6, 4, 3, 3),
    "layer.0.weight": (12, 5),
    "layer.1.weight": (3, 90),
    "layer.1.bias": (90,),
    "layer_norm.weight": (2, 5),
    "scale": (),
    "nothing.weight": (0, 4),
}
CALIBRATED = {"conv.weight", "layer.0.weight", "layer.1.weight"}
FORMS = [
    {"form": form, "per": per, "norm": norm}
    for form, per, norm in (
        ("norm", None, "l2"),
        ("norm", "tensor", "l1"),
        ("norm", "row", "l2"),
        ("norm", "row", "l1"),
        ("ellipsoid", None, "l2"),
        ("ellipsoid", "tensor", "l2"),
    )
]
AFTER = {
    "average": Average(),
    "sum": TaskArithmetic(),
    "magmax": MagMax(),
    "ties": Ties(density=0.4),
    "ties-tensor": Ties(density=0.4, span="tensor"),
    "tunable": Tunable(preference=[1, 2, 3]),
    "iso_c": IsoC(),
    "tsv_m": TsvM(),
    "sce": Sce(density=0.5),
    "dare": chain(Dare(density=0.5), MagMax()),
    "prune": chain(Prune(density=0.3), MagMax()),
    "prune-iso_c": chain(Prune(density=0.3), IsoC()),
}


def models(count, alike=0.0, dtype=torch.float64):
    """theta_0 and others; the task vectors share a part of their direction if they are `alike`."""
    draw = torch.Generator().manual_seed(7)
    made = [{key: torch.randn(shape, generator=draw, dtype=torch.float64) for key, shape in SHAPES.items()}]
    shared = {key: torch.randn(shape, generator=draw, dtype=torch.float64) for key, shape in SHAPES.items()}
    for size in range(1, count + 1):
        moved = {key: torch.randn(shape, generator=draw, dtype=torch.float64) for key, shape in SHAPES.items()}
        made.append({key: made[0][key] + size * (moved[key] + alike * shared[key]) for key in SHAPES})
    base, *others = [{key: tensor.to(dtype) for key, tensor in tensors.items()} for tensors in made]
    return base, others


def definition(taus, m, form, per, norm):
    """xi * m, one row after another; a tensor is one row if it is calibrated as a whole."""
    by_row = per == "row" or (per is None and form == "ellipsoid")
    rows = [v.reshape(v.shape[0] if by_row else 1, -1) for v in (*taus, m)]
    done = torch.stack(
        [calibrated_row([v[n] for v in rows[:-1]], rows[-1][n], form, norm) for n in range(len(rows[0]))]
    )
    return done.reshape(m.shape)


def calibrated_row(taus, m, form, norm):
    if not m.any():
        return m
    size = (lambda v: v.abs().sum()) if norm == "l1" else torch.linalg.vector_norm
    mean = sum(size(tau) for tau in taus) / len(taus)
    if form == "norm":
        return mean / size(m) * m
    e = 1e-8
    a = [(tau @ m) / (tau @ tau + e) for tau in taus]
    across = m - sum(x * tau for x, tau in zip(a, taus, strict=True))
    return m / torch.sqrt(sum(x**2 for x in a) + across @ across / (mean**2 + e) + e)


def close(ours, wanted, tolerance=1e-11):
    return (ours - wanted).abs().max() <= tolerance * max(1e-30, wanted.abs().max()) if wanted.numel() else True


def vectors(base, others, key):
    return [other[key] - base[key] for other in others]


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("options", FORMS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_each_form_is_its_definition_after_every_rule(name, options, monkeypatch):
    """Slabs of 32 elements cut the tensors between rows, and the longer rows too."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 32)
    base, others = models(3)
    plain = magmax.merge(AFTER[name], base, others, 0.7)
    ours = magmax.merge(chain(AFTER[name], CalibrateWeights(**options)), base, others, 0.7)
    for key in SHAPES:
        if key in CALIBRATED:
            wanted = base[key] + definition(vectors(base, others, key), plain[key] - base[key], **options)
            assert close(ours[key], wanted), key
        else:
            assert torch.equal(ours[key], plain[key]), key


def correlated(correlation, tasks=8, width=64):
    """Unit vectors of exactly this cosine with one another, one row each."""
    gram = torch.full((tasks, tasks), correlation, dtype=torch.float64).fill_diagonal_(1)
    values, turned = torch.linalg.eigh(gram)
    root = turned * values.clamp(min=0).sqrt()
    turn, _ = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    return [row[None] @ turn[:tasks] for row in root]


@pytest.mark.parametrize(
    ("correlation", "ellipsoid", "norm"),
    [(0, 2.83, 2.83), (0.2, 0.87, 1.83), (0.5, 0.33, 1.33), (0.8, 0.18, 1.10), (1, 0.13, 1.00)],
)
def test_the_more_alike_task_vectors_are_the_more_the_ellipsoid_shrinks_them(correlation, ellipsoid, norm):
    taus = correlated(correlation)
    mean = sum(taus) / len(taus)
    for form, wanted in (("ellipsoid", ellipsoid), ("norm", norm)):
        found = chain(Average(), CalibrateWeights(form=form))([tau.clone() for tau in taus])
        assert round(float(found.norm() / mean.norm()), 2) == wanted


def test_after_the_norm_a_tensor_is_as_long_as_the_task_vectors_that_came_in():
    """Neither what a transform dropped of them nor the scaling factor shortens it."""
    base, others = models(3)
    rule = chain(Prune(density=0.2), Dare(density=0.7), MagMax(), CalibrateWeights())
    for factor in (0.01, 0.5, 1.0, 30.0, -2.0):
        merged = magmax.merge(rule, base, others, factor)
        for key in CALIBRATED:
            wanted = sum(tau.norm() for tau in vectors(base, others, key)) / 3
            assert math.isclose((merged[key] - base[key]).norm(), wanted, rel_tol=1e-12)
            turned = (merged[key] - base[key]).flatten() @ (magmax.merge(rule, base, others)[key] - base[key]).flatten()
            assert (turned > 0) == (factor > 0)


def test_a_scaling_factor_by_tensor_counts_as_much():
    base, others = models(2)
    rule = chain(MagMax(), CalibrateWeights(form="ellipsoid"))
    by_tensor = magmax.rules.parse([{"filter": "conv", "value": 0.2}, {"value": 0.9}], per_model=False)
    merged = magmax.merge(rule, base, others, by_tensor)
    for key in SHAPES:
        assert torch.equal(merged[key], magmax.merge(rule, base, others, 0.2 if "conv" in key else 0.9)[key])


def test_where_nothing_is_merged_nothing_is_calibrated():
    zero, some = np.zeros((2, 3), np.float32), np.float32([[0, 0, 0], [1, 2, 2]])
    for options in FORMS:
        rule = chain(Average(), CalibrateWeights(**options))
        assert (rule([zero, zero]) == 0).all()
        assert (rule([some, -some]) == 0).all()
        assert np.isfinite(rule([zero, some])).all()
        assert np.isfinite(rule([some, some * np.float32(1e-30)])).all()
    rows = chain(Average(), CalibrateWeights(per="row"))([some, zero])
    assert np.allclose(rows, some / 2)
    base, others = models(2)
    still = magmax.merge(chain(MagMax(), CalibrateWeights()), base, others, 0.0)
    assert all(torch.equal(still[key], base[key]) for key in SHAPES)


def test_numpy_and_torch_agree_and_half_precision_is_rounded_once():
    taus = [np.random.default_rng(n).normal(size=(5, 7)).astype(np.float32) for n in range(3)]
    for options in FORMS:
        rule = chain(MagMax(), CalibrateWeights(**options))
        ours, theirs = rule(taus), rule([torch.from_numpy(tau) for tau in taus])
        assert np.allclose(ours, theirs.numpy(), rtol=3e-7)
        assert rule([torch.from_numpy(tau).bfloat16() for tau in taus]).dtype == torch.bfloat16
    assert all(
        (tau == np.random.default_rng(n).normal(size=(5, 7)).astype(np.float32)).all() for n, tau in enumerate(taus)
    )


def test_what_is_calibrated_is_told_from_name_and_shape():
    for key in ("model.layers.3.mlp.up_proj.weight", "visual.conv1.weight",
                "embeddings.patch_embeddings.projection.weight", "token_mixing.fc1.weight",
                "position_wise_ff.w_1.weight", "mlp.shared.up_proj.weight", "time_embedding.linear_1.weight",
                "layers.0.norm1.linear.weight", "attn.in_proj_weight", "lstm.weight_ih_l0", "mlp.experts.down_proj",
                "Dense_0/kernel", ""):  # fmt: skip
        assert is_calibrated(key, (4, 3, 2, 2) if "conv" in key or "patch" in key else (4, 3)), key
    for key in ("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight", "positional_embedding",
                "encoder.pos_embed", "cls_token", "final_layer_norm.weight", "ln_1.weight", "visual.proj",
                "text_projection", "lm_head.weight", "score.weight", "classifier.weight", "embed_out.weight",
                "tok_embeddings.weight", "encoder.embed_tokens.default.weight", "attn.bias"):  # fmt: skip
        assert not is_calibrated(key, (4, 3)), key
    assert not is_calibrated("layer.bias", (4,))
    assert not is_calibrated("layer.weight", (0, 4))


def test_the_guard_leaves_collinear_tensors_as_they_were(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 32)
    base, others = models(3)
    conv = base["conv.weight"]
    for size, other in enumerate(others, start=1):
        other["conv.weight"] = conv + size * torch.ones_like(conv)
    plain = magmax.merge("average", base, others, 0.5)
    told = []
    settings = ExecutionOptions(note=told.append)
    for guard, kept in ((0.5, {"conv.weight"}), (1.0, set()), (-1.0, CALIBRATED)):
        for form in ("norm", "ellipsoid"):
            rule = chain(Average(), CalibrateWeights(guard=guard, form=form))
            merged = magmax.merge(rule, base, others, 0.5, execution=settings)
            assert {key for key in CALIBRATED if torch.equal(merged[key], plain[key])} == kept
    assert any("the guard leaves 1 of 3 tensors as they were" in words for words in told)


@pytest.mark.parametrize("options", FORMS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_sensitive_tensors_only_shrink_and_the_others_only_grow(options, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 32)
    base, others = models(3)
    sensitive = ["conv.weight", "layer.1.bias"]
    for factor in (0.05, 20.0):
        plain, free, clipped = (
            magmax.merge(rule, base, others, factor)
            for rule in (
                MagMax(),
                chain(MagMax(), CalibrateWeights(**options)),
                chain(MagMax(), CalibrateWeights(**options, sensitive=sensitive)),
            )
        )
        for key in CALIBRATED:
            moved, to, found = (m[key] - base[key] for m in (plain, free, clipped))
            xi = to / moved
            bound = xi.clamp(max=1) if key in sensitive else xi.clamp(min=1)
            assert close(found, bound * moved, 1e-9), (key, factor)


@pytest.mark.parametrize("name", ["magmax", "ties", "sce", "iso_c"])
def test_threads_slabs_and_places_change_nothing(name, tmp_path, monkeypatch):
    base, others = models(3, dtype=torch.float32)
    paths = [save_tensors(tensors, tmp_path / f"{n}.safetensors") for n, tensors in enumerate([base, *others])]
    rule = chain(AFTER[name], CalibrateWeights(form="ellipsoid", guard=0.9))
    whole = magmax.merge(rule, base, others)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 32)
    outs = [tmp_path / f"out{threads}.safetensors" for threads in (1, 4)]
    for threads, out in zip((1, 4), outs, strict=True):
        magmax.merge(rule, paths[0], paths[1:], out=out, execution=ExecutionOptions(threads=threads))
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert same_bytes(load_tensors(outs[0]), magmax.merge(rule, base, others))
    assert all(close(load_tensors(outs[0])[key], whole[key], 1e-6) for key in SHAPES)


def test_the_ellipsoid_warns_where_task_vectors_are_alike():
    told: list[str] = []
    for alike in (0.0, 2.0):
        base, others = models(3, alike)
        for form in ("norm", "ellipsoid"):
            rule = chain(Ties(), CalibrateWeights(form=form))
            magmax.merge(rule, base, others, execution=ExecutionOptions(note=told.append))
    told = [each for each in told if "ellipsoid" in each]
    assert len(told) == 1
    assert "mean cosine is 0.78 (0.81 in conv.weight)" in told[0]
    assert "use form: norm" in told[0]


def test_models_that_differ_in_rows_are_calibrated_in_those_that_all_have(tmp_path):
    base, others = models(2)
    short = {**others[0], "layer.0.weight": others[0]["layer.0.weight"][:9]}
    rule = chain(Average(), CalibrateWeights(per="row"))
    merged = magmax.merge(rule, base, [short, others[1]], mismatch="intersect")
    whole = magmax.merge(rule, base, others)
    assert torch.equal(merged["layer.0.weight"][:9], whole["layer.0.weight"][:9])
    assert torch.equal(merged["layer.0.weight"][9:], base["layer.0.weight"][9:])


def test_adapters_are_calibrated_as_the_dense_updates_they_stand_for(tmp_path):
    from tests.merging.test_adapters import SHAPES as MODULES
    from tests.merging.test_adapters import three, updates

    adapters = three(tmp_path)
    base = {f"{module}.weight": torch.zeros(shape) for module, shape in MODULES.items()}
    rule = chain(MagMax(), CalibrateWeights())
    merge_adapters(rule, adapters, 40, tmp_path / "out", 0.3)
    dense = magmax.merge(rule, base, adapters, 0.3)
    found = updates(tmp_path / "out")
    for module in set(MODULES) - {"m.wide"}:
        expected = dense[f"{module}.weight"].flatten(1).double()
        assert (found[module] - expected).norm() <= 2e-6 * expected.norm()


def test_a_chain_is_written_and_read_again_and_knows_its_parts_order():
    rule = chain(Prune(density=0.2), MagMax(), CalibrateWeights(guard=0.5, sensitive=["a.weight"]))
    assert rule_from(rule.describe()) == rule
    assert chain(Prune(density=0.2), chain(MagMax(), CalibrateWeights(guard=0.5, sensitive=["a.weight"]))) == rule
    assert rule.passes == Prune().passes + 1
    assert rule_from(["slerp", "calibrate_weights"]).needs_base
    assert Slerp().for_scaling_factor(3.0) == Slerp()
    for parts in ((CalibrateWeights(), MagMax()), (CalibrateWeights(),), (MagMax(), CalibrateWeights(), Dare())):
        with pytest.raises(MagMaxError, match="then what calibrates its result"):
            chain(*parts)
    with pytest.raises(MagMaxError, match="same transform twice"):
        chain(KthMagnitude(), CalibrateWeights(), CalibrateWeights())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "sphere"}, "form to be norm or ellipsoid, not 'sphere'|one of norm, ellipsoid"),
        ({"per": "column"}, "per to be tensor or row, not 'column'"),
        ({"form": "ellipsoid", "norm": "l1"}, "the ellipsoid is one of L2 norms"),
        ({"guard": 1.5}, "guard from -1 to 1"),
        ({"sensitive": 3}, "sensitive to be names of tensors or a file's path, not 3"),
        ({"sensitive": "absent.json"}, "absent.json: cannot be read as a JSON file of sensitive tensors: No such file"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(MagMaxError, match=words):
        rule_from(["magmax", {"calibrate_weights": options}])


def test_a_sensitive_tensor_that_the_model_has_not_is_refused_with_the_nearest():
    base, others = models(2)
    with pytest.raises(MagMaxError, match=r"'layer\.2\.weight', which is no tensor of the model; did you mean 'layer"):
        magmax.merge(chain(MagMax(), CalibrateWeights(sensitive=["layer.2.weight"])), base, others)


MEASURED = Sensitivity(
    model="a merge",
    metric="accuracy",
    factor=1.1,
    samples=256,
    drops={
        "conv.weight": ScoreDrop(0.02, 0.01),
        "layer.0.weight": ScoreDrop(0.01, 0.02),
        "layer.1.weight": ScoreDrop(-0.5, 0.1),
        "scale": ScoreDrop(0.3, 0.1),
    },
    sensitive=("scale", "conv.weight"),
)


def test_what_was_measured_is_kept_and_read_from_beside_a_recipe(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(MEASURED.to_json())
    assert replace(read_sensitivity(path), sensitive=("scale", "conv.weight")) == MEASURED
    assert largest_drops(MEASURED.drops) == ["scale", "conv.weight"]
    assert largest_drops(MEASURED.drops, 1) == ["scale"]
    written = "base: b\nmodels: [m]\nrule: [magmax, {calibrate_weights: {sensitive: measured.json}}]\nout: o\n"
    (tmp_path / "recipe.yaml").write_text(written)
    rule = load_recipe(str(tmp_path / "recipe.yaml")).rule
    assert rule == chain(MagMax(), CalibrateWeights(sensitive=["scale", "conv.weight"]))
    assert parse_rule(json.dumps(["magmax", {"calibrate_weights": {"sensitive": str(path)}}]))[0] == rule


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "2"}, "has the format '2'"),
        ({"sensitive": ["layer.0.weight"]}, "its drop of 0.01 lies within the noise of 0.02"),
        ({"sensitive": ["other"]}, "other is called sensitive and was not measured"),
        ({"sensitive": ["scale", "scale"]}, "called sensitive twice"),
        ({"drops": {"scale": {"drop": float("nan"), "noise": 1}}}, "scale has drop nan"),
        ({"drops": {"scale": {"drop": 1, "noise": -1}}}, "a noise one of at least 0"),
        ({"drops": {"scale": {"drop": "1", "noise": 1}}}, "should be float"),
        ({"drops": [1]}, "is no file of sensitive tensors"),
        ({"samples": 2.5}, "should be int"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(change, words, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(json.loads(MEASURED.to_json()) | change))
    with pytest.raises(MagMaxError, match=words) as refusal:
        read_sensitivity(path)
    assert str(path) in str(refusal.value)


def test_a_name_too_many_is_told_before_anything_is_written(tmp_path):
    base, others = models(2)
    paths = [save_tensors(tensors, tmp_path / f"{n}.safetensors") for n, tensors in enumerate([base, *others])]
    with pytest.raises(MagMaxError, match="no tensor of the model"):
        magmax.merge(chain(MagMax(), CalibrateWeights(sensitive=["x"])), paths[0], paths[1:], out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert open_checkpoint(paths[0]).specs


def test_what_is_left_is_named():
    states = [{key: torch.randn(shape) for key, shape in (("a.fc.weight", (4, 3)), ("wte.weight", (5, 3)),
                                                          ("visual.proj", (3, 3)), ("a.fc.bias", (4,)))}
              for _ in range(3)]  # fmt: skip
    said: list[str] = []
    magmax.merge(
        chain(Average(), CalibrateWeights()), states[0], states[1:], execution=ExecutionOptions(note=said.append)
    )
    (note,) = said
    assert "2 tensors of two or more dimensions are left" in note
    assert "a parameter of its own: visual.proj; embedding: wte.weight" in note
