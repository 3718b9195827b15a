"""A private choice of the layers to adapt, by one noisy release of how the records' gradients are distributed over layers.

Each adapter gets its share of the noise, whether or not it learns anything: with a small budget, fewer adapters may learn more.
DP-SAPF found this for attention. The release is that of `training.saliency`; the choice follows from it and costs no more.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fastloda.errors import UserError
from fastloda.loda.attach import detach_loda, loda_layers
from fastloda.privacy.ranks import World
from fastloda.synthesis.runs import read_json, write_json
from fastloda.training.saliency import Saliency

from .base import Release

ALONE = World()
WHAT = "sum of the layers' shares in the gradients"


@dataclass(frozen=True)
class LayerChoice:
    """The settings of a choice of layers.

    Attributes:
        share: share of the layers to adapt, among those that the adapter's targets name; 1: all of them, and nothing is released.
        noise_multiplier: standard deviation of the released sum's noise; its sensitivity is 1. With inf the choice is random and
            costs nothing, for comparison.
    """

    share: float = 1.0
    noise_multiplier: float = 20.0

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"layers.share must be above 0 and at most 1, got {self.share}")
        if not self.noise_multiplier > 0:
            raise UserError(f"layers.noise_multiplier must be positive, got {self.noise_multiplier}")

    @property
    def releases(self) -> tuple[Release, ...]:
        """What the choice releases about the private records: one sum, or nothing."""
        is_free = self.share == 1 or math.isinf(self.noise_multiplier)
        return () if is_free else (Release(WHAT, 1.0, self.noise_multiplier, 1),)

    def keep_best(self, network: nn.Module, release: Callable[[], Saliency], seed: int) -> None:
        """Remove the adapters from layers that are not chosen, by release() if the choice needs a release, else by `seed`."""
        if self.share < 1:
            found = release() if self.releases else at_random(network, seed)
            detach_loda(network, keep=found.best(self.share))


def at_random(network: nn.Module, seed: int) -> Saliency:
    """Draw a random saliency of the adapted layers, which depends on no record."""
    names = [name for name, _ in loda_layers(network)]
    drawn = torch.rand(len(names), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Saliency(dict(zip(names, drawn.tolist())), (1.0, math.inf, 0))


def once(
    path: Path,
    release: Callable[[], Saliency],
    world: World = ALONE,
    about: Callable[[Saliency], dict] = lambda _: {},
) -> Saliency:
    """Release a saliency, saved in `path` before it is used, so that no interruption causes a second release; or load it.

    about(saliency) are further facts for the same file, which is written at once, so that the release is never without them.
    """
    if not world.from_first(path.exists):
        found = release()
        world.from_first(lambda: write_json(path, about(found) | {"saliency": asdict(found)}))
    return world.from_first(lambda: _load(path))


def _load(path: Path) -> Saliency:
    content = read_json(path)
    try:
        found = content["saliency"]
        return Saliency(found["shares"], tuple(found["release"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds no release of the layers' saliency, or is damaged: {error!r}") from error
