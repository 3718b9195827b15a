"""The planner, which chooses how to get a layer call's norms and clipped sum.

- *kept*: the per-sample gradients are stored, samples x parameters numbers, and both are read from them.
- *made again*: the activations and output gradients stay alive until the clip factors are known; the gradients are made once for
  the norm and once for the sum, a few samples at a time.
- *ghost*: the norm comes from Gram matrices and the sum from one product, both in float64 (`rules/gram.py`), which makes the norm
  a tight upper bound. Only for linear maps on the CPU: on a GPU the Triton kernels store no gradient either.

Adapters are far smaller than their activations, so their gradients are kept. The weights of a full layer at low resolution are
larger, so their gradients are made again, or never made. Flops are counted by opt_einsum, bytes by what is read and written.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from opt_einsum import contract_path
from torch import Tensor

# Gradients of up to four times the recipe's bytes are kept. Memory allows it: it peaks at the start of backward, with the
# forward's activations, which are freed as gradients arrive. Twice would save a sixth of a WideResNet's peak, and cost a sixth
# of its time on two threads (bench/NOTES.md, 18).
KEEP_FACTOR = 4.0
# Kernels that store no gradient read the recipe twice; keeping writes the gradients and reads them. Fewer bytes win.
FUSED_KEEP_FACTOR = 0.5
# Ghost must cost less than this share of what it replaces, as the counts say nothing of how efficiently each way runs.
GHOST_FACTOR = 0.5
FLOPS_PER_BYTE = 8  # the flops of float32 that a CPU core computes while it moves a byte to memory
# Passes over a kept gradient: write, read for the norm, remove NaN, weight, sum. Made again, it is written twice.
KEPT_PASSES, AGAIN_PASSES = 6, 8
CHUNK_NUMBERS = 1 << 24  # numbers of gradients that `vmap` makes at a time: 64 MiB of float32
# From so many output positions on, the CPU calls PyTorch's own kernel for each sample of a convolution (bench/NOTES.md, 15).
MANY_POSITIONS = 256
SCRATCH_BYTES = {"cpu": 4 << 20}  # temporaries that stay in a CPU's cache
DEVICE_SCRATCH_BYTES = 128 << 20  # small beside the memory of a GPU or another accelerator


class Way(StrEnum):
    """The ways to the norms and the clipped sum of a layer call; the module's docstring describes them."""

    KEPT = "kept"
    AGAIN = "made again"
    GHOST = "ghost"


class Cost(NamedTuple):
    """The cost of one way for one layer call."""

    held: int  # bytes held until the clip factors are known
    moved: int  # bytes moved to and from memory
    flops: int  # those in float64 count twice

    @property
    def time(self) -> float:
        """The time that the way takes, in units of one byte moved."""
        return self.moved + self.flops / FLOPS_PER_BYTE


class Sizes(NamedTuple):
    """The sizes of one layer call's gradient for one parameter, on which alone the choice depends."""

    samples: int
    numbers: int  # the parameter's numel
    recipe: int  # bytes of the recipe's tensors
    product: tuple[str, tuple] | None = None  # einsum's equation and shapes, over all samples; None: element by element
    fused: bool = False  # whether kernels take norms and sum from the recipe without storing gradients
    ghost: bool = False  # whether the Gram's norm is an upper bound for this call


@lru_cache(4096)
def costs(sizes: Sizes) -> dict[Way, Cost]:
    """Count the cost of every way that is open to a call of these sizes."""
    gradients = 4 * sizes.samples * sizes.numbers
    flops = product_flops(*sizes.product) if sizes.product else 2 * sizes.recipe // 4
    ways = {
        Way.KEPT: Cost(gradients, sizes.recipe + KEPT_PASSES * gradients, flops),
        Way.AGAIN: Cost(sizes.recipe, 2 * sizes.recipe + AGAIN_PASSES * gradients, 2 * flops),
    }
    if sizes.fused:
        ways[Way.AGAIN] = Cost(sizes.recipe, 2 * sizes.recipe, 2 * flops)
    if sizes.ghost and sizes.product:  # a linear map, whose gradient is a product
        gram = gram_flops(sizes.samples, sizes.product[1])
        ways[Way.GHOST] = Cost(sizes.recipe, 10 * sizes.recipe, 2 * (flops + gram))
    return ways


def choose(sizes: Sizes) -> Way:
    """Choose the way for a call of these sizes."""
    factor = FUSED_KEEP_FACTOR if sizes.fused else KEEP_FACTOR
    way = Way.KEPT if 4 * sizes.samples * sizes.numbers <= factor * sizes.recipe else Way.AGAIN
    if sizes.ghost and GHOST_FACTOR:
        cost = costs(sizes)
        if cost[Way.GHOST].time <= GHOST_FACTOR * cost[way].time:
            return Way.GHOST
    return way


@lru_cache(4096)
def product_flops(equation: str, shapes: tuple) -> int:
    """Count an einsum's flops by opt_einsum, multiplications and additions."""
    return int(contract_path(equation, *shapes, shapes=True)[1].opt_cost)


def gram_flops(samples: int, shapes: tuple) -> int:
    """Count the flops of sum_ts <x_t, x_s> <g_t, g_s> for each sample of a linear map, shapes (rows, C) and (rows, O)."""
    (rows, inputs), (_, outputs) = shapes
    positions = rows // samples
    if positions == 1:  # |x|^2 |g|^2
        return 2 * rows * (inputs + outputs)
    grams = [product_flops("tc,sc->ts", ((positions, width),) * 2) for width in (inputs, outputs)]
    return samples * (sum(grams) + product_flops("ts,ts->", ((positions, positions),) * 2))


def chunk_samples(parameter_numbers: int) -> int:
    """Compute how many samples' gradients to make at a time, for a parameter of so many numbers."""
    return max(1, CHUNK_NUMBERS // parameter_numbers)


def calls_for_each_sample(x: Tensor, kernel: Sequence[int], positions: int) -> bool:
    """Tell whether a convolution's gradients come from PyTorch's own kernel, called once for each sample."""
    return x.device.type == "cpu" and prod(kernel) > 1 and positions >= MANY_POSITIONS


def rows_at_a_time(count: int, scratch_bytes: int, device: torch.device) -> int:
    """Compute how many of `count` rows to take at a time, if all at once need `scratch_bytes` of temporaries."""
    return max(1, count * SCRATCH_BYTES.get(device.type, DEVICE_SCRATCH_BYTES) // max(1, scratch_bytes))


def split_rows(count: int, scratch_bytes: int, device: torch.device) -> Iterator[slice]:
    """Split 0..count into slices of `rows_at_a_time` rows."""
    step = rows_at_a_time(count, scratch_bytes, device)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
