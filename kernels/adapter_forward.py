"""The adapter's forward: z = A * x, then y += b + s B phi(z) in place on the frozen convolution's output, which lacks its bias.

A convolution with r = 4 outputs wastes most of a tensor core's tile, and reads x once for each tap.  Here x is multiplied once
by all taps, U[q, (tap, j)] = A[j, :, tap] . x[:, q], and U is shifted and added: x is read once, but for the rows that
neighbouring strips share (the halo).  Each program writes the U of one strip after another to the same scratch, which stays in
the GPU's cache, and reads it back shifted: inside registers a shift would take a shuffle for each number.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import FLOAT32_PRODUCTS, below, cdiv, launch, load, planes, positions_last, power_of_2
from .conv import Conv


def project_reference(x: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute z = A * x for x [N, C, H, W], A [r, C, kh, kw]: [N, r, OH, OW]."""
    return F.conv2d(x, A, None, conv.stride, conv.padding, conv.dilation)


def add_reference(y: Tensor, z: Tensor, B: Tensor, bias: Tensor | None, slope: float, scale: float) -> Tensor:
    """Compute y + b + s B phi(z) for y [N, O, OH, OW], z [N, r, OH, OW], B [O, r, 1, 1], b [O]; phi = LeakyReLU(slope)."""
    total = y + scale * F.conv2d(F.leaky_relu(z, slope), B)
    return total if bias is None else total + bias[:, None, None]


@triton.jit
def _project_kernel(
    x, A, scratch, z, STRIPS, C, x_row, x_channel, x_position,
    R: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ROWS: tl.constexpr,  # the rows of output positions in one strip
    RP: tl.constexpr, BM: tl.constexpr,  # columns (tap, j) of U: RP >= R for each tap, BM in all
    BI: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,  # positions of x, of z; channels
    EVEN: tl.constexpr, STAGES: tl.constexpr,  # EVEN: BC divides C
):  # fmt: skip
    """Compute z[n, p, j] = sum over taps of U[p shifted by the tap, (tap, j)], a strip of ROWS rows of one image at a time."""
    OF_IMAGE: tl.constexpr = (OH + ROWS - 1) // ROWS
    held, p, j = tl.arange(0, BI), tl.arange(0, BO), tl.arange(0, RP)
    m = tl.arange(0, BM)
    real = (m // RP < KH * KW) & (m % RP < R)
    row = m // RP * R + m % RP
    own = scratch + tl.program_id(0).to(tl.int64) * (BI * BM)
    # What all strips share is computed again for each strip: kept in registers, it would spill.
    for strip in tl.range(tl.program_id(0), STRIPS, tl.num_programs(0), num_stages=1, disable_licm=True):
        n = tl.cast(strip // OF_IMAGE, tl.int64)
        first = strip % OF_IMAGE * ROWS
        top = tl.maximum(first * SH - PH, 0)  # first row of x that is held
        q = tl.minimum(top * W + held, H * W - 1)  # past the image: its last position, for a U not read
        U = tl.zeros((BI, BM), tl.float32)
        for start in tl.range(0, C, BC, num_stages=STAGES):
            c = start + tl.arange(0, BC)
            there = below(c, C, EVEN)
            image = load(x + n * x_row + q[:, None] * x_position + (c * x_channel)[None, :], there[None, :])
            weight = load(A + row[None, :] * C + c[:, None], real[None, :] & there[:, None])
            U = tl.dot(image, weight, U, input_precision=FLOAT32_PRODUCTS)
        tl.store(own + (held[:, None] * BM + m[None, :]), U, mask=real[None, :])
        tl.debug_barrier()  # threads read what other threads of the program wrote
        total = tl.zeros((BO, RP), tl.float32)
        for kh in range(KH):  # a row of taps at a time: more would take registers that spill
            h = (first + p // OW) * SH - PH + kh * DH
            for kw in tl.static_range(KW):
                w = p % OW * SW - PW + kw * DW
                inside = (p < ROWS * OW) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = ((h - top) * W + w) * BM + (kh * KW + kw) * RP
                total += tl.load(own + (at[:, None] + j[None, :]), mask=inside[:, None], other=0.0)
        written = (p < ROWS * OW) & (first + p // OW < OH)
        out = z + n * (OH * OW * R) + (first * OW + p)[:, None] * R + j[None, :]
        tl.store(out, total, mask=written[:, None] & (j < R)[None, :])
        tl.debug_barrier()  # before the next strip overwrites it


@triton.jit
def _add_kernel(
    y, z, B, bias, OUT, y_row, y_channel, y_position, slope, scale,
    P: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add b + s B phi(z[n, :, p]) to y[n, :, p]; b may be None."""
    blocks: tl.constexpr = (P + BP - 1) // BP
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    j = tl.arange(0, RP)
    there, channel = below(p, P, P % BP == 0), below(c, OUT, EVEN)
    at = y + n * y_row + p[:, None] * y_position + (c * y_channel)[None, :]
    old = tl.load(at, mask=there[:, None] & channel[None, :], other=0.0).to(tl.float32)
    if bias is not None:
        old += tl.load(bias + c, mask=channel, other=0.0).to(tl.float32)[None, :]
    up = load(B + c[None, :] * R + j[:, None], channel[None, :] & (j < R)[:, None])
    low = load(z + (n * P + p)[:, None] * R + j[None, :], there[:, None] & (j < R)[None, :]).to(tl.float32)
    h = tl.where(low > 0, low, low * slope).to(up.dtype)
    total = old + scale * tl.dot(h, up, input_precision=FLOAT32_PRODUCTS)
    tl.store(at, total, mask=there[:, None] & channel[None, :])


def project(x: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute z = A * x, [N, r, OH, OW], in channels_last memory, which the backward kernels read fastest.

    cuDNN computes it where the kernel gains nothing: for many taps times a large rank, and wide images with their large halo.
    """
    rank, channels = A.shape[:2]
    height, width = x.shape[2:]
    out_height, out_width = conv.output_size(height, width)
    sizes = tiles.project(conv, rank, channels, height, width, out_height, out_width, x.element_size())
    if sizes is None:
        return project_reference(x, A, conv).contiguous(memory_format=torch.channels_last)
    px = planes(x)
    strips = len(x) * cdiv(out_height, sizes["ROWS"])
    programs = min(strips, tiles.resident(x.device))
    scratch = torch.empty(programs, sizes["BI"], sizes["BM"], device=x.device)
    z = torch.empty(len(x), out_height, out_width, rank, device=x.device, dtype=x.dtype)
    by_tap = A.permute(2, 3, 0, 1).contiguous()  # adjacent channels: read like x
    launch(
        _project_kernel, programs,
        px.tensor, by_tap, scratch, z, strips, channels, *px[1:],
        R=rank, H=height, W=width, OH=out_height, OW=out_width, EVEN=channels % sizes["BC"] == 0, **conv.constants(), **sizes,
    )  # fmt: skip
    return z.permute(0, 3, 1, 2)


def add_(y: Tensor, z: Tensor, B: Tensor, bias: Tensor | None, slope: float, scale: float) -> Tensor:
    """Compute `add_reference` in place, for y contiguous or channels_last, which is read and written once.

    Raises:
        ValueError: y is neither.
    """
    py, (outputs, rank) = planes(y), B.shape[:2]
    if py.tensor is not y:
        raise ValueError(f"y must be contiguous or channels_last, got strides {y.stride()}")
    size = y[0, 0].numel()
    sizes = tiles.elementwise(size, outputs, y.element_size())
    programs = len(y) * cdiv(size, sizes["BP"]), cdiv(outputs, sizes["BC"])
    launch(
        _add_kernel, programs, y, positions_last(z), B, bias, outputs, *py[1:], slope, scale,
        P=size, R=rank, RP=power_of_2(rank), EVEN=outputs % sizes["BC"] == 0, **sizes,
    )  # fmt: skip
    return y
