"""What tests have worker processes do: a rule that takes its time and leaves the number of each process that works on
it, so that a test can kill one; and not seeing a folder. Light to import, as every worker does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from magmax.rules.statistics import Block
from magmax.rules.ties import Ties

SLOW_MARKER = "slowly"


@dataclass(frozen=True)
class SlowTies(Ties):
    """TIES; while a file `slowly` is in the folder, each merged block leaves a file PROCESS.OFFSET there and waits."""

    name: ClassVar[str] = "dawdling"
    folder: str = ""

    def merge(self, block: Block, answer):
        folder = Path(self.folder)
        if (folder / SLOW_MARKER).exists():
            (folder / f"{os.getpid()}.{block.address.key}.{block.address.offset}").touch()
            time.sleep(0.15)
        return super().merge(block, answer)


def hide_folder(folder: str) -> None:
    """In a worker: what is in a folder is there for others alone; nothing is hidden where the folder is ""."""
    true_exists, true_stat = getattr(os, "true", (os.path.exists, Path.stat))

    def exists(path: Any) -> bool:
        return not os.fspath(path).startswith(folder) and true_exists(path)

    def stat(path: Path, **options: Any) -> os.stat_result:
        if str(path).startswith(folder):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return true_stat(path, **options)

    os.true = true_exists, true_stat
    os.path.exists, Path.stat = (exists, stat) if folder else (true_exists, true_stat)
