"""Elastic distortions of images, by shifts of a coarse grid of points (Simard et al. 2003)."""

import torch.nn.functional as F
from torch import Tensor


def smooth_shifts(points: Tensor, height: int, width: int) -> Tensor:
    """Interpolate shifts of a grid of points, [n, 2, k, k], to each pixel: [n, height, width, 2], in half sides of the image."""
    return F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True).movedim(1, -1)


def read_at(images: Tensor, places: Tensor) -> Tensor:
    """Read images [n, C, H, W] in [-1, 1] at places [n, H, W, 2], in half sides from the centre; outside the image lies -1."""
    return 2 * F.grid_sample((images + 1) / 2, places, align_corners=False) - 1
