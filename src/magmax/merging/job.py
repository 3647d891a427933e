"""A piece of work that ends in one output on disk: resumed, published or left for another try."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.base import changed_file_error, file_stamp
from ..checkpoints.blocks import checkpoint_digest
from ..checkpoints.journal import Journal, WorkingFolder
from ..checkpoints.output_paths import OutputPath, delete_output, nearest_existing_folder, replace_file
from ..checkpoints.remote.upload import Upload
from ..checkpoints.remote.urls import display_url
from ..checkpoints.writer import DEFAULT_SHARD_BYTES, PROVENANCE_FILE, OutputDraft
from ..errors import MagMaxError, UnfinishedError, list_problems
from ..legacy import modern_merge_result
from .digests import DigestCollector
from .execution.execution_options import ExecutionOptions
from .execution.shared_files import SharedFiles
from .model_files import find_outside_links, model_files
from .pipeline import BlockPipeline, Kernel, Progress, TensorSink
from .provenance import Provenance
from .result import MergeResult


class JobRunner(Protocol):
    """The runner of a job: reads the inputs, fills the sinks, and notes finished chunks in the journal."""

    @property
    def sinks(self) -> Sequence[TensorSink]: ...

    @property
    def reused(self) -> int:
        """Bytes that an interrupted run has read already."""
        ...

    def run(self, progress: Progress) -> DigestCollector: ...


Worker = Callable[["Job", Sequence[TensorSink], Journal, ExecutionOptions, Sequence[Any]], JobRunner]


def block_pipeline(
    job: Job, sinks: Sequence[TensorSink], journal: Journal, execution: ExecutionOptions, parts: Sequence[Any]
) -> JobRunner:
    """The pass of the job's kernel over all inputs."""
    return BlockPipeline(job.inputs, sinks, prepare_kernel(job.kernel, execution), execution.pool, True, journal, parts)


def prepare_kernel(kernel: Kernel, execution: ExecutionOptions) -> Kernel:
    """Return the kernel with its statistics collected, on the device that the options name."""
    kernel = kernel.prepare(execution.pool, execution.progress)
    notes = [kernel.note()]
    if execution.device is not None:
        from .execution.cuda import on_device

        kernel, words = on_device(kernel, execution.device)
        notes.append(words)
    for words in filter(None, notes):
        execution.note(words)
    return kernel


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of an output.

    Attributes:
        inputs: the base and then the rest; `names` are what provenance calls them.
        specs: the tensors to be written.
        unmerged, partly_merged: the tensors that are not merged, or not as a whole, and why.
        sinks: gives the kernel's sinks, which lead into the draft.
        small_files: given the provenance and the digest of each output tensor, the files to put beside a folder output.
        extra_passes: how often all inputs are read before the pass that writes, at the usual most.
        origin: the provenance to write, where it is not that of `inputs` themselves.
        check: called with the input digests before anything becomes visible; may refuse.
        stem, modules: the layout of a folder's weight files, see `WeightLayout`.
        worker: what reads the inputs and fills the sinks.
        memory: bytes that the statistics and the worker take beside the blocks.
        memory_per_thread: more such bytes, for each thread.
        report: lines to print of the work, once it is done.
        companions: the input whose small files `small_files` copies.
        notes: what a user should know of the job, beside the notes of its inputs.
    """

    target: OutputPath
    inputs: Sequence[Checkpoint]
    names: Sequence[str]
    recipe: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    kernel: Kernel
    unmerged: Mapping[str, str] = field(default_factory=dict[str, str])
    partly_merged: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    sinks: Callable[[OutputDraft], Sequence[TensorSink]] = lambda draft: [draft]
    small_files: Callable[[Provenance, Mapping[str, str]], Mapping[str, bytes | Path]] = lambda provenance, digests: {}
    check: Callable[[Sequence[str]], None] = lambda digests: None
    origin: Provenance | None = None
    extra_passes: int = 0
    shard_bytes: int = DEFAULT_SHARD_BYTES
    stem: str = "model"
    modules: Sequence[str] = ()
    worker: Worker = block_pipeline
    memory: int = 0
    memory_per_thread: int = 0
    report: Callable[[], Sequence[str]] = lambda: ()
    companions: Checkpoint | None = None
    notes: Sequence[str] = ()

    @property
    def read_bytes(self) -> int:
        """Bytes that all passes read, at the usual most."""
        return (1 + self.extra_passes) * sum(checkpoint.nbytes for checkpoint in self.inputs)

    @property
    def disk_needed(self) -> int:
        """Bytes of disk that the output takes beyond what an unfinished one has taken."""
        return self.make_draft().size - _allocated_bytes(self.target.partial_path)

    @property
    def disk_free(self) -> int:
        """Bytes of disk that are free where the output goes."""
        return shutil.disk_usage(nearest_existing_folder(self.target.path)).free

    def make_draft(self) -> OutputDraft:
        return OutputDraft(
            self.target,
            self.specs,
            self._metadata(self._make_provenance().with_blank_digests()),
            self.shard_bytes,
            self.stem,
            self.modules,
        )

    def all_notes(self) -> list[str]:
        """Return what a user should know of the work and of its inputs."""
        return list(dict.fromkeys([*self.notes, *(note for checkpoint in self.inputs for note in checkpoint.notes)]))

    def problems(self) -> list[str]:
        """Return everything that would stop the job, as far as can be checked without doing it."""
        problems = self.target.find_problems(
            [path for c in self.inputs for path in [c.path, *c.files()] if path is not None]
        )
        if self.target.url:
            problems += Upload(self.target.url).find_problems(
                self.target.is_folder, [c.url for c in self.inputs if c.url]
            )
        if self.target.is_folder and not problems:
            try:  # made once before the work, for what is wrong with the files that they are made from
                self.small_files(self._make_provenance().with_blank_digests(), {})
            except MagMaxError as error:
                problems += error.problems
        if not problems:
            needed, free = self.disk_needed, self.disk_free
            if needed > free:
                problems.append(f"{self.target.path}: needs {needed:,} bytes of disk, but {free:,} are free")
        return problems

    def run(self, execution: ExecutionOptions | None = None) -> MergeResult:
        """Do the work and publish the output.

        Raises:
            MagMaxError: an input that cannot be used, a place that cannot be written, no space left, or workers that
                are lost (`UnfinishedError`). After the last two, what was finished stays beside the output and the
                same job takes it up again.
        """
        execution = execution or ExecutionOptions()
        try:
            if problems := self.problems():
                raise list_problems(f"{display_url(self.target.url) or self.target.path} cannot be written", problems)
            with WorkingFolder(self.target.path):
                if not self.target.url:
                    return self._make(execution)
                identity = self._fingerprints_and_recipe()
                result = run_and_upload(self.target, identity, lambda: self._make(execution), execution.note)
            with suppress(OSError):  # another output of the same URL may be on its way
                self.target.path.parent.rmdir()
            return result
        except OSError as error:
            raise explain_os_error(error, self.target.path, "it resumes where it stopped") from error

    def _make(self, execution: ExecutionOptions) -> MergeResult:
        """The work done and the output published on this machine."""
        journal = Journal(self.target.journal_path)
        draft = self.make_draft()
        try:
            return self._run_pipeline(draft, journal, execution)
        except MagMaxError as error:
            if not (isinstance(error, UnfinishedError) and journal.load()[1]):
                draft.discard()
                journal.remove()
            raise
        finally:
            draft.close()
            journal.close()

    def _run_pipeline(self, draft: OutputDraft, journal: Journal, execution: ExecutionOptions) -> MergeResult:
        began = time.perf_counter()
        folder = self._companion_folder()
        links = find_outside_links(folder) if folder else []
        for words in [*self.all_notes(), *(f"{folder}: {x} leads out of it, so it is not copied" for x in links)]:
            execution.note(words)
        companions = self._companion_stamps()
        parts = self._finished_chunks(draft, journal, execution)
        if not parts:
            journal.start(
                self._fingerprints_and_recipe()
            )  # first of all: an old journal must never vouch for a new draft
        draft.open(fresh=not parts)
        with self._with_checked_workers(execution) as execution:
            work = self.worker(self, self.sinks(draft), journal, execution, parts)
            reused = work.reused
            if reused:
                execution.note(f"resuming: {reused / self.read_bytes:.0%} was done already")
            collector = work.run(execution.progress)
        outputs = collector.tensors[len(self.inputs) :]
        digests = collector.digests(self.inputs)
        provenance = self._make_provenance(digests)
        files = self.small_files(provenance, outputs[0])
        self._check_unchanged(companions)
        self.check(digests)
        draft.publish(self._metadata(provenance), files)
        journal.remove()
        output_digests = [checkpoint_digest(s.specs, tensors) for s, tensors in zip(work.sinks, outputs, strict=True)]
        seconds = time.perf_counter() - began
        return MergeResult(
            self.target.path,
            seconds,
            self.read_bytes,
            draft.size,
            reused,
            self.unmerged,
            self.partly_merged,
            digests,
            output_digests,
        )

    @contextmanager
    def _with_checked_workers(self, execution: ExecutionOptions) -> Generator[ExecutionOptions]:
        """The settings with workers that see what they must, where these are in other processes."""
        if execution.executor is None or isinstance(execution.executor, ThreadPoolExecutor):
            yield execution
            return
        with SharedFiles.of(self.inputs).with_probe(self.target) as shared_files:
            execution = replace(execution, shared_files=shared_files)
            execution.pool.check_workers()
            yield execution

    def _finished_chunks(self, draft: OutputDraft, journal: Journal, execution: ExecutionOptions) -> list[Any]:
        """The finished chunks of an interrupted run of this very job on these very inputs."""
        identity, parts = journal.load()
        if identity is None or not parts or execution.restart:
            return []
        if not all(c.is_on_disk for c in self.inputs):
            execution.note("starting afresh: inputs in memory cannot be recognised")
            return []
        ours = json.loads(json.dumps(self._fingerprints_and_recipe()))  # as the journal gives it back
        changed = [name for name, now in ours.items() if identity.get(name) != now]
        if changed or len(identity) != len(ours):
            execution.note(f"starting afresh: {', '.join(changed) or 'the inputs'} changed since the interrupted run")
            return []
        return parts if draft.is_intact() else []

    def _fingerprints_and_recipe(self) -> dict[str, Any]:
        """Return what must be unchanged for finished chunks to be of use."""
        identity: dict[str, Any] = {"the recipe": self._make_provenance().with_blank_digests().as_dict()}
        identity["the output's layout"] = [self.shard_bytes, *(f"{k} {s}" for k, s in self.specs.items())]
        fingerprints = [checkpoint.fingerprints() for checkpoint in self.inputs]
        identity["the order of the inputs"] = [list(stamps) for stamps in fingerprints]
        return identity | {name: stamp for stamps in fingerprints for name, stamp in stamps.items()}

    def _check_unchanged(self, companions: Mapping[Path, Any]) -> None:
        """Raise MagMaxError if an input is no longer what it was when it was opened, or a file that is copied."""
        for checkpoint in self.inputs:
            checkpoint.check_unchanged()
        now = self._companion_stamps()
        for path in dict.fromkeys([*companions, *now]):
            if companions.get(path) != now.get(path):
                raise changed_file_error(str(path))

    def _companion_folder(self) -> Path | None:
        """The folder on this machine whose small files are copied beside the weights, if there is one."""
        if self.companions is None or self.companions.url or not self.target.is_folder:
            return None
        return self.companions.small_files_folder()

    def _companion_stamps(self) -> dict[Path, list[object]]:
        folder = self._companion_folder()
        paths = [path for path in model_files(folder, None).values() if isinstance(path, Path)] if folder else []
        return {path: file_stamp(path) for path in paths}

    def _make_provenance(self, digests: Sequence[str] = ()) -> Provenance:
        origins = [checkpoint.origin for checkpoint in self.inputs]
        return self.origin or Provenance(self.recipe, self.names, digests or [""] * len(self.names), origins)

    def _metadata(self, provenance: Provenance) -> dict[str, str]:
        return {"format": "pt", **self.metadata, **provenance.metadata()}


def explain_os_error(error: OSError, out: Path, again: str) -> MagMaxError:
    """Return what the operating system refused while `out` was made; `again` says what the same command then does."""
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(nearest_existing_folder(out)).free
        return MagMaxError(
            f"{out}: no space left ({free:,} bytes free); free some and run the same command again: {again}"
        )
    return MagMaxError(f"{error.filename or out}: {error.strerror or error}")


def _allocated_bytes(partial: Path) -> int:
    """Bytes of disk that an unfinished output has taken already."""
    try:
        files = partial.rglob("*") if partial.is_dir() else [partial]
        return sum(512 * file.stat().st_blocks for file in files if file.is_file())
    except FileNotFoundError:  # another process has just finished or given up this output
        return 0


def provenance_file(
    provenance: Provenance, digests: Mapping[str, str], more: Mapping[str, Any] | None = None
) -> dict[str, bytes | Path]:
    """The provenance file of a folder output, with more to tell if there is."""
    content = {**provenance.as_dict(), **(more or {}), "tensors": dict(sorted(digests.items()))}
    return {PROVENANCE_FILE: json.dumps(content, indent=2).encode() + b"\n"}


def run_and_upload(
    target: OutputPath,
    identity: Mapping[str, Any],
    make: Callable[[], MergeResult],
    note: Callable[[str], None],
) -> MergeResult:
    """The outcome of `make`, uploaded; what an interrupted upload left here is uploaded without making it again.

    That is, while `identity` is unchanged.
    """
    upload = Upload(target.url)
    upload.write_marker(target.is_folder)
    ready = target.path.with_name(target.path.name + ".ready")
    result = _unfinished_upload(ready, target.path, json.loads(json.dumps(identity)))
    if result is None:
        try:
            result = make()
        except MagMaxError as error:
            if not isinstance(error, UnfinishedError):
                upload.abandon(target.is_folder)
            raise
        content = {**asdict(result), "path": ""}
        replace_file(ready, json.dumps({"identity": identity, "outcome": content}).encode())
    else:
        note("resuming: the output is made already and is uploaded now")
    upload.send(target.path)
    ready.unlink()
    delete_output(target.path)
    return replace(result, path=upload.label)


def _unfinished_upload(ready: Path, output: Path, identity: Any) -> MergeResult | None:
    try:
        content = json.loads(ready.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if content["identity"] != identity or not output.exists():
        return None
    return MergeResult(**modern_merge_result(content["outcome"]))
