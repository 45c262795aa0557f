"""Who a patient is stays in the raw folder: no file of a workspace tells, and no file is open to others."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import pytest
import SimpleITK as sitk

from cmrhpc.errors import BadInput
from cmrhpc.shards import read_shard
from cmrhpc.stages.task import run_task
from cmrhpc.workspace import Workspace
from tests.reliability.conftest import cmrhpc, copy_of

MARK = "Zubrowka"  # in patient ids, file names and headers


def mark(root: Path, study: str = "") -> Path:
    """Rename images, masks and patients of a raw folder so that all of them, and the headers, hold the mark."""
    raw = root / "raw"
    with open(raw / "cohort.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["patient"] = f"{MARK}^{row['patient']}"
        for column in ("image", "mask"):
            new = str(Path(row[column]).with_name(f"{MARK}_{Path(row[column]).name}"))
            image = sitk.ReadImage(str(raw / row[column]))
            image.SetMetaData("Comment", f"{MARK} 1970-01-01")
            sitk.WriteImage(image, str(raw / new))
            (raw / row[column]).unlink()
            row[column] = new
    with open(raw / "cohort.csv", "w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    raw.rename(root / MARK)
    text = (root / "study.toml").read_text().replace('raw = "raw"', f'raw = "{MARK}"\n{study}')
    (root / "study.toml").write_text(text)
    return root


def telling(root: Path) -> set[str]:
    """Files of the workspace in whose bytes or name the mark stands, the raw folder and study.toml left out."""
    found = set()
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if path.is_file() and name.parts[0] not in (MARK, "study.toml"):
            held = MARK.encode().lower() in path.read_bytes().lower()
            found |= {name.as_posix()} if held or MARK in str(name) else set()
    return found


def test_no_file_of_a_whole_run_tells_who_a_patient_is(fresh: Path, tmp_path: Path) -> None:
    root = mark(copy_of(fresh, tmp_path / "marked"))
    done = cmrhpc("run", root, "--jobs", "2", "--plain")
    assert MARK not in done.stdout + done.stderr
    assert len([path for path in root.rglob("*") if path.is_file()]) > 60
    # The raw folder's path is part of the study; nothing else of it is.
    assert telling(root) == set()
    for path in root.rglob("*"):
        if path.relative_to(root).parts[0] not in (MARK, "study.toml"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0, path


def test_own_patient_ids_are_kept_when_asked_for(fresh: Path, tmp_path: Path) -> None:
    root = mark(copy_of(fresh, tmp_path / "marked"), "pseudonyms = false")
    run_task(Workspace(root), "ingest", 0)
    assert all(name.startswith(MARK) for name in read_shard(root / "cohort.h5").strings("patient"))
    assert telling(root) == {"cohort.h5", "cohort.csv"}


FAULTS = ["broken image", "absent mask", "unknown label", "label is the patient", "window_low is the patient"]


@pytest.mark.parametrize("fault", FAULTS)
def test_logs_of_failures_name_rows(fresh: Path, tmp_path: Path, fault: str) -> None:
    root = mark(copy_of(fresh, tmp_path / "marked"))
    table = root / MARK / "cohort.csv"
    lines = table.read_text().splitlines()
    fields = dict(zip(lines[0].split(","), lines[3].split(","), strict=True))
    if fault == "broken image":
        (root / MARK / fields["image"]).write_bytes(b"ObjectType = Image\n")
    elif fault == "absent mask":
        (root / MARK / fields["mask"]).unlink()
    else:
        column, _, patient = fault.partition(" is the ")
        fields |= {column: fields[patient]} if patient else {"label": "7"}
        table.write_text("\n".join([*lines[:3], ",".join(fields.values()), *lines[4:]]) + "\n")
    with pytest.raises(BadInput) as caught:
        run_task(Workspace(root), "ingest", 0)
    assert MARK not in str(caught.value)
    assert "row 3" in caught.value.where
    if "patient" in fault:  # a person who looks for the mistake is told; a log is not
        assert MARK in caught.value.for_a_person()
        assert MARK in cmrhpc("ingest", root, check=False).stderr
        assert MARK not in cmrhpc("task", root, "--stage", "ingest", "--index", "0", check=False).stderr
    cmrhpc("run", root, "--plain", check=False)
    assert telling(root) == set()


@pytest.mark.parametrize("fault", ["no heading", "no folder", "no table"])
def test_logs_tell_neither_the_raw_folder_nor_its_first_row(fresh: Path, tmp_path: Path, fault: str) -> None:
    root = mark(copy_of(fresh, tmp_path / "marked"))
    table = root / MARK / "cohort.csv"
    if fault == "no heading":
        table.write_text("".join(table.read_text().splitlines(keepends=True)[1:]))
    elif fault == "no table":
        table.unlink()
    else:
        (root / MARK).rename(tmp_path / "elsewhere")
    done = cmrhpc("run", root, "--plain", check=False)
    assert done.returncode == 4
    assert MARK not in done.stdout + done.stderr
    assert telling(root) == set()
    assert MARK in cmrhpc("ingest", root, check=False).stderr


def test_html_and_formulas_in_labels_are_harmless(fresh: Path, tmp_path: Path) -> None:
    root = copy_of(fresh, tmp_path / "hostile")
    labels = ["=cmd|' /C calc'!A1", "<script>alert(1)</script>"]
    with open(root / "raw/cohort.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(root / "raw/cohort.csv", "w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(row | {"label": labels[int(row["label"])]} for row in rows)
    text = (root / "study.toml").read_text().replace('classes = ["0", "1"]', f"classes = {labels}")
    text = text.split("[[arms]]")[0] + '[[arms]]\nname = "none"\n[[arms]]\nname = "affine"\n'
    (root / "study.toml").write_text(text + '[primary]\nclassifier = "resnet50"\narm = "affine"\n')
    cmrhpc("run", root, "--jobs", "2", "--plain")
    page = (root / "report/index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    for path in [root / "cohort.csv", *(root / "report").glob("*.csv")]:
        with open(path, newline="") as stream:
            for row in csv.reader(stream):
                assert not any(cell.startswith(("=", "@", "+")) for cell in row), (path, row)


def test_an_error_of_the_file_system_tells_no_file_in_what_is_stored(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cmrhpc import cli
    from cmrhpc.stages import task

    root = copy_of(fresh, tmp_path / "w")

    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied", f"/clinic/{MARK}/cohort.csv")

    monkeypatch.setattr(task, "run_task", refuse)
    assert cli.main(["task", str(root), "--stage", "ingest"]) == 3
    record = (root / "logs/ingest_0.json").read_text()
    said = capsys.readouterr()
    for text in (record, said.err + said.out):  # the second goes to the task's log
        assert "Permission denied" in text
        assert MARK not in text
