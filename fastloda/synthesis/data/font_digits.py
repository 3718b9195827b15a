"""The public data: digits of fonts, each in its own hand.

No private image is read. The published description of the digits data set is followed: a digit fills a 32 x 32 bitmap, which
is cut into 4 x 4 blocks, and the on-pixels of each block are counted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloda.errors import UserError

from .elastic import smooth_shifts
from .glyphs import CANVAS, DIGITS, GLYPH, PRINTED, Glyphs, family_of, glyphs
from .images import LabelledImages

STYLES = ("upright narrow", "upright wide", "leaning narrow", "leaning wide")  # halves of the ranges of slant and width

BLOCK = 4  # a pixel of the image is the mean of BLOCK x BLOCK bits
_BATCH = 512

_BEND_POINTS = 4  # side of the grid of points that the bend moves
_MAX_EROSION = 0.005  # in heights of the glyph: more would break the hairlines of bold fonts

Range = tuple[float, float]


class Hands(NamedTuple):
    """The ranges from which the properties of each digit, except its font, are drawn uniformly.

    The defaults are wider than for the handwriting of any one person, so that unknown handwriting is within them. They were
    widened after a look at the published picture of the real digits, but fitted to none of them.
    """

    angle: Range = (-0.2, 0.2)  # rad
    slant: Range = (-0.35, 0.35)  # x per unit of y, added to the font's own slant: half of the fonts are italic
    stretch: Range = (0.65, 1.3)  # width
    pen: Range = (0.05, 0.1)  # half of the stroke's width, in heights of the glyph
    fill: Range = (0.9, 1.0)  # share of the box that the digit fills from top to bottom, or from left to right
    shift: Range = (-0.15, 0.15)  # in both directions, in half sides of the box, as far as there is space
    bend: float = 0.1  # standard deviation of an elastic distortion (Simard et al. 2003), in half sides of the box


MANY_HANDS = Hands()


def font_digits(
    count: int, seed: int, size: int = 8, hands: Hands = MANY_HANDS, fonts: tuple[str, ...] = PRINTED
) -> LabelledImages:
    """Draw `count` digits of fonts, [count, 1, size, size], ink 1 and background -1, classes balanced to within one image.

    Every image has its own font, slant, rotation, width, pen, size, position and bend. The same arguments give the
    same images (on one machine; on others rounding may change single bits). 10,000 images of size 8 take about 1 s
    on one core; the time grows with size^2.

    Args:
        hands: ranges of slant, rotation, width, pen, size, position and bend.
        fonts: names of the fonts, of which each image has one, all equally often: of `PRINTED` and `handwritten()`.

    Raises:
        ValueError: count or size is less than 1.
    """
    images, glyph, _ = _drawn(count, seed, size, hands, fonts)
    return LabelledImages(images, glyph % len(DIGITS), num_classes=len(DIGITS))


def font_styles(
    count: int, seed: int, size: int = 8, hands: Hands = MANY_HANDS, fonts: tuple[str, ...] = PRINTED
) -> LabelledImages:
    """Draw the images of `font_digits`, with a class for each digit, font family, slant and width, such as "3 cm leaning wide".

    The ranges of slant and width are divided into halves, which makes 160 classes of printed fonts and 40 of handwriting.
    """
    images, glyph, unit = _drawn(count, seed, size, hands, fonts)
    families = tuple(dict.fromkeys(map(family_of, fonts)))
    numbers = torch.tensor([families.index(family_of(font)) for font in fonts])
    family, digit = numbers[glyph // len(DIGITS)], glyph % len(DIGITS)
    style = 2 * (unit[:, 1] >= 0.5) + (unit[:, 2] >= 0.5)
    labels = (digit * len(families) + family) * len(STYLES) + style
    names = tuple(f"{digit} {family} {style}" for digit in DIGITS for family in families for style in STYLES)
    return LabelledImages(images, labels, len(names), names)


def _drawn(count: int, seed: int, size: int, hands: Hands, fonts: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images; return them with their glyphs, and with the place of each in the ranges of `hands`, [count, 7] in [0, 1)."""
    if count < 1 or size < 1:
        raise UserError(f"count and size must be at least 1, not {count} and {size}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(DIGITS)
    glyph = torch.randint(len(fonts), (count,), generator=generator) * len(DIGITS) + labels
    unit = torch.rand(count, 7, generator=generator)
    varied = [_spread(column, bounds) for column, bounds in zip(unit.T, (*hands[:5], hands.shift, hands.shift))]
    hand = torch.stack(varied, dim=1)
    bend = hands.bend * torch.randn(count, 2, _BEND_POINTS, _BEND_POINTS, generator=generator)
    parts = zip(glyph.split(_BATCH), hand.split(_BATCH), bend.split(_BATCH), strict=True)
    return torch.cat([_draw(glyphs(fonts), *part, size) for part in parts]), glyph, unit


def _draw(shapes: Glyphs, glyph: Tensor, hand: Tensor, bend: Tensor, size: int) -> Tensor:
    """Draw images [n, 1, size, size] of the glyphs [n], rows of `shapes`, bent by bend [n, 2, k, k].

    `hand` [n, 7] holds angle, slant, stretch, pen, share of the box, and shift in x and y.
    """
    angle, slant, stretch, pen = hand[:, :4].unbind(1)
    grow = (2 * pen - shapes.stroke[glyph]).clamp(min=-2 * _MAX_EROSION)  # 2: a height has two units
    to_glyph = _box_to_glyph(_writing(angle, slant, stretch), shapes.hull[glyph], grow, hand[:, 4:])
    side = size * BLOCK
    box = F.affine_grid(torch.eye(2, 3).expand(len(glyph), 2, 3), [len(glyph), 1, side, side], align_corners=False)
    box = box + smooth_shifts(bend, side, side)
    to_field = to_glyph * (GLYPH / CANVAS)  # grid_sample measures in half canvases
    grid = torch.einsum("nij,nyxj->nyxi", to_field[:, :, :2], box) + to_field[:, None, None, :, 2]
    field = F.grid_sample(shapes.field[glyph], grid, padding_mode="border", align_corners=False)
    bits = (field + grow.view(-1, 1, 1, 1) > 0).float()
    return 2 * F.avg_pool2d(bits, BLOCK) - 1


def _spread(unit: Tensor, bounds: Range) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * unit


def _writing(angle: Tensor, slant: Tensor, stretch: Tensor) -> Tensor:
    """Make matrices [n, 2, 2] that stretch and slant a column (x, y), then turn it."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    return turn @ torch.stack([stretch, -slant, zero, one], dim=1).view(-1, 2, 2)


def _box_to_glyph(writing: Tensor, hull: Tensor, grow: Tensor, place: Tensor) -> Tensor:
    """Compute the affine map [n, 2, 3] from the box [-1, 1]^2 to the glyph, so that the written digit fills the box.

    The extent of the digit is that of its hull plus that of the grown pen, which `writing` makes an ellipse.
    """
    written = hull @ writing.mT
    low, high = written.amin(dim=1), written.amax(dim=1)
    half = (high - low) / 2 + grow[:, None] * writing.norm(dim=2)
    scale = place[:, 0] / half.amax(dim=1)
    room = 1 - scale[:, None] * half
    shift = place[:, 1:].clamp(-room, room)
    inverse = torch.linalg.inv(writing)
    matrix = inverse / scale[:, None, None]
    offset = inverse @ ((low + high) / 2)[:, :, None] - matrix @ shift[:, :, None]
    return torch.cat([matrix, offset], dim=2)
