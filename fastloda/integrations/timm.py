"""timm: adapters on its weight-standardised ResNets (BiT, NFNet), whose convolutions standardise their weight at each call."""

import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)
STANDARDISED = (StdConv2d, StdConv2dSame, *SCALED)
Standardised = StdConv2d | StdConv2dSame | ScaledStdConv2d | ScaledStdConv2dSame


def fold_weight_standardization(model: nn.Module) -> list[str]:
    """Replace weight-standardised convolutions in place by nn.Conv2d with the weight they compute; return their names.

    The model's output is unchanged, and `attach_loda` can adapt these layers: their base is frozen anyway. To train such
    a layer's own weight privately, leave it as it is: per-sample gradients pass through the standardisation
    (`fastloda.per_sample.composites`). Layers that pad by the size of their input (dynamic "same" padding) are left alone.

    Sources: Qiao et al. 2019 for weight standardisation, Brock et al. 2021 for the scaled kind.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) in STANDARDISED}
    folded = {layer: _folded(layer) for layer in layers.values() if not getattr(layer, "same_pad", False)}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in folded:
                parent._modules[name] = folded[child]
    return [name for name, layer in layers.items() if layer in folded]


def _folded(layer: Standardised) -> nn.Conv2d:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    conv = nn.Conv2d(**{name: getattr(layer, name) for name in names}, bias=layer.bias is not None, device="meta")
    conv.weight = nn.Parameter(_standardised(layer), requires_grad=layer.weight.requires_grad)
    conv.bias = layer.bias
    return conv.train(layer.training)


@torch.no_grad()
def _standardised(layer: Standardised) -> Tensor:
    """Standardise the weight as timm's forward does: zero mean, unit variance over each filter, times the gain if scaled."""
    rows = layer.weight.reshape(1, layer.out_channels, -1)
    gain = (layer.gain * layer.scale).view(-1) if isinstance(layer, SCALED) else None
    return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=layer.eps).view_as(layer.weight)
