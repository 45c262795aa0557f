"""How figures, limits, p values and names are printed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cmrhpc.csvtext import csv_cell
from cmrhpc.report.aggregate import aggregate, terminal_table
from cmrhpc.report.result import figure_text, limit_text, p_text
from tests.report import made


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
