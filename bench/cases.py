"""The cases that are timed: a model of some size, its batch and its loss. `scales.SCALES` holds the cases of `--bench-scale`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from adapters import adapt_plainly
from encoder import TOKENS, Encoder
from machine import DEVICE
from torch import Tensor, nn

from fastloda.synthesis.diffusion import digits_unet, paper_unet

Batch = tuple[Tensor, ...]  # every tensor has batch x views rows, sample-major


@dataclass(frozen=True)
class Case:
    """A training step to measure.

    `channels`, `size` and `layers` describe the layer, the stack and the encoder; other models have their own.

    rank: rank of the adapters; None trains all parameters (of the encoder, all Linear layers). dtype: "bfloat16" means
    autocast. views: number of rows of one sample. size: side of the images, or length of the encoder's sequences.
    """

    model: str
    batch: int
    rank: int | None = 4
    views: int = 1
    channels: int = 64
    size: int = 32
    layers: int = 6
    layout: str = "nchw"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        parts = [self.model, f"n{self.batch}"]
        if self.model in ("layer", "stack"):
            parts += [f"c{self.channels}", f"{self.size}x{self.size}"]
        if self.model == "encoder":
            parts += [f"d{self.channels}", f"t{self.size}"]
        if self.model == "encoder" or self.model == "stack" and self.layers != 6:
            parts.append(f"{self.layers}layers")
        parts.append("full" if self.rank is None else f"r{self.rank}")
        parts += [f"{self.views}views"] * (self.views > 1) + [self.layout] * (self.layout != "nchw")
        return "-".join(parts + [self.dtype] * (self.dtype != "float32"))

    def to_dict(self) -> dict:
        return asdict(self)

    def build(self) -> nn.Module:
        """Make the model in plain PyTorch modules, with the same weights each time."""
        torch.manual_seed(0)
        model = WORKLOADS[self.model].build(self)
        if self.rank is not None:
            adapt_plainly(model, self.rank)
        return model.to(DEVICE, memory_format=self.memory_format)

    def inputs(self) -> Batch:
        torch.manual_seed(1)
        return tuple(self._placed(t) for t in WORKLOADS[self.model].inputs(self, self.batch * self.views))

    def _placed(self, t: Tensor) -> Tensor:
        """Put a tensor on the device in the case's layout, as a leaf: else every backward pass would copy its gradient."""
        placed = t.detach().to(DEVICE)
        if t.dim() == 4:
            placed = placed.contiguous(memory_format=self.memory_format)
        return placed.requires_grad_(t.requires_grad)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute one loss for each row, in float32."""
        half = self.dtype == "bfloat16"
        # without its cache of cast weights, which a captured graph could not use
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half, cache_enabled=False):
            return WORKLOADS[self.model].losses(model, *batch).float()

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format


class Workload(NamedTuple):
    """A kind of model: build(case) -> model; inputs(case, rows) -> batch; losses(model, *batch) -> [rows]."""

    build: Callable[[Case], nn.Module]
    inputs: Callable[[Case, int], Batch]
    losses: Callable[..., Tensor]


def _stack(case: Case) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(case.channels, case.channels, 3, padding=1) for _ in range(case.layers)))


def _wide_res_net(case: Case) -> nn.Module:
    from fastloda.synthesis.classify import WideResNet  # needs packages of data sets, which scripts/gpu_check lacks

    return WideResNet()


def _features(case: Case, rows: int) -> Batch:
    return (torch.randn(rows, case.channels, case.size, case.size),)


def _features_with_grad(case: Case, rows: int) -> Batch:
    """Make features that need a gradient, as the input of a layer within a model does."""
    return (_features(case, rows)[0].requires_grad_(),)


def _mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean((1, 2, 3))


def _noisy_images(channels: int, size: int) -> Callable[[Case, int], Batch]:
    def inputs(case: Case, rows: int) -> Batch:
        x, noise = torch.randn(2, rows, channels, size, size)
        return x, torch.randint(1000, (rows,)), torch.randint(10, (rows,)), noise

    return inputs


def _noise_error(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    return (model(x, t, y) - noise).square().flatten(1).mean(1)


def _labelled_images(case: Case, rows: int) -> Batch:
    return torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))


def _cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def _labelled_sequences(case: Case, rows: int) -> Batch:
    return torch.randint(TOKENS, (rows, case.size)), torch.randint(10, (rows,))


WORKLOADS = {
    "layer": Workload(lambda case: _stack(replace(case, layers=1)), _features_with_grad, _mean_square),
    "stack": Workload(_stack, _features, _mean_square),
    # zero_init off: at the start only the output layer would have a gradient
    "digits_unet": Workload(lambda case: digits_unet(zero_init=False), _noisy_images(1, 8), _noise_error),
    "paper_unet": Workload(lambda case: paper_unet(zero_init=False), _noisy_images(3, 32), _noise_error),
    "wideresnet": Workload(_wide_res_net, _labelled_images, _cross_entropy),
    "encoder": Workload(lambda case: Encoder(case.channels, case.layers), _labelled_sequences, _cross_entropy),
}
