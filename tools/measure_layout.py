"""Print what can be counted of the layout: files, names, layers, commands. `make lint` runs it.

Exits with 1 where a number is above its limit, so that the layout cannot drift unnoticed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
SHARED_NAMES = ("__init__.py", "base.py")
"""File names that several packages may have: each package at most one of either."""
LIMITS = {
    "tracked files": 600,
    "file names with characters other than A-Z a-z 0-9 . _ -": 0,
    "public class names defined twice": 0,
    "file names used twice": 0,
    "import cycles": 0,
    "upward imports": 0,
    "levels of packages": 9,
    "top-level commands": 14,
    "lines of the largest file": 400,
}


def tracked_files(root: Path) -> list[str]:
    """Return the paths of all files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return listed.stdout.split("\0")[:-1]


def odd_names(paths: Iterable[str]) -> list[str]:
    """Return the paths that a shell, another system or a web page would have to quote."""
    return [path for path in paths if re.search(r"[^A-Za-z0-9._/-]", path)]


def repeated_classes(sources: Iterable[Path]) -> list[str]:
    """Return the names of public classes that more than one class statement at the top of a module defines."""
    names = Counter(
        node.name
        for source in sources
        for node in ast.parse(source.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    return [name for name, count in names.items() if count > 1]


def repeated_files(sources: Iterable[Path]) -> list[str]:
    """Return the file names that two modules share."""
    names = Counter(source.name for source in sources if source.name not in SHARED_NAMES)
    return [name for name, count in names.items() if count > 1]


def layers_of(root: Path) -> list[list[str]]:
    """Return the levels of the layers contract in pyproject.toml, each a list of modules, the highest first."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [re.split(r" [|:] ", layer) for layer in layers]


def upward_imports(imports: Mapping[str, Iterable[str]], layers: Sequence[Sequence[str]]) -> list[str]:
    """Return imports of a module on a higher level, as "importer -> imported"; lazy imports count too."""
    level = {package: depth for depth, packages in enumerate(layers) for package in packages}

    def depth(module: str) -> int:
        return next((level[package] for package in level if f"{module}.".startswith(f"{package}.")), -1)

    return [
        f"{importer} -> {imported}"
        for importer, targets in imports.items()
        for imported in targets
        if depth(importer) > depth(imported) >= 0
    ]


def import_cycles(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Return one cycle of imports, if there is one."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def commands() -> list[str]:
    """Return the names of the commands at the top of the command line."""
    from magmax.cli import app

    return [name for name in app if not name.startswith("-")]


def measure(root: Path) -> dict[str, int | list[str]]:
    """Count everything that LIMITS names; a list where the offenders can be named."""
    paths = tracked_files(root)
    sources = [root / path for path in paths if path.startswith("src/") and path.endswith(".py")]
    graph = grimp.build_graph("magmax", exclude_type_checking_imports=True)
    imports = {module: sorted(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}
    layers = layers_of(root)
    values = (
        len(paths),
        odd_names(paths),
        repeated_classes(sources),
        repeated_files(sources),
        import_cycles(imports),
        upward_imports(imports, layers),
        len(layers),
        len(commands()),
        max(source.read_text("utf-8").count("\n") for source in sources),
    )
    return dict(zip(LIMITS, values, strict=True))


def main() -> int:
    """Print each number beside its limit; return 1 if one is above it."""
    failed = False
    for what, value in measure(ROOT).items():
        count = value if isinstance(value, int) else len(value)
        offenders = "" if isinstance(value, int) or not value else ": " + ", ".join(value[:5])
        print(f"{what:<58}{count:>5} of at most {LIMITS[what]}{offenders}")
        failed = failed or count > LIMITS[what]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
