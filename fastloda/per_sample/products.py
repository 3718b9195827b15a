"""The recipes of weights that multiply: convolutions, and linear maps over rows. Triton kernels compute them on a GPU."""

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
    """The recipe of a convolution weight's per-sample gradients, from its input and the gradient of its output.

    grad(x, g, samples), lay_out and at_hand are PyTorch's way. conv is None where the kernels have none (groups, one or three
    dimensions).
    """
    if conv is None or not on_triton(x) or x.dtype != g.dtype:
        return Recipe(grad, (x, g), scratch_bytes, lay_out=lay_out, at_hand=at_hand)
    return _kernel_recipe(x, g, conv, lambda t, samples: t, lambda grads: grads)


def linear_recipe(x: Tensor, gy: Tensor) -> Recipe:
    """The recipe of the per-sample gradients of weight.T [C, O] of a product over rows: x [rows, C], gy [rows, O]."""
    if not on_triton(x) or x.dtype != gy.dtype:
        return Recipe(lambda x, gy, samples: torch.bmm(sample_rows(x, samples).mT, sample_rows(gy, samples)), (x, gy))
    # a 1 x 1 convolution of images one row high, from O channels to C
    as_image = lambda t, samples: t.reshape(samples, -1, t.shape[-1]).mT[:, :, None]  # noqa: E731
    return _kernel_recipe(gy, x, Conv((1, 1)), as_image, lambda grads: grads[..., 0, 0])


def _kernel_recipe(x: Tensor, g: Tensor, conv: Conv, as_image, as_weight) -> Recipe:
    """as_image(tensor, samples) and as_weight(gradient) re-lay what goes into the kernels and comes out."""

    def with_squares(x: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        grads, squares = kernels.sample_grad.sample_grads(as_image(x, samples), as_image(g, samples), conv, samples)
        return as_weight(grads), squares

    def squares(x: Tensor, g: Tensor, samples: int) -> Tensor:
        return kernels.sample_grad.sample_grad_squares(as_image(x, samples), as_image(g, samples), conv, samples)

    def weighted_sum(x: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        n = len(factors)
        return as_weight(kernels.sample_grad.weighted_grad_sum(as_image(x, n), as_image(g, n), conv, factors))

    return Recipe(lambda *a: with_squares(*a)[0], (x, g), with_squares=with_squares, fused=Fused(squares, weighted_sum))
