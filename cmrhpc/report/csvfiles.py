"""The CSV files of a report, all from one `Result`. Rates are fractions; what is undefined is empty."""

from __future__ import annotations

from cmrhpc.csvtext import Cell, to_csv
from cmrhpc.names import METRICS
from cmrhpc.report.published import published
from cmrhpc.report.result import Result, best_text
from cmrhpc.report.rows import RATES

TABLE = (
    "classifier",
    "arm",
    "ratio",
    *METRICS,
    *(f"{m}_{end}" for m in METRICS for end in ("low", "high")),
    "n_folds",
    "n_repeats",
    "n_missing",
    "published_accuracy",
    "published_sensitivity",
    "published_specificity",
)


def table_csv(result: Result) -> str:
    lines = []
    for key, row in result.rows.items():
        told = published(key, len(result.collection.study.classes))
        figures = [row.figures[m] for m in METRICS]
        lines.append(
            [
                *key,
                *(f.value for f in figures),
                *(x for f in figures for x in (f.low, f.high)),
                row.n_folds,
                row.n_repeats,
                row.n_missing,
                *((told.accuracy, told.sensitivity, told.specificity) if told else (None, None, None)),
            ]
        )
    return to_csv(TABLE, lines)


def folds_csv(result: Result) -> str:
    """One line per expected cell; missing ones with the reason."""
    header = ("classifier", "arm", "ratio", "repeat", "fold", "state", "n_images", "n_patients", *METRICS, "best_step")
    found = {(key, f.repeat, f.fold): f for key, row in result.rows.items() for f in row.folds}
    lines: list[list[Cell]] = []
    for task in result.collection.expected:
        place = ((task.classifier, task.arm, task.ratio), task.repeat, task.fold)
        start: list[Cell] = [task.classifier, task.arm, task.ratio, task.repeat, task.fold]
        if place in found:
            f = found[place]
            lines.append([*start, "found", f.n_images, f.n_patients, *(f.values[m] for m in METRICS), f.best_step])
        else:
            reason = f"missing: {result.collection.missing[task.output]}"
            lines.append([*start, reason, None, None, *(None for _ in METRICS), None])
    return to_csv((*header,), lines)


def patients_csv(result: Result) -> str:
    """One prediction per patient: mean score over the patient's images and all repeats."""
    names = result.collection.patients
    k = len(result.collection.study.classes)
    header = ("classifier", "arm", "ratio", "patient", "label", "predicted", "n_images", "n_predictions")
    lines: list[list[Cell]] = []
    for key, row in result.rows.items():
        if row.patients is None:
            continue
        units = row.patients
        per = (units.patient, units.label, units.predicted, units.n_images, units.n_predictions, units.score)
        for patient, label, predicted, images, predictions, score in zip(*(v.tolist() for v in per), strict=True):
            lines.append([*key, names[patient], label, predicted, images, predictions, *score])
    return to_csv((*header, *(f"score_{i}" for i in range(k))), lines)


COMPARISON = (
    "classifier",
    "arm",
    "ratio",
    "versus",
    "metric",
    "difference",
    "low",
    "high",
    "p_corrected_t",
    "p_mcnemar",
    "p_holm",
)


def comparisons_csv(result: Result) -> str:
    """p_holm is empty for the primary comparison, which stands alone."""
    lines: list[list[Cell]] = [
        [*c.key, c.versus, c.metric, c.difference, c.low, c.high, c.p_corrected_t, c.p_mcnemar, c.p_holm]
        for c in result.comparisons
    ]
    return to_csv(COMPARISON, lines)


def comparison_details_csv(result: Result) -> str:
    """What else is known of each comparison: role, cells and patients that it rests on, DeLong, discordant patients.

    mean_fold_difference over n_tested cells is what p_corrected_t tests; difference is of the pooled values.
    """
    header = (
        *COMPARISON[:5],
        "role",
        "n_common",
        "n_left_out",
        "n_patients",
        "only_arm_right",
        "only_versus_right",
        "p_delong",
        "mean_fold_difference",
        "n_tested",
    )
    lines = [
        [
            *c.key,
            c.versus,
            c.metric,
            "primary" if c.primary else "exploratory",
            c.n_common,
            c.n_left_out,
            c.n_patients,
            c.only_arm_right,
            c.only_versus_right,
            c.p_delong,
            c.mean_fold_difference,
            c.n_tested,
        ]
        for c in result.comparisons
    ]
    return to_csv(header, lines)


def best_ratio_csv(result: Result) -> str:
    """Metrics when the ratio of each fold and repeat is chosen on validation patients, and one difference.

    The difference is of `metric`, the primary one, to the arm `versus`, on the cells that both have; no p is corrected.
    """
    limits_of = (f"{m}_{end}" for m in METRICS for end in ("low", "high"))
    difference_of = ("versus", "metric", "difference", "difference_low", "difference_high", "p_corrected_t")
    header = ("classifier", "arm", "chosen", "n_common", "n_left_out", *METRICS, *limits_of, *difference_of)
    lines: list[list[Cell]] = []
    for b in result.best:
        figures, c = [b.row.figures[m] for m in METRICS], b.versus
        limits = [x for f in figures for x in (f.low, f.high)]
        chosen: list[Cell] = [*b.row.key[:2], best_text(b), len(b.row.folds), b.row.n_missing]
        difference: list[Cell] = [c.versus, c.metric, c.difference, c.low, c.high, c.p_corrected_t]
        lines.append([*chosen, *(f.value for f in figures), *limits, *difference])
    return to_csv(header, lines)


def classes_csv(result: Result) -> str:
    """Per class precision, recall, F1, and the confusion counts (predicted as class 0, 1, ...) as means over repeats.

    For more than two classes. The rates are those of the counts: a class that is called once in one repeat has no
    precision of 1 from it.
    """
    classes = result.collection.study.classes
    limits_of = (f"{rate}_{end}" for rate in RATES for end in ("low", "high"))
    predicted = (f"predicted_{i}" for i in range(len(classes)))
    lines: list[list[Cell]] = []
    for key, row in result.rows.items():
        for i, name in enumerate(classes):
            figures = [row.per_class[rate][i] for rate in RATES]
            limits = [x for f in figures for x in (f.low, f.high)]
            lines.append([*key, i, name, *(f.value for f in figures), *limits, *row.counts[i].tolist()])
    return to_csv(("classifier", "arm", "ratio", "label", "class", *RATES, *limits_of, *predicted), lines)
