"""MetaImage (.mha) files as bytes: a text header and the pixels, the same bytes for the same image."""

from __future__ import annotations

import zlib

import numpy as np

_TYPES = {"|i1": "MET_CHAR", "|u1": "MET_UCHAR", "<i2": "MET_SHORT", "<f4": "MET_FLOAT"}


def mha_bytes(
    pixels: np.ndarray, spacing: tuple[float, float] | None, thickness: float = 1.0, compress: bool = False
) -> bytes:
    """One slice as an .mha file of three dimensions.

    pixels: (rows, columns) or (rows, columns, 3); uint8, int16 or float32. spacing: mm between rows, between columns;
    None, where it is unknown, writes none. thickness: mm of the slice. Raises KeyError for other types.
    """
    pixels = np.ascontiguousarray(pixels)
    rows, columns = pixels.shape[:2]
    data = pixels.tobytes()
    size = f"CompressedData = {compress}\n"
    if compress:
        data = zlib.compress(data, 1)
        size += f"CompressedDataSize = {len(data)}\n"
    pitch = f"ElementSpacing = {spacing[1]!r} {spacing[0]!r} {thickness!r}\n" if spacing else ""
    channels = f"ElementNumberOfChannels = {pixels.shape[2]}\n" if pixels.ndim == 3 else ""
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"{size}TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nCenterOfRotation = 0 0 0\n"
        f"{pitch}DimSize = {columns} {rows} 1\n"
        f"{channels}ElementType = {_TYPES[pixels.dtype.str]}\nElementDataFile = LOCAL\n"
    )
    return header.encode() + data
