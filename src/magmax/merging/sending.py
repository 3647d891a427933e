"""Jobs whose output belongs on another machine: made here, uploaded, and taken up again where either stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoints.remote.upload import Upload
from ..checkpoints.writer import Target, remove, replace_file
from ..errors import MagMaxError, UnfinishedError
from .result import Outcome


def sent(
    target: Target,
    identity: Mapping[str, Any],
    make: Callable[[], Outcome],
    note: Callable[[str], None],
) -> Outcome:
    """The outcome of `make`, uploaded; what an interrupted upload left here is uploaded without making it again.

    That is, while `identity` is unchanged.
    """
    upload = Upload(target.url)
    upload.begin(target.folder)
    ready = target.path.with_name(target.path.name + ".ready")
    outcome = _left(ready, target.path, json.loads(json.dumps(identity)))
    if outcome is None:
        try:
            outcome = make()
        except MagMaxError as error:
            if not isinstance(error, UnfinishedError):
                upload.give_up(target.folder)
            raise
        told = {**asdict(outcome), "path": ""}
        replace_file(ready, json.dumps({"identity": identity, "outcome": told}).encode())
    else:
        note("resuming: the output is made already and is uploaded now")
    upload.send(target.path)
    ready.unlink()
    remove(target.path)
    target.path.parent.rmdir()
    return replace(outcome, path=upload.name)


def _left(ready: Path, made: Path, identity: Any) -> Outcome | None:
    try:
        told = json.loads(ready.read_text())
    except (OSError, ValueError):
        return None
    return Outcome(**told["outcome"]) if told["identity"] == identity and made.exists() else None
