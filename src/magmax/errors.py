"""The one error a user of magmax has to catch."""

import difflib
from collections.abc import Sequence

MAX_PROBLEMS = 40
SAME_COMMAND = "what is finished is kept, and the same command goes on from there"


class MagMaxError(ValueError):
    """An input that cannot be used as given: the message names it and says what would work."""


class UnfinishedError(MagMaxError):
    """Work that was stopped from outside, by the loss of its workers or of a server: what is finished is kept, and the
    same command goes on from there."""


def list_problems(heading: str, problems: Sequence[str], hints: Sequence[str] = ()) -> MagMaxError:
    """One error for many problems, so that all of them are seen at once; of very many, the first and their number."""
    if len(problems) == 1:
        return MagMaxError("\n".join([problems[0], *(f"  {hint}" for hint in hints)]))
    more = len(problems) - MAX_PROBLEMS
    listed = [*problems[:MAX_PROBLEMS]] + [f"... and {more} more"] * (more > 0)
    lines = [f"{heading} ({len(problems)} problems)", *(f"  - {problem}" for problem in listed)]
    return MagMaxError("\n".join([*lines, *(f"  {hint}" for hint in hints)]))


def nearest_hint(word: str, words: list[str]) -> str:
    """A hint for a word that is none of those known."""
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(words)}"
