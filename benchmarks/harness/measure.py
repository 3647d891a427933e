"""One process, watched from outside: seconds, peak memory, bytes read and written, or why it failed."""

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness.places import REPOSITORY

SAMPLE_MS = 5


@dataclass
class Measurement:
    """`status`: "ok", "failed" or "not done after N s". MB are 10^6 bytes; the kernel counts moved bytes."""

    status: str
    whole_s: float
    inner_s: float | None
    peak_rss_mb: float
    peak_anonymous_mb: float
    imports_anonymous_mb: float | None
    bytes_read: int
    bytes_written: int
    error: str = ""
    processor_s: float | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def above_imports_mb(self) -> float | None:
        imports = self.imports_anonymous_mb
        return None if imports is None else self.peak_anonymous_mb - imports


@dataclass
class _MemoryPeaks:
    rss_kb: int = 0
    anonymous_kb: int = 0

    def sample(self, pid: int) -> None:
        """VmHWM is the kernel's own high-water mark, RssAnon a value of the moment."""
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                self.rss_kb = max(self.rss_kb, int(line.split()[1]))
            elif line.startswith("RssAnon:"):
                self.anonymous_kb = max(self.anonymous_kb, int(line.split()[1]))


def measure_process(command: list[str], limit_s: float, folder: Path) -> Measurement:
    """Runs `command` in `folder` (put on its import path too), at most `limit_s` seconds."""
    paths = os.pathsep.join([str(folder), str(REPOSITORY / "src")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, cwd=folder, env=environment, start_new_session=True
        )
        peaks, in_time = _watch_process(process.pid, start + limit_s)
        seconds = time.perf_counter() - start
        if not in_time:
            os.killpg(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        counted = _bytes_moved(process.pid)
        code = process.wait()
        said = _last_json(_read_text(out))
        status = "ok" if code == 0 else "failed"
        return Measurement(
            status=status if in_time else f"not done after {limit_s:.0f} s",
            whole_s=seconds,
            inner_s=said.get("inner_s"),
            peak_rss_mb=peaks.rss_kb * 1.024e-3,
            peak_anonymous_mb=peaks.anonymous_kb * 1.024e-3,
            imports_anonymous_mb=said.get("imports_anonymous_mb"),
            bytes_read=counted.get("rchar", 0),
            bytes_written=counted.get("wchar", 0),
            error=_last_line(_read_text(errors)) if in_time and code else "",
            processor_s=said.get("processor_s"),
        )


def _watch_process(pid: int, deadline: float) -> tuple[_MemoryPeaks, bool]:
    """Samples until the process ends (True) or the deadline passes (False)."""
    peaks = _MemoryPeaks()
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while not poll.poll(SAMPLE_MS):
            peaks.sample(pid)
            if time.perf_counter() > deadline:
                return peaks, False
        return peaks, True
    finally:
        os.close(handle)


def _bytes_moved(pid: int) -> dict[str, int]:
    """rchar and wchar: bytes through read and write calls, page cache or not."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _read_text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "exited without a word"


def _last_json(text: str) -> dict[str, float]:
    try:
        said = json.loads(_last_line(text))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
