"""Merging files, state dicts and modules gives the definition's bytes, whatever the storage and the schedule."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from tests import models as reference
from tests.models import load_tensors, reference_merge, same_bytes, save_tensors, small_model

import magmax
from magmax import MagMaxError, open_checkpoint
from magmax.checkpoints import blocks
from magmax.checkpoints.zero_base import ZeroBase
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.merge_job import merge_job
from magmax.merging.model_names import default_names
from magmax.merging.output_options import OutputOptions
from magmax.merging.sweep import FactorSweep
from magmax.rules import make_rule

RULES = {
    "magmax": (reference.magmax, 0.5),
    "average": (reference.average, 1.0),
    "task_arithmetic": (reference.task_arithmetic, 0.3),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_merge_is_its_definition_bit_for_bit(rule, dtype, tmp_path):
    definition, factor = RULES[rule]
    base, tasks = small_model(0, dtype), [small_model(n, dtype) for n in (1, 2, 3)]
    paths = [save_tensors(t, tmp_path / f"{n}.safetensors") for n, t in enumerate([base, *tasks])]
    expected = reference_merge(definition, base, tasks, factor)
    out = magmax.merge(rule, paths[0], paths[1:], out=tmp_path / "out.safetensors")
    assert same_bytes(load_tensors(out), expected)
    assert same_bytes(magmax.merge(rule, base, tasks), expected)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 1 / 3, -2.5])
def test_the_scaling_factor_is_rounded_before_it_multiplies(factor):
    base, tasks = small_model(0), [small_model(1), small_model(2)]
    merged = magmax.merge("magmax", base, tasks, scaling_factor=factor)
    assert same_bytes(merged, reference_merge(reference.magmax, base, tasks, factor))


def test_small_bfloat16_updates_survive():
    base = {"w": torch.full((1000,), 1.0).bfloat16()}
    tasks = [{"w": torch.full((1000,), 1.0 + 2.0**-7).bfloat16()}, base]
    assert same_bytes(magmax.merge("magmax", base, tasks, 1.0), tasks[0])


@pytest.mark.parametrize("slab", [1 << 10, 1 << 14, 1 << 20])
@pytest.mark.parametrize("rule", ["magmax", "average", "random_mix", "kth_magnitude"])
def test_slabs_and_threads_change_no_byte(slab, rule, files, tmp_path, monkeypatch):
    base, tasks = files
    magmax.merge(rule, base, tasks, out=tmp_path / "usual.safetensors")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", slab)
    threads = ExecutionOptions(threads=3)
    out = magmax.merge(rule, base, tasks, out=tmp_path / "unusual.safetensors", execution=threads)
    assert same_bytes(load_tensors(out), load_tensors(tmp_path / "usual.safetensors"))


def test_threads_change_no_byte_of_the_file(files, tmp_path):
    base, tasks = files
    outs = [
        magmax.merge("magmax", base, tasks, out=tmp_path / f"{n}.safetensors", execution=ExecutionOptions(n))
        for n in (1, 4)
    ]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_shards_and_kinds_of_input_change_no_byte(files, tmp_path):
    base, tasks = files
    whole = magmax.merge("magmax", base, tasks, out=tmp_path / "whole.safetensors")
    pieces = shard(load_tensors(tasks[1]), tmp_path / "sharded")
    torch.save(load_tensors(tasks[2]), tmp_path / "task3.pt")
    mixed = [tasks[0], pieces, tmp_path / "task3.pt", load_tensors(tasks[3])]
    out = magmax.merge("magmax", base, mixed, out=tmp_path / "mixed.safetensors")
    assert same_bytes(load_tensors(out), load_tensors(whole))
    ours, theirs = (read_digests(p) for p in (out, whole))
    assert ours == theirs


def test_a_folder_output_has_shards_an_index_and_the_bases_files(tmp_path):
    base = shard(small_model(0), tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"model_type": "toy", "torch_dtype": "float32"}))
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.txt").write_text("a b c")
    (base / "notes.bin.txt~").write_text("not to be copied")
    task = save_tensors(small_model(1), tmp_path / "task.safetensors")
    options = OutputOptions(dtype="bfloat16", shard_bytes=5000)
    merge_job(make_rule("magmax"), open_checkpoint(base), [open_checkpoint(task)], tmp_path / "out", options).run()
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {key: out / name for key, name in index["weight_map"].items()}
    expected = reference_merge(reference.magmax, small_model(0), [small_model(1)], 0.5)
    for key, tensor in expected.items():
        wanted = tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
        with safe_open(held[key], "pt") as file:
            assert reference.tensor_bytes(file.get_tensor(key)) == reference.tensor_bytes(wanted)
    assert len(set(held.values())) > 2
    assert json.loads((out / "config.json").read_text()) == {"model_type": "toy", "torch_dtype": "bfloat16"}
    assert (out / "tokenizer" / "vocab.txt").read_text() == "a b c"
    assert {p.name for p in out.iterdir()} >= {"README.md", "provenance.json"}
    assert not (out / "notes.bin.txt~").exists()


def test_provenance_tells_the_recipe_and_the_inputs_and_nothing_of_the_machine(files, tmp_path):
    base, tasks = files
    text = read_metadata(magmax.merge("magmax", base, tasks, 0.7, tmp_path / "out.safetensors"))["magmax"]
    told = json.loads(text)
    assert told["recipe"]["rule"] == {"magmax": {}}
    assert told["recipe"]["scaling_factor"] == 0.7
    assert [i["name"] for i in told["inputs"]] == ["base", "task1", "task2", "task3", "task4"]
    assert len({i["xxh3_128"] for i in told["inputs"]}) == 5
    assert str(tmp_path) not in text


def test_an_output_is_recognised_as_the_input_it_becomes(files, tmp_path):
    base, tasks = files
    merged = magmax.merge("magmax", base, tasks, out=tmp_path / "merged.safetensors")
    again = magmax.merge("average", base, [merged], out=tmp_path / "folder")
    provenance = json.loads((again / "provenance.json").read_text())
    copy_of_merged = save_tensors(load_tensors(merged), tmp_path / "copy.safetensors")
    other = magmax.merge("average", base, [copy_of_merged], out=tmp_path / "other.safetensors")
    assert provenance["inputs"][1]["xxh3_128"] == read_digests(other)[1]


def test_tied_tensors_stay_tied(tmp_path):
    base, task = Tied(1), Tied(2)
    merged = magmax.merge("magmax", base, [task])
    assert merged.head.weight is merged.embed.weight
    as_dict = magmax.merge("magmax", base.state_dict(), [task.state_dict()])
    assert as_dict["head.weight"].data_ptr() == as_dict["embed.weight"].data_ptr()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    save_model(task, tmp_path / "task.safetensors")
    out = magmax.merge(
        "magmax", tmp_path / "base.pt", [tmp_path / "task.safetensors"], out=tmp_path / "out.safetensors"
    )
    assert len(load_tensors(out)) == 1
    assert open_checkpoint(out).aliases in ({"head.weight": "embed.weight"}, {"embed.weight": "head.weight"})
    assert torch.equal(next(iter(load_tensors(out).values())), merged.embed.weight)


def test_a_module_comes_back_as_a_module_and_the_given_one_is_untouched():
    torch.manual_seed(0)
    base, task = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    task(torch.randn(8, 3))
    before = copy.deepcopy(base.state_dict())
    merged = magmax.merge("magmax", base, [task], 1.0)
    assert isinstance(merged, torch.nn.BatchNorm1d)
    assert same_bytes(base.state_dict(), before)
    assert torch.equal(merged.running_mean, task.running_mean)
    assert merged.num_batches_tracked == 0


def test_numpy_dicts_come_back_as_numpy():
    base, task = {"w": np.float32([1, 2])}, {"w": np.float32([3, 0])}
    merged = magmax.merge("magmax", base, [task], 1.0)
    assert isinstance(merged["w"], np.ndarray)
    assert (merged["w"] == [3, 0]).all()


def test_half_precision_models_on_a_float32_base():
    base, tasks = small_model(0), [small_model(1, torch.bfloat16), small_model(2, torch.float16)]
    assert same_bytes(magmax.merge("magmax", base, tasks), reference_merge(reference.magmax, base, tasks, 0.5))


def test_an_overflow_of_the_output_type_is_an_error():
    base, task = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 1e6, 2.0])}
    with pytest.raises(MagMaxError, match="w: the merged values overflow F16"):
        magmax.merge("magmax", base, [task], dtype="float16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_pass_where_they_are_allowed(bad):
    base, task = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, bad, 2.0])}
    merged = magmax.merge("magmax", base, [task], 1.0, allow_nonfinite=True)
    assert reference.tensor_bytes(merged["w"]) == reference.tensor_bytes(task["w"])


def test_a_tensor_kept_from_the_base_is_checked_like_any_other():
    base, task = {"w": torch.zeros(1), "x": torch.tensor([1e6])}, {"w": torch.ones(1)}
    with pytest.raises(MagMaxError, match="x: the merged values overflow F16"):
        magmax.merge("magmax", base, [task], dtype="float16", mismatch="base")


def test_base_and_model_exchanged_are_another_work_than_the_interrupted_one(files, tmp_path):
    one, other = open_checkpoint(files[0]), open_checkpoint(files[1][0])
    jobs = [
        merge_job(make_rule("magmax"), base, [model], tmp_path / "out", OutputOptions(), ["x"])
        for base, model in ((one, other), (other, one))
    ]
    identities = [job._fingerprints_and_recipe() for job in jobs]
    assert identities[0] != identities[1]


def test_every_tensor_that_is_not_merged_is_reported(tmp_path):
    base = save_tensors({"w": torch.zeros(1)}, tmp_path / "base.safetensors")
    task = save_tensors({"w": torch.ones(1), "extra": torch.ones(2)}, tmp_path / "task.safetensors")
    job = merge_job(
        make_rule("magmax"),
        open_checkpoint(base),
        [open_checkpoint(task)],
        tmp_path / "out",
        OutputOptions(mismatch="base"),
    )
    assert "extra" in job.run().unmerged
    assert "`extra`" in (tmp_path / "out" / "README.md").read_text()


def test_a_module_takes_the_dtype_it_is_merged_to():
    merged = magmax.merge("magmax", torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)], dtype="bfloat16")
    assert merged.weight.dtype == torch.bfloat16


def test_a_folder_that_was_added_to_is_not_replaced(files, tmp_path):
    base, tasks = files
    out = magmax.merge("magmax", base, tasks, out=tmp_path / "out")
    magmax.merge("average", base, tasks, out=out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(MagMaxError, match=r"did not write \(notes\.txt\)"):
        magmax.merge("magmax", base, tasks, out=out)
    assert (out / "notes.txt").read_text() == "mine"


def test_mismatched_tensors_can_be_the_bases():
    base, task = small_model(0), small_model(1)
    task["layer.bias"], task["extra"] = torch.zeros(5), torch.zeros(2)
    del task["scale"]
    merged = magmax.merge("magmax", base, [task], mismatch="base")
    expected = reference_merge(
        reference.magmax, base, [{**task, "layer.bias": base["layer.bias"], "scale": base["scale"]}], 0.5
    )
    assert same_bytes(merged, expected)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/cars/model.safetensors", "runs/mnist/model.safetensors"], ["cars", "mnist"]),
        (["a.safetensors", "b.safetensors"], ["a", "b"]),
        (["/x/one.pt"], ["one"]),
        (["x/1/m", "x/1/n", "y/1/m"], ["x/1/m", "x/1/n", "y/1/m"]),
    ],
)
def test_a_models_name_is_the_first_part_that_tells_it_apart(paths, names):
    assert default_names(paths) == names


class Tied(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(11, 5)
        self.head = torch.nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight


def shard(tensors, folder):
    """A folder of two shards and an index."""
    folder.mkdir()
    keys = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, held in parts.items():
        save_file({key: tensors[key] for key in held}, folder / name)
    where = {key: name for name, held in parts.items() for key in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def read_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def read_digests(path):
    return [i["xxh3_128"] for i in json.loads(read_metadata(path)["magmax"])["inputs"]]


ALL_RULES = [kind.name for kind in magmax.rules.RULES]
STRANGE = np.uint32([0xFF800000, 0x7F800000, 0x7FC00000, 0xFFC00001, 0x7F800001]).view(np.float32)
"""Both infinities, a NaN, a negative one with a payload, a signalling one."""


def with_strange_elements(count: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    states = [{"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(n))} for n in range(count)]
    for state in states:
        state["w"].view(-1)[:5] = torch.from_numpy(STRANGE)
        state["w"] = state["w"].to(dtype)
        state["mask"] = torch.full((1, 1, 3, 3), -torch.inf).triu(1)
    return states


def rule_for_two(name: str) -> tuple[object, int]:
    rule = magmax.rules.Tunable(preference=(0.5, 0.5)) if name == "tunable" else magmax.rules.as_rule(name)
    return rule, 1 if name in ("slerp", "nearswap") else 2


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ALL_RULES)
def test_what_is_not_finite_and_equal_everywhere_stays_bit_for_bit(name, dtype, allowed):
    rule, count = rule_for_two(name)
    states = with_strange_elements(1 + count, dtype)
    merged = magmax.merge(rule, states[0], states[1:], allow_nonfinite=allowed)
    assert reference.tensor_bytes(merged["w"].view(-1)[:5]) == reference.tensor_bytes(states[0]["w"].view(-1)[:5])
    assert reference.tensor_bytes(merged["mask"]) == reference.tensor_bytes(states[0]["mask"])
    assert merged["w"].view(-1)[5:].isfinite().all()
    for state in states:
        state["w"].view(-1)[:5] = 0
        state["mask"].zero_()
    zeros = magmax.merge(rule, states[0], states[1:])
    assert torch.equal(merged["w"].view(-1)[5:], zeros["w"].view(-1)[5:])


@pytest.mark.parametrize("name", ["magmax", "average", "kth_magnitude"])
def test_absorbing_leaves_what_is_not_finite_and_equal_as_it_is(name, tmp_path):
    base, *models = with_strange_elements(4, torch.float32)
    running = magmax.Running(tmp_path / "state", name, base)
    for model in models:
        running.absorb(model)
    assert reference.same_bytes(running.result(), magmax.merge(name, base, models))


def test_a_model_that_differs_where_the_base_is_not_finite_is_refused_or_ignored_there():
    base, model = {"w": torch.tensor([-torch.inf, 1.0])}, {"w": torch.tensor([-1e9, 3.0])}
    with pytest.raises(MagMaxError, match="base: w holds 0 NaN and 1 infinite of 2 elements"):
        magmax.merge("average", base, [model])
    assert magmax.merge("average", base, [model], allow_nonfinite=True)["w"].tolist() == [-torch.inf, 3.0]


@pytest.mark.parametrize("name", ["elect", "elect_sum", "ties", "sce"])
@pytest.mark.parametrize("sign", [1, -1])
def test_opposite_infinities_are_nan_whatever_sign_the_processor_gives_it(name, sign):
    nan = sign * torch.tensor(torch.nan)
    base, models = (
        {"w": torch.zeros(4)},
        [torch.tensor([torch.inf, torch.inf, nan, 1]), torch.tensor([-torch.inf, 1, 1, 1])],
    )
    rule = magmax.rules.Ties(density=1) if name == "ties" else name
    merged = magmax.merge(rule, base, [{"w": model} for model in models], 1.0, allow_nonfinite=True)["w"]
    assert reference.tensor_bytes(merged[[0, 2]]) == reference.tensor_bytes(torch.tensor([torch.nan, torch.nan]))
    assert merged[1] == torch.inf
    assert merged[3].isfinite()


def test_consensus_keeps_sums_that_are_not_finite():
    models = [{"w": torch.tensor(values)} for values in ([torch.inf, torch.nan, 1.0], [1.0, 1.0, 1.0])]
    merged = magmax.merge("consensus", {"w": torch.zeros(3)}, models, 1.0, allow_nonfinite=True)["w"]
    assert (merged[0], bool(merged[1].isnan()), merged[2]) == (torch.inf, True, 2)


def test_the_base_of_zeros_leaves_what_is_not_finite_in_all_models(tmp_path):
    states = with_strange_elements(3, torch.bfloat16)
    paths = [save_tensors(state, tmp_path / f"{n}.safetensors") for n, state in enumerate(states)]
    base, *models = [open_checkpoint(path) for path in paths]
    merge_job(make_rule("average"), ZeroBase(base), [base, *models], tmp_path / "o.safetensors", OutputOptions()).run()
    merged = load_tensors(tmp_path / "o.safetensors")
    assert reference.tensor_bytes(merged["w"].view(-1)[:5]) == reference.tensor_bytes(states[0]["w"].view(-1)[:5])
    assert torch.equal(merged["mask"], states[0]["mask"])


def test_a_wider_output_keeps_what_is_not_finite():
    base, model = with_strange_elements(2, torch.bfloat16)
    merged = magmax.merge("magmax", base, [model], dtype="float32")
    torch.testing.assert_close(merged["w"].view(-1)[:5], base["w"].view(-1)[:5].float(), rtol=0, atol=0, equal_nan=True)


BATCH_NORMS = {
    "bn.running_": "var",
    "layer.1.bn1_moving_": "variance",
    "stem/norm/moving_": "variance:0",
    "batch_stats/a/": "var",
}


def with_batch_norm(seed: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    model = {"w": torch.randn(5, 3, generator=draws), "bn.num_batches_tracked": torch.tensor(100 + seed)}
    for path, end in BATCH_NORMS.items():
        model[path + end] = torch.rand(6, generator=draws) * 10.0 ** torch.randint(-3, 3, (6,), generator=draws)
        model[path + end.replace("variance", "mean").replace("var", "mean")] = torch.randn(6, generator=draws)
    return model


BN_BASE, *BN_MODELS = [with_batch_norm(seed) for seed in range(6)]


@pytest.mark.parametrize("name", ALL_RULES)
def test_statistics_of_batch_normalisation_are_averaged_over_the_models_whatever_the_rule(name):
    rule = magmax.rules.Tunable(preference=(0.5, 0.5)) if name == "tunable" else name
    models = BN_MODELS[:1] if name in ("slerp", "nearswap") else BN_MODELS[: 2 if name == "tunable" else 5]
    merged = magmax.merge(rule, BN_BASE, models)
    plain, *others = ({"w": state["w"]} for state in [BN_BASE, *models])
    assert torch.equal(merged["w"], magmax.merge(rule, plain, others)["w"])
    assert merged["bn.num_batches_tracked"] == 100
    for key in BN_BASE.keys() - {"w", "bn.num_batches_tracked"}:
        torch.testing.assert_close(merged[key], torch.stack([m[key] for m in models]).mean(0), rtol=1e-4, atol=1e-5)
        assert "var" not in key or (merged[key] >= 0).all()


def test_statistics_of_batch_normalisation_are_kept_or_clipped_on_demand():
    assert (magmax.merge("task_arithmetic", BN_BASE, BN_MODELS, 2.0)["bn.running_var"] >= 0).all()
    kept = magmax.merge("task_arithmetic", BN_BASE, BN_MODELS, batch_norm="base")
    clipped = magmax.merge("task_arithmetic", BN_BASE, BN_MODELS, batch_norm="clip")
    renamed = [{key.replace("v", "V"): tensor for key, tensor in state.items()} for state in (BN_BASE, *BN_MODELS)]
    usual = magmax.merge("task_arithmetic", renamed[0], renamed[1:])
    for key in BN_BASE.keys() - {"w", "bn.num_batches_tracked"}:
        assert torch.equal(kept[key], BN_BASE[key])
        by_rule = usual[key.replace("v", "V")]
        assert torch.equal(clipped[key], by_rule.clamp(min=0) if "var" in key else by_rule)
    assert any((usual[key.replace("v", "V")] < 0).any() for key in BN_BASE if "var" in key)
    with pytest.raises(MagMaxError, match="batch_norm must be one of average, base, clip"):
        magmax.merge("magmax", BN_BASE, BN_MODELS, batch_norm="no")


@pytest.mark.parametrize("option", ["average", "base", "clip"])
@pytest.mark.parametrize("rule", ["magmax", "average", make_rule("kth_magnitude", {"k": 2})])
def test_absorbed_statistics_of_batch_normalisation_are_those_of_one_merge(rule, option, tmp_path):
    running = magmax.Running(tmp_path / "state", rule, BN_BASE, batch_norm=option)
    for model in BN_MODELS:
        running.absorb(model)
    assert same_bytes(running.result(), magmax.merge(rule, BN_BASE, BN_MODELS, batch_norm=option))
    with pytest.raises(MagMaxError, match=f"was begun with batch_norm {option}"):
        magmax.Running(tmp_path / "state", batch_norm="clip" if option == "base" else "base")


def test_a_sweep_and_a_note_know_the_statistics_of_batch_normalisation(tmp_path):
    paths = [save_tensors(state, tmp_path / f"{n}.safetensors") for n, state in enumerate([BN_BASE, *BN_MODELS])]
    base, *models = [open_checkpoint(path) for path in paths]
    names = default_names([str(path) for path in paths[1:]])
    sweep = FactorSweep(
        make_rule("ties"),
        base,
        models,
        names,
        tmp_path / "o.safetensors",
        OutputOptions(),
        [0.5, 2],
        ExecutionOptions(),
    )
    with sweep.merged() as writer:
        for factor in (0.5, 2):
            wanted = magmax.merge("ties", BN_BASE, BN_MODELS, factor)
            assert same_bytes(load_tensors(writer.write(factor)), wanted)
    job = merge_job(make_rule("magmax"), base, models, tmp_path / "n.safetensors", OutputOptions())
    assert "4 running means and 4 variances of batch normalisation are averaged" in job.all_notes()[0]
    assert job.recipe["batch_norm"] == "average"
    kept = merge_job(make_rule("magmax"), base, models, tmp_path / "n.safetensors", OutputOptions(batch_norm="base"))
    assert "kept from the base" in kept.unmerged["bn.running_var"]


def test_a_mean_without_a_variance_is_a_tensor_like_any_other():
    base, *models = ({"a.running_mean": state["bn.running_mean"], "b": state["w"]} for state in [BN_BASE, *BN_MODELS])
    plain, *others = ({"a.weight": state["a.running_mean"], "b": state["b"]} for state in [base, *models])
    merged = magmax.merge("magmax", base, models)
    assert torch.equal(merged["a.running_mean"], magmax.merge("magmax", plain, others)["a.weight"])


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ({"kth_magnitude": {"k": 2}}, make_rule("kth_magnitude", {"k": 2})),
        ({"average": None}, make_rule("average")),
        (
            [magmax.rules.Prune(density=0.5), {"dare": {"density": 0.5}}, "magmax"],
            magmax.rules.chain(magmax.rules.Prune(density=0.5), magmax.rules.Dare(density=0.5), magmax.rules.MagMax()),
        ),
    ],
)
def test_a_rule_may_be_what_a_recipe_writes_and_the_models_a_generator(written, rule):
    base, *models = ({"w": state["w"]} for state in (BN_BASE, *BN_MODELS))
    assert same_bytes(magmax.merge(written, base, (model for model in models)), magmax.merge(rule, base, models))
    for wrong in (5, None, {"ties": 3}, {"ties": {}, "magmax": {}}, []):
        with pytest.raises(MagMaxError):
            magmax.merge(wrong, base, models)
    with pytest.raises(MagMaxError, match="models must be a list"):
        magmax.merge("magmax", base, 5)


def test_a_peft_model_is_merged_as_peft_merges_it():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    settings = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), settings)
    wanted = copy.deepcopy(model).merge_and_unload().state_dict()
    keys = model.state_dict().keys()
    assert same_bytes(
        magmax.merge("average", base.state_dict(), [model]), magmax.merge("average", base, [wanted]).state_dict()
    )
    assert model.state_dict().keys() == keys
    with pytest.raises(MagMaxError, match="base is a PeftModel"):
        magmax.merge("average", model, [base])
    with pytest.raises(MagMaxError, match="holds LoRA layers that PEFT has put into it"):
        magmax.merge("average", model.base_model.model, [base])
