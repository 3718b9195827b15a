"""Moves of images until the mean features of each class agree with released ones, as far as these are known.

An image is bent, by smooth shifts u (an elastic distortion: Simard et al. 2003), and its pixels change by d. For a class with
images x_i, its released mean m, whose noise has standard deviation tau, and the features phi:

    x'_i = bent(x_i, u_i) + d_i,  u_i = points L z_i,  d_i = pixels w_i
    minimise over z, w  mean_i (|z_i - r_i|^2 + |w_i|^2) / 2 + |mean_i phi(x'_i) - m|^2 / (2 tau^2)

`points` and `pixels` say how far these move easily. The shifts are a Gaussian process on a grid of points, and L is its kernel's
Cholesky factor: points near each other shift alike, so that strokes bend and do not tear. Each image begins and likes to stay at
a bend of its own, r_i, drawn from the process (perturb-and-MAP: Papandreou & Yuille 2011): without it images would keep the
little variety that they have, for the release tells nothing about single ones.

Adam takes a fixed number of steps, which does not reach the minimum. It moves every image by about as much, however little the
sum depends on it; at the minimum images far from the means would stay where they are.

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

_STEPS = 40
_POINT_RATE, _PIXEL_RATE = (
    0.2,
    0.02,
)  # of Adam: the points' in shares of their reach, a pixel's as pixels count, in [-1, 1]
_POINTS, _NEAR = 5, 0.6  # side of the grid of points, and the kernel's length in half sides of the image
# Number of images whose means are matched together, so large that their own scatter is small compared with the noise.
_TOGETHER = 4000


@dataclass(frozen=True)
class Reach:
    """The distances by which images are moved easily, to make them agree better with a release.

    Attributes:
        pixels: distance, for pixels in [-1, 1], by which a pixel changes easily; 0: not at all.
        points: distance, in half sides of the image, by which its points shift easily, those near each other alike, so that the
            image bends; 0: not at all.
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


def moved(
    images: LabelledImages, released: ClassEmbeddings, reach: Reach, seed: int, progress: bool = True
) -> LabelledImages:
    """Move public or synthetic images within [-1, 1] to where the sum above is small; `seed` draws their own bends."""
    if not reach:
        return images
    generator = torch.Generator().manual_seed(seed)
    bends = torch.randn(len(images), 2, _POINTS**2, generator=generator)
    parts = torch.arange(len(images)).split(_TOGETHER)
    with Progress("moving", len(parts) * _STEPS, shown=progress) as bar:
        found = [_moved(images[part], bends[part], released, reach, bar) for part in parts]
    return replace(images, images=torch.cat(found))


def _moved(images: LabelledImages, bends: Tensor, released: ClassEmbeddings, reach: Reach, bar: Progress) -> Tensor:
    start, labels, classes = images.images[:], images.labels, images.num_classes
    means, nearby = released.means.float(), _nearby_alike().to(start)
    home = {"points": bends.to(start), "pixels": torch.zeros_like(start)}
    moves = {name: place.clone().requires_grad_() for name, place in home.items() if getattr(reach, name)}
    optimizer = torch.optim.Adam([{"params": [move], "lr": _rate(name, reach)} for name, move in moves.items()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)

    def current() -> Tensor:
        found = _bent(start, reach.points * moves["points"] @ nearby) if "points" in moves else start
        return (found + reach.pixels * moves["pixels"] if "pixels" in moves else found).clamp(-1, 1)

    for _ in range(_STEPS):
        misfit = (class_means(released.embed(current()), labels, classes) - means).square().sum()
        ways = [(move - home[name]).square().flatten(1) for name, move in moves.items()]
        distance = sum(class_means(way, labels, classes).sum() for way in ways)
        optimizer.zero_grad()
        (distance / 2 + misfit / (2 * released.noise**2)).backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return current().detach()


def _rate(name: str, reach: Reach) -> float:
    """Return Adam's rate for z or w."""
    return _POINT_RATE if name == "points" else _PIXEL_RATE / reach.pixels


def _nearby_alike() -> Tensor:
    """Return L^T, [points, points], which makes white noise on the grid a draw of the Gaussian process."""
    line = torch.linspace(-1, 1, _POINTS)
    grid = torch.cartesian_prod(line, line)
    kernel = (torch.cdist(grid, grid).square() / (-2 * _NEAR**2)).exp() + 1e-4 * torch.eye(len(grid))
    return torch.linalg.cholesky(kernel).T


def _bent(images: Tensor, points: Tensor) -> Tensor:
    """Read images [n, C, H, W] at their own places, shifted smoothly by points [n, 2, k * k]."""
    height, width = images.shape[2:]
    own = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    return read_at(images, own + smooth_shifts(points.unflatten(2, (_POINTS, _POINTS)), height, width))
