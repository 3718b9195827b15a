"""The diffusion process, which turns an image to noise, and its loss per sample for predicting that noise."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.training.noising import add_noise, draw, draw_timesteps

TIMESTEPS = 1000


class Diffusion:
    """A diffusion process of T steps: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, linear betas (Ho et al. 2020).

    timesteps: T. beta_start, beta_end: in (0, 1), the variance added by the first and the last step.
    time_distribution: [T] relative frequencies of the timesteps in training, uniform by default. Ranges of t
        may be favoured (Ghalebikesabi et al. 2023); the loss is not reweighted.

    `alphas_cumprod`, abar [T], is float64 on the CPU; it is cast where it is used.
    """

    def __init__(
        self,
        timesteps: int = TIMESTEPS,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        time_distribution: Tensor | None = None,
    ):
        if timesteps < 1:
            raise UserError(f"timesteps must be at least 1, got {timesteps}")
        if not 0 < beta_start <= beta_end < 1:
            raise UserError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        self.timesteps = timesteps
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._time_cdf = self._cumulate([1.0] * timesteps if time_distribution is None else time_distribution)

    @classmethod
    def between(cls, first: int, end: int) -> "Diffusion":
        """Make the usual process, trained only on the timesteps first .. end - 1."""
        within = torch.zeros(TIMESTEPS)
        within[first:end] = 1
        return cls(time_distribution=within)

    @classmethod
    def mixture(cls, parts: Sequence[tuple[int, int, float]]) -> "Diffusion":
        """Make the usual process, trained on a mixture of uniform distributions of timesteps, (first, end, share) each.

        The source is Ghalebikesabi et al. 2023, section 3.2.
        """
        weights = torch.zeros(TIMESTEPS, dtype=torch.float64)
        for first, end, share in parts:
            if not 0 <= first < end <= TIMESTEPS:
                raise UserError(f"a range of timesteps needs 0 <= first < end <= {TIMESTEPS}, got {first} and {end}")
            weights[first:end] += share / (end - first)
        return cls(time_distribution=weights)

    def _cumulate(self, frequencies: Tensor | list[float]) -> Tensor:
        p = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
        if p.shape != (self.timesteps,) or not p.isfinite().all() or p.min() < 0 or p.max() == 0:
            raise UserError(
                f"time_distribution must hold {self.timesteps} finite numbers, none negative, "
                f"not all 0, got {frequencies}"
            )
        cdf = p.cumsum(0)
        return cdf / cdf[-1]

    def draw_timesteps(
        self,
        n: int,
        *,
        views: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw timesteps [n * views] (int64), as often as `time_distribution` says: see `training.noising.draw_timesteps`."""
        return draw_timesteps(self._time_cdf, n, views, generator, device)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute x_t for images x0 [n, ...], timesteps t [n] and standard normal noise of x0's shape."""
        return add_noise(self.alphas_cumprod, x0, t, noise)

    def losses(
        self,
        model: nn.Module,
        x0: Tensor,
        y: Tensor,
        *,
        views: int = 1,
        label_dropout: float = 0.1,
        flips: bool = False,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean squared error of the predicted noise, one number per sample and view: [n * views].

        Rows i * views .. (i + 1) * views - 1 belong to sample i, as `ghost_dp_step(..., views=views)` takes
        them; each view has its own timestep, noise, label drop and flip.

        x0: [n, C, H, W] in [-1, 1]. y: [n] integer labels.
        label_dropout: probability that a view's label becomes `model.null_class`, which teaches the model the
            unconditional noise that guidance needs (Ho & Salimans 2022).
        flips: whether to mirror each view left to right with probability 1/2 (augmentation multiplicity, De et al. 2022).
        generator: the only source of randomness; PyTorch's global one if None. t [n * views], noise [n * views, C, H, W]:
        used instead of drawn ones. Raises ValueError where shapes or ranges do not fit.
        """
        n = x0.shape[0]
        if views < 1 or not 0 <= label_dropout <= 1:
            raise UserError(f"need views >= 1 and label_dropout in [0, 1], got {views} and {label_dropout}")
        if y.shape != (n,):
            raise UserError(f"expected one label per image, got x0 {tuple(x0.shape)} and y {tuple(y.shape)}")
        x0, y = x0.repeat_interleave(views, dim=0), y.repeat_interleave(views)
        if t is None:
            t = self.draw_timesteps(n, views=views, generator=generator, device=x0.device)
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
        predicted = model(self.add_noise(x0, t, noise), t, y)
        return (predicted - noise).square().flatten(1).mean(1)


def drop_labels(y: Tensor, null: int, share: float, generator: torch.Generator | None) -> Tensor:
    """Replace each label in y [n] by `null` with probability `share`; without a draw if that is 0."""
    if share == 0:
        return y
    return torch.where(draw(torch.rand, y.shape, generator, y.device) < share, null, y)


def mirror_some(x0: Tensor, generator: torch.Generator | None) -> Tensor:
    """Mirror each image in x0 [n, C, H, W] left to right with probability 1/2."""
    mirrored = draw(torch.rand, x0.shape[:1], generator, x0.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
