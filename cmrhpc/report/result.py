"""All results of a report in one place, and how each number is written. Tables, figures and page print from here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cmrhpc.data.table import normalised_apart
from cmrhpc.report.collect import Collection, Key
from cmrhpc.report.compare import LEVEL, BestRatio, Comparison, best_ratios, compare_all, primary_key
from cmrhpc.report.rows import Evaluator, Figure, Row
from cmrhpc.study import Primary, Study, arm_parts

NONE = "–"  # a number that is missing or undefined
METRIC_NAMES = {
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
}
FEW_PATIENTS = 10


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one aggregation found."""

    collection: Collection
    rows: dict[Key, Row]
    comparisons: list[Comparison]
    best: list[BestRatio]
    primary: Comparison
    question: str
    answer: str
    patients_line: str
    warnings: list[str]

    @property
    def n_expected(self) -> int:
        return len(self.collection.expected)

    @property
    def n_missing(self) -> int:
        return len(self.collection.missing)


def evaluate(collection: Collection) -> Result:
    """Measure all rows and comparisons of a collection."""
    evaluator = Evaluator(collection)
    rows = {key: evaluator.row(key) for key in collection.keys}
    comparisons = compare_all(evaluator, rows)
    primary = next(c for c in comparisons if c.primary)
    question, answer = answer_in_words(collection, primary, primary_key(evaluator))
    return Result(
        collection=collection,
        rows=rows,
        comparisons=comparisons,
        best=best_ratios(evaluator, rows),
        primary=primary,
        question=question,
        answer=answer,
        patients_line=patients_in_words(collection),
        warnings=warnings_of(collection),
    )


# ------------------------------------------------------------------------------------- how numbers are written


def percent(value: float | None) -> str:
    """A fraction as percent with one decimal."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def share(value: float) -> str:
    """An AUC: three decimals."""
    return f"{value:.3f}" if math.isfinite(value) else NONE


def metric_text(metric: str, value: float) -> str:
    return share(value) if metric == "auc" else percent(value)


def figure_text(metric: str, figure: Figure, dash: str = "–") -> str:
    """`84.7 (79.8–89.2)`: value and 95 % interval."""
    if not math.isfinite(figure.value):
        return NONE
    value = metric_text(metric, figure.value)
    if not math.isfinite(figure.low):
        return f"{value} (no interval)"
    return f"{value} ({metric_text(metric, figure.low)}{dash}{metric_text(metric, figure.high)})"


def points(value: float, sign: bool = False) -> str:
    """A difference of fractions in percentage points; never `-0.0`."""
    if not math.isfinite(value):
        return NONE
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def limit_text(value: float) -> str:
    """A limit of a difference in percentage points; one that is not 0 is not written as 0."""
    digits = 1
    while abs(value) > 0 and math.isfinite(value) and float(f"{100 * value:.{digits}f}") == 0:
        digits += 1
    return points(value) if digits == 1 else f"{100 * value:.{digits}f}"


def p_text(p: float) -> str:
    """Three decimals, and more where they would round a p below the level up to it."""
    if not math.isfinite(p):
        return NONE
    digits = 3
    while p < LEVEL <= float(f"{p:.{digits}f}"):
        digits += 1
    return "<0.001" if p < 0.001 else f"{p:.{digits}f}"


def arm_text(arm: str, ratio: float) -> str:
    return f"{arm} at ratio {ratio:g}" if ratio else arm


def count(n: int, word: str, words: str = "") -> str:
    """`1 fold`, `2 folds`, `6 normal patients`."""
    return f"{n:,} {word if n == 1 else words or word + 's'}"


def cells_text(n: int, left_out: int) -> str:
    """`9 cells`, or `5 of 9 cells` when some of the plan are left out."""
    return f"{n} of {count(n + left_out, 'cell')}" if left_out else count(n, "cell")


def split_units(study: Study) -> str:
    """What the study splits: `patients`, or `images`, of which a patient may have some on either side."""
    return f"{study.folds.group_by}s"


def best_text(best: BestRatio) -> str:
    """`ratio 1: 3 times, ratio 3: 22 times`, or why no ratio can be chosen."""
    if best.reason:
        return f"none can be chosen: {best.reason}"
    return ", ".join(f"ratio {ratio:g}: {count(n, 'time')}" for ratio, n in best.chosen.items() if n)


def verdict(c: Comparison) -> str:
    """The comparison in words, for one that can be made."""
    if not math.isfinite(c.difference):
        return "cannot be computed"
    if not math.isfinite(c.p_corrected_t):
        few = "no test is possible on so few folds"
        return few if c.n_tested < 2 else "all folds differ equally, no spread to test by"
    if c.distinguishable:
        return f"distinguishable from no effect: {'better' if c.difference > 0 else 'worse'}"
    return "not distinguishable from no effect" + ("; interval and p disagree" if c.interval_disagrees else "")


# ---------------------------------------------------------------------------------------------- sentences


def patients_in_words(collection: Collection) -> str:
    """`6 patients of class normal (93 images), 24 patients of class disease (433 images)`."""
    parts = [
        f"{count(patients, 'patient')} of class {name} ({count(images, 'image')})"
        for name, patients, images in collection.patients_per_class()
    ]
    return ", ".join(parts)


def answer_in_words(collection: Collection, primary: Comparison, declared: tuple[Key, str]) -> tuple[str, str]:
    """The question of the study's primary comparison, and the answer, a sentence each."""
    (classifier, arm, ratio), versus = declared
    metric = METRIC_NAMES[collection.study.primary.metric]
    training = "training on real images alone" if versus == "none" else f"the arm {versus}"
    question = f"Does {arm_text(arm, ratio)} change the {metric} of {classifier}, compared with {training} ({versus})?"
    name = f"ratio {ratio:g} of {arm}" if ratio else arm
    if not primary.n_common or not math.isfinite(primary.difference):
        why = "no fold has both arms yet" if not primary.n_common else f"the {metric} is undefined on these images"
        return question, f"{name}: no answer, {why}."
    there = math.isfinite(primary.low)
    limits = f"95 % interval {limit_text(primary.low)} to {limit_text(primary.high)}" if there else "no interval"
    effect = f"{points(primary.difference, sign=True)} points {metric}"
    tail = f"; {verdict(primary)}"
    if math.isfinite(primary.p_corrected_t):
        p = p_text(primary.p_corrected_t)
        tail += f" (p {p})" if p.startswith("<") else f" (p = {p})"
        if primary.metric == "auc" or primary.interval_disagrees:
            within = points(primary.mean_fold_difference, sign=True)
            tail += f"; p tests the mean of the folds' own differences, {within} points"
    if primary.n_left_out:
        tail += f"; on {cells_text(primary.n_common, primary.n_left_out)} (fold and repeat), which both arms have, "
        tail += f"of {count(primary.n_patients, 'patient')}"
    return question, f"{name}: {effect}, {limits}{tail}."


def primary_in_words(primary: Primary) -> str:
    """`dae-gan at ratio 3 against none, AUC of resnet50`."""
    arm = arm_text(primary.arm, primary.ratio)
    return f"{arm} against {primary.versus}, {METRIC_NAMES[primary.metric]} of {primary.classifier}"


def leaks_in_words(collection: Collection) -> list[str]:
    """What was compared in the search for leaks, and what it was not able to see."""
    ids = "training and validation ids"
    what = ids if collection.study.folds.group_by == "image" else f"patients of the {ids}"
    compared = f"In every prediction the {what} were compared with those of the test"
    if n := collection.unchecked_ids:
        compared += f"; of {count(n, 'training id')} no shard tells the patient, so these could not be compared"
    found = [compared + "."]
    made = "synthetic or refined shard"
    if n := collection.made_checked:
        found.append(f"So were those of the {count(n, made)} from which these predictions were made.")
    if n := collection.made_unchecked:
        found.append(
            f"What the generators and refiners were trained on was not checked here for {count(n, made)} "
            "not at hand: run cmrhpc verify in the workspace."
        )
    if collection.made_checked or collection.made_unchecked:
        found.append("Copies of real images among the made ones were not looked for here: cmrhpc verify does that.")
    return found


def warnings_of(collection: Collection) -> list[str]:
    """What a reader must know before reading any number, most serious first."""
    study, found = collection.study, []
    if collection.leaks_by_design:
        found.append(
            'Leaking by design: this study splits images, not patients (group_by = "image", as the papers did). Images '
            "of one patient are near copies, so every figure here is too good; it is no accuracy on new patients."
        )
    if collection.normalised and (apart := normalised_apart(collection.normalised.classes)):
        found.append(f"Normalisation: {apart}, so every figure here may rest on that and not on the images.")
    if collection.leaks:
        found.append("Leak: test patients or test images were found in training; see Missing cells and leaks.")
    total = sum(collection.primaries.values())
    for other, n in collection.primaries.items():
        if other not in (None, study.primary):
            found.append(
                f"The primary comparison was changed after {n} of {count(total, 'prediction')} were made; it was "
                f"{primary_in_words(other)}. What is called primary here was not declared before the study ran."
            )
    if collection.missing:
        found.append(
            f"Incomplete: {len(collection.missing)} of {len(collection.expected)} cells are missing; the figures rest "
            "on the others and may move."
        )
    few = [(name, n) for name, n, _ in collection.patients_per_class() if n < FEW_PATIENTS]
    if few:
        named = " and ".join(f"{count(n, 'patient')} of class {name}" for name, n in few)
        step = 100 / max(1, min(n for _, n in few))
        found.append(
            f"Only {named}: a rate of that class moves by about {step:.0f} points when one patient is read differently."
        )
    cells = study.folds.k * study.folds.repeats
    if cells < 5:
        found.append(f"Only {cells} folds x repeats: the tests have little power, and no effect is the likely finding.")
    return found


def ratio_arms(result: Result) -> dict[str, list[tuple[str, list[tuple[float, Row]]]]]:
    """Per classifier the curves metric over ratio: (arm, [(ratio, row)]), ratio 0 from the arm none or affine."""
    study = result.collection.study
    curves: dict[str, list[tuple[str, list[tuple[float, Row]]]]] = {}
    for classifier in study.classifiers:
        by_arm: dict[str, list[tuple[float, Row]]] = {}
        for (name, arm, ratio), row in result.rows.items():
            if name == classifier and ratio > 0 and row.folds:
                by_arm.setdefault(arm, []).append((ratio, row))
        for arm, curve in by_arm.items():
            start = result.rows.get((classifier, "affine" if arm_parts(arm, study).affine else "none", 0.0))
            whole = sorted(([(0.0, start)] if start and start.folds else []) + curve, key=lambda point: point[0])
            curves.setdefault(classifier, []).append((arm, whole))
    return curves
