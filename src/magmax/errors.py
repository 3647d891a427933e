"""The one error a user of magmax has to catch."""


class MagMaxError(ValueError):
    """An input that cannot be used as given: the message names it and says what would work."""


def listed(heading: str, problems: list[str]) -> MagMaxError:
    """One error for many problems, so that all of them are seen at once."""
    if len(problems) == 1:
        return MagMaxError(problems[0])
    return MagMaxError("\n".join([f"{heading} ({len(problems)} problems)", *(f"  - {p}" for p in problems)]))
