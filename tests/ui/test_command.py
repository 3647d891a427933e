"""The verb ui as a user types it, as far as it goes without a browser."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from magmax import cli


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
