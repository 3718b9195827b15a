"""A whole 1 x 1 layer, the frozen product with its bias and the adapter: x is read once forward, x, z and gy once backward.

    z[q, :] = A x[q, :]                             y[q, :]  = W x[q, :] + b + s B phi(z[q, :])
    gz[q, :] = phi'(z[q, :]) . s B^T gy[q, :]       dx[q, :] = W^T gy[q, :] + A^T gz[q, :]
    gA[n] = sum_q gz[q, :] x[q, :]^T                gB[n]    = s sum_q gy[q, :] phi(z[q, :])^T

q counts the positions of all images, adjacent in channels_last memory.  One tile holds all outputs, and in backward all channels.
Spans of an image's positions write their parts of gA and gB; `adapter_backward.add_parts` adds the parts of a sample in order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .adapter_backward import Parts
from .adapter_forward import add_reference
from .blocks import below, cdiv, launch, load, positions_last
from .conv import Conv


def serves(x: Tensor, weight: Tensor, A: Tensor, conv: Conv) -> bool:
    """Tell whether `forward` can compute this layer: 1 x 1, no groups, 16 bits, channels_last, outputs that fit one tile."""
    (outputs, channels), rank = weight.shape[:2], len(A)
    small = x.element_size() == 2 and outputs <= tiles.POINTWISE["outputs"] and rank <= tiles.POINTWISE["rank"]
    dense = x.is_contiguous(memory_format=torch.channels_last)
    return small and dense and conv == Conv((1, 1)) and channels == x.shape[1]


def serves_backward(x: Tensor, weight: Tensor, A: Tensor, conv: Conv) -> bool:
    """Tell whether `backward` can compute this layer: as `serves`, with channels that fit one tile, on sm_90 or later."""
    small = weight.shape[1] <= tiles.POINTWISE["channels"]
    return small and serves(x, weight, A, conv) and tiles.from_shared_memory(x.device)


def forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, slope: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute y and z for x [N, C, H, W], weight [O, C, 1, 1], A [r, C, 1, 1], B [O, r, 1, 1]."""
    z = F.conv2d(x, A)
    return add_reference(F.conv2d(x, weight), z, B, bias, slope, scale), z


def backward_reference(
    gy: Tensor, x: Tensor, z: Tensor, weight: Tensor, A: Tensor, B: Tensor, slope: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx [N, C, H, W], and for each image gA [N, r, C] and gB [N, O, r]."""
    gz = scale * torch.einsum("or,nohw->nrhw", B.flatten(1), gy) * torch.where(z > 0, 1.0, slope)
    dx = torch.einsum("oc,nohw->nchw", weight.flatten(1), gy) + torch.einsum("rc,nrhw->nchw", A.flatten(1), gz)
    gB = scale * torch.einsum("nohw,nrhw->nor", gy, F.leaky_relu(z, slope))
    return dx, torch.einsum("nrhw,nchw->nrc", gz, x), gB


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


@triton.jit
def _pointwise_backward_kernel(
    gy, x, z, W, A, B, dx, of_A, squares_A, of_B, squares_B, C, OUT, slope, scale,
    P: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, SPAN: tl.constexpr,  # BP positions at a time, SPAN in all
    EVEN: tl.constexpr, STAGES: tl.constexpr,  # EVEN: outputs and channels fill their tiles
):  # fmt: skip
    """Compute dx at a span of one image's positions, and of_A[n, span] and of_B[n, span], the span's shares of gA and gB.

    If an image is one span, squares_A[n] and squares_B[n] are the shares' squared norms, in float64, as in adapter_backward.
    """
    spans: tl.constexpr = (P + SPAN - 1) // SPAN
    program = tl.program_id(0).to(tl.int64)
    image, at = program // spans * P, (program % spans).to(tl.int32) * SPAN
    o, c, j = tl.arange(0, BO), tl.arange(0, BC), tl.arange(0, RP)
    out, channel, real = below(o, OUT, EVEN), below(c, C, EVEN), j < R
    frozen = load(W + o[:, None] * C + c[None, :], out[:, None] & channel[None, :])
    down = load(A + j[:, None] * C + c[None, :], real[:, None] & channel[None, :])
    up = load(B + o[:, None] * R + j[None, :], out[:, None] & real[None, :])
    grad_A, grad_B = tl.zeros((BC, RP), tl.float32), tl.zeros((BO, RP), tl.float32)
    for start in tl.range(0, SPAN, BP, num_stages=STAGES, disable_licm=True):  # licm would keep W in registers
        q = at + start + tl.arange(0, BP)
        there = below(q, P, P % SPAN == 0)
        grad = load(gy + image * OUT + (q[:, None] * OUT + o[None, :]), there[:, None] & out[None, :])
        held = load(x + image * C + (q[:, None] * C + c[None, :]), there[:, None] & channel[None, :])
        low = load(z + image * R + (q[:, None] * R + j[None, :]), there[:, None] & real[None, :]).to(tl.float32)
        h = tl.where(low > 0, low, low * slope).to(grad.dtype)
        gz = tl.dot(grad, up) * tl.where(low > 0, scale, slope * scale)
        gz = gz.to(gy.dtype.element_ty).to(grad.dtype)
        grad_A = tl.dot(tl.trans(held), gz, grad_A)
        grad_B = tl.dot(tl.trans(grad), h, grad_B)
        back = tl.dot(gz, down, tl.dot(grad, frozen))
        tl.store(dx + image * C + (q[:, None] * C + c[None, :]), back, mask=there[:, None] & channel[None, :])
    grad_B = scale * grad_B
    of_channels, of_outputs = real[None, :] & channel[:, None], real[None, :] & out[:, None]
    tl.store(of_A + program * C * R + j[None, :] * C + c[:, None], grad_A, mask=of_channels)
    tl.store(of_B + (program * OUT + o)[:, None] * R + j[None, :], grad_B, mask=of_outputs)
    if spans == 1:
        exact_A = tl.where(of_channels, grad_A, 0.0).to(tl.float64)
        exact_B = tl.where(of_outputs, grad_B, 0.0).to(tl.float64)
        tl.store(squares_A + program, tl.sum(exact_A * exact_A))
        tl.store(squares_B + program, tl.sum(exact_B * exact_B))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, slope: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute y and z in channels_last memory, for a layer that `serves` accepts."""
    (outputs, channels), rank, (rows, _, *size) = weight.shape[:2], len(A), x.shape
    empty = lambda width: torch.empty(rows, *size, width, device=x.device, dtype=x.dtype)  # noqa: E731
    y, z = empty(outputs), empty(rank)
    positions, sizes = rows * size[0] * size[1], tiles.pointwise(channels, outputs, rank)
    even = outputs == sizes["BO"] and channels % sizes["BC"] == 0 and positions % sizes["BP"] == 0
    launch(
        _pointwise_kernel, cdiv(positions, sizes["BP"]),
        positions_last(x), weight.contiguous(), bias, A.contiguous(), B.contiguous(), y, z, positions, channels, outputs,
        slope, scale, R=rank, EVEN=even, **sizes,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)


def backward(
    gy: Tensor, x: Tensor, z: Tensor, weight: Tensor, A: Tensor, B: Tensor, slope: float, scale: float
) -> tuple[Tensor, Parts, Parts]:
    """Compute dx, and the parts of gA and gB that `adapter_backward.add_parts` sums; for what `serves_backward` accepts."""
    (outputs, channels), rank, (rows, _, *size) = weight.shape[:2], len(A), x.shape
    positions = size[0] * size[1]
    sizes = tiles.pointwise_backward(positions, channels, outputs, rank)
    spans = cdiv(positions, sizes["SPAN"])
    dx = torch.empty(rows, *size, channels, device=x.device, dtype=x.dtype)
    of_A = Parts.empty(rows, spans, rank, channels, x.device)
    of_B = Parts.empty(rows, spans, outputs, rank, x.device)
    launch(
        _pointwise_backward_kernel, rows * spans,
        positions_last(gy), positions_last(x), positions_last(z), weight.contiguous(), A.contiguous(), B.contiguous(),
        dx, *of_A, *of_B, channels, outputs, slope, scale, P=positions, R=rank, **sizes,
    )  # fmt: skip
    return dx.permute(0, 3, 1, 2), of_A, of_B
