"""A rule that takes its time and leaves the number of each process that works on it, so that a test can kill one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from magmax.rules.plan import Block
from magmax.rules.ties import Ties

SLOWLY = "slowly"


@dataclass(frozen=True)
class Dawdling(Ties):
    """TIES; while a file `slowly` is in the folder, each merged block leaves a file PROCESS.OFFSET there and waits."""

    name: ClassVar[str] = "dawdling"
    folder: str = ""

    def merge(self, block: Block, answer):
        folder = Path(self.folder)
        if (folder / SLOWLY).exists():
            (folder / f"{os.getpid()}.{block.at.key}.{block.at.offset}").touch()
            time.sleep(0.15)
        return super().merge(block, answer)
