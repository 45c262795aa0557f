"""Predictions -> the report folder, written file by file so that a reader never sees half of one. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cmrhpc import files
from cmrhpc.errors import BadInput
from cmrhpc.hashing import sha256_of
from cmrhpc.names import METRICS
from cmrhpc.report import csvfiles, figures, tables
from cmrhpc.report.collect import collect
from cmrhpc.report.gallery import make_gallery
from cmrhpc.report.page import render
from cmrhpc.report.result import Result, evaluate

SUMMARY = "summary.txt"
_METRIC = "|".join(METRICS)
_FIGURE = re.compile(rf"(samples|training)_.*|{_METRIC}|(ratio_curve|folds)(_({_METRIC}))?|roc|classifier_training")


@dataclass(frozen=True)
class AggregateResult:
    """What was found and written."""

    folder: Path  # the report folder
    result: Result
    files: dict[str, str]  # what was written, from the report folder -> its sha256


def aggregate(folder: Path, begin: Callable[[], None] = lambda: None) -> AggregateResult:
    """Make the report of a workspace, or of a copied predictions folder alone, in FOLDER/report.

    begin: called before the first file is written.
    Missing cells are shown as missing and raise nothing. Raises BadInput when there is no usable prediction at all,
    when two cohorts are mixed, or when the folder cannot be written.
    """
    out = Path(folder) / "report"
    result = evaluate(collect(folder))
    gallery = make_gallery(result.collection)
    drawn = figures.all_figures(result)
    pictures = drawn | {strip.name: strip.png for strip in gallery.strips}
    pictures |= {name: data for name, (_, data) in gallery.curves.items()}
    written: dict[str, str | bytes] = {
        "table.csv": csvfiles.table_csv(result),
        "folds.csv": csvfiles.folds_csv(result),
        "patients.csv": csvfiles.patients_csv(result),
        "comparisons.csv": csvfiles.comparisons_csv(result),
        "comparison_details.csv": csvfiles.comparison_details_csv(result),
        "best_ratio.csv": csvfiles.best_ratio_csv(result),
        "table.md": tables.table_md(result),
        "table.tex": tables.table_tex(result),
        SUMMARY: tables.summary_text(result, gallery.warned) + "\n",
    }
    if len(result.collection.study.classes) > 2:
        written["classes.csv"] = csvfiles.classes_csv(result)
    if not result.best:
        del written["best_ratio.csv"]
    written |= {f"figures/{name}": data for name, data in pictures.items()}
    written["index.html"] = render(result, gallery, drawn)

    files.make_folder(out)  # refuses a link that leads out of the workspace
    begin()
    # What an earlier report of another study left would stand beside the new one.
    before = [f"figures/{path.name}" for path in (out / "figures").glob("*.png") if _FIGURE.fullmatch(path.stem)]
    for name in ("classes.csv", "best_ratio.csv", *before):
        if name not in written and not (out / name).is_dir():
            (out / name).unlink(missing_ok=True)
    hashes = {}
    for name, data in written.items():
        # A file name that is no text reaches the lists of refused files; it must not stop the report.
        whole = data.encode("utf-8", "replace") if isinstance(data, str) else data
        files.atomic_write(out / name, whole)
        hashes[name] = sha256_of(whole)
    return AggregateResult(out, result, hashes)


def terminal_table(folder: Path) -> str:
    """The text of the last report of a workspace or predictions folder. Raises BadInput when there is none."""
    path = Path(folder) / "report" / SUMMARY
    try:
        return files.read_plain(path).decode("utf-8", "replace").rstrip("\n")
    except OSError:
        raise BadInput("no report yet", str(path), "make it with `cmrhpc aggregate`") from None
