"""Work done by other processes: the bytes are those of this one, and the loss of workers is survived or told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.test_dcp import save
from tests.checkpoints.test_lora import adapter, base_model, linear
from tests.merging.dawdling import SLOW_MARKER, SlowTies, hide_folder
from tests.models import save_tensors, small_model

import magmax
from magmax import MagMaxError, Running
from magmax.checkpoints import open_checkpoint
from magmax.checkpoints.journal import WorkingFolder
from magmax.checkpoints.output_paths import OutputPath
from magmax.cli import app
from magmax.errors import UnfinishedError
from magmax.merging import pipeline
from magmax.merging.execution import pool as pool_module
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.execution.executors import connect, process_pool
from magmax.merging.execution.shared_files import SharedFiles
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.merging.sweep import FactorSweep
from magmax.rules import as_rule, rule_from

distributed = pytest.importorskip("distributed")

RULES: list[Any] = [
    "magmax",
    {"ties": {"density": 0.3}},
    {"ties": {"span": "tensor"}},
    {"model_stock": {"span": "model"}},
    [{"prune": {"density": 0.4}}, "magmax"],
    "iso_c",
]
"""Elementwise; asking of the whole model; of each tensor; for sums of floats, which depend on their order; a chain; and
of whole matrices."""


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SHARE_BYTES", 3_000_000)
    monkeypatch.setattr(pool_module, "POLL_SECONDS", 0.2)


@pytest.fixture(scope="module")
def one_blas_thread() -> Iterator[None]:
    """The last bits of a decomposition depend on how many threads BLAS has, also in the processes to come."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    yield
    del os.environ["OPENBLAS_NUM_THREADS"]
    if before is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def pool(one_blas_thread: None) -> Iterator[Executor]:
    with process_pool(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def dask(one_blas_thread: None) -> Iterator[Any]:
    """A real cluster: two worker processes, each with a nanny that begins another when it dies."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options, silence_logs=60) as local, distributed.Client(local) as client:
        yield client


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_gives_the_bytes_of_one_process(rule, files, tmp_path, pool, dask):
    """Also the digests in the provenance, which come from the workers."""
    base, tasks = files
    parsed = rule_from(rule)
    pool.submit(magmax.merge, parsed, base, tasks, out=tmp_path / "alone.safetensors").result()
    for executor in (pool, dask.get_executor(pure=False)):
        magmax.merge(parsed, base, tasks, out=tmp_path / "shared.safetensors", executor=executor)
        assert (tmp_path / "shared.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.safetensors", "in", "shared.safetensors"]


def test_every_kind_of_checkpoint_is_opened_again_by_the_workers(tmp_path, pool, monkeypatch):
    """Named by paths as seen from here; the workers began elsewhere."""
    monkeypatch.chdir(tmp_path)
    base = base_model()
    tuned = [{k: t + n * 0.01 if t.is_floating_point() else t for k, t in base.items()} for n in range(1, 4)]
    save_tensors(base, Path("base.safetensors"))
    torch.save(tuned[0], "pickled.pt")
    Path("folder").mkdir()
    names = sorted(base)
    for number, keys in enumerate((names[::2], names[1::2]), start=1):
        save_tensors({k: tuned[1][k] for k in keys}, Path("folder") / f"model-0000{number}-of-00002.safetensors")
    where = {k: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, k in enumerate(names)}
    (Path("folder") / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save({"model": tuned[2]}, Path("distributed"))
    adapter(Path("adapter"), linear("m.q", 20, 12))
    models = ["pickled.pt", "folder", "distributed", "base.safetensors+adapter"]
    magmax.merge("magmax", "base.safetensors", models, out="alone", execution=ExecutionOptions(threads=1))
    magmax.merge("magmax", "base.safetensors", models, out="shared", executor=pool)
    for name in ("model.safetensors", "provenance.json"):
        assert Path("shared", name).read_bytes() == Path("alone", name).read_bytes()


def test_what_is_in_memory_goes_to_threads_alone(files, tmp_path, pool):
    base, models = small_model(0), [small_model(1), small_model(2)]
    with ThreadPoolExecutor(2) as threads:
        shared = magmax.merge("ties", base, models, executor=threads)
    alone = magmax.merge("ties", base, models)
    assert all(torch.equal(shared[k].view(torch.uint8), alone[k].view(torch.uint8)) for k in base if base[k].dim())
    for given in ({"base": base}, {"base": files[0], "out": tmp_path / "out.safetensors"}):
        with pytest.raises(MagMaxError, match="is in memory, where other processes cannot read it"):
            magmax.merge("magmax", models=models, executor=pool, **given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_running_merge_and_a_sweep_by_other_processes(files, tmp_path, pool):
    base, tasks = files
    for name, settings in (("alone", ExecutionOptions()), ("shared", ExecutionOptions(executor=pool))):
        running = Running(tmp_path / name, "magmax", base, winners=True, execution=settings)
        for task in tasks:
            running.absorb(task)
        running.result(0.7, tmp_path / f"{name}.safetensors")
        options = OutputOptions(dtype="bfloat16")
        opened = [open_checkpoint(task) for task in tasks]
        out, names = tmp_path / f"swept-{name}.safetensors", [task.stem for task in tasks]
        with FactorSweep(
            as_rule("ties"), open_checkpoint(base), opened, names, out, options, [0.5], settings
        ).merged() as s:
            s.write(0.5)
    for ours, theirs in (("shared", "alone"), ("swept-shared-0.5", "swept-alone-0.5")):
        assert (tmp_path / f"{ours}.safetensors").read_bytes() == (tmp_path / f"{theirs}.safetensors").read_bytes()
    folders = [sorted((tmp_path / name).rglob("*.safetensors")) for name in ("alone", "shared")]
    assert [p.read_bytes() for p in folders[0]] == [p.read_bytes() for p in folders[1]]


class Slow:
    """A merge in many shares that takes its time, and what it ends in."""

    def __init__(self, files: tuple[Path, list[Path]], tmp_path: Path) -> None:
        self.base, self.tasks = files
        self.out, self.marks = tmp_path / "slow.safetensors", tmp_path / "marks"
        self.marks.mkdir()
        self.rule = SlowTies(folder=str(self.marks))
        self.alone = tmp_path / "alone.safetensors"
        magmax.merge(self.rule, self.base, self.tasks, out=self.alone)
        (self.marks / SLOW_MARKER).touch()
        self.notes: list[str] = []

    def merge(self, executor: Executor | None) -> None:
        settings = ExecutionOptions(executor=executor, note=self.notes.append)
        magmax.merge(self.rule, self.base, self.tasks, out=self.out, execution=settings)

    def amid(self, executor: Executor, blow: Callable[[list[int]], object]) -> BaseException | None:
        """The error that the merge ends in when, amid it, `blow` is struck; it is given the workers."""
        journal = OutputPath(self.out).journal_path
        with ThreadPoolExecutor(1) as one:
            ending = one.submit(self.merge, executor)
            while not ending.done() and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
                time.sleep(0.01)
            blow(sorted({int(mark.name.partition(".")[0]) for mark in self.marks.glob("*.*")}))
            return ending.exception(60)

    def hastened(self) -> None:
        (self.marks / SLOW_MARKER).unlink()

    def whole(self) -> bool:
        return self.out.read_bytes() == self.alone.read_bytes() and not OutputPath(self.out).working_folder.exists()


@pytest.fixture
def slow(files: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setattr(pool_module, "SHARE_BYTES", 2_000_000)
    monkeypatch.setattr(pipeline, "JOURNAL_SECONDS", -1.0)
    return Slow(files, tmp_path)


def kill(processes: list[int]) -> None:
    os.kill(processes[0], signal.SIGKILL)


def test_a_killed_worker_of_a_pool_is_told_and_the_same_merge_goes_on(slow):
    with process_pool(2) as pool:
        error = slow.amid(pool, kill)
    assert isinstance(error, UnfinishedError)
    assert "a worker process ended before its share of the work was done" in str(error)
    assert not slow.out.exists()
    slow.hastened()
    with process_pool(1) as pool:
        slow.merge(pool)
    assert any(note.startswith("resuming: ") for note in slow.notes)
    assert slow.whole()


def test_a_lost_scheduler_is_told_and_the_same_merge_goes_on(slow, tmp_path):
    """A scheduler and a worker by the commands that the docs name, the latter without anything of this process."""
    there, root = tmp_path / "scheduler.json", Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(root)])}
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    names = ["--scheduler-file", str(there), "--no-dashboard"]
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", *names]
    scheduler = subprocess.Popen(command, **quiet)
    worker = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", "--no-nanny", *names], **quiet)
    try:
        address = read_address(there)
        executor, close = connect(address)
        error = slow.amid(executor, lambda _: scheduler.kill())
        close()
        with pytest.raises(UnfinishedError, match=r"does not answer .* the same command goes on"):
            pool_module.worker_slots(executor)
        assert isinstance(error, UnfinishedError), error
        assert "same command goes on from there" in str(error)
        assert not slow.out.exists()
        slow.hastened()
        slow.merge(None)
        assert any(note.startswith("resuming: ") for note in slow.notes)
        assert slow.whole()
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def read_address(there: Path) -> str:
    for _ in range(3000):
        if there.exists() and there.stat().st_size:
            return json.loads(there.read_text())["address"]
        time.sleep(0.01)
    raise TimeoutError("after 30 s there is no scheduler")


@pytest.mark.parametrize("what", ["in", "out"])
def test_a_worker_without_the_folder_is_refused_with_the_reason(what, files, tmp_path, dask):
    base, tasks = files
    (tmp_path / "out").mkdir()
    poor, fine = dask.nthreads()
    job = merge_job(as_rule("magmax"), *opened(base, tasks), tmp_path / "out" / "m.safetensors", OutputOptions())
    dask.run(hide_folder, str(tmp_path / what), workers=[poor])
    try:
        with pytest.raises(UnfinishedError, match="on a file system that all share") as told:
            job.run(ExecutionOptions(executor=dask.get_executor(pure=False)))
    finally:
        dask.run(hide_folder, "", workers=[poor])
    assert poor in str(told.value)
    assert fine not in str(told.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_line_names_a_scheduler(files, tmp_path, dask, capsys):
    base, tasks = files
    address = dask.scheduler.address
    words = ["merge", *map(str, tasks), "--base", str(base), "--out", str(tmp_path / "out.safetensors")]
    app([*words, "--scheduler", address, "--dry-run"], result_action="return_value")
    assert "workers       2, 1 shares at once, peak memory about " in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()
    app([*words, "--scheduler", address], result_action="return_value")
    magmax.merge("magmax", base, tasks, out=tmp_path / "alone.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_adapters_are_merged_into_one_by_threads_alone(tmp_path, pool):
    folders = [adapter(tmp_path / name, linear("m.q", 20, 12)) for name in ("one", "two")]
    with pytest.raises(MagMaxError, match="by threads of this process"):
        magmax.merge_adapters("average", folders, 2, tmp_path / "out", execution=ExecutionOptions(executor=pool))
    assert not list(tmp_path.glob("out*"))


def opened(base: Path, tasks: list[Path]) -> tuple[Any, list[Any]]:
    return open_checkpoint(base), [open_checkpoint(task) for task in tasks]


def test_a_worker_looks_at_each_input_before_each_share(files, tmp_path):
    base, tasks = files
    ground = SharedFiles.of([open_checkpoint(base), *map(open_checkpoint, tasks)])
    target = OutputPath(tmp_path / "out.safetensors")
    with WorkingFolder(target.path), ground.with_probe(target) as staked:
        staked.check(thoroughly=True)
    with pytest.raises(UnfinishedError, match="is not there, as it must be while the output is written"):
        staked.check(thoroughly=False)
    before = tasks[0].stat()
    content = bytearray(tasks[0].read_bytes())
    content[20] ^= 1
    tasks[0].write_bytes(content)
    assert "is another file" in ground.problem()
    os.utime(tasks[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    ground.check(thoroughly=False)
    with pytest.raises(UnfinishedError, match=r"process \d+: .*task1.safetensors: is another file"):
        ground.check(thoroughly=True)
    base.unlink()
    assert "No such file" in ground.problem()
    assert "begun with 0.0; install the same" in SharedFiles(version="0.0").problem()


def test_a_dask_worker_killed_amid_a_merge_is_survived(slow, dask):
    assert slow.amid(dask.get_executor(pure=False), kill) is None
    assert slow.whole()
