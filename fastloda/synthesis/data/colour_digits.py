"""Two colour data sets at 32 x 32 for the paper's U-Net, which need no download: digits on shaded grounds.

Both are made in the same way from 8 x 8 digits, so that they differ only in the writing: real handwriting is the private
information, fonts are public.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .digits import digits_split
from .font_digits import font_digits
from .images import LabelledImages

SIZE = 32

_DARK = 0.4  # largest brightness of a dark colour; light colours are as far from white
_SHARPNESS = 2.5  # sharpness of the ink's edge, which the enlargement blurs
_PRIVATE_SEED, _TEST_SEED = 1, 2  # seeds of the colours
# Added to the glyphs' seed: colours drawn from the same numbers would tell which glyph it is.
_COLOURS = 0x5EED_C010


def colour_digits_split() -> tuple[LabelledImages, LabelledImages]:
    """Make the private set (1437 images) and the test set (360): `digits_split` in colours, [n, 3, 32, 32]; always the same."""
    private, test = digits_split()
    return _paint(private, _PRIVATE_SEED), _paint(test, _TEST_SEED)


def colour_font_digits(count: int, seed: int) -> LabelledImages:
    """Make the public set: `font_digits` in colours, [count, 3, 32, 32], classes balanced to within one image.

    The same arguments give the same images.

    Raises:
        ValueError: count is less than 1.
    """
    return _paint(font_digits(count, seed), _COLOURS + seed)


def _paint(digits: LabelledImages, seed: int) -> LabelledImages:
    """Paint each digit in its own ink on a ground that changes from one colour to another; one is dark, the other light."""
    generator = Generator().manual_seed(seed)
    ink = _enlarge(digits.images)
    first, second, pen = torch.rand(3, len(digits), 3, 1, 1, generator=generator)
    dark_ink = torch.rand(len(digits), 1, 1, 1, generator=generator) < 0.5
    ground = torch.lerp(first, second, _ramp(len(digits), generator))
    ground = torch.where(dark_ink, 1 - _DARK * ground, _DARK * ground)
    pen = torch.where(dark_ink, _DARK * pen, 1 - _DARK * pen)
    return LabelledImages(2 * torch.lerp(ground, pen, ink) - 1, digits.labels, digits.num_classes)


def _enlarge(images: Tensor) -> Tensor:
    """Enlarge grey digits [n, 1, 8, 8] in -1 .. 1 to a mask of ink [n, 1, SIZE, SIZE] in 0 .. 1."""
    smooth = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return (_SHARPNESS * smooth / 2 + 0.5).clamp(0, 1)


def _ramp(count: int, generator: Generator) -> Tensor:
    """Make ramps [count, 1, SIZE, SIZE] from 0 to 1 across each image, each in its own random direction."""
    angle = 2 * torch.pi * torch.rand(count, 1, 1, 1, generator=generator)
    along = torch.linspace(-1, 1, SIZE)
    across = angle.cos() * along + angle.sin() * along[:, None]
    return 0.5 + 0.5 * across / across.abs().amax(dim=(2, 3), keepdim=True)
