"""Characters as pictures of 28x28 pixels: cropped, centred, at full contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tgt_fast.demos.glyphs.fonts import Face

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SIDE = 28
INSIDE = 22  # the longer side of a character
_SIZE = 88  # it is drawn at, before it is made smaller
_NO_CHARACTER = "\U0010fffe"  # stands for nothing in any font: what a font shows for what it lacks
Pixels = npt.NDArray[np.uint8]


def pictures(face: Face, characters: str = CHARACTERS) -> Pixels | None:
    """[len(characters), 28, 28]; None where the face lacks one of them.

    A face lacks a character that leaves no ink, or the ink of a character that stands for nothing, or the ink of
    another one of them: a picture must tell which it is. So does a file that cannot be read as a font.
    """
    font = opened(face)
    if font is None:
        return None
    try:
        nothing = _ink(font, _NO_CHARACTER)
        inks = [_ink(font, character) for character in characters]
    except OSError:  # what FreeType says of a damaged outline
        return None
    seen = {b"" if nothing is None else nothing.tobytes()}
    made = np.zeros((len(characters), SIDE, SIDE), np.uint8)
    for number, ink in enumerate(inks):
        if ink is None or ink.tobytes() in seen:
            return None
        seen.add(ink.tobytes())
        made[number] = _fitted(ink)
    return made


def opened(face: Face) -> Any:
    """The font of a face as Pillow has it, None if it is none."""
    from PIL import ImageFont

    try:
        font = ImageFont.truetype(face.file, _SIZE, layout_engine=ImageFont.Layout.BASIC)
        if face.weight is not None:
            axes: list[Any] = font.get_variation_axes()
            font.set_variation_by_axes([face.weight if _is_weight(axis) else axis["default"] for axis in axes])
    except (OSError, NotImplementedError):
        return None
    return font


def _is_weight(axis: dict[str, Any]) -> bool:
    name = axis["name"]
    return (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).strip().lower() == "weight"


def _ink(font: Any, character: str) -> Pixels | None:
    """What a character leaves on paper, cropped; None: nothing."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    paper = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(paper).text((2 - left, 2 - top), character, fill=255, font=font)
    box = paper.getbbox()
    return None if box is None else np.asarray(paper.crop(box))


def _fitted(ink: Pixels) -> Pixels:
    """Made as large as fits, in the middle."""
    from PIL import Image

    height, width = ink.shape
    scale = INSIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BOX)).astype(np.float32)
    made = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    made[top : top + size[1], left : left + size[0]] = np.round(small * (255 / small.max()))
    return made
