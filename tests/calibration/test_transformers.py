"""Real architectures, tiny: every layer's coefficient is the plain definition's."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.calibration import naive  # noqa: E402
from tests.calibration.nets import average_states, build_model, make_task_states  # noqa: E402
from tests.calibration.test_features import tokens  # noqa: E402

from magmax.calibration import calibrate_features, run_items  # noqa: E402
from magmax.calibration.model_loading import load_module  # noqa: E402
from magmax.calibration.pretrained import load_tokenizer  # noqa: E402
from magmax.checkpoints import open_checkpoint  # noqa: E402
from magmax.continual.models.text_encoder import TextEncoder  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

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


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """The folder of a model with a Python file, and a user who says yes to all that transformers asks."""
    bert().save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def change(file="config.json", **changes):
        path = tmp_path / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | changes))
        return tmp_path

    yield change
    assert not (tmp_path / "ran").exists()


MINE = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model", "AutoTokenizer": ["mine.Tokenizer", None]}


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": MINE, "model_type": "mine"},
        {"auto_map": MINE, "model_type": "mine", "architectures": ["Model"]},
        {"attn_implementation": "somebody/kernel:run"},
        {"_attn_implementation_internal": "somebody/kernel:run"},
        {"text_config": {"attn_implementation": {"": "somebody/kernel"}}},
    ],
    ids=str,
)
def test_no_code_of_a_folder_runs(changes, hostile):
    folder = hostile(**changes)
    with pytest.raises(MagMaxError, match=r"config\.json"):
        load_module(folder, open_checkpoint(str(folder / "model.safetensors")))
    with pytest.raises(ValueError, match=r"config\.json|trust_remote_code|custom code|model type"):
        TextEncoder.load(folder, 8)


def test_no_code_of_a_tokenizer_runs(hostile):
    folder = hostile("tokenizer_config.json", auto_map=MINE, tokenizer_class="Mine")
    with pytest.raises(Exception, match=r"trust_remote_code|custom code|okenizer"):
        load_tokenizer(folder, local_files_only=True)


def test_architectures_are_models_and_code_beside_a_known_one_is_left_alone(hostile):
    """A config may name whatever transformers has, such as functions; only models are made."""
    folder = hostile(auto_map=MINE, architectures=["pipeline", "set_seed", "AutoConfig", "BertModel"])
    loaded = load_module(folder, open_checkpoint(str(folder / "model.safetensors")))
    assert type(loaded.module) is transformers.BertModel
