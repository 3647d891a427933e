"""Folders of a model on another machine: its index, its only file, and the small files beside the weights."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from ...errors import MagMaxError
from ..base import MODEL_CONFIG_KEYS, parse_json_object
from ..safetensors import SafetensorsFile, parse_weight_map
from .remote_file import RemoteFile, map_parallel
from .urls import HTTP_SCHEMES, RemoteFileNotFoundError, display_url, open_filesystem, with_retries

MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "modules.json", "bpe.codes",
    "video_preprocessor_config.json", "sentencepiece.bpe.model", "open_clip_config.json", "params.json", "LICENSE",
)  # fmt: skip
"""What is asked for by name where a server does not list its folders."""
MAX_MODEL_FILE_BYTES = 200_000_000


class RemoteModelFile(SafetensorsFile):
    """A file on another machine, with the small files beside it where these are a model's."""

    def __init__(self, url: str, label: str, is_small_file: Callable[[str], bool]) -> None:
        super().__init__(RemoteFile(url), label)
        self._full_url, self._is_small_file = url, is_small_file
        self._small_files: Path | None = None
        self._folder: RemoteFolder | None = None

    def small_files_folder(self) -> Path | None:
        if self._folder is None:
            parts = urlsplit(self._full_url)
            self._folder = RemoteFolder(urlunsplit(parts._replace(path=parts.path.rpartition("/")[0])))
            config = parse_json_object(self._folder.read_small_file("config.json"))
            if any(key in config for key in MODEL_CONFIG_KEYS):
                self._small_files = self._folder.download_model_files(self._is_small_file)
        return self._small_files

    def read_small_file(self, name: str) -> bytes | None:
        """Read nothing: most files on other machines stand alone, and each look at a folder costs a request."""
        return None


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
        self.index_name = ""
        self._index_file = self._local_copies = None
        if parts.path.endswith(".index.json"):
            self.index_name = PurePosixPath(parts.path).name
            self._url_parts = parts._replace(path=parts.path.rpartition("/")[0] + "/")
        self._file_names = None if url.lower().startswith(HTTP_SCHEMES) else self._list_files()

    def url_of(self, name: str) -> str:
        """The URL of a file in the folder."""
        return urlunsplit(self._url_parts._replace(path=self._url_parts.path + name))

    def find_names(self, known: Sequence[str]) -> list[str]:
        """The files of the folder; where it cannot be listed, the first of the known names of weights that is there.

        Raises MagMaxError for another kind of model.
        """
        if self._file_names is None:
            for name in known:
                if self._open_if_there(name) is not None:
                    return [name]
            raise MagMaxError(
                f"{self.url}: has neither {known[1]} nor {known[0]}, nor another name of weights that libraries know; "
                "name the .safetensors file"
            )
        names = [name for name in self._file_names if "/" not in name]
        if "adapter_config.json" in names:
            raise MagMaxError(f"{self.url}: adapters are not read from another machine; download the folder first")
        return names

    def has_weights_in(self, folder: str) -> bool:
        """Return whether a folder in this one holds weights; where it cannot be listed, under their usual names."""
        if self._file_names is None:
            names = [f"{folder}/{name}" for name in ("model.safetensors", "pytorch_model.bin")]
            return any(self._open_if_there(name) is not None for name in names)
        return any(n.startswith(f"{folder}/") and n.endswith((".safetensors", ".bin")) for n in self._file_names)

    def read_weight_map(self, name: str) -> dict[str, str]:
        """Tensor name -> file name, as an index says."""
        self._index_file = RemoteFile(self.url_of(name))
        self.index_url = self._index_file.url
        text = self._index_file.read_bytes(0, self._index_file.size).decode(errors="replace")
        return parse_weight_map(text, self.index_url)

    def read_small_file(self, name: str) -> bytes | None:
        """Read a small file of the folder, if it is there."""
        if self._file_names is not None and name not in self._file_names:
            return None
        file = self._open_if_there(name)
        return file.read_bytes(0, file.size) if file is not None and file.size <= MAX_MODEL_FILE_BYTES else None

    def _open_if_there(self, name: str) -> RemoteFile | None:
        try:
            return RemoteFile(self.url_of(name))
        except RemoteFileNotFoundError:
            return None

    def fingerprints(self, refresh: bool) -> dict[str, list[object]]:
        """Return what tells that the index is unchanged."""
        if self._index_file is None:
            return {}
        return {self.index_url: self._index_file.read_stamp() if refresh else self._index_file.stamp}

    def download_model_files(self, is_wanted: Callable[[str], bool]) -> Path:
        """A folder on this machine with copies of the small files, which is deleted with this object."""
        if self._local_copies is None:
            copies = tempfile.TemporaryDirectory(prefix="magmax-")
            weakref.finalize(self, copies.cleanup)
            names = MODEL_FILES if self._file_names is None else self._file_names
            map_parallel(lambda name: self._download_file(name, Path(copies.name)), [n for n in names if is_wanted(n)])
            self._local_copies = Path(copies.name)
        return self._local_copies

    def _download_file(self, name: str, folder: Path) -> None:
        content = self.read_small_file(name)
        if content is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

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
