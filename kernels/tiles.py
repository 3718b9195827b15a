"""Sizes of the kernels' tiles, by shape and dtype.

These small tables take the place of an autotuner, which would rerun kernels that add in place. Each entry compiles without a
spill for sm_80, sm_90 and sm_100 at the shapes of the paper's U-Net (`scripts/compile_check.py`). None is measured on a GPU yet.

Where `maxnreg` stands, ptxas left alone would spill a few bytes to fit one more block on a multiprocessor (65,536 registers).

float32 products run without tensor cores (no tf32) and are unrolled over the inner axis: it stays at 16, with more warps.
"""

from .blocks import cdiv, power_of_2
from .conv import Conv

PROGRAMS = 1024  # enough to keep a GPU of 132 multiprocessors busy
REDUCTION = 512  # numbers that a program of adapter_backward's second launch adds up
CLIP_SUM = {"BN": 8, "BJ": 512, "num_warps": 4}


def gradient(conv: Conv, outputs: int, channels: int, positions: int, itemsize: int) -> dict[str, int]:
    """Choose the tiles of sample_grad: BM rows (tap, output channel) by BC input channels, summed over BP positions at a time.

    There are eight warps where four would spill: for full layers, of more rows than a tile, and for strides.
    """
    rows = outputs * conv.taps
    sizes = {"BM": min(64, power_of_2(rows)), "STAGES": 3}
    if itemsize == 4:
        return sizes | {"BC": min(32, power_of_2(channels)), "BP": 16, "num_warps": 8, "maxnreg": 128}
    sizes |= {"BC": min(64, power_of_2(channels)), "BP": min(64, power_of_2(positions))}
    if rows <= 64 and conv.stride == (1, 1):
        return sizes | {"num_warps": 4, "maxnreg": 168}
    return sizes | {"num_warps": 8, "maxnreg": 255}


def chunk(samples: int, tiles: int) -> int:
    """Choose how many samples a program of sample_grad's weighted sum adds up; tiles: the number of tiles of one gradient."""
    return cdiv(samples, max(1, PROGRAMS // tiles))


def project(conv: Conv, rank: int, channels: int, width: int, out_height: int, out_width: int, itemsize: int):
    """Choose the tiles of adapter_forward's project: strips of whole rows whose input fits a program; None where none fits."""
    columns, held = power_of_2(rank, at_least=1), 128 if itemsize == 4 else 256
    in_all = power_of_2(columns * conv.taps)
    if in_all > 64 or _rows_held(conv, 1) * width > held:
        return None
    rows = 1
    while rows < out_height and _rows_held(conv, rows + 1) * width <= held:
        rows += 1
    sizes = {"ROWS": rows, "RP": columns, "BM": in_all, "BI": power_of_2(_rows_held(conv, rows) * width)}
    sizes |= {"BO": power_of_2(rows * out_width), "num_warps": 8}
    if itemsize == 4:
        return sizes | {"BC": 16, "STAGES": 2, "maxnreg": 128}
    return sizes | {"BC": min(64, power_of_2(channels)), "STAGES": 3}


def _rows_held(conv: Conv, rows: int) -> int:
    """Count the input rows that so many output rows read."""
    return (rows - 1) * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1


def elementwise(positions: int, channels: int, itemsize: int) -> dict[str, int]:
    """Choose the tiles of adapter_forward's addition to y: BP positions by BC channels."""
    most = 32 if itemsize == 4 else 128
    return {"BP": min(most, power_of_2(positions)), "BC": min(64, power_of_2(channels)), "num_warps": 8}


def backward(positions: int, channels: int, itemsize: int) -> dict[str, int]:
    """Choose the tiles of adapter_backward: BP positions by BC channels of grad_output at a time."""
    positions, channels = power_of_2(positions), power_of_2(channels)
    if itemsize == 4:
        return {"BP": min(32, positions), "BC": 16, "STAGES": 3, "num_warps": 8}
    return {"BP": min(128, positions), "BC": min(64, channels), "STAGES": 3, "num_warps": 4}


def input_grad(rows: int, positions: int, channels: int, itemsize: int) -> dict[str, int]:
    """Choose the tiles of input_grad: BP positions by BC channels of dx, summed over BM pairs (tap, j) at a time."""
    outer = {"BP": min(64, power_of_2(positions)), "BC": min(64, power_of_2(channels))}
    if itemsize == 4:
        return outer | {"BM": 16, "num_warps": 8}
    return outer | {"BM": min(64, power_of_2(rows)), "num_warps": 4}
