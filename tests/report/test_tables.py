"""The tables against scikit-learn, and against each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import h5py
import markdown_it
import numpy as np
import pytest
from sklearn import metrics as sk

from cmrhpc.report import tables
from cmrhpc.report.aggregate import AggregateResult, aggregate, terminal_table
from cmrhpc.report.published import FIGURES
from tests.report import made
from tests.report.made import read_csv, visible_text

METRICS = ("accuracy", "sensitivity", "specificity", "balanced_accuracy", "auc")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> AggregateResult:
    """Two classifiers; one cell of dae-gan at ratio 3 and the whole of affine are missing."""
    root = tmp_path_factory.mktemp("made")
    study = made.study(
        arms="none affine dae-gan:0,1,3 dae-gan+affine:1,3 dae-gan+simgan:4", classifiers="resnet50 xception"
    )
    one = made.cohort(study)

    def skip(task) -> bool:
        lost = (task.arm, task.ratio, task.fold, task.repeat, task.classifier) == ("dae-gan", 3, 1, 0, "resnet50")
        return task.arm == "affine" or lost

    made.write(root, study, one, made.noisy_scores(one.label, 2, {"none": 0.5}), skip)
    return aggregate(root)


def test_table_has_the_columns_of_the_contract(report: AggregateResult) -> None:
    header = (report.folder / "table.csv").read_text().splitlines()[0].split(",")
    assert header == [
        *("classifier", "arm", "ratio", *METRICS),
        *(f"{m}_{end}" for m in METRICS for end in ("low", "high")),
        *("n_folds", "n_repeats", "n_missing"),
        *("published_accuracy", "published_sensitivity", "published_specificity"),
    ]
    header = (report.folder / "comparisons.csv").read_text().splitlines()[0]
    assert header == "classifier,arm,ratio,versus,metric,difference,low,high,p_corrected_t,p_mcnemar,p_holm"
    rows = [(r["classifier"], r["arm"], r["ratio"]) for r in read_csv(report.folder / "table.csv")]
    arms = [("none", "0.0"), ("affine", "0.0"), ("dae-gan", "1.0"), ("dae-gan", "3.0")]
    arms += [("dae-gan+affine", "1.0"), ("dae-gan+affine", "3.0"), ("dae-gan+simgan", "4.0")]
    assert rows == [(c, *arm) for c in ("resnet50", "xception") for arm in arms]


def test_table_agrees_with_scikit_learn_on_the_stored_predictions(report: AggregateResult) -> None:
    predictions = report.folder.parent / "predictions"
    compared = 0
    for row in read_csv(report.folder / "table.csv"):
        place = predictions / row["arm"] / f"ratio{float(row['ratio']):g}" / row["classifier"]
        found: dict[str, list[float]] = {name: [] for name in METRICS}
        sizes = []
        for repeat in range(2):
            parts = []
            for path in sorted(place.glob(f"fold*_repeat{repeat}.h5")):
                with h5py.File(path) as file:
                    parts.append((file["label"][()], file["score"][()]))
            if not parts:
                continue
            label, score = (np.concatenate(values) for values in zip(*parts, strict=True))
            predicted = score.argmax(1)
            sizes.append({name: len(label) for name in METRICS})
            sizes[-1] |= {"sensitivity": (label == 1).sum(), "specificity": (label == 0).sum()}
            found["accuracy"].append(sk.accuracy_score(label, predicted))
            found["sensitivity"].append(sk.recall_score(label, predicted))
            found["specificity"].append(sk.recall_score(label, predicted, pos_label=0))
            found["balanced_accuracy"].append(sk.balanced_accuracy_score(label, predicted))
            found["auc"].append(sk.roc_auc_score(label, score[:, 1]))
        for name in METRICS:
            if row["arm"] == "affine":
                assert row[name] == row[f"{name}_low"] == ""
                continue
            expected = np.average(found[name], weights=[size[name] for size in sizes])
            if name == "balanced_accuracy":
                expected = (float(row["sensitivity"]) + float(row["specificity"])) / 2
            assert float(row[name]) == pytest.approx(expected, abs=1e-12)
            assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
            compared += 1
    assert compared == 12 * 5


def test_accuracy_is_the_prevalence_weighted_mean_on_every_row(report: AggregateResult) -> None:
    """Also where folds are missing: the prevalence is that of the images which the row tests."""
    lacking = set()
    for key, row in report.result.rows.items():
        if not row.folds:
            continue
        labels = np.concatenate([cell.images.label for cell in report.result.collection.cells[key].values()])
        share, value = labels.mean(), {name: figure.value for name, figure in row.figures.items()}
        weighted = value["sensitivity"] * share + value["specificity"] * (1 - share)
        assert value["accuracy"] == pytest.approx(weighted, abs=1e-12)
        lacking |= {key} if row.n_missing else set()
    assert lacking == {("resnet50", "dae-gan", 3.0)}


def test_missing_cells_are_counted_and_listed(report: AggregateResult) -> None:
    counted = {(r["classifier"], r["arm"], r["ratio"]): r for r in read_csv(report.folder / "table.csv")}
    assert {key for key, r in counted.items() if r["n_missing"] != "0"} == {
        ("resnet50", "affine", "0.0"),
        ("xception", "affine", "0.0"),
        ("resnet50", "dae-gan", "3.0"),
    }
    lost = counted["resnet50", "dae-gan", "3.0"]
    assert (lost["n_folds"], lost["n_repeats"], lost["n_missing"]) == ("3", "2", "1")
    empty = counted["xception", "affine", "0.0"]
    assert (empty["n_folds"], empty["n_repeats"], empty["n_missing"]) == ("0", "0", "6")
    folds = read_csv(report.folder / "folds.csv")
    assert len(folds) == report.result.n_expected == 14 * 6
    assert sum(f["state"] == "missing: not computed" for f in folds) == report.result.n_missing == 13
    page = (report.folder / "index.html").read_text()
    assert "13 cells of 84 missing" in page
    assert "dae-gan/ratio3/resnet50/fold1_repeat0" in page


def test_folds_are_those_of_the_shards(report: AggregateResult) -> None:
    for row in read_csv(report.folder / "folds.csv"):
        if row["state"] != "found":
            continue
        place = (
            f"{row['arm']}/ratio{float(row['ratio']):g}/{row['classifier']}/fold{row['fold']}_repeat{row['repeat']}.h5"
        )
        with h5py.File(report.folder.parent / "predictions" / place) as file:
            label, score = file["label"][()], file["score"][()]
            assert int(row["n_patients"]) == len(set(file["patient"][()].tolist()))
        assert float(row["accuracy"]) == pytest.approx(sk.accuracy_score(label, score.argmax(1)), abs=1e-12)
        assert (int(row["n_images"]), row["best_step"]) == (len(label), "200")


def test_patients_are_means_over_images_and_repeats(report: AggregateResult) -> None:
    root, sums = report.folder.parent / "predictions", {}
    for path in (root / "none").rglob("*.h5"):
        with h5py.File(path) as file:
            for patient, score in zip(file["patient"][()].tolist(), file["score"][()], strict=True):
                sums.setdefault((path.parent.name, patient.decode()), []).append(score)
    rows = [r for r in read_csv(report.folder / "patients.csv") if r["arm"] == "none"]
    assert len(rows) == 2 * 24
    for row in rows:
        scores = sums[row["classifier"], row["patient"]]
        assert float(row["score_1"]) == pytest.approx(np.mean(scores, axis=0)[1], abs=1e-12)
        assert int(row["n_predictions"]) == len(scores) == 2 * int(row["n_images"])
        assert int(row["predicted"]) == int(float(row["score_1"]) > float(row["score_0"]))


def test_published_figures_stand_beside_their_arms(report: AggregateResult) -> None:
    table = {(r["classifier"], r["arm"], float(r["ratio"])): r for r in read_csv(report.folder / "table.csv")}
    shown = {key for key, row in table.items() if row["published_accuracy"]}
    arms = (("none", 0), ("affine", 0), ("dae-gan", 3), ("dae-gan+simgan", 4))
    assert shown == set(table) & set(FIGURES) == {(c, *arm) for c in ("resnet50", "xception") for arm in arms}
    first = table["resnet50", "none", 0.0]
    assert [first[f"published_{m}"] for m in METRICS[:3]] == ["0.7767", "0.9674", "0.6964"]
    refined = table["xception", "dae-gan+simgan", 4.0]
    assert [refined[f"published_{m}"] for m in METRICS[:3]] == ["0.88", "", ""]
    for name in ("index.html", "table.md"):
        text = (report.folder / name).read_text()
        assert "no published row that prints all three agrees" in text
        assert "0.8974 or 0.7664" in text
        assert "private T1 maps of the heart" in text
        assert "Every repeat of ours is computed from stored per-image predictions and passes it" in text


def test_page_csv_markdown_and_latex_agree(report: AggregateResult) -> None:
    page = visible_text((report.folder / "index.html").read_text())
    markdown = (report.folder / "table.md").read_text()
    latex = (report.folder / "table.tex").read_text()
    terminal = terminal_table(report.folder.parent)
    for row in read_csv(report.folder / "table.csv"):
        start = f"{row['arm']} {float(row['ratio']):g} "
        cells = []
        for name in METRICS:
            digits = (lambda v: f"{v:.3f}") if name == "auc" else (lambda v: f"{100 * v:.1f}")
            if row[name]:
                value, low, high = (digits(float(row[name + end])) for end in ("", "_low", "_high"))
                cells.append(f"{value} ({low}–{high})")
            else:
                cells.append("–")
        assert start + " ".join(cells) in page
        assert f"| {row['classifier']} | {row['arm']} | {float(row['ratio']):g} | {' | '.join(cells)} |" in markdown
        values, limits = ([cell.partition(" ")[i] for cell in cells] for i in (0, 2))
        arm = row["arm"].replace("+", "+\\allowbreak{}")
        assert (
            f"\\raggedright {arm} & {float(row['ratio']):g} & {' & '.join(values)} \\\\\n".replace("–", "--") in latex
        )
        assert f" &  & {' & '.join(limits)} \\\\\n".replace("–", "--") in latex
        assert re.search(re.escape(row["arm"]) + r" .*" + re.escape(cells[0].replace("–", "-")), terminal)
    for row in read_csv(report.folder / "comparisons.csv"):
        if row["metric"] != "accuracy" or not row["difference"]:
            continue
        ratio = f" at ratio {float(row['ratio']):g}" if float(row["ratio"]) else ""
        difference, low, high = (100 * float(row[n]) for n in ("difference", "low", "high"))
        assert f"{row['arm']}{ratio} {row['versus']} {difference:+.1f} {low:.1f} to {high:.1f}" in page
        assert f"| {row['versus']} | accuracy | {difference:+.1f} | {low:.1f} to {high:.1f} |" in markdown


def test_latex_is_balanced_and_escaped(report: AggregateResult) -> None:
    latex = (report.folder / "table.tex").read_text()
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert [line for line in body if "begin{" in line] == [r"\noindent\begin{tabular}{p{24mm}rrrrrr}"] * 2
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    rows = [line for line in body if line.endswith(r"\\")]
    assert len(rows) == 2 * (2 + 2 * 7 + 4)  # two lines of head, two lines per arm, four of them with published figures
    assert {line.count("&") for line in rows if "multicolumn" not in line} == {6}
    assert not re.search(r"(?<!\\)[%#_]", "\n".join(body))
    assert latex.isascii()
    assert tables.tex_text(r"a_b & 50% {\x} #1 $2 ~^ <é> 心") == (
        r"a\_b \& 50\% \{\textbackslash{}x\} \#1 \$2 \textasciitilde{}\textasciicircum{} $<$é$>$ ?"
    )


def test_latex_compiles_within_the_text_width_of_a4(report: AggregateResult, tmp_path: Path) -> None:
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex on this machine: Debian has it in texlive-latex-base")
    text = (report.folder / "table.tex").read_text() + tables.tex_text('\\ & % $ # _ { } ~ ^ < > – " | é 心')
    (tmp_path / "t.tex").write_text(
        rf"\documentclass[a4paper]{{article}}\begin{{document}}{text}\typeout{{END}}\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert not re.search(r"^!", done.stdout, flags=re.M)
    assert "Overfull" not in done.stdout


def test_the_printed_latex_tells_patients_intervals_and_what_published_means(report: AggregateResult) -> None:
    printed = "\n".join(x for x in (report.folder / "table.tex").read_text().splitlines() if not x.startswith("%"))
    assert "On 9 patients of class normal" in printed
    assert r"Intervals: 95 \%, patients resampled" in printed
    assert "those that print all three fail the accuracy identity" in printed
    assert r"\raggedright published &  & 77.67 & 96.74 & 69.64 &  &  \\" in printed
    assert r"\raggedright published &  & 86.1 & -- & -- &  &  \\" in printed
    assert r"\raggedright 1 of 6 cells missing & " in printed


def test_markdown_renders_as_tables(report: AggregateResult) -> None:
    text = (
        (report.folder / "table.md").read_text()
        + "\n\n| a |\n|---|\n| "
        + tables.markdown_text("x|y <b>*z*</b>")
        + " |\n"
    )
    rendered = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    parts = rendered.split("<table>")[1:]
    rows = [[len(re.findall(r"<t[hd]", row)) for row in part.split("<tr>")[1:]] for part in parts]
    comparisons = sum(c.metric == "accuracy" for c in report.result.comparisons)  # the primary metric
    assert comparisons * 5 == len(report.result.comparisons)
    assert "Those of the other metrics: comparisons.csv." in rendered
    assert rows == [[11] * 15, [11] * (1 + comparisons), [10] * (1 + len(report.result.best)), [1, 1]]
    assert "<td>x|y &lt;b&gt;*z*&lt;/b&gt;</td>" in parts[-1]
