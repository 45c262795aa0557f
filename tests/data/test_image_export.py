"""Images of shards as files: ms and spacing restored where they are known, and said where not."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from cmrhpc.data.export import export
from cmrhpc.data.images import Reader
from cmrhpc.data.ingest import ingest
from cmrhpc.data.mha import mha_bytes
from cmrhpc.errors import BadInput, UsageError
from cmrhpc.shards import Shard, read_shard, text_array, write_shard
from tests.data.raw_folder import disc, make_raw, picture, settings, write_table
from tests.data.test_ingest_images import middle


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    rows = make_raw(tmp_path / "raw", 4, 1)
    write_table(tmp_path / "raw", [row | {"window_low": "-5000", "window_high": "5000"} for row in rows])
    ingest(settings(spacing_mm=1.2), ("0", "1"), tmp_path / "raw", tmp_path / "ws" / "cohort.h5")
    return tmp_path / "ws"


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "images.csv") as stream:
        return list(csv.DictReader(stream))


def test_a_cohort_goes_back_to_its_units_and_spacing(workspace: Path, tmp_path: Path) -> None:
    assert export(workspace, "cohort.h5", tmp_path / "out", "mha") == 4
    rows = table(tmp_path / "out")
    assert [row["image"] for row in rows[:2]] == ["000001_class0.mha", "000002_class1.mha"]
    assert {row["unit"] for row in rows} == {"raw"}
    image = sitk.ReadImage(str(tmp_path / "out" / rows[0]["image"]))
    assert image.GetSpacing() == (1.2, 1.2, 1.0)
    restored = sitk.GetArrayFromImage(image)[0]
    assert restored.dtype == np.float32
    window = middle(disc((40, 30), (20.3, 14.1), 6))
    np.testing.assert_allclose(restored, picture(0)[window], atol=0.01)


def synthetic(workspace: Path, cohort: Shard, ids: list[str], content: str) -> None:
    images = np.linspace(-1, 1, 3 * 16 * 16, dtype=np.float32).reshape(3, 1, 16, 16)
    write_shard(
        workspace / "synthetic" / "s.h5",
        {"image": images, "label": np.array([1, 1, 1]), "train_id": text_array(ids)},
        schema="images-1",
        task={},
        settings={},
        inputs={"cohort.h5": content},
        seed=0,
    )


def test_synthetic_images_take_the_common_window_of_their_training_images(workspace: Path, tmp_path: Path) -> None:
    cohort = read_shard(workspace / "cohort.h5")
    synthetic(workspace, cohort, ["r000001", "r000003"], cohort.content_sha256)
    assert export(workspace, "synthetic/s.h5", tmp_path / "out", "mha", limit=2) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000001_class1.mha",
        "000002_class1.mha",
        "images.csv",
    ]
    first = sitk.ReadImage(str(tmp_path / "out" / "000001_class1.mha"))
    pixels = sitk.GetArrayFromImage(first)[0]
    expected = np.linspace(-1, 1, 3 * 256)[:256].reshape(16, 16) * 5000
    np.testing.assert_allclose(pixels, expected, atol=0.01)
    assert first.GetSpacing()[:2] == (1.2, 1.2)


@pytest.mark.parametrize("case", ["another cohort", "no cohort"])
def test_without_their_cohort_they_stay_normalised_and_say_so(workspace: Path, tmp_path: Path, case: str) -> None:
    cohort = read_shard(workspace / "cohort.h5")
    synthetic(workspace, cohort, ["r000001"], "0" * 64 if case == "another cohort" else cohort.content_sha256)
    if case == "no cohort":
        (workspace / "cohort.h5").unlink()
    export(workspace, "synthetic/s.h5", tmp_path / "out", "mha")
    assert {row["unit"] for row in table(tmp_path / "out")} == {"[-1, 1]"}
    assert table(tmp_path / "out")[0]["spacing_mm"] == ""
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "000003_class1.mha")))
    assert pixels.max() == 1.0
    with Reader() as reader:  # an unknown spacing is written as none, not as 1 mm
        assert reader.read(tmp_path / "out" / "000003_class1.mha", "row 1").spacing is None


def test_png_is_eight_bit_grey(workspace: Path, tmp_path: Path) -> None:
    export(workspace, "cohort.h5", tmp_path / "out")
    values = read_shard(workspace / "cohort.h5")["image"][0, 0]
    with Image.open(tmp_path / "out" / "000001_class0.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.round(values * 127.5 + 127.5).astype(np.uint8))


def test_what_cannot_be_exported_is_told(workspace: Path, tmp_path: Path) -> None:
    (workspace / "empty").mkdir()
    write_shard(
        workspace / "p.h5", {"score": np.zeros(2)}, schema="predictions-1", task={}, settings={}, inputs={}, seed=0
    )
    with pytest.raises(BadInput, match='schema "predictions-1" holds no images'):
        export(workspace, "p.h5", tmp_path / "out")
    with pytest.raises(BadInput, match="missing"):
        export(workspace, "absent.h5", tmp_path / "out")
    with pytest.raises(UsageError, match="gif"):
        export(workspace, "cohort.h5", tmp_path / "out", "gif")
    with pytest.raises(UsageError):
        export(workspace, "cohort.h5", tmp_path / "out", limit=-1)
    with pytest.raises(UsageError, match="by-fold is for the cohort"):
        export(workspace, "p.h5", tmp_path / "out", by_fold=True)
    with pytest.raises(BadInput, match="no shard in this folder"):
        export(workspace, "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_mixed_into_a_folder_that_holds_something(workspace: Path, tmp_path: Path) -> None:
    export(workspace, "cohort.h5", tmp_path / "out", limit=1)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(UsageError, match="not empty"):
        export(workspace, "cohort.h5", tmp_path / "out", "mha")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_mha_bytes_are_read_by_simpleitk(tmp_path: Path, kind: type, compress: bool, shape: tuple[int, ...]) -> None:
    pixels = (np.random.default_rng(0).normal(60, 20, shape)).astype(kind)
    data = mha_bytes(pixels, (1.5, 0.75), 8.0, compress)
    assert data == mha_bytes(pixels, (1.5, 0.75), 8.0, compress)
    (tmp_path / "a.mha").write_bytes(data)
    image = sitk.ReadImage(str(tmp_path / "a.mha"))
    assert image.GetSpacing() == (0.75, 1.5, 8.0)
    assert np.array_equal(sitk.GetArrayFromImage(image)[0], pixels)
