"""The adapter's forward: z = A * x, then y += s B phi(z) in place on the frozen convolution's output.

A convolution with r = 4 outputs wastes most of a tensor core's tile, and reads x once for each tap.  Here x is multiplied once
by all taps, U[q, (tap, j)] = A[j, :, tap] . x[:, q], and U is shifted and added inside the program: x is read once, but for the
rows that neighbouring programs share (the halo).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import cdiv, launch, load, planes, power_of_2
from .conv import Conv


def project_reference(x: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute z = A * x for x [N, C, H, W], A [r, C, kh, kw]: [N, r, OH, OW]."""
    return F.conv2d(x, A, None, conv.stride, conv.padding, conv.dilation)


def add_reference(y: Tensor, z: Tensor, B: Tensor, slope: float, scale: float) -> Tensor:
    """Compute y + s B phi(z) for y [N, O, OH, OW], z [N, r, OH, OW], B [O, r, 1, 1]; phi = LeakyReLU(slope)."""
    return y + scale * F.conv2d(F.leaky_relu(z, slope), B)


@triton.jit
def _project_kernel(
    x, A, z, C, x_row, x_channel, x_position,
    R: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ROWS: tl.constexpr,  # the rows of output positions in one program
    RP: tl.constexpr, BM: tl.constexpr,  # columns (tap, j) of U: RP >= R for each tap, BM in all
    BI: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,  # positions of x, of z; channels
):  # fmt: skip
    """Compute z[n, p, j] = sum over taps of U[p shifted by the tap, (tap, j)], for ROWS rows of one image."""
    strips: tl.constexpr = (OH + ROWS - 1) // ROWS
    program = tl.program_id(0)
    n = (program // strips).to(tl.int64)
    first = (program % strips) * ROWS
    top = tl.maximum(first * SH - PH, 0)  # first row of x that is held
    q = top * W + tl.arange(0, BI)
    m = tl.arange(0, BM)
    tap, j = m // RP, m % RP
    real = (tap < KH * KW) & (j < R)
    U = tl.zeros((BI, BM), tl.float32)
    for start in tl.range(0, C, BC, num_stages=STAGES):
        c = start + tl.arange(0, BC)
        held = load(
            x + n * x_row + q[:, None] * x_position + (c * x_channel)[None, :], (q < H * W)[:, None] & (c < C)[None, :]
        )
        weight = load(A + (tap * R + j)[None, :] * C + c[:, None], real[None, :] & (c < C)[:, None])
        U = tl.dot(held, weight, U, input_precision="ieee")
    p = tl.arange(0, BO)
    h = ((first + p // OW) * SH - PH)[:, None] + (tap // KW * DH)[None, :]
    w = (p % OW * SW - PW)[:, None] + (tap % KW * DW)[None, :]
    written = (p < ROWS * OW) & (first + p // OW < OH)
    inside = written[:, None] & real[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    shifted = tl.gather(U, tl.where(inside, (h - top) * W + w, 0), 0)
    total = tl.sum(tl.reshape(tl.where(inside, shifted, 0.0), (BO, BM // RP, RP)), 1)
    j = tl.arange(0, RP)
    out = z + n * (OH * OW * R) + (first * OW + p)[:, None] * R + j[None, :]
    tl.store(out, total, mask=written[:, None] & (j < R)[None, :])


@triton.jit
def _add_kernel(
    y, z, B, OUT, y_row, y_channel, y_position, z_row, z_channel, z_position, slope, scale,
    P: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add s B phi(z[n, :, p]) to y[n, :, p]."""
    blocks: tl.constexpr = (P + BP - 1) // BP
    across = tl.cdiv(OUT, BC)
    program = tl.program_id(0)
    n = (program // (blocks * across)).to(tl.int64)
    p = (program // across % blocks) * BP + tl.arange(0, BP)
    c = (program % across) * BC + tl.arange(0, BC)
    j = tl.arange(0, RP)
    up = load(B + c[None, :] * R + j[:, None], (c < OUT)[None, :] & (j < R)[:, None])
    low = load(z + n * z_row + p[:, None] * z_position + (j * z_channel)[None, :], (p < P)[:, None] & (j < R)[None, :])
    low = low.to(tl.float32)
    h = tl.where(low > 0, low, low * slope).to(up.dtype)
    at = y + n * y_row + p[:, None] * y_position + (c * y_channel)[None, :]
    there = (p < P)[:, None] & (c < OUT)[None, :]
    old = tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, old + scale * tl.dot(h, up, input_precision="ieee"), mask=there)


def project(x: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute z = A * x, [N, r, OH, OW], in channels_last memory, which the backward kernels read fastest.

    cuDNN computes it where the kernel gains nothing: for many taps times a large rank, and wide images with their large halo.
    """
    rank, channels = A.shape[:2]
    height, width = x.shape[2:]
    out_height, out_width = conv.output_size(height, width)
    sizes = tiles.project(conv, rank, channels, width, out_height, out_width, x.element_size())
    if sizes is None:
        return project_reference(x, A, conv).contiguous(memory_format=torch.channels_last)
    px = planes(x)
    z = torch.empty(len(x), out_height, out_width, rank, device=x.device, dtype=x.dtype)
    by_tap = A.permute(2, 3, 0, 1).contiguous()  # adjacent channels: read like x
    launch(
        _project_kernel, len(x) * cdiv(out_height, sizes["ROWS"]),
        px.tensor, by_tap, z, channels, *px[1:],
        R=rank, H=height, W=width, OH=out_height, OW=out_width, **conv.constants(), **sizes,
    )  # fmt: skip
    return z.permute(0, 3, 1, 2)


def add_(y: Tensor, z: Tensor, B: Tensor, slope: float, scale: float) -> Tensor:
    """Compute `add_reference` in place, for y contiguous or channels_last, which is read and written once.

    Raises:
        ValueError: y is neither.
    """
    py, pz, (outputs, rank) = planes(y), planes(z), B.shape[:2]
    if py.tensor is not y:
        raise ValueError(f"y must be contiguous or channels_last, got strides {y.stride()}")
    size, rank_tile = y[0, 0].numel(), power_of_2(rank)
    sizes = tiles.elementwise(size, outputs, y.element_size())
    programs = len(y) * cdiv(size, sizes["BP"]) * cdiv(outputs, sizes["BC"])
    launch(
        _add_kernel, programs,
        y, pz.tensor, B, outputs, *py[1:], *pz[1:], slope, scale, P=size, R=rank, RP=rank_tile, **sizes,
    )  # fmt: skip
    return y
