"""Whether the raw images and masks are still those that the cohort was made from. No imaging library."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from cmrhpc.data.table import Row
from cmrhpc.hashing import sha256_file

IMAGE, MASK = "image_sha256", "mask_sha256"  # columns of the cohort's report


def hashes(row: Row, raw: Path) -> dict[str, str]:
    """The columns of the report that tell a row's files; no mask is an empty text."""
    named = {IMAGE: row.image, MASK: row.mask}
    return {column: sha256_file(raw / path) if path else "" for column, path in named.items()}


def hashes_now(row: Row, raw: Path) -> dict[str, str] | None:
    """The same; None where a file cannot be read, of which who reads it for its pixels says more."""
    try:
        return hashes(row, raw)
    except OSError:
        return None


def changed(rows: Sequence[Row], raw: Path, report: str) -> str:
    """The first row whose image or mask is no longer the file that the report names, in words; empty when all are.

    rows: of the table as it was; report: the text of cohort.csv. Reads every file. A report without the columns, of an
    earlier version, tells nothing.
    """
    told = {cells["row"]: cells for cells in csv.DictReader(io.StringIO(report)) if cells.get("row")}
    for row in rows:
        cells = told.get(str(row.number), {})
        if IMAGE not in cells:
            continue
        try:
            now = hashes(row, raw)
        except OSError:
            return f"the image or mask of row {row.number} cannot be read any more"
        for column, what in ((IMAGE, "image"), (MASK, "mask")):
            if now[column] != cells[column]:
                return f"the {what} of row {row.number} changed"
    return ""
