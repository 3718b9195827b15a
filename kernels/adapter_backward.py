"""The adapter's backward, from one read of grad_output: gz, and the per-sample gradient of B with its squared norm.

    gz[n, p, :] = phi'(z) . s B^T gy[n, :, p]        gB[n] = s sum_p gy[n, :, p] phi(z[n, :, p])^T

Blocks of positions write their part of gB; a second launch adds the parts of a sample in order, over its views.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import cdiv, launch, load, planes, power_of_2


def adapter_backward_reference(
    gy: Tensor, z: Tensor, B: Tensor, slope: float, scale: float, samples: int
) -> tuple[Tensor, Tensor]:
    """Compute gz [N, r, OH, OW] and gB [samples, O, r, 1, 1] from gy [N, O, OH, OW], z [N, r, OH, OW], B [O, r, 1, 1]."""
    gz = scale * torch.einsum("or,nohw->nrhw", B.flatten(1), gy) * torch.where(z > 0, 1.0, slope)
    gB = scale * torch.einsum("nohw,nrhw->nor", gy, F.leaky_relu(z, slope))
    return gz, gB.view(samples, -1, *gB.shape[1:]).sum(1)[..., None, None]


def add_parts_reference(parts: Tensor, samples: int) -> Tensor:
    """Add the parts [N, blocks, O, r] of each sample's rows: gB [samples, O, r, 1, 1]."""
    return parts.view(samples, -1, *parts.shape[2:]).sum(1)[..., None, None]


@triton.jit
def _backward_kernel(
    gy, z, B, gz, parts, OUT, gy_row, gy_channel, gy_position, z_row, z_channel, z_position, slope, scale,
    P: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute gz[n, p, :] and parts[n, block of p], this block's share of gB[n]."""
    blocks: tl.constexpr = (P + BP - 1) // BP
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    p = (program % blocks).to(tl.int32) * BP + tl.arange(0, BP)
    j = tl.arange(0, RP)
    there = (p < P)[:, None] & (j < R)[None, :]
    low = load(z + n * z_row + p[:, None] * z_position + (j * z_channel)[None, :], there).to(tl.float32)
    h = tl.where(low > 0, low, low * slope)
    back = tl.zeros((BP, RP), tl.float32)
    for start in tl.range(0, OUT, BC, num_stages=STAGES):
        c = start + tl.arange(0, BC)
        down = load(B + c[:, None] * R + j[None, :], (c < OUT)[:, None] & (j < R)[None, :])
        grad = load(
            gy + n * gy_row + p[:, None] * gy_position + (c * gy_channel)[None, :],
            (p < P)[:, None] & (c < OUT)[None, :],
        )
        back = tl.dot(grad, down, back, input_precision="ieee")
        part = tl.dot(tl.trans(grad), h.to(grad.dtype), input_precision="ieee")
        at = parts + (program * OUT + c)[:, None] * R + j[None, :]
        tl.store(at, scale * part, mask=(c < OUT)[:, None] & (j < R)[None, :])
    back = back * tl.where(low > 0, scale, slope * scale)
    tl.store(gz + (n * P + p)[:, None] * R + j[None, :], back, mask=there)


@triton.jit
def _add_parts_kernel(parts, out, squares, SIZE, PARTS: tl.constexpr, BS: tl.constexpr):
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


def adapter_backward(gy: Tensor, z: Tensor, B: Tensor, slope: float, scale: float) -> tuple[Tensor, Tensor]:
    """Compute gz [N, r, OH, OW] in gy's dtype and channels_last memory, and the parts of gB that `add_parts` sums."""
    pg, pz, (outputs, rank) = planes(gy), planes(z), B.shape[:2]
    rows, _, *size = gy.shape
    positions, rank_tile = size[0] * size[1], power_of_2(rank)
    sizes = tiles.backward(positions, outputs, gy.element_size())
    blocks = cdiv(positions, sizes["BP"])
    gz = torch.empty(rows, *size, rank, device=gy.device, dtype=gy.dtype)
    parts = torch.empty(rows, blocks, outputs, rank, device=gy.device)
    launch(
        _backward_kernel, rows * blocks,
        pg.tensor, pz.tensor, B, gz, parts, outputs, *pg[1:], *pz[1:], slope, scale,
        P=positions, R=rank, RP=rank_tile, **sizes,
    )  # fmt: skip
    return gz.permute(0, 3, 1, 2), parts


def add_parts(parts: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Compute gB [samples, O, r, 1, 1] float32, and squares [samples, blocks] float64 whose rows sum to |gB[n]|^2."""
    rows, blocks, outputs, rank = parts.shape
    size = outputs * rank
    block = tiles.REDUCTION
    out = torch.empty(samples, outputs, rank, 1, 1, device=parts.device)
    squares = torch.empty(samples, cdiv(size, block), device=parts.device, dtype=torch.float64)
    launch(_add_parts_kernel, squares.numel(), parts, out, squares, size, PARTS=rows // samples * blocks, BS=block)
    return out, squares
