"""The sampler from noise to images; each image is determined by its own seed, whatever batch it is computed in."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.progress import Progress
from fastloda.training.average import in_eval_mode


def sample(
    model: nn.Module,
    labels: Tensor,
    *,
    steps: int = 50,
    guidance: float = 0.0,
    stochasticity: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    skip: int = 0,
    batch_size: int = 256,
    progress: bool = True,
    clip_denoised: bool = True,
    varied: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Sample one image per label by reversing the model's process: float32 [n, C, H, W] on the CPU.

    labels: [n] integers in 0 .. model.null_class; the null class gives unconditional images.
    steps: number of noise levels that are visited.
    guidance: weight w of classifier-free guidance, see `guided`; w = 0 saves the unconditional pass.
    stochasticity: how much fresh noise each step adds. 0: none, which is DDIM or Heun's method. For a "ddpm" it is the eta of
        Song et al. 2021, at most 1, which is DDPM; for an "edm" it is the S_churn of Karras et al. 2022.
    generator or seed: image i depends on the seed, i and its label, not on `batch_size` or the model's device. Without either,
        PyTorch's global generator is used.
    skip: number of images that the same seed has made before; the numbers i continue after them.
    clip_denoised: whether to clip each step's estimate of x_0 to [-1, 1].
    varied, strength: images [n, C, H, W] to vary instead of starting from noise: noise is added to them up to the level from
        which the last `strength` of the steps, in (0, 1], lead back (Meng et al. 2022, "SDEdit").

    `model(x, t, y)` predicts; `model` has `process`, `image_shape` and `null_class`, as `UNet` has. It runs in eval mode and
    then returns to its former mode. Raises ValueError for arguments that do not fit.
    """
    if not 1 <= steps <= model.process.steps_at_most:
        raise UserError(f"steps must lie in 1..{model.process.steps_at_most}, got {steps}")
    if batch_size < 1 or not math.isfinite(guidance) or guidance < 0:
        raise UserError(f"need batch_size >= 1 and guidance >= 0, got {batch_size} and {guidance}")
    if not 0 < strength <= 1 or (varied is None and strength < 1):
        raise UserError(f"strength must lie in (0, 1], and is for images that are varied, got {strength}")
    if generator is not None and seed is not None:
        raise UserError(f"give a generator or a seed, not both (seed={seed})")
    if labels.dim() != 1 or labels.is_floating_point() or ((labels < 0) | (labels > model.null_class)).any():
        raise UserError(f"labels must be [n] integers in 0..{model.null_class}, got {labels}")

    generator = torch.Generator().manual_seed(seed) if seed is not None else generator
    seeds = image_seeds(skip + len(labels), generator)[skip:]
    batches = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
    device = next(model.parameters()).device
    images = torch.empty(len(labels), *model.image_shape)  # a normal tensor: the caller may train on it

    skipped = steps - math.ceil(strength * steps - 1e-9)  # 0.28 * 25 is a little more than 7
    bar = Progress("sampling", len(batches) * (steps - skipped), shown=progress)
    with bar, torch.inference_mode(), in_eval_mode(model):
        for rows in batches:
            predict = partial(guided, model, labels[rows].to(device), guidance)
            fresh = partial(_noise, [torch.Generator().manual_seed(s) for s in seeds[rows]], model.image_shape, device)
            start = (None if varied is None else varied[rows].to(device), skipped)
            for x in model.process.solve(predict, fresh(), fresh, steps, stochasticity, clip_denoised, *start):
                bar.update()
                images[rows] = x
    return images


def guided(model: nn.Module, y: Tensor, guidance: float, x: Tensor, t: Tensor) -> Tensor:
    """Compute (1 + w) model(x, t, y) - w model(x, t, null), w = guidance (Ho & Salimans 2022); float32, shaped as x."""
    x = x.to(next(model.parameters()).dtype)
    conditional = model(x, t, y).float()
    if guidance == 0:
        return conditional
    unconditional = model(x, t, torch.full_like(y, model.null_class)).float()
    return (1 + guidance) * conditional - guidance * unconditional


def class_balanced_labels(n: int, num_classes: int) -> Tensor:
    """Make labels [n] (int64) 0, 1, .., num_classes - 1, 0, 1, ..: class counts differ by at most one."""
    return torch.arange(n) % num_classes


def image_seeds(n: int, generator: torch.Generator | None) -> list[int]:
    """Draw one seed per image, so that an image's noise is the same in every batch."""
    device = generator.device if generator else "cpu"
    return torch.randint(2**63 - 1, (n,), generator=generator, device=device).tolist()


def _noise(sources: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)
