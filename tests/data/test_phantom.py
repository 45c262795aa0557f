"""The phantom: what its files hold, same seed same bytes, and how well a perfect reader does."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from cmrhpc.data import phantom
from cmrhpc.data.phantom import MODEL, PREVALENCE, draw_t1, healthy_count, perfect_reader, write_phantom
from cmrhpc.data.table import read_table
from cmrhpc.errors import BadInput, UsageError


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "raw"
    assert write_phantom(folder, 20, 3) == len(read_table(folder))
    return folder


def test_files_are_as_the_papers_describe(raw: Path) -> None:
    rows = read_table(raw, classes=("0", "1"))
    with open(raw / "cohort.csv") as stream:
        assert next(csv.reader(stream)) == ["image", "label", "patient", "mask", "window_low", "window_high"]
    per_patient: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        image, mask = sitk.ReadImage(str(raw / row.image)), sitk.ReadImage(str(raw / str(row.mask)))
        assert image.GetSize() == mask.GetSize() == (256, 218, 1)
        assert image.GetPixelID() == sitk.sitkInt16
        assert image.GetSpacing() == mask.GetSpacing()
        assert image.GetSpacing()[0] == image.GetSpacing()[1]
        assert 1.172 <= image.GetSpacing()[0] <= 1.406
        per_patient.setdefault(row.patient, []).append(image.GetSpacing())
        pixels = sitk.GetArrayFromImage(mask)
        assert set(np.unique(pixels)) == {0, 1}
        assert 250 < pixels.sum() < 3000
    assert len(per_patient) == 20
    assert all(2 <= len(slices) <= 4 and len(set(slices)) == 1 for slices in per_patient.values())
    assert {row.window for row in rows} == {(300.0, 1800.0)}
    assert len({row.patient for row in rows if row.label == "0"}) == 5


def test_tissues_have_their_t1(raw: Path) -> None:
    """Median T1 inside the mask is that of myocardium, within the ring that of blood, in the corner that of air."""
    for row in read_table(raw):
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / row.image)))[0]
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / str(row.mask))))[0]
        centre = [int(at.mean().round()) for at in np.nonzero(mask)]
        assert 850 < np.median(image[mask > 0]) < 1400
        assert mask[centre[0], centre[1]] == 0  # a ring
        inner = image[centre[0] - 2 : centre[0] + 3, centre[1] - 2 : centre[1] + 3]
        assert 1350 < np.median(inner) < 1800
        assert image[:5, :5].max() < 100


def test_disease_is_t1_and_nothing_else(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the two T1 values held fixed, healthy and diseased cohorts are the same picture for picture."""
    monkeypatch.setattr(phantom, "draw_t1", lambda rng, label: (rng.normal(), rng.random(), 1000.0, 0.0)[2:])
    write_phantom(tmp_path / "a", 4, 0)
    monkeypatch.setattr(phantom, "healthy_count", lambda patients: 0)
    write_phantom(tmp_path / "b", 4, 0)
    a, b = digest(tmp_path / "a"), digest(tmp_path / "b")
    assert a.pop("cohort.csv") != b.pop("cohort.csv")
    assert a == b


def test_same_seed_same_bytes_whatever_the_threads(tmp_path: Path, raw: Path) -> None:
    code = "import sys; from pathlib import Path; from cmrhpc.data.phantom import write_phantom\n"
    code += "write_phantom(Path(sys.argv[1]), 20, 3)"
    environment = os.environ | {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment)
    assert digest(tmp_path / "again") == digest(raw)
    write_phantom(tmp_path / "other", 4, 4)
    assert not set(digest(tmp_path / "other").values()) & set(digest(raw).values())


def test_a_perfect_reader_is_right_in_85_to_92_percent() -> None:
    reader = perfect_reader()
    assert 0.85 <= reader.accuracy <= 0.92
    assert reader.accuracy == pytest.approx(0.900, abs=0.001)  # the figure that the documentation states
    assert 0.85 <= perfect_reader(0.75).accuracy <= 0.92  # the share of diseased in a cohort of 40
    assert reader.accuracy == pytest.approx(
        PREVALENCE * reader.sensitivity + (1 - PREVALENCE) * reader.specificity, abs=1e-12
    )
    # Always calling disease is worse by far, so there is something to see.
    assert reader.accuracy > PREVALENCE + 0.1


def test_the_integral_agrees_with_drawing_and_judging_patients() -> None:
    rng = np.random.default_rng(0)
    draws = 20_000

    def log_density(at: float, mean_sd: tuple[float, float]) -> float:
        return -0.5 * ((at - mean_sd[0]) / mean_sd[1]) ** 2 - np.log(mean_sd[1])

    right = 0
    for _ in range(draws):
        label = int(rng.random() < PREVALENCE)
        remote, contrast = draw_t1(rng, label)
        usual = log_density(remote, MODEL.healthy_remote), log_density(contrast, MODEL.healthy_contrast)
        healthy = np.log(1 - PREVALENCE) + sum(usual)
        disease = np.log(PREVALENCE / 2) + np.logaddexp(
            log_density(remote, MODEL.diffuse_remote) + usual[1], usual[0] + log_density(contrast, MODEL.focal_contrast)
        )
        right += int((disease > healthy) == label)
    accuracy = perfect_reader().accuracy
    assert abs(right / draws - accuracy) < 4 * np.sqrt(accuracy * (1 - accuracy) / draws)


def test_a_quarter_is_healthy_and_enough_for_folds() -> None:
    assert healthy_count(298) == 77
    assert [healthy_count(n) for n in (4, 8, 10, 20, 40)] == [2, 4, 5, 5, 10]


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(BadInput, match="not empty") as caught:
            write_phantom(tmp_path / name, 4, 0)
        assert caught.value.exit_code == 3
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert write_phantom(tmp_path / "empty", 4, 0) == len(read_table(tmp_path / "empty"))
    for count in (3, 10**6):
        with pytest.raises(UsageError):
            write_phantom(tmp_path / "new", count, 0)


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(phantom.files, "rename", fails)
        with pytest.raises(BadInput, match="No space left"):
            write_phantom(tmp_path / "raw", 4, 0)
    assert list(tmp_path.iterdir()) == []
    abandoned = tmp_path / f".raw.tmp.{phantom.files.host_name()}.4194303.1-1"  # of a process that was killed
    abandoned.mkdir()
    write_phantom(tmp_path / "raw", 4, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]
    assert all(p.stat().st_mode & 0o007 == 0 for p in tmp_path.rglob("*"))  # no access for others
