"""Styles of clipping: how the parameters are grouped, each group's share of the bound, and the factor that the style wants.

    Flat        one group                 c = min(1, C / |g|)          Abadi et al. 2016, https://arxiv.org/abs/1607.00133
    Automatic   one group                 c = C / (|g| + gamma)        Bu et al. 2023, https://arxiv.org/abs/2206.07136
    PerLayer    a group for each layer    c_l = min(1, C_l / |g_l|)    McMahan et al. 2018, https://arxiv.org/abs/1710.06963

`clip.clip_factors` lowers a factor where the bound demands it. `adaptive.AdaptiveClipping` is Flat with a bound that changes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.privacy.noise import NoiseSource
from fastloda.privacy.ranks import World

BOUNDS_AGREE = 1e-6  # relative tolerance; far below the 1e-5 by which a contribution may exceed max_grad_norm

Groups = Mapping[str, tuple[str, ...]]  # group -> the names of its parameters


class Bound:
    """The bound C on a sample's contribution, over the steps of a run. This base class keeps C constant.

    Attributes:
        value: C, public.
    """

    def __init__(self, value: float):
        self.value = value

    def observe(self, norms: Tensor, mask: Tensor) -> None:
        """Add the norms |g_n| [samples] of a micro-batch to what is observed; mask: bool [samples], false for padding."""

    def forget(self) -> None:
        """Drop what was observed since the last step."""

    def observed(self, world: World) -> Sequence[Tensor]:
        """Return what `move` would release, summed on rank 0: noise is derived from it, so that no two sums get the same."""
        return ()

    def move(
        self, noise_multiplier: float, expected_batch_size: float, world: World, generator: NoiseSource | None
    ) -> None:
        """Set C, to the same value on all ranks, by what was observed, which is released with noise."""


@dataclass(frozen=True)
class Flat:
    """The style that clips all parameters together: the whole gradient is shortened to max_grad_norm, if it is longer."""

    name: ClassVar[str] = "flat"

    def groups(self, names: Mapping[str, object]) -> Groups:
        return {"": tuple(names)}

    def shares(self, groups: Groups, max_grad_norm: float) -> list[float]:
        """Compute each group's bound over max_grad_norm, in order; their squares sum to 1.

        Raises:
            ValueError: the style's own bounds do not fit the model or max_grad_norm.
        """
        return [1.0]

    def wanted(self, norms: Tensor, bounds: Tensor) -> Tensor:
        """Compute the factors [groups, samples] that the style wants for norms [groups, samples] and bounds [groups, 1]."""
        return torch.ones_like(norms)

    def gradient_noise(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Compute the gradient's noise multiplier in a step whose total cost is that of `noise_multiplier`."""
        return noise_multiplier

    def bound_from(self, max_grad_norm: float) -> Bound:
        """Make the bound that a run of steps starts with."""
        return Bound(max_grad_norm)


@dataclass(frozen=True)
class Automatic(Flat):
    """The style that scales every gradient, long or short, to a length just below max_grad_norm: C / (|g| + gamma).

    No norm has to be guessed: a larger max_grad_norm does nothing that a larger learning rate would not do (for Adam,
    nothing at all). gamma > 0 keeps a share of the difference between short gradients, which plain normalisation loses.
    """

    name: ClassVar[str] = "automatic"
    gamma: float = 0.01

    def __post_init__(self):
        check_positive("gamma", self.gamma)

    def wanted(self, norms: Tensor, bounds: Tensor) -> Tensor:
        return bounds / (norms + self.gamma)


@dataclass(frozen=True)
class PerLayer(Flat):
    """The style that clips each layer by its own norm. A layer is a module with trainable parameters of its own.

    Attributes:
        bounds: module name -> bound, for every layer; the root of their sum of squares must be max_grad_norm.
            Default: max_grad_norm / sqrt(layers) for each. They are public: do not take them from private gradients.
    """

    name: ClassVar[str] = "per_layer"
    bounds: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.bounds is not None:
            checked = {layer: check_positive(f"bounds[{layer!r}]", bound) for layer, bound in self.bounds.items()}
            object.__setattr__(self, "bounds", checked)  # a plain dict that checkpoints can hold and users can't change

    def groups(self, names: Mapping[str, object]) -> Groups:
        layers: dict[str, tuple[str, ...]] = {}
        for name in names:
            layer = name.rpartition(".")[0]
            layers[layer] = (*layers.get(layer, ()), name)
        return layers

    def shares(self, groups: Groups, max_grad_norm: float) -> list[float]:
        given = self.bounds
        if given is None:
            return [1 / math.sqrt(len(groups))] * len(groups)
        if given.keys() != groups.keys():
            raise UserError(f"bounds must name the layers {list(groups)}, got {list(given)}")
        total = math.hypot(*given.values())
        if not math.isclose(total, max_grad_norm, rel_tol=BOUNDS_AGREE):
            raise UserError(
                f"bounds must have max_grad_norm={max_grad_norm} as the root of their sum of squares, got {total}"
            )
        return [given[layer] / total for layer in groups]


@dataclass(frozen=True)
class PerParameter(PerLayer):
    """The style that clips each parameter by its own norm; the keys of `bounds` are parameter names."""

    name: ClassVar[str] = "per_parameter"

    def groups(self, names: Mapping[str, object]) -> Groups:
        return {name: (name,) for name in names}


def check_max_grad_norm(value: float) -> float:
    return check_positive("max_grad_norm", value)


def check_positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
        raise UserError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)
