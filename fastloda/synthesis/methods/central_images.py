"""Central images: the mean of each class at half the resolution, from one noisy release, which teach a model where classes are.

The idea is DP-FETA's (Li et al. 2025, https://arxiv.org/abs/2504.01395). A record adds its difference from the mean public image,
in units of a public length and shortened to norm 1: this way the noise does not cover what all images have in common. The
divisor is the nominal number of records per class, because the true number is private.

From a very noisy image a denoiser can predict little more than the mean of its class. Therefore the model learns central images
only at the noisiest levels, and keeps what it knows about details.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloda.errors import UserError
from fastloda.privacy.noise import NoiseSource
from fastloda.synthesis.classify.augment import jitter
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import Process, UNet
from fastloda.synthesis.diffusion.pretrain import PublicTraining

from .gaussian_release import ClassSums, release_class_sums
from .warm_up import OneRelease

_BLUR = 3  # side of the median's and the sharpening's window, in pixels


@dataclass(frozen=True)
class CentredSums(ClassSums):
    """The released sums of images, as differences from a public image `centre` [numbers], in units of a public `length`."""

    centre: Tensor
    length: float


@dataclass(frozen=True)
class CentralImages(OneRelease):
    """The settings of central images.

    Attributes:
        noise_multiplier: standard deviation of the released sums' noise; their sensitivity is 1.
        training: settings of the further training.
        drawn: number of copies of the central images, turned and shifted a little, for further training of the public model.
        sharpening: factor of the difference between a central image and its blurred copy, which is added to it.
        least_noise: standard deviation of the noise, in units of the images, from which on the model learns the central images.
    """

    noise_multiplier: float = 10.0
    training: PublicTraining = field(
        default_factory=lambda: PublicTraining(steps=100, learning_rate=5e-4, ema_decay=0.95)
    )
    drawn: int = 2000
    sharpening: float = 1.0
    least_noise: float = 12.0

    kind: ClassVar[str] = "means"
    what: ClassVar[str] = "sum of clipped images"
    released_as: ClassVar[type[ClassSums]] = CentredSums

    def __post_init__(self):
        super().__post_init__()
        if self.drawn < 1 or not 0 <= self.sharpening < float("inf") or not 0 < self.least_noise < float("inf"):
            raise UserError(f"means needs drawn >= 1, sharpening >= 0 and least_noise > 0; got {self}")

    def sums(
        self, private: LabelledImages, pool: LabelledImages, records: int, seed: int, noise: NoiseSource
    ) -> CentredSums:
        """Release the noisy sum of each class's images, as differences from the public mean that are shortened to norm 1.

        A record changes one class's sum by at most 1.
        """
        public = _halved(pool.images[:])
        centre = public.mean(0)
        length = max(float((public - centre).norm(dim=1).median()), torch.finfo(torch.float32).eps)
        what = (self.what, (_halved(private.images[:]) - centre) / length, private.labels, private.num_classes)
        released, _ = release_class_sums(*what, self.noise_multiplier, noise)
        return CentredSums(released, self.noise_multiplier, records, centre, length)

    def training_images(
        self, pool: LabelledImages, released: CentredSums, seed: int, progress: bool = True
    ) -> LabelledImages:
        """Make `drawn` copies of the central images, each turned and shifted a little."""
        centrals = self.centrals(released, pool.images.shape[1:])
        labels = torch.arange(self.drawn) % len(centrals)
        copies = jitter(centrals[labels], torch.Generator().manual_seed(seed)).clamp(-1, 1)
        return LabelledImages(copies, labels, len(centrals))

    def centrals(self, released: CentredSums, shape: Sequence[int]) -> Tensor:
        """Compute each class's central image [classes, *shape]: clamped, enlarged, blurred by a median, and sharpened."""
        channels, height, width = shape
        means = (released.centre + released.length * released.means.float()).clamp(-1, 1)
        means = means.unflatten(1, (channels, *_half(height, width)))
        enlarged = F.interpolate(means, size=(height, width), mode="bilinear", align_corners=False)
        smooth = _windows(enlarged).median(-1).values
        return (smooth + self.sharpening * (smooth - _windows(smooth).mean(-1))).clamp(-1, 1)

    def process(self, model: UNet) -> Process:
        return model.process.noisier_than(self.least_noise)


def _half(height: int, width: int) -> tuple[int, int]:
    return max(1, height // 2), max(1, width // 2)


def _halved(images: Tensor) -> Tensor:
    """Shrink images [n, C, H, W] to half of their sides, each separately: [n, numbers]."""
    return F.adaptive_avg_pool2d(images, _half(*images.shape[2:])).flatten(1)


def _windows(images: Tensor) -> Tensor:
    """Collect the pixels around each pixel, with edges repeated: [n, C, H, W] -> [n, C, H, W, _BLUR^2]."""
    padded = F.pad(images, (_BLUR // 2,) * 4, mode="replicate")
    return padded.unfold(2, _BLUR, 1).unfold(3, _BLUR, 1).flatten(-2)
