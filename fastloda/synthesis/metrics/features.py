"""Feature extractors: functions from images to the vectors between whose distributions distances are computed.

Scores on different features can't be compared. The usual features are Inception's, which this package does not contain: give a
file. A table's default is a classifier of public images, whose features fit the task and contain nothing of private images.
"""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastloda.errors import UserError


class Extractor(Protocol):
    """A function from images [n, C, H, W] in [-1, 1] to features, float64 [n, d]; `name` is shown next to every score."""

    name: str

    def __call__(self, images: Tensor) -> np.ndarray: ...


class _Batched:
    def __init__(self, name: str, features, batch_size: int, device: torch.device | str):
        self.name, self._features, self._batch_size, self._device = name, features, batch_size, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        parts = [self._features(part.to(self._device)).double().cpu() for part in images.split(self._batch_size)]
        return torch.cat(parts).flatten(1).numpy()


def classifier_features(
    model: nn.Module, name: str = "classifier", *, batch_size: int = 512, device: torch.device | str = "cpu"
) -> Extractor:
    """Make an extractor that returns the input of a classifier's last layer, `model.head`.

    Raises:
        ValueError: the model has no `head`.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        raise UserError(f"{type(model).__name__} has no layer `head`, whose input would be the features")
    model = model.to(device).eval()

    def features(images: Tensor) -> Tensor:
        read = []
        handle = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            model(images)
        finally:
            handle.remove()
        return read[0]

    return _Batched(name, features, batch_size, device)


def torchscript_features(
    path: str | os.PathLike, *, batch_size: int = 128, device: torch.device | str = "cpu"
) -> Extractor:
    """Load a user's Inception in TorchScript, such as StyleGAN's `inception-2015-12-05.pt`: uint8 RGB images to features.

    It is called with `return_features=True`, and scales images itself. TorchScript is a program: use only files that you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not TorchScript.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no feature extractor {path}: give a TorchScript file of an Inception network")
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error

    def features(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return network(((colour.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), return_features=True)

    return _Batched(path.name, features, batch_size, device)
