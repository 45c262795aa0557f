"""Which known name an unknown one may mean. Case, spaces and punctuation do not count."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.8  # of difflib's ratio, which is 1 for equal texts


def letters(text: str) -> str:
    """What counts of a name."""
    return "".join(c for c in text.casefold() if c.isalnum())


def nearest(text: str, known: Iterable[str], cutoff: float = NEAR) -> str:
    """The known name that is nearest, or an empty text when none is near."""
    names = {letters(name): name for name in known}
    found = difflib.get_close_matches(letters(text), list(names), 1, cutoff)
    return names[found[0]] if found else ""


def did_you_mean(text: str, known: Iterable[str], cutoff: float = NEAR) -> str:
    """`did you mean "NAME"? `, or an empty text."""
    name = nearest(text, known, cutoff)
    return f'did you mean "{name}"? ' if name else ""
