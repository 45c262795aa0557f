"""Figures of a report as small PNGs (matplotlib, Agg), in colours that the colour-blind tell apart (Okabe and Ito)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cmrhpc.measure import metrics
from cmrhpc.report.collect import Key
from cmrhpc.report.result import METRIC_NAMES, Result, ratio_arms
from cmrhpc.report.rows import Row, nanmean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)
_FAMILIES = {"none": GREY, "affine": BLUE, "repeat-real": PURPLE, "dae-gan": VERMILION, "egan": ORANGE, "dcgan": SKY}
_OTHERS = (GREEN, "#882255", "#332288", "#999933", "#000000")
_LINES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY, "#000000")
_MAX_LINES = 9


def colours(result: Result) -> dict[str, str]:
    """Arm -> colour; an arm and the same with affine share one."""
    found: dict[str, str] = {}
    spare = 0
    for arm in dict.fromkeys(key[1] for key in result.rows):
        base = arm.removesuffix("+affine")
        if base not in found:
            found[base] = _FAMILIES.get(base) or _OTHERS[spare % len(_OTHERS)]
            spare += base not in _FAMILIES
        found[arm] = found[base]
    return found


def png(figure: Figure) -> bytes:
    """PNG bytes with at most 128 colours and no metadata: same numbers, same bytes."""
    from PIL import Image

    stream, small = io.BytesIO(), io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    picture = Image.open(stream).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(small, format="PNG", optimize=True)
    return small.getvalue()


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """`count` panels below each other, so that a phone shows them large enough to read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e4e4e4", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, list(axes)


def plain(text: str, limit: int = 40) -> str:
    """A name as matplotlib may print it: no mathematics, one line, not endless."""
    text = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _by_classifier(result: Result) -> Iterator[tuple[str, list[tuple[Key, Row]]]]:
    for name in result.collection.study.classifiers:
        rows = [(key, row) for key, row in result.rows.items() if key[0] == name and row.folds]
        if rows:
            yield name, rows


def _places(rows: list[tuple[Key, Row]]) -> dict[str, list[int]]:
    """Arm -> the places of its rows."""
    places: dict[str, list[int]] = {}
    for place, (key, _) in enumerate(rows):
        places.setdefault(key[1], []).append(place)
    return places


def _row_name(key: Key) -> str:
    return plain(key[1] + (f" · {key[2]:g}" if key[2] else ""))


def _axis(metric: str) -> tuple[int, str]:
    """What a metric is multiplied by on an axis, and its name there."""
    return (1, "AUC") if metric == "auc" else (100, f"{METRIC_NAMES[metric]} %")


def arms(result: Result, metric: str) -> bytes | None:
    """A metric of every arm with its 95 % interval; dashed: none."""
    groups = list(_by_classifier(result))
    if not groups:
        return None
    tallest = max(len(rows) for _, rows in groups)
    figure, axes = _panels(len(groups), 6.4, 0.9 + 0.24 * tallest)
    tone, (scale, name_of_it) = colours(result), _axis(metric)
    for ax, (name, rows) in zip(axes, groups, strict=True):
        for arm, places in _places(rows).items():  # one call for all rows of an arm: there may be hundreds
            found = [rows[place][1].figures[metric] for place in places]
            value, low, high = (np.array([getattr(f, end) for f in found]) for end in ("value", "low", "high"))
            ax.errorbar(
                scale * value,
                places,
                xerr=scale
                * np.stack([value - low, high - value]).clip(0),  # NaN where there is no interval: none drawn
                fmt="o",
                markersize=5.5,
                color=tone[arm],
                markerfacecolor="white" if arm.endswith("+affine") else tone[arm],
                elinewidth=1.4,
                capsize=2.5,
            )
        base = result.rows.get((name, "none", 0.0))
        if base and base.folds:
            ax.axvline(scale * base.figures[metric].value, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
        ax.set_yticks(range(len(rows)), [_row_name(key) for key, _ in rows], fontsize=8)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_title(plain(name), fontsize=10, loc="left")
        ax.set_xlabel(f"{name_of_it}, 95 % interval over patients", fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
    return png(figure)


def ratio_curve(result: Result, metric: str) -> bytes | None:
    """A metric over the ratio of synthetic to real images, with affine dashed ([SIM] Figure 7)."""
    curves = {name: [c for c in found if len(c[1]) > 2] for name, found in ratio_arms(result).items()}
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return None
    figure, axes = _panels(len(curves), 6.4, 3.2)
    tone, (scale, name_of_it) = colours(result), _axis(metric)
    for ax, (name, found) in zip(axes, curves.items(), strict=True):
        for shift, (arm, points) in enumerate(found):
            x = np.array([ratio for ratio, _ in points]) + 0.09 * (shift - (len(found) - 1) / 2)
            figures = [row.figures[metric] for _, row in points]
            y, low, high = (scale * np.array([getattr(f, end) for f in figures]) for end in ("value", "low", "high"))
            ends = np.nan_to_num(np.stack([y - low, high - y])).clip(0)
            dashed = arm.endswith("+affine")
            line: dict[str, Any] = {
                "linestyle": "--" if dashed else "-",
                "linewidth": 1.5,
                "elinewidth": 0.8,
                "capsize": 2,
            }
            dots: dict[str, Any] = {"marker": "o", "markersize": 5, "markerfacecolor": "white" if dashed else tone[arm]}
            ax.errorbar(x, y, yerr=ends, color=tone[arm], label=plain(arm), **line, **dots)
        ax.set_xticks(sorted({ratio for _, points in found for ratio, _ in points}))
        ax.set_xlabel("synthetic images per real image and class", fontsize=8)
        ax.set_ylabel(name_of_it, fontsize=8)
        ax.set_title(plain(name), fontsize=10, loc="left")
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7.5, frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.2), borderaxespad=0)
    return png(figure)


def fold_dots(result: Result, metric: str) -> bytes | None:
    """A metric in every fold and repeat that defines it: how far split and seeds move the figure."""
    groups = list(_by_classifier(result))
    if not groups:
        return None
    tallest = max(len(rows) for _, rows in groups)
    figure, axes = _panels(len(groups), 6.4, 0.9 + 0.24 * tallest)
    tone, (scale, name_of_it) = colours(result), _axis(metric)
    for ax, (name, rows) in zip(axes, groups, strict=True):
        values = [scale * np.array([fold.values[metric] for fold in row.folds]) for _, row in rows]
        for arm, places in _places(rows).items():
            x = np.concatenate([values[place] for place in places])
            # A fixed spread, so that equal dots stay apart.
            y = [place + 0.22 * np.sin(2.4 * i) for place in places for i in range(len(values[place]))]
            ax.plot(x, y, "o", color=tone[arm], markersize=3.4, alpha=0.55, markeredgewidth=0)
        middle = np.arange(len(rows))
        ax.vlines([float(nanmean(x)) for x in values], middle - 0.33, middle + 0.33, color="black", linewidth=1.6)
        ax.set_yticks(range(len(rows)), [_row_name(key) for key, _ in rows], fontsize=8)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_title(plain(name), fontsize=10, loc="left")
        ax.set_xlabel(f"{name_of_it} of one fold (dot), their mean (bar)", fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
    return png(figure)


def shown_arms(result: Result, classifier: str) -> tuple[list[tuple[Key, Row]], str]:
    """One row per arm for crowded figures: the primary ratio where there is one, else the ratio nearest to it.

    And the title of the panel, which says when there are more arms than it shows.
    """
    wanted = result.collection.study.primary.ratio or 3.0
    arms: dict[str, tuple[Key, Row]] = {}
    for key, row in result.rows.items():
        if key[0] == classifier and row.folds:
            best = arms.get(key[1])
            if best is None or abs(key[2] - wanted) < abs(best[0][2] - wanted):
                arms[key[1]] = (key, row)
    first = ("none", "affine", result.collection.study.primary.arm)
    shown = sorted(arms.values(), key=lambda found: found[0][1] not in first)[:_MAX_LINES]
    return shown, plain(classifier) + (f": {len(shown)} of {len(arms)} arms" if len(shown) < len(arms) else "")


def roc(result: Result) -> bytes | None:
    """ROC curves over images, pooled over the folds of a repeat and averaged over repeats.

    With more than two classes also over these, each against the rest, as the AUC is.
    """
    groups = [name for name, _ in _by_classifier(result)]
    if not groups:
        return None
    classes = range(len(result.collection.study.classes)) if len(result.collection.study.classes) > 2 else (1,)
    figure, axes = _panels(len(groups), 4.6, 4.3)
    tone, grid = colours(result), np.linspace(0, 1, 201)
    for ax, name in zip(axes, groups, strict=True):
        shown, title = shown_arms(result, name)
        for key, row in shown:
            cells, curves = result.collection.cells[key], []
            for repeat in sorted({r for r, _ in cells}):
                here = [cell for (r, _), cell in cells.items() if r == repeat]
                label = np.concatenate([cell.images.label for cell in here])
                score = np.concatenate([cell.score for cell in here])
                if all(0 < (label == k).sum() < len(label) for k in classes):
                    corners = [metrics.roc(label == k, metrics.class_score(score, k)) for k in classes]
                    curves += [np.r_[0, np.interp(grid[1:], x, y)] for x, y in corners]
            if curves:
                text = f"{_row_name(key)} ({row.figures['auc'].value:.3f})"
                dashed = "--" if key[1].endswith("+affine") else "-"
                ax.plot(100 * grid, 100 * np.mean(curves, axis=0), color=tone[key[1]], linestyle=dashed, label=text)
        ax.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=0.8)
        ax.set_xlabel("100 - specificity %", fontsize=8)
        ax.set_ylabel("sensitivity %", fontsize=8)
        ax.set_aspect("equal")
        ax.set_title(title, fontsize=10, loc="left")
        ax.tick_params(labelsize=8)
        if len(ax.lines) > 1:
            ax.legend(fontsize=7, frameon=False, loc="lower right", title="arm (AUC)", title_fontsize=7)
    return png(figure)


def classifier_training(result: Result) -> bytes | None:
    """Validation loss over steps, mean over folds and repeats; ticks below: the steps that were restored."""
    groups = [name for name, _ in _by_classifier(result)]
    if not groups:
        return None
    figure, axes = _panels(len(groups), 6.4, 3.0)
    tone, drawn = colours(result), False
    for ax, name in zip(axes, groups, strict=True):
        shown, title = shown_arms(result, name)
        for key, row in shown:
            cells = list(result.collection.cells[key].values())
            cells = [c for c in cells if "history_step" in c.shard and "history_validation_loss" in c.shard]
            histories = [(c.shard["history_step"], c.shard["history_validation_loss"]) for c in cells]
            histories = [(x, y) for x, y in histories if x.shape == y.shape and x.ndim == 1 and x.size]
            histories = [(x, y) for x, y in histories if x.dtype.kind == "i" and y.dtype.kind == "f"]
            if not histories:
                continue
            steps = max((x for x, _ in histories), key=len)
            same = [y for x, y in histories if len(x) == len(steps)]
            dashed = "--" if key[1].endswith("+affine") else "-"
            ax.plot(steps, np.mean(same, axis=0), dashed, color=tone[key[1]], linewidth=1.5, label=_row_name(key))
            best = [fold.best_step for fold in row.folds if fold.best_step >= 0]
            ax.plot(best, [0.01] * len(best), "|", color=tone[key[1]], markersize=6, transform=ax.get_xaxis_transform())
            drawn = True
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel("validation loss", fontsize=8)
        ax.set_title(title, fontsize=10, loc="left")
        ax.tick_params(labelsize=8)
        if ax.lines:
            ax.legend(fontsize=7, frameon=False, ncols=2)
    return png(figure) if drawn else None


def training_curves(title: str, lines: list[dict[str, Any]]) -> bytes | None:
    """Losses, what decided between mutations, and how often each won, from the JSON lines of one training."""
    numbers = _series(lines)
    losses = {name: xy for name, xy in numbers.items() if "loss" in name}
    decided = {name: xy for name, xy in numbers.items() if name.endswith("spread") and any(xy[1])}
    won = {name.removeprefix("wins "): xy for name, xy in numbers.items() if name.startswith("wins ")}
    parts = [(kind, part) for kind, part in (("loss", losses), ("spread", decided), ("wins", won)) if part]
    if not parts:
        return None
    figure, axes = _panels(len(parts), 6.4, 1.9)
    for ax, (kind, part) in zip(axes, parts, strict=True):
        if kind == "wins":
            shares = _window_shares(part)
            steps = next(iter(part.values()))[0][: shares.shape[1]]
            ax.stackplot(steps, shares, colors=_LINES[: len(part)], labels=[plain(n) for n in part])
            ax.set_ylim(0, 100)
            ax.set_ylabel("won %", fontsize=8)
        else:
            for tone, (name, (x, y)) in zip(_LINES, part.items(), strict=False):
                ax.plot(x, y, color=tone, linewidth=1.2, label=plain(name))
            ax.set_ylabel("loss" if kind == "loss" else "spread", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes[0].set_title(plain(title, 80), fontsize=10, loc="left")
    axes[-1].set_xlabel("step", fontsize=8)
    return png(figure)


def _window_shares(won: dict[str, tuple[list[float], list[float]]]) -> np.ndarray:
    """Wins so far (one series per mutation) -> share of the wins in each log window, in %."""
    length = min(len(y) for _, y in won.values())
    windows = np.diff(np.array([y[:length] for _, y in won.values()]), axis=1, prepend=0).clip(0)
    return 100 * windows / np.maximum(windows.sum(0), 1)


def _series(lines: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Finite numbers of a log over its steps; a list or table of numbers gives one series each."""
    found: dict[str, tuple[list[float], list[float]]] = {}

    def add(name: str, step: float, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name} {key}", step, inner)
        elif isinstance(value, list):
            for key, inner in enumerate(value):
                add(f"{name} {key}", step, inner)
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            x, y = found.setdefault(name, ([], []))
            x.append(step)
            y.append(float(value))

    for line in lines:
        step = line.get("step")
        if isinstance(step, int | float):
            for name, value in line.items():
                if name != "step":
                    add(name, step, value)
    return found


def drawn_metrics(result: Result) -> list[str]:
    """The primary metric, and accuracy as well."""
    return list(dict.fromkeys((result.collection.study.primary.metric, "accuracy")))


def all_figures(result: Result) -> dict[str, bytes]:
    """File name -> PNG, of the figures that predictions alone can give."""
    made: dict[str, bytes | None] = {}
    for metric in drawn_metrics(result):
        of_it = "" if metric == "accuracy" else f"_{metric}"
        made[f"{metric}.png"] = arms(result, metric)
        made[f"ratio_curve{of_it}.png"] = ratio_curve(result, metric)
        made[f"folds{of_it}.png"] = fold_dots(result, metric)
    made |= {"roc.png": roc(result), "classifier_training.png": classifier_training(result)}
    return {name: data for name, data in made.items() if data}
