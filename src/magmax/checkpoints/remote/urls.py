"""Names of files on other machines, what opens them, and patience with networks."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ...errors import MagMaxError, UnfinishedError, escape_controls, missing_extra
from ..base import HUB_PREFIX

MAX_TRIES = 5
RETRY_WAIT = 0.2
"""Seconds before the second try; twice as many before each later one."""
PATIENCE = 5.0
"""Seconds that a try may take before it is said that it failed."""
logger = logging.getLogger(__name__)
SCHEME_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
HTTP_SCHEMES = ("http://", "https://")
STORE_SCHEMES = frozenset(
    {"abfs", "abfss", "adl", "az", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "lakefs", "memory", "oci", "oss"}
    | {"s3", "s3a", "sftp", "smb", "ssh", "tos", "webdav", "webhdfs"}
)
"""Schemes that only fetch bytes. fsspec has others that interpret what they fetch, such as templates of `reference`."""

Result = TypeVar("Result")


class RemoteFileNotFoundError(MagMaxError):
    """There is no such file."""


def is_url(text: str) -> bool:
    """Return whether a text names something on another machine, models of the hub apart."""
    return SCHEME_PATTERN.match(text) is not None and not text.startswith(HUB_PREFIX)


def display_url(url: str) -> str:
    """A URL as messages show it: a user's name and password left out, and a query told by its digest alone."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = f"?{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}" if parts.query else ""
    return f"{parts.scheme}://{host}{parts.path}{query}"


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises MagMaxError where a package for it is missing."""
    try:
        core: Any = import_module("fsspec.core")
    except ModuleNotFoundError as error:
        raise missing_extra(f"{display_url(url)}: is on another machine; to read it needs fsspec", "remote") from error
    scheme = urlsplit(url).scheme.lower()
    if scheme not in STORE_SCHEMES or "::" in url:
        raise MagMaxError(
            f"{display_url(url)}: is no URL of a store that magmax reads; the schemes are "
            f"{', '.join(sorted(STORE_SCHEMES))}, one in a URL; download the file"
        )
    try:
        filesystem, path = core.url_to_fs(url)
    except ImportError as error:
        raise missing_extra(f"{display_url(url)}: {error}; opening it needs another package", "remote") from error
    except ValueError as error:
        raise MagMaxError(f"{display_url(url)}: cannot be opened: {error}") from error
    return filesystem, path


def with_retries(label: str, work: Callable[[], Result], tries: int = MAX_TRIES) -> Result:
    """The result of `work`, tried again where it fails by what may pass: broken connections, busy servers.

    Raises:
        NotThereError, MagMaxError: nothing there; no access; whatever `work` itself refuses.
        UnfinishedError: it failed in every try.
    """
    for number in range(tries):
        began = time.monotonic()
        try:
            return work()
        except UnfinishedError:
            raise
        except MagMaxError:
            raise
        except FileNotFoundError as error:
            raise RemoteFileNotFoundError(f"{label}: there is no such file") from error
        except PermissionError as error:
            raise MagMaxError(f"{label}: access is refused ({error}); log in, or mind the name") from error
        except Exception as error:  # every library of a network has errors of its own
            message = (str(error).strip() or type(error).__name__)[:300]
            if number == tries - 1:
                raise UnfinishedError(
                    f"{label}: failed {tries} times ({message}); run the same command again"
                ) from error
            if time.monotonic() - began > PATIENCE:
                logger.warning(escape_controls(f"{label}: {message}; try {number + 2} of {tries}"))
            time.sleep(RETRY_WAIT * 2**number)
    raise AssertionError("the last try returns or raises")


def cache_folder() -> str:
    """Return where what is on its way is kept: $MAGMAX_CACHE, or `.cache` in the working directory."""
    return os.environ.get("MAGMAX_CACHE") or ".cache"
