"""A rule that remembers what it merged, for those who ask for the same merge again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .after import Followed
from .contract import Rule
from .statistics import Address, Answer, Array, Block, namespace
from .wrapping import Wrapping


@dataclass(frozen=True)
class Held(Wrapping):
    """A rule that merges each block once and from then on gives copies, of the same models and with the same answer."""

    known: dict[tuple[Address, int], Array] = field(
        default_factory=dict[tuple[Address, int], Array], repr=False, compare=False
    )

    def merge(self, block: Block, answer: Answer) -> Array:
        length = len(block.deltas[0])
        if (merged := self.recalled(block.at, length)) is None:
            self.known[block.at, length] = merged = self.rule.merge(block, answer)
            return namespace(merged).asarray(merged, copy=True)
        return merged

    def recalled(self, at: Address, length: int) -> Array | None:
        """A copy of what was merged of so many elements there, if it was."""
        merged = self.known.get((at, length))
        return None if merged is None else namespace(merged).asarray(merged, copy=True)


def holding(rule: Rule) -> Rule:
    """The rule, with that part of it held which is the same for every scaling factor."""
    if isinstance(rule, Followed):
        return replace(rule, rule=holding(rule.rule))
    return rule if rule.needs_factor else Held(rule)
