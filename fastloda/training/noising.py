"""The noising of images in diffusion models: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020)."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # table -> {(function, device, dtype): result}


def add_noise(alphas_cumprod: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Compute x_t for images x0 [n, ...], timesteps t [n] and standard normal noise of x0's shape; alphas_cumprod [T] is abar."""
    column = (-1, *[1] * (x0.dim() - 1))
    signal, sigma = (_of_table(alphas_cumprod, part, x0.device, x0.dtype) for part in (_signal, _sigma))
    return signal[t].view(column) * x0 + sigma[t].view(column) * noise


def _signal(abar: Tensor) -> Tensor:
    return abar.double().sqrt()


def _sigma(abar: Tensor) -> Tensor:
    return (1 - abar.double()).sqrt()


def _of_table(table: Tensor, make: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Compute make(table) on a device and keep it, so that no step waits for the GPU to copy a table of constants there."""
    made = _made.setdefault(table, {})
    if (make, device, dtype) not in made:
        with torch.inference_mode(False):
            made[make, device, dtype] = make(table).to(device, dtype)
    return made[make, device, dtype]


def draw_timesteps(
    cdf: Tensor, n: int, views: int = 1, generator: Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw timesteps [n * views] (int64), sample-major, view k from the k-th of `views` equally likely strata of cdf [T].

    The mean over a sample's views estimates the mean over timesteps without bias, and with less variance than independent
    draws would. Samples are independent of each other.
    """
    u = _stratified(n, views, generator, device)
    return torch.searchsorted(_of_table(cdf, Tensor.double, u.device, u.dtype), u, right=True).to(device)


def draw_levels(
    cdf: Tensor, n: int, views: int = 1, generator: Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw levels [n * views] (float64) in [0, T] as `draw_timesteps` does, but uniform within a timestep's unit interval."""
    u = _stratified(n, views, generator, device)
    cdf = _of_table(cdf, Tensor.double, u.device, u.dtype)
    step = torch.searchsorted(cdf, u, right=True)
    before = torch.cat([cdf.new_zeros(1), cdf])[step]
    return step + (u - before) / (cdf[step] - before)


def _stratified(n: int, views: int, generator: Generator | None, device: torch.device | str | None) -> Tensor:
    """Draw numbers [n * views] (float64) in [0, 1), view k's in the k-th of `views` equal parts."""
    u = draw(torch.rand, (n, views), generator, device)
    u = u.cpu() if u.device.type == "mps" else u  # which lacks float64
    return ((torch.arange(views, device=u.device) + u.double()) / views).flatten()


def draw(
    random: Callable[..., Tensor], shape: tuple, generator: Generator | None, device: torch.device | str | None
) -> Tensor:
    """Call `torch.rand` or `torch.randn` on the generator's device and move the result, so that a seed serves any device."""
    return random(shape, generator=generator, device=generator.device if generator else device).to(device)
