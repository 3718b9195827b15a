"""Tensor helpers: sums over each sample's rows, the dtype that gradients accumulate in, whether Triton kernels are used."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_triton(t: Tensor) -> bool:
    """Tell whether Triton kernels process t: Triton is installed, and t is on a GPU, not empty and of a KERNEL_DTYPES dtype."""
    return t.is_cuda and _has_triton() and t.dtype in KERNEL_DTYPES and t.numel() > 0


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def waits(t: Tensor) -> bool:
    """Tell whether reading a number of t may make Python wait for its device: on any device but the CPU."""
    return t.device.type != "cpu"


def accumulable(t: Tensor) -> Tensor:
    """Cast t to the dtype that gradients are accumulated in: float64 stays, all else becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def sum_rows(grad: Tensor, samples: int) -> Tensor:
    """Sum grad [N, ...] over each sample's rows: [samples, ...]."""
    return grad if grad.shape[0] == samples else grad.view(samples, -1, *grad.shape[1:]).sum(1)


def sample_rows(t: Tensor, samples: int) -> Tensor:
    """Reshape t [N, ..., C] to [samples, positions of one sample, C], in the dtype that gradients accumulate in."""
    return accumulable(t.reshape(samples, -1, t.shape[-1]))


def channel_sum(t: Tensor, samples: int) -> Tensor:
    """Sum t [N, C, *size] to [samples, C], in the dtype that gradients accumulate in."""
    return accumulable(t).reshape(samples, len(t) // samples, t.shape[1], -1).sum((1, 3))


def lay_out_taps(grads: Tensor, kernel: Sequence[int]) -> Tensor:
    """Rearrange gradients [n, O prod(kernel), C], with taps in the reversed order of `gather_taps`, to [n, O, C, *kernel]."""
    taps_dims = range(2, 2 + len(kernel))
    return grads.unflatten(1, (-1, *kernel)).flip(*taps_dims).movedim(-1, 2)
