"""The rules of normalisations: for the scale, output gradient times normalised input; for the shift, the output gradient."""

import torch
from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.tensors import accumulable, channel_sum


def group_norm(call: Call) -> dict[int, Recipe]:
    """Make the recipes of native_group_norm(x, weight, bias): inputs 0 x [N, C, *size], 1 weight [C], 2 bias [C]."""
    node, gy = call.node, call.gy
    groups = node._saved_group

    def weight_grad(gy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, samples: int) -> Tensor:
        grouped = accumulable(x).reshape(len(x), groups, -1)
        normalised = (grouped - mean.view(len(x), groups, 1)) * rstd.view(len(x), groups, 1)
        return channel_sum(accumulable(gy) * normalised.view(gy.shape), samples)

    saved = (node._saved_input, node._saved_result1, node._saved_result2)
    return {1: Recipe(weight_grad, (gy, *saved)), 2: Recipe(channel_sum, (gy,))}


def batch_norm(call: Call) -> dict[int, Recipe]:
    """Make the recipes of native_batch_norm(x, weight, bias) with running statistics: inputs as in `group_norm`."""
    node, gy = call.node, call.gy
    if node._saved_training:
        raise PrivacyError("batch norm takes statistics over the batch: samples mix")
    mean, rstd = node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()

    def weight_grad(gy: Tensor, x: Tensor, samples: int) -> Tensor:
        channels = (-1,) + (1,) * (x.dim() - 2)
        normalised = (accumulable(x) - mean.view(channels)) * rstd.view(channels)
        return channel_sum(accumulable(gy) * normalised, samples)

    return {1: Recipe(weight_grad, (gy, node._saved_input)), 2: Recipe(channel_sum, (gy,))}


def layer_norm(call: Call) -> dict[int, Recipe]:
    """Make the recipes of native_layer_norm(x, weight, bias): inputs 0 x [N, ..., *shape], 1 weight and 2 bias [*shape]."""
    node = call.node
    shape = Size(node._saved_normalized_shape)

    def weight_grad(gy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, samples: int) -> Tensor:
        return position_sum(accumulable(gy) * ((accumulable(x) - mean) * rstd), shape, samples)

    saved = (node._saved_input, node._saved_result1, node._saved_result2)
    tensors = tuple(call.first(t) for t in (call.gy, *saved))
    bias = Recipe(lambda gy, samples: position_sum(gy, shape, samples), tensors[:1])
    return {1: Recipe(weight_grad, tensors), 2: bias}


def rms_norm(call: Call) -> dict[int, Recipe]:
    """Make the recipe of _fused_rms_norm(x [N, ..., *shape], weight): input 1. Only GPUs run it; elsewhere `mul` is used."""
    node = call.node
    shape = Size(node._saved_normalized_shape)
    leading = call.gy.shape[: call.gy.dim() - len(shape)]
    rstd = node._saved_result1.reshape(*leading, *(1,) * len(shape))

    def weight_grad(gy: Tensor, x: Tensor, rstd: Tensor, samples: int) -> Tensor:
        return position_sum(accumulable(gy) * (accumulable(x) * rstd), shape, samples)

    return {1: Recipe(weight_grad, tuple(call.first(t) for t in (call.gy, node._saved_input, rstd)))}


def position_sum(t: Tensor, shape: torch.Size, samples: int) -> Tensor:
    """Sum t [rows, ..., *shape] over each sample's rows and positions: [samples, *shape]."""
    return accumulable(t).reshape(samples, -1, *shape).sum(1)
