"""What a running merge remembers of itself: the file `state.json`, and nothing of the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from ...checkpoints.base import read_small
from ...checkpoints.output_paths import replace_file
from ...errors import MagMaxError
from ...legacy import modern_rule
from ...rules import Rule, StreamingRule, rule_from
from ..matching import Mismatch
from ..normalization_statistics import BatchNorm

MANIFEST_FORMAT = 1
PARTIAL_FORMAT = 2
"""The format of states that may hold tensors in part, which older versions cannot read."""


@dataclass(frozen=True)
class AbsorbedModel:
    """A task that was absorbed: what it is called, and the digest of its model."""

    name: str
    digest: str


@dataclass(frozen=True)
class Version:
    """The state after some absorptions: its tasks in order, its label if any, and the digests of its slots.

    Attributes:
        extents: of tensors that some model has not, or has only in part, how many leading elements are merged.
    """

    number: int
    tasks: Sequence[AbsorbedModel]
    slots: Sequence[str]
    label: str | None = None
    extents: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass
class Manifest:
    """The content of `state.json`; the base's path is relative to the state's folder."""

    rule: StreamingRule
    winners: bool
    mismatch: Mismatch = "strict"
    base_path: str | None = None
    base_digest: str | None = None
    current: int | None = None
    versions: dict[int, Version] = field(default_factory=dict[int, Version])
    batch_norm: BatchNorm = "average"

    @property
    def current_version(self) -> Version | None:
        """The version that counts."""
        return None if self.current is None else self.versions[self.current]

    @property
    def tasks(self) -> Sequence[AbsorbedModel]:
        return self.current_version.tasks if self.current_version else ()

    @property
    def extents(self) -> Mapping[str, int]:
        """Return the extents of the current version."""
        return self.current_version.extents if self.current_version else {}

    def write(self, file: Path) -> None:
        """Replace the file in one step."""
        strict = self.mismatch == "strict"
        content: dict[str, Any] = {
            "format": MANIFEST_FORMAT if strict else PARTIAL_FORMAT,
            "rule": self.rule.describe(),
            "winners": self.winners,
            **({} if strict else {"mismatch": self.mismatch}),
            **({} if self.batch_norm == "clip" else {"batch_norm": self.batch_norm}),
            "base": {"path": self.base_path, "digest": self.base_digest},
            "current": self.current,
            "generations": [_to_json(version, strict) for version in self.versions.values()],
        }
        replace_file(file, json.dumps(content, indent=2).encode() + b"\n")


def read_manifest(file: Path) -> Manifest:
    """Read and check a `state.json`. Raises MagMaxError for anything that this class did not write."""
    try:
        content = json.loads(read_small(file))
        if content["format"] not in (MANIFEST_FORMAT, PARTIAL_FORMAT):
            raise ValueError(
                f"it has format {content['format']}; this magmax reads {MANIFEST_FORMAT} and {PARTIAL_FORMAT}"
            )
        strict = content["format"] == MANIFEST_FORMAT
        ((name, options),) = modern_rule(content["rule"]).items()
        versions = [
            Version(
                g["number"],
                [AbsorbedModel(**t) for t in g["tasks"]],
                g["slots"],
                g["label"],
                {} if strict else g["extents"],
            )
            for g in content["generations"]
        ]
        state = Manifest(
            rule=require_streaming(rule_from({name: options})),
            winners=content["winners"],
            mismatch="strict" if strict else content["mismatch"],
            base_path=content["base"]["path"],
            base_digest=content["base"]["digest"],
            current=content["current"],
            versions={version.number: version for version in versions},
            batch_norm=content.get("batch_norm", "clip"),  # states of earlier versions merged them by the rule
        )
        if not _is_valid(state):
            raise ValueError("its entries do not fit together")
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise MagMaxError(f"{file}: is not the state of a running merge ({error})") from error
    return state


def _to_json(version: Version, strict: bool) -> dict[str, Any]:
    content = asdict(version)
    if strict:
        del content["extents"]
    return content


def require_streaming(rule: Rule) -> StreamingRule:
    """The rule, if it can run over tasks; else an error that names rules that can."""
    if rule.per_model:
        raise MagMaxError(
            f"a running merge does not know how many models will come, so {rule.name} cannot have a number for each; "
            "give one number for all"
        )
    if isinstance(rule, StreamingRule):
        return rule
    raise MagMaxError(
        f"{rule.name} looks at all models at once, so it cannot run in constant memory over tasks; "
        "magmax, average, task_arithmetic, random_mix and kth_magnitude can"
    )


def _is_valid(state: Manifest) -> bool:
    """Return whether what was read has the types and numbers that a state has."""
    whole = type(state.winners) is bool and type(state.base_path) in (str, type(None))
    whole = whole and state.mismatch in get_args(Mismatch) and state.batch_norm in get_args(BatchNorm)
    return whole and state.current in (None, *state.versions) and all(
        type(version.number) is int
        and isinstance(version.extents, dict)
        and all(type(count) is int and count >= 0 for count in version.extents.values())
        and all(type(digest) is str for digest in (*version.slots, *(task.digest for task in version.tasks)))
        and len(version.slots) == state.rule.slots(len(version.tasks))
        for version in state.versions.values()
    )  # fmt: skip
