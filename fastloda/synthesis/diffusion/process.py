"""What diffusion processes have in common: the choice of noise levels, and the loss per sample of a model that removes noise."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Generator, Tensor, nn

from fastloda.errors import UserError
from fastloda.training.noising import draw

TIMESTEPS = 1000

Device = torch.device | str | None
Predict = Callable[[Tensor, Tensor], Tensor]  # (x [n, C, H, W], t [n]) -> the model's output, shaped as x
Fresh = Callable[[], Tensor]  # () -> standard normal noise [n, C, H, W], other noise at each call


class Process(ABC):
    """A process that turns images into noise at one of many levels, and its reversal by a model's predictions.

    Levels are ordered from the least to the most noise. They are counted in thousandths of the distribution that training draws
    by default: level k of `between` and `mixture` is the k-th of 1,000 equally likely ranges.
    """

    steps_at_most = TIMESTEPS

    def __init__(self, level_cdf: Tensor):
        self.level_cdf = level_cdf

    def between(self, first: int, end: int) -> Self:
        """Copy the process, to be trained only on the levels first .. end - 1."""
        return self.mixture([(first, end, 1.0)])

    def noisier_than(self, sigma: float) -> Self:
        """Copy the process, to be trained only where the noise has a standard deviation >= sigma, in units of the images."""
        return self.between(self._first_level(sigma), TIMESTEPS)

    @abstractmethod
    def _first_level(self, sigma: float) -> int:
        """Find the first of the 1,000 levels with that much noise; the last one, if none has."""

    def mixture(self, parts: Sequence[tuple[int, int, float]]) -> Self:
        """Copy the process, to be trained on a mixture of uniform distributions of levels, each (first, end, share).

        The source is Ghalebikesabi et al. 2023, section 3.2.

        Raises:
            UserError: a range is none, or the process has other levels than 1,000 equally likely ones.
        """
        if len(self.level_cdf) != TIMESTEPS or not torch.allclose(self.level_cdf, cumulated([1.0] * TIMESTEPS)):
            raise UserError(f"only a process of {TIMESTEPS} equally likely levels can be trained on some of them")
        weights = torch.zeros(TIMESTEPS, dtype=torch.float64)
        for first, end, share in parts:
            if not 0 <= first < end <= TIMESTEPS:
                raise UserError(f"a range of timesteps needs 0 <= first < end <= {TIMESTEPS}, got {first} and {end}")
            weights[first:end] += share / (end - first)
        made = copy.copy(self)
        made.level_cdf = cumulated(weights)
        return made

    def losses(
        self,
        model: nn.Module,
        x0: Tensor,
        y: Tensor,
        *,
        views: int = 1,
        label_dropout: float = 0.1,
        flips: bool = False,
        generator: Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted mean squared error of the model's output, one number per sample and view: [n * views].

        Rows i * views .. (i + 1) * views - 1 belong to sample i, as in `ghost_dp_step(..., views=views)`; each view has its own
        level, noise, label drop and flip.

        x0: [n, C, H, W] in [-1, 1]. y: [n] integer labels.
        label_dropout: probability that a view's label becomes `model.null_class`, which teaches the model the
            unconditional output that guidance needs (Ho & Salimans 2022).
        flips: whether to mirror each view left to right with probability 1/2 (augmentation multiplicity, De et al. 2022).
        generator: the only source of randomness; PyTorch's global one if None.
        t, noise: times [n * views], as `draw_times` makes them, and noise [n * views, C, H, W] to use instead of drawn ones.
        Raises ValueError if shapes or ranges do not fit.
        """
        n = x0.shape[0]
        if views < 1 or not 0 <= label_dropout <= 1:
            raise UserError(f"need views >= 1 and label_dropout in [0, 1], got {views} and {label_dropout}")
        if y.shape != (n,):
            raise UserError(f"expected one label per image, got x0 {tuple(x0.shape)} and y {tuple(y.shape)}")
        x0, y = x0.repeat_interleave(views, dim=0), y.repeat_interleave(views)
        if t is None:
            t = self.draw_times(n, views=views, generator=generator, device=x0.device)
        if noise is None:
            noise = draw(torch.randn, x0.shape, generator, x0.device).to(x0.dtype)
        if t.shape != y.shape or noise.shape != x0.shape:
            raise UserError(
                f"expected t {tuple(y.shape)} and noise {tuple(x0.shape)}, "
                f"got {tuple(t.shape)} and {tuple(noise.shape)}"
            )
        y = drop_labels(y, model.null_class, label_dropout, generator)
        if flips:
            x0 = mirror_some(x0, generator)
        return self._errors(lambda x, time: model(x, time, y), x0, t, noise).flatten(1).mean(1)

    def draw_times(
        self,
        n: int,
        *,
        views: int = 1,
        generator: Generator | None = None,
        device: Device = None,
    ) -> Tensor:
        """Draw the times t [n * views] of noise levels, sample-major and stratified over a sample's views."""
        return self._draw_times(n, views, generator, device)

    @abstractmethod
    def _draw_times(self, n: int, views: int, generator: Generator | None, device: Device) -> Tensor:
        """Draw the times for `draw_times`."""

    @abstractmethod
    def _errors(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute the squared errors, shaped as x0, of the model's predictions for x0 under `noise` at times t."""

    @abstractmethod
    def check_stochasticity(self, stochasticity: float) -> None:
        """Refuse an amount of fresh noise that `solve` can't add in each step.

        Raises:
            UserError: it is out of range.
        """

    @abstractmethod
    def solve(
        self,
        predict: Predict,
        x: Tensor,
        fresh: Fresh,
        steps: int,
        stochasticity: float,
        clip: bool,
        images: Tensor | None = None,
        skipped: int = 0,
    ) -> Iterator[Tensor]:
        """Reverse the process from standard normal noise x [n, C, H, W]: yield x after each step; the last x is the image.

        With `images`, shaped as x, it begins at the images with this noise added, at the level that `skipped` steps lead to.

        Raises:
            UserError: stochasticity is out of range; it is raised by the call, before the first step.
        """


def cumulated(frequencies: Tensor | Sequence[float]) -> Tensor:
    """Compute the distribution function, float64, of relative frequencies.

    Raises:
        UserError: the frequencies are not finite numbers >= 0, or all are 0.
    """
    p = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
    if p.dim() != 1 or not p.numel() or not p.isfinite().all() or p.min() < 0 or p.max() == 0:
        raise UserError(f"frequencies must be finite numbers, none negative, not all 0, got {frequencies}")
    cdf = p.cumsum(0)
    return cdf / cdf[-1]


def drop_labels(y: Tensor, null: int, share: float, generator: Generator | None) -> Tensor:
    """Replace each label in y [n] by `null` with probability `share`; nothing is drawn if `share` is 0."""
    if share == 0:
        return y
    return torch.where(draw(torch.rand, y.shape, generator, y.device) < share, null, y)


def mirror_some(x0: Tensor, generator: Generator | None) -> Tensor:
    """Mirror each image in x0 [n, C, H, W] left to right with probability 1/2."""
    mirrored = draw(torch.rand, x0.shape[:1], generator, x0.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values [n] so that they multiply the images `like` [n, C, H, W], in the images' dtype."""
    return values.to(like).view(-1, *[1] * (like.dim() - 1))
