"""The raw table: which images there are, of which class and patient. Standard library only, for login nodes.

Every fault is one BadInput that names the table, the row and the column, and never an image file or a patient: what
is printed here ends in stored logs. Rows are counted from 1, the heading not included, as an id `r000001` counts them.
"""

from __future__ import annotations

import csv
import io
import math
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from cmrhpc.errors import BadInput
from cmrhpc.files import open_plain
from cmrhpc.near import did_you_mean, nearest

REQUIRED = ("image", "label", "patient")
OPTIONAL = ("mask", "spacing_mm", "window_low", "window_high")
KNOWN = (*REQUIRED, *OPTIONAL)
WINDOW = ("window_low", "window_high")
MAX_TABLE_BYTES = 2**28
MAX_FIELD = 4096  # characters
APART = 0.05  # difference of two shares that chance and two scanners do not make alone
_SPACING = re.compile(r"\s*[x;\s]\s*")


@dataclass(frozen=True, slots=True)
class Row:
    """One image of the raw table.

    number: 1, 2, ... in the order of the table. image, mask: paths from the raw folder with forward slashes.
    spacing: mm of (row, column), where the table gives one. window: the raw values that become -1 and 1.
    """

    number: int
    image: str
    label: str
    patient: str
    mask: str | None = None
    spacing: tuple[float, float] | None = None
    window: tuple[float, float] | None = None

    @property
    def id(self) -> str:
        return f"r{self.number:06d}"


def read_table(
    raw: Path,
    table: str = "cohort.csv",
    columns: Mapping[str, str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
) -> list[Row]:
    """Read and validate the table of a raw folder.

    table: its path from `raw`. columns: our column name -> the table's own, where they differ ({"patient": "subject"}).
    classes: when given, every label must be one of them. check_files: also look at each image and mask on disk (it
    exists, is a plain file and lies inside the folder once links are followed); without, only at the text.

    Raises BadInput: the table is absent, no UTF-8 or no CSV; a column is missing; a field is empty, too long or no
    number; a path is absolute, climbs out of the folder or is named twice; a label is unknown; a file is absent.
    """
    raw = Path(raw)
    if not raw.is_dir():
        mend = "mend `raw` in study.toml, or call init with --raw"
        raise BadInput("the raw folder does not exist", "[data] raw", mend, str(raw))
    inside = _Inside(raw)
    inside.check(table, "[data] table", f"the table {table!r}"[:200], on_disk=False)
    path = raw / table
    if not path.is_file():
        mend = f"put {table} into the raw folder, or name the right one with --table"
        raise BadInput(f"no table {table} in the raw folder", "[data] raw", mend, str(raw))
    inside.check(table, "[data] table", f"the table {table!r}"[:200], on_disk=True)
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise BadInput(f"the table is larger than {MAX_TABLE_BYTES >> 20} MiB", table, "one row per image is enough")
    rows: list[Row] = []
    seen: dict[str, int] = {}
    try:
        with io.TextIOWrapper(open_plain(path), encoding="utf-8-sig", newline="") as stream:
            for line, number, fields in _records(stream, table, columns or {}):
                row = _row(_Place(table, number, line), fields, columns or {}, classes, inside, check_files)
                key = inside.real(row.image) if check_files else posixpath.normpath(row.image)
                if key in seen:
                    where = str(_Place(table, number, line, (columns or {}).get("image", "image")))
                    raise BadInput(f"duplicate image: row {seen[key]} names the same file", where, "remove one row")
                seen[key] = number
                rows.append(row)
    except UnicodeDecodeError as error:
        mend = "save it as CSV with the encoding UTF-8"
        raise BadInput(f"the table is not UTF-8 (byte {error.start} after {len(rows)} rows)", table, mend) from None
    except OSError as error:
        raise BadInput(f"cannot read the table: {error.strerror}", table, "give yourself read access") from None
    if not rows:
        raise BadInput("the table has no rows", table, "one row per image, below the heading")
    return rows


def read_heading(raw: Path, table: str = "cohort.csv") -> list[str]:
    """The names of the columns of a table that `read_table` has read."""
    with io.TextIOWrapper(open_plain(Path(raw) / table), encoding="utf-8-sig", newline="") as stream:
        return [name.strip() for name in next(csv.reader(stream, strict=True), [])]


def normalised_apart(kinds: Mapping[str, Mapping[str, int]]) -> str:
    """Class -> images per kind of normalisation: in words, where the shares of two classes differ by more than
    `APART`; else empty."""
    shares = [[n / total for n in one.values()] for one in kinds.values() if (total := sum(one.values()))]
    if all(max(of_kind) - min(of_kind) <= APART for of_kind in zip(*shares, strict=True)):
        return ""
    told = [
        f"{shown(name)}: {', '.join(f'{n} by {how}' for how, n in counts.items())}" for name, counts in kinds.items()
    ]
    return f"the classes were normalised differently ({'; '.join(told)}): a classifier can tell the class by it"


def label_order(label: str) -> tuple[int, int, str]:
    """Sorting by it puts whole numbers first, by value, and other texts by alphabet."""
    whole = label.isascii() and label.lstrip("-").isdigit() and len(label) < 19
    return (0, int(label), label) if whole else (1, 0, label)


def labels_of(rows: Sequence[Row]) -> list[str]:
    """The different labels in the order of `label_order`."""
    return sorted({row.label for row in rows}, key=label_order)


@dataclass(frozen=True)
class _Place:
    """Where in the table, for messages."""

    table: str
    number: int
    line: int
    column: str = ""

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"{self.table} row {self.number} (line {self.line}){column}"

    def at(self, column: str) -> str:
        return str(_Place(self.table, self.number, self.line, column))


def _records(stream: TextIO, table: str, columns: Mapping[str, str]) -> Iterator[tuple[int, int, dict[str, str]]]:
    """(line, row number, {our name: field}) of every row that is not blank."""
    reader = csv.reader(stream, strict=True)
    csv.field_size_limit(131072)

    def following() -> list[str] | None:
        try:
            return next(reader, None)
        except csv.Error as error:
            where = f"{table} line {reader.line_num}"
            mend = "a field is too long or a quotation mark is not closed: save the table as plain CSV again"
            raise BadInput(f"the table is not valid CSV: {error}", where, mend) from None

    heading = [name.strip() for name in following() or []]
    names = {ours: columns.get(ours, ours) for ours in KNOWN}
    for ours, theirs in columns.items():
        if ours not in names:
            mend = f"{did_you_mean(ours, names)}the names are {', '.join(names)}"
            raise BadInput(f"there is no column named {shown(ours)} to map", "[data] columns", mend)
        if theirs not in heading:
            raise _no_column(theirs, table, heading, ours)
    for ours in REQUIRED:
        if names[ours] not in heading:
            raise _no_column(names[ours], table, heading, ours)
    for ours, other in (WINDOW, WINDOW[::-1]):
        if names[ours] in heading and names[other] not in heading:
            raise _half_a_window(names[ours], other, table, heading)
    for theirs in set(names.values()):
        if heading.count(theirs) > 1:
            raise BadInput(f"the column {shown(theirs)} stands twice in the heading", table, "rename one of them")
    places = {ours: heading.index(theirs) for ours, theirs in names.items() if theirs in heading}
    number = 0
    while (fields := following()) is not None:
        if not fields:
            continue
        number += 1
        if len(fields) != len(heading):
            what = f"the row has {len(fields)} fields, the heading {len(heading)}"
            where = str(_Place(table, number, reader.line_num))
            raise BadInput(what, where, "put fields that hold a comma into double quotes")
        yield reader.line_num, number, {ours: fields[place].strip() for ours, place in places.items()}


def _no_column(name: str, table: str, heading: list[str], ours: str) -> BadInput:
    there = ", ".join(shown(column) for column in heading[:30]) or "nothing"
    mend = f"name the column that holds it with --column {ours}=NAME (`[data.columns]` of study.toml)"
    if len(heading) == 1 and re.search("[;\t]", heading[0]):
        mend = "the fields must be separated by commas"
    return BadInput(f"the table has no column {shown(name)}", table, mend, f"the columns {there}")


def _half_a_window(there: str, lacking: str, table: str, heading: list[str]) -> BadInput:
    near = [shown(name) for name in heading if name != there and nearest(name, [lacking])]
    mend = f"did you mean {near[0]}? Rename it, or map it with --column {lacking}=NAME" if near else ""
    what = f"the table has the column {shown(there)} but no {lacking}"
    return BadInput(what, table, mend or "a window needs both ends: add the column, or remove the other")


def shown(text: str) -> str:
    """A text from outside, short and without control characters."""
    return '"' + "".join(c if c.isprintable() else "?" for c in text[:60]) + ("..." if len(text) > 60 else "") + '"'


def _row(
    place: _Place,
    fields: dict[str, str],
    columns: Mapping[str, str],
    classes: Sequence[str] | None,
    inside: _Inside,
    check_files: bool,
) -> Row:
    def at(ours: str) -> str:
        return place.at(columns.get(ours, ours))

    for ours, field in fields.items():
        if ours in REQUIRED and not field:
            raise BadInput("an empty field", at(ours), "every image needs a path, a label and a patient")
        if len(field) > MAX_FIELD or any(not c.isprintable() for c in field):
            what = f"a field of {len(field)} characters, or with control characters"
            raise BadInput(what, at(ours), "mend the field")
    label = fields["label"]
    if classes is not None and label not in classes:
        mend = did_you_mean(label, classes)
        mend += f"the study knows {', '.join(shown(c) for c in classes)}: mend the table, or `classes` in study.toml"
        raise BadInput("unknown label", at("label"), mend, shown(label))
    inside.check(fields["image"], at("image"), "the image", on_disk=check_files)
    mask = fields.get("mask") or None
    if mask:
        inside.check(mask, at("mask"), "the mask", on_disk=check_files)
    spacing = _spacing(fields.get("spacing_mm", ""), at("spacing_mm"))
    ends = [_number(fields.get(name, ""), at(name)) for name in ("window_low", "window_high")]
    window = None
    if ends[0] is not None or ends[1] is not None:
        if ends[0] is None or ends[1] is None or not ends[0] < ends[1]:
            mend = "give both, window_low below window_high, or none"
            raise BadInput("a window needs two ends in order", at("window_low"), mend)
        window = (ends[0], ends[1])
    return Row(place.number, fields["image"], label, fields["patient"], mask, spacing, window)


def _number(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > 1e9:
        raise BadInput("no number", where, "write a number with a point, such as 1.25", shown(text))
    return value


def _spacing(text: str, where: str) -> tuple[float, float] | None:
    """One number for both directions, or two: mm between rows, then between columns (`1.2x1.4`)."""
    if not text:
        return None
    numbers = [_number(part, where) for part in _SPACING.split(text)]
    values = [value for value in numbers if value is not None and 1e-3 <= value <= 1e3]
    if len(values) != len(numbers) or len(values) > 2:
        mend = "write mm, such as 1.25, or 1.2x1.4 for rows and columns"
        raise BadInput("no spacing", where, mend, shown(text))
    return values[0], values[-1]


class _Inside:
    """Whether paths stay inside the raw folder, and are plain files. Each folder on the way is resolved once."""

    def __init__(self, raw: Path):
        self.raw = raw
        self.root = os.path.realpath(raw)
        self.folders: dict[str, str] = {}

    def check(self, path: str, where: str, what: str, on_disk: bool) -> None:
        parts = PurePosixPath(path).parts
        if "\\" in path or path.startswith(("/", "~")) or ".." in parts or not parts or re.match("[A-Za-z]:", path):
            mend = 'write it from the raw folder, with forward slashes, without ".."'
            raise BadInput(f"the path of {what} leaves the raw folder", where, mend)
        if not on_disk:
            return
        try:
            real = self.real(path)
            if os.path.commonpath([real, self.root]) != self.root:
                mend = "copy the file into the raw folder: links that lead out of it are not followed"
                raise BadInput(f"{what} is a link that leaves the raw folder", where, mend)
            kind = os.stat(real).st_mode
        except FileNotFoundError:
            raise BadInput(f"{what} does not exist", where, "put the file there, or mend the path") from None
        except (OSError, ValueError) as error:
            told = getattr(error, "strerror", None) or str(error)
            raise BadInput(f"{what} cannot be reached: {told}", where, "mend the path or its access") from None
        if not stat.S_ISREG(kind):
            raise BadInput(f"{what} is not a plain file", where, "name one image file per row (a folder is none)")

    def real(self, path: str) -> str:
        """The file's path with every link followed."""
        folder, name = posixpath.split(posixpath.normpath(path))
        if folder not in self.folders:
            self.folders[folder] = os.path.realpath(os.path.join(self.raw, folder))
        full = os.path.join(self.folders[folder], name)
        return os.path.realpath(full) if os.path.islink(full) else full
