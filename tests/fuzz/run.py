"""Try many mutated inputs.

    python -m tests.fuzz.run 10000            that many cases of every kind
    python -m tests.fuzz.run 10000 header     of one kind: header, index, recipe, state, adapter, pickle or opcodes
    python -m tests.fuzz.run 1 header 4711    that one case again, with its traceback

The law: a MagMaxError or a right answer; never another exception, a hang, or a crash. Each new way to break it is
printed with its kind and seed; the exit code is 1 if there is one.
"""

from __future__ import annotations

import resource
import signal
import sys
import traceback
from collections import Counter

from tests.fuzz.laws import CHECKS, run_case

TIMEOUT_SECONDS = 10
MEMORY_LIMIT = 16 << 30
"""Bytes of addresses, so that an input that asks for all memory is an error here and does not hurt others."""


def main(arguments: list[str]) -> int:
    count = int(arguments[0]) if arguments else 1000
    kinds = arguments[1:2] or list(CHECKS)
    first = int(arguments[2]) if len(arguments) > 2 else 0
    signal.signal(signal.SIGALRM, _raise_timeout)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    broken: Counter[str] = Counter()
    for kind in kinds:
        for seed in range(first, first + count):
            signal.alarm(TIMEOUT_SECONDS)
            try:
                run_case(kind, seed)
            except Exception as error:
                words_of_it = f"{type(error).__name__} at {_error_location(error)}"
                broken[words_of_it] += 1
                if broken[words_of_it] == 1:
                    print(f"{kind} {seed}: {words_of_it}: {str(error)[:300]}")
                    if count == 1:
                        traceback.print_exc()
            finally:
                signal.alarm(0)
        print(f"{kind}: {count} cases from seed {first}")
    for name, times in broken.most_common():
        print(f"{times:6} x {name}")
    return 1 if broken else 0


def _raise_timeout(signum: int, frame: object) -> None:
    raise TimeoutError(f"more than {TIMEOUT_SECONDS} seconds")


def _error_location(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename.rpartition('/')[2]}:{last.lineno}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
