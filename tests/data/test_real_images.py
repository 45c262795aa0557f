"""Ingest on real images, where they are at hand: short-axis cine as PNG, native DICOM scouts, skin in colour."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from cmrhpc.data.ingest import ingest
from cmrhpc.data.table import labels_of, read_table
from cmrhpc.shards import read_shard
from cmrhpc.study import Data, Folds


def need(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"the real images are not at hand: no folder {folder}")
    return folder


def test_cine_short_axis(real_data: Path, tmp_path: Path) -> None:
    raw = need(real_data / "sunnybrook_cine_sax")
    data = Data(raw="", table="index.csv", columns={"patient": "subject"}, file_spacing_mm=1.25)
    summary = ingest(data, ("0", "1"), raw, tmp_path / "cohort.h5", folds=Folds(k=5))
    assert summary.images == {"0": 93, "1": 433}
    assert summary.patients == {"0": 6, "1": 24}
    assert not any("cuts away" in text for text in summary.warnings)  # no mask pixel is lost in 80 x 80
    assert summary.clipped == pytest.approx(0.02, abs=0.003)
    shard = read_shard(tmp_path / "cohort.h5")
    assert shard.shapes["image"] == (526, 1, 80, 80)
    with open(raw / "index.csv") as stream:
        told = [float(row["mask_area_px"]) for row in csv.DictReader(stream)]
    area = shard["mask"].sum(axis=(1, 2)) * (1.172 / 1.25) ** 2  # resampling keeps areas
    np.testing.assert_allclose(area, told, rtol=0.03, atol=15)
    centre = [np.mean(np.nonzero(mask), axis=1) for mask in shard["mask"]]
    np.testing.assert_allclose(centre, 39.5, atol=1.0)
    # Blood is bright and inside the mask.
    inside = [
        image[0][mask > 0].mean() - image[0].mean() for image, mask in zip(shard["image"], shard["mask"], strict=True)
    ]
    assert np.mean(np.array(inside) > 0) > 0.9


@pytest.mark.parametrize("roi", ["centre", "whole"])
def test_dicom_scouts_keep_each_their_spacing(real_data: Path, tmp_path: Path, roi: str) -> None:
    raw = need(real_data / "sunnybrook_scout_dicom")
    data = Data(raw="", table="index.csv", columns={"patient": "subject"}, roi=roi)
    ingest(data, ("0", "1"), raw, tmp_path / "cohort.h5")
    shard = read_shard(tmp_path / "cohort.h5")
    with open(raw / "index.csv") as stream:
        rows = list(csv.DictReader(stream))
    told = [[float(row["pixel_spacing_row_mm"]), float(row["pixel_spacing_col_mm"])] for row in rows]
    np.testing.assert_allclose(shard["spacing"], told, rtol=1e-6)
    expected = 1.172 if roi == "centre" else np.array(told)[:, 0] * 256 / 80
    np.testing.assert_allclose(shard["grid_spacing"], expected, rtol=1e-6)
    told_csv = list(csv.DictReader(io.StringIO((tmp_path / "cohort.csv").read_text())))
    assert {row["spacing_from"] for row in told_csv} == {"file"}
    for path in tmp_path.iterdir():  # nothing of a header is carried over
        assert b"SCD0000" not in path.read_bytes()


def test_skin_in_colour(real_data: Path, tmp_path: Path) -> None:
    raw = need(real_data / "ham10000_224_noncommercial")
    columns = {"patient": "lesion_id", "label": "dx"}
    classes = labels_of(read_table(raw, "index.csv", columns))
    data = Data(raw="", table="index.csv", columns=columns, roi="whole", channels=3, image_size=64)
    summary = ingest(data, classes, raw, tmp_path / "cohort.h5")
    shard = read_shard(tmp_path / "cohort.h5")
    assert shard.shapes["image"] == (280, 3, 64, 64)
    assert set(summary.images.values()) == {40}
    assert len(classes) == 7
    red, green, blue = shard["image"].mean(axis=(0, 2, 3))
    assert red > green > 0 or red > blue  # skin
