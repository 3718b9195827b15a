"""The adapter's part of the input's gradient, added in place: dx += A^T * gz.

    dx[n, c, q] += sum over taps and j of gz[n, j, (q + padding - tap dilation) / stride] A[j, c, tap]

dx is read and written once.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import cdiv, launch, load, planes, undo_stride
from .conv import Conv


def add_input_grad_reference(dx: Tensor, gz: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute dx + A^T * gz for dx [N, C, H, W], gz [N, r, OH, OW], A [r, C, kh, kw]."""
    covered = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(gz.shape[2:], *conv[1:], conv.kernel)]
    rest = [size - c for size, c in zip(dx.shape[2:], covered)]  # positions at the end that a stride leaves out
    return dx + F.conv_transpose2d(gz, A, None, conv.stride, conv.padding, rest, dilation=conv.dilation)


@triton.jit
def _input_grad_kernel(
    dx, gz, A, C, x_row, x_channel, x_position, g_row,
    G_CHANNEL: tl.constexpr, G_POSITION: tl.constexpr,  # constants, so that r adjacent numbers are read at once
    R: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,  # (tap, j) at a time, positions, channels
):  # fmt: skip
    """Add to dx[n, :, q] the sum over m = (tap, j) of A[:, m] gz[n, j, q shifted by the tap]."""
    blocks: tl.constexpr = (H * W + BP - 1) // BP
    across = tl.cdiv(C, BC)
    program = tl.program_id(0)
    n = (program // (blocks * across)).to(tl.int64)
    q = (program // across % blocks) * BP + tl.arange(0, BP)
    c = (program % across) * BC + tl.arange(0, BC)
    acc = tl.zeros((BP, BC), tl.float32)
    for start in tl.static_range(0, R * KH * KW, BM):
        m = start + tl.arange(0, BM)
        tap, j = m // R, m % R
        h = (q // W)[:, None] + (PH - tap // KW * DH)[None, :]
        w = (q % W)[:, None] + (PW - tap % KW * DW)[None, :]
        p, inside = undo_stride(h, w, (q < H * W)[:, None] & (tap < KH * KW)[None, :], SH, SW, OH, OW)
        shifted = load(gz + n * g_row + (j * G_CHANNEL)[None, :] + p * G_POSITION, inside)
        weight = load(A + m[:, None] * C + c[None, :], (tap < KH * KW)[:, None] & (c < C)[None, :])
        acc = tl.dot(shifted, weight, acc, input_precision="ieee")
    at = dx + n * x_row + q[:, None] * x_position + (c * x_channel)[None, :]
    there = (q < H * W)[:, None] & (c < C)[None, :]
    tl.store(at, tl.load(at, mask=there, other=0.0).to(tl.float32) + acc, mask=there)


def add_input_grad_(dx: Tensor, gz: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute `add_input_grad_reference` in place, for dx contiguous or channels_last.

    Raises:
        ValueError: dx is neither.
    """
    px, pg, (rank, channels) = planes(dx), planes(gz), A.shape[:2]
    if px.tensor is not dx:
        raise ValueError(f"dx must be contiguous or channels_last, got strides {dx.stride()}")
    (height, width), (out_height, out_width) = dx.shape[2:], gz.shape[2:]
    sizes = tiles.input_grad(rank * conv.taps, height * width, channels, dx.element_size())
    by_tap = A.permute(2, 3, 0, 1).contiguous()  # [taps, r, C]: adjacent channels
    programs = len(dx) * cdiv(height * width, sizes["BP"]) * cdiv(channels, sizes["BC"])
    launch(
        _input_grad_kernel, programs,
        dx, pg.tensor, by_tap, channels, *px[1:], pg.row, G_CHANNEL=pg.channel, G_POSITION=pg.position,
        R=rank, H=height, W=width, OH=out_height, OW=out_width, **conv.constants(), **sizes,
    )  # fmt: skip
    return dx
