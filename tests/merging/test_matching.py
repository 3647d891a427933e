"""How models are matched to a base: names, tied tensors, rows; what is refused because too little would be merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from tests.models import Tensors, same_bytes

import magmax
from magmax import MagMaxError, Running, merge, open_checkpoint
from magmax.checkpoints.renamed import Renaming
from magmax.cli import main
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.job import Job
from magmax.merging.matching import match_to_base
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.recipes.recipe import build_request
from magmax.rules import make_rule


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(seed: int) -> Tensors:
    names = {"embeddings.weight": (12, 4), "layer.0.dense.weight": (4, 4), "layer.1.dense.weight": (4, 4), "norm": (4,)}
    return {name: numbers(*shape, seed=seed * 10 + n) for n, (name, shape) in enumerate(names.items())}


def prefixed(tensors: Tensors, prefix: str, **more: torch.Tensor) -> Tensors:
    return {**{prefix + name: tensor for name, tensor in tensors.items()}, **more}


def wanted_average(base: Tensors, models: list[Tensors]) -> Tensors:
    return merge("average", base, models)


BASE, MODELS = encoder(0), [encoder(1), encoder(2)]


# --- a merge of nothing is no merge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mismatch", ["base", "intersect", "union"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "bert.", "model.language_model."])
def test_a_model_whose_names_have_a_prefix_is_refused_and_the_prefix_named(prefix: str, mismatch: Any) -> None:
    tuned = prefixed(MODELS[0], prefix, **{"classifier.weight": numbers(2, 4)})
    for models in ([tuned], [MODELS[1], tuned], [tuned, prefixed(MODELS[1], prefix)]):
        with pytest.raises(MagMaxError, match=f"--strip {prefix}") as refused:
            merge("magmax", BASE, models, mismatch=mismatch)
        assert "each model once" not in str(refused.value)
    both = merge("average", BASE, [tuned, MODELS[1]], strip=prefix)
    assert same_bytes(both, wanted_average(BASE, MODELS))


def test_a_base_with_a_prefix_that_the_models_lack() -> None:
    with pytest.raises(MagMaxError, match="4 tensors have other names") as refused:
        merge("magmax", prefixed(BASE, "bert."), MODELS[:1], mismatch="base")
    assert "--rename '^=bert.'" in str(refused.value)
    found = merge("average", prefixed(BASE, "bert."), MODELS, rename={"^": "bert."})
    assert same_bytes(found, prefixed(wanted_average(BASE, MODELS), "bert."))


def test_one_line_stands_for_all_names_that_a_renaming_explains() -> None:
    many = {f"layer.{n}.w": numbers(3, seed=n) for n in range(160)}
    with pytest.raises(MagMaxError) as refused:
        merge("magmax", many, [prefixed(many, "model.", head=numbers(2))])
    assert len(str(refused.value).splitlines()) < 8
    assert "160 tensors have other names: model.layer.0.w is layer.0.w" in str(refused.value)
    assert "head" in str(refused.value)


def test_a_long_list_is_cut() -> None:
    many = {f"layer.{n}.w": numbers(3, seed=n) for n in range(160)}
    with pytest.raises(MagMaxError) as refused:
        merge("magmax", many, [{f"other{n}": numbers(5) for n in range(160)}])
    assert len(str(refused.value)) < 8000
    assert "more" in str(refused.value)


def test_parts_of_names_that_are_called_otherwise() -> None:
    old = {name.replace("norm", "LayerNorm.gamma"): tensor for name, tensor in MODELS[0].items()}
    base = {name.replace("norm", "LayerNorm.weight"): tensor for name, tensor in BASE.items()}
    with pytest.raises(MagMaxError, match=r"--rename '\\bgamma\\b=weight'"):
        merge("magmax", base, [old])
    found = merge("magmax", base, [old], rename={r"\bgamma\b": "weight"})
    assert same_bytes(found, merge("magmax", base, [{n.replace("gamma", "weight"): t for n, t in old.items()}]))


@pytest.mark.parametrize("mismatch", ["strict", "base", "intersect", "union"])
def test_nothing_in_common_is_refused(mismatch: Any) -> None:
    with pytest.raises(MagMaxError, match=r"nothing of it would be merged|do not match"):
        merge("magmax", BASE, [{"other": numbers(3, 3)}], mismatch=mismatch)
    halves = [{name: MODELS[0][name] for name in names} for names in (["norm"], ["embeddings.weight"])]
    if mismatch in ("base", "intersect"):
        with pytest.raises(MagMaxError, match="no tensor that every model has"):
            merge("magmax", BASE, halves, mismatch=mismatch)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_base_without_floating_tensors_is_refused(dtype: torch.dtype) -> None:
    base = {"w": numbers(4, 4).to(dtype)}
    tuned = {"w": numbers(4, 4, seed=1).to(dtype)}
    with pytest.raises(MagMaxError, match="0 elements are F16, BF16, F32 or F64"):
        merge("magmax", base, [tuned], mismatch="base")
    beside = {"norm": numbers(4)}, {"norm": numbers(4, seed=1)}
    if dtype.is_floating_point:  # most of the model would silently stay the base's
        with pytest.raises(MagMaxError, match="4 elements are F16, BF16, F32 or F64"):
            merge("magmax", base | beside[0], [tuned | beside[1]])
    else:
        assert torch.equal(merge("magmax", base | beside[0], [tuned | beside[1]])["w"], base["w"])


def test_absorb_and_diff_refuse_and_strip_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "one")]
    save_file(BASE, paths[0])
    save_file(prefixed(MODELS[0], "module."), paths[1])
    running = Running(tmp_path / "state", "magmax", paths[0], mismatch="base")
    with pytest.raises(MagMaxError, match=r"--strip module\."):
        running.absorb(paths[1])
    running.absorb(paths[1], strip="module.")
    running.result(out=tmp_path / "out.safetensors")
    assert same_bytes(load_file(tmp_path / "out.safetensors"), merge("magmax", BASE, MODELS[:1]))
    for options, code in ([], 2), (["--strip", "module."], 0):
        monkeypatch.setattr("sys.argv", ["magmax", "checkpoint", "diff", *map(str, paths), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code


# --- renaming ---------------------------------------------------------------------------------------------------------


def test_each_model_of_a_recipe_has_its_own_renaming(tmp_path: Path) -> None:
    save_file(prefixed(BASE, "b."), tmp_path / "base.safetensors")
    save_file(prefixed(MODELS[0], "module.", head=numbers(2)), tmp_path / "one.safetensors")
    save_file({name.replace("layer", "blocks"): t for name, t in MODELS[1].items()}, tmp_path / "two.safetensors")
    content = {
        "base": {"path": "base.safetensors", "strip": "b."},
        "models": [
            {"path": "one.safetensors", "strip": "module."},
            {"path": "two.safetensors", "rename": {r"^blocks\.(\d+)": r"layer.\1"}},
        ],
        "rule": "average",
        "out": "out.safetensors",
    }
    job = build_request(content, "here", {}, str(tmp_path)).job()
    job.run()
    assert same_bytes(load_file(tmp_path / "out.safetensors"), wanted_average(BASE, MODELS))
    assert any("1 tensors without 'module.' left out (head" in note for c in job.inputs for note in c.notes)


@pytest.mark.parametrize(
    ("renaming", "message"),
    [
        ({"rename": {"absent": ""}}, "no tensor's name has the pattern 'absent'"),
        ({"rename": {"(": ""}}, "cannot be done"),
        ({"rename": {"norm": r"\9"}}, "cannot be done"),
        ({"rename": {r"^.*": "same"}}, "is renamed to 'same', as is"),
        ({"rename": {"^norm$": ""}}, "which is no name"),
        ({"rename": {r"^(([a-z.0-9])+)+[=]$": ""}}, "too long|no tensor's name"),
        ({"strip": "bert."}, "no tensor's name begins with 'bert.'; the first is embeddings.weight"),
    ],
)
def test_a_renaming_that_cannot_be_meant_is_refused(renaming: dict[str, Any], message: str) -> None:
    long = {f"{'a' * 40}{n}": numbers(2) for n in range(2)} if "=" in str(renaming) else {}
    with pytest.raises(MagMaxError, match=message):
        merge("magmax", BASE, [{**MODELS[0], **long}], **renaming)


def test_tied_names_and_metadata_follow_a_renaming(tmp_path: Path) -> None:
    save_file({"m.a": numbers(3), "m.b": numbers(2)}, tmp_path / "x.safetensors", {"m.c": "m.a", "note": "kept"})
    view = Renaming(strip="m.").apply(open_checkpoint(tmp_path / "x.safetensors"))
    assert view.aliases == {"c": "a"}
    assert view.metadata == {"note": "kept"}
    assert view.read("a", 1, 3).tolist() == numbers(3)[1:].tolist()


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_modules_are_taken_out_of_what_wraps_them(wrap: Any) -> None:
    base, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    wanted = merge("magmax", dict(base.state_dict()), [dict(tuned.state_dict())])
    for one, other in ((wrap(base), tuned), (base, wrap(tuned)), (wrap(base), wrap(tuned))):
        merged = merge("magmax", one, [other])
        assert type(merged) is type(one)
        inner = getattr(merged, "_orig_mod", getattr(merged, "module", merged))
        assert same_bytes(dict(inner.state_dict()), wanted)


# --- tied tensors -----------------------------------------------------------------------------------------------------


def causal_lm(folder: Path, seed: int, tie: bool = True) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def with_copied_head(folder: Path, **changed: torch.Tensor) -> None:
    """Write the head beside the embedding that it is tied to, as older versions did."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | changed, folder / "model.safetensors", {"format": "pt"})


def loaded(folder: Path) -> Tensors:
    return {
        name: t.clone() for name, t in transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict().items()
    }


@pytest.mark.parametrize(
    "copies", [("base",), ("one",), ("two",), ("base", "one"), ("one", "two"), ("base", "one", "two")]
)
@pytest.mark.parametrize("rule", ["average", "random_mix"])
def test_a_copy_of_a_tied_head_does_not_matter(rule: str, copies: tuple[str, ...], tmp_path: Path) -> None:
    models = {name: causal_lm(tmp_path / name, n) for n, name in enumerate(("base", "one", "two"))}
    merge(rule, tmp_path / "base", [tmp_path / "one", tmp_path / "two"], out=tmp_path / "wanted")
    for name in copies:
        with_copied_head(tmp_path / name)
    merge(rule, tmp_path / "base", [tmp_path / "one", tmp_path / "two"], out=tmp_path / "out")
    found, wanted = loaded(tmp_path / "out"), loaded(tmp_path / "wanted")
    assert same_bytes(found, wanted) or (rule == "random_mix" and len(copies) == 3)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]) or len(copies) == 3
    if rule == "average":
        embeddings = [m.state_dict()["model.embed_tokens.weight"] for m in models.values()]
        mean = embeddings[0] + 0.5 * ((embeddings[1] - embeddings[0]) + (embeddings[2] - embeddings[0]))
        torch.testing.assert_close(found["lm_head.weight"], mean)


def test_a_head_that_was_untied_and_trained_is_refused(tmp_path: Path) -> None:
    causal_lm(tmp_path / "base", 0)
    causal_lm(tmp_path / "one", 1)
    with_copied_head(tmp_path / "one", **{"lm_head.weight": numbers(11, 8)})
    with pytest.raises(MagMaxError, match="tie_word_embeddings") as refused:
        merge("magmax", tmp_path / "base", [tmp_path / "one"], out=tmp_path / "out")
    assert "lm_head.weight apart from model.embed_tokens.weight" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_base_that_says_that_it_is_not_tied_is_not_tied(tmp_path: Path) -> None:
    causal_lm(tmp_path / "base", 0, tie=False)
    with_copied_head(tmp_path / "base")
    causal_lm(tmp_path / "one", 1)
    with pytest.raises(MagMaxError, match=r"has no tensor lm_head\.weight"):
        merge("magmax", tmp_path / "base", [tmp_path / "one"], out=tmp_path / "out")


class Tied(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shared = torch.nn.Embedding(5, 3)
        self.encoder, self.lm_head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        self.encoder.weight = self.lm_head.weight = self.shared.weight


def test_each_model_may_store_another_name_of_a_tied_group(tmp_path: Path) -> None:
    modules = [Tied(n) for n in range(3)]
    torch.save(modules[0].state_dict(), tmp_path / "base.bin")
    save_model(modules[1], str(tmp_path / "one.safetensors"))  # stores encoder.weight, and the others as metadata
    save_file({"lm_head.weight": modules[2].lm_head.weight.detach().clone()}, tmp_path / "two.safetensors")
    models = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    merge("average", tmp_path / "base.bin", models, out=tmp_path / "out.safetensors")
    wanted = merge("average", *[[{"w": m.shared.weight.detach()} for m in modules][at] for at in (0, slice(1, 3))])
    assert same_bytes(load_file(tmp_path / "out.safetensors"), {"shared.weight": wanted["w"]})
    into = Tied(9)
    _, unexpected = into.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=False)
    assert not unexpected
    assert torch.equal(into.lm_head.weight.detach(), wanted["w"])


def test_a_base_that_stores_one_name_of_a_group_matches_models_that_store_another(tmp_path: Path) -> None:
    """As T5 of save_pretrained, which stores shared.weight alone, and models of save_model."""
    modules = [Tied(n) for n in range(3)]
    save_file({"shared.weight": modules[0].shared.weight.detach().clone()}, tmp_path / "base.safetensors")
    for n in (1, 2):
        save_model(modules[n], str(tmp_path / f"{n}.safetensors"))
        assert "shared.weight" not in load_file(tmp_path / f"{n}.safetensors")
    models = [tmp_path / f"{n}.safetensors" for n in (1, 2)]
    merge("average", tmp_path / "base.safetensors", models, out=tmp_path / "out.safetensors")
    wanted = merge("average", *[[{"w": m.shared.weight.detach()} for m in modules][at] for at in (0, slice(1, 3))])
    assert same_bytes(load_file(tmp_path / "out.safetensors"), {"shared.weight": wanted["w"]})


def test_a_tied_group_that_a_model_stores_apart_with_other_values_is_refused(tmp_path: Path) -> None:
    torch.save(Tied(0).state_dict(), tmp_path / "base.bin")
    tuned = {
        name: numbers(5, 3, seed=n) for n, name in enumerate(["shared.weight", "encoder.weight", "lm_head.weight"])
    }
    with pytest.raises(MagMaxError, match=r"with different values, but in .* they are tied"):
        merge("magmax", tmp_path / "base.bin", [tuned], out=tmp_path / "o.safetensors")
    copies = dict.fromkeys(tuned, tuned["shared.weight"])
    merge("magmax", tmp_path / "base.bin", [{n: t.clone() for n, t in copies.items()}], out=tmp_path / "o.safetensors")


def test_a_running_merge_ties_as_the_merge_does(tmp_path: Path) -> None:
    for n, name in enumerate(("base", "one", "two")):
        causal_lm(tmp_path / name, n)
    with_copied_head(tmp_path / "base")
    models = [tmp_path / "one", tmp_path / "two"]
    merge("magmax", tmp_path / "base", models, out=tmp_path / "wanted")
    running = Running(tmp_path / "state", "magmax", tmp_path / "base")
    for model in models:
        running.absorb(model)
    running.result(out=tmp_path / "out")
    assert same_bytes(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "wanted/model.safetensors"))


# --- rows -------------------------------------------------------------------------------------------------------------


def heads(*rows: int, seed: int = 0) -> list[Tensors]:
    return [
        {"head": numbers(n, 3, seed=seed + at), "body": numbers(4, seed=seed + 9 + at)} for at, n in enumerate(rows)
    ]


def test_union_keeps_the_new_rows_of_each() -> None:
    base, one, two = heads(4, 6, 9)
    found = merge("magmax", base, [one, two], 1.0, mismatch="union")
    assert found["head"].shape == (9, 3)
    common = merge("magmax", {"head": base["head"]}, [{"head": m["head"][:4]} for m in (one, two)], 1.0)
    assert torch.equal(found["head"][:4], common["head"])
    second = merge("magmax", {"head": one["head"][4:]}, [{"head": one["head"][4:]}, {"head": two["head"][4:6]}], 1.0)
    assert torch.equal(found["head"][4:6], second["head"])
    assert torch.equal(found["head"][6:], two["head"][6:])
    assert torch.equal(
        found["body"], merge("magmax", {"b": base["body"]}, [{"b": one["body"]}, {"b": two["body"]}], 1.0)["b"]
    )


@pytest.mark.parametrize("rule", ["magmax", "average", "ties", "consensus", "iso_c"])
@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_what_only_one_model_has_stays_as_it_is(rule: str, factor: float, tmp_path: Path) -> None:
    base, one, two = heads(4, 4, 7)
    one["score"] = numbers(2, 3)
    for n, tensors in enumerate((base, one, two)):
        save_file(tensors, tmp_path / f"{n}.safetensors")
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    merge(rule, paths[0], paths[1:], factor, tmp_path / "out.safetensors", mismatch="union")
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["head"][4:], two["head"][4:])
    torch.testing.assert_close(found["score"], one["score"])


def test_a_grown_vocabulary_loads_with_the_config_of_the_model_that_has_it(tmp_path: Path) -> None:
    causal_lm(tmp_path / "base", 0)
    causal_lm(tmp_path / "one", 1)
    model = causal_lm(tmp_path / "two", 2)
    model.resize_token_embeddings(14)
    model.save_pretrained(tmp_path / "two")
    merge("average", tmp_path / "base", [tmp_path / "one", tmp_path / "two"], out=tmp_path / "out", mismatch="union")
    found = loaded(tmp_path / "out")["model.embed_tokens.weight"]
    assert found.shape == (14, 8)
    torch.testing.assert_close(found[11:], model.state_dict()["model.embed_tokens.weight"][11:])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 14
    (tmp_path / "two/model.safetensors").rename(tmp_path / "file.safetensors")  # as an adapter, it has no own config
    match = match_to_base(open_checkpoint(tmp_path / "one"), [open_checkpoint(tmp_path / "file.safetensors")], "union")
    assert match.base.small_files_folder() == tmp_path / "one"
    assert "set the sizes (vocab_size, num_labels) in the output's config.json" in match.base.notes[-1]


def test_union_in_memory_and_of_modules() -> None:
    base, tuned = heads(2, 3)
    assert merge("magmax", {k: t.numpy() for k, t in base.items()}, [tuned], mismatch="union")["head"].shape == (3, 3)
    with pytest.raises(MagMaxError, match="a module cannot grow"):
        merge("magmax", torch.nn.Linear(3, 2), [torch.nn.Linear(3, 4)], mismatch="union")


def test_a_running_merge_does_not_grow(tmp_path: Path) -> None:
    with pytest.raises(MagMaxError, match="does not grow"):
        Running(tmp_path / "state", "magmax", BASE, mismatch="union")


def test_rows_that_are_left_out_are_said() -> None:
    base, tuned = heads(4, 6)
    match = match_to_base(open_checkpoint(base, "base"), [open_checkpoint(tuned, "tuned")], "intersect")
    assert match.partly_merged["head"].reason == (
        "4 of 4 rows merged, the further rows of models left out (tuned has 6)"
    )


def test_a_trained_head_is_kept_by_union_and_the_message_says_so() -> None:
    tuned = {**MODELS[0], "score.weight": numbers(2, 4)}
    with pytest.raises(MagMaxError, match="to keep it: --mismatch union") as refused:
        merge("magmax", BASE, [tuned])
    assert "(1 problem)" in str(refused.value)
    assert torch.equal(merge("magmax", BASE, [tuned], mismatch="union")["score.weight"], tuned["score.weight"])


def test_a_model_is_not_changed_by_being_matched() -> None:
    before = {name: tensor.clone() for name, tensor in MODELS[0].items()}
    merge("magmax", BASE, [prefixed(MODELS[0], "x.")], 0.5, strip="x.")
    assert same_bytes(MODELS[0], before)
    assert np.array_equal(magmax.open_checkpoint(MODELS[0]).read("norm", 0, 4), before["norm"].numpy())


# --- types ------------------------------------------------------------------------------------------------------------


def test_tensors_that_stay_wide_under_a_narrow_dtype(tmp_path: Path) -> None:
    def mixed(seed: int) -> Tensors:
        tensors = {name: tensor.bfloat16() for name, tensor in encoder(seed).items()}
        return {**tensors, "router.bias": numbers(4, seed=seed)}

    for n in range(2):
        save_file(mixed(n), tmp_path / f"{n}.safetensors")
    content = {"base": "0.safetensors", "models": ["1.safetensors"], "out": "out.safetensors", "dtype": "bfloat16"}
    job = build_request(content, "here", {}, str(tmp_path)).job()
    assert any("router.bias" in note and "--keep-dtype" in note for note in job.all_notes())
    job = build_request({**content, "keep_dtype": "bias$"}, "here", {}, str(tmp_path)).job()
    assert not job.all_notes()
    job.run()
    found = load_file(tmp_path / "out.safetensors")
    assert found["router.bias"].dtype == torch.float32
    assert found["norm"].dtype == torch.bfloat16
    for pattern, message in (("absent", "no tensor's name has"), ("(", "is no regular expression")):
        with pytest.raises(MagMaxError, match=message):
            build_request({**content, "keep_dtype": pattern}, "here", {}, str(tmp_path)).job()


def test_an_interrupted_merge_is_not_taken_up_under_other_names(tmp_path: Path) -> None:
    base, model = [{f"{name}.w": numbers(3, seed=10 * k + n) for n, name in enumerate("abc")} for k in range(2)]
    save_file(base, tmp_path / "base.safetensors")
    save_file(model, tmp_path / "model.safetensors")
    notes: list[str] = []

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    def job(renaming: Renaming) -> Job:
        opened = open_checkpoint(tmp_path / "base.safetensors"), open_checkpoint(tmp_path / "model.safetensors")
        return merge_job(
            make_rule("average"), opened[0], [renaming.apply(opened[1])], tmp_path / "out.safetensors", OutputOptions()
        )

    swapped = Renaming(rename={r"^a\.": "x.", r"^b\.": "a.", r"^x\.": "b."})
    with pytest.raises(KeyboardInterrupt):
        job(swapped).run(ExecutionOptions(threads=1, progress=interrupt))
    job(Renaming()).run(ExecutionOptions(note=notes.append))
    assert any("starting afresh" in note for note in notes)
    assert same_bytes(load_file(tmp_path / "out.safetensors"), merge("average", base, [model]))
