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

from ...errors import MagMaxError
from ..base import PREFIX
from ..folder import COMPANIONS, PICKLES, weight_map

NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
PATH_SUFFIXES = (".safetensors", ".json", ".yaml", ".yml", ".ckpt", ".pkl", *PICKLES)
"""Endings by which a text is taken for a path even where nothing is there."""
COMMIT = re.compile(r"[0-9a-f]{40}")
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")


class HubId(NamedTuple):
    """A model of the hub; `revision` is a branch, tag or commit, `inside` a folder or file of it."""

    repo: str
    revision: str = ""
    inside: str = ""

    def at(self, revision: str) -> HubId:
        return self._replace(revision=revision)

    def __str__(self) -> str:
        revision = self.revision.replace("/", "%2F")
        return self.repo + (f"@{revision}" if revision else "") + (f"/{self.inside}" if self.inside else "")

    @property
    def address(self) -> str:
        """The id as it cannot be taken for a path."""
        return PREFIX + str(self)


class Found(NamedTuple):
    """A model's files on this machine, what messages call it, and which it is, to the commit, if it is of the hub."""

    path: Path
    label: str
    origin: str = ""


def locate(text: str) -> Found:
    """Where a path or a model of the hub is on this machine; see `find`."""
    wanted = hub_id(text)
    return find(wanted) if wanted else Found(Path(text), text)


def might_be_id(text: str) -> bool:
    """Whether a text could be meant as the id of a model on the hub."""
    return re.fullmatch(rf"{NAME}/{NAME}(@\S+)?", text) is not None and not text.endswith(PATH_SUFFIXES)


def hub_id(text: str, folder: str = "") -> HubId | None:
    """What a text names on the hub, if it is no path as seen from `folder`.

    `hf://NAME/MODEL[@REVISION][/INSIDE]` always does, where no file has that very name. `NAME/MODEL[@REVISION]` does
    where neither that nor a folder NAME is there, and it does not end as files of weights do. A `/` within a revision
    is written `%2F`.

    Raises:
        MagMaxError: hf:// and then something else.
    """
    if _there(folder, text):
        return None
    given = text.removeprefix(PREFIX)
    match = re.fullmatch(rf"({NAME}/{NAME})(?:@([^/@\s]+))?(?:/([^@\s]+?))?/?", given)
    if text.startswith(PREFIX):
        match = match or re.fullmatch(rf"({NAME})(?:@([^/@\s]+))?()", given)
        if not match or ".." in given.split("/"):
            raise MagMaxError(f"{text}: is no id of the hub; write {PREFIX}NAME/MODEL, with @REVISION if need be")
    elif not match or match[3] or text.endswith(("/", *PATH_SUFFIXES)) or _there(folder, text.partition("/")[0]):
        return None
    return HubId(match[1], (match[2] or "").replace("%2F", "/"), match[3] or "")


def _there(folder: str, name: str) -> bool:
    return os.path.lexists(os.path.join(folder, name))


def find(wanted: HubId) -> Found:
    """Where a model's files are on this machine, downloaded if they are not there yet.

    The hub is asked once in a process what a branch or tag stands for; a commit that is in the cache whole is taken
    from there unasked, and so is any model where the hub cannot be reached or HF_HUB_OFFLINE is set. Of the files only
    what a merge needs is downloaded: weights (safetensors, if there are any), configuration, tokenizer.

    Raises:
        MagMaxError: no huggingface-hub, no such model or revision, no access, no network and no copy in the cache.
    """
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError as error:
        raise MagMaxError(
            f"{wanted}: there is no such file or folder; if it is a model of the Hugging Face hub: "
            "pip install 'magmax[hub]'"
        ) from error
    return _find(wanted, str(constants.HF_HUB_CACHE), constants.ENDPOINT)


@lru_cache(maxsize=256)
def _find(wanted: HubId, cache: str, endpoint: str) -> Found:
    hub: Any = import_module("huggingface_hub")
    if COMMIT.fullmatch(wanted.revision) and (found := _cached(hub, wanted)):
        return found
    try:
        return _downloaded(hub, wanted)
    except MagMaxError:
        raise
    except Exception as error:  # the library's own errors, those of its HTTP client, and the system's
        found = None if isinstance(error, hub.errors.RevisionNotFoundError) else _cached(hub, wanted)
        if found is None:
            raise MagMaxError(_explained(hub, wanted, cache, endpoint, error)) from error
        return found


def _downloaded(hub: Any, wanted: HubId) -> Found:
    revision = wanted.revision or None
    about: Any = hub.HfApi().model_info(wanted.repo, revision=revision)

    def index(name: str) -> Path:
        return Path(hub.hf_hub_download(wanted.repo, name, revision=about.sha))

    files: list[Any] = about.siblings or []
    names = needed([file.rfilename for file in files], wanted, index)
    patterns = [glob.escape(name) for name in names]
    return _found(hub.snapshot_download(wanted.repo, revision=revision, allow_patterns=patterns), wanted)


def _cached(hub: Any, wanted: HubId) -> Found | None:
    """The model in the cache, if all that a merge needs is there."""
    try:
        snapshot = hub.snapshot_download(
            wanted.repo, revision=wanted.revision or None, allow_patterns=[], local_files_only=True
        )
        there = [path for path in Path(snapshot).rglob("*") if path.is_file()]
        names = [path.relative_to(snapshot).as_posix() for path in there]
        whole = set(needed(names, wanted, lambda name: Path(snapshot, name))) <= set(names)
    except (OSError, MagMaxError):
        return None
    return _found(snapshot, wanted) if whole else None


def _found(snapshot: str, wanted: HubId) -> Found:
    commit = Path(snapshot).name
    return Found(Path(snapshot, wanted.inside), str(wanted.at(commit[:12])), wanted.at(commit).address)


def needed(names: Iterable[str], wanted: HubId, index: Callable[[str], Path]) -> list[str]:
    """Of the files of a model, those that a merge needs.

    Args:
        names: all its files.
        index: gives an index, downloaded.

    Raises:
        MagMaxError: none that hold weights, or several and no index.
    """
    names = list(names)
    if wanted.inside in names:
        return [wanted.inside]
    place = PurePosixPath(wanted.inside)
    here = [name for name in names if PurePosixPath(name).parent == place]
    small = [
        name
        for name in names
        if PurePosixPath(name).suffix in COMPANIONS
        and not name.endswith(".index.json")
        and place in [*PurePosixPath(name).parents][:2]
    ]
    for kinds in ((".safetensors",), (".bin",), (".pt", ".pth")):
        indexes = [name for name in here if name.endswith(tuple(f"{kind}.index.json" for kind in kinds))]
        weights = [n for n in here if n.endswith(kinds) and PurePosixPath(n).name != "training_args.bin"]
        if len(indexes) == 1:
            shards = sorted({str(place / name) for name in weight_map(index(indexes[0])).values()})
            return [*indexes, *shards, *small]
        if len(weights) == 1 and not SHARD.fullmatch(weights[0]):
            return [*weights, *small]
        if weights:
            told = ", ".join(weights[:5]) + ", ..." * (len(weights) > 5)
            raise MagMaxError(
                f"{wanted}: holds {len(weights)} weight files and no index ({told}); "
                f"name one: {wanted._replace(inside=weights[0]).address}"
            )
    raise MagMaxError(
        f"{wanted}: holds no weights (.safetensors, .bin or .pt) there; it has {', '.join(names[:10]) or 'no files'}"
    )


def _explained(hub: Any, wanted: HubId, cache: str, endpoint: str, error: Exception) -> str:
    """What went wrong, and what would help."""
    errors = hub.errors
    login = "log in (hf auth login, or HF_TOKEN)"
    told = (str(error).splitlines() or [""])[0][:200]
    fill = f"hf download {wanted.repo}" + (f" --revision {wanted.revision}" if wanted.revision else "")
    if isinstance(error, errors.GatedRepoError):
        return f"{wanted}: is gated; accept its terms at {endpoint}/{wanted.repo} and {login}; it is not in {cache} yet"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{wanted}: no file or folder is there, and no such model is at {endpoint} or in the cache {cache}; "
            f"mend the name or, for a private model, {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{wanted}: {wanted.repo} has no revision {wanted.revision!r}; give a branch, a tag or a commit of it"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{wanted}: is not, or not whole, in the cache {cache}, and HF_HUB_OFFLINE forbids to ask the hub; "
            f"unset it, or fill the cache where there is a network: {fill}"
        )
    return (
        f"{wanted}: cannot be had from {endpoint} ({type(error).__name__}: {told}), and is not, or not whole, in the "
        f"cache {cache}; run it again with a network (what is downloaded is kept), or fill the cache: {fill}"
    )
