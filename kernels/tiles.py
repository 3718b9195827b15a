"""Sizes of the kernels' tiles, by shape and dtype.

These small tables take the place of an autotuner, which would rerun kernels that add in place. Each entry compiles without a
spill for sm_80, sm_90 and sm_100 at the shapes of the paper's U-Net (`scripts/compile_check.py`). None is measured on a GPU yet.

`maxnreg` is set where ptxas would otherwise spill a few bytes to fit one more block on a multiprocessor (65,536 registers).

float32 products run without tensor cores (no tf32) and are unrolled over the inner axis: it stays at 16, with more warps.
"""

from functools import cache, lru_cache

import torch

from .blocks import cdiv, power_of_2
from .conv import Conv

PROGRAMS = 1024  # enough to keep a GPU of 132 multiprocessors busy
REDUCTION = 512  # numbers that a program of adapter_backward's second launch adds up
POINTWISE = {"outputs": 128, "channels": 128, "rank": 64}  # the most that a program of pointwise takes
CLIP_SUM = {"BN": 8, "BJ": 512, "num_warps": 4}


@lru_cache
def gradient(conv: Conv, outputs: int, channels: int, positions: int, itemsize: int) -> dict[str, int]:
    """Choose the tiles of sample_grad: BM rows (tap, output channel) by BC input channels, summed over BP positions at a time.

    There are eight warps where four would spill: for full layers, of more rows than a tile, and for strides.
    """
    rows = outputs * conv.taps
    sizes = {
        "BM": min(64, power_of_2(rows)),
        "STAGES": 3 if channels > 64 else 5,
    }  # a single tile of channels has few loads in flight
    if itemsize == 4:
        return sizes | {"BC": min(32, power_of_2(channels)), "BP": 16, "num_warps": 8, "maxnreg": 128}
    sizes |= {"BC": min(64, power_of_2(channels)), "BP": min(64, power_of_2(positions))}
    if rows <= 64 and conv.stride == (1, 1):
        return sizes | {"num_warps": 4, "maxnreg": 168}
    return sizes | {"num_warps": 8, "maxnreg": 255}


@lru_cache
def project(
    conv: Conv, rank: int, channels: int, height: int, width: int, out_height: int, out_width: int, itemsize: int
) -> dict[str, int] | None:
    """Choose the tiles of adapter_forward's project: strips of whole rows whose input fits a program; None where none fits."""

    def held(rows: int) -> int:
        """Count the input positions that `rows` output rows read."""
        of_conv = (rows - 1) * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1
        return min(height, of_conv) * width

    columns, most = power_of_2(rank, at_least=1), 128 if itemsize == 4 else 256
    in_all = power_of_2(columns * conv.taps)
    if in_all > 64 or held(1) > most:
        return None
    rows = 1
    while rows < out_height and held(rows + 1) <= most:
        rows += 1
    sizes = {"ROWS": rows, "RP": columns, "BM": in_all}
    sizes |= {"BI": power_of_2(held(rows)), "BO": power_of_2(rows * out_width)}
    if itemsize == 4:
        return sizes | {"BC": 16, "STAGES": 2, "num_warps": 8, "maxnreg": 255}
    most, warps = (128, 4) if sizes["BI"] <= 64 else (32, 8)
    return sizes | {"BC": min(most, power_of_2(channels)), "STAGES": 3, "num_warps": warps, "maxnreg": 255}


@cache
def resident(device: torch.device) -> int:
    """Count the programs of `project` that run at once: two on each multiprocessor; 132 of those where there is no GPU to ask."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132)


@lru_cache
def elementwise(positions: int, channels: int, itemsize: int) -> dict[str, int]:
    """Choose the tiles of adapter_forward's addition to y: BP positions by BC channels."""
    if itemsize == 4:
        return {"BP": min(32, power_of_2(positions)), "BC": min(64, power_of_2(channels)), "num_warps": 8}
    tile = min(128, power_of_2(channels))
    return {"BP": min(8192 // tile, 128, power_of_2(positions)), "BC": tile, "num_warps": 4}


@lru_cache
def pointwise(channels: int, outputs: int, rank: int) -> dict[str, int]:
    """Choose the tiles of pointwise: BP positions by all outputs, summed over BC channels at a time."""
    tile = power_of_2(outputs)
    sizes = {"BO": tile, "BP": min(128, 8192 // tile), "BC": min(64, power_of_2(channels)), "RP": power_of_2(rank)}
    return sizes | {"STAGES": 3 if channels > sizes["BC"] else 1, "num_warps": 4}


@cache
def from_shared_memory(device: torch.device) -> bool:
    """Tell whether tensor cores read their operands from shared memory: from sm_90 on; before, W must lie in registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def pointwise_backward(positions: int, channels: int, outputs: int, rank: int) -> dict[str, int]:
    """Choose the tiles of pointwise's backward: BP positions at a time by all outputs and channels, SPAN in a program."""
    block, span = min(64, power_of_2(positions)), min(512, power_of_2(positions))
    sizes = {"BP": block, "BO": power_of_2(outputs), "BC": power_of_2(channels), "SPAN": span, "RP": power_of_2(rank)}
    even = outputs == sizes["BO"] and channels == sizes["BC"]
    return sizes | {"EVEN": even, "STAGES": 2 if span > block else 1, "num_warps": 4}


@lru_cache
def backward(
    out_height: int, out_width: int, full_height: int, full_width: int, outputs: int, rank: int, itemsize: int
) -> dict[str, int]:
    """Choose the tiles of adapter_backward: BP positions by BC channels of grad_output at a time, BZ places of gz to set to 0."""
    positions, places = out_height * out_width, full_height * full_width
    tile, channels = power_of_2(positions), power_of_2(outputs)
    if itemsize == 4:
        sizes = {"BP": min(32, tile), "BC": 16, "STAGES": 3, "num_warps": 8}
    else:
        sizes = {"BP": min(128, tile), "BC": min(128 if tile <= 64 else 64, channels), "num_warps": 4}
        sizes["STAGES"] = 3 if channels > sizes["BC"] else 1
    sizes |= {"FH": full_height, "FW": full_width, "RP": power_of_2(rank), "RZ": power_of_2(rank, at_least=1)}
    share = cdiv(places, cdiv(positions, sizes["BP"]))
    return sizes | {"BZ": min(power_of_2(share), max(16, 1024 // sizes["RZ"])), "EVEN": outputs % sizes["BC"] == 0}


@lru_cache
def input_grad(rows: int, positions: int, channels: int, itemsize: int) -> dict[str, int]:
    """Choose the tiles of input_grad: BP positions by BC channels of dx, summed over BM pairs (tap, j) at a time."""
    if itemsize == 4:
        outer = {"BP": min(64, power_of_2(positions)), "BC": min(64, power_of_2(channels))}
        return outer | {"BM": 16, "num_warps": 8}
    outer = {"BP": min(64, power_of_2(positions)), "BC": min(128, power_of_2(channels))}
    return outer | {"BM": min(64, power_of_2(rows)), "num_warps": 4}
