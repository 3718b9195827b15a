"""The process of Ho et al. (2020), whose model predicts the noise, and the samplers DDIM and DDPM."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from fastloda.errors import UserError
from fastloda.synthesis.diffusion.process import TIMESTEPS, Device, Fresh, Predict, Process, cumulated
from fastloda.training.noising import add_noise, draw_timesteps


class DDPM(Process):
    """A diffusion process of T steps: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, linear betas (Ho et al. 2020).

    timesteps: T. beta_start, beta_end: in (0, 1), the variance added by the first and the last step.
    time_distribution: [T] relative frequencies of the timesteps in training, uniform by default; the loss has no weights.

    `alphas_cumprod`, abar [T], is float64 on the CPU, and is cast where it is used.
    """

    def __init__(
        self,
        timesteps: int = TIMESTEPS,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        time_distribution: Tensor | Sequence[float] | None = None,
    ):
        if timesteps < 1:
            raise UserError(f"timesteps must be at least 1, got {timesteps}")
        if not 0 < beta_start <= beta_end < 1:
            raise UserError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        frequencies = [1.0] * timesteps if time_distribution is None else time_distribution
        if len(frequencies) != timesteps:
            raise UserError(f"time_distribution must hold {timesteps} numbers, got {len(frequencies)}")
        super().__init__(cumulated(frequencies))
        self.steps_at_most = timesteps
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def _draw_times(self, n: int, views: int, generator: Generator | None, device: Device) -> Tensor:
        """Draw timesteps [n * views] (int64), sample-major and stratified: see `training.noising.draw_timesteps`."""
        return draw_timesteps(self.level_cdf, n, views, generator, device)

    def _first_level(self, sigma: float) -> int:
        sigmas = (1 / self.alphas_cumprod - 1).sqrt()
        return min(int((sigmas < sigma).sum()), len(sigmas) - 1)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute x_t for images x0 [n, ...], timesteps t [n] and standard normal noise of x0's shape."""
        return add_noise(self.alphas_cumprod, x0, t, noise)

    def _errors(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (predict(self.add_noise(x0, t, noise), t) - noise).square()

    def check_stochasticity(self, stochasticity: float) -> None:
        check_eta(stochasticity)

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
        """Run DDIM (Song et al. 2021) on evenly spaced timesteps; stochasticity is its eta in [0, 1], where 1 gives DDPM."""
        self.check_stochasticity(stochasticity)
        schedule = list(ddim_schedule(self, steps, stochasticity))[skipped:]
        if images is not None:
            x = self.add_noise(images, torch.full((len(x),), schedule[0][0], device=x.device), x)
        return self._solve(predict, x, fresh, schedule, clip)

    def _solve(self, predict: Predict, x: Tensor, fresh: Fresh, schedule: Iterable, clip: bool) -> Iterator[Tensor]:
        for t, abar, abar_next, sigma in schedule:
            noise = predict(x, torch.full((len(x),), t, device=x.device))
            x = ddim_step(x, noise, abar, abar_next, sigma, clip)
            if sigma > 0:
                x = x + sigma * fresh()
            yield x


def ddim_schedule(process: DDPM, steps: int, eta: float) -> Iterator[tuple[int, float, float, float]]:
    """Yield (t, abar_t, abar of the next and less noisy timestep, std of the fresh noise), from T - 1 down to 0.

    The std is eq. 16 of Song et al. 2021; eta = 1 makes it the std of the posterior q(x_next | x_t, x_0).
    """
    times = torch.linspace(process.steps_at_most - 1, 0, steps, dtype=torch.float64).round().long()
    abars = [*process.alphas_cumprod[times].tolist(), 1.0]
    for t, abar, abar_next in zip(times.tolist(), abars[:-1], abars[1:], strict=True):
        yield t, abar, abar_next, eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))


def ddim_step(x: Tensor, noise: Tensor, abar: float, abar_next: float, sigma: float, clip: bool) -> Tensor:
    """Compute the mean of x at the next timestep (eq. 12 of Song et al. 2021), given the predicted noise."""
    x0 = (x - math.sqrt(1 - abar) * noise) / math.sqrt(abar)
    if clip:
        x0 = x0.clamp(-1, 1)
        noise = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    # sigma^2 <= 1 - abar_next in exact arithmetic, but rounding may break it.
    return math.sqrt(abar_next) * x0 + math.sqrt(max(0.0, 1 - abar_next - sigma**2)) * noise


def check_eta(eta: float) -> None:
    """Refuse an eta of DDIM outside [0, 1] with a UserError."""
    if not 0 <= eta <= 1:
        raise UserError(f"stochasticity, DDIM's eta, must lie in [0, 1], got {eta}")
