"""The process of Karras et al. (2022, "EDM"): noise of standard deviation sigma is added, and a preconditioned model denoises."""

import math
from collections.abc import Iterator
from statistics import NormalDist

import torch
from torch import Generator, Tensor

from fastloda.errors import UserError
from fastloda.synthesis.diffusion.process import TIMESTEPS, Device, Fresh, Predict, Process, cumulated, per_image
from fastloda.training.noising import draw_levels

SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1], as in all of EDM's models
P_MEAN, P_STD = -1.2, 1.2  # mean and standard deviation of ln(sigma) in training
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # range of sigma in sampling
RHO = 7.0  # the larger, the denser the sampler's levels near the image
CHURN_MOST = math.sqrt(2) - 1


class EDM(Process):
    """The process x = x_0 + sigma noise, whose denoiser is D(x) = c_skip x + c_out F(c_in x, t, y) (table 1, Karras et al. 2022).

    F is the model. ln(sigma), from SIGMA_MIN to SIGMA_MAX, is passed to F as a time t from 0 to 1,000, the range for which its
    time embedding is made. The error of D is weighted by 1 / c_out^2, so that all levels count equally at first.
    """

    def __init__(self):
        super().__init__(cumulated([1.0] * TIMESTEPS))

    def _draw_times(self, n: int, views: int, generator: Generator | None, device: Device) -> Tensor:
        """Draw sigmas [n * views] (float32), ln(sigma) ~ N(P_MEAN, P_STD^2), stratified over a sample's views."""
        quantile = draw_levels(self.level_cdf, n, views, generator, device) / TIMESTEPS
        smallest = torch.finfo(torch.float64).eps
        sigma = (P_MEAN + P_STD * torch.special.ndtri(quantile.clamp(smallest, 1 - smallest))).exp()
        return sigma.float().to(device)

    def _first_level(self, sigma: float) -> int:
        quantile = NormalDist(P_MEAN, P_STD).cdf(math.log(sigma))
        return min(math.ceil(TIMESTEPS * quantile), TIMESTEPS - 1)

    def _errors(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x = x0 + per_image(t, x0) * noise
        c_skip, c_out, _ = (per_image(c, x0) for c in coefficients(t))
        return (_output(predict, x, t) - (x0 - c_skip * x) / c_out).square()

    def check_stochasticity(self, stochasticity: float) -> None:
        if not 0 <= stochasticity < math.inf:
            raise UserError(f"stochasticity, EDM's S_churn, must be finite and not negative, got {stochasticity}")

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
        """Run Heun's method (algorithm 2 of Karras et al. 2022); stochasticity is S_churn, the same at all levels."""
        self.check_stochasticity(stochasticity)
        sigmas = noise_levels(steps)[skipped:]
        x = x * sigmas[0] if images is None else images + x * sigmas[0]
        return self._solve(predict, x, fresh, sigmas, min(stochasticity / steps, CHURN_MOST), clip)

    def _solve(
        self, predict: Predict, x: Tensor, fresh: Fresh, sigmas: list[float], churn: float, clip: bool
    ) -> Iterator[Tensor]:
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            if churn:
                x = x + math.sqrt((sigma + churn * sigma) ** 2 - sigma**2) * fresh()
                sigma += churn * sigma
            slope = (x - _denoised(predict, x, sigma, clip)) / sigma
            ahead = x + (following - sigma) * slope
            if following:
                slope = (slope + (ahead - _denoised(predict, ahead, following, clip)) / following) / 2
                ahead = x + (following - sigma) * slope
            x = ahead
            yield x


def coefficients(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute c_skip, c_out and c_in at the levels sigma, each shaped as sigma."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), 1 / total.sqrt()


def noise_levels(steps: int) -> list[float]:
    """Compute the sampler's levels, SIGMA_MAX to SIGMA_MIN and then 0: steps + 1 numbers (eq. 5 of Karras et al. 2022)."""
    place = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [*((ends[0] + place * (ends[1] - ends[0])) ** RHO).tolist(), 0.0]


def _output(predict: Predict, x: Tensor, sigma: Tensor) -> Tensor:
    """Compute F at noisy images x [n, C, H, W] of levels sigma [n]."""
    time = TIMESTEPS * (sigma / SIGMA_MIN).log() / math.log(SIGMA_MAX / SIGMA_MIN)
    return predict(per_image(coefficients(sigma)[2], x) * x, time)


def _denoised(predict: Predict, x: Tensor, sigma: float, clip: bool) -> Tensor:
    """Compute D at noisy images x [n, C, H, W] of one level; `clip` clips to [-1, 1], where means of images must be."""
    levels = torch.full((len(x),), sigma, device=x.device)
    c_skip, c_out, _ = (per_image(c, x) for c in coefficients(levels))
    denoised = c_skip * x + c_out * _output(predict, x, levels)
    return denoised.clamp(-1, 1) if clip else denoised
