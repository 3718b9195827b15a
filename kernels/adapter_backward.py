"""The adapter's backward, from one read of grad_output: gz, and the per-sample gradient of B with its squared norm.

    gz[n, p, :] = phi'(z) . s B^T gy[n, :, p]        gB[n] = s sum_p gy[n, :, p] phi(z[n, :, p])^T

gz is laid out for `conv.full()`, among zeros: then a tap is a shift of gz that never reads outside it, whatever the convolution's
stride and padding.  Blocks of positions write their part of gB; a second launch adds the parts of a sample in order, over its
views.  If one block covers a whole sample, its part is the gradient, and the same launch computes the squared norm.
"""

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import FLOAT32_PRODUCTS, below, cdiv, launch, load, planes, positions_last, undo_stride
from .conv import Conv


def adapter_backward_reference(
    gy: Tensor, z: Tensor, B: Tensor, slope: float, scale: float, conv: Conv, size: tuple[int, int], samples: int
) -> tuple[Tensor, Tensor]:
    """Compute gz as `among_zeros` lays it out, and gB [samples, O, r, 1, 1], from gy [N, O, OH, OW], z [N, r, OH, OW], B."""
    gz = scale * torch.einsum("or,nohw->nrhw", B.flatten(1), gy) * torch.where(z > 0, 1.0, slope)
    gz = among_zeros(gz, conv, size)
    gB = scale * torch.einsum("nohw,nrhw->nor", gy, F.leaky_relu(z, slope))
    return gz, gB.view(samples, -1, *gB.shape[1:]).sum(1)[..., None, None]


def among_zeros(gz: Tensor, conv: Conv, size: tuple[int, int]) -> Tensor:
    """Put gz [N, r, OH, OW] of `conv`, on images of `size`, among zeros: `conv.full()` then gives x and A the same gradients."""
    full = gz.new_zeros(*gz.shape[:2], *conv.full().output_size(*size))
    for h, w in product(*(range(n) for n in gz.shape[2:])):
        u, v = (full_p - p + i * s for full_p, p, i, s in zip(conv.full().padding, conv.padding, (h, w), conv.stride))
        if 0 <= u < full.shape[2] and 0 <= v < full.shape[3]:  # else it sees only padding
            full[:, :, u, v] = gz[:, :, h, w]
    return full


def add_parts_reference(sums: Tensor, samples: int) -> Tensor:
    """Add the sums [N, blocks, m, n] of each sample's rows: [samples, m, n, 1, 1]."""
    return sums.view(samples, -1, *sums.shape[2:]).sum(1)[..., None, None]


class Parts(NamedTuple):
    """The parts of the gradients [m, n] of all rows, one from each block of a row's positions.

    Attributes:
        sums: float32 [N, blocks, m, n]; a row's gradient is the sum over its blocks.
        squares: float64 [N, 1], the squared norms of the sums, if a row is one block; if it is several, squares is never written.
    """

    sums: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, rows: int, blocks: int, m: int, n: int, device: torch.device) -> "Parts":
        """Make parts for a kernel to write."""
        sums = torch.empty(rows, blocks, m, n, device=device)
        return cls(sums, torch.empty(rows, 1, device=device, dtype=torch.float64))


@triton.jit
def _backward_kernel(
    gy, z, B, gz, parts, squares, OUT, gy_row, gy_channel, gy_position, slope, scale,
    OH: tl.constexpr, OW: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr,  # sizes of z, and of gz among zeros
    SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,  # gz's place there: h SH + TOP, w SW + LEFT
    R: tl.constexpr, RP: tl.constexpr, RZ: tl.constexpr,  # r, as a side of a product and as a power of 2
    BP: tl.constexpr, BC: tl.constexpr, BZ: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute gz[n, p, :] and parts[n, block of p], this block's share of gB[n]; and set its share of the zeros around gz.

    If a row is one block, squares[n] is the squared norm of its part, in float64, where no square overflows or vanishes.
    """
    P: tl.constexpr = OH * OW
    blocks: tl.constexpr = (P + BP - 1) // BP
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    block = (program % blocks).to(tl.int32)
    p, j = block * BP + tl.arange(0, BP), tl.arange(0, RP)
    there = below(p, P, P % BP == 0)[:, None] & (j < R)[None, :]
    low = load(z + n * (P * R) + p[:, None] * R + j[None, :], there).to(tl.float32)
    h = tl.where(low > 0, low, low * slope)
    back = tl.zeros((BP, RP), tl.float32)
    norm = tl.zeros((BC, RP), tl.float64)
    for start in tl.range(0, OUT, BC, num_stages=STAGES):
        c = start + tl.arange(0, BC)
        channel = below(c, OUT, EVEN)
        down = load(B + c[:, None] * R + j[None, :], channel[:, None] & (j < R)[None, :])
        grad = load(
            gy + n * gy_row + p[:, None] * gy_position + (c * gy_channel)[None, :],
            below(p, P, P % BP == 0)[:, None] & channel[None, :],
        )
        back = tl.dot(grad, down, back, input_precision=FLOAT32_PRODUCTS)
        part = scale * tl.dot(tl.trans(grad), h.to(grad.dtype), input_precision=FLOAT32_PRODUCTS)
        at, real = parts + (program * OUT + c)[:, None] * R + j[None, :], channel[:, None] & (j < R)[None, :]
        tl.store(at, part, mask=real)
        if blocks == 1:
            exact = tl.where(real, part, 0.0).to(tl.float64)
            norm += exact * exact
    if blocks == 1:
        tl.store(squares + n, tl.sum(norm))
    back = back * tl.where(low > 0, scale, slope * scale)
    u, v = p // OW * SH + TOP, p % OW * SW + LEFT
    inside = (u >= 0) & (u < FH) & (v >= 0) & (v < FW)
    out = gz + n * (FH * FW * R)
    tl.store(out + (u * FW + v)[:, None] * R + j[None, :], back, mask=there & inside[:, None])
    if FH * FW > P or SH > 1 or SW > 1 or TOP != 0 or LEFT != 0:
        SHARE: tl.constexpr = (FH * FW + blocks - 1) // blocks
        k = tl.arange(0, RZ)
        for start in range(0, SHARE, BZ):
            i = start + tl.arange(0, BZ)
            f = block * SHARE + i
            _, taken = undo_stride(f // FW - TOP, f % FW - LEFT, f < FH * FW, SH, SW, OH, OW)
            free = (i < SHARE) & (f < FH * FW) & ~taken
            nothing = tl.zeros((BZ, RZ), gz.dtype.element_ty)
            tl.store(out + f[:, None] * R + k[None, :], nothing, mask=free[:, None] & (k < R)[None, :])


@triton.jit
def _add_parts_kernel(parts, out, squares, SIZE, PARTS, BS: tl.constexpr):
    """Compute out[n], the sum of parts[n, :] in order, and squares[n, block], the sum of the block's squares in float64."""
    across = tl.cdiv(SIZE, BS)
    program = tl.program_id(0).to(tl.int64)
    n = program // across
    i = (program % across).to(tl.int32) * BS + tl.arange(0, BS)
    total = tl.zeros((BS,), tl.float32)
    for k in range(PARTS):
        total += tl.load(parts + (n * PARTS + k) * SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(out + n * SIZE + i, total, mask=i < SIZE)
    exact = total.to(tl.float64)
    tl.store(squares + program, tl.sum(exact * exact))


def adapter_backward(
    gy: Tensor, z: Tensor, B: Tensor, slope: float, scale: float, conv: Conv, size: tuple[int, int]
) -> tuple[Tensor, Parts]:
    """Compute gz, [N, r, *conv.full().output_size(*size)], and the parts of gB that `add_parts` sums.

    gz is in gy's dtype and channels_last memory; conv and size are those of A's convolution and of x.
    """
    pg, (outputs, rank), full = planes(gy), B.shape[:2], conv.full()
    rows, _, *out_size = gy.shape
    sizes = tiles.backward(*out_size, *full.output_size(*size), outputs, rank, gy.element_size())
    blocks = cdiv(out_size[0] * out_size[1], sizes["BP"])
    gz = torch.empty(rows, sizes["FH"], sizes["FW"], rank, device=gy.device, dtype=gy.dtype)
    parts = Parts.empty(rows, blocks, outputs, rank, gy.device)
    (top, left), (down, right) = ((f - p for f, p in zip(full.padding, conv.padding)), conv.stride)
    launch(
        _backward_kernel, rows * blocks,
        pg.tensor, positions_last(z), B, gz, *parts, outputs, *pg[1:], slope, scale,
        OH=out_size[0], OW=out_size[1], SH=down, SW=right, TOP=top, LEFT=left, R=rank, **sizes,
    )  # fmt: skip
    return gz.permute(0, 3, 1, 2), parts


def add_parts(parts: Parts, samples: int) -> tuple[Tensor, Tensor]:
    """Compute the gradients [samples, m, n, 1, 1] float32, and squares [samples, k] float64 whose rows sum to |gradient|^2."""
    rows, blocks, *shape = parts.sums.shape
    if rows * blocks == samples:
        return parts.sums.view(samples, *shape, 1, 1), parts.squares
    size, block = shape[0] * shape[1], tiles.REDUCTION
    out = torch.empty(samples, *shape, 1, 1, device=parts.sums.device)
    squares = torch.empty(samples, cdiv(size, block), device=parts.sums.device, dtype=torch.float64)
    launch(
        _add_parts_kernel, squares.numel(), parts.sums, out, squares, size, PARTS=rows // samples * blocks, BS=block
    )  # fmt: skip
    return out, squares
