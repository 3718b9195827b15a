"""The rule of convolutions with zero padding, ordinary or transposed, of one, two and three dimensions, grouped or not.

On the CPU the gradients of large samples come from PyTorch's own kernel, one call for each sample. Those of small samples, for
which a call is expensive, and of all samples on a GPU where no Triton kernel applies, come from one product of output gradients
with patches of the input.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from torch import Size, Tensor

from fastloda.kernels.conv import Conv
from fastloda.per_sample.amx import sound_dtype
from fastloda.per_sample.node import Node
from fastloda.per_sample.patches import gather_patches
from fastloda.per_sample.planner import calls_for_each_sample, split_rows
from fastloda.per_sample.products import conv_recipe
from fastloda.per_sample.recipe import Recipe, as_it_is
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.tensors import accumulable, channel_sum, sum_rows

PerSampleGradient = Callable[[Tensor, Tensor, int], Tensor]
convolution_backward = torch.ops.aten.convolution_backward.default


def convolution(call: Call) -> dict[int, Recipe]:
    """Make the recipes of convolution(x, weight, bias): inputs 0 x [N, C, *size], 1 weight [O, C / groups, *kernel], 2 bias [O].

    A transposed convolution from x to y is the backward of one from y to x with the same weight [C, O / groups, *kernel]. So for
    its weight's gradient gy takes the place of the input, and x that of the output's gradient.
    """
    node = call.node
    recipes = {2: Recipe(channel_sum, (call.gy,))} if 2 in call.shapes else {}
    if 1 in call.shapes:
        x, gy = (call.gy, node._saved_input) if node._saved_transposed else (node._saved_input, call.gy)
        recipes[1] = _weight(x, gy, call.shapes[1], node)
    return recipes


def _weight(x: Tensor, gy: Tensor, shape: Size, node: Node) -> Recipe:
    kernel, groups = tuple(shape[2:]), node._saved_groups
    saved = (node._saved_stride, node._saved_padding, node._saved_dilation)
    spread = (values * len(kernel) if len(values) == 1 else values for values in saved)  # padding="valid" saves one
    geometry = (kernel, *map(tuple, spread))
    if calls_for_each_sample(x, kernel, prod(gy.shape[2:])):
        grad, lay_out = _by_pytorch(shape, node), as_it_is
    else:
        grad = _by_patches(geometry, groups)
        lay_out = lambda grads: grads.unflatten(2, kernel).movedim(-1, 2)  # noqa: E731
    flat = Conv(*geometry) if len(kernel) == 2 and groups == 1 else None
    positions = len(x) * prod(gy.shape[2:])
    widths = (gy.shape[1] // groups, x.shape[1] // groups * prod(kernel))
    product = ("goq,gkq->gok", tuple((groups, width, positions) for width in widths))
    return replace(conv_recipe(grad, lay_out, x, gy, flat, 0), product=product)


def _by_pytorch(shape: Size, node: Node) -> PerSampleGradient:
    stride, dilation, transposed = node._saved_stride, node._saved_dilation, node._saved_transposed
    geometry = (stride, node._saved_padding, dilation, transposed, node._saved_output_padding, node._saved_groups)

    def weight_grad(x: Tensor, gy: Tensor, samples: int) -> Tensor:
        """Call the convolution's backward for each sample: [samples, *shape]."""
        dtype = sound_dtype(accumulable(x).dtype, x.device, stride, dilation)
        weight = x.new_empty(shape, dtype=dtype)  # only its shape is read
        grads = x.new_empty(samples, *shape, dtype=dtype)
        of_samples = (t.to(dtype).split(max(1, len(t) // max(1, samples))) for t in (x, gy))
        for grad, *pair in zip(grads, *of_samples):
            above, below = pair if transposed else pair[::-1]
            grad.copy_(convolution_backward(above, below, weight, None, *geometry, (False, True, False))[1])
        return grads

    return weight_grad


def _by_patches(geometry: tuple[tuple[int, ...], ...], groups: int) -> PerSampleGradient:
    def weight_grad(x: Tensor, gy: Tensor, samples: int) -> Tensor:
        """Multiply gy with the patches of x, a few rows at a time: [samples, O, prod(kernel), C / groups]."""
        x, gy = accumulable(x), accumulable(gy)
        rows, positions, width = len(x), prod(gy.shape[2:]), prod(geometry[0]) * x.shape[1]
        grads = x.new_empty(rows * groups, gy.shape[1] // groups, width // groups)
        for part in split_rows(rows, x.element_size() * rows * positions * width, x.device):
            patches = gather_patches(x[part], tuple(gy.shape[2:]), groups, *geometry)
            above = gy[part].reshape(len(patches), -1, positions)
            torch.bmm(above, patches, out=grads[part.start * groups : part.stop * groups])
        return sum_rows(grads.view(rows, gy.shape[1], prod(geometry[0]), -1), samples)

    return weight_grad
