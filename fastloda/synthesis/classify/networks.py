"""The classifiers by name, and weights that are determined by a seed."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

from torch import nn

from fastloda.errors import UserError
from fastloda.randomness import seeded

from .cnn import SmallCNN
from .norms import Norm
from .resnet9 import ResNet9
from .wideresnet import WideResNet

NetworkName = Literal["cnn", "resnet9", "wrn-16-4", "wrn-40-4"]


class Network(NamedTuple):
    """A network: make(in_channels=, num_classes=, width=, image_size=, norm=) -> module, and its usual width."""

    make: Callable[..., nn.Module]
    width: int


def _small_cnn(norm: str, **config: int) -> SmallCNN:
    if norm != "group":
        raise UserError(f"the small CNN has GroupNorm only, not norm={norm!r}")
    return SmallCNN(**config)


NETWORKS: dict[NetworkName, Network] = {
    "cnn": Network(_small_cnn, 32),
    "resnet9": Network(ResNet9, 64),
    "wrn-16-4": Network(partial(WideResNet, depth=16), 4),
    "wrn-40-4": Network(partial(WideResNet, depth=40), 4),
}


def make_network(
    name: NetworkName,
    *,
    in_channels: int = 1,
    num_classes: int = 10,
    image_size: int = 8,
    width: int | None = None,
    norm: Norm = "group",
) -> nn.Module:
    """Make a network with weights from PyTorch's global generator.

    `width` has the network's own meaning; None is its usual one. `norm` is "group", or "batch" if no privacy is needed.

    Raises:
        ValueError: the name is unknown, or the network does not support an argument's value.
    """
    if name not in NETWORKS:
        raise UserError(f"the classifier must be one of {', '.join(get_args(NetworkName))}, got {name!r}")
    make, usual = NETWORKS[name]
    config = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    return make(**config, width=usual if width is None else width, norm=norm)


def seeded_network(name: NetworkName, seed: int, **config) -> nn.Module:
    """Make a network on the CPU as `make_network` does, with weights determined by `seed`; global generators are restored."""
    with seeded(seed):
        return make_network(name, **config)
