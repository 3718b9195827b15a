"""The same adapted model twice: in plain PyTorch modules, as Opacus can take it, and in FastLoDA's layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloda import LoDAConv2d


class PlainAdapter(nn.Module):
    """A frozen convolution with a LoDA adapter, in plain PyTorch modules: y = conv(x) + B(phi(A(x)))."""

    def __init__(self, conv: nn.Conv2d, rank: int):
        super().__init__()
        shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        self.conv = conv.requires_grad_(False)
        self.A = nn.Conv2d(conv.in_channels, rank, *shape, bias=False)
        self.B = nn.Conv2d(rank, conv.out_channels, 1, bias=False)  # random: B = 0 would leave A without a gradient

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.B(F.leaky_relu(self.A(x), 0.1))

    def to_loda(self) -> LoDAConv2d:
        """Make FastLoDA's layer with the same parameters."""
        layer = LoDAConv2d.from_conv(self.conv, rank=self.A.out_channels)
        layer.loda_A, layer.loda_B = self.A.weight, self.B.weight
        return layer


def adapt_plainly(model: nn.Module, rank: int) -> nn.Module:
    """Put a PlainAdapter on every convolution that can have one, in place; everything else is frozen."""
    model.requires_grad_(False)
    return _replace(model, lambda m: PlainAdapter(m, rank) if _adaptable(m, rank) else None)


def use_loda_layers(model: nn.Module) -> nn.Module:
    """Replace every PlainAdapter, in place, by a LoDAConv2d with the same parameters."""
    return _replace(model, lambda m: m.to_loda() if isinstance(m, PlainAdapter) else None)


def _adaptable(module: nn.Module, rank: int) -> bool:
    return isinstance(module, nn.Conv2d) and rank <= min(module.in_channels, module.out_channels)


def _replace(model: nn.Module, replacement) -> nn.Module:
    """Replace each module, in place, by replacement(module), unless that is None."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if (new := replacement(child)) is not None:
                setattr(parent, name, new)
    return model


def trainable(model: nn.Module) -> list[torch.nn.Parameter]:
    """List the trainable parameters in the order of the modules, which is the same for both kinds of layers."""
    return [p for p in model.parameters() if p.requires_grad]
