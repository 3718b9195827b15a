"""The arithmetic of a LoDA layer for a compiler: the operations of `arithmetic.py` in a form that it sees through and fuses.

Nothing is written in place, sizes are read only to reshape, and the channels come last, as a compiler lays out convolutions on a
CPU: then all products below read their operands without a copy. From z on, the adapter is computed in float32 (float64 for
float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloda.kernels.conv import Conv
from fastloda.loda.arithmetic import ConvOp, LinearOp, activation, activation_grad
from fastloda.per_sample.tensors import accumulable, sample_rows


def forward(
    op: ConvOp | LinearOp, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute y and z, whose channels are last."""
    if isinstance(op, LinearOp):
        y, z = F.linear(x, weight, bias), accumulable(F.linear(x, A))
        return (y + _up(op, z, B)).to(x.dtype), z
    y = op.convolve(x, weight, bias, op.groups)
    z = _product(_channels_last(x), A.flatten(1).t()) if _is_pointwise(op.conv) else _channels_last(op.convolve(x, A))
    z = accumulable(z)
    return (y + _up(op, z, B).movedim(-1, 1)).to(x.dtype), z


def backward(
    op: ConvOp | LinearOp,
    gy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    needs_x: bool,
    samples: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dx if it is needed, and the gradients of A and B for each sample: [samples, *kernel, r, C], [samples, O, r]."""
    convolves = isinstance(op, ConvOp)
    gy_last, x_last = (_channels_last(gy), _channels_last(x)) if convolves else (gy, x)
    gz = activation_grad(_product(gy_last, B.flatten(1) * op.scale), z, op.slope)
    h = activation(z, op.slope)
    grad_B = torch.bmm(sample_rows(gy_last, samples).mT, sample_rows(h, samples)) * op.scale
    taps = _taps(gz, x.shape[2:], *op.conv) if convolves and not _is_pointwise(op.conv) else gz
    grad_A = torch.bmm(sample_rows(taps, samples).mT, sample_rows(x_last, samples))
    if convolves:
        grad_A = grad_A.unflatten(1, (*op.conv.kernel, -1)).flip(1, 2)
    return _grad_x(op, gy, taps, x, weight, A) if needs_x else None, grad_A, grad_B


def lay_out(grads: Tensor, shape: torch.Size) -> Tensor:
    """Bring gradients [n, numbers] of a parameter, as `backward` gives them, to [n, *shape]."""
    if len(shape) != 4:
        return grads.view(len(grads), *shape)
    return grads.view(len(grads), *shape[2:], *shape[:2]).permute(0, 3, 4, 1, 2)


def _grad_x(op: ConvOp | LinearOp, gy: Tensor, taps: Tensor, x: Tensor, weight: Tensor, A: Tensor) -> Tensor:
    if isinstance(op, LinearOp):
        return (gy @ weight + _product(taps, A)).to(x.dtype)
    through_W = op.grad_x_of_W(gy, x, weight)
    by_taps = A.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)  # [k^2 r, C]
    return (through_W + _product(taps, by_taps).movedim(-1, 1)).to(x.dtype)


def _up(op: ConvOp | LinearOp, z: Tensor, B: Tensor) -> Tensor:
    return _product(activation(z, op.slope), B.flatten(1).t() * op.scale)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1)


def _product(t: Tensor, matrix: Tensor) -> Tensor:
    """Compute t [N, ..., C] @ matrix [C, D]; as one product an image, for in another memory order t would be copied first."""
    t, matrix = accumulable(t), accumulable(matrix)
    if t.dim() != 4:
        return t @ matrix
    out = torch.bmm(t.flatten(1, 2), matrix.expand(len(t), *matrix.shape))
    return out.view(*t.shape[:3], matrix.shape[1])


def _is_pointwise(conv: Conv) -> bool:
    return all(sizes == (1, 1, 0) for sizes in zip(conv.kernel, conv.stride, conv.padding))


def _taps(
    g: Tensor,
    in_size: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Gather the taps of g [N, OH, OW, r] in reversed order, as `per_sample.taps` does: [N, H, W, k^2 r].

    g is put among zeros by indexing, which makes a compiler write that small tensor once. Padding would be
    fused into the reads, with a test for each number of each tap whether it lies beyond an edge.
    """
    reaches = [d * (k - 1) for k, d in zip(kernel, dilation)]
    margins = [max(0, reach - p) for reach, p in zip(reaches, padding)]
    starts = [margin + p - reach for margin, p, reach in zip(margins, padding, reaches)]  # where the first tap reads
    needed = [start + size + reach for start, size, reach in zip(starts, in_size, reaches)]
    ends = [margin + (out - 1) * s + 1 for margin, out, s in zip(margins, g.shape[1:], stride)]
    at = [torch.arange(out, device=g.device) * s + m for out, s, m in zip(g.shape[1:], stride, margins)]
    spread = g.new_zeros(len(g), *map(max, needed, ends), g.shape[-1])
    spread[:, at[0][:, None], at[1]] = g
    for dim, (start, stop, reach, d) in enumerate(zip(starts, needed, reaches, dilation), start=1):
        spread = spread.narrow(dim, start, stop - start).unfold(dim, reach + 1, 1)[..., ::d]
    return spread.permute(0, 1, 2, 4, 5, 3).flatten(3)
