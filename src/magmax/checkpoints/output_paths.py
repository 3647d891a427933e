"""The paths that this program may create and delete: all of them are named here, and no other is touched.

    OUT                         an output: a file, or a folder whose `.magmax-contents` lists its files
    OUT.magmax-work/            its working folder, deleted once the output is complete
        .magmax-lock            the lock; a folder of this name without it belongs to someone else
        output, output.safetensors, output.journal   the unfinished output, and what of it is done
        old                     the output that is being replaced
        probe-*                 shows workers that they see this folder
        task-vector.safetensors, trial-N-*.safetensors, each with a working folder   outputs of steps of the work
    FOLDER/.magmax-lock         the lock of a folder that grows: a running merge, a training, a search, a study
    .NAME.(16 hex digits).magmax-draft   a small file before it is renamed to NAME
    .(16 hex digits).magmax-work   a working folder before it has its name, and after

Anything else that is found at these places stops a command before any work. A link is neither followed nor replaced, a
file with two names is not written to, and a folder is deleted file by file, as listed, so that what was added stays.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Literal

from ..errors import MagMaxError
from .remote.upload import staging_path
from .remote.urls import is_url

WORK_SUFFIX = ".magmax-work"
LOCK_FILE = ".magmax-lock"
LOCK_TEXT = b"A lock of magmax: it is writing this output, or was stopped. The same command goes on and deletes this.\n"
CONTENTS_FILE = ".magmax-contents"
WORK_NAMES = re.compile(r"(output|task-vector|trial-\d+-[0-9a-f]{8})\.safetensors|output\.journal|probe-[0-9a-f]{32}")
WORK_FOLDERS = ("output", "old")
STAGED_FOLDERS = re.compile(r"\.[0-9a-f]{16}\.magmax-work")
DRAFT_NAMES = re.compile(r"\.(.+)\.[0-9a-f]{16}\.magmax-draft", re.DOTALL)
COPY_BYTES = 1 << 20
METADATA_KEY = "magmax"
"""The key of a safetensors file's metadata that holds its provenance."""

PathKind = Literal["file", "folder", "symbolic link", "special file"]


@dataclass(frozen=True)
class OutputPath:
    """The path of an output: a `.safetensors` file, or, with any other name, a folder of shards.

    Attributes:
        path: where it is made.
        url: where it is then uploaded to, if it belongs on another machine.
    """

    path: Path
    url: str = ""

    @classmethod
    def parse(cls, out: str | PathLike[str]) -> OutputPath:
        """The target that a path or a URL names."""
        text = fspath(out)
        return cls(staging_path(text), text) if is_url(text) else cls(Path(text))

    @property
    def is_folder(self) -> bool:
        return self.path.suffix != ".safetensors"

    @property
    def working_folder(self) -> Path:
        return working_folder(self.path)

    @property
    def partial_path(self) -> Path:
        return self.working_folder / ("output" if self.is_folder else "output.safetensors")

    @property
    def journal_path(self) -> Path:
        return self.working_folder / "output.journal"

    @property
    def replaced(self) -> Path:
        return self.working_folder / "old"

    def find_problems(self, inputs: list[Path]) -> list[str]:
        """Return what forbids writing here, seen without writing: all of it."""
        path = self.path
        if path.name in ("", ".."):
            return [f"{path}: names no new file or folder; give the output a name of its own"]
        problems: list[str] = []
        if not self.url and is_url(str(path).replace(":/", "://", 1)):
            problems.append(f"{path}: is on another machine, and this is written here; name a path")
        if path.suffix in (".pt", ".pth", ".bin"):
            problems.append(f"{path}: only safetensors are written; name a .safetensors file or a folder")
        real, taken = path.resolve(), {p.resolve() for p in inputs}
        if real in taken or (self.is_folder and any(real in p.parents for p in taken)):
            problems.append(f"{path}: is one of the inputs, or holds one; choose another place for the output")
        elif inside := next((p for p in taken if p in real.parents), None):
            problems.append(
                f"{path}: is inside {inside}, which is one of the inputs; choose another place for the output"
            )
        work = self.working_folder.resolve()
        if within := next((p for p in taken if work in (p, *p.parents)), None):
            problems.append(f"{within}: is an input where working files go; move it, or choose another output")
        problems += find_place_problems(path, "folder" if self.is_folder else "file")
        if self.is_folder and kind_of(path) == "folder":
            problems += describe_foreign(path, find_foreign(path))
            if os.path.ismount(path):
                problems.append(f"{path}: is a mount point, which cannot be replaced; name a folder inside of it")
        if not self.is_folder and kind_of(path) == "file" and not _is_own_weights(path):
            problems.append(f"{path}: is there, and magmax did not write it; move it, or choose another name")
        above = nearest_existing_folder(path)
        if not os.access(above, os.W_OK | os.X_OK):
            problems.append(f"{above}: cannot be written to; choose another place for the output")
        return problems


def working_folder(output: Path) -> Path:
    """Return the path of an output's working folder."""
    return output.with_name(output.name + WORK_SUFFIX)


def kind_of(path: Path) -> PathKind | None:
    """Return what is at a path, without following a link; None where nothing is."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    kinds: dict[int, PathKind] = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def find_place_problems(path: Path, kind: Literal["file", "folder"]) -> list[str]:
    """Return why an output of this kind cannot take the place of what is at its path and at its working folder's."""
    problems: list[str] = []
    there = kind_of(path)
    if path.name.endswith(WORK_SUFFIX):
        problems.append(f"{path}: names of working files end in {WORK_SUFFIX}; choose another name")
    if there == "symbolic link":
        problems.append(f"{path}: is a symbolic link to {path.readlink()}; name that path itself, or delete the link")
    elif there not in (None, kind):
        problems.append(f"{path}: is a {there}; choose another name")
    work = working_folder(path)
    if kind_of(work) and not is_lock(work / LOCK_FILE) and kind_of(work):  # another process may just have deleted it
        problems += describe_foreign(work, ["."])
    return problems


def describe_foreign(folder: Path, foreign: list[str]) -> list[str]:
    """Return the problem, in words, of things in a folder that are not ours; none where there are none."""
    if not foreign:
        return []
    listed = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
    where = "move it, or choose another output" if listed == "." else "move them or choose another folder"
    what = "is not what magmax writes there" if listed == "." else f"holds files that magmax did not write ({listed})"
    if kind_of(folder / CONTENTS_FILE) is None and kind_of(folder / "provenance.json"):
        where += f"; if an earlier version wrote them, which made no {CONTENTS_FILE}, delete the folder"
    return [f"{folder}: {what}; {where}"]


def find_foreign(folder: Path) -> list[str]:
    """Return what is in the folder of an output that this program did not put there; an empty folder is such, too."""
    ours = _listed_files(folder)
    return [name for name, path in _walk(folder, _folders_of(ours)) if not _is_ours(name, path, ours)]


def find_foreign_work(folder: Path) -> list[str]:
    """Return what is in a working folder that this program did not put there; "." for what is no working folder."""
    if kind_of(folder) != "folder":
        return [] if kind_of(folder) is None else ["."]
    foreign: list[str] = []
    names = sorted(path.name for path in folder.iterdir())
    if not is_lock(folder / LOCK_FILE):
        return ["."]
    for name in names:
        path = folder / name
        inner = name.removesuffix(WORK_SUFFIX)
        if STAGED_FOLDERS.fullmatch(name) and kind_of(path) == "folder":
            foreign += [f"{name}/{each.name}" for each in path.iterdir() if not is_lock(each)]
        elif name in WORK_FOLDERS and kind_of(path) == "folder":
            foreign += [f"{name}/{each}" for each in find_foreign(path)]
        elif inner != name and WORK_NAMES.fullmatch(inner):
            foreign += [name if each == "." else f"{name}/{each}" for each in find_foreign_work(path)]
        elif name != LOCK_FILE and not (WORK_NAMES.fullmatch(name) and has_one_name(path)):
            foreign.append(name)
    return foreign


def is_working_name(name: str) -> bool:
    """Return whether a kill can leave a file or folder of this name in a folder of ours."""
    return name == LOCK_FILE or name.endswith(WORK_SUFFIX) or DRAFT_NAMES.fullmatch(name) is not None


def has_one_name(path: Path) -> bool:
    """Return whether there is a regular file with no other hard link: only such a file is written to."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def open_own(path: Path, flags: int = 0) -> int:
    """Open a file of ours to read and write. Raises OSError for a link, a special file, and a file with two names."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EEXIST, "is not a file that magmax made, or has another name too; move it", str(path))
    return fd


def delete_output(path: Path) -> None:
    """Delete an output, if it is there: a file, or the listed files of a folder and the folder.

    Raises MagMaxError for anything else, and for what was added to the folder, which stays there.
    """
    kind = kind_of(path)
    if kind == "file":
        path.unlink()
    if kind in (None, "file"):
        return
    if kind != "folder":
        raise MagMaxError(f"{path}: is a {kind}, which magmax did not make; move it")
    if foreign := find_foreign(path):
        raise MagMaxError(describe_foreign(path, foreign)[0])
    ours = _listed_files(path)
    last = {CONTENTS_FILE, LOCK_FILE}  # the list goes last, so that a kill leaves no file that it does not name
    found = dict(_walk(path, _folders_of(ours)))
    for name in found.keys() - last:
        found[name].unlink(missing_ok=True)
    for name in sorted(_folders_of(ours) - {"."}, key=lambda name: -name.count("/")):
        if kind_of(path / name) == "folder":
            (path / name).rmdir()  # fails, as the one below, where something was added just now, which so stays
    for name in found.keys() & last:
        found[name].unlink(missing_ok=True)
    path.rmdir()


def write_contents(folder: Path, names: list[str]) -> None:
    """List the files of a folder of ours, before they are there."""
    draft = folder / f".{CONTENTS_FILE}.{secrets.token_hex(8)}.magmax-draft"
    write_new_file(draft, "".join(f"{_quote(name)}\n" for name in sorted(names)).encode("utf-8", "surrogateescape"))
    os.replace(draft, folder / CONTENTS_FILE)


def write_new_file(path: Path, content: bytes | Path) -> None:
    """Write bytes, or a copy of a file, to a new file, and wait for the disk. Raises OSError where something is."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for piece in _pieces(content):
            while piece:
                piece = piece[os.write(fd, piece) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, content: bytes, remedy: str = "mend that and run the command again") -> None:
    """Write a small file so that a reader sees the old content or the new, never a part.

    Raises MagMaxError where that fails, or where something else than a file is; what was there is then still there.
    """
    if kind_of(path) not in (None, "file"):
        raise MagMaxError(f"{path}: is a {kind_of(path)}, which is not replaced by a file; move it")
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.magmax-draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_drafts(path)
        try:
            write_new_file(draft, content)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        reason = f"{error.strerror} ({len(content):,} bytes)"
        raise MagMaxError(f"{path}: cannot be written: {reason}; {remedy}") from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def nearest_existing_folder(path: Path) -> Path:
    """The deepest folder above `path` that exists."""
    return next(p for p in path.absolute().parents if p.is_dir())


def _is_own_weights(path: Path) -> bool:
    """Return whether a safetensors file has our provenance in its metadata, or is empty."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            return not size or (length < size and METADATA_KEY in json.loads(file.read(length))["__metadata__"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _listed_files(folder: Path) -> set[str]:
    """The names that an output's own list has, as seen from its folder; a list cannot name what is outside of that."""
    listing = folder / CONTENTS_FILE
    if kind_of(listing) != "file":
        return set()
    names = map(PurePosixPath, map(_unquote, listing.read_bytes().decode("utf-8", "surrogateescape").split("\n")))
    return {CONTENTS_FILE, *(str(name) for name in names if name.parts and not {"/", ".."} & {*name.parts})}


def _quote(name: str) -> str:
    """Return a name as a line of a list, as JSON where it has several lines itself."""
    return json.dumps(name) if "\n" in name or name.startswith('"') else name


def _unquote(line: str) -> str:
    try:
        return str(json.loads(line)) if line.startswith('"') else line
    except ValueError:
        return line


def _folders_of(names: set[str]) -> set[str]:
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}


def _walk(folder: Path, known: set[str]) -> Iterator[tuple[str, Path]]:
    """Everything in a folder but the folders of these names, which are entered; links are not followed."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name
        if name in known and kind_of(path) == "folder":
            inner_known = {k.removeprefix(f"{name}/") for k in known if k.startswith(f"{name}/")}
            yield from ((f"{name}/{inner}", each) for inner, each in _walk(path, inner_known))
        else:
            yield name, path


def _is_ours(name: str, path: Path, ours: set[str]) -> bool:
    """Return whether a file in the folder of an output is one that we wrote: listed, the lock, or a draft."""
    if kind_of(path) != "file":
        return False
    draft = DRAFT_NAMES.fullmatch(path.name)
    return name in ours or (name == LOCK_FILE and is_lock(path)) or bool(draft and draft[1] in (*ours, CONTENTS_FILE))


def is_lock(path: Path) -> bool:
    """Return whether there is a lock of ours, perhaps one that a kill left without its text."""
    try:
        small = has_one_name(path) and path.stat().st_size <= len(LOCK_TEXT)
        return small and LOCK_TEXT.startswith(path.read_bytes())
    except OSError:
        return False


def _delete_drafts(path: Path) -> None:
    """Delete the drafts of a file that kills left."""
    for other in path.parent.iterdir():
        draft = DRAFT_NAMES.fullmatch(other.name)
        if draft and draft[1] == path.name and has_one_name(other):
            other.unlink(missing_ok=True)


def _pieces(content: bytes | Path) -> Iterator[memoryview]:
    if isinstance(content, bytes):
        yield memoryview(content)
        return
    with content.open("rb") as source:
        while piece := source.read(COPY_BYTES):
            yield memoryview(piece)
