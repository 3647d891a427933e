"""The site's pages: every page has its place, the code in them runs, and the site builds without a warning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from tests.documents import ROOT, code_blocks, commands, run_command, titled_blocks

from magmax.rules import all_components

DOCS = ROOT / "docs"


def test_every_page_stands_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f" {page.name}\n" not in text] == []


def test_the_rule_of_the_page_merges(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "adding-a-rule.md"
    for name, text in titled_blocks(page).items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    definition, use = code_blocks(page, "python")
    assert definition == titled_blocks(page)["median_rule.py"]
    exec(compile(use, str(page), "exec"), {})


def test_the_site_builds_and_has_every_rule(tmp_path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "rules" / "index.html").read_text()
    assert [name for name in all_components() if f'id="{name}"' not in page] == []


@pytest.mark.skipif("MAGMAX_TUTORIAL" not in os.environ, reason="trains a real encoder: make tutorial runs it")
@pytest.mark.timeout(1200)
def test_the_tutorial_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "tutorial.md"
    for name, text in titled_blocks(page).items():
        assert yaml.safe_load(text)
        (tmp_path / name).write_text(text)
    cache = os.environ.get("MAGMAX_CACHE", str(ROOT / ".cache"))
    monkeypatch.chdir(tmp_path)
    for command in commands(page, except_prefixes=("pip install",)):
        run_command(command, MAGMAX_CACHE=cache)
