"""Augmentations of images for a classifier: small random changes that keep the label."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastloda.errors import UserError

Augment = Callable[[Tensor, Generator], Tensor]
AugmentName = Literal["jitter", "flip-crop", "none"]

_MAX_ANGLE = 0.15  # rad
_MAX_SHIFT = 0.125  # of the image's side: one pixel of 8


def jitter(images: Tensor, generator: Generator) -> Tensor:
    """Turn each image [n, C, H, W] by up to 0.15 rad and shift it by up to an eighth of its side.

    The edge pixels fill the gaps. `generator` is a CPU generator, so that a seed gives the same augmentation on any device.
    """
    unit = 2 * torch.rand(len(images), 3, generator=generator).to(images.device) - 1
    angle = _MAX_ANGLE * unit[:, 0]
    shift = 2 * _MAX_SHIFT * unit[:, 1:]  # 2: grid_sample measures in half sides
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def flip_crop(images: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the images [n, C, H, W] and shift each by up to an eighth of its side, edges reflected.

    The usual augmentation of natural images (He et al. 2016). `generator` is a CPU generator.
    """
    n, _, height, width = images.shape
    margin = max(1, round(_MAX_SHIFT * width))
    mirrored = torch.rand(n, generator=generator) < 0.5
    top, left = torch.randint(2 * margin + 1, (2, n, 1), generator=generator)
    columns = left + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (margin,) * 4, mode="reflect")
    rows, columns = (top + torch.arange(height)).to(images.device), columns.to(images.device)
    chosen = padded[torch.arange(n, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return chosen.movedim(-1, 1)


AUGMENTS: dict[AugmentName, Augment | None] = {"jitter": jitter, "flip-crop": flip_crop, "none": None}


def augmentation(augment: AugmentName | Augment) -> Augment | None:
    """Look up an augmentation by its name; a function is returned as it is. Raises ValueError for an unknown name."""
    if callable(augment):
        return augment
    if augment not in AUGMENTS:
        raise UserError(f"augment must be one of {', '.join(get_args(AugmentName))}, got {augment!r}")
    return AUGMENTS[augment]
