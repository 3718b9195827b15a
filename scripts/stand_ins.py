"""Public images that stand in for the private ones of a table, so that its settings can be chosen without them.

Each function takes a side in pixels, a number of records and a seed, and returns images to train on and others to test on.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloda.synthesis.data import Hands, LabelledImages, digits_split, font_digits
from fastloda.synthesis.data.centring import centred_by_ink
from fastloda.synthesis.data.elastic import read_at, smooth_shifts

Split = tuple[LabelledImages, LabelledImages]
TEST_COUNT = 2000
ONE_HAND = Hands(
    angle=(-0.15, 0.15), slant=(-0.2, 0.2), stretch=(0.8, 1.3), pen=(0.05, 0.09), fill=(0.68, 0.75), bend=0.0
)
SWIRL, SLANT, WOBBLE = 0.33, -0.45, 0.07  # of another hand; a classifier of plain font digits is right in two thirds
BEND, SHIFT, LEAN = 0.05, 0.06, 0.1  # standard deviations, in half sides, of the changes to each copy of a digit
USPS = Path("runs/usps")  # folder of the files zip.train.gz and zip.test.gz


def swirled(side: int, records: int, seed: int) -> Split:
    """Draw font digits that vary little, swirled and slanted alike, each wobbling a little on its own."""
    return _swirled(side, records, 2 * seed), _swirled(side, TEST_COUNT, 2 * seed + 1)


def handwritten(side: int, records: int, seed: int) -> Split:
    """Enlarge scikit-learn's digits, real handwriting of 8 x 8 pixels; each copy of a digit is bent and moved a little."""
    private, test = (_enlarged(part, side) for part in digits_split())
    return _copies(private, records, 2 * seed), _copies(test, TEST_COUNT, 2 * seed + 1)


def usps(side: int, records: int, seed: int) -> Split:
    """Enlarge USPS's digits, real handwriting of 16 x 16 pixels and many hands; equally many of each class are taken.

    The files are those of "The Elements of Statistical Learning", https://hastie.su.domains/ElemStatLearn/data.html ("ZIP code"),
    whose lines are a label and 256 pixels in [-1, 1]. Digits are centred by their ink, as MNIST's are.
    """
    paths = [USPS / f"zip.{part}.gz" for part in ("train", "test")]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise SystemExit(f"the stand-in usps needs {' and '.join(missing)}: see `usps` in scripts/stand_ins.py")
    rows = torch.from_numpy(np.concatenate([np.loadtxt(path, dtype=np.float32) for path in paths]))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    counts = [records // 10, TEST_COUNT // 10]
    most = 10 * (int(rows[:, 0].long().bincount().min()) - counts[1])
    if not 10 <= records <= most:
        raise SystemExit(f"the stand-in usps has from 10 to {most} records, not {records}")
    parts = zip(*((rows[rows[:, 0] == label][: sum(counts)]).split(counts) for label in range(10)))
    return tuple(_usps_images(torch.cat(part), side) for part in parts)


MADE_OF = {"handwritten": "digits"}  # stand-in -> the table whose own private images it is made of
STAND_INS: dict[str, Callable[[int, int, int], Split]] = {
    "swirled": swirled,
    "handwritten": handwritten,
    "usps": usps,
}


def _swirled(side: int, count: int, seed: int) -> LabelledImages:
    digits = font_digits(count, seed + 12345, size=side, hands=ONE_HAND)
    generator = torch.Generator().manual_seed(seed)
    wobble = _bends(count, 5, side, WOBBLE, generator)
    x, y = _slanted(SLANT + LEAN * torch.randn(count, generator=generator), side).unbind(-1)
    angle = SWIRL * 1.5 * torch.pi / 2 * (1 - (x**2 + y**2).sqrt().clamp(max=1))
    swirled = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    return LabelledImages(_read(digits.images, swirled + wobble), digits.labels, 10)


def _enlarged(digits: LabelledImages, side: int) -> LabelledImages:
    """Fit digits into the middle of images, with edges as sharp as a pen's."""
    ink = torch.sigmoid(10 * (_resized((digits.images[:] + 1) / 2, side) - 0.45))
    return LabelledImages(2 * _framed(ink.where(ink > 0.03, 0.0), side) - 1, digits.labels, 10)


def _usps_images(rows: Tensor, side: int) -> LabelledImages:
    """Make images of rows of the files, with the ink's centre in the middle."""
    ink = _framed(_resized((rows[:, 1:].unflatten(1, (1, 16, 16)) + 1) / 2, side).clamp(0, 1), side)
    return LabelledImages(centred_by_ink(2 * ink - 1), rows[:, 0].long(), 10)


def _resized(ink: Tensor, side: int) -> Tensor:
    """Resize digits to the middle 5/7 of images of this side, as MNIST's are."""
    return F.interpolate(ink, size=(5 * side // 7,) * 2, mode="bicubic", align_corners=False)


def _framed(ink: Tensor, side: int) -> Tensor:
    before = (side - ink.shape[-1]) // 2
    after = side - ink.shape[-1] - before
    return F.pad(ink, (before, after, before, after))


def _copies(digits: LabelledImages, count: int, seed: int) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(max(count, len(digits)), generator=generator)[:count] % len(digits)
    side = digits.images.shape[-1]
    grid = _slanted(LEAN * torch.randn(count, generator=generator), side)
    grid = grid + SHIFT * torch.randn(count, 1, 1, 2, generator=generator)
    grid = grid + _bends(count, 4, side, BEND, generator)
    return LabelledImages(_read(digits.images[:][index], grid), digits.labels[index], 10)


def _bends(count: int, points: int, side: int, amount: float, generator: torch.Generator) -> Tensor:
    """Draw smooth random shifts [count, side, side, 2] (elastic distortions: Simard et al. 2003)."""
    coarse = amount * torch.randn(count, 2, points, points, generator=generator)
    return smooth_shifts(coarse, side, side)


def _slanted(slant: Tensor, side: int) -> Tensor:
    affine = torch.eye(2, 3).repeat(len(slant), 1, 1)
    affine[:, 0, 1] = slant
    return F.affine_grid(affine, [len(slant), 1, side, side], align_corners=False)


def _read(images: Tensor, grid: Tensor) -> Tensor:
    """Read images in [-1, 1] at the points of the grid; outside there is no ink."""
    return read_at(images, grid).clamp(-1, 1)
