"""The rule of convolutions, also transposed, of one, two and three dimensions, grouped or not, with zero padding."""

from dataclasses import replace
from math import prod

from torch import Tensor

from fastloda.kernels.conv import Conv
from fastloda.per_sample.products import conv_recipe
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.taps import gather_taps
from fastloda.per_sample.tensors import accumulable, channel_sum, lay_out_taps, sum_rows


def convolution(call: Call) -> dict[int, Recipe]:
    """Make the recipes of convolution(x, weight, bias): inputs 0 x [N, C, *size], 1 weight [O, C / groups, *kernel], 2 bias [O].

    A transposed convolution from x to y is the backward of one from y to x with the same weight [C, O / groups, *kernel]. So for
    its weight's gradient gy takes the place of the input, and x that of the output's gradient.
    """
    node = call.node
    recipes = {2: Recipe(channel_sum, (call.gy,))} if 2 in call.shapes else {}
    if 1 in call.shapes:
        x, gy = (call.gy, node._saved_input) if node._saved_transposed else (node._saved_input, call.gy)
        recipes[1] = _weight(x, gy, call.shapes[1][2:], node)
    return recipes


def _weight(x: Tensor, gy: Tensor, kernel: tuple[int, ...], node) -> Recipe:
    saved = (node._saved_stride, node._saved_padding, node._saved_dilation)
    spread = (values * len(kernel) if len(values) == 1 else values for values in saved)  # "valid" saves one
    geometry = (tuple(kernel), *map(tuple, spread))
    groups = node._saved_groups

    def weight_grad(x: Tensor, gy: Tensor, samples: int) -> Tensor:
        """Multiply the k^d taps of gy with x, group by group: [samples, O k^d, C / groups], as `lay_out_taps` takes it."""
        taps = accumulable(gather_taps(gy, x.shape[2:], *geometry))
        rows, size = len(x), taps.shape[-1]
        taps = taps.reshape(rows * groups, -1, size)
        grad = taps @ accumulable(x).reshape(rows * groups, -1, size).mT  # [N groups, O / groups k^d, C / groups]
        return sum_rows(grad.view(rows, -1, grad.shape[-1]), samples)

    positions = prod(x.shape[2:])
    taps = prod(gy.shape[:2]) * prod(kernel) * positions
    flat = Conv(*geometry) if len(kernel) == 2 and groups == 1 else None
    shapes = (gy.shape[1] // groups * prod(kernel), x.shape[1] // groups)
    product = ("gkq,gcq->gkc", tuple((groups, width, len(x) * positions) for width in shapes))
    lay_out = lambda grads: lay_out_taps(grads, kernel)  # noqa: E731
    return replace(conv_recipe(weight_grad, lay_out, x, gy, flat, taps * gy.element_size()), product=product)
