"""Training without privacy, and scoring: a fixed number of steps, whatever the size of the set."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from ..data.images import LabelledImages
from .cnn import SmallCNN

Augment = Callable[[Tensor, Generator], Tensor]

_MAX_ANGLE = 0.15  # rad
_MAX_SHIFT = 0.125  # of the image's side: one pixel of 8
_LOG_EVERY = 50  # steps between looks at the loss, each of which waits for the GPU


def jitter(images: Tensor, generator: Generator) -> Tensor:
    """Turn each image [n, C, H, W] by up to 0.15 rad and shift it by up to an eighth of its side.

    What moves in is the edge, extended. `generator` is a CPU generator: a seed augments alike on any device.
    """
    unit = 2 * torch.rand(len(images), 3, generator=generator).to(images.device) - 1
    angle = _MAX_ANGLE * unit[:, 0]
    shift = 2 * _MAX_SHIFT * unit[:, 1:]  # 2: grid_sample counts in half sides
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(
    train: LabelledImages,
    *,
    steps: int = 500,
    batch_size: int = 128,
    lr: float = 2e-3,
    weight_decay: float = 1e-2,
    label_smoothing: float = 0.0,
    width: int = 32,
    augment: Augment | None = jitter,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> SmallCNN:
    """A `SmallCNN` trained on `train` by AdamW with a cosine schedule; no privacy. Returned in eval mode.

    `steps` counts batches, not epochs, so that sets of different sizes get the same training. All randomness
    comes from `seed`; global generators stay as they were.

    Raises:
        ValueError: `train` is empty or not square, or `steps` or `batch_size` is less than 1.
    """
    _check(train, steps, batch_size)
    channels, size = train.images.shape[1:3]
    config = {"in_channels": channels, "num_classes": train.num_classes, "width": width, "image_size": size}
    model = SmallCNN.seeded(seed, **config).to(device).train()
    images, labels = train.images.to(device), train.labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = Generator().manual_seed(seed)

    bar = tqdm(_batches(len(train), batch_size, steps, generator), "classifier", disable=not progress)
    for step, index in enumerate(bar):
        batch = images[index] if augment is None else augment(images[index], generator)
        loss = F.cross_entropy(model(batch), labels[index], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress and step % _LOG_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 1024) -> Tensor:
    """The most likely class, int64 [n] on the CPU, of images [n, C, H, W]; the model's mode is kept."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    classes = [model(batch.to(device)).argmax(dim=1).cpu() for batch in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(classes)


def accuracy(model: nn.Module, data: LabelledImages, batch_size: int = 1024) -> float:
    """The share of `data`, 0 .. 1, that the model classifies as labelled.

    Raises:
        ValueError: `data` is empty.
    """
    if not len(data):
        raise ValueError("accuracy of no images")
    return (predict(model, data.images, batch_size) == data.labels.cpu()).float().mean().item()


def _batches(count: int, batch_size: int, steps: int, generator: Generator) -> tuple[Tensor, ...]:
    """`steps` index tensors of exactly `batch_size`, cut from one shuffled epoch after another."""
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].split(batch_size)


def _check(train: LabelledImages, steps: int, batch_size: int) -> None:
    if not len(train):
        raise ValueError("no images to train on")
    if train.images.shape[2] != train.images.shape[3]:
        raise ValueError(f"SmallCNN needs square images, not {list(train.images.shape[2:])}")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, not {steps} and {batch_size}")
