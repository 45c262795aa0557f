"""A process that reads image files for its parent (see `images.Reader`); run by path, imports nothing of cmrhpc.

The C libraries below SimpleITK can crash or write to stderr on a malformed file. Here that costs one process and no
study. One request per line on stdin, {"path", "kind", "max_pixels"}; per request one line of JSON on stdout, and when
it announces "bytes" that many bytes of pixels in C order.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
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
    image = reader.Execute()
    if [int(n) for n in image.GetSize()] != size or image.GetNumberOfComponentsPerPixel() != components:
        raise RuntimeError("header and pixels disagree")
    pixels = np.ascontiguousarray(sitk.GetArrayViewFromImage(image))
    told |= {"dtype": pixels.dtype.str, "keys": [key for key in reader.GetMetaDataKeys() if len(key) == 9]}
    told |= {"spacing": list(image.GetSpacing()), "direction": list(image.GetDirection())}
    return told, pixels.tobytes()


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
