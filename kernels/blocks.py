"""The parts that the kernels share: how memory is read, and how tensors are described to them.

Conventions.  N rows (samples x views), C channels in, O channels out, r the rank, q input positions, p output positions.
Products take their operands as they are stored (float16, bfloat16 or float32) and accumulate in float32; results are cast when
they are stored.  Offsets of rows are int64, those within a row int32.  No atomics: a number is summed by one program, in one
order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# How operands in float32 are multiplied: in full. Three products of tf32 ("tf32x3") would use tensor cores; scripts/gpu_check
# measures what that gains, and whether norms and sums are still of the same numbers, which the interpreter can't tell.
FLOAT32_PRODUCTS = tl.constexpr("ieee")


@triton.jit
def load(pointers, mask):
    """Load a tile, 0 outside the mask.  Triton's interpreter multiplies the raw bits of bfloat16: there it becomes float32."""
    tile = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def undo_stride(h, w, inside, SH: tl.constexpr, SW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr):
    """Divide (h, w) by the stride; return the output position h OW + w, and where such a position exists, among `inside`."""
    inside = inside & (h >= 0) & (w >= 0)
    if SH > 1:
        inside = inside & (h % SH == 0)
        h = h // SH
    if SW > 1:
        inside = inside & (w % SW == 0)
        w = w // SW
    return h * OW + w, inside & (h < OH) & (w < OW)


@triton.jit
def below(i, SIZE, EVEN: tl.constexpr):
    """Tell which indices are below SIZE. EVEN: tiles divide SIZE, so that all are and none need be compared with it."""
    return i >= 0 if EVEN else i < SIZE


class Planes(NamedTuple):
    """A tensor [N, channels, H, W] with one stride from position to position, and its strides of row, channel and position."""

    tensor: Tensor
    row: int
    channel: int
    position: int


def planes(t: Tensor) -> Planes:
    """Describe t [N, channels, H, W]; copy it first if its positions have no single stride (contiguous and channels_last do)."""
    height, width = t.shape[2:]
    if width > 1 and height > 1 and t.stride(2) != width * t.stride(3):
        t = t.contiguous()
    return Planes(t, t.stride(0), t.stride(1), t.stride(3) if width > 1 else t.stride(2))


def positions_last(t: Tensor) -> Tensor:
    """Lay t [N, r, H, W] out as [N, H, W, r] without gaps, which is no copy for what these kernels write."""
    return t.permute(0, 2, 3, 1).contiguous()


def launch(kernel, programs: int | tuple[int, int], tensor: Tensor, *arguments, **constants) -> None:
    """Launch `programs` programs of the kernel, in one dimension or two, on the GPU that holds `tensor`, its first argument."""
    with torch.cuda.device_of(tensor):
        kernel[programs if isinstance(programs, tuple) else (programs,)](tensor, *arguments, **constants)


def power_of_2(size: int, at_least: int = 16) -> int:
    """Compute the side of a tile that covers `size`: a power of 2, at least 16 for tensor cores."""
    return max(at_least, triton.next_power_of_2(size))


def cdiv(a: int, b: int) -> int:
    """Compute a / b, rounded up."""
    return -(-a // b)
