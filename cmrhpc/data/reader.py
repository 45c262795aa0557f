"""A process that reads image files for its parent (see `images.Reader`); run by path, imports nothing of cmrhpc.

The C libraries below SimpleITK can crash or write to stderr on a malformed file. Here that costs one process and no
study. One request per line on stdin, {"path", "kind", "max_pixels"}; per request one line of JSON on stdout, and when
it announces "bytes" that many bytes of pixels in C order.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import resource
import struct
import sys
import zlib
from typing import Any

import numpy as np
import SimpleITK as sitk

MAX_MEMORY = 4 * 2**30  # what 64 Mpx need; a length that a broken header invents is refused at once


def read(path: str, kind: str, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    """Header first, pixels only when it is a slice of bounded size. RuntimeError when the file is broken."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(kind)
    reader.SetFileName(path)
    reader.ReadImageInformation()
    size, components = [int(n) for n in reader.GetSize()], int(reader.GetNumberOfComponents())
    told: dict[str, Any] = {"size": size, "components": components}
    told["complex"] = reader.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64)
    if math.prod(size) == 0:
        raise RuntimeError("no pixels")
    if math.prod(size) > max_pixels or components > 4 or sum(n > 1 for n in size) != 2 or told["complex"]:
        return told, b""
    if _cut_short(path, kind, reader):
        raise RuntimeError("the file ends before its pixels do")
    image = reader.Execute()
    if [int(n) for n in image.GetSize()] != size or image.GetNumberOfComponentsPerPixel() != components:
        raise RuntimeError("header and pixels disagree")
    pixels = np.ascontiguousarray(sitk.GetArrayViewFromImage(image))
    told |= {"dtype": pixels.dtype.str, "keys": [key for key in reader.GetMetaDataKeys() if len(key) == 9]}
    told |= {"spacing": list(image.GetSpacing()), "direction": list(image.GetDirection())}
    return told, pixels.tobytes()


def _cut_short(path: str, kind: str, reader: sitk.ImageFileReader) -> bool:
    """Whether a file ends before its pixels do, for the readers that fill the rest with whatever lies in memory."""
    with open(path, "rb") as stream:
        head, length = stream.read(34), os.path.getsize(path)
        rest = stream.read() if kind == "JPEGImageIO" else b""
    if kind == "JPEGImageIO":
        return not _jpeg_ends(head + rest)
    if kind == "BMPImageIO" and len(head) == 34:
        start, header, width, height, _, bits, packing = struct.unpack_from("<IIiiHHI", head, 10)
        plain = header >= 40 and not packing
        return plain and bool(length < start + (width * bits + 31) // 32 * 4 * abs(height))
    if kind == "NiftiImageIO":
        start, bits = max(348, int(float(reader.GetMetaData("vox_offset")))), int(reader.GetMetaData("bitpix"))
    elif kind == "GiplImageIO":
        start, bits = 256, 8 * sitk.Image(1, 1, reader.GetPixelID()).GetSizeOfPixelComponent()
    else:
        return False
    missing = start + math.prod(reader.GetSize()) * bits // 8
    try:
        with gzip.open(path) if head.startswith(b"\x1f\x8b") else open(path, "rb") as stream:
            while missing > 0 and (part := stream.read(min(missing, 2**20))):
                missing -= len(part)
    except (OSError, EOFError, zlib.error):
        return True
    return missing > 0


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end mark comes after the first scan: a thumbnail before it has one of its own."""
    at = 2
    while data[at : at + 1] == b"\xff":
        if data[at + 1 : at + 2] == b"\xda":
            return b"\xff\xd9" in data[at:]
        filling = data[at + 1 : at + 2] == b"\xff"
        at += 1 if filling else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def main() -> None:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # a slice is too small to share
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the C libraries write warnings there too
    for line in sys.stdin.buffer:
        try:
            told, pixels = read(**json.loads(line))
        except (RuntimeError, MemoryError, ValueError, OverflowError):
            told, pixels = {"broken": True}, b""
        reply = json.dumps(told | {"bytes": len(pixels)}).encode() + b"\n"
        answers.write(reply + pixels)
        answers.flush()


if __name__ == "__main__":
    main()
