"""Makes a workspace: a study file, written out with its comments, for one raw folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tomlkit

from cmrhpc import files
from cmrhpc.data.hints import class_counts, class_slips, counted, ignored_columns
from cmrhpc.data.table import label_order, read_heading, read_table
from cmrhpc.errors import BadInput
from cmrhpc.paths import check_printable
from cmrhpc.study import STUDIES, Data, Study, parse_study
from cmrhpc.typed import build

MOST_CLASSES = 100  # with more labels the column is likely another one


def shipped() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


@dataclass(frozen=True)
class Made:
    """The study of a new workspace, images and patients per class in words, and what in the table looks like a slip."""

    study: Study
    classes: str
    notes: list[str]


def make_workspace(
    root: Path,
    study: str,
    raw: Path,
    table: str | None = None,
    columns: dict[str, str] | None = None,
    file_spacing_mm: float | None = None,
    channels: int | None = None,
    positive: str | None = None,
) -> Made:
    """Write `root`/study.toml from a shipped study or a file; the classes are read from the raw table.

    Raises BadInput for an unknown study, a path with a line break, a workspace that has one already or is the raw
    folder, a table that cannot be read, one class only or over `MOST_CLASSES`, or a binary study whose positive
    class is not told.
    """
    source = STUDIES / f"{study}.toml"
    if source.stem not in shipped() or os.sep in study:
        source = Path(study)
    if not source.is_file():
        mend = f"shipped studies: {', '.join(shipped())}; or give a .toml file"
        raise BadInput(f'no study "{study}"', str(source), mend)
    check_printable(root.absolute())
    target = root / "study.toml"
    has_one = ("the workspace has a study already", str(target), "edit it, or choose another folder")
    if target.exists():
        raise BadInput(*has_one)
    if os.path.realpath(raw) == os.path.realpath(root):
        mend = "make the workspace elsewhere: ingest writes a cohort.csv of its own"
        raise BadInput("the raw folder cannot be the workspace", str(root), mend)
    if not raw.is_dir():
        raise BadInput("no such raw folder", str(raw), "`cmrhpc phantom RAW` writes a simulated one")
    try:
        document = tomlkit.parse(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the study: {error}", str(source), "mend the line that is named") from None
    data = document.setdefault("data", tomlkit.table())
    asked = {"table": table, "columns": columns or None, "file_spacing_mm": file_spacing_mm, "channels": channels}
    if file_spacing_mm is not None:  # the study file has no part in this one
        build(Data, {"raw": "", "file_spacing_mm": file_spacing_mm}, "--spacing", "")
    for key, value in asked.items():
        if value is not None:
            data[key] = value
    data["raw"] = os.path.relpath(raw.resolve(), root.resolve()) if _beside(raw, root) else str(raw.resolve())
    name, mapped = str(data.get("table", "cohort.csv")), dict(data.get("columns", {}))
    rows = read_table(raw, name, mapped)
    labels = len({row.label for row in rows})
    if labels > MOST_CLASSES:  # before they are counted and compared pair by pair: there may be one per row
        mend = "is the column `label` the right one? --column label=NAME"
        raise BadInput(f"{labels} different labels", str(raw / name), mend)
    counts = class_counts(rows)
    slips = class_slips(counts)
    try:
        document["classes"] = order_classes(counts, positive, str(raw / name))
    except BadInput as error:
        mend = "; ".join([error.mend, f"the classes are {counted(counts)}", *slips])
        raise BadInput(error.what, error.where, mend) from None
    text = tomlkit.dumps(document)
    made = parse_study(text, str(source))
    if not files.create_once(target, text):  # another `init` was at work
        raise BadInput(*has_one)
    counts = {name: counts[name] for name in made.classes}
    notes = [f"warning: {slip}" for slip in slips] + ignored_columns(read_heading(raw, name), mapped)
    return Made(made, counted(counts), notes)


def _beside(raw: Path, root: Path) -> bool:
    """Raw folder and workspace share a folder: then a relative path survives moving both."""
    return raw.resolve().parent == root.resolve().parent or raw.resolve().is_relative_to(root.resolve())


def order_classes(labels: Iterable[str], positive: str | None, where: str) -> list[str]:
    """Class names in the order of their indices: that of `label_order`, and the positive class of a binary study last.

    labels: the labels of the table, in any order. Raises BadInput for one class, or an unclear positive.
    """
    labels = sorted(set(labels), key=label_order)
    if len(labels) < 2:
        raise BadInput(f"only one class: {labels}", where, "a study needs two or more classes")
    if len(labels) > 2:
        if positive is not None:
            raise BadInput("--positive is for two classes", where, f"this table has {len(labels)}: leave it out")
        return labels
    if positive is None and labels != ["0", "1"]:
        mend = f"add --positive {labels[0]} or --positive {labels[1]}"
        raise BadInput(f'which class is positive, "{labels[0]}" or "{labels[1]}"?', where, mend)
    positive = "1" if positive is None else positive
    if positive not in labels:
        raise BadInput(f'the positive class "{positive}" is not a label', where, f"labels: {', '.join(labels)}")
    return [label for label in labels if label != positive] + [positive]
