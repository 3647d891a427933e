"""The verb ui as a user types it, as far as it goes without a browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.continual import toys

from magmax import cli
from magmax.continual.experiment import Experiment
from magmax.continual.training.trainer import ContinualTraining


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that must fail says."""
    monkeypatch.setattr("sys.argv", ["magmax", "ui", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    for name in ("magmax.ui.server", "magmax.ui.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "pip install '.[ui]'" in refused(monkeypatch, capsys, str(tmp_path))


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("nicegui")
    assert "neither the folder of a training" in refused(monkeypatch, capsys, str(tmp_path), "--port", "0")
    assert "--examples" in refused(monkeypatch, capsys, str(tmp_path), "--examples", "0")
    assert "--port is a whole number" in refused(monkeypatch, capsys, str(tmp_path), "--port", "70000")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} is in use" in refused(monkeypatch, capsys, str(tmp_path), "--port", port)


def test_sigterm_removes_the_folder_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("nicegui")
    ContinualTraining(Experiment(**toys.RECIPE, validation=5), tmp_path / "run").run()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["ui", str(tmp_path / "run"), "--port", "0", "--no-browser"]
    environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "magmax.cli", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as page:
        assert page.stdout is not None
        assert page.stdout.readline().startswith("http://127.0.0.1:")
        assert list(scratch.glob("magmax-ui-*"))
        page.terminate()
        try:
            page.communicate(timeout=60)
        finally:
            page.kill()  # a page that does not end would hold up every other test
    assert not list(scratch.glob("magmax-ui-*"))
    assert page.returncode == 128 + signal.SIGTERM
