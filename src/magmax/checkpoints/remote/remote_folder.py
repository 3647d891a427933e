"""Folders of a model on another machine: its index, its only file, and the small files beside the weights."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ...errors import MagMaxError
from ..safetensors import is_string_map
from .remote_file import RemoteFile, map_parallel
from .urls import HTTP_SCHEMES, RemoteFileNotFoundError, display_url, open_filesystem, with_retries

INDEX_SUFFIX = ".safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model")
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "modules.json",
)  # fmt: skip
"""What is asked for by name where a server does not list its folders."""
MAX_MODEL_FILE_BYTES = 200_000_000


class RemoteFolder:
    """A folder of safetensors, by its URL or by that of its index.

    The web does not list folders: there the names that transformers and diffusers give to files are tried.

    Attributes:
        url: the folder, or the index that was named, without anything secret.
        index_url: the index, if there is one.
    """

    def __init__(self, url: str) -> None:
        self.url, self.index_url = display_url(url), ""
        parts = urlsplit(url)
        self._url_parts = parts._replace(path=parts.path.rstrip("/") + "/")
        self._index_name = self._index_file = self._local_copies = None
        if parts.path.endswith(".index.json"):
            self._index_name = PurePosixPath(parts.path).name
            self._url_parts = parts._replace(path=parts.path.rpartition("/")[0] + "/")
        self._file_names = None if url.lower().startswith(HTTP_SCHEMES) else self._list_files()

    def url_of(self, name: str) -> str:
        """The URL of a file in the folder."""
        return urlunsplit(self._url_parts._replace(path=self._url_parts.path + name))

    def read_weight_map(self) -> dict[str, str] | None:
        """Tensor name -> file name, of the one index of safetensors; None where there is none."""
        names = self._file_names if self._file_names is not None else [stem + INDEX_SUFFIX for stem in STEMS]
        indexes = (
            [self._index_name]
            if self._index_name
            else [name for name in names if name.endswith(INDEX_SUFFIX) and "/" not in name]
        )
        if self._file_names is not None and len(indexes) > 1:
            raise MagMaxError(f"{self.url}: has several indexes ({', '.join(indexes)}); name one of them")
        for name in indexes:
            try:
                self._index_file = RemoteFile(self.url_of(name))
            except RemoteFileNotFoundError:
                if self._index_name:
                    raise
                continue
            self.index_url = self._index_file.url
            return parse_weight_map(
                self._index_file.read_bytes(0, self._index_file.size).decode(errors="replace"), self.index_url
            )
        return None

    def find_single_file(self) -> str:
        """The URL of the one safetensors file. Raises MagMaxError for none, several, or another kind of model."""
        if self._file_names is None:
            for stem in STEMS:
                try:
                    return RemoteFile(self.url_of(f"{stem}.safetensors"))._full_url  # pyright: ignore[reportPrivateUsage]
                except RemoteFileNotFoundError:
                    continue
            raise MagMaxError(
                f"{self.url}: has neither {STEMS[0]}{INDEX_SUFFIX} nor {STEMS[0]}.safetensors; name the .safetensors "
                f"file"
            )
        weight_files = [name for name in self._file_names if name.endswith(".safetensors") and "/" not in name]
        if "adapter_config.json" in self._file_names:
            raise MagMaxError(f"{self.url}: adapters are not read from another machine; download the folder first")
        if len(weight_files) != 1:
            what = f"{len(weight_files)} safetensors files and no index" if weight_files else "no safetensors"
            other = [name for name in self._file_names if name.endswith((".bin", ".pt", ".pth", ".distcp"))]
            remedy = (
                "it is not of safetensors: download it first" if other and not weight_files else "name the file itself"
            )
            raise MagMaxError(f"{self.url}: the folder holds {what}; {remedy}")
        return self.url_of(weight_files[0])

    def fingerprints(self, refresh: bool) -> dict[str, list[object]]:
        """Return what tells that the index is unchanged."""
        if self._index_file is None:
            return {}
        return {self.index_url: self._index_file.read_stamp() if refresh else self._index_file.stamp}

    def download_model_files(self, suffixes: Collection[str]) -> Path:
        """A folder on this machine with copies of the small files, which is deleted with this object."""
        if self._local_copies is None:
            copies = tempfile.TemporaryDirectory(prefix="magmax-")
            weakref.finalize(self, copies.cleanup)
            names = MODEL_FILES if self._file_names is None else self._file_names
            wanted = [n for n in names if PurePosixPath(n).suffix in suffixes and not n.endswith(".index.json")]
            map_parallel(lambda name: self._download_file(name, Path(copies.name)), wanted)
            self._local_copies = Path(copies.name)
        return self._local_copies

    def _download_file(self, name: str, folder: Path) -> None:
        try:
            file = RemoteFile(self.url_of(name))
        except RemoteFileNotFoundError:
            return
        if file.size <= MAX_MODEL_FILE_BYTES:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read_bytes(0, file.size))

    def _list_files(self) -> list[str]:
        """The names of the files in the folder and in the folders in it."""
        files, path = open_filesystem(urlunsplit(self._url_parts))
        top = path.rstrip("/") + "/"

        def names() -> list[str]:
            files.invalidate_cache()
            paths: list[str] = [name[len(top) :] for name in files.find(top, maxdepth=2) if name.startswith(top)]
            return [name for name in paths if ".." not in name.split("/")]

        paths = with_retries(self.url, names)
        if not paths:
            raise RemoteFileNotFoundError(f"{self.url}: there is no such file or folder")
        return paths


def parse_weight_map(text: str, index: str) -> dict[str, str]:
    """Tensor name -> file name, from the text of an index. Raises MagMaxError where it is none."""
    try:
        where: Any = json.loads(text)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MagMaxError(f"{index}: is not an index with a weight_map ({error})") from error
    if not is_string_map(where) or not where:
        raise MagMaxError(f"{index}: its weight_map is not a map of tensor names to file names")
    return where
