"""The tables against scikit-learn, against truth that was planted, and against each other."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import h5py
import markdown_it
import numpy as np
import pytest
from scipy import stats
from scipy.special import betainc
from sklearn import metrics as sk

from cmrhpc.csvtext import csv_cell
from cmrhpc.measure import statistics
from cmrhpc.report import tables
from cmrhpc.report.aggregate import AggregateResult, aggregate, terminal_table
from cmrhpc.report.collect import collect
from cmrhpc.report.published import FIGURES
from cmrhpc.report.result import evaluate, figure_text, limit_text, p_text, ratio_arms
from cmrhpc.report.rows import Evaluator, share_limits
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
        pytest.skip("no LaTeX on this machine")
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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((sign + "1+1", "'" + sign + "1+1") for sign in "=+-@\t\r"),
        ("none", "none"),
        (-0.25, "-0.25"),
        (0.1 + 0.2, "0.30000000000000004"),
        (np.float64(0.5), "0.5"),
        (math.nan, ""),
        (None, ""),
        (3, "3"),
        (np.int64(3), "3"),
        (np.float32(0.5), "0.5"),
        (math.inf, ""),
    ],
)
def test_csv_cells_are_exact_and_run_no_formula(value, text: str) -> None:
    assert csv_cell(value) == text


def planted(tmp_path: Path, right, **options) -> list[dict[str, str]]:
    """table.csv of a study in which `right(task, rows)` says which images are read rightly, with score .9."""
    study = made.study(arms="none dae-gan:3", **options)
    one = made.cohort(study, patients=(10, 10), images=1)

    def scores(task, rows):
        p = np.where(right(task, rows), 0.9, 0.1)
        return np.where(one.label[rows, None] == 1, np.c_[1 - p, p], np.c_[p, 1 - p])

    made.write(tmp_path, study, one, scores)
    aggregate(tmp_path)
    return read_csv(tmp_path / "report" / "table.csv")


def test_planted_truth_comes_out(tmp_path: Path) -> None:
    """none reads 5 of the 20 patients wrongly (2 normal, 3 diseased), dae-gan reads all rightly."""
    wrong = (0, 1, 10, 11, 12)
    none, gan = planted(tmp_path, lambda task, rows: (task.arm != "none") | ~np.isin(rows, wrong))
    assert [float(none[m]) for m in METRICS[:4]] == pytest.approx([0.75, 0.7, 0.8, 0.75], abs=1e-12)
    assert [float(gan[m]) for m in METRICS] == [1.0] * 5
    # All patients right: no resample differs, so the limits are exact ones over 20, 10 and 10 patients.
    assert float(gan["accuracy_low"]) == pytest.approx(0.025 ** (1 / 20), abs=1e-12)
    assert float(gan["sensitivity_low"]) == pytest.approx(0.025 ** (1 / 10), abs=1e-12)
    ten = 0.025 ** (1 / 10)
    assert float(gan["balanced_accuracy_low"]) == pytest.approx(1 - math.hypot(1 - ten, 1 - ten) / 2, abs=1e-12)
    # Ten pairs of patients, all ranked rightly.
    assert float(gan["auc_low"]) == pytest.approx(ten, abs=1e-12)
    assert (gan["balanced_accuracy_high"], gan["auc_high"]) == ("1.0", "1.0")
    comparison = next(c for c in read_csv(tmp_path / "report" / "comparisons.csv") if c["metric"] == "accuracy")
    assert float(comparison["difference"]) == pytest.approx(0.25, abs=1e-12)
    assert float(comparison["p_mcnemar"]) == pytest.approx(2 / 2**5, abs=1e-12)
    assert comparison["p_holm"] == ""
    details = read_csv(tmp_path / "report" / "comparison_details.csv")[0]
    assert (details["role"], details["only_arm_right"], details["only_versus_right"]) == ("primary", "5", "0")


def test_a_rate_next_to_0_or_1_has_no_narrower_interval_than_one_that_is_there(tmp_path: Path) -> None:
    """6 normal patients with 20 images each, one of the 120 called normal: specificity 0.8 % is as good as 0 %."""
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study, patients=(6, 24), images=1)
    rows = np.r_[np.repeat(np.arange(6), 20), np.arange(6, 30)]
    one.patient, one.label = one.patient[rows], one.label[rows]
    one.split = {key: tuple(mask[rows] for mask in masks) for key, masks in one.split.items()}
    one.ids = np.array([f"r{i + 1:06d}" for i in range(len(rows))])

    def scores(task, rows):
        p = np.where((rows == 0) & (task.arm == "dae-gan"), 0.1, 0.9)
        return np.c_[1 - p, p]

    made.write(tmp_path, study, one, scores)
    none, gan = evaluate(collect(tmp_path)).rows.values()
    limits = {row.key[1]: {m: (f.low, f.high) for m, f in row.figures.items()} for row in (none, gan)}
    assert none.figures["specificity"].value == 0
    assert gan.figures["specificity"].value == pytest.approx(1 / 120)
    assert limits["none"]["specificity"] == (0.0, pytest.approx(1 - 0.025 ** (1 / 6), abs=1e-12))
    # 0.05 of 6 patients: the tails of Clopper-Pearson between whole numbers.
    low, high = limits["dae-gan"]["specificity"]
    assert high > limits["none"]["specificity"][1]
    assert betainc(0.05 + 1, 6 - 0.05, high) == pytest.approx(0.975, abs=1e-9)
    assert 0 <= low < 1e-12
    # Balanced accuracy: the mean of two rates of different patients, each with its own limits.
    expected = (0.5 - (1 - 0.025 ** (1 / 24)) / 2, 0.5 + (1 - 0.025 ** (1 / 6)) / 2)
    assert limits["none"]["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)
    assert limits["dae-gan"]["balanced_accuracy"][1] > 0.72
    assert figure_text("specificity", gan.figures["specificity"]) == "0.8 (0.0–47.0)"


def test_the_interval_of_a_rate_covers_close_to_1_where_a_bootstrap_does_not() -> None:
    """77 patients of one image, each read rightly with chance 0.95: coverage, summed over all counts."""
    n, p, covered, bootstrap = 77, 0.95, 0.0, 0.0
    for right in range(n + 1):
        drawn = np.random.default_rng(right).binomial(n, right / n, 2000) / n
        low, high = share_limits(right / n, drawn, n)
        chance = stats.binom.pmf(right, n, p)
        covered += chance * (low <= p <= high)
        alone = statistics.interval(drawn, n)
        bootstrap += chance * (alone[0] <= p <= alone[1])
    assert bootstrap < 0.93
    assert covered >= 0.95


def test_equal_scores_count_as_the_negative_class(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)
    made.write(tmp_path, study, one, lambda task, rows: np.full((len(rows), 2), 0.5))
    result = aggregate(tmp_path)
    for row in read_csv(tmp_path / "report" / "table.csv"):
        assert [float(row[m]) for m in METRICS[1:]] == [0.0, 1.0, 0.5, 0.5]
    assert "0.0 points accuracy" in result.result.answer
    assert "not distinguishable from no effect (p = 1.000)" in result.result.answer


def test_one_class_folds_leave_blanks_and_the_pooled_value_whole(tmp_path: Path) -> None:
    """Three normal patients in five folds: in some folds nobody is normal."""
    study = made.study(arms="none dae-gan:3", k=5)
    one = made.cohort(study, patients=(3, 12))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    result = aggregate(tmp_path)
    folds = read_csv(tmp_path / "report" / "folds.csv")
    blank = [f for f in folds if f["specificity"] == ""]
    assert len(blank) == 2 * 2 * 2
    assert all(f["auc"] == f["balanced_accuracy"] == "" and f["sensitivity"] == f["accuracy"] for f in blank)
    assert all(row["specificity"] for row in read_csv(tmp_path / "report" / "table.csv"))
    assert any("Only 3 patients of class normal" in w for w in result.result.warnings)


def test_a_cohort_of_one_class_has_no_specificity(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study, patients=(0, 12))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    aggregate(tmp_path)
    row = read_csv(tmp_path / "report" / "table.csv")[0]
    assert (row["specificity"], row["balanced_accuracy"], row["auc"]) == ("", "", "")
    assert row["sensitivity"] == row["accuracy"] != ""


def test_a_perfect_multi_class_arm_has_exact_limits(tmp_path: Path) -> None:
    """No resample of it differs, so without them accuracy, recalls and AUC had no interval at all."""
    study = made.study(arms="none dae-gan:3", classes=("a", "b", "c"))
    one = made.cohort(study, patients=(5, 6, 7))
    made.write(tmp_path, study, one, lambda task, rows: np.eye(3)[one.label[rows]])
    row = evaluate(collect(tmp_path)).rows["resnet50", "none", 0.0]
    assert (row.figures["accuracy"].low, row.figures["accuracy"].high) == (pytest.approx(0.025 ** (1 / 18)), 1)
    recall = [1 - 0.025 ** (1 / n) for n in (5, 6, 7)]
    assert [1 - f.low for f in row.per_class["recall"]] == pytest.approx(recall)
    assert [1 - f.low for f in row.per_class["precision"]] == pytest.approx(recall)
    for name in ("sensitivity", "balanced_accuracy"):
        assert row.figures[name].low == pytest.approx(1 - math.hypot(*recall) / 3)
    assert (row.figures["auc"].low, row.figures["auc"].high) == (pytest.approx(0.025 ** (1 / 5)), 1)
    assert math.isnan(row.figures["specificity"].low)


def test_a_recall_rests_on_the_patients_of_the_class_and_a_precision_on_those_called_so(tmp_path: Path) -> None:
    """One of 20 patients of class a is called b. So close to 1 the lower limits are those of Clopper and Pearson."""
    study = made.study(arms="none dae-gan:3", classes=("a", "b", "c"))
    one = made.cohort(study, patients=(20, 20, 20))
    called = np.where(one.patient == one.patient[0], 1, one.label)
    made.write(tmp_path, study, one, lambda task, rows: np.eye(3)[called[rows]])
    row = evaluate(collect(tmp_path)).rows["resnet50", "none", 0.0]
    for name, label, counted, patients in (("recall", 0, one.label, 20), ("precision", 1, called, 21)):
        among = counted == label
        right = (called == one.label)[among].mean() * patients
        assert len(set(one.patient[among])) == patients < among.sum()
        assert 0.9 * patients < right < patients
        low = stats.beta.ppf(0.025, right, patients - right + 1)
        assert row.per_class[name][label].low == pytest.approx(low, abs=1e-9)


def test_multi_class_studies_add_per_class_figures(tmp_path: Path) -> None:
    classes = ("=nv", "mel|a", "<b>bcc</b>")
    study = made.study(arms="none dae-gan:3", classes=classes)
    one = made.cohort(study, patients=(8, 8, 9))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 3, {}))
    aggregate(tmp_path)
    rows = read_csv(tmp_path / "report" / "classes.csv")
    assert [row["class"] for row in rows] == ["'=nv", "mel|a", "<b>bcc</b>"] * 2
    parts = []
    for path in sorted((tmp_path / "predictions" / "none").rglob("*.h5")):
        with h5py.File(path) as file:
            parts.append((file["label"][()], file["score"][()].argmax(1)))
    label, predicted = (np.concatenate(values) for values in zip(*parts, strict=True))
    expected, counts = sk.precision_recall_fscore_support(label, predicted), sk.confusion_matrix(label, predicted)
    for i, row in enumerate(rows[:3]):
        for j, name in enumerate(("precision", "recall", "f1")):
            assert float(row[name]) == pytest.approx(expected[j][i], abs=1e-12)
        found = [float(row[f"predicted_{k}"]) for k in range(3)]
        assert found == pytest.approx((counts[i] / 2).tolist(), abs=1e-12)
    row = evaluate(collect(tmp_path)).rows["resnet50", "none", 0.0]
    text = figure_text("recall", row.per_class["recall"][0])
    assert [float(rows[0][f"recall_{end}"]) for end in ("low", "high")] == [
        getattr(row.per_class["recall"][0], end) for end in ("low", "high")
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert f">{text}</td>" in page
    assert "<h3>ROC curves</h3>" in page
    assert "&lt;b&gt;bcc&lt;/b&gt;" in page
    assert "<b>bcc" not in page
    assert "published row" not in page


def test_a_class_called_once_rightly_has_no_precision_from_that_repeat_alone(tmp_path: Path) -> None:
    """Of 8 images of class 2 one is called so, in repeat 0, and 3 of class 1 are, in repeat 1: precision 1 of 4."""
    study = made.study(arms="none dae-gan:3", classes=("a", "b", "c"))
    one = made.cohort(study, patients=(8, 8, 8), images=1)

    def scores(task, rows):
        called = np.zeros(len(rows), int)
        called[rows == 16 if task.repeat == 0 else np.isin(rows, (8, 9, 10))] = 2
        return np.eye(3)[called]

    made.write(tmp_path, study, one, scores)
    aggregate(tmp_path)
    row = read_csv(tmp_path / "report" / "classes.csv")[2]
    assert [float(row[name]) for name in ("precision", "recall", "f1")] == [0.25, 1 / 16, 0.1]


def test_a_repeat_with_missing_folds_is_weighted_by_what_a_metric_counts_there(tmp_path: Path) -> None:
    """Repeat 0 is whole and all right, of repeat 1 one fold is there and all wrong."""
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)

    def scores(task, rows):
        return np.eye(2)[one.label[rows] if task.repeat == 0 else 1 - one.label[rows]]

    made.write(tmp_path, study, one, scores, skip=lambda task: task.repeat == 1 and task.fold > 0)
    evaluator = Evaluator(collect(tmp_path))
    row = evaluator.row(("resnet50", "none", 0.0))
    part = one.split[1, 0][2]
    owner = np.unique(one.patient, return_inverse=True)[1]
    for metric, counted in (
        ("accuracy", one.label >= 0),
        ("sensitivity", one.label == 1),
        ("specificity", one.label == 0),
    ):
        expected = counted.sum() / (counted.sum() + (counted & part).sum())
        assert row.figures[metric].value == pytest.approx(expected, abs=1e-12)
        weight = evaluator.weights[:5][:, owner]  # of each image in each resample
        drawn = weight[:, counted].sum(1) / (weight[:, counted].sum(1) + weight[:, counted & part].sum(1))
        assert row.pooled is not None
        assert row.pooled.drawn[metric][:5] == pytest.approx(drawn, abs=1e-12)
    expected = len(one.ids) / (len(one.ids) + part.sum())
    assert row.figures["auc"].value == pytest.approx(expected, abs=1e-12)
    page = visible_text((aggregate(tmp_path).folder / "index.html").read_text())
    assert (
        "a repeat with missing folds is weighted by its number of test images, for sensitivity by the positive" in page
    )


def test_a_curve_begins_at_the_arm_without_synthetic_images(tmp_path: Path) -> None:
    study = made.study(arms="none affine dae-gan:1,3 dae-gan+affine:1,3")
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {"affine": 2.0}))
    result = evaluate(collect(tmp_path))
    for arm, curve in ratio_arms(result)["resnet50"]:
        base = "affine" if arm.endswith("+affine") else "none"
        assert [ratio for ratio, _ in curve] == [0.0, 1.0, 3.0]
        assert curve[0][1] is result.rows["resnet50", base, 0.0]


def test_names_cannot_move_the_cursor_of_a_terminal(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3", classes=("normal \u202e", "d\u009bisease"))
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    aggregate(tmp_path)
    assert all(c.isprintable() or c == "\n" for c in terminal_table(tmp_path))


def test_a_figure_without_interval_says_so() -> None:
    from cmrhpc.report.rows import Figure

    assert figure_text("accuracy", Figure(0.5)) == "50.0 (no interval)"
    assert figure_text("auc", Figure(math.nan)) == "–"
    assert figure_text("auc", Figure(0.91234, 0.8, 1.0)) == "0.912 (0.800–1.000)"


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0497, "0.0497"),
        (0.0495, "0.0495"),
        (0.04999, "0.04999"),
        (0.0494, "0.049"),
        (0.05, "0.050"),
        (0.0503, "0.050"),
        (0.0009, "<0.001"),
        (1.0, "1.000"),
        (math.nan, "–"),
    ],
)
def test_a_printed_p_lies_on_the_side_of_the_level_that_decided(p: float, text: str) -> None:
    assert p_text(p) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0003, "0.03"),
        (-0.0003, "-0.03"),
        (0.00002, "0.002"),
        (0.0, "0.0"),
        (-0.0, "0.0"),
        (0.0006, "0.1"),
        (-0.1, "-10.0"),
    ],
)
def test_a_printed_limit_is_0_where_the_limit_is_0_and_nowhere_else(value: float, text: str) -> None:
    assert limit_text(value) == text


def test_intervals_do_not_depend_on_what_else_the_study_holds(tmp_path: Path) -> None:
    """The same patients are drawn for every arm: taking an arm away changes no other row."""
    study = made.study()
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    whole = evaluate(collect(tmp_path)).rows
    (tmp_path / "study.toml").write_text(made.toml(arms="none dae-gan:3"))
    fewer = evaluate(collect(tmp_path)).rows
    assert all(whole[key].figures == row.figures for key, row in fewer.items())
