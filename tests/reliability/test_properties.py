"""Readers under hypothesis: what is written comes back, and no text whatever gets more than a BadInput out of them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmrhpc import files, seal
from cmrhpc.data.table import labels_of, read_table
from cmrhpc.errors import BadInput
from cmrhpc.launch.records import read_record
from cmrhpc.planning import Task
from cmrhpc.study import Study, parse_study
from tests.conftest import STUDY

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIELD = st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters="\\/~."), min_size=1, max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@few
@given(rows=st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=8, unique_by=lambda row: row[0]))
def test_a_table_comes_back_as_it_was_written(tmp_path: Path, rows: list[tuple[str, str, str]]) -> None:
    import csv

    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("image", "label", "patient"), *rows])
    with contextlib.suppress(BadInput):  # `C:` and the like are refused as paths
        read = read_table(tmp_path, "t.csv", check_files=False)
        assert [(row.image, row.label, row.patient) for row in read] == rows
        assert set(labels_of(read)) == {label for _, label, _ in rows}


@few
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_table_or_bad_input(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with contextlib.suppress(BadInput):
        assert read_table(tmp_path, "t.csv", check_files=False)


@few
@given(text=st.text(max_size=300))
def test_any_text_is_a_study_or_bad_input(text: str) -> None:
    with contextlib.suppress(BadInput):
        parse_study(text)


@few
@given(values=JSON)
def test_any_json_is_a_study_a_task_a_record_a_seal_or_none(tmp_path: Path, values: object) -> None:
    with contextlib.suppress(BadInput):
        Study.from_json(values)  # type: ignore[arg-type]
    with contextlib.suppress(TypeError, ValueError, KeyError):
        Task.from_json(values)  # type: ignore[arg-type]
    (tmp_path / "a.json").write_text(json.dumps(values))
    read_record(tmp_path / "a.json")
    assert seal.read(tmp_path / "a.json") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed = 7", "seed = " + "9" * 5000),
        ("spacing_mm = 5.0", "spacing_mm = " + "9" * 400),
        ("ratios = [2]", "ratios = [" + "9" * 400 + "]"),
        ("threads = 1", "threads = " + "9" * 400),
    ],
)
def test_numbers_beyond_every_range_are_bad_input(old: str, new: str) -> None:
    assert old in STUDY
    with pytest.raises(BadInput):
        parse_study(STUDY.replace(old, new))


@few
@given(name=st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40))
def test_only_our_own_temporary_files_are_taken_for_such(name: str) -> None:
    assert not files.is_temporary(name)
    ours = files.temporary_name(Path("folder") / name).name
    assert files.is_temporary(ours)
    for other in (f"x{ours}", f"{ours}.h5", f".{name}.tmp.mine", f".{name}.tmp.host.1.2"):
        assert not files.is_temporary(other)
