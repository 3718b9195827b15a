"""A LoDA layer as one operation that a compiler does not look into, with a gradient of its adapter for each row.

A compiled model is a single node of the autograd graph, so that no rule sees the operations inside. All that it gives are
gradients of its inputs. So the adapter enters it once for each row of the batch, as a view: A [rows, *A.shape], all rows equal.
The gradient of that view is one gradient per row, accumulated in float32 (float64 for float64) as in eager mode.
"""

import torch
from torch import Tensor

from fastloda.kernels.conv import Conv
from fastloda.loda.arithmetic import ConvOp, LinearOp
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.tensors import on_triton

_SETTINGS = "int[] geometry, float slope, float scale"
_FORWARD = f"(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, {_SETTINGS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor gy, Tensor x, Tensor z, Tensor weight, Tensor A, Tensor B, bool needs_x, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor)"
)


def rowwise_adapter(op: ConvOp | LinearOp, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor):
    """Compute y = W * x + b + s B phi(A * x) in x's dtype; A [rows, *A.shape] and B [rows, *B.shape] repeat one adapter."""
    return _adapter(x, weight, bias, A, B, *_settings(op))[0]


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
def _adapter(x, weight, bias, A, B, geometry, slope, scale):
    with torch.autocast(x.device.type, enabled=False):
        y, z = _op(geometry, slope, scale).forward(x, weight, bias, A[0].to(x.dtype), B[0].to(x.dtype))
    return y.contiguous(memory_format=_as_x(x, geometry)), z.contiguous(memory_format=_as_z(x, geometry))


@_adapter.register_fake
def _(x, weight, bias, A, B, geometry, slope, scale):
    op = _op(geometry, slope, scale)
    y = op.reference(x, weight, bias, A[0].to(x.dtype), B[0].to(x.dtype))
    z_shape = (y.shape[0], A.shape[1], *y.shape[2:]) if geometry else (*y.shape[:-1], A.shape[1])
    return torch.empty_like(y, memory_format=_as_x(x, geometry)), torch.empty(
        z_shape, dtype=x.dtype, device=x.device, memory_format=_as_z(x, geometry)
    )


@torch.library.custom_op("fastloda::adapter_backward", mutates_args=(), schema=_BACKWARD)
def _adapter_backward(gy, x, z, weight, A, B, needs_x, geometry, slope, scale):
    op, dtype, rows = _op(geometry, slope, scale), x.dtype, len(A)
    with torch.autocast(x.device.type, enabled=False):
        gx, *recipes = op.backward(gy, x, z, weight, A[0].to(dtype), B[0].to(dtype), needs_x)
        gA, gB = (_row_grads(recipe, len(x), rows) for recipe in recipes)
    gx = x.new_empty(0) if gx is None else gx.contiguous(memory_format=_as_x(x, geometry))
    return gx, gA, gB


@_adapter_backward.register_fake
def _(gy, x, z, weight, A, B, needs_x, geometry, slope, scale):
    gx = torch.empty_like(x, memory_format=_as_x(x, geometry)) if needs_x else x.new_empty(0)
    return gx, A.new_empty(A.shape), B.new_empty(B.shape)


def _row_grads(recipe: Recipe, seen: int, rows: int) -> Tensor:
    """Compute one gradient for each of the batch's rows, from a layer that saw `seen` rows: [rows, *shape].

    If it saw k rows for each, theirs are summed; if it saw one for every k, the first of these k gets its gradient.

    Raises:
        ValueError: neither of the two numbers is a multiple of the other.
    """
    if seen % rows and rows % seen:
        raise ValueError(
            f"a LoDA layer saw {seen} rows in a compiled model whose first input has {rows}: the batch must come first"
        )
    owners = min(seen, rows)
    grads = recipe.lay_out(recipe.raw_of_all(owners)).contiguous()
    if owners == rows:
        return grads
    spread = grads.new_zeros(rows, *grads.shape[1:])
    spread[:: rows // owners] = grads
    return spread


def _keep(ctx, inputs, output):
    x, weight, _, A, B, *ctx.settings = inputs
    ctx.save_for_backward(x, output[1], weight, A, B)


def _grads(ctx, gy, _):
    needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
    gx, gA, gB = _adapter_backward(gy, *ctx.saved_tensors, needs_x, *ctx.settings)
    return gx if needs_x else None, None, None, gA if needs_A else None, gB if needs_B else None, None, None, None


_adapter.register_autograd(_grads, setup_context=_keep)
