"""A contact sheet of a model, beside its weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastloda.files import write_atomically
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import UNet, class_balanced_labels
from fastloda.synthesis.diffusion import sample as draw_samples
from fastloda.synthesis.samples import contact_sheet

PREVIEW = "samples.png"
PREVIEW_COLUMNS = 10  # number of images of each class


def draw_preview(
    model: UNet, known: Sequence[str], names: Sequence[str], folder: Path, seed: int, progress: bool
) -> None:
    """Draw a contact sheet of a model with the classes `known`: some images of each of the classes `names`."""
    labels = class_balanced_labels(PREVIEW_COLUMNS * len(names), len(names))
    number = torch.tensor([known.index(name) for name in names])
    drawn = draw_samples(model, number[labels], seed=seed, progress=progress).clamp(-1, 1)
    write_atomically(folder / PREVIEW, contact_sheet(LabelledImages(drawn, labels, len(names), tuple(names))))
