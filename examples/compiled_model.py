"""Compile a U-Net for private fine-tuning: one graph, the same private steps.

    python examples/compiled_model.py

torch.compile makes one operation of a whole model, in which no sample's gradient can be told from another's. `fastloda.compile`
passes each adapter to the compiled model once for each row of the batch, so that the step stays exact. Here the graph is
captured and differentiated ahead of time ("aot_eager"), which takes seconds; leave `backend` out for generated code.
"""

import copy
import time

import torch
from torch import nn

import fastloda
from fastloda.synthesis.diffusion.unet import UNet, UNetConfig


def losses(model: nn.Module, images: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute one loss per sample: how badly the model recovers the noise, here the images themselves."""
    return (model(images, times, labels) - images).square().mean((1, 2, 3))


def private_steps(model: nn.Module, batches: list) -> list[float]:
    """Take a few private steps, and return the seconds that each took."""
    optimizer = torch.optim.SGD(fastloda.loda_parameters(model), lr=0.1)
    privacy = dict(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=16)
    generator = torch.Generator().manual_seed(0)  # seeded to compare the two models; leave it out for privacy
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        fastloda.ghost_dp_step(losses(model, *batch), model, optimizer, generator=generator, **privacy)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    torch.manual_seed(0)
    shape = dict(image_size=8, in_channels=1, width=8, multipliers=(1,), blocks_per_level=1, norm_groups=4)
    eager = UNet(UNetConfig(**shape, attention=False, zero_init=False))
    fastloda.attach_loda(eager, rank=2, targets=r".*block_[12]\..*")
    compiled = fastloda.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)  # raises at a graph break

    batches = [(torch.randn(16, 1, 8, 8), torch.randint(1000, (16,)), torch.randint(10, (16,))) for _ in range(4)]
    eager_seconds, compiled_seconds = (private_steps(model, batches) for model in (eager, compiled))
    pairs = zip(fastloda.loda_parameters(eager), fastloda.loda_parameters(compiled))
    apart = max((a - b).abs().max().item() for a, b in pairs)
    print(
        f"4 private steps, {len(list(compiled.parameters()))} parameters; largest difference of a weight: {apart:.1e}"
    )
    print(f"first step (compiles, probes): eager {eager_seconds[0]:.2f} s, compiled {compiled_seconds[0]:.2f} s")
    print(f"last step:                     eager {eager_seconds[-1]:.3f} s, compiled {compiled_seconds[-1]:.3f} s")
    print("names are unchanged:", list(compiled.state_dict()) == list(eager.state_dict()))


if __name__ == "__main__":
    main()
