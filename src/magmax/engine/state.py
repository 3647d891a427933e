"""What a running merge remembers of itself: the file `state.json`, and nothing of the tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..checkpoints.writer import replace_file
from ..errors import MagMaxError
from ..rules import Rule, StreamingRule, rule_from

FORMAT = 1


@dataclass(frozen=True)
class Task:
    """A task that was absorbed: what it is called, and the digest of its model."""

    name: str
    digest: str


@dataclass(frozen=True)
class Generation:
    """The state after some absorptions: its tasks in order, its label if any, and the digests of its slots."""

    number: int
    tasks: Sequence[Task]
    slots: Sequence[str]
    label: str | None = None


@dataclass
class State:
    """The content of `state.json`; the base's path is relative to the state's folder."""

    rule: StreamingRule
    winners: bool
    base_path: str | None = None
    base_digest: str | None = None
    current: int | None = None
    generations: dict[int, Generation] = field(default_factory=dict[int, Generation])

    @property
    def generation(self) -> Generation | None:
        """The generation that counts."""
        return None if self.current is None else self.generations[self.current]

    @property
    def tasks(self) -> Sequence[Task]:
        return self.generation.tasks if self.generation else ()

    def write(self, file: Path) -> None:
        """Replace the file in one step."""
        content = {
            "format": FORMAT,
            "rule": self.rule.describe(),
            "winners": self.winners,
            "base": {"path": self.base_path, "digest": self.base_digest},
            "current": self.current,
            "generations": [asdict(generation) for generation in self.generations.values()],
        }
        replace_file(file, json.dumps(content, indent=2).encode() + b"\n")


def read_state(file: Path) -> State:
    """Read and check a `state.json`. Raises MagMaxError for anything that this class did not write."""
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}; this magmax reads {FORMAT}")
        ((name, options),) = content["rule"].items()
        found = [
            Generation(g["number"], [Task(**t) for t in g["tasks"]], g["slots"], g["label"])
            for g in content["generations"]
        ]
        state = State(
            rule=streaming(rule_from({name: options})),
            winners=content["winners"],
            base_path=content["base"]["path"],
            base_digest=content["base"]["digest"],
            current=content["current"],
            generations={generation.number: generation for generation in found},
        )
        if not _sound(state):
            raise ValueError("its entries do not fit together")
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise MagMaxError(f"{file}: is not the state of a running merge ({error})") from error
    return state


def streaming(rule: Rule) -> StreamingRule:
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


def _sound(state: State) -> bool:
    """Whether what was read has the types and numbers that a state has."""
    whole = type(state.winners) is bool and type(state.base_path) in (str, type(None))
    return whole and state.current in (None, *state.generations) and all(
        type(generation.number) is int
        and all(type(digest) is str for digest in (*generation.slots, *(task.digest for task in generation.tasks)))
        and len(generation.slots) == state.rule.slots(len(generation.tasks))
        for generation in state.generations.values()
    )  # fmt: skip
