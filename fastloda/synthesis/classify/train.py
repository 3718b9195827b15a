"""Training of classifiers without privacy, for a fixed number of steps whatever the size of the set, and their accuracy."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fastloda.errors import UserError
from fastloda.progress import Progress

from ..data.images import LabelledImages
from .augment import Augment, AugmentName, augmentation
from .networks import NetworkName, seeded_network
from .norms import Norm

OptimizerName = Literal["adamw", "sgd"]
OPTIMIZERS: dict[OptimizerName, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
_LOG_EVERY = 50  # steps between displays of the loss, each of which waits for the GPU


def train_classifier(
    train: LabelledImages,
    *,
    steps: int = 500,
    batch_size: int = 128,
    lr: float = 2e-3,
    weight_decay: float = 1e-2,
    label_smoothing: float = 0.0,
    network: NetworkName = "cnn",
    width: int | None = None,
    norm: Norm = "group",
    optimizer: OptimizerName = "adamw",
    augment: AugmentName | Augment = "jitter",
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> nn.Module:
    """Train a network of `NETWORKS` on `train` with a cosine schedule, without privacy, and return it in eval mode.

    `steps` counts batches, not epochs, so that sets of different sizes get the same training. All randomness comes from `seed`;
    global generators are not changed.

    Raises:
        ValueError: `train` is empty or not square, `steps` or `batch_size` is less than 1, or there is no such network.
    """
    _check(train, steps, batch_size)
    channels, size = train.images.shape[1:3]
    config = {"in_channels": channels, "num_classes": train.num_classes, "image_size": size}
    model = seeded_network(network, seed, **config, width=width, norm=norm).to(device).train()
    images, labels = train.images.to(device), train.labels.to(device)
    moves = OPTIMIZERS[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(moves, T_max=steps)
    generator, change = Generator().manual_seed(seed), augmentation(augment)

    with Progress("classifier", steps, shown=progress) as bar:
        for step, index in enumerate(_batches(len(train), batch_size, steps, generator)):
            batch = images[index] if change is None else change(images[index], generator)
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=label_smoothing)
            moves.zero_grad()
            loss.backward()
            moves.step()
            schedule.step()
            bar.update(note=f"loss {loss.item():.3f}" if progress and step % _LOG_EVERY == 0 else "")
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 1024) -> Tensor:
    """Predict the most likely class of images [n, C, H, W]: int64 [n] on the CPU; the model's mode is kept."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    classes = [model(batch.to(device)).argmax(dim=1).cpu() for batch in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(classes)


def accuracy(model: nn.Module, data: LabelledImages, batch_size: int = 1024) -> float:
    """Compute the share of `data`, 0 .. 1, that the model classifies as labelled.

    Raises:
        ValueError: `data` is empty.
    """
    if not len(data):
        raise UserError("accuracy of no images")
    return (predict(model, data.images, batch_size) == data.labels.cpu()).float().mean().item()


def _batches(count: int, batch_size: int, steps: int, generator: Generator) -> tuple[Tensor, ...]:
    """Draw `steps` index tensors of exactly `batch_size`, cut from one shuffled epoch after another."""
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].split(batch_size)


def _check(train: LabelledImages, steps: int, batch_size: int) -> None:
    if not len(train):
        raise UserError("no images to train on")
    if train.images.shape[2] != train.images.shape[3]:
        raise UserError(f"a classifier needs square images, not {list(train.images.shape[2:])}")
    if steps < 1 or batch_size < 1:
        raise UserError(f"steps and batch_size must be at least 1, not {steps} and {batch_size}")
