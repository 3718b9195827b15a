"""The recipes for weights of convolutions and of linear maps over rows. Triton kernels compute them on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastloda import kernels
from fastloda.kernels.conv import Conv
from fastloda.per_sample.recipe import Fused, Recipe
from fastloda.per_sample.tensors import on_triton, sample_rows


def conv_recipe(
    grad: Callable[..., Tensor],
    lay_out: Callable[[Tensor], Tensor],
    x: Tensor,
    g: Tensor,
    conv: Conv | None,
    scratch_bytes: int,
    at_hand: Callable[[int], Tensor] | None = None,
) -> Recipe:
    """Make the recipe of a convolution weight's per-sample gradients, from its input x and the gradient g of its output.

    Args:
        grad, lay_out, at_hand, scratch_bytes: the fields of the `Recipe` by which PyTorch computes them.
        x, g: [N, C, *size] and [N, O, *out_size].
        conv: the geometry for the kernels; None where they do not apply (groups, one or three dimensions).
    """
    if conv is None or not on_triton(x) or x.dtype != g.dtype:
        return Recipe(grad, (x, g), scratch_bytes, lay_out=lay_out, at_hand=at_hand)
    return _kernel_recipe(x, g, conv, lambda t, samples: t, kernels.sample_grad.lay_out)


def linear_recipe(x: Tensor, gy: Tensor) -> Recipe:
    """Make the recipe of the per-sample gradients of weight.T [C, O] of a product over rows: x [rows, C], gy [rows, O]."""
    if not on_triton(x) or x.dtype != gy.dtype:
        return Recipe(lambda x, gy, samples: torch.bmm(sample_rows(x, samples).mT, sample_rows(gy, samples)), (x, gy))
    # To the kernels it is a 1 x 1 convolution of images one row high, from O channels to C.
    as_image = lambda t, samples: t.reshape(samples, -1, t.shape[-1]).mT[:, :, None]  # noqa: E731
    return _kernel_recipe(gy, x, Conv((1, 1)), as_image, lambda grads: grads[:, 0, 0])


def _kernel_recipe(x: Tensor, g: Tensor, conv: Conv, as_image, lay_out: Callable[[Tensor], Tensor]) -> Recipe:
    """Make a recipe that the kernels compute. as_image(tensor, samples) reshapes their inputs, `lay_out` their gradients."""

    def with_squares(x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        return kernels.sample_grad.sample_grads(as_image(x, samples), as_image(g, samples), conv, samples)

    def squares(x: Tensor, g: Tensor, samples: int) -> Tensor:
        return kernels.sample_grad.sample_grad_squares(as_image(x, samples), as_image(g, samples), conv, samples)

    def weighted_sum(x: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        n = len(factors)
        return lay_out(kernels.sample_grad.weighted_grad_sum(as_image(x, n), as_image(g, n), conv, factors)[None])[0]

    fused, grad = Fused(squares, weighted_sum), lambda *a: with_squares(*a)[0]
    return Recipe(grad, (x, g), with_squares=with_squares, fused=fused, lay_out=lay_out)
