"""The shapes of digits in fonts, as signed distance fields, so that a threshold sets the pen's width."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor

# Matplotlib's text fonts. Not its symbol fonts (their "0" is blank, a bracket or a prime), its Display fonts (no digits), or
# DejaVu Sans Mono, whose zero has a dot, so that it looks like an 8.
PRINTED = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"),
)
FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cm")  # each printed font's name begins with one of these
HANDWRITING = Path(__file__).with_name("handwriting.png")  # a row for each font; `scripts/handwriting.py` makes it
DIGITS = "0123456789"

GLYPH, CANVAS = 64, 128  # pixels: height of the glyph's ink, side of the field around it


class Glyphs(NamedTuple):
    """The glyphs, one row per font and digit. The unit is half a glyph's height, the origin its centre; y points down."""

    field: Tensor  # [g, 1, CANVAS, CANVAS], distance to the outline, positive in the ink
    hull: Tensor  # [g, k, 2], (x, y) of the extreme ink in k directions
    stroke: Tensor  # [g], half the typical stroke


def handwritten() -> tuple[str, ...]:
    """Return the names of the fonts of handwriting that the package has a picture of."""
    return tuple(_handwriting())


def family_of(font: str) -> str:
    """Return the family of a font: that of a printed one, or handwriting."""
    return next(family for family in FAMILIES if font.startswith(family)) if font in PRINTED else "handwriting"


@cache
def glyphs(fonts: tuple[str, ...]) -> Glyphs:
    """Make the glyphs of all digits of these fonts, printed or handwritten."""
    each = [_glyph(drawing) for font in fonts for drawing in _drawings(font)]
    return Glyphs(*(torch.stack(column) for column in zip(*each, strict=True)))


def drawn(font: Path, digit: str) -> np.ndarray:
    """Draw a font's digit, centred, its ink GLYPH pixels high: bool [GLYPH, CANVAS]."""
    mask = ImageFont.truetype(str(font), 2 * GLYPH).getmask(digit, mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    image = image.crop(image.getbbox())
    width = round(image.width * GLYPH / image.height)
    strip = Image.new("L", (CANVAS, GLYPH))
    strip.paste(image.resize((width, GLYPH)), ((CANVAS - width) // 2, 0))
    return np.asarray(strip) > 127


def _drawings(font: str) -> list[np.ndarray]:
    if font in _handwriting():
        return np.split(_handwriting()[font], len(DIGITS), axis=1)
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    return [drawn(path, digit) for digit in DIGITS]


@cache
def _handwriting() -> dict[str, np.ndarray]:
    with Image.open(HANDWRITING) as picture:
        names = picture.text["fonts"].split()
        return dict(zip(names, np.split(np.asarray(picture, dtype=bool), len(names)), strict=True))


def _glyph(drawing: np.ndarray) -> Glyphs:
    ink = np.pad(drawing, [((CANVAS - GLYPH) // 2,) * 2, (0, 0)])
    to_edge = distance_transform_edt(ink) + distance_transform_edt(~ink) - 0.5  # it lies between two pixels
    distance = np.where(ink, to_edge, -to_edge) / (GLYPH / 2)
    points = (np.argwhere(ink)[:, ::-1] + 0.5 - CANVAS / 2) / (GLYPH / 2)
    turns = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    hull = points[np.argmax(points @ np.stack([np.cos(turns), np.sin(turns)]), axis=0)]
    stroke = 2 * distance[ink].mean()  # in a stroke of half width w the mean distance to its edge is w / 2
    return Glyphs(*(torch.tensor(part, dtype=torch.float32) for part in (distance[None], hull, stroke)))
