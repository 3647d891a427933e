"""The one error a user of magmax has to catch."""

import difflib
import re
from collections.abc import Sequence

SAME_COMMAND = "what is finished is kept, and the same command goes on from there"
MAX_LISTED = 40
"""The most problems that one error lists."""
BULLET = "  - "
MAX_WORD_CHARACTERS = 500
MAX_LINE_CHARACTERS = 4000
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Newlines and what else moves the cursor, colours or reorders text; and halves of characters, which nothing prints."""


def escape_controls(text: str) -> str:
    """Return text that is one line on any terminal, with control characters written as in Python: `\\x1b`, `\\n`."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shorten(text: str, max_characters: int) -> str:
    """Return text without its middle where it is longer than that."""
    half = (max_characters - 3) // 2
    return text if len(text) <= max_characters else f"{text[:half]}...{text[-half:]}"


def _printable(message: str) -> str:
    """Return a message as one line of bounded length: names in it come from files that anyone may have written."""
    line = re.sub(rf"\S{{{MAX_WORD_CHARACTERS},}}", lambda match: shorten(match[0], MAX_WORD_CHARACTERS), message)
    return shorten(escape_controls(line), MAX_LINE_CHARACTERS)


class MagMaxError(ValueError):
    """An input that cannot be used as given: the message names it and says what would work.

    Args:
        lines: the message, one argument a line; newlines within one are escaped.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(_printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)

    @property
    def problems(self) -> list[str]:
        """Return each problem that the message lists, or the whole of it."""
        return [line.removeprefix(BULLET) for line in self.args if line.startswith(BULLET)] or [str(self)]


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
    lines = [f"{heading} ({count})", *(f"{BULLET}{problem}" for problem in problems[:MAX_LISTED])]
    if len(problems) > MAX_LISTED:
        lines.append(f"  ... and {len(problems) - MAX_LISTED} more")
    return MagMaxError(*lines, *remedies)


def nearest_hint(word: str, words: list[str]) -> str:
    """A hint for a word that is none of those known."""
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(words)}"
