"""Reading one image file with SimpleITK: pixels and spacing, nothing else of its header.

Files from outside are untrusted. The reader is chosen by the file's ending and never guessed from its content, headers
that point to other files are refused, the size that a header declares is bounded before any pixel is read, and the
reading happens in a process of its own (`reader.py`): a file that crashes or hangs a C library is one bad input.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import select
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cmrhpc.errors import BadInput
from cmrhpc.files import open_plain

MAX_PIXELS = 64 * 2**20
TIMEOUT = 120.0  # seconds for one file
READERS = {
    ".mha": "MetaImageIO",
    ".nii": "NiftiImageIO",
    ".nii.gz": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".gipl": "GiplImageIO",
    ".gipl.gz": "GiplImageIO",
    ".dcm": "GDCMImageIO",
    ".ima": "GDCMImageIO",
    ".dicom": "GDCMImageIO",
    ".png": "PNGImageIO",
    ".jpg": "JPEGImageIO",
    ".jpeg": "JPEGImageIO",
    ".tif": "TIFFImageIO",
    ".tiff": "TIFFImageIO",
    ".bmp": "BMPImageIO",
}
# Their headers hold a print resolution at most, which says nothing of the patient.
WITHOUT_SPACING = {"PNGImageIO", "JPEGImageIO", "TIFFImageIO", "BMPImageIO"}
DICOM_SPACING = {"0028|0030", "0018|1164", "0018|2010"}  # of the pixels, of the detector, of a scanned film
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


@dataclass(frozen=True)
class RawImage:
    """One slice as stored in its file.

    pixels: (rows, columns, channels) in the file's own type and units, channels 1 or 3 (transparency is dropped).
    spacing: mm between rows, mm between columns; None where the file does not say.
    axes: direction of rows and columns in the patient, where the file holds one.
    """

    pixels: np.ndarray
    spacing: tuple[float, float] | None
    axes: tuple[float, ...] | None


class Reader:
    """Reads images through one helper process, which is started when first needed and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the helper process."""
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._process.wait()
            self._process = None

    def read(self, path: Path, where: str, what: str = "the image") -> RawImage:
        """Read one two-dimensional image. Rows and columns are taken as stored; no direction matrix is applied.

        where: the row and column of the table, for messages, which never name the file.
        Raises BadInput: unsupported type, broken file, header that points elsewhere, more than 64 Mpx, more than one
        slice, complex or vector pixels, NaN or infinite pixels, a spacing that is none.
        """
        kind, head = _reader_of(path, where, what)
        request = {"path": str(path.absolute()), "kind": kind, "max_pixels": MAX_PIXELS}
        told, data = self._ask(json.dumps(request).encode() + b"\n")
        if told is None or told.get("broken"):
            mend = "the file cannot be read: replace it by an intact copy"
            raise BadInput(f"broken file: {what} cannot be read", where, mend)
        size, components = told["size"], told["components"]
        if told["complex"]:
            raise BadInput(f"{what} has complex pixels", where, "store magnitudes, or T1 in ms")
        _check_size(size, components, where, what)
        kept = [axis for axis, n in enumerate(size) if n > 1]  # columns first, as in the file
        pixels = np.frombuffer(data, told["dtype"]).reshape(*(size[axis] for axis in reversed(kept)), components)
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            count = int((~np.isfinite(pixels)).sum())
            raise BadInput(f"{what} has {count} NaN or infinite pixels", where, "fill them, or leave the image out")
        if components in (2, 4):  # the last channel is transparency
            pixels = pixels[..., :-1]
        if kind in WITHOUT_SPACING:
            return RawImage(pixels, None, None)
        columns, rows = kept
        direction = np.array(told["direction"]).reshape(len(size), len(size))
        axes = tuple(direction[:, [rows, columns]].ravel().tolist())
        spacing: tuple[float, float] | None = (told["spacing"][rows], told["spacing"][columns])
        if told["spacing"][:2] == [1.0, 1.0] and not _tells_spacing(kind, head, told["keys"]):
            spacing = None  # one millimetre is what the readers say when the header is silent
        elif not all(math.isfinite(value) and 1e-3 <= value <= 1e3 for value in spacing or ()):
            shown = " x ".join(f"{value:g}" for value in spacing or ())
            raise BadInput(f"{what} declares a spacing of {shown} mm", where, "write the file again with the right one")
        return RawImage(pixels, spacing, axes)

    def _ask(self, request: bytes) -> tuple[dict[str, Any] | None, bytes]:
        """Send a request and wait for the answer; None when the process died or took too long."""
        if self._process is None:
            # -P: the script's folder does not join the import path, where its neighbours could hide other modules.
            command = [sys.executable, "-P", str(Path(__file__).with_name("reader.py"))]
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        deadline, answer, head, rest = time.monotonic() + TIMEOUT, bytearray(), None, 0
        try:
            stdin.write(request)
            stdin.flush()
            while head is None or len(answer) < rest:
                if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError
                if not (data := os.read(stdout.fileno(), 2**20)):
                    raise EOFError
                answer += data
                if head is None and b"\n" in answer:
                    line, _, answer = answer.partition(b"\n")
                    head = json.loads(line)
                    rest = head["bytes"]
        except (OSError, EOFError, ValueError):
            self.close()
            return None, b""
        return head, bytes(answer)


def _reader_of(path: Path, where: str, what: str) -> tuple[str, bytes]:
    """The one SimpleITK reader for this file, after a look at its first bytes, which are returned as well."""
    name = path.name.lower()
    ending = next((e for e in sorted(READERS, key=len, reverse=True) if name.endswith(e)), "")
    try:
        with open_plain(path) as stream:
            head = stream.read(2**16)
    except OSError as error:
        raise BadInput(f"{what} cannot be read: {error.strerror}", where, "give yourself read access") from None
    kind = READERS.get(ending, "")
    if not kind and head[128:132] == b"DICM":  # DICOM files often have no ending, or the last part of a number
        kind = "GDCMImageIO"
    if not kind:
        mend = f"use one of {', '.join(READERS)}"
        if name.endswith((".mhd", ".nhdr", ".hdr", ".img")):
            mend = "header and pixels must be one file: convert it to .mha or .nii.gz"
        raise BadInput(f"{what} is of an unsupported type", where, mend)
    if kind == "MetaImageIO":
        found = re.search(rb"(?im)^.*ElementDataFile[^\n]*", head)
        whole = bool(found and re.fullmatch(rb"ElementDataFile *= *LOCAL *\r?", found.group()))
    elif kind == "NrrdImageIO":
        header, end, _ = head.replace(b"\r\n", b"\n").partition(b"\n\n")
        whole = bool(end) and head.startswith(b"NRRD") and not re.search(rb"(?i)data *file *:", header)
    elif kind == "NiftiImageIO":
        whole = _one_nifti_file(path, head)
    else:
        whole = True
    if not whole:
        mend = "header and pixels must be one intact file: write the image again, for example as .mha"
        raise BadInput(f"broken file: {what} does not hold its own pixels", where, mend)
    return kind, head


def _one_nifti_file(path: Path, head: bytes) -> bool:
    if head[:2] == b"\x1f\x8b":
        try:
            with open_plain(path) as packed, gzip.open(packed, "rb") as stream:
                head = stream.read(352)
        except (OSError, EOFError, zlib.error):
            return False
    return head[344:347] == b"n+1" or head[4:7] == b"n+2"


def _check_size(size: list[int], components: int, where: str, what: str) -> None:
    count, shape = math.prod(size), " x ".join(str(n) for n in size)
    if count > MAX_PIXELS or components not in (1, 2, 3, 4):
        mend = f"store one grey or RGB slice of at most {MAX_PIXELS >> 20} Mpx"
        raise BadInput(f"{what} declares {shape} pixels of {components} values", where, mend)
    if sum(n > 1 for n in size) > 2:
        mend = "store each slice as its own file and row"
        raise BadInput(f"{what} is a volume of {shape}, more than one slice", where, mend)
    if sum(n > 1 for n in size) < 2:
        raise BadInput(f"{what} is a line of {count} pixels", where, "store a two-dimensional slice")


def _tells_spacing(kind: str, head: bytes, keys: list[str]) -> bool:
    if kind == "GDCMImageIO":
        return bool(DICOM_SPACING & set(keys))
    if kind == "MetaImageIO":
        return b"ElementSpacing" in head or b"ElementSize" in head
    if kind == "NrrdImageIO":
        return b"spacings" in head or b"space directions" in head
    return True


def grey(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """One channel from (rows, columns, 1 or 3); and whether colour was lost, which equal channels do not."""
    if pixels.shape[-1] == 1:
        return pixels, False
    if (pixels == pixels[..., :1]).all():
        return pixels[..., :1], False
    return (pixels @ np.array(LUMINANCE))[..., None], True
