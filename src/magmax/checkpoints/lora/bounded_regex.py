"""The regular expressions in an adapter's settings, matched in a bounded number of steps.

They come with a download, and Python's own matcher can be made to run for years by a short one. Here all positions that
a part of the expression can reach are followed together, so nothing is tried twice; steps are counted and limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from functools import lru_cache

LONGEST = 2000
"""Characters of an expression, and of a name that is matched with it."""
MOST_STEPS = 200_000

Positions = Set[int]
Node = Callable[["Run", Positions], Positions]
"""Given the positions where a part of an expression may begin, those where it may end."""


class PatternError(ValueError):
    """An expression that is wrong, not supported, or too long to follow."""


class Run:
    """One name, and the steps that are left for it."""

    def __init__(self, text: str) -> None:
        self.text, self.left = text, MOST_STEPS

    def step(self, positions: Positions) -> None:
        self.left -= 1 + len(positions)
        if self.left < 0:
            raise PatternError("it takes too many steps; write the modules' names out")


class Pattern:
    """A regular expression as PEFT writes them: characters, classes, groups, alternatives, repetitions, ^ and $.

    Raises:
        PatternError: a syntax error, or a construct beyond these (look-around, references, flags, possessive parts).
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"it is longer than {LONGEST} characters")
        try:
            re.compile(text)
            self._text, self._at = text, 0
            self._node = self._alternatives()
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(str(error)) from error

    def names(self, module: str) -> bool:
        """Whether the expression is the whole of a module's name, or of its end after a dot, as PEFT decides it."""
        if len(module) > LONGEST:
            raise PatternError(f"the name of the module is longer than {LONGEST} characters")
        line = len(module.partition("\n")[0])
        starts = {0, *(at + 1 for at, letter in enumerate(module[:line]) if letter == ".")}
        try:
            run = Run(module)
            return bool(_end(run, self._node(run, starts)))
        except RecursionError as error:
            raise PatternError("it is nested too deeply") from error

    def _alternatives(self) -> Node:
        parts = [self._sequence()]
        while self._next("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else lambda run, found: {p for part in parts for p in part(run, found)}

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))

        def sequence(run: Run, found: Positions) -> Positions:
            for part in parts:
                if not found:
                    break
                found = part(run, found)
            return found

        return sequence

    def _atom(self) -> Node:
        if self._next("("):
            if self._next("?P<"):
                self._at = self._text.index(">", self._at) + 1
            elif self._next("?") and not self._next(":"):
                raise PatternError(f"(?{self._text[self._at]} is not supported")
            node = self._alternatives()
            self._at += 1
            return node
        if self._next("^") or self._next("\\A"):
            return _start
        if self._next("$"):
            return _end
        if self._next("\\Z"):
            return lambda run, found: found & {len(run.text)}
        token = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|.", re.DOTALL).match(self._text, self._at)
        assert token
        self._at = token.end()
        if re.fullmatch(r"\\[^\W_dDwWsSnt]", token[0]):
            raise PatternError(f"{token[0]} is not supported")
        return _character(token[0])

    def _repeated(self, node: Node) -> Node:
        """The node with what stands behind it: *, +, ? or {m,n}."""
        found = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}").match(self._text, self._at)
        if not found or found[0] == "{}":
            return node
        self._at = found.end()
        if self._next("+"):
            raise PatternError(f"{found[0]}+ is not supported")
        self._next("?")
        if len(found[0]) == 1:
            return _repeat(node, int(found[0] == "+"), 1 if found[0] == "?" else None)
        least = int(found[1] or 0)
        return _repeat(node, least, int(found[3]) if found[3] else None if found[2] else least)

    def _next(self, word: str) -> bool:
        there = self._text.startswith(word, self._at)
        self._at += len(word) * there
        return there


def _character(token: str) -> Node:
    one = re.compile(token)

    def character(run: Run, found: Positions) -> Positions:
        run.step(found)
        return {at + 1 for at in found if at < len(run.text) and one.fullmatch(run.text[at])}

    return character


def _repeat(node: Node, least: int, most: int | None) -> Node:
    def repeat(run: Run, found: Positions) -> Positions:
        run.step(found)
        for _ in range(min(least, len(run.text) + 2)):  # by then every further round reaches the same positions
            found = node(run, found)
        seen, fresh, rounds = set(found), found, 0
        while fresh and (most is None or rounds < most - least):
            run.step(fresh)
            fresh = node(run, fresh) - seen
            seen |= fresh
            rounds += 1
        return seen

    return repeat


def _start(run: Run, found: Positions) -> Positions:
    return found & {0}


def _end(run: Run, found: Positions) -> Positions:
    return found & {len(run.text), len(run.text) - run.text.endswith("\n")}


@lru_cache(4096)
def pattern(text: str) -> Pattern:
    """The expression, parsed once for all the names that it is tried on."""
    return Pattern(text)
