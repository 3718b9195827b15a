"""Per-sample gradients of a convolution's weight: with their norms, their norms only, or their sum with known factors.

    G[n, o, c, k] = sum_q g[n, o, (q + padding - k dilation) / stride] x[n, c, q]

For a LoDA adapter g is gz, with r channels: the taps are folded with them into one axis, g is shifted, and x is read once and
never expanded.  For a full layer g is grad_output, and the norm needs no per-sample gradient in memory.  A sample owns `views`
consecutive rows, whose gradients are summed before the norm.

All three go through `_sample_tile`, so that a norm is that of the very numbers that are summed, however the positions cancel.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import Planes, cdiv, launch, load, planes, undo_stride
from .conv import Conv


def sample_grads_reference(x: Tensor, g: Tensor, conv: Conv, samples: int) -> Tensor:
    """Compute G [samples, O, C, kh, kw] from x [N, C, H, W] and g [N, O, OH, OW], by im2col."""
    columns = F.unfold(x, conv.kernel, conv.dilation, conv.padding, conv.stride)  # [N, C k, P]
    grads = (g.flatten(2) @ columns.mT).view(samples, -1, g.shape[1], x.shape[1], *conv.kernel)
    return grads.sum(1)


@triton.jit
def _sample_tile(
    x, g, n, m, c, C, x_row, x_channel, x_position, g_row,
    G_CHANNEL: tl.constexpr, G_POSITION: tl.constexpr,  # constants, so that r adjacent numbers are read at once
    OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    VIEWS: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute G[n] at rows m = (tap, o) and channels c, in float32."""
    BLOCKS: tl.constexpr = (H * W + BP - 1) // BP
    tap, o = m // OUT, m % OUT
    down, right = PH - (tap // KW) * DH, PW - (tap % KW) * DW
    acc = tl.zeros((m.shape[0], c.shape[0]), tl.float32)
    for i in tl.range(0, VIEWS * BLOCKS, num_stages=STAGES):  # one loop, so that loads are prefetched across views
        row = n * VIEWS + i // BLOCKS
        q = (i % BLOCKS) * BP + tl.arange(0, BP)
        h = (q // W)[None, :] + down[:, None]
        w = (q % W)[None, :] + right[:, None]
        p, inside = undo_stride(h, w, (tap < KH * KW)[:, None] & (q < H * W)[None, :], SH, SW, OH, OW)
        shifted = load(g + row * g_row + (o * G_CHANNEL)[:, None] + p * G_POSITION, inside)
        there = (q < H * W)[:, None] & (c < C)[None, :]
        acc = tl.dot(
            shifted,
            load(x + row * x_row + q[:, None] * x_position + (c * x_channel)[None, :], there),
            acc,
            input_precision="ieee",
        )
    return acc


@triton.jit
def _place(tile, C, OUT: tl.constexpr, TAPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Find a tile's rows m and channels c, the offsets [BM, BC] of its numbers in a weight [O, C, taps], and which exist."""
    across = tl.cdiv(C, BC)
    m = (tile // across) * BM + tl.arange(0, BM)
    c = (tile % across) * BC + tl.arange(0, BC)
    offsets = ((m % OUT)[:, None] * C + c[None, :]) * TAPS + (m // OUT)[:, None]
    return m, c, offsets, (m < OUT * TAPS)[:, None] & (c < C)[None, :]


@triton.jit
def _norm_kernel(
    x, g, out, squares, C, x_row, x_channel, x_position, g_row,
    G_CHANNEL: tl.constexpr, G_POSITION: tl.constexpr,
    OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    VIEWS: tl.constexpr, TILES: tl.constexpr, STORE: tl.constexpr,  # STORE: also G
    BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute squares[n, tile], the sum of G[n]^2 over the tile, in float64, where no square overflows or vanishes."""
    program = tl.program_id(0).to(tl.int64)
    n = program // TILES
    m, c, offsets, real = _place((program % TILES).to(tl.int32), C, OUT, KH * KW, BM, BC)
    acc = _sample_tile(
        x, g, n, m, c, C, x_row, x_channel, x_position, g_row, G_CHANNEL, G_POSITION,
        OUT, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, VIEWS, BP, STAGES,
    )  # fmt: skip
    if STORE:
        tl.store(out + n * (OUT * KH * KW) * C + offsets, acc, mask=real)
    exact = acc.to(tl.float64)
    tl.store(squares + program, tl.sum(exact * exact))


@triton.jit
def _weighted_sum_kernel(
    x, g, factors, out, N, C, x_row, x_channel, x_position, g_row,
    G_CHANNEL: tl.constexpr, G_POSITION: tl.constexpr,
    OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    VIEWS: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute out[chunk], the sum of factors[n] G[n] over the chunk's samples; each G[n] is finished before it is scaled."""
    program = tl.program_id(0).to(tl.int64)
    part = program // TILES
    m, c, offsets, real = _place((program % TILES).to(tl.int32), C, OUT, KH * KW, BM, BC)
    total = tl.zeros((BM, BC), tl.float32)
    for i in range(CHUNK):
        n = part * CHUNK + i
        factor = tl.load(factors + n, mask=n < N, other=0.0)
        acc = _sample_tile(
            x, g, tl.minimum(n, N - 1), m, c, C, x_row, x_channel, x_position, g_row, G_CHANNEL, G_POSITION,
            OUT, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, VIEWS, BP, STAGES,
        )  # fmt: skip
        total += tl.where(factor == 0.0, 0.0, factor * acc)  # a refused sample may be NaN or inf
    tl.store(out + part * (OUT * KH * KW) * C + offsets, total, mask=real)


def sample_grads(x: Tensor, g: Tensor, conv: Conv, samples: int) -> tuple[Tensor, Tensor]:
    """Compute G [samples, O, C, kh, kw] float32, and squares [samples, tiles] float64, from x [N, C, H, W] and g [N, O, OH, OW].

    The squared norm of G[n] is the sum of squares[n].
    """
    out = torch.empty(samples, g.shape[1], x.shape[1], *conv.kernel, device=x.device)
    return out, _norm(x, g, conv, samples, out)


def sample_grad_squares(x: Tensor, g: Tensor, conv: Conv, samples: int) -> Tensor:
    """Compute the squares of `sample_grads` alone, without storing a per-sample gradient."""
    return _norm(x, g, conv, samples, None)


def weighted_grad_sum(x: Tensor, g: Tensor, conv: Conv, factors: Tensor) -> Tensor:
    """Compute sum_n factors[n] G[n], [O, C, kh, kw] float32, by a second pass over x and g; factors: float32 [samples]."""
    samples, px, pg = len(factors), planes(x), planes(g)
    count, constants, sizes = _tiling(px.tensor, pg, conv, samples)
    chunk = tiles.chunk(samples, count)
    parts = torch.empty(cdiv(samples, chunk), g.shape[1], x.shape[1], *conv.kernel, device=x.device)
    launch(
        _weighted_sum_kernel, count * len(parts),
        px.tensor, pg.tensor, factors, parts, samples, x.shape[1], *px[1:], pg.row,
        **constants, TILES=count, CHUNK=chunk, **sizes,
    )  # fmt: skip
    return parts.sum(0)


def _norm(x: Tensor, g: Tensor, conv: Conv, samples: int, out: Tensor | None) -> Tensor:
    px, pg = planes(x), planes(g)
    count, constants, sizes = _tiling(px.tensor, pg, conv, samples)
    squares = torch.empty(samples, count, device=x.device, dtype=torch.float64)
    launch(
        _norm_kernel, count * samples,
        px.tensor, pg.tensor, squares if out is None else out, squares, x.shape[1], *px[1:], pg.row,
        **constants, TILES=count, STORE=out is not None, **sizes,
    )  # fmt: skip
    return squares


def _tiling(x: Tensor, pg: Planes, conv: Conv, samples: int) -> tuple[int, dict[str, int], dict[str, int]]:
    """Compute what both kernels take: the number of tiles of a gradient, the constants of shape, the sizes of tiles."""
    (channels, height, width), (outputs, out_height, out_width) = x.shape[1:], pg.tensor.shape[1:]
    sizes = tiles.gradient(conv, outputs, channels, height * width, x.element_size())
    shape = {"OUT": outputs, "H": height, "W": width, "OH": out_height, "OW": out_width}
    constants = {"G_CHANNEL": pg.channel, "G_POSITION": pg.position, **shape, **conv.constants()}
    count = cdiv(outputs * conv.taps, sizes["BM"]) * cdiv(channels, sizes["BC"])
    return count, constants | {"VIEWS": len(x) // samples}, sizes
