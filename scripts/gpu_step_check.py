"""A private step of an adapted model on the GPU against the truth: one backward pass per sample, in float64, on the CPU.

    python scripts/gpu_step_check.py [--device cpu]

Right is an error of at most twice that of PyTorch itself, in the same dtype on the same device.
"""

import argparse
import copy
import itertools
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import oracle  # noqa: E402

from fastloda import GhostClipper, attach_loda  # noqa: E402
from fastloda.loda import arithmetic as ops  # noqa: E402
from fastloda.synthesis.diffusion import digits_unet  # noqa: E402

SAMPLES, VIEWS = 6, 2
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDING = 1e-5  # of float32 sums, where PyTorch's own error happens to be smaller


def adapted_unet() -> nn.Module:
    torch.manual_seed(0)
    model = digits_unet(zero_init=False)
    attach_loda(model, rank=4)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1)  # B = 0 would leave A without a gradient
    return model


def losses(model: nn.Module, x: Tensor) -> Tensor:
    t = torch.full(x.shape[:1], 300, device=x.device)
    return model(x, t, t % 10).square().mean((1, 2, 3))


def truth(model: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    """-> a clipping norm that half of the samples exceed, and the clipped sum."""
    grads = oracle.sample_grads(model, losses, x, VIEWS)
    bound = float(oracle.norms(grads).median())
    return bound, _flat(oracle.clipped_sum(grads, bound))


def by_pytorch(model: nn.Module, x: Tensor, bound: float, loss_of: oracle.LossOf) -> Tensor:
    """The same on the device and in the dtype of the private step, one backward pass per sample, without our kernels."""
    with patch.object(ops, "on_triton", lambda t: False):
        return _flat(oracle.clipped_sum(oracle.sample_grads(model, loss_of, x, VIEWS, torch.float32), bound))


def by_fastloda(model: nn.Module, x: Tensor, bound: float, loss_of: oracle.LossOf) -> Tensor:
    clipper = GhostClipper(copy.deepcopy(model), bound, views=VIEWS)
    clipper.accumulate(loss_of(clipper.model, x))
    clipper.privatize(noise_multiplier=0.0, expected_batch_size=1)
    return _flat({name: p.grad for name, p in clipper.parameters.items()})


def autocast_losses(device: str, dtype: torch.dtype) -> oracle.LossOf:
    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return losses(model, x).float()

    return loss_of


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().cpu().flatten() for name in sorted(tensors)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.backends.cudnn.allow_tf32 = False
    model, x = adapted_unet(), torch.randn(SAMPLES * VIEWS, 1, 8, 8)
    bound, wanted = truth(model, x)
    wrong = False
    for dtype, (layout, memory_format) in itertools.product((torch.float32, torch.bfloat16), LAYOUTS.items()):
        laid = model.to(device, memory_format=memory_format), x.to(device, memory_format=memory_format)
        ways = (way(*laid, bound, autocast_losses(device, dtype)) for way in (by_fastloda, by_pytorch))
        ours, own = (float((way - wanted).norm() / wanted.norm()) for way in ways)
        print(
            f"{device}, {dtype}, {layout}: off by {ours:.2g} of the clipped sum's length, PyTorch itself by {own:.2g}"
        )
        wrong |= not ours <= 2 * own + ROUNDING
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
