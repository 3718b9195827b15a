"""Samplers from noise to images; each image is fixed by its own seed, in whatever batch it is computed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastloda.errors import UserError
from fastloda.synthesis.diffusion.schedule import Diffusion
from fastloda.training.average import in_eval_mode


def sample(
    model: nn.Module,
    diffusion: Diffusion,
    labels: Tensor,
    *,
    method: str = "ddim",
    steps: int = 50,
    guidance: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    skip: int = 0,
    batch_size: int = 256,
    eta: float = 0.0,
    progress: bool = True,
    clip_denoised: bool = True,
) -> Tensor:
    """Sample one image per label: float32 [n, C, H, W] on the CPU, in [-1, 1] if `clip_denoised`.

    labels: [n] integers in 0 .. model.null_class; the null class gives unconditional images.
    method: "ddim" (Song et al. 2021), `eta` in [0, 1] being the share of fresh noise; or "ddpm" (Ho et al.
        2020, with the posterior's variance), which is eta = 1.
    steps: number of the T timesteps that are visited, evenly spaced, with the last and the first.
    guidance: weight w of classifier-free guidance, see `guided_noise`; w = 0 saves the unconditional pass.
    generator or seed: image i depends on the seed, i and its label, not on `batch_size` or the device of the
        model. Without either, PyTorch's global generator is used.
    skip: number of images before these that the same seed has made: their numbers i go on from there.
    clip_denoised: whether to clip each step's estimate of x_0 to [-1, 1].

    `model(x, t, y)` predicts the noise; `model` has `image_shape` and `null_class`, as `UNet`. It runs in
    eval mode and returns to the mode it was in. Raises ValueError for arguments that do not fit.
    """
    if method not in ("ddim", "ddpm"):
        raise UserError(f'method must be "ddim" or "ddpm", got {method!r}')
    if not 0 <= eta <= 1 or (method == "ddpm" and eta not in (0, 1)):
        raise UserError(f"eta must lie in [0, 1], and is 1 for ddpm, got eta={eta} for {method}")
    if not 1 <= steps <= diffusion.timesteps:
        raise UserError(f"steps must lie in 1..{diffusion.timesteps}, got {steps}")
    if batch_size < 1 or not math.isfinite(guidance) or guidance < 0:
        raise UserError(f"need batch_size >= 1 and guidance >= 0, got {batch_size} and {guidance}")
    if generator is not None and seed is not None:
        raise UserError(f"give a generator or a seed, not both (seed={seed})")
    if labels.dim() != 1 or labels.is_floating_point() or ((labels < 0) | (labels > model.null_class)).any():
        raise UserError(f"labels must be [n] integers in 0..{model.null_class}, got {labels}")

    schedule = list(_schedule(diffusion, steps, eta=1.0 if method == "ddpm" else eta))
    generator = torch.Generator().manual_seed(seed) if seed is not None else generator
    seeds = image_seeds(skip + len(labels), generator)[skip:]
    batches = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
    device = next(model.parameters()).device
    images = torch.empty(len(labels), *model.image_shape)  # a normal tensor: the caller may train on it

    bar = tqdm(total=len(batches) * steps, desc="sampling", unit="step", disable=not progress)
    with bar, torch.inference_mode(), in_eval_mode(model):
        for rows in batches:
            y = labels[rows].to(device)
            sources = [torch.Generator().manual_seed(s) for s in seeds[rows]]
            x = _noise(sources, model.image_shape).to(device)
            for t, abar, abar_next, sigma in schedule:
                noise = guided_noise(model, x, torch.full_like(y, t), y, guidance)
                x = _step(x, noise, abar, abar_next, sigma, clip_denoised)
                if sigma > 0:
                    x += sigma * _noise(sources, model.image_shape).to(device)
                bar.update()
            images[rows] = x
    return images


def guided_noise(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, guidance: float) -> Tensor:
    """Compute (1 + w) eps(x, t, y) - w eps(x, t, null), w = guidance (Ho & Salimans 2022); float32, shaped as x."""
    x = x.to(next(model.parameters()).dtype)
    conditional = model(x, t, y).float()
    if guidance == 0:
        return conditional
    unconditional = model(x, t, torch.full_like(y, model.null_class)).float()
    return (1 + guidance) * conditional - guidance * unconditional


def class_balanced_labels(n: int, num_classes: int) -> Tensor:
    """Make labels [n] (int64) 0, 1, .., num_classes - 1, 0, 1, ..: class counts differ by at most one."""
    return torch.arange(n) % num_classes


def _schedule(diffusion: Diffusion, steps: int, eta: float) -> Iterator[tuple[int, float, float, float]]:
    """Yield (t, abar_t, abar of the next and less noisy timestep, std of the fresh noise), from T - 1 down to 0.

    The std is eq. 16 of Song et al. 2021; eta = 1 makes it the std of the posterior q(x_next | x_t, x_0).
    """
    times = torch.linspace(diffusion.timesteps - 1, 0, steps, dtype=torch.float64).round().long()
    abars = [*diffusion.alphas_cumprod[times].tolist(), 1.0]
    for t, abar, abar_next in zip(times.tolist(), abars[:-1], abars[1:], strict=True):
        yield t, abar, abar_next, eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))


def _step(x: Tensor, noise: Tensor, abar: float, abar_next: float, sigma: float, clip: bool) -> Tensor:
    """Compute the mean of x at the next timestep (eq. 12 of Song et al. 2021), given the predicted noise."""
    x0 = (x - math.sqrt(1 - abar) * noise) / math.sqrt(abar)
    if clip:
        x0 = x0.clamp(-1, 1)
        noise = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    # sigma^2 <= 1 - abar_next holds exactly, but rounding may break it.
    return math.sqrt(abar_next) * x0 + math.sqrt(max(0.0, 1 - abar_next - sigma**2)) * noise


def image_seeds(n: int, generator: torch.Generator | None) -> list[int]:
    """Draw one seed per image, so that an image's noise is the same in every batch."""
    device = generator.device if generator else "cpu"
    return torch.randint(2**63 - 1, (n,), generator=generator, device=device).tolist()


def _noise(sources: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=source) for source in sources])
