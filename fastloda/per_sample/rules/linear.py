"""The rules of linear maps, y = x W^T + b over rows; a sample may have several rows, adjacent or (sequence first) apart."""

from dataclasses import replace
from math import prod

import torch
from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.batch_axis import locate
from fastloda.per_sample.node import Node, output_shape
from fastloda.per_sample.products import linear_recipe
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.rules.gram import gram
from fastloda.per_sample.tensors import accumulable, sample_rows


def addmm(call: Call) -> dict[int, Recipe]:
    """Make the recipes of addmm(bias, x, weight.T): inputs 0 bias [O], 1 x [rows, C], 2 weight.T [C, O]."""
    node = call.node
    if node._saved_alpha != 1 or node._saved_beta != 1:
        raise PrivacyError("addmm with alpha or beta other than 1 has no per-sample rule")
    recipes = {}
    if 0 in call.shapes:
        if call.shapes[0] != call.gy.shape[1:]:
            raise PrivacyError(
                f"addmm adds a matrix of shape {tuple(call.shapes[0])}: only a bias has a per-sample rule"
            )
        recipes[0] = Recipe(bias_grad, (call.first(call.gy),))
    return recipes | ({2: weight(call, node._saved_mat1)} if 2 in call.shapes else {})


def mm(call: Call) -> dict[int, Recipe]:
    """Make the recipe of mm(x, weight.T): inputs 0 x [rows, C], 1 weight.T [C, O]."""
    return {1: weight(call, call.node._saved_self)}


def mv(call: Call) -> dict[int, Recipe]:
    """Make the recipe of mv(x, p): inputs 0 x [rows, C], 1 p [C]."""
    grad = lambda x, gy, samples: (sample_rows(x, samples) * sample_rows(gy, samples)).sum(1)  # noqa: E731
    return {1: Recipe(grad, (call.first(call.node._saved_self), call.first(call.gy[:, None])))}


def bmm(call: Call) -> dict[int, Recipe]:
    """Make the recipes of einsum's products bmm(x [G, rows, C], p [G, C, O]) and bmm(p [G, O, C], x [G, C, rows])."""
    dim, _ = call.place
    right = lambda x, gy: torch.einsum("ngtc,ngto->ngco", x, gy)  # noqa: E731
    left = lambda x, gy: torch.einsum("ngct,ngot->ngoc", x, gy)  # noqa: E731
    recipes = {}
    for index in call.shapes:
        rows_dim, product = (1, right) if index == 1 else (2, left)
        x = call.node._saved_self if index == 1 else call.node._saved_mat2
        if call.samples > 1 and dim != rows_dim:
            raise PrivacyError("the batch must be among the rows of what a parameter is multiplied with by bmm")
        recipes[index] = Recipe(_of_groups(product, rows_dim), (call.apart(x), call.apart(call.gy)))
    return recipes


def one_for_each_row(node: Node, shape: Size, outer: int) -> bool:
    """Tell whether the batch lies in bmm's first dimension, so that a parameter has separate entries for each row."""
    return bool(outer) and locate(output_shape(node), outer)[0] == 0


def bilinear(call: Call) -> dict[int, Recipe]:
    """Make the recipe of nn.Bilinear, x1 W[o] x2 for output o: input 1 W [O, C1, C2], with x1 [rows, C1] and x2 [rows, C2]."""
    node = call.node
    form = tuple(map(tuple, (node._saved_expand1, node._saved_expand2, node._saved_expand3, node._saved_sumdim)))
    if form != ((1, 3), (0,), (1, 2), (2, 3)):
        raise PrivacyError("a trilinear product other than nn.Bilinear's has no per-sample rule")

    def grad(x1: Tensor, x2: Tensor, gy: Tensor, samples: int) -> Tensor:
        return torch.einsum("nti,ntj,nto->noij", *(sample_rows(t, samples) for t in (x1, x2, gy)))

    return {1: Recipe(grad, tuple(call.first(t) for t in (node._saved_i1, node._saved_i3, call.gy)))}


def weight(call: Call, x: Tensor) -> Recipe:
    """Make the recipe for weight.T [C, O] from x [rows, C] and gy [rows, O]."""
    x, gy = call.first(x), call.first(call.gy)
    rows = prod(x.shape[:-1])
    recipe = replace(linear_recipe(x, gy), product=("tc,to->co", ((rows, x.shape[-1]), (rows, gy.shape[-1]))))
    return recipe if recipe.fused else replace(recipe, ghost=gram(x))


def bias_grad(gy: Tensor, samples: int) -> Tensor:
    """Sum gy [rows, ..., O] over each sample's rows: [samples, O]."""
    return sample_rows(gy, samples).sum(1)


def _of_groups(product, rows_dim: int):
    def grad(x: Tensor, gy: Tensor, samples: int) -> Tensor:
        """Compute the product [samples, G, ...] of x and gy [rows, G, ...], also summed over each sample's rows."""

        def joined(t: Tensor) -> Tensor:
            t = accumulable(t).reshape(samples, -1, *t.shape[1:])
            return t.movedim(1, 1 + rows_dim).flatten(1 + rows_dim, 2 + rows_dim)

        return product(joined(x), joined(gy))

    return grad
