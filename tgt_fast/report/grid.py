"""``save_grid``: synthetic images as one PNG file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from tgt_fast._opening import as_path
from tgt_fast._png import grid, png
from tgt_fast.errors import ArgumentError
from tgt_fast.explore import Synthetic
from tgt_fast.ops import _checks
from tgt_fast.report.output import prepare_file, write_bytes
from tgt_fast.synthesis.dataset import SyntheticDataset
from tgt_fast.train.pictures import images_of

_LEAST = 64  # pixels that a side of a tile should have; smaller ones are enlarged


def save_grid(
    synthetic: Synthetic | SyntheticDataset | Any,
    out: str | os.PathLike[str],
    *,
    columns: int | None = None,
    most: int = 256,
) -> Path:
    """Write the images of a :class:`tgt_fast.Synthetic`, or of a batch, as one PNG file, row by row.

    Images are (B, C, H, W), (B, H, W, C) or (B, H, W) with C of 1, 3 or 4 (of which the last is left out), or vectors
    of a square number of values in 0..1. Values within 0..1 are shown as they are, those within -1..1 shifted to it,
    whole numbers as 0..255, all others from their least to their greatest. Small images are enlarged, pixel by pixel.

    Args:
        synthetic: what a sampler returned, a :class:`tgt_fast.SyntheticDataset`, or a batch of images.
        out: the file.
        columns: images a row; by default about as many as there are rows.
        most: the first so many are shown.

    Returns:
        The file's path.

    Raises:
        ArgumentError: there are no images in it.
        CheckpointError: the file cannot be written.
    """
    most = _checks.integer("save_grid", "most", most, 1, 1 << 16)
    x = synthetic.x if isinstance(synthetic, Synthetic) else synthetic
    if isinstance(synthetic, SyntheticDataset):
        x = synthetic.read(range(min(most, len(synthetic)))).x
    images = images_of(x)
    if images is None:
        raise ArgumentError("save_grid: there are no images; they are (B, C, H, W), C of 1, 3 or 4, or (B, H, W)")
    images = images[:most]
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    columns = min(_checks.integer("save_grid", "columns", columns, 1, 1 << 16), len(images))
    times = max(1, _LEAST // max(images[0].shape[:2]))
    tiles = np.stack(images).repeat(times, 1).repeat(times, 2)
    file = prepare_file(as_path("save_grid", "out", out))
    write_bytes(file, png(grid(tiles, columns, gap=2)))
    return file
