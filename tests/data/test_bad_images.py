"""Every image or mask that cannot be used: one message with exit code 3, its row named, nothing left behind."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from cmrhpc.data import images
from cmrhpc.data.images import Reader
from cmrhpc.data.ingest import ingest
from cmrhpc.errors import BadInput
from cmrhpc.study import Folds
from tests.data.raw_folder import disc, make_raw, picture, save, settings, write_table

CLASSES = ("0", "1")
Rows = list[dict[str, str]]


def image_of(raw: Path, rows: Rows) -> Path:
    return raw / rows[1]["image"]


def replace_image(raw: Path, rows: Rows, name: str) -> Path:
    rows[1]["image"] = name
    write_table(raw, rows)
    return raw / name


def no_mask_file(raw: Path, rows: Rows) -> None:
    (raw / rows[1]["mask"]).unlink()


def no_mask_named(raw: Path, rows: Rows) -> None:
    rows[1]["mask"] = ""
    write_table(raw, rows)


def empty_mask(raw: Path, rows: Rows) -> None:
    save(raw / rows[1]["mask"], np.zeros((40, 30), np.uint8))


def other_size(raw: Path, rows: Rows) -> None:
    save(raw / rows[1]["mask"], disc((30, 40), (15, 15), 5))


def other_grid(raw: Path, rows: Rows) -> None:
    save(raw / rows[1]["mask"], disc((40, 30), (20, 14), 5), (1.2, 1.3))


def mirrored_mask(raw: Path, rows: Rows) -> None:
    mask = sitk.GetImageFromArray(disc((40, 30), (20, 14), 5))
    mask.SetSpacing((1.2, 1.2))
    mask.SetDirection((-1, 0, 0, 1))
    sitk.WriteImage(mask, str(raw / rows[1]["mask"]))


def nan_pixels(raw: Path, rows: Rows) -> None:
    pixels = picture(1).astype(np.float32)
    pixels[3, 4] = np.nan
    save(image_of(raw, rows), pixels)


def infinite_pixels(raw: Path, rows: Rows) -> None:
    pixels = picture(1).astype(np.float64)
    pixels[0, :3] = -np.inf
    save(image_of(raw, rows), pixels)


def constant(raw: Path, rows: Rows) -> None:
    save(image_of(raw, rows), np.full((40, 30), 7, np.int16))


def constant_region(raw: Path, rows: Rows) -> None:
    pixels = np.full((40, 30), 7, np.int16)
    pixels[0] = 8
    save(image_of(raw, rows), pixels)


def typed_spacing(text: str) -> Callable[[Path, Rows], None]:
    def plant(raw: Path, rows: Rows) -> None:
        write_table(raw, [row | {"spacing_mm": text if number == 1 else "1.2"} for number, row in enumerate(rows)])

    return plant


def mask_in_the_corner(raw: Path, rows: Rows) -> None:
    save(raw / rows[1]["mask"], disc((40, 30), (1, 1), 1))


def outside_window(raw: Path, rows: Rows) -> None:
    write_table(raw, [row | {"window_low": "0.3", "window_high": "1.8"} for row in rows])  # seconds


def volume(raw: Path, rows: Rows) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([picture(1)] * 3)), str(image_of(raw, rows)))


def line(raw: Path, rows: Rows) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(40, dtype=np.int16).reshape(1, 1, 40)), str(image_of(raw, rows)))


def truncated_mha(raw: Path, rows: Rows) -> None:
    path = image_of(raw, rows)
    path.write_bytes(path.read_bytes()[:-500])


def empty_file(raw: Path, rows: Rows) -> None:
    image_of(raw, rows).write_bytes(b"")


def text_as_png(raw: Path, rows: Rows) -> None:
    replace_image(raw, rows, "x.png").write_text("not a picture")


def truncated_png(raw: Path, rows: Rows) -> None:
    path = replace_image(raw, rows, "x.png")
    save(path, picture(1).astype(np.uint16))
    path.write_bytes(path.read_bytes()[:200])


def garbage_dicom(raw: Path, rows: Rows) -> None:
    replace_image(raw, rows, "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(256)) * 4)


def truncated_nifti(raw: Path, rows: Rows) -> None:
    path = replace_image(raw, rows, "x.nii.gz")
    save(path, picture(1))
    path.write_bytes(path.read_bytes()[:100])


def header_points_elsewhere(raw: Path, rows: Rows) -> None:
    (raw / "secret.raw").write_bytes(bytes(2400))
    head = "ObjectType = Image\nNDims = 2\nDimSize = 30 40\nElementType = MET_SHORT\nElementDataFile = secret.raw\n"
    image_of(raw, rows).write_text(head)


def nrrd_points_elsewhere_late(raw: Path, rows: Rows) -> None:
    nrrd_points_elsewhere(raw, rows)
    head = (raw / "x.nrrd").read_text()
    (raw / "x.nrrd").write_text(head.replace("type:", "# nothing\n" * 7000 + "type:"))


def nrrd_points_elsewhere(raw: Path, rows: Rows) -> None:
    (raw / "secret.raw").write_bytes(bytes(2400))
    head = "NRRD0004\ntype: short\ndimension: 2\nsizes: 30 40\nencoding: raw\nendian: little\ndata file: secret.raw\n\n"
    replace_image(raw, rows, "x.nrrd").write_text(head)


def nifti_of_two_files(raw: Path, rows: Rows) -> None:
    path = replace_image(raw, rows, "x.nii")
    save(path, picture(1))
    data = bytearray(path.read_bytes())
    data[344:348] = b"ni1\0"  # says that the pixels are in x.img
    path.write_bytes(bytes(data))


def detached_header(raw: Path, rows: Rows) -> None:
    replace_image(raw, rows, "x.mhd").write_text("ObjectType = Image\n")


def unsupported(raw: Path, rows: Rows) -> None:
    replace_image(raw, rows, "x.docx").write_bytes(b"PK")


def mha_bomb(raw: Path, rows: Rows) -> None:
    data = zlib.compress(bytes(1000))
    head = (
        "ObjectType = Image\nNDims = 2\nBinaryData = True\nCompressedData = True\n"
        f"CompressedDataSize = {len(data)}\nDimSize = 60000 60000\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    image_of(raw, rows).write_bytes(head.encode() + data)


def png_bomb(raw: Path, rows: Rows) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(30_001) * 50)
    text = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    replace_image(raw, rows, "x.png").write_bytes(text)


def nifti_bomb(raw: Path, rows: Rows) -> None:
    path = replace_image(raw, rows, "x.nii.gz")
    save(path, picture(1))
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<3h", data, 40, 2, 32000, 32000)
    path.write_bytes(gzip.compress(bytes(data)))


def absurd_spacing(raw: Path, rows: Rows) -> None:
    save(image_of(raw, rows), picture(1), (1.2, 1e6))


def complex_pixels(raw: Path, rows: Rows) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(picture(1).astype(np.complex64)), str(replace_image(raw, rows, "x.nii")))


def one_class(raw: Path, rows: Rows) -> None:
    write_table(raw, [row | {"label": "1"} for row in rows])


FAULTS: dict[str, tuple[Callable[[Path, Rows], None], str, str]] = {
    "named mask absent": (no_mask_file, "the mask does not exist", "row 2 (line 3), column mask"),
    "no mask named": (no_mask_named, "names no mask", "row 2, column mask"),
    "empty mask": (empty_mask, "the mask is empty", "row 2, column mask"),
    "mask of other size": (other_size, "30 x 40 pixels, its image 40 x 30", "row 2, column mask"),
    "mask on other grid": (other_grid, "another grid", "row 2, column mask"),
    "mask mirrored": (mirrored_mask, "another grid", "row 2, column mask"),
    "NaN": (nan_pixels, "1 NaN or infinite", "row 2, column image"),
    "infinite": (infinite_pixels, "3 NaN or infinite", "row 2, column image"),
    "constant": (constant, "a constant image", "row 2, column image"),
    "constant region": (constant_region, "the region is constant", "row 2, column image"),
    "spacing without its point": (typed_spacing("125"), "spans only 0.15 x 0.15 pixels", "row 2, column image"),
    "spacing ten times too large": (typed_spacing("1.2x12"), "spans only 16 x 1.6 pixels", "row 2, column image"),
    "spacing ten times too small": (typed_spacing("0.12"), "95 % of the region lies outside", "row 2, column image"),
    "mask in the corner": (mask_in_the_corner, "68 % of the region lies outside", "row 2, column image"),
    "outside the window": (outside_window, "outside the window 0.3 to 1.8", "row 1, column window_low"),
    "volume": (volume, "volume of 30 x 40 x 3, more than one slice", "row 2, column image"),
    "line": (line, "a line of 40 pixels", "row 2, column image"),
    "truncated mha": (truncated_mha, "broken file", "row 2, column image"),
    "empty file": (empty_file, "broken file", "row 2, column image"),
    "text as png": (text_as_png, "broken file", "row 2, column image"),
    "truncated png": (truncated_png, "broken file", "row 2, column image"),
    "garbage dicom": (garbage_dicom, "broken file", "row 2, column image"),
    "truncated nifti": (truncated_nifti, "broken file", "row 2, column image"),
    "mha points elsewhere": (header_points_elsewhere, "does not hold its own pixels", "row 2, column image"),
    "nrrd points elsewhere, late": (nrrd_points_elsewhere_late, "does not hold its own pixels", "row 2, column image"),
    "nrrd points elsewhere": (nrrd_points_elsewhere, "does not hold its own pixels", "row 2, column image"),
    "nifti of two files": (nifti_of_two_files, "does not hold its own pixels", "row 2, column image"),
    "detached header": (detached_header, "unsupported type", "row 2, column image"),
    "unsupported": (unsupported, "unsupported type", "row 2, column image"),
    "mha bomb": (mha_bomb, "60000 x 60000", "row 2, column image"),
    "png bomb": (png_bomb, "30000 x 30000", "row 2, column image"),
    "nifti bomb": (nifti_bomb, "32000 x 32000", "row 2, column image"),
    "absurd spacing": (absurd_spacing, "spacing of 1.2 x 1e+06 mm", "row 2, column image"),
    "complex pixels": (complex_pixels, "complex", "row 2, column image"),
    "one class": (one_class, 'only one class: every label is "1"', "cohort.csv"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_clear_message_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    plant, what, where = FAULTS[fault]
    raw = tmp_path / "raw"
    plant(raw, make_raw(raw, 4, 1))
    with pytest.raises(BadInput) as caught:
        ingest(settings(), CLASSES, raw, tmp_path / "ws" / "cohort.h5")
    assert caught.value.exit_code == 3
    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.mend
    assert not re.search(r"secret|Doe|x\.", caught.value.what + caught.value.where)  # rows are named, not files
    assert not (tmp_path / "ws").exists() or not list((tmp_path / "ws").iterdir())
    assert capfd.readouterr() == ("", "")  # the C libraries are silenced


def test_fewer_patients_than_folds_is_found_before_any_image_is_read(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    rows = make_raw(raw, 6, 2)
    (raw / rows[0]["image"]).write_bytes(b"never read")
    with pytest.raises(BadInput, match='class "0" has 3 patients, fewer than the 4 folds') as caught:
        ingest(settings(), CLASSES, raw, tmp_path / "ws" / "cohort.h5", folds=Folds(k=4))
    assert "k to 3" in caught.value.mend
    with pytest.raises(BadInput, match="broken file"):  # images are enough when they are the groups
        ingest(settings(), CLASSES, raw, tmp_path / "ws" / "cohort.h5", folds=Folds(k=4, group_by="image"))


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw", 4, 1)
    with pytest.raises(BadInput, match='no image of class "2"'):
        ingest(settings(), ("0", "1", "2"), tmp_path / "raw", tmp_path / "ws" / "cohort.h5")


def test_a_dying_or_hanging_reader_is_one_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mha"
    save(path, picture(0))
    with Reader() as reader:
        assert np.array_equal(reader.read(path, "row 1").pixels[..., 0], picture(0))
        assert reader._process is not None
        first = reader._process.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(BadInput, match="broken file"):
            reader.read(path, "row 2")
        assert reader.read(path, "row 3").pixels.shape == (40, 30, 1)  # a new process was started
        assert reader._process is not None
        assert reader._process.pid != first
        monkeypatch.setattr(images, "TIMEOUT", 0.5)
        os.kill(reader._process.pid, signal.SIGSTOP)
        with pytest.raises(BadInput, match="broken file"):
            reader.read(path, "row 4")
        monkeypatch.undo()
        assert reader.read(path, "row 5").spacing == (1.2, 1.2)
    assert reader._process is None


def test_mangled_files_are_images_or_bad_input(tmp_path: Path) -> None:
    """A short run of the fuzzing: flipped, cut and inserted bytes near the header of each format."""
    rng = np.random.default_rng(0)
    kinds = ["a.mha", "a.nii.gz", "a.gipl", "a.dcm", "a.png", "a.nrrd", "a.jpg", "a.bmp"]
    for name in kinds:
        pixels = picture(0) if name not in ("a.png", "a.jpg", "a.bmp") else (picture(0) // 8).astype(np.uint8)
        save(tmp_path / name, pixels)
    good = 0
    with Reader() as reader:
        for turn in range(240):
            source = tmp_path / kinds[turn % len(kinds)]
            data = bytearray(source.read_bytes())
            for _ in range(int(rng.integers(1, 6))):
                at = int(rng.integers(0, min(len(data), 400)))
                if rng.random() < 0.7:
                    data[at] ^= 1 << int(rng.integers(0, 8))
                elif rng.random() < 0.5:
                    del data[at : at + 3]
                else:
                    data[at:at] = rng.bytes(3)
            path = tmp_path / f"mangled{''.join(source.suffixes)}"
            path.write_bytes(bytes(data))
            try:
                image = reader.read(path, "row 1")
            except BadInput:
                continue
            good += 1
            assert np.isfinite(image.pixels.astype(float)).all()
    assert 0 < good < 240


CUT_SHORT = ["mha", "nii", "nii.gz", "gipl", "gipl.gz", "dcm", "png", "nrrd", "jpg", "tif", "bmp"]


@pytest.mark.parametrize("ending", CUT_SHORT)
def test_a_file_that_is_cut_short_is_refused_or_gives_all_its_pixels(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    save(path, (picture(0) // 8).astype(np.uint8))
    data, refused = path.read_bytes(), 0
    with Reader() as reader:
        whole = reader.read(path, "row 1").pixels
        for share in (0.5, 0.75, 0.99, 0.999):
            path.write_bytes(data[: int(share * len(data))])
            try:
                assert np.array_equal(reader.read(path, "row 1").pixels, whole)  # what is lost may be other than pixels
            except BadInput:
                refused += 1
    assert refused >= 2


def test_a_warning_on_stdout_does_not_disturb_the_answers(tmp_path: Path) -> None:
    """The JPEG library reports damaged data on stdout and goes on."""
    path = tmp_path / "a.jpg"
    save(path, (picture(0) // 8).astype(np.uint8))
    data = path.read_bytes()
    with Reader() as reader:
        reader.read(path, "row 1")
        assert reader._process is not None
        first = reader._process.pid
        for at in range(len(data) - 120, len(data) - 20, 5):
            path.write_bytes(data[:at] + b"\xff\xc2" + data[at + 2 :])
            with contextlib.suppress(BadInput):
                assert reader.read(path, "row 1").pixels.shape == (40, 30, 1)
        assert reader._process is not None
        assert reader._process.pid == first
