"""A small conditional generator, trained to match released feature means; all of it is post-processing."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.randomness import seeded

from .base import Sampler, Spent, Work

_NOISE, _BATCH = 16, 200


class SmallGenerator(nn.Module):
    """A generator from noise [n, 16] and labels [n] to images [n, C, S, S] in [-1, 1]; BatchNorm is safe: it sees no records."""

    def __init__(self, channels: int, size: int, num_classes: int, width: int):
        super().__init__()
        if size % 4:
            raise UserError(f"the generator makes images whose side is a multiple of 4, not {size}")
        self.num_classes, self.shape = num_classes, (2 * width, size // 4, size // 4)
        self.stem = nn.Sequential(
            nn.Linear(_NOISE + num_classes, 4 * width),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 2 * width * (size // 4) ** 2),
        )
        self.body = nn.Sequential(
            _up(2 * width, 2 * width), _up(2 * width, width), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        conditions = torch.cat([noise, F.one_hot(labels, self.num_classes).to(noise.dtype)], dim=1)
        return self.body(self.stem(conditions).unflatten(1, self.shape))


def _up(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(c_in),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(c_in, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


def fit_generator(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    image_shape: tuple[int, int, int],
    num_classes: int,
    spent: Spent,
    work: Work,
    *,
    steps: int,
    learning_rate: float,
    width: int,
) -> Sampler:
    """Train a `SmallGenerator` to reduce loss_of(images, labels) on class-balanced batches of 200, by Adam with a cosine.

    All randomness comes from work.seed.
    """
    generator = torch.Generator().manual_seed(work.seed)
    with seeded(work.seed):
        network = (
            SmallGenerator(image_shape[0], image_shape[1], num_classes, width)
            .to(work.device, memory_format=torch.channels_last)
            .train()
        )
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    labels = (torch.arange(_BATCH) % num_classes).to(work.device)
    for _ in range(steps):
        noise = torch.randn(_BATCH, _NOISE, generator=generator).to(work.device)
        optimizer.zero_grad()
        loss_of(network(noise, labels), labels).backward()
        optimizer.step()
        schedule.step()
    network.eval()

    @torch.no_grad()
    def draw(labels: Tensor, seed: int) -> Tensor:
        noise = torch.randn(len(labels), _NOISE, generator=torch.Generator().manual_seed(seed))
        parts = zip(noise.split(512), labels.split(512))
        return torch.cat([network(n.to(work.device), y.to(work.device)).cpu() for n, y in parts])

    return Sampler(draw, num_classes, spent)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Compute the mean of each class's features: [n, d] -> [num_classes, d]; zero for a class without an image."""
    members = F.one_hot(labels, num_classes).to(features.dtype)
    return members.T @ features / members.sum(0).clamp(min=1)[:, None]
