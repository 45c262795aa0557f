"""What in a raw table looks like a slip: ignored columns whose name is near a known one, classes that differ by a typo.

Warnings only; what cannot be right is bad input in `table`. Standard library only, for login nodes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from cmrhpc.data.table import KNOWN, Row, labels_of, shown
from cmrhpc.near import NEAR, letters, nearest

RARE_IMAGES, RARE_SHARE = 2, 0.05  # a class this small beside one of nearly the same name is taken for a slip
SHOWN_COLUMNS = 20


def ignored_columns(heading: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """One line that lists the columns nobody reads, and before it one for each that may be a known one misspelt.

    heading: the names in the table. columns: ours -> the table's, where they differ.
    """
    names = {ours: columns.get(ours, ours) for ours in KNOWN}
    missing = [ours for ours, theirs in names.items() if theirs not in heading]
    ignored = [theirs for theirs in heading if theirs not in names.values()]
    lines = []
    for theirs in ignored:
        if ours := nearest(theirs, missing):
            mend = f"rename it, or map it: --column {ours}=NAME, or `columns` in study.toml [data]"
            lines.append(f"warning: the column {shown(theirs)} is ignored: did you mean {ours}? {mend}")
    if ignored:
        more = f" and {len(ignored) - SHOWN_COLUMNS} more" if len(ignored) > SHOWN_COLUMNS else ""
        lines.append(f"columns that are ignored: {', '.join(map(shown, ignored[:SHOWN_COLUMNS]))}{more}")
    return lines


def class_counts(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Class -> (images, patients), in the order of `labels_of`."""
    return {
        label: (
            sum(row.label == label for row in rows),
            len({row.patient for row in rows if row.label == label}),
        )
        for label in labels_of(rows)
    }


def counted(counts: Mapping[str, tuple[int, int]]) -> str:
    """The counts as people read them."""
    return "; ".join(
        f"{shown(name)} {many(images, 'image')} of {many(patients, 'patient')}"
        for name, (images, patients) in counts.items()
    )


def many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def class_slips(counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """One text for each class that may be another one misspelt.

    Two names that differ only in case, spaces or punctuation, or a class of few images beside one of nearly its name.
    Names that differ in their digits only (stage 1, stage 2) are no slip.
    """
    lines = []
    order = sorted(counts, key=lambda name: -counts[name][0])
    for rank, name in enumerate(order):
        images = counts[name][0]
        for other in order[:rank]:
            same = letters(name) == letters(other) and bool(letters(name))
            rare = images <= max(RARE_IMAGES, RARE_SHARE * counts[other][0]) and images < counts[other][0]
            digits = [[c for c in text if c.isdigit()] for text in (name, other)]
            if same or (rare and digits[0] == digits[1] and _near(name, other)):
                told = many(images, "image")
                what = f"the class {shown(name)} has {told}: did you mean {shown(other)}, which has {counts[other][0]}?"
                lines.append(f"{what} Mend the label in the table")
                break
    return lines


def _near(name: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, name.casefold(), other.casefold()).ratio() >= NEAR
