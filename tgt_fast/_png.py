"""PNG files of arrays, and nothing else."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

_KINDS = {1: 0, 3: 2}  # channels -> the format's word for grey and for red, green, blue


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """[H, W, 1 or 3] in 0..255 as a PNG file; the same bytes for the same pixels and zlib."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _KINDS[channels], 0, 0, 0)
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of a line: no filter
    lines[:, 1:] = pixels.reshape(height, -1)
    data = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grid(tiles: Any, columns: int, gap: int) -> npt.NDArray[np.uint8]:
    """Images [N, H, W, C] in rows of ``columns``, ``gap`` white pixels apart."""
    tiles = np.asarray(tiles, np.uint8)
    count, height, width, channels = tiles.shape
    rows = -(-count // columns)
    made = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for place in range(count):
        top, left = (gap + at * (size + gap) for at, size in zip(divmod(place, columns), (height, width), strict=True))
        made[top : top + height, left : left + width] = tiles[place]
    return made
