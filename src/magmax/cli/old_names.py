"""Commands and options of earlier versions, refused with the name that each has now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import MagMaxError

OLD_COMMANDS: Mapping[str, str] = {
    "sweep": "search sweep",
    "absorb": "running absorb",
    "result": "running result",
    "status": "running status",
    "label": "running label",
    "restore": "running restore",
    "inspect": "checkpoint inspect",
    "diff": "checkpoint diff",
    "convert": "checkpoint convert MODEL --out OUT",
    "rules": "recipes rules",
    "presets": "archive presets",
    "environments": "study environments",
}
"""Former commands at the top, and what they are now."""

OLD_SUBCOMMANDS: Mapping[str, Mapping[str, str]] = {
    "recipes": {"ls": "recipes list", "cp": "recipes copy NAME --out FILE"}
}

GROUPS: Mapping[str, tuple[Sequence[str], str]] = {
    "search": (("sweep", "run"), "search run"),
    "archive": (("create", "presets"), "archive create"),
}
"""Former commands that are groups now: the group's commands, and the one that does what the command did."""

OLD_OPTIONS: Mapping[tuple[str, ...], Mapping[str, str]] = {
    ("train",): {"--chain": "--training"},
    ("search", "sweep"): {"--keep": "--keep-results"},
    ("archive", "create"): {"--top": "--density"},
    ("study",): {"--top": "--density"},
    ("checkpoint", "diff"): {"--top": "--limit"},
}
"""Former options of each command, and what they are now."""


def refuse_old_names(words: Sequence[str]) -> None:
    """Raise MagMaxError for a command or an option of an earlier version; it names the new one."""
    plain = [word for word in words if not word.startswith("-")]
    if not plain or words[0] not in plain:
        return
    first, second = words[0], words[1] if len(words) > 1 else ""
    new = OLD_COMMANDS.get(first) or OLD_SUBCOMMANDS.get(first, {}).get(second)
    old = first if first in OLD_COMMANDS else f"{first} {second}"
    if first in GROUPS and second and not second.startswith("-h") and second != "--help":
        commands, successor = GROUPS[first]
        new, old = (None, "") if second in commands else (successor, first)
    if new:
        raise MagMaxError(f"`magmax {old}` is now `magmax {new}`")
    for command, options in OLD_OPTIONS.items():
        if tuple(words[: len(command)]) == command:
            for word in words[len(command) :]:
                if (name := word.partition("=")[0]) in options:
                    raise MagMaxError(f"{name} is now {options[name]}")
