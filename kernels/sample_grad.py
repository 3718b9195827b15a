"""Per-sample gradients of a convolution's weight: with their norms, their norms only, or their sum with known factors.

    G[n, o, c, k] = sum_q g[n, o, (q + padding - k dilation) / stride] x[n, c, q]

For a LoDA adapter g is gz, with r channels: the taps are folded with them into one axis, g is shifted, and x is read once and
never expanded.  gz lies among zeros (adapter_backward), so that no shift leaves it and no bound is checked.  For a full layer g
is grad_output, and the norm needs no per-sample gradient in memory.  A sample owns `views` consecutive rows, whose gradients are
summed before the norm.
Gradients are stored as [n, tap, o, c], in the order of the products' rows: `lay_out` brings them to the weight's shape.

All three go through `_sample_tile`, so that a norm is that of the very numbers that are summed, however much the terms of
different positions cancel.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import FLOAT32_PRODUCTS, Planes, below, cdiv, launch, load, planes, undo_stride
from .conv import Conv


def sample_grads_reference(x: Tensor, g: Tensor, conv: Conv, samples: int) -> Tensor:
    """Compute G [samples, O, C, kh, kw] from x [N, C, H, W] and g [N, O, OH, OW], by im2col."""
    columns = F.unfold(x, conv.kernel, conv.dilation, conv.padding, conv.stride)  # [N, C k, P]
    grads = (g.flatten(2) @ columns.mT).view(samples, -1, g.shape[1], x.shape[1], *conv.kernel)
    return grads.sum(1)


def lay_out(grads: Tensor) -> Tensor:
    """View gradients [n, kh, kw, O, C] as [n, O, C, kh, kw]."""
    return grads.permute(0, 3, 4, 1, 2)


@triton.jit
def _sample_tile(
    x, g, n, m, c, C, views, x_row, x_channel, x_position, g_row,
    G_CHANNEL: tl.constexpr, G_POSITION: tl.constexpr,  # constants, so that r adjacent numbers are read at once
    OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BP: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute G[n] at rows m = (tap, o) and channels c, in float32."""
    BLOCKS: tl.constexpr = (H * W + BP - 1) // BP
    FULL: tl.constexpr = SH == 1 and SW == 1 and PH == DH * (KH - 1) and PW == DW * (KW - 1)
    WHOLE_ROWS: tl.constexpr = FULL and BP % W == 0  # a block is whole rows: only its start changes from block to block
    tap, o, block = m // OUT, m % OUT, tl.arange(0, BP)
    down, right = PH - (tap // KW) * DH, PW - (tap % KW) * DW
    real, channel = m < OUT * KH * KW, below(c, C, EVEN)
    acc = tl.zeros((m.shape[0], c.shape[0]), tl.float32)
    for i in tl.range(0, views * BLOCKS, num_stages=STAGES):  # one loop, so that loads are prefetched across views
        row, start = n * views + i // BLOCKS, i % BLOCKS * BP
        q = start + block
        held = below(q, H * W, H * W % BP == 0)
        inside = real[:, None] & held[None, :]
        at = g + row * g_row
        if WHOLE_ROWS:
            at += start // W * OW * G_POSITION
            p = (down * OW + right)[:, None] + (block // W * OW + block % W)[None, :]
        elif FULL:
            p = (down * OW + right)[:, None] + (q // W * OW + q % W)[None, :]
        else:
            h, w = (q // W)[None, :] + down[:, None], (q % W)[None, :] + right[:, None]
            p, inside = undo_stride(h, w, inside, SH, SW, OH, OW)
        shifted = load(at + ((o * G_CHANNEL)[:, None] + p * G_POSITION), inside)
        image_at = x + row * x_row + start * x_position
        image = load(
            image_at + ((block * x_position)[:, None] + (c * x_channel)[None, :]), held[:, None] & channel[None, :]
        )
        acc = tl.dot(shifted, image, acc, input_precision=FLOAT32_PRODUCTS)
    return acc


@triton.jit
def _place(tile, C, ROWS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Find a tile's rows m and channels c, the offsets [BM, BC] of its numbers in a gradient [ROWS, C], and which are real."""
    across = tl.cdiv(C, BC)
    m = (tile // across) * BM + tl.arange(0, BM)
    c = (tile % across) * BC + tl.arange(0, BC)
    return m, c, m[:, None] * C + c[None, :], (m < ROWS)[:, None] & (c < C)[None, :]


@triton.jit
def _norm_kernel(
    x, g, out, squares, C, views, x_row, x_channel, x_position, g_row,
    G_CHANNEL: tl.constexpr, G_POSITION: tl.constexpr,
    OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    STORE: tl.constexpr,  # whether to write G to out, too
):  # fmt: skip
    """Compute squares[n, tile], the sum of G[n]^2 over the tile, in float64, where no square overflows or vanishes."""
    tiles = tl.cdiv(OUT * KH * KW, BM) * tl.cdiv(C, BC)
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    m, c, offsets, real = _place(program % tiles, C, OUT * KH * KW, BM, BC)
    acc = _sample_tile(
        x, g, n, m, c, C, views, x_row, x_channel, x_position, g_row, G_CHANNEL, G_POSITION,
        OUT, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, BP, EVEN, STAGES,
    )  # fmt: skip
    if STORE:
        tl.store(out + n * (OUT * KH * KW) * C + offsets, acc, mask=real)
    exact = acc.to(tl.float64)
    tl.store(squares + program, tl.sum(exact * exact))


@triton.jit
def _weighted_sum_kernel(
    x, g, factors, out, N, EACH, C, views, x_row, x_channel, x_position, g_row,
    G_CHANNEL: tl.constexpr, G_POSITION: tl.constexpr,
    OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute out[part], the sum of factors[n] G[n] over the part's EACH samples; each G[n] is finished before it is scaled."""
    tiles = tl.cdiv(OUT * KH * KW, BM) * tl.cdiv(C, BC)
    program = tl.program_id(0)
    part = (program // tiles).to(tl.int64)
    m, c, offsets, real = _place(program % tiles, C, OUT * KH * KW, BM, BC)
    total = tl.zeros((BM, BC), tl.float32)
    for i in range(EACH):
        n = part * EACH + i
        factor = tl.load(factors + n, mask=n < N, other=0.0)
        acc = _sample_tile(
            x, g, tl.minimum(n, N - 1), m, c, C, views, x_row, x_channel, x_position, g_row, G_CHANNEL, G_POSITION,
            OUT, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, BP, EVEN, STAGES,
        )  # fmt: skip
        total += tl.where(factor == 0.0, 0.0, factor * acc)  # a refused sample may be NaN or inf
    tl.store(out + part * (OUT * KH * KW) * C + offsets, total, mask=real)


def sample_grads(x: Tensor, g: Tensor, conv: Conv, samples: int) -> tuple[Tensor, Tensor]:
    """Compute G [samples, kh, kw, O, C] float32, and squares [samples, tiles] float64, from x [N, C, H, W] and g [N, O, OH, OW].

    The squared norm of G[n] is the sum of squares[n].
    """
    out = torch.empty(samples, *conv.kernel, g.shape[1], x.shape[1], device=x.device)
    return out, _norm(x, g, conv, samples, out)


def sample_grad_squares(x: Tensor, g: Tensor, conv: Conv, samples: int) -> Tensor:
    """Compute the squares of `sample_grads` alone, without storing a per-sample gradient."""
    return _norm(x, g, conv, samples, None)


def weighted_grad_sum(x: Tensor, g: Tensor, conv: Conv, factors: Tensor) -> Tensor:
    """Compute sum_n factors[n] G[n], [kh, kw, O, C] float32, by a second pass over x and g; factors: float32 [samples]."""
    samples, px, pg = len(factors), planes(x), planes(g)
    count, constants = _tiling(px.tensor, pg, conv)
    each = cdiv(samples, max(1, tiles.PROGRAMS // count))  # samples that a program adds up
    parts = torch.empty(cdiv(samples, each), *conv.kernel, g.shape[1], x.shape[1], device=x.device)
    launch(
        _weighted_sum_kernel, count * len(parts),
        px.tensor, pg.tensor, factors, parts, samples, each, x.shape[1], len(x) // samples, *px[1:], pg.row, **constants,
    )  # fmt: skip
    return parts.sum(0)


def _norm(x: Tensor, g: Tensor, conv: Conv, samples: int, out: Tensor | None) -> Tensor:
    px, pg = planes(x), planes(g)
    count, constants = _tiling(px.tensor, pg, conv)
    squares = torch.empty(samples, count, device=x.device, dtype=torch.float64)
    launch(
        _norm_kernel, count * samples,
        px.tensor, pg.tensor, squares if out is None else out, squares, x.shape[1], len(x) // samples, *px[1:], pg.row,
        STORE=out is not None, **constants,
    )  # fmt: skip
    return squares


def _tiling(x: Tensor, pg: Planes, conv: Conv) -> tuple[int, dict[str, int]]:
    """Compute what both kernels need: the number of tiles of a gradient, and the constants of shape and of tiles."""
    (channels, height, width), (outputs, out_height, out_width) = x.shape[1:], pg.tensor.shape[1:]
    if (out_height, out_width) != conv.output_size(height, width):
        raise ValueError(f"g of {out_height} x {out_width} positions is no output of {conv} on {height} x {width}")
    sizes = tiles.gradient(conv, outputs, channels, height * width, x.element_size())
    shape = {"OUT": outputs, "H": height, "W": width, "OH": out_height, "OW": out_width}
    constants = {"G_CHANNEL": pg.channel, "G_POSITION": pg.position, "EVEN": channels % sizes["BC"] == 0}
    count = cdiv(outputs * conv.taps, sizes["BM"]) * cdiv(channels, sizes["BC"])
    return count, constants | shape | conv.constants() | sizes
