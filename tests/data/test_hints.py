"""What looks like a slip in a raw table is told by init and ingest, with the counts that show it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cmrhpc import files, init
from cmrhpc.data.hints import class_slips, ignored_columns
from cmrhpc.data.ingest import ingest
from cmrhpc.errors import BadInput
from cmrhpc.init import make_workspace, order_classes
from cmrhpc.study import Folds
from tests.data.raw_folder import make_raw, settings, write_table
from tests.whole.conftest import cmrhpc


def relabel(raw: Path, labels: dict[int, str], more: dict[str, str] | None = None) -> None:
    """Write the table again: names for labels 0 and 1, then single rows (from 0) changed, further columns added."""
    with open(raw / "cohort.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for i, row in enumerate(rows):
        row["label"] = labels.get(i, ("normal", "disease")[int(row["label"])])
        row.update(more or {})
    write_table(raw, rows)


def test_columns_near_a_known_name_are_told_and_all_ignored_ones_listed() -> None:
    heading = ["image", "label", "patient", "window_lo", "window_hi", "Spacing mm", "age"]
    lines = ignored_columns(heading, {})
    assert len([line for line in lines if line.startswith("warning:")]) == 3
    assert any('"window_lo" is ignored: did you mean window_low?' in line for line in lines)
    assert any('"window_hi" is ignored: did you mean window_high?' in line for line in lines)
    assert any('"Spacing mm" is ignored: did you mean spacing_mm?' in line for line in lines)
    assert lines[-1] == 'columns that are ignored: "window_lo", "window_hi", "Spacing mm", "age"'
    assert ignored_columns(["image", "label", "patient", "low"], {"window_low": "low"}) == []


@pytest.mark.parametrize(
    ("counts", "slip"),
    [
        ({"disease": (9, 5), "normal": (20, 9), "nromal": (1, 1)}, 'class "nromal" has 1 image: did you mean "normal"'),
        ({"Normal": (9, 9), "normal": (20, 9)}, '"Normal" has 9 images: did you mean "normal", which has 20'),
        ({"no-finding": (4, 2), "No finding": (9, 5)}, 'did you mean "No finding"'),
        ({"normal": (20, 9), "abnormal": (19, 9)}, ""),
        ({"stage 1": (40, 9), "stage 2": (1, 1)}, ""),
        ({"0": (20, 9), "1": (1, 1)}, ""),
        ({"AD": (20, 9), "MCI": (2, 2)}, ""),
    ],
)
def test_classes_that_differ_by_a_slip(counts: dict[str, tuple[int, int]], slip: str) -> None:
    lines = class_slips(counts)
    assert len(lines) == bool(slip)
    assert slip in "".join(lines)


def test_init_and_ingest_tell_counts_slips_and_ignored_columns(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    make_raw(raw)
    relabel(raw, {0: "nromal"}, {"age": "70", "window_lo": "300"})
    done = cmrhpc("init", tmp_path / "ws", "--study", "demo", "--raw", raw)
    assert (
        '"disease" 6 images of 3 patients; "normal" 5 images of 3 patients; "nromal" 1 image of 1 patient'
        in done.stdout
    )
    assert 'the class "nromal" has 1 image: did you mean "normal", which has 5?' in done.stdout
    assert 'the column "window_lo" is ignored: did you mean window_low?' in done.stdout
    assert '"age"' in done.stdout
    assert "cmrhpc ingest" in done.stdout.splitlines()[-1]
    told = str(ingest(settings(), ("disease", "normal", "nromal"), raw, tmp_path / "out" / "cohort.h5"))
    assert 'the class "nromal" has 1 image: did you mean "normal", which has 5?' in told
    assert 'the column "window_lo" is ignored: did you mean window_low?' in told
    with pytest.raises(BadInput, match=r'has 1 patient, fewer(.|\n)*did you mean "normal"'):
        ingest(settings(), ("disease", "normal", "nromal"), raw, tmp_path / "out2" / "cohort.h5", folds=Folds(k=2))


def test_a_third_class_by_a_slip_is_told_when_two_were_meant(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw")
    relabel(tmp_path / "raw", {0: "nromal"})
    with pytest.raises(BadInput, match="--positive is for two classes") as caught:
        make_workspace(tmp_path / "ws", "demo", tmp_path / "raw", positive="disease")
    assert 'did you mean "normal"' in caught.value.mend
    assert '"normal" 5 images of 3 patients' in caught.value.mend


def test_a_wrong_label_column_is_told_without_a_list_of_its_labels(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(101):
        (raw / f"{i}.png").touch()
    write_table(raw, [{"image": f"{i}.png", "label": f"person {i}", "patient": str(i)} for i in range(101)])
    with pytest.raises(BadInput, match="101 different labels") as caught:
        make_workspace(tmp_path / "ws", "demo", raw)
    assert caught.value.mend == "is the column `label` the right one? --column label=NAME"


def test_of_two_inits_at_once_one_makes_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_raw(tmp_path / "raw")
    study = tmp_path / "ws" / "study.toml"

    def meanwhile(*arguments: object) -> list[str]:
        files.atomic_write(study, "of another init")
        return []

    monkeypatch.setattr(init, "class_slips", meanwhile)
    with pytest.raises(BadInput, match="has a study already"):
        make_workspace(tmp_path / "ws", "demo", tmp_path / "raw")
    assert study.read_text() == "of another init"


def test_the_order_of_classes_does_not_depend_on_the_order_of_rows() -> None:
    assert order_classes(["b", "a", "10", "2", "b"], None, "") == ["2", "10", "a", "b"]
    assert order_classes(["1", "0", "1"], None, "") == ["0", "1"]
    assert (
        order_classes(["well", "sick"], "sick", "") == order_classes(["sick", "well"], "sick", "") == ["well", "sick"]
    )
