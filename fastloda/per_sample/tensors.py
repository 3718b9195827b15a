"""Small steps that per-sample gradients are computed by: rows into samples, the dtype to accumulate in, who computes."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_triton(t: Tensor) -> bool:
    """Whether Triton kernels compute for t; PyTorch does on a CPU, and where Triton is missing."""
    return t.is_cuda and _has_triton() and t.dtype in KERNEL_DTYPES and t.numel() > 0


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def accumulable(t: Tensor) -> Tensor:
    """t in the dtype that gradients are accumulated in: float64 stays, all else becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def sum_rows(grad: Tensor, samples: int) -> Tensor:
    """[N, ...] -> [samples, ...]: summed over each sample's rows."""
    return grad if grad.shape[0] == samples else grad.view(samples, -1, *grad.shape[1:]).sum(1)


def sample_rows(t: Tensor, samples: int) -> Tensor:
    """[N, ..., C] -> [samples, positions of one sample, C], in the dtype that gradients accumulate in."""
    return accumulable(t.reshape(samples, -1, t.shape[-1]))


def channel_sum(t: Tensor, samples: int) -> Tensor:
    """[N, C, *size] -> [samples, C], in the dtype that gradients accumulate in."""
    return accumulable(t).reshape(samples, len(t) // samples, t.shape[1], -1).sum((1, 3))


def lay_out_taps(grads: Tensor, kernel: Sequence[int]) -> Tensor:
    """[n, O prod(kernel), C], the taps reversed as `gather_taps` has them -> [n, O, C, *kernel]."""
    taps_dims = range(2, 2 + len(kernel))
    return grads.unflatten(1, (-1, *kernel)).flip(*taps_dims).movedim(-1, 2)
