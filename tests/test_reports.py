"""Inputs that were reported to other libraries, given to the commands here; docs/dev/reports.md names the threads."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tests.models import Tensors, load_tensors, same_bytes, save_tensors

import magmax
from magmax import MagMaxError, cli
from magmax.checkpoints import TensorSpec, open_checkpoint
from magmax.checkpoints.safetensors import HEADER_LIMIT
from magmax.checkpoints.writer import OutputDraft, OutputPath
from magmax.continual.data.scenarios import class_incremental
from magmax.continual.evaluation import measures

NAMES = ("base", "a", "b")
VALUES = (1.0, 2.0, 5.0)
"""Filled into the base and two models; the average of the models is 3.5."""


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["magmax", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return command


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_bytes(header: Any, data: bytes = b"", before: bytes = b"", after: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = before + text + after
    return struct.pack("<Q", len(text)) + text + data


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


W = entry(0, 4, 1)
TWICE = b'{"w":%s,"w":%s}' % ((json.dumps(W).encode(),) * 2)
DAMAGED = {
    "a name twice in the header": (file_bytes(TWICE, floats(1)), "names w twice"),
    "overlapping tensors": (file_bytes({"row": W, "all": entry(0, 8, 2)}, floats(1, 2)), "overlaps"),
    "bytes after the last tensor": (file_bytes({"w": W}, floats(1) + b"\0" * 5), "5 bytes after its last tensor"),
    "a header padded with NUL": (file_bytes({"w": W}, floats(1), after=b"\0\0\0"), "not JSON"),
    "a shape that its bytes do not fill": (file_bytes({"w": entry(0, 4, 1000, 1000)}, floats(1)), "4,000,000"),
    "half a byte of a four-bit type": (file_bytes({"w": entry(0, 2, 3, dtype="F4")}, b"\0\0"), "whole byte"),
    "numbers in the metadata": (file_bytes({"__metadata__": {"n": 1}, "w": W}, floats(1)), "not a map of strings"),
}


@pytest.mark.parametrize(("content", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_words_that_name_the_damage(content, words, run, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    code, out, err = run("checkpoint", "inspect", tmp_path / "x.safetensors")
    assert (code, out) == (2, "")
    assert "x.safetensors" in err
    assert words in err


def test_a_header_beyond_the_formats_limit_is_not_called_truncated(run, tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)
    code, _, err = run("checkpoint", "inspect", path)
    assert code == 2
    assert "100,000,001" in err
    assert "truncated" not in err


def test_no_header_is_written_that_no_library_reads(tmp_path):
    with pytest.raises(MagMaxError, match="its header would take 100,0"):
        OutputDraft(OutputPath(tmp_path / "o.safetensors"), {"w": TensorSpec("F32", (1,))}, {"x": "y" * HEADER_LIMIT})


def test_a_tensor_is_not_stored_under_the_name_of_the_metadata(run, tmp_path):
    torch.save({"w": torch.ones(2), "__metadata__": torch.ones(2)}, tmp_path / "x.pt")
    code, _, err = run("checkpoint", "convert", tmp_path / "x.pt", "--out", tmp_path / "o.safetensors")
    assert code == 2
    assert "cannot be called __metadata__" in err
    assert not (tmp_path / "o.safetensors").exists()


def unaligned(value: float) -> bytes:
    header = json.dumps({"u": entry(0, 3, 3, dtype="U8"), "w": entry(3, 11, 2)}).encode()
    return file_bytes(header, b"\1\2\3" + floats(value, value), after=b" " * (1 - len(header) % 2))


def with_attribute(value: float) -> Tensors:
    tensor = torch.full((2,), value)
    tensor.trained_by = "somebody"  # torch.save writes such a tensor as torch._tensor._rebuild_from_type_v2
    return {"w": tensor}


STORED: dict[str, tuple[Callable[[float], Any], str]] = {
    "several empty tensors": (
        lambda v: {"w": torch.full((2,), v), "A": torch.zeros(0), "B": torch.zeros(0), "C": torch.zeros(2, 0)},
        "safetensors",
    ),
    "a scalar": (lambda v: {"w": torch.tensor(v)}, "safetensors"),
    "complex rotations": (
        lambda v: {"w": torch.full((2,), v), "freqs_cis": torch.polar(torch.ones(3), torch.arange(3.0))},
        "safetensors",
    ),
    "a mask of bytes": (
        lambda v: {"w": torch.full((2,), v), "attn.bias": torch.ones(3, 3, dtype=torch.uint8).tril()},
        "safetensors",
    ),
    "data at odd places": (unaligned, "safetensors"),
    "metadata that is null": (lambda v: file_bytes({"__metadata__": None, "w": W}, floats(v)), "safetensors"),
    "metadata that is empty": (lambda v: file_bytes({"__metadata__": {}, "w": W}, floats(v)), "safetensors"),
    "spaces around the header": (lambda v: file_bytes({"w": W}, floats(v), b"  ", b" " * 99), "safetensors"),
    "a tensor with an attribute": (with_attribute, "pt"),
    "slices of a large tensor": (lambda v: {"w": torch.full((999,), v)[3:5], "t": torch.arange(6.0)[1::2]}, "pt"),
    "transposed and expanded": (lambda v: {"w": torch.full((1, 3), v).expand(2, 3).T}, "pt"),
}


@pytest.mark.parametrize(("make", "kind"), STORED.values(), ids=STORED)
def test_every_way_to_store_a_tensor_merges_to_its_value(make, kind, run, tmp_path):
    paths = [tmp_path / f"{name}.{kind}" for name in NAMES]
    for path, value in zip(paths, VALUES, strict=True):
        content = make(value)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path) if kind == "pt" else save_tensors(content, path)
    out = tmp_path / "o.safetensors"
    code, _, err = run("merge", "--base", *paths, "--out", out, "--rule", "average", "--scaling-factor", 1)
    assert code == 0, err
    merged = load_tensors(out)
    assert torch.equal(merged.pop("w").reshape(-1).unique(), torch.tensor([3.5]))
    kept = make(VALUES[0])
    if not isinstance(kept, bytes):
        assert same_bytes(merged, {key: t for key, t in kept.items() if key != "w"})


def test_lazy_views_of_torch_are_merged_by_their_values_or_refused(run, tmp_path):
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    views = {"w": torch.complex(torch.zeros(2), torch.full((2,), -1.0)).conj().imag, "c": numbers, "d": numbers.conj()}
    assert views["w"].is_neg()
    merged = magmax.merge("task_arithmetic", {**views, "w": torch.zeros(2)}, [views], 1.0)
    assert torch.equal(merged["w"], torch.ones(2))
    assert torch.equal(merged["d"], torch.tensor([1 - 2j, 3 + 4j]))
    torch.save(views, tmp_path / "views.pt")
    torch.save({**views, "w": torch.zeros(2)}, tmp_path / "base.pt")
    words = ["--base", tmp_path / "base.pt", tmp_path / "views.pt", "--out", tmp_path / "o.safetensors"]
    code, _, err = run("merge", *words, "--scaling-factor", 1)
    if code:
        assert code == 2
        assert "resolve_conj" in err
    else:
        assert same_bytes(load_tensors(tmp_path / "o.safetensors"), {key: t.clone() for key, t in merged.items()})


def put_models(folder: Path, make: Callable[[int], Tensors], **beside: Callable[[int], Any]) -> list[Path]:
    """A base and two models as folders, with JSON files beside the weights."""
    for number, name in enumerate(NAMES):
        save_tensors(make(number), folder / name / "model.safetensors")
        for file, content in beside.items():
            (folder / name / f"{file}.json").write_text(json.dumps(content(number)))
    return [folder / name for name in NAMES]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Tensors]:
    def make(seed: int) -> Tensors:
        return {"w": torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)}

    return make


def recipe(folder: Path, method: str, models: dict[str, dict[str, Any]], **keys: Any) -> Path:
    """A recipe of mergekit's; models by name, with their parameters."""
    listed = [{"model": str(folder / name), "parameters": parameters} for name, parameters in models.items()]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": method, "models": listed, **keys}))
    return path


def weights(folder: Path) -> torch.Tensor:
    return load_tensors(folder / "model.safetensors")["w"]


@pytest.mark.parametrize("normalize", [True, False, None])
def test_linear_divides_by_the_sum_of_weights_unless_told_not_to(normalize, run, tmp_path):
    _, a, b = put_models(tmp_path, drawn(4, 4))
    keys = {} if normalize is None else {"parameters": {"normalize": normalize}}
    path = recipe(tmp_path, "linear", {"a": {"weight": 0.1}, "b": {"weight": 1.0}}, dtype="float32", **keys)
    assert run("merge", path, "--out", tmp_path / "o")[0] == 0
    sum_of_both = 0.1 * weights(a).double() + weights(b).double()
    expected = sum_of_both if normalize is False else sum_of_both / 1.1
    assert torch.allclose(weights(tmp_path / "o").double(), expected, atol=1e-6)


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_the_type_a_recipe_names_is_that_of_weights_and_config(key, run, tmp_path):
    put_models(tmp_path, drawn(4), config=lambda n: {"dtype": "float32"})
    path = recipe(tmp_path, "linear", {"a": {"weight": 1}, "b": {"weight": 1}}, **{key: "bfloat16"})
    assert run("merge", path, "--out", tmp_path / "o")[0] == 0
    assert weights(tmp_path / "o").dtype == torch.bfloat16
    assert json.loads((tmp_path / "o" / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_the_configs_inside_of_a_config_get_the_type_too(run, tmp_path):
    inner = {"torch_dtype": "float32", "hidden_size": 4}
    base, a, _ = put_models(tmp_path, drawn(4), config=lambda n: {"dtype": "float32", "text_config": inner})
    assert run("merge", "--base", base, a, "--out", tmp_path / "o", "--dtype", "bfloat16")[0] == 0
    written = json.loads((tmp_path / "o" / "config.json").read_text())
    assert written == {"dtype": "bfloat16", "text_config": {**inner, "torch_dtype": "bfloat16"}}


def test_models_in_half_precisions_of_both_kinds_are_merged_in_float32(run, tmp_path):
    base, a, b = put_models(tmp_path, drawn(8, 8))
    for folder, dtype in ((a, torch.float16), (b, torch.bfloat16)):
        save_tensors({"w": weights(folder).to(dtype)}, folder / "model.safetensors")
    assert run("merge", "--base", base, a, b, "--rule", "average", "--out", tmp_path / "o")[0] == 0
    start = weights(base)
    expected = start + ((weights(a).float() - start) + (weights(b).float() - start)) / 2
    assert torch.equal(weights(tmp_path / "o"), expected)


def test_model_stock_of_three_models_takes_the_papers_factor(run, tmp_path):
    base, a, b = put_models(tmp_path, drawn(6, 5))
    save_tensors(drawn(6, 5)(3), tmp_path / "c" / "model.safetensors")
    assert run("merge", "--base", base, a, b, tmp_path / "c", "--rule", "model_stock", "--out", tmp_path / "o")[0] == 0
    start, *tuned = (weights(p).double().reshape(-1) for p in (base, a, b, tmp_path / "c"))
    vectors = [w - start for w in tuned]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = sum(float(torch.cosine_similarity(vectors[i], vectors[j], 0)) for i, j in pairs) / 3
    expected = start + 3 * cosine / (1 + 2 * cosine) * sum(vectors) / 3
    assert torch.allclose(weights(tmp_path / "o").double().reshape(-1), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "ties", "breadcrumbs"])
def test_a_density_of_zero_never_yields_nan(method, run, tmp_path):
    base, *_ = put_models(tmp_path, drawn(4, 4))
    both = {"a": {"weight": 0.5, "density": 0.0}, "b": {"weight": 0.5, "density": 0.0}}
    path = recipe(tmp_path, method, both, base_model=str(base), dtype="float32")
    code, _, err = run("merge", path, "--out", tmp_path / "o")
    if method.startswith("dare"):
        assert code == 2
        assert "density above 0" in err
    else:
        assert torch.equal(weights(tmp_path / "o"), weights(base))


def test_a_method_of_another_spelling_is_corrected_before_any_model_is_looked_for(run, tmp_path):
    path = recipe(tmp_path, "dare-ties", {"nowhere": {}})
    code, _, err = run("merge", path, "--out", tmp_path / "o")
    assert code == 2
    assert "did you mean 'dare_ties'?" in err


@pytest.mark.parametrize("method", ["della_linear", "della", "dare_ties", "breadcrumbs_ties"])
def test_sparse_merges_in_float16_are_finite(method, run, tmp_path):
    base, *_ = put_models(tmp_path, drawn(16, 16, dtype=torch.float16))
    parameters = {"weight": 0.5, "density": 0.7, **({"epsilon": 0.2} if "della" in method else {})}
    path = recipe(tmp_path, method, {"a": parameters, "b": dict(parameters)}, base_model=str(base), dtype="float16")
    assert run("merge", path, "--out", tmp_path / "o")[0] == 0
    assert weights(tmp_path / "o").isfinite().all()


def test_nan_in_rows_of_unused_tokens_is_told_with_its_place(run, tmp_path):
    base, a, b = put_models(
        tmp_path, lambda n: {"w": torch.cat([torch.full((5, 4), float(n)), torch.full((1, 4), torch.nan if n else 0)])}
    )
    code, _, err = run("merge", "--base", base, a, b, "--out", tmp_path / "o")
    assert code == 2
    assert "w holds 4 NaN" in err


def test_a_list_of_weights_is_laid_over_the_layers(run, tmp_path):
    names = [f"model.layers.{i}.{part}" for i in range(5) for part in ("mlp", "q")]
    put_models(tmp_path, lambda n: {name: torch.full((2,), float(n)) for name in names})
    over_layers = [{"filter": "mlp", "value": [0, 1, 0.5]}, {"value": 0.25}]
    models = {"a": {"weight": over_layers}, "b": {"weight": 1}}
    path = recipe(tmp_path, "linear", models, parameters={"normalize": False}, dtype="float32")
    assert run("merge", path, "--out", tmp_path / "o")[0] == 0
    merged = load_tensors(tmp_path / "o" / "model.safetensors")
    assert [merged[name][0].item() for name in names[::2]] == [2, 2.5, 3, 2.75, 2.5]
    assert {merged[name][0].item() for name in names[1::2]} == {2.25}


@pytest.mark.parametrize("number", ["1e-1", "1E-1", "0.1", "+1e-01"])
def test_a_number_with_an_exponent_is_a_number_with_or_without_a_point(number, run, tmp_path):
    base, a, b = put_models(tmp_path, drawn(4))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {base}\nmodels: [{a}, {b}]\nscaling_factor: {number}\nrule: average\nout: {tmp_path / 'o'}\n"
    )
    assert run("merge", path)[0] == 0
    assert run("merge", path, f"scaling_factor={number}", "--out", tmp_path / "p")[0] == 0
    start = weights(base)
    expected = start + torch.tensor(0.1) * (((weights(a) - start) + (weights(b) - start)) / 2)
    assert torch.equal(weights(tmp_path / "o"), expected)
    assert torch.equal(weights(tmp_path / "p"), expected)


def test_a_plus_in_the_name_of_a_folder_is_no_adapter(run, tmp_path):
    put_models(tmp_path / "x+y", drawn(4))
    folders = [tmp_path / "x+y" / name for name in NAMES]
    assert run("merge", "--base", *folders, "--out", tmp_path / "o+p")[0] == 0
    path = recipe(tmp_path / "x+y", "linear", {"a": {"weight": 1}, "b": {"weight": 1}}, dtype="float32")
    assert run("merge", path, "--out", tmp_path / "q")[0] == 0
    assert torch.allclose(weights(tmp_path / "q"), (weights(folders[1]) + weights(folders[2])) / 2)


def test_one_checkpoint_under_two_names_is_refused(run, tmp_path):
    base, a, _ = put_models(tmp_path, drawn(4))
    save_tensors({"w": weights(a)}, tmp_path / "c" / "model.safetensors")
    code, _, err = run("merge", "--base", base, a, tmp_path / "c", "--out", tmp_path / "o")
    assert code == 2
    assert str(a) in err
    assert str(tmp_path / "c") in err


def test_layers_that_a_model_has_not_are_named(run, tmp_path):
    put_models(tmp_path, lambda n: {f"layers.{i}.w": torch.ones(2) for i in range(3)})
    path = tmp_path / "recipe.yaml"
    sources = [{"model": str(tmp_path / "a"), "layer_range": [0, 5]}]
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": [{"sources": sources}]}))
    code, _, err = run("merge", path, "--out", tmp_path / "o")
    assert code == 2
    assert "has 3, and layer_range is [0, 5]" in err


def test_a_missing_weight_is_told_with_its_line(run, tmp_path):
    base, *_ = put_models(tmp_path, drawn(4))
    path = recipe(tmp_path, "ties", {"a": {}, "b": {}}, base_model=str(base), dtype="float32")
    code, _, err = run("merge", path, "--out", tmp_path / "o")
    assert code == 2
    assert "line" in err
    assert "weight is missing" in err


def rope(number: int) -> dict[str, Any]:
    return {"rope_theta": (1e4, 1e6, 1e4)[number], "transformers_version": f"4.{number}", "text_config": {"x": 1}}


def test_a_model_with_another_rope_is_named(run, tmp_path):
    base, a, b = put_models(tmp_path, drawn(4), config=rope)
    code, _, err = run("merge", "--base", base, a, b, "--out", tmp_path / "o")
    assert code == 0
    assert f"{a}: its config.json is not the base's" in err
    assert "rope_theta 1000000.0 (base: 10000.0)" in err
    assert str(b) not in err
    state = tmp_path / "state"
    assert "rope_theta" in run("running", "absorb", state, a, "--base", base)[2]
    assert "rope_theta" not in run("running", "absorb", state, b)[2]


def vocabulary(number: int) -> dict[str, Any]:
    tokens = {"x": 0, "y": 1} if number < 2 else {"y": 0, "x": 1}
    return {"model": {"vocab": tokens}, "added_tokens": [{"content": "<new>", "id": 2}] * (number > 0)}


def test_a_model_with_other_token_numbers_is_named_and_added_tokens_are_no_matter(run, tmp_path):
    base, a, b = put_models(tmp_path, drawn(4), tokenizer=vocabulary)
    code, _, err = run("merge", "--base", base, a, b, "--out", tmp_path / "o")
    assert code == 0
    assert f"{b}: its tokenizer.json numbers tokens otherwise" in err
    assert "'x' 1 (base: 0)" in err
    assert str(a) not in err


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.model", "chat_template.jinja", "vocab.bpe"])
def test_what_a_model_needs_beside_its_weights_is_copied(file, run, tmp_path):
    base, a, _ = put_models(tmp_path, drawn(4))
    (base / file).write_bytes(b"{}")
    assert run("merge", "--base", base, a, "--out", tmp_path / "o")[0] == 0
    assert (tmp_path / "o" / file).read_bytes() == b"{}"


def test_an_output_names_its_format_as_transformers_asks_and_is_the_same_each_time(run, tmp_path):
    base, a, _ = put_models(tmp_path, drawn(4))
    save_file(drawn(4)(0), base / "model.safetensors", {str(n): str(n) for n in range(16)})
    for out in ("x", "y"):
        assert run("merge", "--base", base, a, "--out", tmp_path / f"{out}.safetensors")[0] == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_an_output_never_takes_the_place_of_an_input_it_is_read_from(run, tmp_path):
    base, a, b = put_models(tmp_path, drawn(4))
    for out in (base, a, a / "model.safetensors", b / "inside"):
        code, _, err = run("merge", "--base", base, a, b, "--out", out)
        assert code == 2
        assert "one of the inputs" in err
    assert torch.equal(weights(a), drawn(4)(1)["w"])


def test_tied_models_do_not_gain_an_output_layer(run, tmp_path):
    config = {"tie_word_embeddings": True}
    make = drawn(6, 4)
    base, *_ = put_models(tmp_path, lambda n: {"model.embed_tokens.weight": make(n)["w"]}, config=lambda n: config)
    one = recipe(tmp_path, "slerp", {"a": {}}, base_model=str(base), parameters={"t": 0.5}, dtype="bfloat16")
    assert run("merge", one, "--out", tmp_path / "one")[0] == 0
    two = recipe(tmp_path, "model_stock", {"a": {}, "b": {}}, base_model=str(base), dtype="bfloat16")
    assert run("merge", two, "--out", tmp_path / "two")[0] == 0
    for out in ("one", "two"):
        assert load_tensors(tmp_path / out / "model.safetensors").keys() == {"model.embed_tokens.weight"}


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "without total_size": (lambda index: index["metadata"].clear(), ""),
    "without metadata": (lambda index: index.pop("metadata"), ""),
    "with metadata that is null": (lambda index: index.update(metadata=None), ""),
    "with another total_size": (lambda index: index["metadata"].update(total_size=7), ""),
    "with a tensor that no file holds": (lambda index: index["weight_map"].update(mtp="1.safetensors"), "places mtp"),
    "with a file that is not there": (lambda index: index["weight_map"].update(w="3.safetensors"), "3.safetensors"),
    "with a file outside": (lambda index: index["weight_map"].update(w="../1.safetensors"), "../1.safetensors"),
}


@pytest.mark.parametrize(("change", "words"), INDEXES.values(), ids=INDEXES)
def test_an_index_tells_where_tensors_are_and_nothing_else(change, words, run, tmp_path):
    base, *_ = put_models(tmp_path, lambda n: {"w": torch.zeros(2), "v": torch.zeros(3)})
    save_tensors({"w": torch.ones(2)}, tmp_path / "sharded" / "1.safetensors")
    save_tensors({"v": torch.ones(3)}, tmp_path / "sharded" / "2.safetensors")
    index = {"metadata": {"total_size": 20}, "weight_map": {"w": "1.safetensors", "v": "2.safetensors"}}
    change(index)
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = run("merge", "--base", base, tmp_path / "sharded", "--scaling-factor", 1, "--out", tmp_path / "o")
    assert code == (2 if words else 0), err
    assert words in err
    if not words:
        assert torch.equal(weights(tmp_path / "o"), torch.ones(2))


EXTRAS: dict[str, tuple[Tensors, Tensors]] = {
    "a model of an older transformers has position_ids": ({}, {"position_ids": torch.arange(4)}),
    "a model has rotary inv_freq": ({}, {"layers.0.rotary_emb.inv_freq": torch.ones(2)}),
    "the base alone has averaged weights": ({"model_ema.w": torch.ones(2), "model_ema.n": torch.tensor(3)}, {}),
    "a model's position_ids became numbers": ({"position_ids": torch.arange(4)}, {"position_ids": torch.arange(4.0)}),
}


@pytest.mark.parametrize(("bases", "models"), EXTRAS.values(), ids=EXTRAS)
def test_where_only_buffers_differ_the_rest_is_merged_and_the_base_keeps_its_own(bases, models, run, tmp_path):
    base, a, _ = put_models(tmp_path, lambda n: {"w": torch.full((2,), float(n)), **(models if n else bases)})
    words = ["merge", "--base", base, a, "--scaling-factor", 1, "--out", tmp_path / "o"]
    code, out, err = run(*words)
    assert all(key in out + err for key in {**bases, **models})
    if code:
        assert run(*words, "--mismatch", "base")[0] == 0
    merged = load_tensors(tmp_path / "o" / "model.safetensors")
    assert torch.equal(merged.pop("w"), torch.ones(2))
    assert same_bytes(merged, bases)


def test_a_longer_vocabulary_is_refused_with_both_shapes_or_merged_as_far_as_all_have_it(run, tmp_path):
    base, a, b = put_models(tmp_path, lambda n: {"w": torch.full((4 + 2 * (n == 2), 3), float(n))})
    words = ["merge", "--base", base, a, b, "--rule", "average", "--scaling-factor", 1, "--out", tmp_path / "o"]
    code, _, err = run(*words)
    assert code == 2
    assert "[6, 3]" in err
    assert "[4, 3]" in err
    assert run(*words, "--mismatch", "intersect")[0] == 0
    assert torch.equal(weights(tmp_path / "o")[:4], torch.full((4, 3), 1.5))


class Tiny(torch.nn.Module):
    """Every kind of layer that LoRA adapts, of different widths, in two layers."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(12, 6)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(6, 8)}) for _ in range(12)])
        self.conv = torch.nn.Conv2d(4, 6, 3, groups=groups)
        self.conv1 = torch.nn.Conv1d(4, 6, 3)
        for parameter in self.parameters():
            parameter.data = parameter.data.bfloat16().float()


ADAPTERS: dict[str, dict[str, Any]] = {
    "patterns of rank and alpha": {"rank_pattern": {r"layers\.1\.q": 3}, "alpha_pattern": {"layers.11.q": 9}},
    "expressions as patterns": {"rank_pattern": {r".*\.1\.q$": 4}, "alpha_pattern": {r".*\.1\.q$": 32}},
    "rank-stabilised scaling": {"use_rslora": True, "alpha_pattern": {"layers.3.q": 1}},
    "some layers": {"layers_to_transform": [1, 11], "layers_pattern": "layers"},
    "an embedding": {"target_modules": ["embed"]},
    "convolutions": {"target_modules": ["conv", "conv1"]},
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "a bias of B": {"lora_bias": True},
    "a module in full": {"modules_to_save": ["conv1"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_merges_as_in_peft_or_is_refused_by_the_setting_that_is_not_known(settings, dtype, run, tmp_path):
    peft = pytest.importorskip("peft")
    model = Tiny().to(dtype)
    save_tensors(model.state_dict(), tmp_path / "base.safetensors")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q"], **settings})
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["--base", tmp_path / "base.safetensors", tmp_path / "adapter", "--out", tmp_path / "o.safetensors"]
    code, _, err = run("merge", *words, "--rule", "task_arithmetic", "--scaling-factor", 1)
    if code:
        assert code == 2
        assert any(f"{name} is" in err for name in settings)
        return
    # PEFT merges into float32 here: into bfloat16 it rounds the product of A and B as well as the sum
    wide = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "adapter").merge_and_unload()
    merged = load_tensors(tmp_path / "o.safetensors")
    assert merged.keys() == wide.state_dict().keys()
    for key, tensor in wide.state_dict().items():
        assert merged[key].dtype == dtype
        assert torch.allclose(merged[key].float(), tensor.to(dtype).float(), atol=1e-6, rtol=2**-8)


def test_an_adapter_with_a_negative_weight_is_subtracted(run, tmp_path):
    torch.manual_seed(0)
    save_tensors({"q.weight": torch.randn(6, 4)}, tmp_path / "base.safetensors")
    expected, models = load_tensors(tmp_path / "base.safetensors")["q.weight"], []
    for name, weight in (("x", 1.0), ("y", -0.5)):
        a, b = torch.randn(2, 4), torch.randn(6, 2)
        factors = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
        save_tensors(factors, tmp_path / name / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        expected = expected + weight * 3 * b @ a
        models.append({"model": f"{tmp_path / 'base.safetensors'}+{tmp_path / name}", "parameters": {"weight": weight}})
    keys = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base.safetensors"), "dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**keys, "models": models}))
    assert run("merge", tmp_path / "recipe.yaml", "--out", tmp_path / "o")[0] == 0
    assert torch.allclose(load_tensors(tmp_path / "o" / "model.safetensors")["q.weight"], expected, atol=1e-5)


def test_an_adapter_of_a_grouped_convolution_is_refused_as_peft_does(run, tmp_path):
    peft = pytest.importorskip("peft")
    model = Tiny(groups=2)
    save_tensors(model.state_dict(), tmp_path / "base.safetensors")
    with pytest.warns(UserWarning, match="groups > 1"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["conv"]))
    adapted.save_pretrained(tmp_path / "adapter")
    code, _, err = run("merge", "--base", tmp_path / "base.safetensors", tmp_path / "adapter", "--out", tmp_path / "o")
    assert code == 2
    assert "[6, 2, 3, 3]" in err


def test_an_adapter_whose_factors_were_never_gathered_is_told_so(run, tmp_path):
    save_tensors({"q.weight": torch.ones(6, 4)}, tmp_path / "base.safetensors")
    empty = {f"base_model.model.q.lora_{letter}.weight": torch.zeros(0) for letter in "AB"}
    save_tensors(empty, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    code, _, err = run("merge", "--base", tmp_path / "base.safetensors", tmp_path / "adapter", "--out", tmp_path / "o")
    assert code == 2
    assert "ZeRO-3" in err


def test_an_adapter_that_lost_a_part_says_what_stays_as_it_was(run, tmp_path):
    base = {f"layers.{n}.{name}.weight": torch.zeros(6, 4) for n in range(2) for name in ("q", "v")}
    save_tensors(base, tmp_path / "base.safetensors")
    whole = [f"base_model.model.layers.{n}.q" for n in range(2)]
    factors = {f"{module}.lora_A.weight": torch.ones(2, 4) for module in whole}
    factors |= {f"{module}.lora_B.weight": torch.ones(6, 2) for module in whole}
    save_tensors(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    words = [
        "merge",
        "--base",
        tmp_path / "base.safetensors",
        tmp_path / "adapter",
        "--out",
        tmp_path / "o.safetensors",
    ]
    for targets, lost in ((["q", "v"], True), (["q", "another"], False), (".*q", False)):
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        code, _, err = run(*words)
        assert code == 0
        assert ("layers.0.v.weight, layers.1.v.weight" in err) == lost


def test_settings_of_a_newer_peft_that_are_not_set_are_no_matter(run, tmp_path):
    save_tensors({"q.weight": torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    ones = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(6, 2)}
    save_tensors(
        {f"base_model.model.{k}": t for k, t in ones.items()}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    unset = {"eva_config": None, "corda_config": None, "a_later_one": None, "another": False}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **unset}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    words = ["--base", tmp_path / "base.safetensors", tmp_path / "adapter", "--out", tmp_path / "o.safetensors"]
    assert run("merge", *words, "--scaling-factor", 1)[0] == 0
    assert torch.equal(load_tensors(tmp_path / "o.safetensors")["q.weight"], torch.full((6, 4), 2.0))


def test_the_measures_of_continual_learning_count_each_task_once():
    accuracies = np.array([[0.1, 0.1], [0.5391, 0.1], [0.2843, 0.7]])
    assert measures.average_accuracy(accuracies) == pytest.approx((0.2843 + 0.7) / 2)
    assert measures.forgetting(accuracies) == pytest.approx(0.5391 - 0.2843)


def test_a_module_of_which_weight_is_a_part_of_the_name_is_adapted(run, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"weight_proj": torch.nn.Linear(4, 6)})
    save_tensors(model.state_dict(), tmp_path / "base.safetensors")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["weight_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["--base", tmp_path / "base.safetensors", tmp_path / "adapter", "--out", tmp_path / "o.safetensors"]
    assert run("merge", *words, "--scaling-factor", 1)[0] == 0
    expected = adapted.merge_and_unload().state_dict()
    assert torch.allclose(
        load_tensors(tmp_path / "o.safetensors")["weight_proj.weight"], expected["weight_proj.weight"]
    )


def test_offsets_beyond_four_gibibytes_are_read(tmp_path):
    start = 2**32 + 4
    header = json.dumps({"big": entry(0, start, start, dtype="U8"), "w": entry(start, start + 8, 2)}).encode()
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:  # a hole, not gigabytes
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(8 + len(header) + start)
        file.write(floats(1, 2))
    assert open_checkpoint(path).read("w", 0, 2).tolist() == [1, 2]


def test_classes_that_cannot_be_dealt_evenly_are_dealt_nearly_so():
    sizes = [len(task.classes) for task in class_incremental(range(200), 7)]
    assert sum(sizes) == 200
    assert max(sizes) - min(sizes) <= 1


class Normed(torch.nn.Module):
    """An encoder, its own module, with a batch norm that is frozen while the rest is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 3), self.norm)
        self.model.train()
        self.norm.eval()

    def forward(self, items: Any) -> torch.Tensor:
        return self.model(torch.tensor(np.stack(items)))


def test_evaluation_leaves_frozen_batch_norms_frozen_and_their_statistics_alone():
    accuracy = pytest.importorskip("magmax.continual.evaluation.accuracy")
    encoder = Normed()
    accuracy.logits_of(encoder, torch.eye(3), list(np.eye(3, dtype=np.float32)))
    assert encoder.model.training
    assert not encoder.norm.training
    assert torch.equal(encoder.norm.running_mean, torch.zeros(3))


def test_ewc_penalises_any_step_away_from_the_weights_of_the_last_task():
    penalties = pytest.importorskip("magmax.continual.training.penalties")
    learner = Normed()
    ewc = penalties.EWC(samples=4)
    data = type("Data", (), {"items": list(np.eye(3, dtype=np.float32)), "__len__": lambda self: 3})()
    ewc.after_task(learner, data, [0, 1, 2])
    assert torch.equal(learner.norm.running_mean, torch.zeros(3))
    ewc.before_task(learner, [0, 1, 2])
    assert ewc(learner, [], torch.zeros(1)).item() == 0
    with torch.no_grad():
        learner.model[0].weight.add_(1.0)
    assert ewc(learner, [], torch.zeros(1)).item() > 0
