"""Models of the Hugging Face hub by their ids: told from paths, downloaded once, found again in the hub's own cache."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ...errors import MagMaxError, missing_extra
from ..base import HUB_PREFIX
from ..folder import (
    DEFAULT_ADAPTER,
    INDEX_NAME,
    PICKLE_SUFFIXES,
    choose_weights,
    find_adapter,
    find_modules,
    is_small_file,
    is_weight_file,
)
from ..safetensors import read_weight_map

NAME_PATTERN = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
PATH_SUFFIXES = (".safetensors", ".json", ".yaml", ".yml", ".ckpt", ".pkl", *PICKLE_SUFFIXES)
"""Endings by which a text is taken for a path even where nothing is there."""
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")


class HubId(NamedTuple):
    """A model of the hub; `revision` is a branch, tag or commit, `path_in_repo` a folder or file of it."""

    repo: str
    revision: str = ""
    path_in_repo: str = ""

    def with_revision(self, revision: str) -> HubId:
        return self._replace(revision=revision)

    def with_path(self, path: str) -> HubId:
        return self._replace(path_in_repo=path)

    def __str__(self) -> str:
        revision = self.revision.replace("/", "%2F")
        return self.repo + (f"@{revision}" if revision else "") + (f"/{self.path_in_repo}" if self.path_in_repo else "")

    @property
    def address(self) -> str:
        """The id as it cannot be taken for a path."""
        return HUB_PREFIX + str(self)


class HubFiles(NamedTuple):
    """A model's files on this machine, what messages call it, and which it is, to the commit, if it is of the hub."""

    path: Path
    label: str
    origin: str = ""


def locate_model(text: str) -> HubFiles:
    """Return where a path or a model of the hub is on this machine; see `find`."""
    wanted = parse_hub_id(text)
    return fetch_model(wanted) if wanted else HubFiles(Path(text), text)


def looks_like_hub_id(text: str) -> bool:
    """Return whether a text could be meant as the id of a model on the hub."""
    return re.fullmatch(rf"{NAME_PATTERN}/{NAME_PATTERN}(@\S+)?", text) is not None and not text.endswith(PATH_SUFFIXES)


def parse_hub_id(text: str, folder: str = "") -> HubId | None:
    """Return what a text names on the hub, if it is no path as seen from `folder`.

    `hf://NAME_PATTERN/MODEL[@REVISION][/INSIDE]` always does, where no file has that very name.
    `NAME_PATTERN/MODEL[@REVISION]` does
    where neither that nor a folder NAME is there, and it does not end as files of weights do. A `/` within a revision
    is written `%2F`.

    Raises:
        MagMaxError: hf:// and then something else.
    """
    if _exists(folder, text):
        return None
    name = text.removeprefix(HUB_PREFIX)
    match = re.fullmatch(rf"({NAME_PATTERN}/{NAME_PATTERN})(?:@([^/@\s]+))?(?:/([^@\s]+?))?/?", name)
    if text.startswith(HUB_PREFIX):
        match = match or re.fullmatch(rf"({NAME_PATTERN})(?:@([^/@\s]+))?()", name)
        if not match or ".." in name.split("/"):
            raise MagMaxError(f"{text}: is no id of the hub; write {HUB_PREFIX}NAME/MODEL, with @REVISION if need be")
    elif not match or match[3] or text.endswith(("/", *PATH_SUFFIXES)) or _exists(folder, text.partition("/")[0]):
        return None
    return HubId(match[1], (match[2] or "").replace("%2F", "/"), match[3] or "")


def _exists(folder: str, name: str) -> bool:
    return os.path.lexists(os.path.join(folder, name))


def fetch_model(hub_id: HubId) -> HubFiles:
    """Return where a model's files are on this machine, downloaded if they are not there yet.

    The hub is asked once in a process what a branch or tag stands for; a commit that is in the cache whole is taken
    from there unasked, and so is any model where the hub cannot be reached or HF_HUB_OFFLINE is set. Of the files only
    what a merge needs is downloaded: weights (safetensors, if there are any), configuration, tokenizer.

    Raises:
        MagMaxError: no huggingface-hub, no such model or revision, no access, no network and no copy in the cache.
    """
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError as error:
        need = f"{hub_id}: there is no such file or folder; a model of the Hugging Face hub needs {error.name}"
        raise missing_extra(need, "hub") from error
    return _fetch_or_explain(hub_id, str(constants.HF_HUB_CACHE), constants.ENDPOINT)


@lru_cache(maxsize=256)
def _fetch_or_explain(hub_id: HubId, cache: str, endpoint: str) -> HubFiles:
    hub: Any = import_module("huggingface_hub")
    if COMMIT_PATTERN.fullmatch(hub_id.revision) and (files := _find_in_cache(hub, hub_id)):
        return files
    try:
        return _download(hub, hub_id)
    except MagMaxError:
        raise
    except Exception as error:  # the library's own errors, those of its HTTP client, and the system's
        files = None if isinstance(error, hub.errors.RevisionNotFoundError) else _find_in_cache(hub, hub_id)
        if files is None:
            raise MagMaxError(_explain_error(hub, hub_id, cache, endpoint, error)) from error
        return files


def _download(hub: Any, hub_id: HubId) -> HubFiles:
    revision = hub_id.revision or None
    about: Any = hub.HfApi().model_info(hub_id.repo, revision=revision)

    def download(name: str) -> Path:
        return Path(hub.hf_hub_download(hub_id.repo, name, revision=about.sha))

    files: list[Any] = about.siblings or []
    names = needed_files([file.rfilename for file in files], hub_id, download)
    patterns = [glob.escape(name) for name in names]
    return _model_files(hub.snapshot_download(hub_id.repo, revision=revision, allow_patterns=patterns), hub_id)


def _find_in_cache(hub: Any, hub_id: HubId) -> HubFiles | None:
    """The model in the cache, if all that a merge needs is there."""
    try:
        snapshot = hub.snapshot_download(
            hub_id.repo, revision=hub_id.revision or None, allow_patterns=[], local_files_only=True
        )
        there = [path for path in Path(snapshot).rglob("*") if path.is_file()]
        names = [path.relative_to(snapshot).as_posix() for path in there]
        whole = set(needed_files(names, hub_id, lambda name: Path(snapshot, name))) <= set(names)
    except (OSError, MagMaxError):
        return None
    return _model_files(snapshot, hub_id) if whole else None


def _model_files(snapshot: str, hub_id: HubId) -> HubFiles:
    commit = Path(snapshot).name
    return HubFiles(
        Path(snapshot, hub_id.path_in_repo),
        str(hub_id.with_revision(commit[:12])),
        hub_id.with_revision(commit).address,
    )


def needed_files(names: Iterable[str], hub_id: HubId, download: Callable[[str], Path]) -> list[str]:
    """Of the files of a model, those that a merge needs.

    Args:
        names: all its files.
        download: downloads a small file and returns its path.

    Raises:
        MagMaxError: none that hold weights, several of which none comes first, or shards without an index.
    """
    names = list(names)
    inside = hub_id.path_in_repo
    place = PurePosixPath(inside).parent if inside in names else PurePosixPath(inside)
    small = [n for n in names if is_small_file(n) and place in [*PurePosixPath(n).parents][:2]]
    if inside in names and not INDEX_NAME.fullmatch(PurePosixPath(inside).name):
        return list(dict.fromkeys([inside, *small]))

    def files_in(folder: PurePosixPath) -> list[str]:
        return [PurePosixPath(name).name for name in names if PurePosixPath(name).parent == folder]

    def weights_in(folder: PurePosixPath, chosen: str) -> list[str]:
        """The chosen file, or the chosen index and all its shards."""
        shards = read_weight_map(download(str(folder / chosen))).values() if INDEX_NAME.fullmatch(chosen) else ()
        return [str(folder / name) for name in (chosen, *sorted(set(shards)))]

    def read(name: str) -> bytes | None:
        return download(str(place / name)).read_bytes() if str(place / name) in names else None

    def choose(folder: PurePosixPath) -> str:
        address = hub_id.with_path(str(folder / "x")).address[:-1]
        return choose_weights(files_in(folder), read, f"{hub_id}:", address)[0]

    if inside in names:
        return [*weights_in(place, PurePosixPath(inside).name), *small]
    here = files_in(place)
    for folder in (place,) if _has_weights(here) else (place / DEFAULT_ADAPTER, place):
        value_head = [name for name in files_in(folder) if name == "pytorch_model.bin"]  # or a whole model: seen later
        if adapter := find_adapter([n for n in files_in(folder) if n not in value_head], f"{hub_id}:"):
            return [*(str(folder / name) for name in (adapter, *value_head)), *small]
    modules = [folder for name in find_modules(read("modules.json")) if _has_weights(files_in(folder := place / name))]
    weights = [name for folder in modules for name in weights_in(folder, choose(folder))]
    if not modules or _has_weights(here):
        weights[:0] = weights_in(place, choose(place))
    return [*weights, *small]


def _has_weights(names: Iterable[str]) -> bool:
    return any(map(is_weight_file, names))


def _explain_error(hub: Any, hub_id: HubId, cache: str, endpoint: str, error: Exception) -> str:
    """Return what went wrong, and what would help."""
    errors = hub.errors
    login = "log in (hf auth login, or HF_TOKEN)"
    message = (str(error).splitlines() or [""])[0][:200]
    fill = f"hf download {hub_id.repo}" + (f" --revision {hub_id.revision}" if hub_id.revision else "")
    if isinstance(error, errors.GatedRepoError):
        return f"{hub_id}: is gated; accept its terms at {endpoint}/{hub_id.repo} and {login}; it is not in {cache} yet"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub_id}: no file or folder is there, and no such model is at {endpoint} or in the cache {cache}; "
            f"mend the name or, for a private model, {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id}: {hub_id.repo} has no revision {hub_id.revision!r}; give a branch, a tag or a commit of it"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{hub_id}: is not, or not whole, in the cache {cache}, and HF_HUB_OFFLINE forbids to ask the hub; "
            f"unset it, or fill the cache where there is a network: {fill}"
        )
    return (
        f"{hub_id}: cannot be had from {endpoint} ({type(error).__name__}: {message}), and is not, or not whole, in "
        f"the "
        f"cache {cache}; run it again with a network (what is downloaded is kept), or fill the cache: {fill}"
    )
