"""CSV as text: one way to write a cell, for every table that leaves the program."""

from __future__ import annotations

import csv
import io
import math
import numbers
from collections.abc import Iterable, Sequence

Cell = str | int | float | None


def csv_cell(value: Cell) -> str:
    """Floats by repr, undefined as empty; a text that a spreadsheet would run as a formula gets an apostrophe."""
    if value is None:
        return ""
    if isinstance(value, str):
        return "'" + value if value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else value
    if isinstance(value, numbers.Integral):
        return str(int(value))
    return repr(float(value)) if math.isfinite(value) else ""


def to_csv(header: Sequence[str], lines: Iterable[Sequence[Cell]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_cell(value) for value in line] for line in lines)
    return stream.getvalue()
