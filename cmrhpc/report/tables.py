"""The tables of a report as Markdown, LaTeX and plain text, all from one `Result`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cmrhpc.errors import printable
from cmrhpc.names import METRICS
from cmrhpc.report.collect import Key
from cmrhpc.report.compare import Comparison
from cmrhpc.report.published import WARNING, WARNING_SHORT, Published, published
from cmrhpc.report.result import (
    METRIC_NAMES,
    NONE,
    Result,
    arm_text,
    best_text,
    cells_text,
    count,
    figure_text,
    limit_text,
    metric_text,
    p_text,
    points,
    split_units,
    verdict,
)

INTERVALS = (
    "Intervals: 95 %, patients resampled with all their images (bootstrap, expanded percentiles). They reflect patient "
    "sampling, not training variability. Accuracy and the recall of each class (with two classes sensitivity and "
    "specificity) have the wider of this and exact limits over patients (Clopper-Pearson), and balanced accuracy, the "
    "mean of the recalls, the wider of this and those of its rates. An AUC of 1 has the exact limits of as many pairs "
    "as the smaller class has patients; one close to 1 has no such guard: on few patients its interval is too narrow."
)
COMPARISONS = (
    "Differences in percentage points (AUC: hundredths) of the pooled values, on the folds that both have. Interval: "
    "the wider of patient bootstrap and corrected resampled t; none where neither finds a spread. p: corrected t over "
    "folds and repeats (Nadeau-Bengio, with test images over images that weights were trained on; validation images "
    "are not among them), which decides. It tests the mean of the folds' own differences (comparison_details.csv): "
    "folds without one of the classes have no part in it, and an AUC ranks the images of one fold only. Where interval "
    "and p say different things, the reading says that they disagree. McNemar: one prediction per patient, exact, for "
    "these trained models only (balanced accuracy: patient-wise permutation; AUC: DeLong on patients; where one has "
    "images of two classes accuracy is permuted too, and there is no DeLong). "
)


def comparisons_note(result: Result) -> str:
    """How the comparisons are to be read, and which of them was declared beforehand."""
    declared = "was declared before the study ran" if result.collection.declared_before else "stands alone"
    repeated = any(c.versus.startswith("repeat-real") for c in result.comparisons)
    control = "Synthetic images are compared with repeat-real too, at the same ratio. " if repeated else ""
    return (
        f"{COMPARISONS}{control}One comparison, the primary, {declared}; all others are exploratory, Holm-corrected "
        "within a classifier and metric. Interval and p are not corrected, so an interval without 0 may stand beside "
        "the reading that an exploratory difference is not distinguishable from no effect."
    )


# ------------------------------------------------------------------------------- tables for people, one source


def _published(result: Result, key: Key) -> Published | None:
    return published(key, len(result.collection.study.classes))


def main_header() -> list[str]:
    units = [f"{METRIC_NAMES[m]}{'' if m == 'auc' else ' %'}" for m in METRICS]
    return ["classifier", "arm", "ratio", *units, "published acc / sens / spec %", "folds x repeats", "missing"]


def main_lines(result: Result) -> list[list[str]]:
    """The main table as text, in the order of `main_header`."""
    lines = []
    for key, row in result.rows.items():
        told = _published(result, key)
        lines.append(
            [
                key[0],
                key[1],
                f"{key[2]:g}",
                *(figure_text(m, row.figures[m]) for m in METRICS),
                told.text() if told else NONE,
                f"{row.n_folds} x {row.n_repeats}",
                str(row.n_missing),
            ]
        )
    return lines


def comparison_header() -> list[str]:
    return [
        "classifier",
        "arm",
        "versus",
        "metric",
        "points",
        "95 % interval",
        "p",
        "McNemar",
        "Holm",
        "rests on",
        "reading",
    ]


def limits_text(c: Comparison) -> str:
    return f"{limit_text(c.low)} to {limit_text(c.high)}" if math.isfinite(c.low) else NONE


def comparison_lines(result: Result, metric: str | None = None) -> list[list[str]]:
    """Comparisons as text, the primary first; of one metric, or of all."""
    lines = []
    for c in sorted(result.comparisons, key=lambda c: not c.primary):
        if metric and c.metric != metric and not c.primary:
            continue
        patients = c.p_delong if c.metric == "auc" else c.p_mcnemar
        lines.append(
            [
                c.key[0],
                arm_text(*c.key[1:]),
                c.versus,
                METRIC_NAMES[c.metric],
                points(c.difference, sign=True),
                limits_text(c),
                p_text(c.p_corrected_t),
                p_text(patients),
                p_text(c.p_holm),
                cells_text(c.n_common, c.n_left_out),
                ("primary: " if c.primary else "") + verdict(c),
            ]
        )
    return lines


def best_lines(result: Result) -> list[list[str]]:
    return [
        [
            *b.row.key[:2],
            best_text(b),
            *(figure_text(m, b.row.figures[m]) for m in METRICS),
            points(b.versus.difference, sign=True)
            + (f" ({limits_text(b.versus)}) against {b.versus.versus}" if b.versus.n_common else ""),
            cells_text(len(b.row.folds), b.row.n_missing),
        ]
        for b in result.best
    ]


def best_header(result: Result) -> list[str]:
    units = [f"{METRIC_NAMES[m]}{'' if m == 'auc' else ' %'}" for m in METRICS]
    difference = f"{METRIC_NAMES[result.collection.study.primary.metric]} difference, points"
    chosen = f"ratio chosen on validation {split_units(result.collection.study)}"
    return ["classifier", "arm", chosen, *units, difference, "rests on"]


def best_note(result: Result) -> str:
    """How the ratio was chosen."""
    metric = result.collection.study.primary.metric
    return (
        f"In each fold and repeat the ratio with the best validation {METRIC_NAMES[metric]}, the primary metric, was "
        "taken (among equals, or where the validation images lack a class that it needs, the lower validation loss, "
        "then the smaller ratio), and measured on that fold's test images, which had no part in the choice. Intervals "
        "as above; no p is given, because the corrected comparisons above hold every ratio already."
    )


# ------------------------------------------------------------------------------------------------- Markdown


def markdown_text(text: str) -> str:
    """Text that Markdown and the HTML inside it take literally."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\`*_[]|~#" else c for c in text)


def _markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [list(header), ["---"] * len(header)]
    shown = [f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in (rows[0], *lines)]
    return [shown[0], f"|{'|'.join(rows[1])}|", *shown[1:]]


def table_md(result: Result) -> str:
    study = result.collection.study
    parts = [f"# {markdown_text(study.name)}", "", f"{markdown_text(result.question)}", ""]
    parts += [f"**{markdown_text(result.answer)}**", "", f"On {markdown_text(result.patients_line)}.", ""]
    parts += [f"> {markdown_text(warning)}\n" for warning in result.warnings]
    parts += _markdown_table(main_header(), main_lines(result))
    parts += ["", markdown_text(INTERVALS), ""]
    if any(_published(result, key) for key in result.rows):
        parts += [markdown_text(WARNING), ""]
    metric = study.primary.metric
    parts += [f"## Comparisons: {METRIC_NAMES[metric]}", ""]
    parts += _markdown_table(comparison_header(), comparison_lines(result, metric))
    parts += ["", markdown_text(comparisons_note(result)), "", "Those of the other metrics: comparisons.csv.", ""]
    if result.best:
        parts += [f"## Best ratio, chosen on validation {split_units(study)}", ""]
        parts += [*_markdown_table(best_header(result), best_lines(result)), "", markdown_text(best_note(result)), ""]
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------- LaTeX

_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "–": "--",
    '"': "''",
    "|": r"$|$",
}


def tex_text(text: str) -> str:
    """Text with everything escaped that LaTeX would interpret; what its standard fonts lack becomes `?`."""
    plain = (" " if c.isspace() else c if (c.isprintable() and ord(c) < 0x250) or c in _TEX else "?" for c in text)
    return "".join(_TEX.get(c, c) for c in plain)


def table_tex(result: Result) -> str:
    """A tabular for each classifier, to \\input on a page of A4; needs no package. Two or three lines per arm."""
    study = result.collection.study
    lines = [
        f"% {tex_text(study.name)}: made by cmrhpc aggregate; \\input it. A page may end between two classifiers.",
        r"{\scriptsize\setlength{\tabcolsep}{3pt}",
    ]
    classifier = ""
    for key, line in zip(result.rows, main_lines(result), strict=True):
        if key[0] != classifier:
            lines += [r"\hline", r"\end{tabular}\par\medskip"] if classifier else []
            head = [r"acc.\ \%", r"sens.\ \%", r"spec.\ \%", r"bal.\ acc.\ \%", "AUC"]
            lines += [
                r"\noindent\begin{tabular}{p{24mm}rrrrrr}",
                r"\hline",
                rf"\multicolumn{{7}}{{l}}{{{tex_text(key[0])}}} \\",
                " & ".join(["arm", "ratio", *head]) + r" \\",
                r"\hline",
            ]
        classifier = key[0]
        figures = [cell.partition(" (") for cell in line[3:8]]
        values, limits = [value for value, _, _ in figures], [gap.strip() + rest for _, gap, rest in figures]
        row, told = result.rows[key], _published(result, key)
        lack = f"{row.n_missing} of {count(row.n_expected, 'cell')} missing" if row.n_missing else ""
        texts = [[line[1], line[2], *values], [lack, "", *limits]]
        if told:
            texts.append(["published", "", *told.text().split(" / "), "", ""])
        for one in texts:
            cells = [tex_text(cell) for cell in one]
            cells[0] = r"\raggedright " + cells[0].replace("+", r"+\allowbreak{}")
            lines.append(" & ".join(cells) + r" \\")
    folds = f"{count(study.folds.k, 'fold')} x {count(study.folds.repeats, 'repeat')}"
    note = f"On {result.patients_line}; {folds}. {INTERVALS}"
    if any(_published(result, key) for key in result.rows):
        note += f" {WARNING_SHORT}"
    return "\n".join([*lines, r"\hline", r"\end{tabular}\par\smallskip", rf"\noindent {tex_text(note)}\par}}", ""])


# ------------------------------------------------------------------------------------------------- terminal


def summary_text(result: Result, warned: str) -> str:
    """The main table for a terminal, aligned, the answer, and what is missing. warned: how many trainings did."""
    header = ["classifier", "arm", "ratio", "accuracy %", "sens %", "spec %", "AUC", "published %"]
    lines = []
    for key, row in result.rows.items():
        told = _published(result, key)
        cells = [key[0], key[1], f"{key[2]:g}", figure_text("accuracy", row.figures["accuracy"], "-")]
        cells += [metric_text(m, row.figures[m].value) for m in ("sensitivity", "specificity", "auc")]
        lack = f"  {row.n_missing} missing" if row.n_missing else ""
        cells.append((told.text().split(" /")[0] if told else "") + lack)
        lines.append([cell.replace(NONE, "-") for cell in cells])
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def aligned(line: list[str]) -> str:
        left = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join([*left[:-1], line[-1] if line is not header else left[-1]]).rstrip()

    parts = [aligned(header), *(aligned(line) for line in lines), "", result.question, result.answer]
    parts += [f"on {result.patients_line}", *(f"! {warning}" for warning in result.warnings)]
    parts += [f"! {warned}: see Warnings while training on the page"] if warned else []
    return printable("\n".join(parts))
