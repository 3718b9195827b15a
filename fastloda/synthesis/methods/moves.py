"""Moves of images until the mean features of each class agree with released ones, as far as these are known.

An image is bent, by shifts u of a grid of points (an elastic distortion: Simard et al. 2003), and its pixels change by d. For a
class with images x_i, its released mean m, whose noise has standard deviation tau, and the features phi:

    x'_i = bent(x_i, u_i) + d_i
    minimise over u, d  mean_i (|u_i|^2 / (2 points^2) + |d_i|^2 / (2 pixels^2)) + |mean_i phi(x'_i) - m|^2 / (2 tau^2)

where `points` and `pixels` say how far these move easily.

This is a gradient flow of the maximum mean discrepancy (Arbel et al. 2019, https://arxiv.org/abs/1906.04370) that stays near its
start. It uses a release, but reads no private image: it costs no privacy.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloda.errors import UserError
from fastloda.progress import Progress
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.data.elastic import read_at, smooth_shifts

from .class_embeddings import ClassEmbeddings
from .generator import class_means

_STEPS, _LEARNING_RATE = 40, 0.06  # settings of Adam; the rate is that of pixels, that of points grows with their reach
_POINTS = 4  # side of the grid of points; finer grids bend images out of shape
# Number of images whose means are matched together, so large that their own scatter is small compared with the noise.
_TOGETHER = 4000


@dataclass(frozen=True)
class Reach:
    """The distances by which images are moved easily, to make them agree better with a release.

    Attributes:
        pixels: distance, for pixels in [-1, 1], by which a pixel changes easily; 0: not at all.
        points: distance, in half sides of the image, by which the points of a coarse grid shift easily, so that the image bends;
            0: not at all.
    """

    pixels: float = 0.0
    points: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise UserError(f"reach.{name} must be finite and not negative, got {value}")

    def __bool__(self) -> bool:
        return bool(self.pixels or self.points)


UNMOVED = Reach()


def moved(images: LabelledImages, released: ClassEmbeddings, reach: Reach, progress: bool = True) -> LabelledImages:
    """Move public or synthetic images within [-1, 1] to where the sum above is small."""
    if not reach:
        return images
    parts = torch.arange(len(images)).split(_TOGETHER)
    with Progress("moving", len(parts) * _STEPS, shown=progress) as bar:
        found = [_moved(images[part], released, reach, bar) for part in parts]
    return replace(images, images=torch.cat(found))


def _moved(images: LabelledImages, released: ClassEmbeddings, reach: Reach, bar: Progress) -> Tensor:
    start, labels, means = images.images[:], images.labels, released.means.float()
    pixels, points = torch.zeros_like(start), torch.zeros(len(start), 2, _POINTS, _POINTS)
    moves = [(pixels, reach.pixels, _LEARNING_RATE), (points, reach.points, _LEARNING_RATE * reach.points / 0.1)]
    moves = [(move.requires_grad_(), deviation, rate) for move, deviation, rate in moves if deviation]
    optimizer = torch.optim.Adam([{"params": [move], "lr": rate} for move, _, rate in moves])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    current = lambda: ((_bent(start, points) if reach.points else start) + pixels).clamp(-1, 1)  # noqa: E731
    for _ in range(_STEPS):
        optimizer.zero_grad()
        misfit = (class_means(released.embed(current()), labels, images.num_classes) - means).square().sum()
        loss = misfit / (2 * released.noise**2)
        for move, deviation, _ in moves:
            distance = class_means(move.square().flatten(1), labels, images.num_classes).sum()
            loss = loss + distance / (2 * deviation**2)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return current().detach()


def _bent(images: Tensor, points: Tensor) -> Tensor:
    """Read images [n, C, H, W] at their own places, shifted smoothly by points [n, 2, k, k]."""
    height, width = images.shape[2:]
    own = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    return read_at(images, own + smooth_shifts(points, height, width))
