"""What a document tells its reader to type: the commands and the files in its Markdown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def code_blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks in a language."""
    found = re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return list(found)


def titled_blocks(document: Path) -> dict[str, str]:
    """The blocks that are files: title="NAME"."""
    found = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', document.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def commands(document: Path, except_prefixes: tuple[str, ...]) -> list[str]:
    """Every command, without its prompt; but those that begin with these words."""
    lines = [line for block in code_blocks(document, "console") for line in block.splitlines()]
    return [line[2:] for line in lines if line.startswith("$ ") and not line[2:].startswith(except_prefixes)]


def run_command(command: str, **environment: str) -> None:
    """Run a command as a user of this Python would; it must succeed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    given = {**os.environ, **environment, "PATH": path}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
