"""The raw table: what is read, and one clear message for each fault."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cmrhpc.data.table import Row, labels_of, read_table
from cmrhpc.errors import BadInput

HEAD = "image,label,patient"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    (folder / "in").mkdir(parents=True)
    for name in ("a.png", "b.png", "in/c.png", "m.png"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "outside.png").write_bytes(b"x")
    return folder


def write(raw: Path, text: str | bytes, name: str = "cohort.csv") -> None:
    (raw / name).write_bytes(text.encode() if isinstance(text, str) else text)


def test_reads_rows_in_order_with_all_columns(raw: Path) -> None:
    head = HEAD + ",mask,spacing_mm,window_low,window_high,other"
    write(raw, f"{head}\r\na.png, 1 ,P 1,m.png,1.25,300,1800,x\n\nin/c.png,0,P2,,1.2x1.4,,,y\n")
    assert read_table(raw) == [
        Row(1, "a.png", "1", "P 1", "m.png", (1.25, 1.25), (300.0, 1800.0)),
        Row(2, "in/c.png", "0", "P2", None, (1.2, 1.4), None),
    ]
    assert read_table(raw)[1].id == "r000002"


def test_maps_foreign_columns_and_reads_a_byte_order_mark(raw: Path) -> None:
    write(raw, "\ufefffile,dx,subject\na.png,mel,7\n", "index.csv")
    columns = {"image": "file", "label": "dx", "patient": "subject"}
    assert read_table(raw, "index.csv", columns) == [Row(1, "a.png", "mel", "7")]


def test_labels_are_ordered_by_value_then_by_alphabet() -> None:
    rows = [Row(i, "x", label, "p") for i, label in enumerate(["10", "b", "2", "a", "-1", "2"])]
    assert labels_of(rows) == ["-1", "2", "10", "a", "b"]


def test_without_files_only_the_text_is_checked(raw: Path) -> None:
    write(raw, f"{HEAD}\nabsent.png,0,p\n")
    assert read_table(raw, check_files=False)[0].image == "absent.png"
    write(raw, f"{HEAD}\n../outside.png,0,p\n")
    with pytest.raises(BadInput, match="leaves the raw folder"):
        read_table(raw, check_files=False)


FAULTS = {
    "no rows": (f"{HEAD}\n", "no rows", "cohort.csv"),
    "empty file": ("", 'no column "image"', "cohort.csv"),
    "missing column": ("image,label\na.png,0\n", 'no column "patient"', "cohort.csv"),
    "semicolons": ("image;label;patient\na.png;0;p\n", "no column", "cohort.csv"),
    "column twice": (f"{HEAD},label\na.png,0,p,1\n", "twice", "cohort.csv"),
    "empty label": (f"{HEAD}\na.png,,p\n", "empty field", "row 1 (line 2), column label"),
    "empty patient": (f"{HEAD}\na.png,0, \n", "empty field", "row 1 (line 2), column patient"),
    "duplicate": (
        f"{HEAD}\na.png,0,p\nb.png,0,p\na.png,1,q\n",
        "duplicate image: row 1",
        "row 3 (line 4), column image",
    ),
    "duplicate in disguise": (f"{HEAD}\na.png,0,p\n./in/../a.png,1,q\n", "leaves", "row 2"),
    "duplicate with a dot": (f"{HEAD}\na.png,0,p\n.//a.png,1,q\n", "duplicate image: row 1", "row 2"),
    "climbs out": (f"{HEAD}\n../outside.png,0,p\n", "leaves the raw folder", "row 1 (line 2), column image"),
    "absolute": (f"{HEAD}\n/etc/passwd,0,p\n", "leaves the raw folder", "row 1 (line 2), column image"),
    "backslash": (f"{HEAD}\nin\\c.png,0,p\n", "leaves the raw folder", "column image"),
    "drive": (f"{HEAD}\nC:/c.png,0,p\n", "leaves the raw folder", "column image"),
    "absent": (f"{HEAD}\nno.png,0,p\n", "the image does not exist", "row 1 (line 2), column image"),
    "folder": (f"{HEAD}\nin,0,p\n", "not a plain file", "row 1 (line 2), column image"),
    "mask climbs out": (f"{HEAD},mask\na.png,0,p,../outside.png\n", "leaves the raw folder", "column mask"),
    "mask absent": (f"{HEAD},mask\na.png,0,p,no.png\n", "the mask does not exist", "row 1 (line 2), column mask"),
    "unknown label": (f"{HEAD}\na.png,2,p\n", "unknown label", "row 1 (line 2), column label"),
    "few fields": (f"{HEAD}\na.png,0\n", "2 fields, the heading 3", "row 1 (line 2)"),
    "many fields": (f"{HEAD}\na.png,0,p,q\n", "4 fields, the heading 3", "row 1 (line 2)"),
    "quote": (f'{HEAD}\na.png,0,"p\n', "not valid CSV", "cohort.csv line"),
    "huge field": (f"{HEAD}\na.png,0,{'p' * 200_000}\n", "not valid CSV: field larger", "cohort.csv line"),
    "long field": (f"{HEAD}\na.png,0,{'p' * 5000}\n", "5000 characters", "column patient"),
    "control character": (f"{HEAD}\na.png,0,p\x1b[31m\n", "control characters", "column patient"),
    "nul": (f"{HEAD}\na.png,0,p\x00q\n", "", "cohort.csv"),
    "latin-1": (f"{HEAD}\na.png,0,Müller\n".encode("latin-1"), "not UTF-8", "cohort.csv"),
    "half a window": (f"{HEAD},window_low,window_high\na.png,0,p,300,\n", "two ends", "column window_low"),
    "one end of the window": (f"{HEAD},window_low\na.png,0,p,300\n", "but no window_high", "cohort.csv"),
    "misspelt end": (f"{HEAD},window_low,windowhihg\na.png,0,p,3,9\n", "but no window_high", "cohort.csv"),
    "window upside down": (f"{HEAD},window_low,window_high\na.png,0,p,3,3\n", "two ends", "column window_low"),
    "no number": (f"{HEAD},window_low,window_high\na.png,0,p,low,3\n", "no number", "column window_low"),
    "not finite": (f"{HEAD},window_low,window_high\na.png,0,p,1,inf\n", "no number", "column window_high"),
    "spacing zero": (f"{HEAD},spacing_mm\na.png,0,p,0\n", "no spacing", "column spacing_mm"),
    "spacing of three": (f"{HEAD},spacing_mm\na.png,0,p,1x1x1\n", "no spacing", "column spacing_mm"),
    "spacing text": (f"{HEAD},spacing_mm\na.png,0,p,1 mm\n", "no number", "column spacing_mm"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_clear_message(raw: Path, fault: str) -> None:
    text, what, where = FAULTS[fault]
    write(raw, text)
    with pytest.raises(BadInput) as caught:
        read_table(raw, classes=("0", "1"))
    assert caught.value.exit_code == 3
    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.mend
    assert all(c.isprintable() for c in caught.value.what + caught.value.where + caught.value.mend)
    told = str(caught.value)
    assert "no.png" not in told  # rows are named, not files
    assert "Müller" not in told
    assert not caught.value.found or caught.value.found not in told


def test_a_missing_column_says_how_to_map_it(raw: Path) -> None:
    write(raw, "image,label,subject\na.png,0,p\n")
    with pytest.raises(BadInput, match="--column patient=NAME") as caught:
        read_table(raw)
    assert caught.value.found == 'the columns "image", "label", "subject"'
    with pytest.raises(BadInput, match='no column "person"'):
        read_table(raw, columns={"patient": "person"})
    with pytest.raises(BadInput, match=r'no column named "patinet" to map(.|\n)*did you mean "patient"\?'):
        read_table(raw, columns={"patinet": "subject"})
    with pytest.raises(BadInput, match='no column named "sex" to map'):
        read_table(raw, columns={"sex": "subject"})


def test_near_names_are_suggested(raw: Path) -> None:
    write(raw, f"{HEAD},window_low,windowhihg\na.png,0,p,3,9\n")
    with pytest.raises(BadInput, match=r'did you mean "windowhihg"\?.*--column window_high=NAME'):
        read_table(raw)
    write(raw, f"{HEAD}\na.png,nromal,p\n")
    with pytest.raises(BadInput, match=r'did you mean "normal"\? the study knows "disease", "normal"'):
        read_table(raw, classes=("disease", "normal"))


def test_table_and_folder_must_be_there_and_inside(raw: Path) -> None:
    with pytest.raises(BadInput, match="raw folder does not exist"):
        read_table(raw / "nowhere")
    with pytest.raises(BadInput, match=r"no table absent\.csv"):
        read_table(raw, "absent.csv")
    write(raw.parent, f"{HEAD}\na.png,0,p\n", "out.csv")
    with pytest.raises(BadInput, match="leaves the raw folder"):
        read_table(raw, "../out.csv")
    (raw / "link.csv").symlink_to(raw.parent / "out.csv")
    with pytest.raises(BadInput, match="link that leaves"):
        read_table(raw, "link.csv")


def test_links_are_followed_inside_and_refused_outside(raw: Path) -> None:
    (raw / "inside.png").symlink_to("in/c.png")
    (raw / "outside.png").symlink_to(raw.parent / "outside.png")
    (raw / "away").symlink_to(raw.parent)
    write(raw, f"{HEAD}\ninside.png,0,p\n")
    assert len(read_table(raw)) == 1
    write(raw, f"{HEAD}\ninside.png,0,p\nin/c.png,0,p\n")
    with pytest.raises(BadInput, match="duplicate image: row 1"):
        read_table(raw)
    for name in ("outside.png", "away/outside.png"):
        write(raw, f"{HEAD}\n{name},0,p\n")
        with pytest.raises(BadInput, match="link that leaves the raw folder"):
            read_table(raw)
    os.mkfifo(raw / "pipe.png")  # a pipe would keep a reader waiting for ever
    write(raw, f"{HEAD}\npipe.png,0,p\n")
    with pytest.raises(BadInput, match="not a plain file"):
        read_table(raw)


_ROW = b"image,label,patient,mask,spacing_mm,window_low,window_high\na.png,0,p,m.png,1.2,300,1800\nb.png,1,q,,,,\n"


@hypothesis_settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(_ROW)), st.binary(max_size=4), st.integers(0, 3)), max_size=6))
def test_a_mangled_table_is_rows_or_bad_input(raw: Path, edits: list[tuple[int, bytes, int]]) -> None:
    text = _ROW
    for at, new, removed in edits:
        text = text[:at] + new + text[at + removed :]
    write(raw, text)
    try:
        rows = read_table(raw, classes=("0", "1"))
    except BadInput:
        return
    assert all(row.label in ("0", "1") and row.patient and ".." not in row.image for row in rows)
