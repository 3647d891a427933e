"""A headless Chromium, and axe-core, which looks for what people with disabilities would stumble over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from magmax.continual.data.downloads import PackageFile, PackageSource, fetch, is_fetched

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome")
AXE_SOURCE = PackageSource(
    "axe-core",
    "4.14.1",
    708_405,
    {
        "axe.min.js": PackageFile(
            "package/axe.min.js", "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
        )
    },
    kind="npm",
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    found = next(filter(None, map(shutil.which, BROWSER_NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as running:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = running.chromium.launch(executable_path=found, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core; CI downloads it."""
    if not is_fetched(AXE_SOURCE) and not os.environ.get("CI"):
        pytest.skip("axe-core is not in the cache: run the tests with CI=1, which fetches it from npm")
    return (Path(fetch(AXE_SOURCE)) / "axe.min.js").read_text("utf-8")
