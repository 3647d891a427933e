"""Real architectures, tiny: every layer's coefficient is the plain definition's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.calibration import naive  # noqa: E402
from tests.calibration.nets import average_states, build_model, make_task_states  # noqa: E402
from tests.calibration.test_features import tokens  # noqa: E402

from magmax.calibration import calibrate_features, run_items  # noqa: E402

SMALL = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def bert():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=16)
    return transformers.BertModel(config)


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def pictures():
    draw = torch.Generator().manual_seed(3)
    return [[torch.randn(3, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2)] for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "samples", "count"),
    [(bert, tokens([[4, 7], [2, 5]]), 21), (llama, tokens([[4, 7], [2, 5]]), 20), (gpt2, tokens([[4, 7], [2, 5]]), 15),
     (vit, pictures(), 18)],
    ids=["bert", "llama", "gpt2", "vit"],
)  # fmt: skip
def test_as_defined(kind, samples, count):
    """Norms of some of these compute in float32 inside, hence the tolerance."""
    model = build_model(kind)
    base, models = make_task_states(model)
    merged = average_states(base, models)
    model.load_state_dict(merged)
    found = calibrate_features(model, base, models, samples)
    layers = [layer.name for layer in found.report.layers if not layer.why]
    state = model.state_dict()
    assert len(layers) == count
    order = in_order(build_model(kind), samples[0][0], layers)
    xis, expected = naive.reference_calibration(build_model(kind), base, merged, models, samples, run_items, order)
    told = {layer.name: layer.xi for layer in found.report.layers}
    for name in order:
        assert told[name] == pytest.approx(xis[name], rel=1e-4), name
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)


def in_order(model, item, layers):
    called = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name in layers
    ]
    with torch.no_grad():
        run_items(model, [item])
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(called))
