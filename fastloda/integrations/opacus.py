"""LoDA layers in Opacus: importing this module registers their per-sample gradients for Opacus's "hooks" and "ghost" modes.

>>> import fastloda.integrations.opacus        # the same as register(), which may be called again

Opacus keeps a layer's input x and its output gradient gy. From them and z = A * x, which is computed again (it has r channels,
not C_out), the per-sample gradients are computed as in FastLoDA's own step:

    gz = phi'(z) . (s B^T gy),   gA[n] = dA(x[n], gz[n]),   gB[n] = dB(phi(z[n]), s gy[n])

Here dA and dB are the weight gradients of A and B from an input and an output gradient. This takes no im2col, and any geometry
and memory layout. Norms are those of these gradients, never an underestimate. Frozen weights get no gradients. The "functorch"
mode needs no registration (and fails on an empty batch, as it does for any layer). In the "ew" mode PyTorch raises an error,
since its expanded weights do not support these layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler
except ImportError as error:
    raise ImportError("Opacus is not installed: pip install 'fastloda[opacus]'") from error

from fastloda.errors import UserError
from fastloda.kernels.conv import Conv
from fastloda.loda.arithmetic import ConvOp, LinearOp
from fastloda.loda.layers import LoDAConv2d, LoDALinear
from fastloda.per_sample.gradient import PerSampleGrad, squared_norms
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.tensors import channel_sum, sample_rows

LoDALayer = LoDAConv2d | LoDALinear


def register() -> None:
    """Register the gradient and norm samplers of LoDAConv2d and LoDALinear with Opacus."""
    register_grad_sampler([LoDAConv2d, LoDALinear])(grad_samples)
    register_norm_sampler([LoDAConv2d, LoDALinear])(norm_samples)


def grad_samples(layer: LoDALayer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Compute the gradient of each trainable parameter for each of n samples: [n, *parameter.shape], float32 (or float64).

    `activations` is [x], with x [n, C, H, W] for a convolution and [n, ..., C] for a linear layer; `backprops` is the
    gradient of the samples' own losses with respect to the output. n may be 0.
    """
    n = len(backprops)
    if not n:
        return {p: p.new_zeros(0, *p.shape) for p in layer.parameters() if p.requires_grad}
    return {p: recipe.compute(n, slice(0, n)) for p, recipe in _recipes(layer, *activations, backprops).items()}


def norm_samples(layer: LoDALayer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Compute the norm of each trainable parameter's gradient for each of n samples: [n], float64.

    They are not in the parameter's own dtype: in bfloat16 a norm would be rounded, perhaps down. The arguments are those of
    `grad_samples`.
    """
    n = len(backprops)
    if not n:
        return {p: p.new_zeros(0, dtype=torch.float64) for p in layer.parameters() if p.requires_grad}
    norms = {}
    for p, recipe in _recipes(layer, *activations, backprops).items():
        grad = PerSampleGrad(p.shape, n)
        grad.add(recipe)
        norms[p] = squared_norms([grad], n, backprops.device).sqrt()
    return norms


def _recipes(layer: LoDALayer, x: Tensor, gy: Tensor) -> dict[nn.Parameter, Recipe]:
    """Make the recipes of the trainable parameters' per-sample gradients."""
    with torch.no_grad(), torch.autocast(gy.device.type, enabled=False):
        x, A, B = (t.to(gy.dtype) for t in (x, layer.loda_A, layer.loda_B))
        op, x, z = _again(layer, x, A)
        gz, recipe_B = op.backward_up(gy, x, z, B)
    groups = getattr(layer, "groups", 1)

    def weight_grad(x: Tensor, gy: Tensor, samples: int) -> Tensor:
        """Compute the gradient of W group by group."""
        x, gy = (t.reshape(len(t) * groups, -1, *t.shape[2:]) if groups > 1 else t for t in (x, gy))
        whole = slice(0, samples * groups)
        return op.recipe_W(x, gy).compute(whole.stop, whole).reshape(samples, *layer.weight.shape)

    def bias_grad(gy: Tensor, samples: int) -> Tensor:
        return channel_sum(gy, samples) if isinstance(op, ConvOp) else sample_rows(gy, samples).sum(1)

    recipes = {
        layer.loda_A: op.recipe_A(x, gz),
        layer.loda_B: recipe_B,
        layer.weight: Recipe(weight_grad, (x, gy)),
        layer.bias: Recipe(bias_grad, (gy,)),
    }
    return {p: recipe for p, recipe in recipes.items() if isinstance(p, nn.Parameter) and p.requires_grad}


def _again(layer: LoDALayer, x: Tensor, A: Tensor) -> tuple[ConvOp | LinearOp, Tensor, Tensor]:
    """Compute a layer's forward pass again; return its operation, its input with padding included, and z = A * x."""
    if isinstance(layer, LoDALinear):
        return LinearOp(layer.slope, layer.scale), x, F.linear(x, A)
    if x.dim() != 4:
        raise UserError(f"per-sample gradients need inputs [n, C, H, W], got {tuple(x.shape)}")
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    conv = Conv(layer.kernel_size, layer.stride, (0, 0), layer.dilation)
    op = ConvOp(conv, layer.groups, layer.slope, layer.scale)
    return op, x, op.convolve(x, A).contiguous()


register()
