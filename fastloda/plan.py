"""Keep the per-sample gradients of a layer call, or keep what they are made of and make them twice?

Keeping costs samples x parameters numbers; making them again costs one more matrix product and keeps the activations
and output gradients alive until the clip factors are known. Adapters are far smaller than their activations, so
their gradients are kept; the weights of a full layer at low resolution are larger, so they are made again.

The third way, the Gram (ghost) norm |g|^2 = <X X^T, G G^T>, is not used: when the positions of a sample cancel, the Gram's
rounding error hides a gradient many times the clipping norm, and a norm that underestimates breaks the guarantee.
"""

from collections.abc import Iterator

import torch

# Time first, while memory allows: at the start of backward the forward's activations are the peak, and they are freed
# as gradients arrive. Four times the recipe's bytes (r = 4, 3 x 3, 4 x 4 positions: 2.25) stays below that peak.
KEEP_FACTOR = 4.0
# Kernels that store no gradient read the recipe twice; keeping writes the gradients and reads them. Fewer bytes win.
FUSED_KEEP_FACTOR = 0.5
CHUNK_NUMBERS = 1 << 24  # gradients made again at a time: 64 MiB of float32
SCRATCH_BYTES = {"cpu": 4 << 20}  # stays in a CPU's cache
DEVICE_SCRATCH_BYTES = 128 << 20  # small beside the memory of a GPU or another accelerator


def keep_gradients(numbers: int, recipe_bytes: int, fused: bool = False) -> bool:
    """Whether `numbers` float32 gradients are to be kept rather than their recipe of `recipe_bytes`.

    fused: kernels take the recipe's norms and sum without storing gradients.
    """
    return 4 * numbers <= (FUSED_KEEP_FACTOR if fused else KEEP_FACTOR) * recipe_bytes


def chunk_samples(parameter_numbers: int) -> int:
    """How many samples' gradients to make at a time."""
    return max(1, CHUNK_NUMBERS // parameter_numbers)


def split_rows(count: int, scratch_bytes: int, device: torch.device) -> Iterator[slice]:
    """0..count in slices, where all of it at once would need `scratch_bytes` of temporaries."""
    step = max(1, count * SCRATCH_BYTES.get(device.type, DEVICE_SCRATCH_BYTES) // max(1, scratch_bytes))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
