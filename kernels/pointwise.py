"""The whole forward of a 1 x 1 layer from one read of x: the frozen product, its bias and the adapter.

    z[q, :] = A x[q, :]        y[q, :] = W x[q, :] + b + s B phi(z[q, :])

q counts the positions of all images, adjacent in channels_last memory.  One tile has all outputs, so that x is read once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .adapter_forward import add_reference
from .blocks import below, cdiv, launch, load
from .conv import Conv


def serves(x: Tensor, weight: Tensor, A: Tensor, conv: Conv) -> bool:
    """Tell whether `forward` can compute this layer: 1 x 1 without groups, 16 bits, channels_last, a tile of outputs."""
    (outputs, channels), rank = weight.shape[:2], len(A)
    small = x.element_size() == 2 and outputs <= tiles.POINTWISE["outputs"] and rank <= tiles.POINTWISE["rank"]
    dense = x.is_contiguous(memory_format=torch.channels_last)
    return small and dense and conv == Conv((1, 1)) and channels == x.shape[1]


def forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, slope: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute y and z for x [N, C, H, W], weight [O, C, 1, 1], A [r, C, 1, 1], B [O, r, 1, 1]."""
    z = F.conv2d(x, A)
    return add_reference(F.conv2d(x, weight), z, B, bias, slope, scale), z


@triton.jit
def _pointwise_kernel(
    x, W, bias, A, B, y, z, POSITIONS, C, OUT, slope, scale,
    R: tl.constexpr, RP: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,  # EVEN: positions, outputs and channels fill their tiles
):  # fmt: skip
    """Compute y and z at a block of positions."""
    first = tl.program_id(0).to(tl.int64) * BP
    q, o, j = tl.arange(0, BP), tl.arange(0, BO), tl.arange(0, RP)
    there, real = below(q, POSITIONS - first, EVEN), below(o, OUT, EVEN)
    acc, low = tl.zeros((BP, BO), tl.float32), tl.zeros((BP, RP), tl.float32)
    for start in tl.range(0, C, BC, num_stages=STAGES):
        c = start + tl.arange(0, BC)
        channel = below(c, C, EVEN)
        image = load(x + first * C + (q[:, None] * C + c[None, :]), there[:, None] & channel[None, :])
        frozen = load(W + o[None, :] * C + c[:, None], channel[:, None] & real[None, :])
        down = load(A + j[None, :] * C + c[:, None], channel[:, None] & (j < R)[None, :])
        acc = tl.dot(image, frozen, acc)
        low = tl.dot(image, down, low)
    kept = low.to(z.dtype.element_ty)  # backward takes phi' and B's gradient from it
    tl.store(z + first * R + (q[:, None] * R + j[None, :]), kept, mask=there[:, None] & (j < R)[None, :])
    low = kept.to(tl.float32)
    up = load(B + o[None, :] * R + j[:, None], real[None, :] & (j < R)[:, None])
    acc = tl.dot((scale * tl.where(low > 0, low, low * slope)).to(up.dtype), up, acc)
    if bias is not None:
        acc += tl.load(bias + o, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(y + first * OUT + (q[:, None] * OUT + o[None, :]), acc, mask=there[:, None] & real[None, :])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, slope: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute y and z in channels_last memory, of a layer that `serves` takes."""
    (outputs, channels), rank, (rows, _, *size) = weight.shape[:2], len(A), x.shape
    empty = lambda width: torch.empty(rows, *size, width, device=x.device, dtype=x.dtype)  # noqa: E731
    y, z = empty(outputs), empty(rank)
    positions, sizes = rows * size[0] * size[1], tiles.pointwise(channels, outputs, rank)
    even = outputs == sizes["BO"] and channels % sizes["BC"] == 0 and positions % sizes["BP"] == 0
    launch(
        _pointwise_kernel, cdiv(positions, sizes["BP"]),
        x, weight.contiguous(), bias, A.contiguous(), B.contiguous(), y, z, positions, channels, outputs, slope, scale,
        R=rank, EVEN=even, **sizes,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)
