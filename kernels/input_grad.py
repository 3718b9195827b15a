"""The adapter's part of the input's gradient, added in place: dx += A^T * gz.

    dx[n, c, q] += sum over taps and j of gz[n, j, q + (kernel - 1 - tap) dilation] A[j, c, tap]

gz lies among zeros, as adapter_backward lays it out, so that no shift leaves it. dx is read and written once.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import FLOAT32_PRODUCTS, below, cdiv, launch, load, planes, positions_last
from .conv import Conv


def add_input_grad_reference(dx: Tensor, gz: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute dx + A^T * gz for dx [N, C, H, W], A [r, C, kh, kw], gz laid out for `conv.full()`."""
    full = conv.full()
    return dx + F.conv_transpose2d(gz, A, None, full.stride, full.padding, dilation=full.dilation)


@triton.jit
def _input_grad_kernel(
    dx, gz, A, C, x_row, x_channel, x_position,
    R: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,  # (tap, j) at a time, positions, channels
):  # fmt: skip
    """Add to dx[n, :, q] the sum over m = (tap, j) of A[:, m] gz[n, j, q shifted by the tap]."""
    FH: tl.constexpr = H + DH * (KH - 1)
    FW: tl.constexpr = W + DW * (KW - 1)
    blocks: tl.constexpr = (H * W + BP - 1) // BP
    n = (tl.program_id(0) // blocks).to(tl.int64)
    q = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there, channel = below(q, H * W, H * W % BP == 0), below(c, C, EVEN)
    at = dx + n * x_row + q[:, None] * x_position + (c * x_channel)[None, :]
    old = tl.load(at, mask=there[:, None] & channel[None, :], other=0.0)
    acc = tl.zeros((BP, BC), tl.float32)
    for start in tl.static_range(0, R * KH * KW, BM):
        m = start + tl.arange(0, BM)
        tap, j = m // R, m % R
        real = below(m, R * KH * KW, R * KH * KW % BM == 0)
        shift = (KH - 1 - tap // KW) * DH * FW + (KW - 1 - tap % KW) * DW
        places = (q // W * FW + q % W)[:, None] + shift[None, :]
        shifted = load(gz + n * (FH * FW * R) + places * R + j[None, :], there[:, None] & real[None, :])
        weight = load(A + m[:, None] * C + c[None, :], real[:, None] & channel[None, :])
        acc = tl.dot(shifted, weight, acc, input_precision=FLOAT32_PRODUCTS)
    tl.store(at, old.to(tl.float32) + acc, mask=there[:, None] & channel[None, :])


def add_input_grad_(dx: Tensor, gz: Tensor, A: Tensor, conv: Conv) -> Tensor:
    """Compute `add_input_grad_reference` in place, for dx contiguous or channels_last.

    Raises:
        ValueError: dx is neither, or gz has another size.
    """
    px, (rank, channels), (height, width) = planes(dx), A.shape[:2], dx.shape[2:]
    if px.tensor is not dx:
        raise ValueError(f"dx must be contiguous or channels_last, got strides {dx.stride()}")
    if gz.shape[2:] != conv.full().output_size(height, width):
        raise ValueError(f"gz of {tuple(gz.shape[2:])} positions is not laid out for {conv.full()}")
    sizes = tiles.input_grad(rank * conv.taps, height * width, channels, dx.element_size())
    by_tap = A.permute(2, 3, 0, 1).contiguous()  # [taps, r, C]: adjacent channels
    programs = len(dx) * cdiv(height * width, sizes["BP"]), cdiv(channels, sizes["BC"])
    (kh, kw), (dh, dw) = conv.kernel, conv.dilation
    launch(
        _input_grad_kernel, programs,
        dx, positions_last(gz), by_tap, channels, *px[1:],
        R=rank, H=height, W=width, KH=kh, KW=kw, DH=dh, DW=dw, EVEN=channels % sizes["BC"] == 0, **sizes,
    )  # fmt: skip
    return dx
