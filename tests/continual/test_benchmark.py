"""A benchmark: what is shared is trained once, what is there is read, and the numbers are those of doing it by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.continual import toys  # noqa: E402

import magmax  # noqa: E402
from magmax.checkpoints.journal import lock_folder  # noqa: E402
from magmax.continual import cells, registry  # noqa: E402
from magmax.continual.benchmark import Benchmark  # noqa: E402
from magmax.continual.cells import training_folder  # noqa: E402
from magmax.continual.context import build_context, hold_out  # noqa: E402
from magmax.continual.data.datasets import LabelledExamples  # noqa: E402
from magmax.continual.evaluation.result_files import write_results  # noqa: E402
from magmax.continual.evaluation.tables import (  # noqa: E402
    against_best,
    compare_paired,
    comparisons,
    signed_rank,
    summary,
    table,
    tidy,
)
from magmax.continual.experiment import Experiment, rule_name  # noqa: E402
from magmax.continual.training.weight_files import delete_training, load_weights  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402
from magmax.merging.execution.executors import connect, process_pool  # noqa: E402

ALL = [
    "sequential",
    "independent",
    "lwf",
    {"ewc": {"samples": 4}},
    "ewc_released",
    {"replay": {"per_class": 2}},
    "joint",
]


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate({**toys.RECIPE, **changes})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the trainings that were gone through, in order."""
    found: list[str] = []
    real = cells.fine_tune

    def counted(*args: Any, **options: Any) -> Any:
        found.append(args[5].name.rpartition("-")[0])
        return real(*args, **options)

    monkeypatch.setattr(cells, "fine_tune", counted)
    return found


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def records_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what differs from run to run."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "peak_memory")} for record in found]


def test_every_method_is_measured_and_every_chain_trained_once(
    tmp_path: Path, executor: Executor, trained: list[str]
) -> None:
    found = Benchmark(experiment(training=ALL, seeds=[3]), tmp_path, executor).run()
    names = [record["method"] for record in found]
    merged = [
        f"{r}/{c}" for c in ("sequential", "independent", "lwf", "ewc", "ewc_released") for r in ("average", "magmax")
    ]
    last = [f"last/{c}" for c in ("sequential", "lwf", "ewc", "ewc_released", "replay", "joint")]
    assert sorted(names) == sorted(["zero_shot", *last, *merged])
    assert sorted(trained) == sorted(f"{next(iter(c)) if isinstance(c, dict) else c}-seed3" for c in ALL)
    assert all(
        0 <= share <= 1 for r in found for v in r["variants"] for row in v["rows"].values() for share in row["tasks"]
    )


def test_a_row_is_what_merging_and_predicting_by_hand_gives(tmp_path: Path, executor: Executor) -> None:
    work = experiment(seeds=[1])
    found = {r["method"]: r for r in Benchmark(work, tmp_path, executor).run()}
    here = build_context(work, 1)
    folder = training_folder(tmp_path, work, 1, "independent")
    theta = [folder / f"theta_{t}.safetensors" for t in range(4)]
    for learned in (1, 2, 3):
        magmax.merge("magmax", theta[0], theta[1 : learned + 1], out=tmp_path / f"m{learned}.safetensors")
        load_weights(here.encoder.model, tmp_path / f"m{learned}.safetensors")
        with torch.inference_mode():
            logits = here.encoder(here.test.items) @ here.head.T
        seen = [c for task in here.tasks[:learned] for c in task.classes]
        row = found["magmax/independent"]["variants"][0]["rows"][str(learned)]["tasks"]
        for share, task in zip(row[:learned], here.tasks, strict=False):
            rows = np.flatnonzero(np.isin(here.test.labels, task.classes))
            predicted = np.array(seen)[logits[rows][:, seen].argmax(1).numpy()]
            assert share == (predicted == here.test.labels[rows]).mean()


def test_a_second_run_reads_and_a_new_rule_measures_only_itself(
    tmp_path: Path, executor: Executor, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Benchmark(experiment(), tmp_path, executor).run()
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(lines) == len(first)
    trained.clear()
    assert Benchmark(experiment(), tmp_path, executor).run() == first
    assert trained == []
    assert (tmp_path / "cells.jsonl").read_text().splitlines() == lines
    more = Benchmark(experiment(rules=["average", "magmax", {"ties": {"density": 0.5}}]), tmp_path, executor).run()
    assert len(more) == len(first) + 4
    other = Benchmark(experiment(fit={**toys.RECIPE["fit"], "steps": 2}), tmp_path, executor).run()
    assert len(other) == len(first)
    grown = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert (grown[: len(lines)], len(grown)) == (lines, len(lines) + 4 + len(other))
    assert records_of(Benchmark(experiment(), tmp_path, executor).run()) == records_of(first)


def test_a_benchmark_stopped_midway_goes_on_with_what_is_missing(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Benchmark(experiment(), tmp_path / "whole", executor).run()
    done = 0

    def stop(count: int, total: int, note: str = "") -> None:
        nonlocal done
        done = count
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Benchmark(experiment(), tmp_path / "killed", executor, progress=stop).run()
    assert done == 7
    executor.submit(int).result()  # what was running when it stopped is over
    file = tmp_path / "killed" / "cells.jsonl"
    found = file.read_bytes().splitlines(keepends=True)
    assert 1 < len(found) < len(whole)
    file.write_bytes(b"".join(found)[:-100])  # a record that was cut short is measured again
    again = Benchmark(experiment(), tmp_path / "killed", executor).run()
    assert records_of(again) == records_of(whole)
    assert len(file.read_bytes().splitlines()) == len(whole)
    file.write_bytes(b"{\n" + file.read_bytes())
    with pytest.raises(MagMaxError, match=r"cells\.jsonl, line 1: is not a JSON object"):
        Benchmark(experiment(), tmp_path / "killed", executor).run()


def test_the_cells_of_an_earlier_version_are_not_measured_again(
    tmp_path: Path, executor: Executor, trained: list[str]
) -> None:
    whole = Benchmark(experiment(), tmp_path, executor).run()
    (tmp_path / "cells.jsonl").unlink()
    (tmp_path / "cells").mkdir()
    for record in whole[1:]:
        name = f"{record['method'].replace('/', '-')}-seed{record['seed']}-{record['digest'][:8]}.json"
        (tmp_path / "cells" / name).write_text(json.dumps(record, indent=2) + "\n")
    trained.clear()
    assert records_of(Benchmark(experiment(), tmp_path, executor).run()) == records_of(whole)
    assert trained == []
    (line,) = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert json.loads(line)["digest"] == whole[0]["digest"]
    assert len(list((tmp_path / "cells").iterdir())) == len(whole) - 1


def test_processes_give_what_a_thread_gives(tmp_path: Path, executor: Executor) -> None:
    work = experiment(seeds=[0], training=["sequential"], rules=["magmax", "random_mix"])
    with process_pool(2) as pool:
        apart = Benchmark(work, tmp_path / "apart", pool).run()
    assert records_of(apart) == records_of(Benchmark(work, tmp_path / "here", executor).run())
    lines = (tmp_path / "apart" / "cells.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["digest"] for line in lines) == sorted(record["digest"] for record in apart)


def test_discarded_checkpoints_are_gone_and_the_records_stay(tmp_path: Path, executor: Executor) -> None:
    found = Benchmark(experiment(), tmp_path, executor, discard=True).run()
    assert list((tmp_path / "training").iterdir()) == []
    assert Benchmark(experiment(), tmp_path, executor).run() == found
    assert list((tmp_path / "training").iterdir()) == []


def test_a_discarded_training_leaves_what_others_put_there(tmp_path: Path) -> None:
    for name in (
        "theta_0.safetensors",
        "theta_12.safetensors",
        "costs.json",
        "memory.json",
        "theta_x.txt",
        "notes.txt",
    ):
        (tmp_path / name).write_text("{}")
    delete_training(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"theta_x.txt", "notes.txt"}
    (tmp_path / "theta_1.safetensors").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(MagMaxError, match="is a symbolic link, which magmax did not make"):
        delete_training(tmp_path)
    assert (tmp_path / "theta_1.safetensors").is_symlink()


def test_of_two_benchmarks_in_one_folder_the_second_is_refused(tmp_path: Path, executor: Executor) -> None:
    with lock_folder(tmp_path), pytest.raises(MagMaxError, match="another magmax is writing this output"):
        Benchmark(experiment(), tmp_path, executor).run()
    assert not list(tmp_path.iterdir())


def test_what_a_job_raises_is_raised_and_nothing_waits_for_ever(tmp_path: Path) -> None:
    class Failing(Executor):
        def submit(self, fn: Any, /, *args: Any, **options: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(MagMaxError("the disk is full"))
            return future

    with pytest.raises(MagMaxError, match="the disk is full"):
        Benchmark(experiment(), tmp_path, Failing()).run()


def test_the_factor_is_chosen_on_validation_examples_alone(tmp_path: Path, executor: Executor) -> None:
    work = experiment(
        seeds=[0], training=["sequential"], rules=["task_arithmetic"], factors=[0.1, 0.6, 2.0], validation=5
    )
    (record,) = [r for r in Benchmark(work, tmp_path, executor).run() if r["rule"] == "task_arithmetic"]
    here = build_context(work, 0)
    folder = training_folder(tmp_path, work, 0, "sequential")
    theta = [folder / f"theta_{t}.safetensors" for t in range(4)]
    by_hand = {}
    for factor in work.factors:
        magmax.merge("task_arithmetic", theta[0], theta[1:], factor, out=tmp_path / "m.safetensors")
        load_weights(here.encoder.model, tmp_path / "m.safetensors")
        by_hand[str(factor)] = np.mean(here.row(3, here.validation).tasks)
    assert record["search"] == pytest.approx(by_hand)
    default, chosen = record["variants"]
    assert default["scaling_factor"] == 0.3
    assert chosen["scaling_factor"] == float(max(by_hand, key=lambda f: by_hand[f]))


def test_a_merge_has_the_statistics_that_the_recipe_says(tmp_path: Path, executor: Executor) -> None:
    changes: dict[str, Any] = {"model": "toy_batch_norm_encoder", "seeds": [0], "training": ["sequential"]}
    changes |= {"rules": ["magmax"], "rows": "last"}
    work = experiment(**changes, batch_norm="recalibrated")
    frozen = Benchmark(experiment(**changes), tmp_path, executor).run()
    found = Benchmark(work, tmp_path, executor).run()
    assert found[:2] == frozen[:2]  # zero-shot and last: no merges
    here = build_context(work, 0)
    theta = [training_folder(tmp_path, work, 0, "sequential") / f"theta_{t}.safetensors" for t in range(4)]
    magmax.merge("magmax", theta[0], theta[1:], out=tmp_path / "m.safetensors")
    load_weights(here.encoder.model, tmp_path / "m.safetensors")
    assert frozen[2]["variants"][0]["rows"]["3"]["tasks"] == here.row(3).tasks
    linear, norm = here.encoder.model[0], here.encoder.model[1]
    with torch.no_grad():
        values = linear(torch.from_numpy(np.stack(here.some_training_items())))
        assert len(values) == min(256, len(here.train))
        parts = values.split(64)
        norm.running_mean.copy_(torch.stack([part.mean(0) for part in parts]).mean(0))
        norm.running_var.copy_(torch.stack([part.var(0) for part in parts]).mean(0))
    assert found[2]["variants"][0]["rows"]["3"]["tasks"] == here.row(3).tasks


def test_a_learning_rate_can_be_chosen_without_the_test_set(
    tmp_path: Path, executor: Executor, trained: list[str]
) -> None:
    changes: dict[str, Any] = {"seeds": [0], "training": ["sequential"], "rules": [], "validation": 4}
    on_test = Benchmark(experiment(**changes), tmp_path, executor).run()
    (zero, last) = Benchmark(experiment(**changes, measure_on="validation"), tmp_path, executor).run()
    here = build_context(experiment(**changes), 0)
    assert zero["variants"][0]["rows"]["0"]["tasks"] == here.row(0, here.validation).tasks
    load_weights(
        here.encoder.model, training_folder(tmp_path, experiment(**changes), 0, "sequential") / "theta_3.safetensors"
    )
    assert last["variants"][0]["rows"]["3"]["tasks"] == here.row(3, here.validation).tasks
    assert last["models"] == on_test[1]["models"]
    with pytest.raises(MagMaxError, match="validation: 10"):
        experiment(measure_on="validation").check()


def test_a_dask_cluster_gives_what_a_thread_gives(tmp_path: Path, executor: Executor) -> None:
    distributed = pytest.importorskip("distributed")
    work = experiment(seeds=[0], training=["sequential"], rules=["magmax"])
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options, silence_logs=50) as local:
        dask, close = connect(local.scheduler_address)
        found = Benchmark(work, tmp_path / "dask", dask).run()
        close()
    assert records_of(found) == records_of(Benchmark(work, tmp_path / "here", executor).run())
    with pytest.raises(MagMaxError, match="no Dask scheduler answers there"):
        connect("not an address")


def test_models_that_others_trained_stand_in_for_independent_ones(tmp_path: Path, executor: Executor) -> None:
    work = experiment(seeds=[0], training=["independent"], rules=["magmax"], sweep=[0.1, 0.5])
    own = {r["method"]: r for r in Benchmark(work, tmp_path, executor).run()}["magmax/independent"]
    folder = training_folder(tmp_path, work, 0, "independent")
    models = []
    for t in (1, 2, 3):  # without the part that no task trains, and with a head of their own
        tensors = load_file(folder / f"theta_{t}.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("4.")}
        models.append(str(tmp_path / f"theirs_{t}.safetensors"))
        save_file({**kept, "head.weight": torch.ones(2)}, models[-1])
    others = experiment(seeds=[0], training=[{"external": {"models": models}}], rules=["magmax"], sweep=[0.1, 0.5])
    found = Benchmark(others, tmp_path / "external", executor).run()
    assert [r["method"] for r in found] == ["zero_shot", "magmax/external"]
    assert found[1]["variants"] == own["variants"]
    names = [variant["variant"] for variant in own["variants"]]
    assert names == ["default", "factor 0.1", "factor 0.5"]
    assert own["variants"][2]["rows"]["3"] == own["variants"][0]["rows"]["3"]
    with pytest.raises(MagMaxError, match=r"external names 1 models for 3 tasks"):
        Benchmark(experiment(training=[{"external": {"models": models[:1]}}]), tmp_path / "few", executor).run()
    save_file({"0.weight": torch.ones(3, 3)}, models[0])
    with pytest.raises(MagMaxError, match=r"theirs_1.*: 0.weight is \(3, 3\) there and \(16, 6\) in the model"):
        Benchmark(others, tmp_path / "shape", executor).run()


def test_held_out_examples_are_in_no_training_batch() -> None:
    data = toys.blobs(per_class=9).train
    rest, held = hold_out(data, 4, seed=0)
    assert np.bincount(held.labels).tolist() == [4] * toys.CLASSES
    assert len(rest) + len(held) == len(data)
    whole = sorted(item.tobytes() for item in data.items)
    assert sorted(item.tobytes() for item in (*rest.items, *held.items)) == whole
    assert np.bincount(hold_out(data, 100, seed=0)[1].labels).tolist() == [4] * toys.CLASSES


def test_joint_has_only_a_last_row_and_forgets_nothing(tmp_path: Path, executor: Executor) -> None:
    work = experiment(seeds=[0], training=["joint"], rules=[])
    rows = tidy(Benchmark(work, tmp_path, executor).run())
    measured = {row["measure"] for row in rows if row["method"] == "last/joint"}
    assert "average accuracy" in measured
    assert "forgetting" not in measured


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MagMaxError, match=r"training: there is no 'sequentiall'; did you mean 'sequential'"):
        experiment(training=["sequentiall"]).check()
    with pytest.raises(MagMaxError, match=r"training: ewc has no option 'lambda'"):
        experiment(training=[{"ewc": {"lambda": 1}}]).check()
    with pytest.raises(MagMaxError, match=r"joint needs steps to be a number like 0, not 'many'"):
        experiment(training=[{"joint": {"steps": "many"}}]).check()
    with pytest.raises(MagMaxError, match=r"never on the test set; .*validation: 10"):
        experiment(factors=[0.5]).check()
    with pytest.raises(MagMaxError, match=r"rules: one is named twice: magmax, magmax"):
        experiment(rules=["magmax", "magmax"]).check()
    with pytest.raises(MagMaxError, match=r"there is no rule 'tis'"):
        experiment(rules=["tis"]).check()
    with pytest.raises(MagMaxError, match=r"data: there is no 'newsgroup'; did you mean 'newsgroups'"):
        experiment(data="newsgroup").check()
    with pytest.raises(MagMaxError, match="data: toy_blobs has no option 'noize'; did you mean 'noise'"):
        build_context(experiment(data={"toy_blobs": {"noize": 1}}), 0)
    with pytest.raises(MagMaxError, match=r"model: 'nowhere:encoder' names Python code.*--allow-code"):
        experiment(model="nowhere:encoder").check()


def test_names_of_rules() -> None:
    assert rule_name([{"dare": {"density": 0.5}}, "magmax"]) == "dare(density=0.5)+magmax"
    assert rule_name({"ties": None}) == "ties"


def made_up(values: dict[str, list[float]], variant: str = "default") -> list[dict[str, Any]]:
    """Tidy rows of one measure; methods with a slash and no "last" have a scaling factor."""
    return [
        {
            "seed": seed, "method": method, "training": method.rpartition("/")[2], "rule": method.partition("/")[0],
            "variant": variant, "scaling_factor": None if method.startswith(("zero", "last")) else 0.5,
            "measure": "average accuracy", "value": value,
        }
        for method, each in values.items()
        for seed, value in enumerate(each)
    ]  # fmt: skip


def test_mean_deviation_interval_and_tests_against_textbook_numbers() -> None:
    rows = made_up({"magmax/sequential": [0.6, 0.7, 0.65], "ties/sequential": [0.5, 0.66, 0.64]})
    mean = summary(rows)["magmax/sequential", "default"]["average accuracy"]
    assert (mean.mean, mean.std) == (pytest.approx(0.65), pytest.approx(0.05))
    assert mean.half == pytest.approx(
        4.302652729911275 * 0.05 / math.sqrt(3)
    )  # the 97.5 % quantile of t with 2 degrees
    pair = against_best(rows, "default")
    assert pair is not None
    assert (pair.other, pair.wins, pair.difference.n) == ("ties/sequential", 3, 3)
    t = 0.05 / (np.std([0.1, 0.04, 0.01], ddof=1) / math.sqrt(3))
    assert pair.p_t == pytest.approx(
        1 - t / math.sqrt(2 + t * t)
    )  # Student's distribution with 2 degrees, in closed form
    assert pair.p_wilcoxon == pytest.approx(0.25)  # 2 of the 8 sign patterns are as extreme


def test_references_do_not_compete_but_methods_without_a_factor_do() -> None:
    rows = made_up(
        {"magmax/sequential": [0.6, 0.6], "last/joint": [0.9, 0.9], "last/replay": [0.8, 0.8], "last/lwf": [0.5, 0.7]}
    )
    pair = against_best(rows, "default")
    assert pair is not None
    assert pair.other == "last/lwf"
    assert against_best(made_up({"last/lwf": [0.5]}), "default") is None
    chosen = made_up({"magmax/sequential": [0.6, 0.6]}, "chosen")
    assert against_best([*chosen, *made_up({"last/lwf": [0.5, 0.7]})], "chosen") is not None


def test_a_single_seed_and_equal_results_claim_nothing() -> None:
    assert "proves nothing" in comparisons(made_up({"magmax/sequential": [0.6], "last/lwf": [0.5]}))[0]
    same = compare_paired("a", "b", "default", [0.5, 0.6], [0.5, 0.6])
    assert (same.p_t, same.p_wilcoxon, same.wins) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    "differences", [[0.01, 0.01, 0.02, 0.02, 0.03, 0.03, -0.01], [0.1, 0.1, 0.2, 0.3, -0.1, 0.2], [0.1, -0.2, 0.0, 0.4]]
)
def test_the_signed_rank_test_tries_every_sign(differences: list[float]) -> None:
    some = [abs(d) for d in differences if d]
    ranks = [sum(x < y for x in some) + (sum(x == y for x in some) + 1) / 2 for y in some]
    sums = [abs(sum(s * r for s, r in zip(signs, ranks, strict=True))) for signs in product([1, -1], repeat=len(some))]
    observed = abs(sum(math.copysign(r, d) for d, r in zip([d for d in differences if d], ranks, strict=True)))
    expected = sum(total >= observed for total in sums) / len(sums)
    assert signed_rank(np.array(differences)) == pytest.approx(expected)


def test_differences_that_rounding_alone_sets_apart_are_one() -> None:
    found = compare_paired("a", "b", "default", [0.3, 0.5, 0.6], [0.2, 0.4, 0.5])
    assert (found.p_t, found.p_wilcoxon) == (0.0, 0.25)


def test_examples_are_held_out_in_every_domain() -> None:
    labels, domains = np.repeat([0, 1], 30), np.tile([0, 1, 2], 20)
    data = LabelledExamples(list(range(60)), labels, domains)
    rest, held = hold_out(data, 2, seed=0)
    assert all(((held.labels == c) & (held.domains == d)).sum() == 2 for c in (0, 1) for d in (0, 1, 2))
    assert sorted([*rest.items, *held.items]) == list(range(60))


def test_the_head_does_not_see_the_examples_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def head(encoder: Any, dataset: Any) -> Any:
        seen.extend(map(tuple, dataset.train.items))
        return toys.head(encoder, dataset)

    monkeypatch.setitem(registry.HEADS, "watched", head)
    here = build_context(experiment(validation=4, factors=[0.5], head="watched"), 0)
    assert seen
    assert not {tuple(item) for item in here.validation.items} & set(seen)


def test_the_files_agree_with_each_other(tmp_path: Path, executor: Executor) -> None:
    work = experiment(factors=[0.3, 0.7], validation=3)
    found = Benchmark(work, tmp_path, executor).run()
    files = write_results(work, found, tmp_path)
    assert [path.name for path in files] == ["results.csv", "results.json", "results.md"]
    with files[0].open(newline="") as lines:
        tidied = list(csv.DictReader(lines))
    content = json.loads(files[1].read_text())
    assert "NaN" not in files[1].read_text()
    for each in content["summary"]:
        values = [
            float(row["value"])
            for row in tidied
            if (row["method"], row["variant"], row["measure"]) == (each["method"], each["variant"], "forgetting")
        ]
        assert each["forgetting"]["mean"] == pytest.approx(np.mean(values))
    lines_of_table = [line for line in files[2].read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines_of_table) == len(content["summary"]) == len(table(tidy(found)))
    best = [each["average accuracy"]["mean"] for each in content["summary"]]
    assert f"| {100 * max(best):.1f} ±" in lines_of_table[0]
    assert content["recipe"]["fit"]["steps"] == 12
