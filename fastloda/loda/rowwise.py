"""A LoDA layer as one operation that a compiler does not look into, with a gradient of its adapter for each row.

A compiled model is a single node of the autograd graph, so that no rule sees the operations inside. All that it gives are
gradients of its inputs. So the adapter enters it once for each row of the batch, as a view [rows, ...] that nobody reads: its
gradient is one gradient per row, accumulated in float32 (float64 for float64) as in eager mode. The arithmetic reads the adapter
itself, without a gradient.

On a CPU the views of a convolution's adapter have the order in which products give its gradients: to lay out one adapter in a
step costs nothing, to lay out a gradient for each row took as long as to make it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastloda.kernels.conv import Conv
from fastloda.loda.arithmetic import ConvOp, LinearOp
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.tensors import accumulable, on_triton

_SETTINGS = "int[] geometry, float slope, float scale"
_INPUTS = "Tensor weight, Tensor A, Tensor B, Tensor rows_A, Tensor rows_B"
_FORWARD = f"(Tensor x, {_INPUTS}, Tensor? bias, {_SETTINGS}) -> (Tensor, Tensor)"
_BACKWARD = f"(Tensor gy, Tensor x, Tensor z, {_INPUTS}, bool needs_x, {_SETTINGS}) -> (Tensor, Tensor, Tensor)"


class ByRow(NamedTuple):
    """An adapter without gradients, and views of it for each row of a batch, which get them."""

    A: Tensor
    B: Tensor
    rows_A: Tensor  # [rows, ...]
    rows_B: Tensor

    @classmethod
    def of(cls, A: Tensor, B: Tensor, rows: int) -> "ByRow":
        """Make it of a layer's adapter, for a batch of so many rows."""
        views = accumulable(A), accumulable(B)
        if A.dim() == 4 and not A.is_cuda:
            views = views[0].movedim(1, -1).flip(1, 2).flatten(0, 2), views[1].flatten(1).t()
        return cls(A.detach(), B.detach(), *(view.expand(rows, *view.shape) for view in views))


def rowwise_adapter(op: ConvOp | LinearOp, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: ByRow) -> Tensor:
    """Compute y = W * x + b + s B phi(A * x) in x's dtype."""
    A, B = adapter.A.to(x.dtype), adapter.B.to(x.dtype)
    return _adapter(x, weight, A, B, adapter.rows_A, adapter.rows_B, bias, *_settings(op))[0]


def _settings(op: ConvOp | LinearOp) -> tuple[list[int], float, float]:
    """Express op in the types that an operation's schema allows: geometry, slope, scale."""
    if isinstance(op, LinearOp):
        return [], op.slope, op.scale
    kernel, stride, padding, dilation = op.conv
    return [*kernel, *stride, *padding, *dilation, op.groups], op.slope, op.scale


def _op(geometry: list[int], slope: float, scale: float) -> ConvOp | LinearOp:
    if not geometry:
        return LinearOp(slope, scale)
    *pairs, groups = geometry
    return ConvOp(Conv(*zip(pairs[::2], pairs[1::2])), groups, slope, scale)


# ---- memory layouts of the outputs, which the compiler must know before the operation runs


def _as_x(x: Tensor, geometry: list[int]) -> torch.memory_format:
    channels_last = geometry and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _as_z(x: Tensor, geometry: list[int]) -> torch.memory_format:
    """Choose the layout in which backward reads z fastest."""
    return torch.channels_last if geometry and on_triton(x) else torch.contiguous_format


@torch.library.custom_op("fastloda::adapter", mutates_args=(), schema=_FORWARD)
def _adapter(x, weight, A, B, rows_A, rows_B, bias, geometry, slope, scale):
    with torch.autocast(x.device.type, enabled=False):
        y, z = _op(geometry, slope, scale).forward(x, weight, bias, A, B)
    return y.contiguous(memory_format=_as_x(x, geometry)), z.contiguous(memory_format=_as_z(x, geometry))


@_adapter.register_fake
def _(x, weight, A, B, rows_A, rows_B, bias, geometry, slope, scale):
    y, rank = _op(geometry, slope, scale).reference(x, weight, bias, A, B), A.shape[0]
    z_shape = (y.shape[0], rank, *y.shape[2:]) if geometry else (*y.shape[:-1], rank)
    return torch.empty_like(y, memory_format=_as_x(x, geometry)), torch.empty(
        z_shape, dtype=x.dtype, device=x.device, memory_format=_as_z(x, geometry)
    )


@torch.library.custom_op("fastloda::adapter_backward", mutates_args=(), schema=_BACKWARD)
def _adapter_backward(gy, x, z, weight, A, B, rows_A, rows_B, needs_x, geometry, slope, scale):
    op = _op(geometry, slope, scale)
    with torch.autocast(x.device.type, enabled=False):
        gx, *recipes = op.backward(gy, x, z, weight, A, B, needs_x)
        each = zip(recipes, (rows_A, rows_B), strict=True)
        gA, gB = (_row_grads(recipe, len(x), rows.shape) for recipe, rows in each)
    gx = x.new_empty(0) if gx is None else gx.contiguous(memory_format=_as_x(x, geometry))
    return gx, gA, gB


@_adapter_backward.register_fake
def _(gy, x, z, weight, A, B, rows_A, rows_B, needs_x, geometry, slope, scale):
    gx = torch.empty_like(x, memory_format=_as_x(x, geometry)) if needs_x else x.new_empty(0)
    return gx, rows_A.new_empty(rows_A.shape), rows_B.new_empty(rows_B.shape)


def _row_grads(recipe: Recipe, seen: int, shape: torch.Size) -> Tensor:
    """Compute one gradient for each of the batch's rows, from a layer that saw `seen` rows: of shape [rows, ...].

    If it saw k rows for each, theirs are summed; if it saw one for every k, the first of these k gets its gradient.

    Raises:
        ValueError: neither of the two numbers is a multiple of the other.
    """
    rows = shape[0]
    if seen % rows and rows % seen:
        raise ValueError(
            f"a LoDA layer saw {seen} rows in a compiled model whose first input has {rows}: the batch must come first"
        )
    owners = min(seen, rows)
    grads = recipe.raw_of_all(owners)
    grads = (grads if grads.shape[1:] == shape[1:] else recipe.lay_out(grads)).contiguous()
    if owners == rows:
        return grads
    spread = grads.new_zeros(rows, *grads.shape[1:])
    spread[:: rows // owners] = grads
    return spread


def _keep(ctx, inputs, output):
    x, *adapter, _, ctx.geometry, ctx.slope, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], *adapter)


def _grads(ctx, gy, _):
    needs_x, _, _, _, needs_A, needs_B = ctx.needs_input_grad[:6]
    gx, gA, gB = _adapter_backward(gy, *ctx.saved_tensors, needs_x, ctx.geometry, ctx.slope, ctx.scale)
    grads = gx if needs_x else None, gA if needs_A else None, gB if needs_B else None
    return grads[0], None, None, None, *grads[1:], None, None, None, None


_adapter.register_autograd(_grads, setup_context=_keep)
