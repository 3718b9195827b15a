"""Labels for synthetic images from a classifier that is trained privately, in place of those for which they were drawn.

A private diffusion model is asked for a 4 and now and then draws what people would call a 9, and whoever learns from its samples
learns that too. Where two classes part is a small question beside how images look, and private training answers it better: the
teacher, a classifier of the public images that a warm-up chose, is trained further on the private images by DP-SGD. Students of
images that private teachers label are an idea of Papernot et al. (2017, https://arxiv.org/abs/1610.05755).

The labels are computed from the released weights and from samples: they cost no more privacy than the teacher's steps.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastloda.errors import UserError
from fastloda.synthesis.budget import fit_average
from fastloda.synthesis.classify import train_classifier
from fastloda.synthesis.data import LabelledImages
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer

from .base import Release
from .dp_sgd import DPSGD, augmented_losses

WHAT = "clipped gradients of a classifier"
_OTHER_NOISE = 2**32  # added to the seed: the diffusion model's private steps have noise of their own


@dataclass(frozen=True)
class PrivateLabels:
    """The settings of the teacher.

    Attributes:
        noise_multiplier: standard deviation of the noise on a step's sum of clipped gradients, in clipping bounds.
        steps: number of private steps.
        batch_size: expected number of records in a step.
        views: number of augmented copies per record and step, whose gradients are averaged before clipping.
        public_steps: number of steps of training on public images, before.
        training: settings of network, augmentation and the optimization of the private steps; its seed follows from the run's.
    """

    noise_multiplier: float
    steps: int = 60
    batch_size: int = 500
    views: int = 1
    public_steps: int = 1000
    training: DPSGD = DPSGD(learning_rate=0.1, ema_decay=0.9, width=None)

    def __post_init__(self):
        if not 0 < self.noise_multiplier < float("inf"):
            raise UserError(f"labels.noise_multiplier must be positive and finite, got {self.noise_multiplier}")
        if min(self.steps, self.batch_size, self.views, self.public_steps) < 1:
            raise UserError(f"labels need positive steps, batch_size, views and public_steps, got {self}")
        if self.training.seed is not None:
            raise UserError("labels.training.seed would be ignored: the seed is that of the whole run")

    def releases(self, records: int) -> tuple[Release, ...]:
        """Describe what the teacher's training releases about `records` private images, by their nominal number.

        Raises:
            UserError: a step takes more records than there are.
        """
        if self.batch_size > records:
            raise UserError(f"labels.batch_size {self.batch_size} exceeds the {records} records")
        return (Release(WHAT, self.batch_size / records, self.noise_multiplier, self.steps),)

    def private_training(self, records: int, delta: float, seed: int | None, device: torch.device) -> PrivateTraining:
        """Make the settings of the private steps. With a seed of None, their randomness comes from the operating system.

        Raises:
            UserError: a step takes more records than there are, or delta is out of range.
        """
        training = replace(self.training, seed=None if seed is None else _OTHER_NOISE + seed)
        ((_, sample_rate, noise_multiplier, steps),) = self.releases(records)
        return PrivateTraining(
            sample_rate=sample_rate,
            expected_batch_size=self.batch_size,
            steps=steps,
            delta=delta,
            noise_multiplier=noise_multiplier,
            views=self.views,
            micro_batch_size=max(1, 256 // self.views),
            fixed_shape=device.type != "cpu",
            **training.optimization(),
        )

    def teacher(
        self,
        private: LabelledImages,
        public: LabelledImages,
        settings: PrivateTraining,
        *,
        seed: int | None,
        checkpoint: Path,
        device: torch.device,
        progress: bool = True,
    ) -> nn.Module:
        """Train the classifier on public images of the private classes, then on the private ones; resume from the checkpoint.

        Its weights, averaged over the private steps of `settings`, are what `releases` accounts for. It is returned in eval
        mode.
        """
        options = {"steps": self.public_steps, "seed": seed or 0, "device": device, "progress": progress}
        network = train_classifier(public, **self.training.classifier(), **options).train()
        columns, losses = (private.images[:], private.labels), augmented_losses(self.views, self.training.augment)
        fit_average(DPTrainer(network, columns, losses, settings, checkpoint=checkpoint, progress=progress))
        return network.eval()
