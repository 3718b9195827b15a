"""A stack of six adapted convolutions, trained one step by each contender: the layer's cost with nothing around it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloda import LoDAConv2d, ghost_dp_step, loda_parameters

LAYERS, RANK = 6, 4


class PlainAdapter(nn.Module):
    """The same layer in plain PyTorch modules."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
        self.A = nn.Conv2d(channels, RANK, 3, padding=1, bias=False)
        self.B = nn.Conv2d(RANK, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.B(F.leaky_relu(self.A(x), 0.1))


def plain_stack(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(PlainAdapter(channels) for _ in range(LAYERS)))


def loda_stack(channels: int) -> nn.Sequential:
    """plain_stack with the same weights."""
    stack = nn.Sequential(*(LoDAConv2d(channels, channels, 3, padding=1, rank=RANK) for _ in range(LAYERS)))
    for ours, plain in zip(stack, plain_stack(channels)):
        ours.weight, ours.bias = plain.conv.weight, plain.conv.bias
        ours.loda_A, ours.loda_B = plain.A.weight, plain.B.weight
    return stack


def batch(size: int, channels: int, resolution: int, channels_last: bool) -> Tensor:
    x = torch.randn(size, channels, resolution, resolution, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean((1, 2, 3))


def plain_step(size: int, channels: int, resolution: int, channels_last: bool) -> Callable[[], None]:
    """A step without privacy in plain PyTorch."""
    model, x = plain_stack(channels), batch(size, channels, resolution, channels_last)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        losses(model, x).mean().backward()
        optimizer.step()

    return step


def private_step(size: int, channels: int, resolution: int, channels_last: bool) -> Callable[[], None]:
    """The same step under DP-SGD."""
    model, x = loda_stack(channels), batch(size, channels, resolution, channels_last)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    optimizer = torch.optim.SGD(loda_parameters(model), lr=1e-3)
    privacy = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": size}
    return lambda: ghost_dp_step(losses(model, x), model, optimizer, **privacy)
