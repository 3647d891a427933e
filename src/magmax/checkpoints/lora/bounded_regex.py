"""The regular expressions in an adapter's settings, matched in a bounded number of steps.

They come with a download, and Python's own matcher can be made to run for years by a short one. Here all positions that
a part of the expression can reach are followed together, so nothing is tried twice; steps are counted and limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from functools import lru_cache

MAX_LENGTH = 2000
"""Characters of an expression, and of a name that is matched with it."""
MAX_STEPS = 200_000

Positions = Set[int]
Matcher = Callable[["MatchRun", Positions], Positions]
"""Given the positions where a part of an expression may begin, those where it may end."""


class BoundedRegexError(ValueError):
    """An expression that is wrong, not supported, or too long to follow."""


class MatchRun:
    """One name, and the steps that are left for it."""

    def __init__(self, text: str) -> None:
        self.text, self.steps_left = text, MAX_STEPS

    def count_steps(self, positions: Positions) -> None:
        self.steps_left -= 1 + len(positions)
        if self.steps_left < 0:
            raise BoundedRegexError("it takes too many steps; write the modules' names out")


class BoundedRegex:
    """A regular expression as PEFT writes them: characters, classes, groups, alternatives, repetitions, ^ and $.

    Raises:
        PatternError: a syntax error, or a construct beyond these (look-around, references, flags, possessive parts).
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise BoundedRegexError(f"it is longer than {MAX_LENGTH} characters")
        try:
            re.compile(text)
            self._text, self._position = text, 0
            self._matcher = self._parse_alternatives()
        except (re.error, RecursionError, OverflowError) as error:
            raise BoundedRegexError(str(error)) from error

    def matches_module(self, module: str) -> bool:
        """Return whether the expression is the whole of a module's name, or of its end after a dot, as PEFT decides
        it.
        """
        if len(module) > MAX_LENGTH:
            raise BoundedRegexError(f"the name of the module is longer than {MAX_LENGTH} characters")
        line = len(module.partition("\n")[0])
        starts = {0, *(at + 1 for at, letter in enumerate(module[:line]) if letter == ".")}
        try:
            run = MatchRun(module)
            return bool(_match_end(run, self._matcher(run, starts)))
        except RecursionError as error:
            raise BoundedRegexError("it is nested too deeply") from error

    def _parse_alternatives(self) -> Matcher:
        parts = [self._parse_sequence()]
        while self._accept("|"):
            parts.append(self._parse_sequence())
        return parts[0] if len(parts) == 1 else lambda run, found: {p for part in parts for p in part(run, found)}

    def _parse_sequence(self) -> Matcher:
        parts: list[Matcher] = []
        while self._position < len(self._text) and self._text[self._position] not in "|)":
            parts.append(self._parse_repetition(self._parse_atom()))

        def sequence(run: MatchRun, positions: Positions) -> Positions:
            for part in parts:
                if not positions:
                    break
                positions = part(run, positions)
            return positions

        return sequence

    def _parse_atom(self) -> Matcher:
        if self._accept("("):
            if self._accept("?P<"):
                self._position = self._text.index(">", self._position) + 1
            elif self._accept("?") and not self._accept(":"):
                raise BoundedRegexError(f"(?{self._text[self._position]} is not supported")
            node = self._parse_alternatives()
            self._position += 1
            return node
        if self._accept("^") or self._accept("\\A"):
            return _match_start
        if self._accept("$"):
            return _match_end
        if self._accept("\\Z"):
            return lambda run, found: found & {len(run.text)}
        token = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|.", re.DOTALL).match(self._text, self._position)
        assert token
        self._position = token.end()
        if re.fullmatch(r"\\[^\W_dDwWsSnt]", token[0]):
            raise BoundedRegexError(f"{token[0]} is not supported")
        return _match_character(token[0])

    def _parse_repetition(self, matcher: Matcher) -> Matcher:
        """The node with what stands behind it: *, +, ? or {m,n}."""
        match = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}").match(self._text, self._position)
        if not match or match[0] == "{}":
            return matcher
        self._position = match.end()
        if self._accept("+"):
            raise BoundedRegexError(f"{match[0]}+ is not supported")
        self._accept("?")
        if len(match[0]) == 1:
            return _match_repeat(matcher, int(match[0] == "+"), 1 if match[0] == "?" else None)
        least = int(match[1] or 0)
        return _match_repeat(matcher, least, int(match[3]) if match[3] else None if match[2] else least)

    def _accept(self, token: str) -> bool:
        there = self._text.startswith(token, self._position)
        self._position += len(token) * there
        return there


def _match_character(token: str) -> Matcher:
    one = re.compile(token)

    def character(run: MatchRun, found: Positions) -> Positions:
        run.count_steps(found)
        return {at + 1 for at in found if at < len(run.text) and one.fullmatch(run.text[at])}

    return character


def _match_repeat(matcher: Matcher, minimum: int, maximum: int | None) -> Matcher:
    def repeat(run: MatchRun, positions: Positions) -> Positions:
        run.count_steps(positions)
        for _ in range(min(minimum, len(run.text) + 2)):  # by then every further round reaches the same positions
            positions = matcher(run, positions)
        seen, fresh, rounds = set(positions), positions, 0
        while fresh and (maximum is None or rounds < maximum - minimum):
            run.count_steps(fresh)
            fresh = matcher(run, fresh) - seen
            seen |= fresh
            rounds += 1
        return seen

    return repeat


def _match_start(run: MatchRun, positions: Positions) -> Positions:
    return positions & {0}


def _match_end(run: MatchRun, positions: Positions) -> Positions:
    return positions & {len(run.text), len(run.text) - run.text.endswith("\n")}


@lru_cache(4096)
def compile_regex(text: str) -> BoundedRegex:
    """The expression, parsed once for all the names that it is tried on."""
    return BoundedRegex(text)
