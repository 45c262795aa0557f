"""The report page: one HTML file with everything inside, printed from one `Result`."""

from __future__ import annotations

import base64
import json
import platform
import struct
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from cmrhpc.measure.kernel_distance import FEATURES
from cmrhpc.planning import COHORT, FOLDS, WEIGHTS
from cmrhpc.report import tables
from cmrhpc.report.gallery import MAX_IMAGES, Gallery, is_expanded
from cmrhpc.report.published import WARNING, published
from cmrhpc.report.result import METRIC_NAMES, NONE, Result, arm_text, count, figure_text, leaks_in_words, split_units
from cmrhpc.report.rows import RATES
from cmrhpc.study import Study

TEMPLATE = "page.html.j2"
MAX_LISTED = 200  # missing cells, leaks and notes; the CSV files have all
# Kind of figure -> title and caption; the first three are drawn for each metric that `figures.drawn_metrics` names.
FIGURES = {
    "arms": (
        "{Metric} per arm",
        "{Metric} of every arm with its 95 % interval over patients; the dashed line is the arm none. "
        "Hollow dots: with affine on top.",
    ),
    "ratio_curve": (
        "{Metric} over the ratio",
        "{Metric} over the ratio of synthetic to real images. Ratio 0 is real images alone; dashed lines have affine "
        "on top. Choosing the maximum of this curve means choosing on test images; Best ratio below does not.",
    ),
    "folds": (
        "Fold by fold: {metric}",
        "Every dot is one fold of one repeat: how far the figure moves with split and seeds.",
    ),
    "roc": (
        "ROC curves",
        "ROC over images, pooled over folds, mean over repeats; of more than two classes the mean of each against the "
        "rest. In brackets the AUC.",
    ),
    "classifier_training": (
        "Training of the classifiers",
        "Validation loss while the classifiers train, mean over folds and repeats. Ticks at the bottom: the steps "
        "whose weights were restored.",
    ),
}


@dataclass(frozen=True)
class Picture:
    """An image inside the page: data URI, width in CSS pixels at most, text for who cannot see it."""

    uri: str
    width: int
    height: int
    title: str
    caption: str


def _picture(data: bytes, title: str, caption: str = "", scale: float = 1.0) -> Picture:
    width, height = struct.unpack(">II", data[16:24])  # of the PNG header
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return Picture(uri, round(width * scale), round(height * scale), title, caption)


def _figure(name: str, data: bytes) -> Picture:
    """A drawn figure with the title and caption of its kind and metric, which its file name tells."""
    stem = name.removesuffix(".png")
    kind = next((kind for kind in FIGURES if stem.startswith(kind)), "arms")
    metric = METRIC_NAMES[stem if kind == "arms" else stem.removeprefix(kind).strip("_") or "accuracy"]
    words = {"metric": metric, "Metric": metric[0].upper() + metric[1:]}
    title, caption = (text.format(**words) for text in FIGURES[kind])
    return _picture(data, title, caption, 1 / 1.3)


def render(result: Result, gallery: Gallery, drawn: dict[str, bytes]) -> str:
    """The whole page. Every text from outside (names, ids, reasons) is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cmrhpc.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(TEMPLATE)
    study, collection = result.collection.study, result.collection
    return template.render(
        result=result,
        study=study,
        collection=collection,
        groups=_groups(result),
        units=split_units(study),
        published_warning=WARNING if any(published(k, len(study.classes)) for k in result.rows) else "",
        figures=[_figure(name, data) for name, data in drawn.items()],
        intervals=tables.INTERVALS,
        comparisons_note=tables.comparisons_note(result),
        leaks_told=leaks_in_words(collection),
        main_header=tables.main_header()[1:],
        comparison_header=tables.comparison_header(),
        short_header=_without_metric([tables.comparison_header()])[0],
        short_comparisons=_without_metric(tables.comparison_lines(result, study.primary.metric)),
        all_comparisons=tables.comparison_lines(result),
        best_header=tables.best_header(result) if result.best else [],
        best_note=tables.best_note(result),
        best=tables.best_lines(result),
        confusion=_confusion(result),
        classes=_classes(result),
        strips=_strips(result, gallery),
        distances=_distances(result, gallery),
        distance_note=_distance_note(study, gallery),
        curves=[_picture(data, title, "", 1 / 1.3) for title, data in gallery.curves.values()],
        gallery=gallery,
        missing=_shortened(collection.missing),
        max_listed=MAX_LISTED,
        facts=_facts(result),
        study_json=json.dumps(study.to_share(), indent=2),
        count=count,
        NONE=NONE,
    )


def _groups(result: Result) -> list[tuple[str, list[tuple[list[str], bool]]]]:
    """Per classifier the lines of the main table without the classifier; True: the arm of the primary comparison."""
    lines = tables.main_lines(result)
    groups: dict[str, list[tuple[list[str], bool]]] = {}
    for key, line in zip(result.rows, lines, strict=True):
        groups.setdefault(key[0], []).append((line[1:], key == result.primary.key))
    return list(groups.items())


def _without_metric(lines: list[list[str]]) -> list[list[str]]:
    """Comparison lines of one metric, which their heading names."""
    return [line[:3] + line[4:] for line in lines]


def _confusion(result: Result) -> dict[str, Any]:
    """Confusion counts, means over repeats; of a binary study as one line per row, else one matrix per row."""
    classes = result.collection.study.classes
    found = [(key, row) for key, row in result.rows.items() if row.folds]
    lines = [[key[0], arm_text(*key[1:]), *(f"{n:.1f}" for n in row.counts.ravel())] for key, row in found]
    return {"lines": lines, "binary": len(classes) == 2, "classes": classes}


def _classes(result: Result) -> list[list[str]]:
    """Multi-class studies: precision, recall and F1 per class, of the counts of all repeats together."""
    classes = result.collection.study.classes
    if len(classes) == 2:
        return []
    lines = []
    for key, row in result.rows.items():
        for i, name in enumerate(classes if row.folds else ()):
            measured = [figure_text(m, row.per_class[m][i]) for m in RATES]
            lines.append([key[0], arm_text(*key[1:]), name, *measured])
    return lines


def _strips(result: Result, gallery: Gallery) -> list[tuple[str, list[Picture]]]:
    """Per class its sample strips, real first."""
    classes = result.collection.study.classes
    return [
        (
            name,
            [
                _picture(s.png, s.kind, f"{name}: {s.kind}, {s.count} images")
                for s in gallery.strips
                if s.label == label
            ],
        )
        for label, name in enumerate(classes)
        if any(s.label == label for s in gallery.strips)
    ]


def _distances(result: Result, gallery: Gallery) -> list[list[str]]:
    classes = result.collection.study.classes
    refiners = list(dict.fromkeys(name for d in gallery.distances for name in d.refined))
    refined = [f"refined ({name})" for name in refiners]
    lines = [["generator", "fold", "class", "untrained", "trained", *refined, "floor", "held out"]]
    for d in sorted(gallery.distances, key=lambda d: (d.label, d.generator, d.fold)):
        values = [d.untrained, d.trained, *(d.refined.get(r, float("nan")) for r in refiners), d.floor]
        texts = [f"{v:.4f}" if v == v else NONE for v in values]
        lines.append([d.generator, str(d.fold), classes[d.label], *texts, count(d.n_held_out, "image")])
    return lines if len(lines) > 1 else []


def _distance_note(study: Study, gallery: Gallery) -> str:
    by_patient = study.folds.group_by == "patient"
    whose = "which belong to other patients" if by_patient else "some of which may be of the same patients"
    expanded = [name for name in dict.fromkeys(d.generator for d in gallery.distances) if is_expanded(study, name)]
    turned = (
        f" Trained on the affine-expanded set, in which a heart lies any way round: {', '.join(expanded)}. So the real "
        "images beside theirs, those of the floor too, are put into one of the 8 exact orientations at random. The "
        "small rotations and shifts are not copied: even perfect images stay a little above that floor."
    )
    return (
        f"Unbiased kernel distance (cubic kernel, features of a {FEATURES}) to the held-out real images of the class "
        f"and fold, at most {MAX_IMAGES} images a side, repeat 0. Smaller is nearer. Floor: real training images to "
        f"the same held-out images, {whose}.{turned if expanded else ''} Values near zero may be negative; they do not "
        "compare with published KID."
    )


def _shortened(missing: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Missing cells grouped by reason."""
    groups: dict[str, list[str]] = {}
    for path, reason in missing.items():
        groups.setdefault(reason, []).append(path.removeprefix("predictions/").removesuffix(".h5"))
    return list(groups.items())


def _facts(result: Result) -> list[tuple[str, str]]:
    """Provenance: what these numbers were made from and with."""
    collection, study = result.collection, result.collection.study
    cells = [cell for row in collection.cells.values() for cell in row.values()]

    def told(name: str) -> str:
        values = sorted({str(cell.shard.info.get(name, "")) for cell in cells} - {""})
        return ", ".join(values[:6]) + (f" and {len(values) - 6} more" if len(values) > 6 else "") if values else NONE

    written = sorted(str(cell.shard.info.get("written", "")) for cell in cells)
    seconds = [cell.shard.info.get("seconds") for cell in cells]
    spent = sum(s for s in seconds if isinstance(s, int | float))
    used = ("numpy", "scipy", "scikit-learn", "h5py", "matplotlib")
    versions = ", ".join(f"{name} {_version(name)}" for name in used)
    inputs = {f"content of {path}": cells[0].shard.inputs.get(path, NONE) for path in (COHORT, FOLDS)}
    for cell in cells:
        if WEIGHTS in cell.shard.inputs:
            inputs[f"start weights of {cell.task.classifier}"] = cell.shard.inputs[WEIGHTS]
    return [
        ("study", f"{study.name}, from {collection.study_from}; seed {study.seed}"),
        ("design", f"{study.folds.k} folds x {study.folds.repeats} repeats, split by {study.folds.group_by}"),
        ("predictions", f"{count(len(cells), 'shard')} of {result.n_expected}, written {written[0]} to {written[-1]}"),
        ("compute", f"{study.compute.mode} mode, {count(study.compute.threads, 'thread')} per task"),
        ("devices, arithmetic", f"{told('device')}; {told('arithmetic')}"),
        ("time of the classifier tasks, last run of each", _hours(spent)),
        *_external(result),
        *_normalised(result),
        ("code of the tasks", told("code_version")),
        ("container", told("container_sha256")),
        *inputs.items(),
        ("this page", f"cmrhpc {_version('cmrhpc')}, Python {platform.python_version()}, {versions}"),
    ]


def _external(result: Result) -> list[tuple[str, str]]:
    """What the page says of images that were made elsewhere."""
    names = [name for name, generator in result.collection.study.generators.items() if generator.external]
    told = "images made elsewhere; the real images that they were made from are as declared, which no program can prove"
    return [("external generators", f"{', '.join(names)}: {told}")] if names else []


def _normalised(result: Result) -> list[tuple[str, str]]:
    """How the images came to [-1, 1], where the cohort is at hand (METHODS M1)."""
    if not (told := result.collection.normalised):
        return []
    how = ", ".join(f"{n} by {kind}" for kind, n in told.images.items() if n)
    return [("images normalised", f"{how}; {100 * told.clipped:.2f} % of the pixels clipped")]


def _hours(seconds: float) -> str:
    if seconds <= 0:
        return NONE
    return f"{seconds / 3600:.1f} task hours" if seconds >= 3600 else f"{seconds / 60:.1f} task minutes"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        from cmrhpc import __version__

        return __version__ if name == "cmrhpc" else "?"
