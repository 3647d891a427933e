"""What is not supported, misspelt or without effect is said, with its line; nothing passes silently."""

from __future__ import annotations

import json

import pytest
from tests.recipes.mergekit.test_recipes import run

from magmax import MagMaxError
from magmax.recipes.recipe import load_recipe

START = "merge_method: ties\nbase_model: base\nmodels:\n  - {model: poet, parameters: {weight: 1}}\n"


@pytest.fixture
def written(models, tmp_path, monkeypatch):
    """Writes a recipe beside nothing, with the models in the current folder."""
    monkeypatch.chdir(models)

    def write(text: str) -> str:
        (tmp_path / "theirs.yaml").write_text(text)
        return str(tmp_path / "theirs.yaml")

    return write


UNSUPPORTED = {
    "merge_method: nuslerp\nmodels: [{model: poet}, {model: coder}]\n": (
        1, "not supported here: merge_method nuslerp; for two models without a base, slerp with t = w2 / (w1 + w2) is "
        "the same arc",
    ),
    "merge_method: linear\nslices:\n  - sources: [{model: poet, layer_range: [0, 2]}]\n"
    "  - sources: [{model: coder, layer_range: [2, 4]}]\n": (
        2, "not supported here: a model put together of 2 slices; one slice with all layers, or models, is",
    ),
    "merge_method: linear\nmodules: {text: {models: []}}\n": (
        2, "not supported here: modules; one recipe merges one model, with the key models",
    ),
    START + "dtype: float64\n": (
        5, "not supported here: float64 arithmetic on narrower models; leave dtype out (models stored in float64 are "
        "computed in it), or write out_dtype: float64",
    ),
    START + "tokenizer:\n  source: base\n  pad_to_multiple_of: 8\n": (
        7, "not supported here: tokenizer.pad_to_multiple_of; the base's tokenizer is copied",
    ),
    START + "parameters: {rescale: true}\n": (
        5, "not supported here: rescaling to the norm before trimming; raise lambda instead",
    ),
    START + "parameters:\n  normalize: [{filter: mlp, value: true}, {value: false}]\n": (
        6, "not supported here: normalize by layer or tensor; give one value for all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", UNSUPPORTED)
def test_what_is_not_supported_is_named_with_its_line_and_what_to_do(text, written):
    file, (line, words) = written(text), UNSUPPORTED[text]
    with pytest.raises(MagMaxError) as caught:
        load_recipe(file)
    assert str(caught.value) == f"{file}, line {line}: {words}"


MISTAKES = {
    "merge_method: tise\nmodels: [{model: poet}]\n": "line 1: there is no merge_method 'tise'; did you mean 'ties'?",
    START + "parametres: {weight: 1}\n": "line 5: unknown key 'parametres'; did you mean 'parameters'?",
    START.replace("parameters:", "params:"): "line 4: unknown key 'models.0.params'; did you mean 'parameters'?",
    START + "parameters: {densty: 0.5}\n": "line 5: unknown parameter 'densty'; did you mean 'density'?",
    START.replace("weight", "wieght"): "line 4: unknown parameter 'wieght'; did you mean 'weight'?",
    START.replace("{weight: 1}", "{density: 0.5}"): "line 4: weight is missing; the merge method has no default for it",
    START.replace("1}", "[{filter: mlp, value: 1}]}"): "line 4: weight is missing for tensors that no filter fits",
    START.replace("1}", "heavy}"): "line 4: weight needs a number, not 'heavy'",
    START.replace("1}", "[]}"): "line 4: weight is an empty list",
    START.replace("1}", "[{filter: mlp, val: 1}]}"): "line 4: weight is a number, a list of numbers or a list of",
    START + "parameters: {density: -1.5}\n": "line 5: prune needs density from 0 to 1, not -1.5",
    START + "parameters: {density: [0.5, 1.5]}\n": "line 5: not supported here: density over the layers",
    START + "parameters: {lambda: 1:30}\n": "line 5: lambda needs a number, not '1:30'",
    START + "parameters: {normalize: 2}\n": "line 5: normalize is true or false, not 2",
    START.replace("poet", "poem"): "line 4: there is no poem, neither in the current folder nor beside the recipe",
    START.replace("base_model: base\n", ""): "line 1: ties needs a base_model",
    START.replace("poet", "base"): "line 3: ties merges at least 1 beside the base, not 0",
    START + "  - {model: poet, parameters: {weight: 1}}\n": "line 3: poet is given twice; name each model once",
    START + "slices: []\n": "has both models and slices; a recipe has one of them",
    "merge_method: linear\n": "has neither models nor slices; a recipe has one of them",
    START + "dtype: bf16\n": "line 5: dtype: input should be 'float16', 'bfloat16', 'float32' or 'float64', not 'bf16'",
    START + "tokenizer: {}\ntokenizer_source: union\n": "line 5: has a tokenizer_source beside it; keep one",
    START.replace("poet", "{model: {path: poet}, override_architecture: X}"): "of a model written as a map only model",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_explained_with_their_line(text, written):
    with pytest.raises(MagMaxError) as caught:
        load_recipe(written(text))
    assert MISTAKES[text] in str(caught.value)


def test_all_mistakes_are_told_at_once(written):
    text = START.replace("poet", "poem") + "parameters: {densty: 1, nrmalize: true}\ndtype: float64\n"
    with pytest.raises(MagMaxError) as caught:
        load_recipe(written(text))
    assert all(word in str(caught.value) for word in ("(4 problems)", "densty", "nrmalize", "float64", "no poem"))


def test_what_has_no_effect_is_noted(written):
    text = START.replace("{weight: 1}", "{weight: 1, lambda: 2, t: 0.5}") + (
        "  - {model: base, parameters: {weight: 0.5}}\nparameters: {int8_mask: true}\n"
    )
    assert [note.partition(": ")[2] for note in load_recipe(written(text)).notes] == [
        "lambda has no effect as a model's own parameter of ties, in mergekit too",
        "t has no effect as a model's own parameter of ties, in mergekit too",
        "weight has no effect as the base's own parameter of ties, in mergekit too",
        "int8_mask saves memory in mergekit, and changes nothing here",
    ]


def test_notes_go_to_stderr(written, monkeypatch, capsys):
    assert run(monkeypatch, "recipes", "check", written(START + "parameters: {int8_mask: true}\n")) == 0
    streams = capsys.readouterr()
    assert "line 5: int8_mask saves memory" in streams.err
    assert "no problem found" in streams.out


def test_a_part_of_the_layers_is_refused(written):
    text = START.replace("poet,", "poet, layer_range: [0, 3],")
    with pytest.raises(MagMaxError, match=r"line 4: not supported here: a part of the layers; base has 4"):
        load_recipe(written(text)).job("out")


def test_vocabularies_must_be_one_already(written, models, tmp_path):
    text = START + "tokenizer_source: union\n"
    load_recipe(written(text)).job(str(tmp_path / "out"))
    tokenizer = models / "poet/tokenizer.json"
    before = tokenizer.read_text()
    try:
        tokenizer.write_text(json.dumps({"model": {"vocab": {"other": 0}}}))
        with pytest.raises(
            MagMaxError, match="line 5: not supported here: bringing vocabularies together; poet has an"
        ):
            load_recipe(written(text)).job(str(tmp_path / "out"))
        tokenizer.unlink()
        with pytest.raises(MagMaxError, match=r"poet has no tokenizer\.json"):
            load_recipe(written(text)).job(str(tmp_path / "out"))
    finally:
        tokenizer.write_text(before)


def test_a_chat_template_must_be_the_bases(written, models, tmp_path):
    places = [models / name / "chat_template.jinja" for name in ("base", "poet")]
    try:
        for place in places:
            place.write_text("{{ messages }}\n")
        load_recipe(written(START + "chat_template: auto\n")).job(str(tmp_path / "out"))
        with pytest.raises(MagMaxError, match="line 5: not supported here: a chat template other than the base's"):
            load_recipe(written(START + "chat_template: chatml\n")).job(str(tmp_path / "out"))
        places[1].write_text("{{ other }}")
        with pytest.raises(MagMaxError, match="other than the base's"):
            load_recipe(written(START + "chat_template: auto\n")).job(str(tmp_path / "out"))
    finally:
        for place in places:
            place.unlink()


def test_models_lie_in_the_current_folder_or_beside_the_recipe(models, tmp_path, monkeypatch):
    recipe = models / "theirs.yaml"
    recipe.write_text(START)
    try:
        monkeypatch.chdir(tmp_path)
        assert load_recipe(str(recipe)).models == [str(models / "poet")]
        (tmp_path / "poet").mkdir()
        assert load_recipe(str(recipe)).models == ["poet"]
    finally:
        recipe.unlink()


def test_a_hub_id_is_passed_on(written):
    for name in ("someone/poet-7b", "someone/poet-7b@main", "hf://someone/poet-7b", "someone/base+someone/adapter"):
        assert load_recipe(written(START.replace("poet", name))).models == [name]


def test_models_of_several_types_need_a_type_to_be_named(written, models, tmp_path):
    import magmax

    magmax.merge("average", models / "base", [models / "coder"], out=tmp_path / "half", dtype="bfloat16")
    text = START.replace("poet", str(tmp_path / "half"))
    with pytest.raises(MagMaxError, match="line 1: the models have several types"):
        load_recipe(written(text)).job(str(tmp_path / "out"))
    load_recipe(written(text + "out_dtype: float32\n")).job(str(tmp_path / "out"))


def test_assignments_and_flags_stand_above_the_recipe(written, tmp_path):
    assigned = ["parameters.lambda=0.5", "parameters.density=0.25", "out_dtype=float16", "mismatch=base", "out=x"]
    plan = load_recipe(written(START), assigned)
    assert (plan.options.scaling_factor, plan.options.dtype, plan.options.mismatch) == (0.5, "float16", "base")
    assert plan.rule.describe()["chain"][0]["prune"]["density"] == 0.25
    assert plan.out == str(tmp_path / "x")
    assert load_recipe(written(START), (), {"dtype": "bfloat16"}).options.dtype == "bfloat16"
    with pytest.raises(MagMaxError, match=r"cannot set lambda of a mergekit recipe; did you mean"):
        load_recipe(written(START), ["lambda=1"])
    with pytest.raises(MagMaxError, match=r"--scaling-factor cannot be set beside a mergekit recipe"):
        load_recipe(written(START), (), {"scaling_factor": 1.0})
    with pytest.raises(MagMaxError, match="mismatch is strict or base, not 'lax'"):
        load_recipe(written(START), ["mismatch=lax"])


def test_there_is_no_base_to_keep_where_weights_are_merged(written):
    text = "merge_method: linear\nmodels: [{model: poet}, {model: coder}]\nparameters: {weight: 1}\n"
    with pytest.raises(MagMaxError, match="line 1: mismatch: base needs a base that the models start from; linear has"):
        load_recipe(written(text), ["mismatch=base"])


def test_a_recipe_can_be_swept_and_previewed(written, tmp_path, monkeypatch, capsys):
    file = written(START)
    assert run(monkeypatch, "merge", file, "--out", str(tmp_path / "out"), "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    words = ("search", "sweep", file, "scaling_factor=0.5,1", "--out", str(tmp_path / "swept"))
    assert run(monkeypatch, *words) == 0
    assert (tmp_path / "swept-0.5/model.safetensors").exists()
    assert run(monkeypatch, "merge", file) == 2
    assert "out=PATH" in capsys.readouterr().err
