"""Settings of the stages that are not defined elsewhere; the command line reads them from here."""

import re
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from fastloda.errors import UserError
from fastloda.loda.attach import Targets, attach_loda
from fastloda.synthesis.classify import AugmentName, NetworkName, Norm, OptimizerName, make_network
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import PRESETS, TIMESTEPS, Process, UNetConfig, preset_for
from fastloda.training.schedules import Schedule
from fastloda.training.trainer import Losses

# The projections of attention layers: of diffusers' models, and of the U-Net of `fastloda pretrain`.
ATTENTION = r"(.*\.)?(to_q|to_k|to_v|to_out\.0|proj_q|proj_k|proj_v)|(down|middle|up)blocks\.[\d.]+\.proj"
TARGETS: dict[str, Targets] = {
    "convolutions": nn.Conv2d,
    "attention": ATTENTION,
    "both": lambda name, layer: isinstance(layer, nn.Conv2d) or re.fullmatch(ATTENTION, name) is not None,
}


OF_THE_LOSSES = (
    "label_dropout",
    "timesteps",
    "flips",
)  # the fields of FineTuning that determine the loss, not the optimization


@dataclass(frozen=True)
class UNetShape:
    """The shape of a U-Net: a preset, and any differences from it. Size, channels and classes are those of the images.

    Attributes:
        preset: digits (for 8 to 15 pixels), small (16 to 47), medium (48 to 64) or paper (10.4 million parameters). auto chooses
            one of the first three by the size.
        width: number of channels of the first level. Default, here and below: the preset's.
        multipliers: factors of the channels at each level; the size must be divisible by 2^(levels - 1).
        blocks_per_level: number of residual blocks at each level.
        attention: levels that have attention, counted from 0, or whether all have it.
        norm_groups: number of groups of each GroupNorm.
        dropout: probability of dropout in the residual blocks.
        process: noise process that the model reverses: ddpm (Ho et al. 2020; the default) or edm (Karras et al. 2022).
        patch: side of the patches whose pixels are the channels of the first level; 2 makes a small model twice as fast or more.
    """

    preset: Literal["auto", "digits", "small", "medium", "paper"] = "auto"
    width: int | None = None
    multipliers: tuple[int, ...] | None = None
    blocks_per_level: int | None = None
    attention: bool | tuple[int, ...] | None = None
    norm_groups: int | None = None
    dropout: float | None = None
    process: Literal["ddpm", "edm"] | None = None
    patch: int | None = None

    def config(self, images: LabelledImages) -> UNetConfig:
        """Return the configuration of a U-Net for images of this kind.

        Raises:
            UserError: the images are not square, or the shape does not fit their size.
        """
        channels, height, size = images.images.shape[1:]
        if height != size:
            raise UserError(f"the U-Net takes square images, not {height} x {size}: give them a --size")
        return self.sized(size, channels, images.num_classes)

    def sized(self, size: int, channels: int, num_classes: int) -> UNetConfig:
        """Return the configuration of a U-Net for images of this size. Raises UserError if the shape does not fit the size."""
        given = {name: value for name, value in asdict(self).items() if name != "preset" and value is not None}
        preset = PRESETS[preset_for(size) if self.preset == "auto" else self.preset]
        classes = {"num_classes": num_classes, "class_width": max(64, num_classes + 1)}
        return UNetConfig(**preset | {"image_size": size, "in_channels": channels} | classes | given)


@dataclass(frozen=True)
class Adapter:
    """The low-dimensional adapter (LoDA) of each adapted layer.

    Attributes:
        rank: number of channels between the two layers of an adapter.
        activation: activation between these two layers; "identity" is LoRA.
        negative_slope: slope of leaky_relu below 0.
        scale: factor by which the adapter's output is multiplied.
        targets: layers to adapt: convolutions, attention (its query, key, value and output projections), both, or a regular
            expression that the full name of a layer must match. Default: convolutions; both for a DiT, which has only one.
    """

    rank: int = 4
    activation: Literal["leaky_relu", "identity"] = "leaky_relu"
    negative_slope: float = 0.1
    scale: float = 1.0
    targets: str | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"adapter.rank must be at least 1, got {self.rank}")
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise UserError(f"adapter.targets is no regular expression: {self.targets!r} ({error})") from error

    def attach(self, network: nn.Module) -> None:
        """Attach adapters to the network, in place.

        Raises:
            ValueError: no layer of the network matches, or the rank is too high for all of them.
        """
        targets = TARGETS.get(self.targets, self.targets) if self.targets else None
        attach_loda(network, **asdict(self) | {"targets": targets})


@dataclass(frozen=True)
class FineTuning:
    """Settings of the training of adapters on noisy gradients.

    Attributes:
        optimizer: name of the optimizer: adam, adamw or sgd.
        learning_rate: learning rate of the optimizer.
        warmup: number of steps of linear warm-up.
        schedule: schedule of the learning rate after the warm-up.
        ema_decay: decay of the moving average of the adapters over the steps; this average is what is released.
        label_dropout: share of labels that are dropped, for classifier-free guidance; none for a model that needs a label.
        flips: whether each view of an image is mirrored left to right with probability 1/2; for photographs, not for digits.
        timesteps: range of timesteps, without its end, on which the adapters are trained; for edm, in thousandths of its noise
            levels. The noisiest images tell little about the private ones, and the least noisy little about their shape: both
            would only weaken the signal.
        micro_batch_size: number of records in memory at a time; the result does not depend on it.
        seed: seed of sampling and noise. Default: the operating system's randomness. A number makes an experiment that can be
            repeated, and whose noise can be foreseen.
        secure_noise: whether noise comes from the operating system's cryptographically secure generator; only without a seed.
            It takes longer to draw, and steps taken after the last checkpoint are charged and lost after a crash.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 7e-3
    warmup: int = 0
    schedule: Schedule = "constant"
    ema_decay: float = 0.98
    label_dropout: float = 0.1
    timesteps: tuple[int, int] = (0, TIMESTEPS)
    micro_batch_size: int = 512
    seed: int | None = None
    flips: bool = False
    secure_noise: bool = False

    def __post_init__(self):
        if self.secure_noise and self.seed is not None:
            raise UserError(f"training.secure_noise can't be seeded: leave out training.seed, got {self.seed}")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"training.label_dropout must lie in [0, 1], got {self.label_dropout}")
        first, end = self.timesteps
        if not 0 <= first < end <= TIMESTEPS:
            raise UserError(
                f"training.timesteps must be two numbers, 0 <= first < end <= {TIMESTEPS}, got {[first, end]}"
            )
        if not self.learning_rate > 0 or not 0 <= self.ema_decay < 1 or self.micro_batch_size < 1 or self.warmup < 0:
            raise UserError(
                f"training needs learning_rate > 0, 0 <= ema_decay < 1, micro_batch_size >= 1, warmup >= 0; got {self}"
            )

    def losses(self, process: Process, views: int) -> Losses:
        """Make the loss of a model of this process for a trainer: one number per sample and view."""
        options = {"views": views, "label_dropout": self.label_dropout, "flips": self.flips}
        return lambda model, batch, generator: process.losses(model, *batch, **options, generator=generator)

    def optimization(self) -> dict:
        """Collect the fields that `PrivateTraining` has as well."""
        return {name: value for name, value in asdict(self).items() if name not in OF_THE_LOSSES}


@dataclass(frozen=True)
class Drawing:
    """The settings of the sampler that draws images.

    Attributes:
        steps: number of steps of the sampler.
        guidance: weight of classifier-free guidance; 0: none.
        stochasticity: how much fresh noise each step adds (`fastloda.synthesis.diffusion.sample`); 0: none.
    """

    steps: int
    guidance: float = 0.0
    stochasticity: float = 0.0


@dataclass(frozen=True)
class Classifier:
    """Settings of the classifier by which images are tested.

    Attributes:
        network: architecture: cnn (the small one), resnet9, wrn-16-4 or wrn-40-4.
        steps: number of optimizer steps, however many images there are.
        batch_size: number of images in a step.
        optimizer: name of the optimizer: adamw, or sgd with Nesterov momentum 0.9.
        lr: peak learning rate, with a cosine schedule.
        weight_decay: weight decay of the optimizer.
        label_smoothing: share of a label that is spread over all classes.
        augment: augmentation: jitter (rotation and shift: for digits), flip-crop (for natural images) or none.
        norm: normalisation: group, or batch; the small CNN has no batch.
        width: width in the network's own unit: channels of the first layer (cnn 32, resnet9 64) or widening factor (4). Default:
            the usual one.
        seed: seed of the weights, batches and augmentation.
    """

    network: NetworkName = "cnn"
    steps: int = 500
    batch_size: int = 128
    optimizer: OptimizerName = "adamw"
    lr: float = 2e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    augment: AugmentName = "jitter"
    norm: Norm = "group"
    width: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0 or self.weight_decay < 0:
            raise UserError(f"classifier needs steps, batch_size >= 1, lr > 0 and weight_decay >= 0, got {self}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"classifier.label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        with torch.device("meta"):  # refuses a width that the network cannot have; no network is made
            make_network(self.network, image_size=32, width=self.width, norm=self.norm)
