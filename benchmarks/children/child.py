"""Run by every measured process: times the work alone and says what memory the imports had already taken."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    return json.loads(sys.argv[1])


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1000
    raise OSError("no RssAnon in /proc/self/status")


def run_timed(work: Callable[[], object]) -> None:
    """Runs `work`, then prints its seconds, those of processors, and the anonymous MB before it as the last line."""
    before = anonymous_mb()
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    print(json.dumps({"inner_s": seconds, "processor_s": used, "imports_anonymous_mb": before}), flush=True)
