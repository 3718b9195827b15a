"""Gaussian noise for privacy, drawn in float64 from a generator that nobody can foresee.

On a CPU float32 `torch.randn` never exceeds 5.77 sigma, which alone can cost a delta of 1.6e-4; float64 reaches beyond 8 sigma,
and a `NoiseStream` beyond 12.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from fastloda.errors import PrivacyError, UserError
from fastloda.privacy.noise_stream import NoiseStream
from fastloda.randomness import Secret, hold


class NormalNumbers(Protocol):
    """The protocol of a user's own source of noise; `SecureGenerator` is one."""

    def normal(self, shape: torch.Size) -> Tensor:
        """Draw independent N(0, 1) numbers of this shape, float64, on any device."""
        ...


NoiseSource = Generator | NormalNumbers
# A function from the sums that are about to be released to the source of their noise.
NoiseOver = Callable[[Sequence[Tensor]], NoiseSource]

FORESEEABLE = "fixed seed: an experiment; whoever knows the seed can foresee the noise, so it is no private release"
UNRECORDED = "not on record for every release: take the noise for foreseeable"
UNFORESEEABLE = "seeded by the operating system"
SECURE = "noise from the operating system's cryptographically secure generator; sampling seeded by the operating system"

AT_A_TIME = 1 << 22  # the most numbers drawn at a time: 32 MiB

_begun: set[bytes] = set()  # the first numbers of each draw from users' own sources
_own: dict[torch.device, NoiseSource] = {}  # this process's sources; in a forked child they draw other numbers


def describe_randomness(seed: int | None, secure: bool) -> str:
    """Describe where a run's noise came from, for its checkpoint and its privacy statement."""
    if seed is not None:
        return FORESEEABLE
    return SECURE if secure else UNFORESEEABLE


def describe_together(each: Iterable[str]) -> str:
    """Describe where the noise of several releases came from; if some is foreseeable or not on record, only say that."""
    texts = dict.fromkeys(each)
    worst = [text for text in (FORESEEABLE, UNRECORDED) if text in texts]
    return "; ".join(worst or texts)


def noise_of(secret: Secret, device: torch.device) -> NoiseSource:
    """Make the source of noise that is derived from a secret, for sums on a device."""
    return NoiseStream(secret) if device.type == "cpu" else secret.generator("noise", device)


def own_noise(device: torch.device) -> NoiseSource:
    """Return this process's source of noise for a device: it is unpredictable, and `torch.manual_seed` does not set it."""
    if device not in _own:
        _own[device] = noise_of(Secret(), device)
    return _own[device]


def draws_alike(device: torch.device) -> str:
    """Describe what two devices must share to draw the same numbers; a GPU's depend on how many threads draw in parallel."""
    if device.type == "cpu":
        return f"cpu, NumPy {np.__version__}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, PyTorch {torch.__version__}"


def gaussian(shape: torch.Size, std: float, device: torch.device, source: NoiseSource | None = None) -> Tensor:
    """Draw N(0, std^2) noise, float64, on `device`; a source on the CPU draws there, and the noise is then moved."""
    source = own_noise(device) if source is None else hold(source)
    if isinstance(source, Generator):
        noise = torch.randn(shape, generator=source, dtype=torch.float64, device=source.device)
    elif isinstance(source, NoiseStream):
        noise = source.normal(shape)
    else:
        noise = _checked(source.normal(shape), shape, f"{type(source).__name__}.normal")
    return noise.mul_(std).to(device)


def _checked(noise: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Copy the noise drawn by a user's own source called `name`; warn if it does not look like N(0, 1) or was drawn before.

    Raises:
        UserError: noise is no float64 tensor of this shape.
        PrivacyError: noise is not finite.
    """
    if not isinstance(noise, Tensor) or noise.shape != shape or noise.dtype != torch.float64:
        got = (
            f"{noise.dtype} of shape {tuple(noise.shape)}" if isinstance(noise, Tensor) else f"a {type(noise).__name__}"
        )
        raise UserError(f"{name} must give float64 numbers of shape {tuple(shape)}, in a tensor, got {got}")
    noise = noise.detach().clone(memory_format=torch.contiguous_format)
    squares = float(noise.square().sum())
    if not math.isfinite(squares):
        raise PrivacyError(f"{name} must give finite numbers: the gradient would be none")
    # The squares of n normal numbers sum to n, within 12 standard deviations; for few numbers the limits are looser.
    numbers = noise.numel()
    if numbers and (abs(squares - numbers) > 12 * math.sqrt(2 * numbers) + 72 or squares < 1e-24 * numbers):
        warnings.warn(
            f"{name} gave {numbers} numbers whose squares have mean {squares / numbers:.3g}, not 1: epsilon is for independent "
            "numbers of mean 0 and standard deviation 1",
            stacklevel=2,
        )
    begin = noise.view(-1)[:4].cpu().numpy().tobytes()
    if begin in _begun:
        warnings.warn(
            f"{name} gave noise that it, or another, had given before: two sums under the same noise show their difference",
            stacklevel=2,
        )
    elif numbers:
        _begun.add(begin)
    return noise


def add_noise(total: Tensor, std: float, source: NoiseSource | None = None) -> Tensor:
    """Compute total + N(0, std^2) for a float64 sum [numbers], part by part; total itself does not change."""
    if not std:
        return total
    noisy = torch.empty_like(total)
    for into, part in zip(noisy.split(AT_A_TIME), total.split(AT_A_TIME)):
        torch.add(part, gaussian(part.shape, std, part.device, source), out=into)
    return noisy
