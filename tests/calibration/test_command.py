"""The command line on small models in the hub's layout: an encoder of texts, a language model, pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.calibration.nets import average_states, copy_with_state  # noqa: E402
from tests.preference.test_text import NAMES, WORDS, texts, write_csv  # noqa: E402
from tests.test_cli import run  # noqa: E402, F401

import magmax  # noqa: E402
from magmax.calibration import calibrate_features  # noqa: E402
from magmax.rules import CalibrateWeights, MagMax, chain  # noqa: E402

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer(folder):
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    return len(vocabulary)


def family(folder, model):
    """A base in the hub's layout, three fine-tuned models and their average."""
    model.save_pretrained(folder / "base")
    base = load_file(folder / "base" / "model.safetensors")
    draw = torch.Generator().manual_seed(5)
    moved = [{k: v + 0.02 * torch.randn(v.shape, generator=draw) for k, v in base.items()} for _ in NAMES]
    for name, state in zip(NAMES, moved, strict=True):
        save_file(state, folder / f"{name}.safetensors")
    magmax.merge("average", folder / "base", [folder / f"{n}.safetensors" for n in NAMES], out=folder / "merged")
    return base, moved


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    count = tokenizer(folder / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family(folder, transformers.BertModel(transformers.BertConfig(vocab_size=count, **SIZES)))
    for task, name in enumerate(NAMES):
        write_csv(folder / "samples" / f"{name}.csv", texts(task, 12, task))
    return folder


def given(place, *more):
    models = [place / f"{name}.safetensors" for name in NAMES]
    return ["calibrate", place / "merged", "--base", place / "base", "--models", *models, *more]


def samples_of(place, count):
    """The samples that are drawn, in plain words."""
    split = transformers.AutoTokenizer.from_pretrained(place / "base")
    found = []
    for name in NAMES:
        rows = (place / "samples" / f"{name}.csv").read_text().splitlines()[1:]
        order = np.random.default_rng(0).permutation(len(rows))[:count]
        found.append([split(rows[n].rpartition(",")[0])["input_ids"] for n in sorted(order)])
    return found


def test_features_as_from_python_and_a_report(run, place, tmp_path):  # noqa: F811
    out, told, drawn = tmp_path / "out", tmp_path / "r.json", tmp_path / "r.svg"
    words = ["--space", "feature", "--samples", place / "samples", "--n", 3, "--out", out]
    code, said, _ = run(*given(place, *words, "--report", told, "--plot", drawn))
    assert code == 0, said
    assert f"calibrated 23 tensors in feature space: {out}" in said

    model = transformers.BertModel.from_pretrained(place / "merged", dtype=torch.float32)
    models = [load_file(place / f"{name}.safetensors") for name in NAMES]
    found = calibrate_features(model, place / "base", models, samples_of(place, 3))
    made = load_file(out / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(made[key], value), key
    content = json.loads(told.read_text())
    assert content["models"] == list(NAMES)
    assert [layer["xi"] for layer in content["layers"]] == [layer.xi for layer in found.report.layers]
    first = content["layers"][0]
    assert list(first["by_samples"]) == ["1", "2", "3"]
    assert first["features_after"] == pytest.approx([first["xi"] * size for size in first["features_before"]])
    assert -1 <= first["cosine"] <= 1
    assert drawn.read_text().count("<path") > 10
    assert (out / "config.json").exists()
    assert (out / "tokenizer.json").exists()
    card = json.loads((out / "provenance.json").read_text())
    assert card["recipe"]["calibrate"]["space"] == "feature"
    assert list(card["recipe"]["merged"]["rule"]) == ["average"]
    assert [source["name"] for source in card["inputs"]] == ["base", "merged", *NAMES]


def test_weights_as_at_the_end_of_a_chain(run, place, tmp_path):  # noqa: F811
    """Equal but for the rounding of the merged model on its way through a float32 file."""
    paths = [place / f"{name}.safetensors" for name in NAMES]
    merged = magmax.merge("magmax", place / "base", paths, out=tmp_path / "merged.safetensors")
    for n, options in enumerate([[], ["--per", "row"], ["--form", "ellipsoid"], ["--norm", "l1"], ["--guard", "0.1"]]):
        out = tmp_path / f"{n}.safetensors"
        words = given(place, "--space", "weight", "--out", out, *options)
        words[1] = merged
        assert run(*words)[0] == 0
        kinds = dict(zip([word[2:] for word in options[::2]], options[1::2], strict=True))
        transform = CalibrateWeights(**{**kinds, **({"guard": 0.1} if "guard" in kinds else {})})
        chained = magmax.merge(chain(MagMax(), transform), place / "base", paths, out=tmp_path / f"c{n}.safetensors")
        ours, theirs = load_file(out), load_file(chained)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=f"{options} {key}")


def test_dual_measures_features_on_the_weights_that_are_calibrated(run, place, tmp_path):  # noqa: F811
    words = ["--samples", place / "samples", "--n", 2]
    assert run(*given(place, *words, "--out", tmp_path / "dual"))[0] == 0
    assert run(*given(place, "--space", "weight", "--out", tmp_path / "weight"))[0] == 0
    again = given(place, *words, "--space", "feature", "--out", tmp_path / "both")
    again[1] = tmp_path / "weight"
    assert run(*again)[0] == 0
    dual, both = (load_file(tmp_path / name / "model.safetensors") for name in ("dual", "both"))
    for key in dual:
        torch.testing.assert_close(dual[key], both[key], rtol=1e-5, atol=1e-6, msg=key)


def test_a_recipe_that_merges_and_calibrates(run, place, tmp_path):  # noqa: F811
    """The same tensors as merging first and calibrating what was written."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {place / 'base'}\nmodels: [{', '.join(str(place / f'{n}.safetensors') for n in NAMES)}]\n"
        f"rule: average\ncalibrate: {{space: dual, n: 2, samples: {place / 'samples'}}}\nout: {tmp_path / 'one'}\n"
    )
    code, _, err = run("merge", recipe)
    assert code == 0, err
    assert run(*given(place, "--samples", place / "samples", "--n", 2, "--out", tmp_path / "two"))[0] == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in two)
    made = json.loads((tmp_path / "one" / "provenance.json").read_text())["recipe"]
    assert made["calibrate"] == json.loads((tmp_path / "two" / "provenance.json").read_text())["recipe"]["calibrate"]
    recipe.write_text(recipe.read_text().replace("space: dual", "spaces: dual"))
    code, _, err = run("merge", recipe)
    assert (code, "did you mean 'space'?" in err) == (2, True)


def test_a_language_model_with_shared_embeddings(run, tmp_path):  # noqa: F811
    count = tokenizer(tmp_path / "base")
    config = transformers.LlamaConfig(vocab_size=count, num_key_value_heads=1, tie_word_embeddings=True, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, moved = family(tmp_path, transformers.LlamaForCausalLM(config))
    for name in NAMES:
        (tmp_path / "samples" / name).mkdir(parents=True)
        (tmp_path / "samples" / name / "a.txt").write_text("word1 word2 word3")
    words = ["--space", "feature", "--samples", tmp_path / "samples", "--out", tmp_path / "out"]
    code, out, err = run(*given(tmp_path, *words))
    assert code == 0, err
    assert "lm_head: shares model.embed_tokens.weight with model.embed_tokens" in out
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == base.keys()
    model = copy_with_state(transformers.LlamaForCausalLM(config), {**average_states(base, moved), **tied(base, moved)})
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")("word1 word2 word3")["input_ids"]
    calibrate_features(model, tmp_path / "base", moved, [[ids]] * 3)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)


def tied(base, moved):
    return {"lm_head.weight": average_states(base, moved)["model.embed_tokens.weight"]}


def test_pictures(run, tmp_path):  # noqa: F811
    from PIL import Image

    config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
    family(tmp_path, transformers.ViTModel(config, add_pooling_layer=False))
    view = {"size": 8, "crop_size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(view))
    for task, name in enumerate(NAMES):
        (tmp_path / "samples" / name / "class").mkdir(parents=True)
        pixels = np.random.default_rng(task).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "samples" / name / "class" / "0.png")
    words = ["--model", tmp_path / "base", "--samples", tmp_path / "samples", "--out", tmp_path / "out.safetensors"]
    code, out, err = run(*given(tmp_path, *words))
    assert code == 0, err
    assert "tensors in dual space" in out
    assert "left alone: embeddings (ViTEmbeddings with cls_token, position_embeddings is no kind of layer" in out


def refused(run, *words):  # noqa: F811
    code, _, err = run(*words)
    assert code == 2, err
    return err


def test_errors(run, place, tmp_path):  # noqa: F811
    out = ["--out", tmp_path / "out"]
    ready = [*out, "--samples", place / "samples"]
    assert "needs unlabelled samples of each task: --samples FOLDER" in refused(run, *given(place, *out))
    assert "takes no samples" in refused(run, *given(place, *ready, "--space", "weight"))
    assert "has no samples of 'cars'" in refused(run, *given(place, *out, "--samples", tmp_path))
    (tmp_path / "bare").mkdir()
    bare = given(place, *ready, "--model", tmp_path / "bare")
    assert "has no tokenizer for the texts of" in refused(run, *bare)
    assert "there is no folder" in refused(run, *given(place, *ready, "--report", tmp_path / "no" / "r.json"))
    assert "a plot is a .png, .svg or .pdf file" in refused(run, *given(place, *ready, "--plot", tmp_path / "r.gif"))
    assert "n and max_tokens are 1 or more" in refused(run, *given(place, *ready, "--n", 0))
    twice = given(place, *ready)
    twice[1] = place / "cars.safetensors"
    assert "is the same file as" in refused(run, *twice)
    other = load_file(place / "base" / "model.safetensors")
    draw = torch.Generator().manual_seed(99)
    save_file({k: v + torch.randn(v.shape, generator=draw) for k, v in other.items()}, tmp_path / "other.safetensors")
    stranger = given(place, *ready)
    stranger[1] = tmp_path / "other.safetensors"
    assert "is not a merge of cars, ships, birds" in refused(run, *stranger)
    assert run(*stranger, "--any-model")[0] == 0


def test_a_dry_run_checks_and_writes_nothing(run, place, tmp_path):  # noqa: F811
    words = given(place, "--out", tmp_path / "out", "--samples", place / "samples", "--dry-run")
    code, said, _ = run(*words)
    assert code == 0
    assert "no problem found; nothing was written" in said
    assert not list(tmp_path.iterdir())
    words[-2] = tmp_path / "nowhere"
    assert "has no samples of 'cars'" in refused(run, *words)


def test_sensitive_tensors_from_a_file(run, place, tmp_path):  # noqa: F811
    from magmax.rules.transforms.sensitive_tensors import ScoreDrop, Sensitivity

    name = "encoder.layer.0.output.dense.weight"
    file = tmp_path / "sensitive.json"
    file.write_text(Sensitivity("m", "accuracy", 1.1, 9, {name: ScoreDrop(0.1, 0.01)}, [name]).to_json())
    words = given(place, "--samples", place / "samples", "--n", 1, "--sensitive", file)
    told = tmp_path / "r.json"
    assert run(*words, "--space", "feature", "--out", tmp_path / "a", "--report", told)[0] == 0
    layers = {layer["name"]: layer for layer in json.loads(told.read_text())["layers"]}
    assert layers["encoder.layer.0.output.dense"]["xi"] == 1
    assert layers["encoder.layer.0.output.dense"]["why"].startswith("sensitive: clipped from")
    assert all(layer["xi"] >= 1 for layer in layers.values())
    assert run(*words, "--out", tmp_path / "b")[0] == 0
    file.write_text(file.read_text().replace("output.dense", "output.tense"))
    assert "did you mean 'encoder.layer.0.output.dense.weight'?" in refused(run, *words, "--out", tmp_path / "c")
