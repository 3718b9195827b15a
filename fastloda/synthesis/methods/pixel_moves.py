"""Moves of images, pixel by pixel, until the mean features of each class agree with released ones, as far as these are known.

For a class with images x_i, its released mean m, whose noise has standard deviation tau, and the features phi:

    minimise over x'  mean_i |x'_i - x_i|^2 / (2 reach^2) + |mean_i phi(x'_i) - m|^2 / (2 tau^2)

This is a gradient flow of the maximum mean discrepancy (Arbel et al. 2019, https://arxiv.org/abs/1906.04370) that stays near its
start. It uses a release, but reads no private image: it costs no privacy.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fastloda.progress import Progress
from fastloda.synthesis.data import LabelledImages

from .class_embeddings import ClassEmbeddings
from .generator import class_means

_STEPS, _LEARNING_RATE = 40, 0.06  # settings of Adam, for pixels in [-1, 1]
# Number of images whose means are matched together, so large that their own scatter is small compared with the noise.
_TOGETHER = 4000


def moved(images: LabelledImages, released: ClassEmbeddings, reach: float, progress: bool = True) -> LabelledImages:
    """Move public or synthetic images within [-1, 1] to where the sum above is small.

    `reach` is the distance, for pixels in [-1, 1], by which a pixel is moved easily; 0: not at all.
    """
    if not reach:
        return images
    parts = torch.arange(len(images)).split(_TOGETHER)
    with Progress("moving", len(parts) * _STEPS, shown=progress) as bar:
        found = [_moved(images[part], released, reach, bar) for part in parts]
    return replace(images, images=torch.cat(found))


def _moved(images: LabelledImages, released: ClassEmbeddings, reach: float, bar: Progress) -> Tensor:
    start, labels, means = images.images[:], images.labels, released.means.float()
    pixels = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        distance = class_means((pixels - start).square().flatten(1), labels, images.num_classes).sum()
        misfit = (class_means(released.embed(pixels), labels, images.num_classes) - means).square().sum()
        (distance / (2 * reach**2) + misfit / (2 * released.noise**2)).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            pixels.clamp_(-1, 1)
        bar.update()
    return pixels.detach()
