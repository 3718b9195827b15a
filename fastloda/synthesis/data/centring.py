"""The centring of drawings by their ink, as MNIST's digits are centred."""

import torch
import torch.nn.functional as F
from torch import Tensor


def centred_by_ink(images: Tensor) -> Tensor:
    """Shift square images [n, C, S, S] by whole pixels, so that the centre of mass of the ink lies in the middle.

    Ink is 1 and background -1, which also comes from outside the image.
    """
    side = images.shape[-1]
    ink = (images + 1).sum(1)
    rows, columns = (_shifted(ink.sum(axis)) for axis in (2, 1))
    framed = F.pad(images, (0, 1, 0, 1), value=-1)  # what lies at place `side`
    rows, columns = (places.where((places >= 0) & (places < side), side) for places in (rows, columns))
    own = torch.arange(len(images))[:, None, None]
    return framed[own, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _shifted(ink: Tensor) -> Tensor:
    """Compute where each place of a line is read, int64 [n, S], so that ink [n, S] along it is centred."""
    places = torch.arange(ink.shape[1])
    centre = (ink * places).sum(1) / ink.sum(1).clamp(min=1e-6)
    return places + (centre - places.float().mean()).round().long()[:, None]
