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

from fastloda.arguments import Device, resolve_device
from fastloda.average import copy_into
from fastloda.budget import CHECKPOINT, EPSILON_CURVE, STATEMENT, Privacy, private_training, publish
from fastloda.classify import SmallCNN, jitter
from fastloda.data import LabelledImages
from fastloda.files import write_atomically
from fastloda.runs import Stage
from fastloda.trainer import DPTrainer, PrivateTraining

WEIGHTS = "classifier.safetensors"


@dataclass(frozen=True)
class DPSGD:
    """How the classifier is trained.

    Attributes:
        optimizer: sgd or adam.
        learning_rate: of the optimizer.
        momentum: of sgd.
        ema_decay: of the average of the weights, which is what is released.
        width: channels of the first layer, a multiple of 8.
        seed: see `PrivateTraining`.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.3
    momentum: float = 0.9
    ema_decay: float = 0.95
    width: int = 16
    seed: int | None = None

    def __post_init__(self):
        if not self.learning_rate > 0 or not 0 <= self.ema_decay < 1 or self.momentum < 0:
            raise ValueError(f"DP-SGD needs learning_rate > 0, 0 <= ema_decay < 1 and momentum >= 0, got {self}")
        SmallCNN.seeded(0, width=self.width)  # refuses a width that it cannot have

    def optimization(self) -> dict:
        """The fields that `PrivateTraining` has too."""
        return {name: value for name, value in asdict(self).items() if name != "width"}


def run_dpsgd(
    run: Path,
    privacy: Privacy,
    data: LabelledImages,
    training: DPSGD,
    *,
    device: Device = "auto",
    progress: bool = True,
) -> SmallCNN:
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
            options = {"width": training.width, "device": place, "progress": progress}
            model, trainer = train_dpsgd(data, private, checkpoint=stage.folder / CHECKPOINT, **options)
            write_atomically(stage.folder / WEIGHTS, lambda path: save_file(model.state_dict(), path))
            publish(trainer, privacy, stage.folder)
    model = _network(data, training.width)
    model.load_state_dict(load_file(stage.folder / WEIGHTS))
    return model.to(place).eval()


def train_dpsgd(
    data: LabelledImages,
    settings: PrivateTraining,
    *,
    width: int = 16,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[SmallCNN, DPTrainer]:
    """Train a `SmallCNN` under DP, on `settings.views` jittered copies a record; its averaged weights, in eval mode.

    Also returns the trainer, which knows what was spent. Resumes from `checkpoint`.

    Raises:
        ValueError: `data` is empty or not square.
        CheckpointError: the checkpoint is damaged, or of other settings.
    """
    model, records = _network(data, width, settings.seed or 0).to(device), (data.images, data.labels)
    losses = _jittered_losses(settings.views)
    trainer = DPTrainer(model, records, losses, settings, checkpoint=checkpoint, progress=progress).fit()
    copy_into(trainer.parameters, trainer.average.values)
    return model.eval(), trainer


def _network(data: LabelledImages, width: int, seed: int = 0) -> SmallCNN:
    channels, height, size = data.images.shape[1:]
    if height != size:
        raise ValueError(f"SmallCNN needs square images, not {height} x {size}")
    return SmallCNN.seeded(seed, in_channels=channels, num_classes=data.num_classes, width=width, image_size=size)


def _jittered_losses(views: int):
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor], generator: Generator) -> Tensor:
        """Cross-entropy [n * views], sample-major."""
        images, labels = (t.repeat_interleave(views, dim=0) for t in batch)
        # jitter draws on the CPU, whatever the trainer's device
        seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
        copies = jitter(images, Generator().manual_seed(seed))
        return F.cross_entropy(model(copies), labels, reduction="none")

    return losses
