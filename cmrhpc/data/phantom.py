"""A simulated cohort of native T1 maps of the heart in short axis, at 1.5 T, in milliseconds.

The anatomy (`anatomy.py`) is the same for both classes; the disease is nothing but T1. How T1 is drawn, and therefore
how well a reader can do who knows it exactly, is written down in `T1Model`.

T1 in ms (mean and SD between patients, 1.5 T):

* Healthy myocardium 1025, 38: MOLLI 5s(3s)3s, 94 volunteers (Rosmini et al., Eur Heart J Cardiovasc Imaging 2018).
  Other protocols read lower, 950 +- 21 (Dabir et al., J Cardiovasc Magn Reson 2014) and 962 +- 25 (Piechnik et al.,
  same journal, 2013), which is why each site needs a range of its own (Messroghli et al., same journal, 2017).
* Disease raises it (oedema, fibrosis, amyloid: Moon et al., J Cardiovasc Magn Reson 2013), diffusely or in a part of
  the wall. Size and spread of the rise are this phantom's own, chosen for the overlap that `perfect_reader` states.
* Liver 586, skeletal muscle 856, fat 343, marrow 549, spleen 1057 (de Bazelaire et al., Radiology 2004).
* Blood 1441 +- 120 (Stanisz et al., Magn Reson Med 2005); 1550 here, as MOLLI reads blood in the ventricles.
* Lung 1199 +- 117 in inspiration (Stadler et al., J Magn Reson Imaging 2005), hidden in noise as on real maps.
"""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmrhpc import files
from cmrhpc.data.anatomy import draw_heart, draw_slice
from cmrhpc.data.mha import mha_bytes
from cmrhpc.errors import BadInput, UsageError
from cmrhpc.seeds import derive_seed

SPACING = (1.172, 1.406)  # mm in plane, range over patients (METHODS M1)
THICKNESS = 8.0  # mm
WINDOW = (300, 1800)  # ms that become -1 and 1
PREVALENCE = 221 / 298  # share of diseased patients (METHODS M1)
LEVELS = (0.0, 0.35, 0.7, 1.0)  # base, middle, lower, apex
MAX_PATIENTS = 100_000


@dataclass(frozen=True)
class T1Model:
    """How a patient's two T1 values are drawn, in ms: independent normal draws (mean, SD).

    remote: T1 of the myocardium. contrast: T1 offset of one wall sector, drawn in healthy hearts too. Half of the
    diseased are diffuse (remote raised), half focal (contrast raised).
    """

    healthy_remote: tuple[float, float] = (1025.0, 38.0)
    diffuse_remote: tuple[float, float] = (1130.0, 48.0)
    healthy_contrast: tuple[float, float] = (0.0, 30.0)
    focal_contrast: tuple[float, float] = (125.0, 50.0)
    diffuse_share: float = 0.5


MODEL = T1Model()


@dataclass(frozen=True)
class PerfectReader:
    """What the best possible reader achieves, as shares of patients in [0, 1]."""

    accuracy: float
    sensitivity: float
    specificity: float


def perfect_reader(prevalence: float = PREVALENCE, model: T1Model = MODEL) -> PerfectReader:
    """The Bayes reader: knows remote T1 and contrast of a patient exactly, the model and the prevalence.

    Its figures are integrals of the two classes' densities over the region where it calls disease, summed on a grid of
    1 ms that reaches 8 SD. No reader of the images, which add noise and blur, does better on average.
    """

    def density(at: np.ndarray, mean_sd: tuple[float, float]) -> np.ndarray:
        mean, sd = mean_sd
        out: np.ndarray = np.exp(-0.5 * ((at - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
        return out

    def axis(*draws: tuple[float, float]) -> np.ndarray:
        return np.arange(min(m - 8 * s for m, s in draws), max(m + 8 * s for m, s in draws) + 1.0, 1.0)

    remote = axis(model.healthy_remote, model.diffuse_remote)
    contrast = axis(model.healthy_contrast, model.focal_contrast)
    usual_remote = density(remote, model.healthy_remote)
    usual_contrast = density(contrast, model.healthy_contrast)
    healthy = np.outer(usual_remote, usual_contrast)
    diffuse = np.outer(density(remote, model.diffuse_remote), usual_contrast)
    focal = np.outer(usual_remote, density(contrast, model.focal_contrast))
    disease = model.diffuse_share * diffuse + (1 - model.diffuse_share) * focal
    called = prevalence * disease > (1 - prevalence) * healthy
    sensitivity, specificity = float(disease[called].sum()), float(healthy[~called].sum())
    return PerfectReader(prevalence * sensitivity + (1 - prevalence) * specificity, sensitivity, specificity)


def draw_t1(rng: np.random.Generator, label: int, model: T1Model = MODEL) -> tuple[float, float]:
    """Draw (remote, contrast) of a patient of class `label`, 0 healthy or 1 disease."""
    diffuse = label == 1 and rng.random() < model.diffuse_share
    focal = label == 1 and not diffuse
    remote = rng.normal(*(model.diffuse_remote if diffuse else model.healthy_remote))
    contrast = rng.normal(*(model.focal_contrast if focal else model.healthy_contrast))
    return remote, contrast


def healthy_count(patients: int) -> int:
    """How many of a phantom cohort are healthy: 77 in 298, but at least five, or half of a very small cohort."""
    return max(round((1 - PREVALENCE) * patients), min(5, patients // 2))


def write_phantom(folder: Path, patients: int, seed: int) -> int:
    """Write a raw folder: images/*.mha (int16, ms), masks/*.mha (uint8) and cohort.csv. Returns the number of images.

    Images are 256 x 218 px with a spacing of 1.172 to 1.406 mm per patient, 2 to 4 slices each; labels are 0 (healthy)
    and 1 (disease). Same seed, same bytes. The folder appears when it is complete, or not at all.
    Raises UsageError for fewer than 4 patients; BadInput when the folder is not empty or cannot be written.
    """
    if not 4 <= patients <= MAX_PATIENTS:
        raise UsageError(f"{patients} patients", "--patients", f"use 4 to {MAX_PATIENTS}")
    folder = Path(folder).absolute()
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise BadInput("the folder for the phantom is not empty", str(folder), "name a new folder, or empty this one")
    _remove_abandoned(folder)
    files.make_folder(folder.parent)
    staging = files.temporary_name(folder)
    try:
        try:
            count = _write_files(staging, patients, seed)
            files.rename(staging, folder)
            files.sync_folder(folder.parent)
        except OSError as error:
            raise files.explain(error, folder) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return count


def _write_files(folder: Path, patients: int, seed: int) -> int:
    for part in ("images", "masks"):
        files.make_folder(folder / part)
    labels = np.ones(patients, np.int64)
    labels[: healthy_count(patients)] = 0
    np.random.default_rng(derive_seed(seed, "phantom")).shuffle(labels)
    rows = [["image", "label", "patient", "mask", "window_low", "window_high"]]
    width = max(3, len(str(patients)))
    for number, label in enumerate(labels.tolist(), 1):
        rng = np.random.default_rng(derive_seed(seed, "phantom", number))
        heart = draw_heart(rng, *draw_t1(rng, label), SPACING)
        first = int(rng.integers(0, 3))
        last = min(len(LEVELS), first + int(rng.integers(2, 5)))
        levels = LEVELS[first:last] if last - first >= 2 else LEVELS[-2:]
        for at, level in enumerate(levels, 1):
            image, mask = draw_slice(rng, heart, level + rng.uniform(-0.05, 0.05) if 0 < level < 1 else level)
            spacing = (heart.pixel, heart.pixel)
            name = f"phantom{number:0{width}d}_slice{at}.mha"
            for part, pixels in (("images", image), ("masks", mask)):
                path = folder / part / name
                files.write_all(path, mha_bytes(pixels, spacing, THICKNESS, compress=part == "masks"))
                files.set_permissions(path)
                files.sync_file(path)
            patient = f"phantom{number:0{width}d}"
            rows.append([f"images/{name}", str(label), patient, f"masks/{name}", *map(str, WINDOW)])
    for part in ("images", "masks"):
        files.sync_folder(folder / part)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.atomic_write(folder / "cohort.csv", text.getvalue())
    return len(rows) - 1


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed calls left beside this folder: their process is gone from this host."""
    for path in folder.parent.glob(f".{folder.name}.tmp.*"):
        host, pid, start = [*path.name.partition(".tmp.")[2].split("."), "", "", ""][:3]
        here = host == files.host_name() and pid.isascii() and pid.isdigit()
        if here and files.has_ended(int(pid), start.partition("-")[0]) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
