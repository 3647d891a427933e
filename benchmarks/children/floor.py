"""The floor: read every input, write the output's bytes, through one buffer of 256 KiB; compute nothing."""

import os
from pathlib import Path

from child import read_job, run_timed

BUFFER = 256 * 1024


def read_file(path: str, copy_to: Path | None) -> None:
    buffer = bytearray(BUFFER)
    view = memoryview(buffer)
    source = os.open(path, os.O_RDONLY)
    target = os.open(copy_to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if copy_to else -1
    while count := os.readv(source, [buffer]):
        written = 0
        while copy_to and written < count:
            written += os.write(target, view[written:count])
    os.close(source)
    if copy_to:
        os.fsync(target)
        os.close(target)


def floor(base_files: list[str], model_files: list[str], out: Path) -> None:
    """The output is as long as the base, so the base's bytes serve for it."""
    out.mkdir(parents=True)
    for path in base_files:
        read_file(path, out / Path(path).name)
    for path in model_files:
        read_file(path, None)


if __name__ == "__main__":
    task = read_job()
    run_timed(lambda: floor(task["base_files"], task["model_files"], Path(task["out"])))
