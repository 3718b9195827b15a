"""DP-SGD without synthetic images: the classifier itself is trained privately, on the private images.

Each record enters a step as several jittered copies, whose gradients are averaged before clipping (augmentation
multiplicity; De et al. 2022): they lower the gradient's variance and cost no privacy.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.synthesis.arguments import Device, resolve_device
from fastloda.synthesis.budget import CHECKPOINT, EPSILON_CURVE, STATEMENT, Privacy, private_training, publish
from fastloda.synthesis.classify import AugmentName, NetworkName, augmentation, make_network, seeded_network
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.runs import Stage
from fastloda.training.average import copy_into
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer

WEIGHTS = "classifier.safetensors"


@dataclass(frozen=True)
class DPSGD:
    """How the classifier is trained.

    Attributes:
        optimizer: sgd or adam.
        learning_rate: of the optimizer.
        momentum: of sgd.
        ema_decay: of the average of the weights, which is what is released.
        network: cnn, resnet9, wrn-16-4 or wrn-40-4, with GroupNorm.
        width: as the network counts it (cnn: channels of the first layer, a multiple of 8). Default: the usual one.
        augment: of each view: jitter (digits), flip-crop (natural images) or none.
        seed: see `PrivateTraining`.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.3
    momentum: float = 0.9
    ema_decay: float = 0.95
    network: NetworkName = "cnn"
    width: int | None = 16
    augment: AugmentName = "jitter"
    seed: int | None = None

    def __post_init__(self):
        if not self.learning_rate > 0 or not 0 <= self.ema_decay < 1 or self.momentum < 0:
            raise UserError(f"DP-SGD needs learning_rate > 0, 0 <= ema_decay < 1 and momentum >= 0, got {self}")
        augmentation(self.augment)
        with torch.device("meta"):  # refuses a width that the network cannot have, without making it
            make_network(self.network, image_size=32, width=self.width)

    def optimization(self) -> dict:
        """The fields that `PrivateTraining` has too."""
        of_the_network = ("network", "width", "augment")
        return {name: value for name, value in asdict(self).items() if name not in of_the_network}


CLASSIFIER = DPSGD()


def run_dpsgd(
    run: Path,
    privacy: Privacy,
    data: LabelledImages,
    training: DPSGD,
    *,
    device: Device = "auto",
    progress: bool = True,
) -> nn.Module:
    """A stage like those of `pipeline.py`: a classifier trained by DP-SGD, in the run's folder dpsgd/.

    `privacy.records` must be given. Done before with the same settings, it is loaded; interrupted, it continues.

    Raises:
        RunError: the folder holds a classifier of other settings.
    """
    place = resolve_device(device)
    settings = {"privacy": asdict(privacy), "training": asdict(training), "device": place.type}
    stage = Stage(Path(run) / "dpsgd", settings, outputs=(WEIGHTS, STATEMENT, EPSILON_CURVE), private=True)
    if not stage.is_done():
        private = private_training(privacy, fixed_shape=place.type != "cpu", **training.optimization())
        with stage.work():
            options = {"device": place, "progress": progress}
            model, trainer = train_dpsgd(data, private, training, checkpoint=stage.folder / CHECKPOINT, **options)
            write_atomically(stage.folder / WEIGHTS, lambda path: save_file(model.state_dict(), path))
            publish(trainer, privacy, stage.folder)
    model = _network(data, training)
    model.load_state_dict(load_file(stage.folder / WEIGHTS))
    return model.to(place).eval()


def train_dpsgd(
    data: LabelledImages,
    settings: PrivateTraining,
    training: DPSGD = CLASSIFIER,
    *,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[nn.Module, DPTrainer]:
    """Train a network under DP, on `settings.views` augmented copies a record; its averaged weights, in eval mode.

    training: the network and its augmentation; the optimization is `settings`'. Also returns the trainer, which knows what was
    spent. Resumes from `checkpoint`.

    Raises:
        ValueError: `data` is empty or not square.
        CheckpointError: the checkpoint is damaged, or of other settings.
    """
    model, records = _network(data, training, settings.seed or 0).to(device), (data.images[:], data.labels)
    losses = _augmented_losses(settings.views, training.augment)
    trainer = DPTrainer(model, records, losses, settings, checkpoint=checkpoint, progress=progress).fit()
    copy_into(trainer.parameters, trainer.average.values)
    return model.eval(), trainer


def _network(data: LabelledImages, training: DPSGD, seed: int = 0) -> nn.Module:
    channels, height, size = data.images.shape[1:]
    if height != size:
        raise UserError(f"a classifier needs square images, not {height} x {size}")
    shape = {"in_channels": channels, "num_classes": data.num_classes, "image_size": size}
    return seeded_network(training.network, seed, **shape, width=training.width)


def _augmented_losses(views: int, augment: AugmentName):
    change = augmentation(augment)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor], generator: Generator) -> Tensor:
        """Cross-entropy [n * views], sample-major."""
        images, labels = (t.repeat_interleave(views, dim=0) for t in batch)
        if change is not None:  # augmentations draw on the CPU, whatever the trainer's device
            seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
            images = change(images, Generator().manual_seed(seed))
        return F.cross_entropy(model(images), labels, reduction="none")

    return losses
