"""How to get a layer call's norms and clipped sum: keep its per-sample gradients, make them twice, or make only their norms?

- *kept*: samples x parameters numbers, from which both are read.
- *made again*: keeps the activations and output gradients alive until the clip factors are known, and makes the gradients
  once for the norm and once for the sum, a few samples at a time.
- *ghost*: the norm from Gram matrices, the sum by one product, both in float64 (`rules/gram.py`), which is what makes the norm an
  upper bound that is also tight. Only for linear maps on the CPU: on GPUs kernels store no gradient either.

Adapters are far smaller than their activations, so their gradients are kept; the weights of a full layer at low resolution
are larger, so they are made again, or are not made at all. Flops are counted by opt_einsum, bytes by what is read and written.
"""

from collections.abc import Iterator
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from opt_einsum import contract_path

# Time first, while memory allows: at the start of backward the forward's activations are the peak, and they are freed
# as gradients arrive. Four times the recipe's bytes (r = 4, 3 x 3, 4 x 4 positions: 2.25) stays below that peak.
KEEP_FACTOR = 4.0
# Kernels that store no gradient read the recipe twice; keeping writes the gradients and reads them. Fewer bytes win.
FUSED_KEEP_FACTOR = 0.5
# Ghost must cost less than this share of what it replaces: the counts say nothing of how well each way runs.
GHOST_FACTOR = 0.5
FLOPS_PER_BYTE = 8  # of a CPU core: what it computes in float32 while it moves a byte to memory
# A gradient is written, then read for the norm; cleared of NaN, weighted and summed. Composite again, it is written twice.
KEPT_PASSES, AGAIN_PASSES = 6, 8
CHUNK_NUMBERS = 1 << 24  # gradients made again at a time: 64 MiB of float32
SCRATCH_BYTES = {"cpu": 4 << 20}  # stays in a CPU's cache
DEVICE_SCRATCH_BYTES = 128 << 20  # small beside the memory of a GPU or another accelerator


class Way(StrEnum):
    KEPT = "kept"
    AGAIN = "made again"
    GHOST = "ghost"


class Cost(NamedTuple):
    """What a way holds until the clip factors are known, what it moves to and from memory, and what it computes."""

    held: int  # bytes
    moved: int  # bytes
    flops: int  # float64's count twice

    @property
    def time(self) -> float:
        """In bytes moved."""
        return self.moved + self.flops / FLOPS_PER_BYTE


class Sizes(NamedTuple):
    """The sizes of one layer call's gradient for one parameter, which are all that the choice depends on."""

    samples: int
    numbers: int  # of the parameter
    recipe: int  # bytes of what its gradients are made of
    product: tuple[str, tuple] | None = None  # einsum's equation and shapes, over all samples; None: element by element
    fused: bool = False  # kernels take the recipe's norms and sum without storing gradients
    ghost: bool = False  # the Gram's norm can be an upper bound here


@lru_cache(4096)
def costs(sizes: Sizes) -> dict[Way, Cost]:
    """The cost of every way that is open to the sizes."""
    gradients = 4 * sizes.samples * sizes.numbers
    flops = product_flops(*sizes.product) if sizes.product else 2 * sizes.recipe // 4
    ways = {
        Way.KEPT: Cost(gradients, sizes.recipe + KEPT_PASSES * gradients, flops),
        Way.AGAIN: Cost(sizes.recipe, 2 * sizes.recipe + AGAIN_PASSES * gradients, 2 * flops),
    }
    if sizes.fused:
        ways[Way.AGAIN] = Cost(sizes.recipe, 2 * sizes.recipe, 2 * flops)
    if sizes.ghost and sizes.product:  # of a linear map, which is one
        gram = gram_flops(sizes.samples, sizes.product[1])
        ways[Way.GHOST] = Cost(sizes.recipe, 10 * sizes.recipe, 2 * (flops + gram))
    return ways


def choose(sizes: Sizes) -> Way:
    factor = FUSED_KEEP_FACTOR if sizes.fused else KEEP_FACTOR
    way = Way.KEPT if 4 * sizes.samples * sizes.numbers <= factor * sizes.recipe else Way.AGAIN
    if sizes.ghost and GHOST_FACTOR:
        cost = costs(sizes)
        if cost[Way.GHOST].time <= GHOST_FACTOR * cost[way].time:
            return Way.GHOST
    return way


@lru_cache(4096)
def product_flops(equation: str, shapes: tuple) -> int:
    """By opt_einsum: a multiplication and an addition are two."""
    return int(contract_path(equation, *shapes, shapes=True)[1].opt_cost)


def gram_flops(samples: int, shapes: tuple) -> int:
    """sum_ts <x_t, x_s> <g_t, g_s> for each sample of a linear map."""
    (rows, inputs), (_, outputs) = shapes
    positions = rows // samples
    if positions == 1:  # |x|^2 |g|^2
        return 2 * rows * (inputs + outputs)
    grams = [product_flops("tc,sc->ts", ((positions, width),) * 2) for width in (inputs, outputs)]
    return samples * (sum(grams) + product_flops("ts,ts->", ((positions, positions),) * 2))


def chunk_samples(parameter_numbers: int) -> int:
    """How many samples' gradients to make at a time."""
    return max(1, CHUNK_NUMBERS // parameter_numbers)


def rows_at_a_time(count: int, scratch_bytes: int, device: torch.device) -> int:
    """Of `count` rows, where all of them at once would need `scratch_bytes` of temporaries."""
    return max(1, count * SCRATCH_BYTES.get(device.type, DEVICE_SCRATCH_BYTES) // max(1, scratch_bytes))


def split_rows(count: int, scratch_bytes: int, device: torch.device) -> Iterator[slice]:
    """0..count in slices of so many rows."""
    step = rows_at_a_time(count, scratch_bytes, device)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
