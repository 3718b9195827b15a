"""DP-SGD without synthetic images: the classifier itself is trained privately, on the private images (De et al. 2022).

Each record enters a step as several augmented copies, whose gradients are averaged before clipping (augmentation multiplicity):
this lowers the gradient's variance and costs no privacy.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fastloda.errors import UserError
from fastloda.synthesis.budget import CHECKPOINT, Privacy, fit_average, private_trainer
from fastloda.synthesis.classify import AugmentName, NetworkName, augmentation, make_network, seeded_network
from fastloda.synthesis.data import LabelledImages
from fastloda.training.trainer import DPTrainer

from .base import Budget, ByEpsilon, PrivateClassifier, Release, Spent, Work
from .cost import step_cost

_OF_THE_CLASSIFIER = ("network", "width", "augment")


@dataclass(frozen=True)
class DPSGD:
    """Settings of the classifier's training.

    Attributes:
        optimizer: name of the optimizer, sgd or adam.
        learning_rate: learning rate of the optimizer.
        momentum: momentum of sgd.
        ema_decay: decay of the moving average of the weights, which is what is released.
        network: architecture with GroupNorm: cnn, resnet9, wrn-16-4 or wrn-40-4.
        width: width as the network counts it (cnn: channels of the first layer, a multiple of 8). Default: its usual one.
        augment: augmentation of each view: jitter (digits), flip-crop (natural images) or none.
        seed: seed as in `PrivateTraining`.
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
        with torch.device("meta"):  # refuses a width that the network can't have, without making the network
            make_network(self.network, image_size=32, width=self.width)

    def classifier(self) -> dict:
        """Collect the fields that `train_classifier` has too: those of the network, and how images are augmented."""
        return {name: getattr(self, name) for name in _OF_THE_CLASSIFIER}

    def optimization(self) -> dict:
        """Collect the fields that `PrivateTraining` has too."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_CLASSIFIER}


def train_dpsgd(
    data: LabelledImages,
    privacy: Privacy,
    training: DPSGD,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    progress: bool = True,
) -> tuple[nn.Module, DPTrainer]:
    """Train a network privately on `privacy.views` augmented copies per record; return its averaged weights, in eval mode.

    Also returns the trainer, which knows what was spent. Resumes from `checkpoint`.

    Raises:
        UserError: `data` is empty or not square.
        CheckpointError: the checkpoint is damaged, or belongs to other settings.
    """
    model, records = make_classifier(data, training, training.seed or 0).to(device), (data.images[:], data.labels)
    losses, options = (
        augmented_losses(privacy.views, training.augment),
        {"checkpoint": checkpoint, "progress": progress},
    )
    trainer = private_trainer(model, records, losses, privacy, training.optimization(), **options)
    fit_average(trainer)
    return model.eval(), trainer


def make_classifier(data: LabelledImages, training: DPSGD, seed: int = 0) -> nn.Module:
    """Make the untrained network for images like `data`.

    Raises:
        UserError: the images are not square.
    """
    return seeded_network(seed=seed, **network_config(data, training))


def network_config(data: LabelledImages, training: DPSGD) -> dict:
    """Collect the arguments of `make_network` for the network for images like `data`.

    Raises:
        UserError: the images are not square.
    """
    channels, height, size = data.images.shape[1:]
    if height != size:
        raise UserError(f"a classifier needs square images, not {height} x {size}")
    shape = {"in_channels": channels, "num_classes": data.num_classes, "image_size": size}
    return {"name": training.network, **shape, "width": training.width}


def augmented_losses(views: int, augment: AugmentName):
    """Make the loss function for a trainer: the cross-entropy of augmented copies."""
    change = augmentation(augment)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor], generator: Generator) -> Tensor:
        """Compute the cross-entropy [n * views], with the views of a sample adjacent."""
        images, labels = (t.repeat_interleave(views, dim=0) for t in batch)
        if change is not None:  # augmentations draw on the CPU, whatever the trainer's device
            seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
            images = change(images, Generator().manual_seed(seed))
        return F.cross_entropy(model(images), labels, reduction="none")

    return losses


@dataclass(frozen=True)
class Direct:
    """The settings of one private run of a classifier.

    Attributes:
        training: settings of network, augmentation and optimization.
        steps, batch_size: number of private steps, and expected number of records in each.
        views: number of augmented copies per record and step, whose gradients are averaged before clipping.
        max_grad_norm: the clipping bound.
    """

    training: DPSGD
    steps: int = 250
    batch_size: int = 256
    views: int = 4
    max_grad_norm: float = 1.0

    def privacy(self, budget: Budget) -> Privacy:
        return budget.in_steps(self.steps, self.batch_size, max_grad_norm=self.max_grad_norm, views=self.views)


@dataclass(frozen=True)
class DirectDPSGD:
    """The method DP-SGD on the classifier itself, with the settings of the private run for each budget."""

    runs: ByEpsilon[Direct]
    name: str = "DP-SGD"
    trained_on: str = "the private images, by DP-SGD"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> PrivateClassifier:
        direct = self.runs.at(budget.epsilon)
        training = replace(direct.training, seed=work.seed)
        work.folder.mkdir(parents=True, exist_ok=True)
        options = {"device": work.device, "checkpoint": work.folder / CHECKPOINT, "progress": work.progress}
        network, trainer = train_dpsgd(private, direct.privacy(budget), training, **options)
        cost = step_cost(trainer, (private.images[:], private.labels))
        return PrivateClassifier(network, Spent(budget.delta, (Release.of(trainer),)), cost)
