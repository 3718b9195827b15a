"""A private step of an adapted model on the GPU against the truth: one backward pass per sample, in float64, on the CPU.

    python scripts/gpu_step_check.py [--device cpu]

A step is right if its error is at most twice that of PyTorch itself, in the same dtype on the same device. The step as a CUDA
graph must be right too. A run of `DPTrainer` with a graph must equal the run without: the same batches and random numbers, and
the same parameters except for rounding. On a CPU a tape of operations stands in for the graph.
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
import pytest  # noqa: E402
import small_runs  # noqa: E402
import tape  # noqa: E402

from fastloda import CapturedStep, DPTrainer, GhostClipper, PrivateTraining, attach_loda  # noqa: E402
from fastloda.loda import arithmetic as ops  # noqa: E402
from fastloda.privacy import captured  # noqa: E402
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
    """Compute a clipping norm that half of the samples exceed, and the true clipped sum."""
    grads = oracle.sample_grads(model, losses, x, VIEWS)
    bound = float(oracle.norms(grads).median())
    return bound, _flat(oracle.clipped_sum(grads, bound))


def by_pytorch(model: nn.Module, x: Tensor, bound: float, loss_of: oracle.LossOf) -> Tensor:
    """Compute the same sum without FastLoDA's kernels, by a backward pass per sample, on the step's device and in its dtype."""
    with patch.object(ops, "on_triton", lambda t: False):
        return _flat(oracle.clipped_sum(oracle.sample_grads(model, loss_of, x, VIEWS, torch.float32), bound))


def by_fastloda(model: nn.Module, x: Tensor, bound: float, loss_of: oracle.LossOf) -> Tensor:
    clipper = GhostClipper(copy.deepcopy(model), bound, views=VIEWS)
    clipper.accumulate(loss_of(clipper.model, x))
    return _released(clipper)


def by_graph(model: nn.Module, x: Tensor, bound: float, loss_of: oracle.LossOf) -> Tensor:
    """Compute the sum of a sixth batch by a replay: the first and fourth batch are probed, the ones after them make the graph."""
    clipper = GhostClipper(copy.deepcopy(model), bound, views=VIEWS)
    step = CapturedStep(clipper, lambda batch: loss_of(clipper.model, batch))
    for _ in range(5):
        step.accumulate(torch.randn_like(x))
    clipper.reset()
    step.accumulate(x)
    return _released(clipper)


def _released(clipper: GhostClipper) -> Tensor:
    clipper.privatize(noise_multiplier=0.0, expected_batch_size=1)
    return _flat({name: p.grad for name, p in clipper.parameters.items()})


def run_differs(device: str) -> float:
    """Train with a graph and without; return the difference of the parameters over how far they moved."""
    settings = PrivateTraining(**small_runs.RUN | {"steps": 12}, noise_multiplier=0.0, seed=3)
    found = []
    for recorders in ({}, captured.RECORDERS):
        with patch.dict(captured.RECORDERS, recorders, clear=True):
            torch.manual_seed(5)  # dropout
            model = small_runs.small_model().to(device)
            trainer = DPTrainer(model, small_runs.small_data(), _noisy_losses, settings, progress=False)
            start = _flat(dict(trainer.parameters))
            found.append(_flat(dict(trainer.fit().parameters)))
    return float((found[0] - found[1]).norm() / (found[0] - start).norm())


def _noisy_losses(model: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    x, labels = batch
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return nn.functional.cross_entropy(model(x + 0.1 * noise), labels, reduction="none")


def autocast_losses(device: str, dtype: torch.dtype) -> oracle.LossOf:
    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return losses(model, x).float()

    return loss_of


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().double().cpu().flatten() for name in sorted(tensors)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.backends.cudnn.allow_tf32 = False
    with pytest.MonkeyPatch.context() as rehearsal:
        if device == "cpu":
            tape.use(rehearsal)
        return int(_wrong_steps(device) | _wrong_run(device))


def _wrong_run(device: str) -> bool:
    differs = run_differs(device)
    print(f"{device}: a run with a graph differs by {differs:.2g} of its length from one without")
    return not differs <= 1e-3


def _wrong_steps(device: str) -> bool:
    model, x = adapted_unet(), torch.randn(SAMPLES * VIEWS, 1, 8, 8)
    bound, wanted = truth(model, x)
    wrong = False
    for dtype, (layout, memory_format) in itertools.product((torch.float32, torch.bfloat16), LAYOUTS.items()):
        laid = model.to(device, memory_format=memory_format), x.to(device, memory_format=memory_format)
        ways = (way(*laid, bound, autocast_losses(device, dtype)) for way in (by_fastloda, by_graph, by_pytorch))
        ours, graph, own = (float((way - wanted).norm() / wanted.norm()) for way in ways)
        print(
            f"{device}, {dtype}, {layout}: off by {ours:.2g} of the clipped sum's length, as a graph by {graph:.2g}, PyTorch "
            f"itself by {own:.2g}"
        )
        wrong |= not max(ours, graph) <= 2 * own + ROUNDING
    return wrong


if __name__ == "__main__":
    sys.exit(main())
