"""From per-sample norms to clip factors, the lines that bound what one sample can do, and the clipped sum.

A style of clipping parts the parameters into groups, gives each group a share of the bound C, and wants a factor:

    Flat        one group                 c = min(1, C / |g|)          Abadi et al. 2016, https://arxiv.org/abs/1607.00133
    Automatic   one group                 c = C / (|g| + gamma)        Bu et al. 2023, https://arxiv.org/abs/2206.07136
    PerLayer    a group for each layer    c_l = min(1, C_l / |g_l|)    McMahan et al. 2018, https://arxiv.org/abs/1710.06963

What a style wants is a wish; `clip_factors` grants no more of it than the promise allows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.per_sample.gradient import PerSampleGrad, squared_norms, weighted_sums

BOUNDS_AGREE = 1e-6  # relative; far below the 1e-5 of the promise

Groups = Mapping[str, tuple[str, ...]]  # group -> the names of its parameters


@dataclass(frozen=True)
class Flat:
    """All parameters together: the whole gradient is shortened to max_grad_norm, if it is longer."""

    name: ClassVar[str] = "flat"

    def groups(self, names: Mapping[str, object]) -> Groups:
        return {"": tuple(names)}

    def shares(self, groups: Groups, max_grad_norm: float) -> list[float]:
        """Each group's bound over max_grad_norm, in order; their squares sum to 1.

        Raises:
            ValueError: the style's own bounds do not fit the model or max_grad_norm.
        """
        return [1.0]

    def wanted(self, norms: Tensor, bounds: Tensor) -> Tensor:
        """Factors [groups, samples] for norms [groups, samples] and bounds [groups, 1]."""
        return torch.ones_like(norms)

    def gradient_noise(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """The gradient's noise over max_grad_norm, of a step that costs what `noise_multiplier` says."""
        return noise_multiplier

    def statement(self, noise_multiplier: float, expected_batch_size: float) -> dict:
        """JSON values for the privacy statement."""
        return {"clipping": self.name}


@dataclass(frozen=True)
class Automatic(Flat):
    """Every gradient is scaled to a length just below max_grad_norm, long or short: C / (|g| + gamma).

    No norm has to be guessed: a larger max_grad_norm does nothing that a larger learning rate would not do (for Adam,
    nothing at all). gamma > 0 keeps a share of the difference between short gradients, which plain normalisation loses.
    """

    name: ClassVar[str] = "automatic"
    gamma: float = 0.01

    def __post_init__(self):
        check_positive("gamma", self.gamma)

    def wanted(self, norms: Tensor, bounds: Tensor) -> Tensor:
        return bounds / (norms + self.gamma)

    def statement(self, noise_multiplier: float, expected_batch_size: float) -> dict:
        return {"clipping": self.name, "gamma": self.gamma}


@dataclass(frozen=True)
class PerLayer(Flat):
    """Each layer is clipped by its own norm. A layer is a module with trainable parameters of its own.

    Attributes:
        bounds: module name -> bound, for every layer; the root of their sum of squares must be max_grad_norm.
            Default: max_grad_norm / sqrt(layers) for each. Public: not to be read off private gradients.
    """

    name: ClassVar[str] = "per_layer"
    bounds: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.bounds is not None:
            checked = {layer: check_positive(f"bounds[{layer!r}]", bound) for layer, bound in self.bounds.items()}
            object.__setattr__(self, "bounds", checked)  # a plain dict of our own, as checkpoints hold it

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

    def statement(self, noise_multiplier: float, expected_batch_size: float) -> dict:
        given = self.bounds
        return {"clipping": self.name, "bounds": "equal" if given is None else dict(given)}


@dataclass(frozen=True)
class PerParameter(PerLayer):
    """Each parameter is clipped by its own norm; `bounds` has the parameters' names."""

    name: ClassVar[str] = "per_parameter"

    def groups(self, names: Mapping[str, object]) -> Groups:
        return {name: (name,) for name in names}


def group_norms(grads: Mapping[str, PerSampleGrad], groups: Groups, samples: int, device: torch.device) -> Tensor:
    """|g_n| over the parameters of each group: [groups, samples], float64."""
    return torch.stack([squared_norms([grads[n] for n in names], samples, device) for names in groups.values()]).sqrt()


def clip_factors(norms: Tensor, bounds: Tensor, mask: Tensor, style: Flat) -> Tensor:
    """The factors c [groups, samples], float64, that keep the promise, whatever the style:

    - c_gn |g_gn| <= bounds[g] for norms [groups, samples] and bounds [groups, 1], whose squares sum to max_grad_norm^2;
      so a sample contributes at most max_grad_norm (1 + 1e-5) in all: the 1e-5 are for float32, in which the sum is taken;
    - 0 in every group for a sample that is masked, or whose gradient is not finite in any of them;
    - 0 where float32 could only hold the factor rounded, perhaps upwards, or not at all.
    """
    factors = style.wanted(norms, bounds).minimum(norms.reciprocal() * bounds)  # |g| = 0 allows any factor
    float32 = torch.finfo(torch.float32)
    usable = norms.isfinite().all(0) & mask & (factors >= float32.tiny) & (factors <= float32.max)
    return torch.where(usable, factors, 0.0)


def group_sums(grads: Mapping[str, PerSampleGrad], groups: Groups, factors: Tensor) -> dict[str, Tensor | None]:
    """The clipped sum of each parameter's gradients (None: unused), by its group's factors [groups, samples]."""
    sums = {}
    for names, of_group in zip(groups.values(), factors):
        sums |= weighted_sums({name: grads[name] for name in names}, of_group)
    return sums


def check_max_grad_norm(value: float) -> float:
    return check_positive("max_grad_norm", value)


def check_positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
        raise UserError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)
