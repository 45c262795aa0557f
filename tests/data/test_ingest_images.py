"""Raw folder -> cohort: geometry, intensity, channels, privacy, reports; against slow versions."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from cmrhpc.data import ingest as module
from cmrhpc.data.ingest import Summary, ingest
from cmrhpc.data.table import normalised_apart
from cmrhpc.errors import BadInput
from cmrhpc.shards import Shard, read_shard
from cmrhpc.study import Folds
from tests.data.raw_folder import disc, make_raw, picture, save, settings, write_table
from tests.data.test_geometry import slow_linear

CLASSES = ("0", "1")


def run(tmp_path: Path, **changes: object) -> tuple[Shard, Summary]:
    out = tmp_path / "ws" / "cohort.h5"
    summary = ingest(settings(**changes), CLASSES, tmp_path / "raw", out)
    return read_shard(out, "cohort-1"), summary


def middle(mask: np.ndarray, size: int = 16) -> tuple[slice, slice]:
    """The square whose middle is nearest to the mask's mean, by trying all; of two the upper or left one."""
    parts = []
    for at in np.nonzero(mask):
        starts = range(-size, mask.shape[0])
        first = min(starts, key=lambda s: (round(abs(s + (size - 1) / 2 - at.mean()), 9), s))
        parts.append(slice(first, first + size))
    return parts[0], parts[1]


def report(shard: Shard) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(shard.path.with_suffix(".csv").read_text())))


def test_the_cohort_holds_what_the_contract_says(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw")
    shard, summary = run(tmp_path)
    assert shard.shapes == {
        "image": (12, 1, 16, 16),
        "mask": (12, 16, 16),
        "label": (12,),
        "patient": (12,),
        "id": (12,),
        "spacing": (12, 2),
        "window": (12, 2),
        "grid_spacing": (12,),
    }
    assert shard["image"].dtype == np.float32
    assert shard["mask"].dtype == np.uint8
    assert shard["label"].tolist() == [0, 0, 1, 1] * 3
    assert shard.strings("id")[:2] == ["r000001", "r000002"]
    assert shard.strings("patient")[:3] == ["p0001", "p0001", "p0002"]
    assert shard.attributes["classes"] == ["0", "1"]
    assert shard.attributes["spacing_mm"] == 1.2
    assert shard.attributes["roi"] == "mask"
    assert list(shard.inputs) == ["cohort.csv"]
    assert sorted(p.name for p in shard.path.parent.iterdir()) == ["cohort.csv", "cohort.h5", "cohort.png"]
    assert summary.images == {"0": 6, "1": 6}
    assert summary.patients == {"0": 3, "1": 3}
    assert "12 images" in str(summary)
    assert "1.2 mm" in str(summary)


@pytest.mark.parametrize("ending", ["mha", "nii", "nii.gz", "nrrd", "gipl", "gipl.gz", "dcm"])
def test_every_format_gives_the_same_region_at_anisotropic_spacing(tmp_path: Path, ending: str) -> None:
    """Rows 1.5 mm apart, columns 0.75 mm, 40 x 30 px, no symmetry: a swap or a flip anywhere would show."""
    raw, pixels, mask = tmp_path / "raw", picture(3), disc((40, 30), (24, 9), 4)
    rows = []
    for k in range(2):
        save(raw / f"a{k}.{ending}", pixels + k, (1.5, 0.75))
        save(raw / f"m{k}.{ending}", mask, (1.5, 0.75))
        rows.append({"image": f"a{k}.{ending}", "label": str(k), "patient": f"p{k}", "mask": f"m{k}.{ending}"})
    write_table(raw, rows)
    shard, summary = run(tmp_path, spacing_mm=0.9)
    np.testing.assert_allclose(shard["spacing"], [[1.5, 0.75]] * 2, rtol=1e-6)
    # Mask centre: row 24 = 36 mm = 40 px of 0.9 mm, column 9 = 6.75 mm = 7.5 px: the region starts at 32 and 0.
    region = slow_linear(pixels.astype(float), (32 * 0.6, 0), (0.6, 1.2), 16)
    low, high = np.percentile(region, [1, 99])
    expected = np.clip((region - low) / (high - low) * 2 - 1, -1, 1)
    np.testing.assert_allclose(shard["image"][0, 0], expected, atol=2e-5)
    np.testing.assert_allclose(shard["window"][0], [low, high], rtol=1e-6)
    assert report(shard)[0]["spacing_from"] == "file"
    assert not summary.warnings


def test_dicom_spacing_slope_and_single_frame(tmp_path: Path) -> None:
    """PixelSpacing is row spacing, then column spacing; stored values are rescaled; the slice is a volume of one."""
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = []
    for k in range(2):
        image = sitk.GetImageFromArray(picture(k)[None])
        for tag, value in (
            ("0008|0060", "MR"),
            ("0008|0016", "1.2.840.10008.5.1.4.1.1.4"),
            ("0028|0030", "1.6\\0.8"),
            ("0010|0010", "Doe^Jane"),
            ("0028|1053", "2"),
            ("0028|1052", "-7"),
        ):
            image.SetMetaData(tag, value)
        image.SetSpacing((0.8, 1.6, 8.0))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(raw / f"IM-0001-000{k}.dcm"))
        writer.Execute(image)
        (raw / f"IM-0001-000{k}.dcm").rename(raw / f"IM-0001-000{k}")  # DICOM needs no ending
        rows.append({"image": f"IM-0001-000{k}", "label": str(k), "patient": str(k)})
    write_table(raw, rows)
    shard, _ = run(tmp_path, roi="centre", spacing_mm=0.8)
    np.testing.assert_allclose(shard["spacing"], [[1.6, 0.8]] * 2)
    # What pydicom or any viewer shows is slope x stored + intercept; SimpleITK's own reading is the reference here.
    shown = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / rows[0]["image"])))[0].astype(float)
    # Centre 31.2 mm = 39 and 11.6 mm = 14.5 pixels of 0.8 mm: the region starts at 31.5 -> 31 and 7.
    region = slow_linear(shown, (31 / 2, 7.0), (0.5, 1.0), 16)
    np.testing.assert_allclose(shard["window"][0], np.percentile(region, [1, 99]), rtol=1e-6)
    for path in shard.path.parent.iterdir():
        assert b"Doe" not in path.read_bytes()


def test_png_takes_its_spacing_from_the_table_or_the_study(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    rows = []
    for k in range(2):
        save(raw / f"{k}.png", picture(k).astype(np.uint16))
        rows.append({"image": f"{k}.png", "label": str(k), "patient": str(k)})
    write_table(raw, rows)
    with pytest.raises(BadInput, match="spacing is unknown") as caught:
        run(tmp_path, roi="centre")
    assert "--spacing" in caught.value.mend
    assert 'roi = "whole"' in caught.value.mend
    assert caught.value.where == "cohort.csv row 1, column image"
    shard, _ = run(tmp_path, roi="centre", file_spacing_mm=1.25)
    assert shard["spacing"].tolist() == [[1.25, 1.25]] * 2
    write_table(raw, [row | {"spacing_mm": text} for row, text in zip(rows, ("1.3", "1.1x1.4"), strict=True)])
    shard, _ = run(tmp_path, roi="centre", file_spacing_mm=1.25)
    assert shard["spacing"].tolist() == [[1.3, 1.3], [1.1, 1.4]]
    assert {row["spacing_from"] for row in report(shard)} == {"table"}
    write_table(raw, rows)
    shard, summary = run(tmp_path, roi="whole")  # the whole image needs no spacing
    assert np.isnan(shard["spacing"]).all()
    assert np.isnan(shard["grid_spacing"]).all()
    assert "spacing unknown" in str(summary)
    assert not summary.warnings


def test_the_tables_spacing_wins_over_the_files_with_a_warning(tmp_path: Path) -> None:
    rows = make_raw(tmp_path / "raw", 2, 1)
    write_table(tmp_path / "raw", [row | {"spacing_mm": "1.5"} for row in rows])
    shard, summary = run(tmp_path)
    assert shard["spacing"].tolist() == [[1.5, 1.5]] * 2
    assert "the file says 1.2 x 1.2 mm" in summary.warnings[0]


def test_a_window_keeps_milliseconds_and_counts_what_it_clips(tmp_path: Path) -> None:
    rows = make_raw(tmp_path / "raw", 2, 1)
    write_table(tmp_path / "raw", [row | {"window_low": "1000", "window_high": "1300"} for row in rows])
    shard, summary = run(tmp_path)
    pixels = picture(0).astype(float)
    region = pixels[middle(disc((40, 30), (20.3, 14.1), 6))]
    expected = np.clip((region - 1000) / 150 - 1, -1, 1)
    np.testing.assert_allclose(shard["image"][0, 0], expected, atol=1e-6)
    told = report(shard)[0]
    assert float(told["clipped_low"]) == pytest.approx((region < 1000).mean(), rel=1e-5)
    assert float(told["clipped_high"]) == pytest.approx((region > 1300).mean(), rel=1e-5)
    assert told["normalised_by"] == "window"
    clipped = [float(r["clipped_low"]) + float(r["clipped_high"]) for r in report(shard)]
    assert summary.clipped == pytest.approx(np.mean(clipped))
    assert summary.normalised == {"window": 2, "percentile": 0}
    shard, summary = run(tmp_path, normalise="percentile")
    np.testing.assert_allclose(shard["window"][0], np.percentile(region, [1, 99]))
    assert summary.normalised == {"window": 0, "percentile": 2}


@pytest.mark.parametrize("apart", [True, False])
def test_a_normalisation_that_tells_the_class_is_warned_of(tmp_path: Path, apart: bool) -> None:
    """A window in the rows of class 1 alone, or in one row of each class: then the kind tells nothing."""
    rows = make_raw(tmp_path / "raw", 4, 1)
    with_window = (1, 3) if apart else (0, 1)
    ends = [("900", "1500") if i in with_window else ("", "") for i in range(4)]
    table = [
        row | dict(zip(("window_low", "window_high"), pair, strict=True)) for row, pair in zip(rows, ends, strict=True)
    ]
    write_table(tmp_path / "raw", table)
    shard, summary = run(tmp_path)
    counts = (
        [{"window": 0, "percentile": 2}, {"window": 2, "percentile": 0}]
        if apart
        else [{"window": 1, "percentile": 1}] * 2
    )
    assert shard.attributes["normalise"]["classes"] == dict(zip(CLASSES, counts, strict=True))
    assert summary.normalised == {"window": 2, "percentile": 2}
    told = '0 by window, 2 by percentile; "1": 2 by window, 0 by percentile): a classifier can tell the class by it'
    assert [told in warning for warning in summary.warnings] == [True] * apart
    assert any("their values do not compare" in note for note in summary.notes) == (not apart)


def windows(tmp_path: Path, ends: list[tuple[int, int]]) -> tuple[Shard, Summary]:
    """Six images, of the classes 0 and 1 in turn, with these windows."""
    rows = make_raw(tmp_path / "raw", 6, 1)
    told = [{"window_low": str(low), "window_high": str(high)} for low, high in ends]
    write_table(tmp_path / "raw", [row | one for row, one in zip(rows, told, strict=True)])
    return run(tmp_path)


def test_windows_that_tell_the_class_are_warned_of_and_stored(tmp_path: Path) -> None:
    shard, summary = windows(tmp_path, [(0, 1800), (300, 1800)] * 3)
    kinds = {"window 0 to 1800": 3, "window 300 to 1800": 3, "percentile": 0}
    assert shard.attributes["normalise"]["images"] == summary.normalised == kinds
    assert shard.attributes["normalise"]["classes"] == {
        "0": kinds | {"window 300 to 1800": 0},
        "1": kinds | {"window 0 to 1800": 0},
    }
    (warning,) = summary.warnings
    assert warning.startswith(
        'the classes were normalised differently ("0": 3 by window 0 to 1800, 0 by window 300 to 1800, 0 by percentile;'
    )
    assert not summary.notes


def test_windows_that_all_classes_share_are_noted(tmp_path: Path) -> None:
    shard, summary = windows(tmp_path, [(0, 1800)] * 2 + [(300, 1800)] * 4)
    kinds = {"window 300 to 1800": 2, "window 0 to 1800": 1, "percentile": 0}
    assert shard.attributes["normalise"]["classes"] == {"0": kinds, "1": kinds}
    assert not summary.warnings
    assert summary.notes == ["the table gives 2 different windows: values of two of them do not compare"]


def test_a_window_for_each_image_is_noted_and_tells_no_class(tmp_path: Path) -> None:
    shard, summary = windows(tmp_path, [(n, 1800) for n in range(6)])
    assert shard.attributes["normalise"]["images"] == {"window": 6, "percentile": 0}
    assert not summary.warnings
    assert summary.notes == ["the table gives 6 different windows: values of two of them do not compare"]


def test_a_window_for_each_patient_tells_no_class(tmp_path: Path) -> None:
    """Its images are of one class, and so are those of a patient whatever the window."""
    rows = make_raw(tmp_path / "raw", 4, 2)
    ends = [{"window_low": str(int(row["patient"][4:]) * 10), "window_high": "1800"} for row in rows]
    write_table(tmp_path / "raw", [row | one for row, one in zip(rows, ends, strict=True)])
    shard, summary = run(tmp_path)
    assert shard.attributes["normalise"]["images"] == {"window": 8, "percentile": 0}
    assert not summary.warnings
    assert summary.notes == ["the table gives 4 different windows: values of two of them do not compare"]


def test_shares_of_normalisation_that_hardly_differ_tell_no_class() -> None:
    kinds = {"0": {"window": 500, "percentile": 500}, "1": {"window": 540, "percentile": 460}}
    assert normalised_apart(kinds) == ""
    assert "tell the class" in normalised_apart(kinds | {"1": {"window": 560, "percentile": 440}})


def test_windows_beyond_the_commonest_are_told_together(tmp_path: Path) -> None:
    shard, _ = windows(tmp_path, [(0, 1800)] * 4 + [(1, 1800), (2, 1800)])
    kinds = {"window 0 to 1800": 4, "another window": 2, "percentile": 0}
    assert shard.attributes["normalise"]["images"] == kinds


def test_mask_travels_with_its_image(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw", 2, 1)
    shard, _ = run(tmp_path)
    mask = disc((40, 30), (20.3, 14.1), 6)
    assert np.array_equal(shard["mask"][0], mask[middle(mask)])
    assert report(shard)[0]["mask_inside"] == "1.0"


def test_what_the_region_cuts_off_is_told_with_its_row(tmp_path: Path) -> None:
    rows = make_raw(tmp_path / "raw", 2, 1)
    save(tmp_path / "raw" / rows[1]["mask"], disc((40, 30), (30, 14), 11))
    shard, summary = run(tmp_path)
    kept, whole = shard["mask"][1].sum(), disc((40, 30), (30, 14), 11).sum()
    assert any(
        text == f"row 2: the region cuts away {whole - kept} of {whole} mask pixels" for text in summary.warnings
    )
    assert "cuts away" in report(shard)[1]["warning"]
    assert report(shard)[0]["warning"] == ""
    assert float(report(shard)[1]["mask_inside"]) == pytest.approx(kept / whole, rel=1e-5)


def test_a_region_that_leaves_the_image_repeats_its_border(tmp_path: Path) -> None:
    rows = make_raw(tmp_path / "raw", 2, 1)
    save(tmp_path / "raw" / rows[0]["mask"], disc((40, 30), (3, 14), 2))
    shard, summary = run(tmp_path)
    region = picture(0).astype(float)[np.clip(np.arange(-5, 11), 0, 39)][:, 6:22]  # the mask's mean is row 3, column 14
    low, high = shard["window"][0]
    np.testing.assert_allclose(shard["image"][0, 0], np.clip((region - low) / (high - low) * 2 - 1, -1, 1), atol=1e-6)
    assert summary.warnings == ["row 1: the region leaves the image: 31.2 % of it repeats the border"]


def colour_folder(raw: Path, equal: bool) -> np.ndarray:
    rows, stack = [], np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3)).astype(np.uint8)
    if equal:
        stack[..., 1:] = stack[..., :1]
    for k in range(2):
        save(raw / f"{k}.png", stack[k], colour=True)
        rows.append({"image": f"{k}.png", "label": str(k), "patient": str(k), "window_low": "0", "window_high": "255"})
    write_table(raw, rows)
    return stack.astype(float)


def test_equal_channels_become_grey_exactly(tmp_path: Path) -> None:
    stack = colour_folder(tmp_path / "raw", equal=True)
    shard, summary = run(tmp_path, roi="whole", image_size=24)
    np.testing.assert_allclose(shard["image"][:, 0], stack[..., 0] / 127.5 - 1, atol=1e-6)
    assert not summary.notes


def test_true_colour_becomes_luminance_with_a_note_or_stays(tmp_path: Path) -> None:
    stack = colour_folder(tmp_path / "raw", equal=False)
    shard, summary = run(tmp_path, roi="whole", image_size=24)
    expected = (0.299 * stack[..., 0] + 0.587 * stack[..., 1] + 0.114 * stack[..., 2]) / 127.5 - 1
    np.testing.assert_allclose(shard["image"][:, 0], expected, atol=1e-6)
    assert summary.notes == ["2 images are in colour and became grey (channels = 1): luminance of BT.601"]
    shard, summary = run(tmp_path, roi="whole", image_size=24, channels=3)
    np.testing.assert_allclose(shard["image"], stack.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert not summary.notes


def test_grey_images_fill_three_channels(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw", 2, 1)
    shard, _ = run(tmp_path, channels=3)
    assert shard.shapes["image"] == (2, 3, 16, 16)
    assert (shard["image"] == shard["image"][:, :1]).all()


def test_patient_ids_are_replaced_unless_asked_otherwise(tmp_path: Path) -> None:
    rows = make_raw(tmp_path / "raw", 4, 1)
    shard, summary = run(tmp_path)
    for path in shard.path.parent.iterdir():
        assert b"Doe" not in path.read_bytes()
        assert b"secret" not in path.read_bytes()
    assert "secret" not in str(summary)
    shard, _ = run(tmp_path, pseudonyms=False)
    assert shard.strings("patient") == ["Doe^0", "Doe^1", "Doe^2", "Doe^3"]
    write_table(tmp_path / "raw", [row | {"patient": "x" * 33} for row in rows])
    with pytest.raises(BadInput, match="more than 32 bytes"):
        run(tmp_path, pseudonyms=False)
    run(tmp_path)


def test_one_image_under_two_patients_or_classes_is_told_once_and_marked(tmp_path: Path) -> None:
    rows = make_raw(tmp_path / "raw", 6, 2)
    shutil.copy(tmp_path / "raw" / rows[2]["image"], tmp_path / "raw" / rows[8]["image"])  # patients 1 and 4
    os.unlink(tmp_path / "raw" / rows[5]["image"])
    os.link(tmp_path / "raw" / rows[4]["image"], tmp_path / "raw" / rows[5]["image"])  # both of patient 2
    rows[11] |= {"image": "again.mha", "label": "0"}
    shutil.copy(tmp_path / "raw" / rows[10]["image"], tmp_path / "raw" / "again.mha")  # patient 5, two classes
    write_table(tmp_path / "raw", rows)
    shard, summary = run(tmp_path)
    told = {int(row["row"]): row["warning"] for row in report(shard) if row["warning"]}
    assert told == {
        3: "the same image as row 9, which may fall into another fold",
        9: "the same image as row 3, which may fall into another fold",
        11: "the same image as row 12, of another class",
        12: "the same image as row 11, of another class",
    }
    (warning,) = summary.warnings
    told_once = "rows 3 and 9 are the same image (4 such rows in all): training and test can share it; give them"
    assert warning.startswith(told_once)
    # Where folds part images, both of patient 2 may be parted too.
    out, folds = tmp_path / "ws" / "cohort.h5", Folds(k=2, group_by="image")
    summary = ingest(settings(), CLASSES, tmp_path / "raw", out, folds=folds)
    assert "rows 3 and 9 are the same image (6 such rows in all)" in summary.warnings[0]


def test_no_cell_of_the_report_is_a_formula(tmp_path: Path) -> None:
    rows = make_raw(tmp_path / "raw", 2, 1)
    labels = ["=1+1", "@SUM(A1)"]
    write_table(
        tmp_path / "raw", [row | {"label": label, "patient": "+1"} for row, label in zip(rows, labels, strict=True)]
    )
    out = tmp_path / "ws" / "cohort.h5"
    ingest(settings(pseudonyms=False), labels, tmp_path / "raw", out)
    cells = [cell for row in csv.reader(io.StringIO(out.with_suffix(".csv").read_text())) for cell in row]
    assert "'=1+1" in cells
    assert "'@SUM(A1)" in cells
    assert "'+1" in cells
    assert not any(cell.startswith(("=", "+", "@")) for cell in cells)


def test_same_folder_same_cohort_and_bounded_memory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_raw(tmp_path / "raw")
    first, _ = run(tmp_path)
    hashes = first.content_sha256, first.files
    monkeypatch.setattr(module, "SPOOL_MEMORY", 1)
    monkeypatch.setattr(module, "BLOCK", 5)
    second, _ = run(tmp_path)
    assert (second.content_sha256, second.files) == hashes


def test_an_image_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cohort would name the hash of a file that it was not made from."""
    make_raw(tmp_path / "raw")
    first, second = sorted((tmp_path / "raw").glob("**/*.mha"))[:2]
    cut = module.crop_image

    def cut_and_replace(*arguments: object) -> object:
        found = cut(*arguments)  # type: ignore[arg-type]
        shutil.copy(second, first)
        return found

    monkeypatch.setattr(module, "crop_image", cut_and_replace)
    with pytest.raises(BadInput, match="changed while it was read") as caught:
        run(tmp_path)
    assert "row" in caught.value.where


def test_progress_is_told_and_the_sheet_is_a_picture(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw", 4, 1)
    told: list[tuple[int, int]] = []
    out = tmp_path / "ws" / "cohort.h5"
    ingest(settings(), CLASSES, tmp_path / "raw", out, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    from PIL import Image

    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.size[1] > 2 * 96  # two classes, each a banner and a row of images


def test_ingest_needs_no_torch(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw", 2, 1)
    code = (
        "import sys\nfrom pathlib import Path\nfrom cmrhpc.data.ingest import ingest\nfrom cmrhpc.study import Data\n"
        f"ingest(Data(raw='', image_size=16), ('0', '1'), Path({str(tmp_path / 'raw')!r}), "
        f"Path({str(tmp_path / 'ws/c.h5')!r}))\n"
        "print([m for m in ('torch', 'torchvision', 'timm', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
