"""The one error a user of magmax has to catch."""

import difflib
from collections.abc import Sequence

SAME_COMMAND = "what is finished is kept, and the same command goes on from there"
MAX_LISTED = 20
"""The most problems that one error lists."""


class MagMaxError(ValueError):
    """An input that cannot be used as given: the message names it and says what would work."""


class UnfinishedError(MagMaxError):
    """Work that was stopped from outside, by the loss of its workers or of a server: what is finished is kept, and the
    same command goes on from there."""


def missing_extra(need: str, extra: str) -> MagMaxError:
    """Return the error for a package that is not installed: what needs it, and how to install the extra that has it.

    magmax is on no package index, where anybody could register its name; a clone installs its own extras.
    """
    return MagMaxError(f"{need}, which is not installed; in the clone of magmax: pip install '.[{extra}]'")


def list_problems(heading: str, problems: Sequence[str], remedies: Sequence[str] = ()) -> MagMaxError:
    """One error for many problems, so that all of them are seen at once; of a long list, the first and the count."""
    if len(problems) == 1 and not remedies:
        return MagMaxError(problems[0])
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{heading} ({count})", *(f"  - {problem}" for problem in problems[:MAX_LISTED])]
    if len(problems) > MAX_LISTED:
        lines.append(f"  ... and {len(problems) - MAX_LISTED} more")
    return MagMaxError("\n".join([*lines, *remedies]))


def nearest_hint(word: str, words: list[str]) -> str:
    """A hint for a word that is none of those known."""
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(words)}"
