"""The public model that `finetune` adapts and `sample` draws from: a U-Net of `fastloda pretrain`, or a diffusers pipeline."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import UNet, UNetConfig
from fastloda.synthesis.diffusion import sample as draw_samples
from fastloda.synthesis.inputs import Takes
from fastloda.synthesis.models import class_names_of, load_unet, was_chosen_privately
from fastloda.synthesis.settings import Drawing, FineTuning
from fastloda.training.batches import Columns
from fastloda.training.trainer import Losses

MODEL, PIPELINE = "model.safetensors", "model_index.json"


class Base(Protocol):
    """A public model of images, as the stages use it.

    Attributes:
        network: the part that adapters are attached to; all of it may train.
        file: the file or folder that it was loaded from, whose digest identifies it.
        takes: the shape and the number of classes of the images that it takes.
        class_names: names of its classes, in the order of its labels; () if it has only numbers, or prompts for any classes.
        synonyms: other names of classes, each mapped to the name in class_names.
        targets: the preset of layers that are adapted by default; None: every convolution.
        chosen_privately: whether its public images were chosen by means of private ones, which costs a part of the budget.
    """

    network: torch.nn.Module
    file: Path
    takes: UNetConfig | Takes
    class_names: tuple[str, ...]
    synonyms: Mapping[str, str]
    targets: str | None
    chosen_privately: bool

    def caption(self, prompts: Sequence[str] | None) -> None:
        """Set the prompt of each class; None for a model without text.

        Raises:
            ValueError: the model needs prompts, or takes none.
        """

    def records(self, images: LabelledImages, progress: bool = True) -> Columns:
        """Make the records on which the losses are computed, each from its own image alone."""

    def losses(self, training: FineTuning, views: int) -> Losses:
        """Make the denoising loss for a trainer, one number per sample and view.

        Raises:
            ValueError: the training has a setting that the model can't follow.
        """

    def check_drawing(self, drawing: Drawing) -> None:
        """Refuse with a ValueError settings that `draw` does not support."""

    def draw(self, labels: Tensor, drawing: Drawing, *, seed: int, batch_size: int, skip: int = 0, **start) -> Tensor:
        """Draw one image per label [n]: float32 [n, C, H, W] in [-1, 1] on the CPU.

        Image i depends on the seed, skip + i and its label; `skip` images were drawn before. A model of `choose` can begin at
        its images: `start` is then `varied` and `strength` of `diffusion.sample`.
        """


class OwnUNet:
    """A U-Net of `fastloda pretrain`, in the folder that it was written to."""

    targets = None
    synonyms: Mapping[str, str] = {}

    def __init__(self, folder: Path, device: torch.device):
        self.file = folder / MODEL
        self.network: UNet = load_unet(self.file, device)
        self.takes, self.class_names = self.network.config, class_names_of(self.file)
        self.chosen_privately = was_chosen_privately(self.file)

    def caption(self, prompts: Sequence[str] | None) -> None:
        refuse_prompts(prompts, str(self.file))

    def records(self, images: LabelledImages, progress: bool = True) -> Columns:
        return images.images[:], images.labels  # images[:] is the tensor itself, or bytes converted to floats

    def losses(self, training: FineTuning, views: int) -> Losses:
        return training.losses(self.network.process.between(*training.timesteps), views)

    def check_drawing(self, drawing: Drawing) -> None:
        if drawing.steps > (most := self.network.process.steps_at_most):
            raise UserError(f"need 1 <= steps <= {most}, got {drawing.steps}")
        self.network.process.check_stochasticity(drawing.stochasticity)

    def draw(self, labels: Tensor, drawing: Drawing, **options) -> Tensor:
        return draw_samples(self.network, labels, **asdict(drawing), progress=False, **options).clamp(-1, 1)


def open_base(folder: Path, device: torch.device) -> Base:
    """Open the public model in a folder: a diffusers pipeline if there is a model_index.json, otherwise our own U-Net.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the model is damaged, or a pipeline of an unsupported kind.
    """
    if not (folder / PIPELINE).is_file():
        return OwnUNet(folder, device)
    from fastloda.synthesis.pipelines import open_pipeline  # needs diffusers, which takes seconds to import

    return open_pipeline(folder, device)


def refuse_prompts(prompts: Sequence[str] | None, model: str) -> None:
    """Refuse prompts for a model that takes labels, with a ValueError."""
    if prompts is not None:
        raise UserError(f"{model} takes the numbers of classes, not text: leave out --prompts")


def class_prompts(text: str, names: Sequence[str]) -> list[str]:
    """Make the prompt of each class.

    Args:
        text: a template with {class}, as "a photo of a {class}"; or one prompt per class, as "cat=a photo of a cat,dog=a dog".
        names: the classes' names, in the order of their labels.

    Raises:
        ValueError: a class has no prompt or two, a prompt is empty, or a name is not that of a class.
    """
    if "{class}" in text:
        return [text.replace("{class}", name) for name in names]
    pairs = [part.partition("=") for part in re.split(r",(?=[^,=]*=)", text)]
    given = [name.strip() for name, _, _ in pairs]
    prompts = {name.strip(): prompt.strip() for name, _, prompt in pairs}
    if sorted(given) != sorted(names) or not all(prompts.values()):
        raise UserError(
            f"prompts must be a template with {{class}}, or name=prompt for each of the classes {', '.join(names)} once, with "
            f"commas between them; got {text!r}"
        )
    return [prompts[name] for name in names]
