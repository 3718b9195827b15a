"""LoDA layers: a frozen convolution or linear map plus a trainable low-dimensional adapter.

    z = A * x,   h = phi(z),   y = W * x + b + scale * B h        (LoDA: Liu et al. 2023; phi = identity is LoRA)

Without a private step they are ordinary differentiable layers. For a private step, `per_sample/backward.py` puts a receiver on
the autograd node, and the layer's only backward pass hands it the recipes of per-sample gradients, instead of summed gradients.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastloda.errors import UserError
from fastloda.kernels.conv import Conv
from fastloda.loda.arithmetic import ConvOp, LinearOp, cast_together
from fastloda.loda.rowwise import ByRow, fits, rowwise_adapter
from fastloda.per_sample.amx import compute_dtype, without_autocast
from fastloda.per_sample.rules import FUNCTION_RULES, Rule

ACTIVATIONS = ("leaky_relu", "identity")
A_INPUT, B_INPUT = 2, 3  # places of A and B among (x, W, A, B, b); b is last, for the graph skips an input of None


class LoDAFunction(torch.autograd.Function):
    """The operation y = W * x + b + s B phi(A * x), which saves x, z and cast weights. All arithmetic is in `arithmetic.py`."""

    keeps_rows = True

    @staticmethod
    def forward(ctx, x, weight, A, B, bias, op, dtype):
        ctx.op, ctx.x_dtype, ctx.adapter_dtype, ctx.receiver = op, x.dtype, A.dtype, None
        with without_autocast(x.device.type), torch._C.DisableTorchFunction():  # no function mode needs to look inside
            x = x.to(dtype)
            w, b, a, up = cast_together([weight, bias, op.laid_out(A, dtype), B], dtype)
            y, z = op.forward(x, w, b, a, up)
        ctx.save_for_backward(x, z, w if ctx.needs_input_grad[0] else None, a, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, z, weight, A, B = ctx.saved_tensors
        op, gx, gA, gB, needs_x = ctx.op, None, None, None, ctx.needs_input_grad[0]
        with without_autocast(gy.device.type):
            if ctx.receiver is not None:
                gx, recipe_A, recipe_B = op.backward(gy, x, z, weight, A, B, needs_x)
                ctx.receiver(gy, {A_INPUT: recipe_A, B_INPUT: recipe_B})
            else:
                gz, recipe_B = op.backward_up(gy, x, z, B)
                if needs_x:
                    gx = op.grad_x(gy, gz, x, weight, A)
                if any(ctx.needs_input_grad[A_INPUT : B_INPUT + 1]):
                    dtype = ctx.adapter_dtype
                    gA, gB = op.weight_grad(x, gz, A).to(dtype), recipe_B.total().to(dtype)
            gx = None if gx is None else gx.to(ctx.x_dtype)
        return gx, None, gA, gB, None, None, None


FUNCTION_RULES[LoDAFunction] = Rule(None, (A_INPUT, B_INPUT))


def apply_adapter(
    op: ConvOp | LinearOp,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    by_row: ByRow | None = None,
) -> Tensor:
    """Compute y by the fused Function, or by the plain definition where the Function's receiver could not be reached.

    It can't be reached under `torch.func` transforms and `torch.compile`, nor if the base layer trains too (its own rule then
    covers W). The definition's operations have rules of their own, so that a private step stays exact.

    by_row: the adapter for each row of the batch, by which a model compiled by `fastloda.compile` tells the samples apart; used
        only if x has a whole number of rows for each row of the batch, or the reverse.

    Raises:
        TypeError: x has another dtype than the weight, or is not floating point.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    if not x.is_floating_point() or (x.dtype != weight.dtype and not autocast):
        raise TypeError(f"the input is {x.dtype}, the layer's weight {weight.dtype}")
    base_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if by_row is not None and not base_trains and fits(x, by_row):
        dtype = compute_dtype(x)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return rowwise_adapter(op, x, weight, bias, (A.shape, B.shape), by_row)
    if base_trains or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return op.reference(x, weight, bias, A.to(x.dtype), B.to(x.dtype))
    return LoDAFunction.apply(x, weight, A, B, bias, op, compute_dtype(x))


def check_settings(rank: int, activation: str, negative_slope: float, scale: float) -> None:
    """Refuse settings that no adapter can have.

    Raises:
        ValueError: names the first such setting.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"rank must be an integer >= 1, got {rank!r}")
    if activation not in ACTIVATIONS:
        raise UserError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    for name, value in (("negative_slope", negative_slope), ("scale", scale)):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value!r}")


class _Adapted(nn.Module if TYPE_CHECKING else object):
    """The part that both layers share: the adapter's parameters and settings, and `merge`."""

    weight: Tensor
    bias: Tensor | None
    loda_A: nn.Parameter
    loda_B: nn.Parameter
    by_row: ByRow | None = None  # while a compiled model runs (compile.py)

    def _init_adapter(self, a_shape, b_shape, rank, activation, negative_slope, scale, device):
        check_settings(rank, activation, negative_slope, scale)
        self.rank, self.activation, self.negative_slope, self.scale = rank, activation, negative_slope, scale
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.loda_A = nn.Parameter(torch.empty(a_shape, device=device, dtype=dtype))
        self.loda_B = nn.Parameter(torch.zeros(b_shape, device=device, dtype=dtype))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Set A as PyTorch starts a convolution, and B to 0: the adapted model starts as the model it adapts."""
        nn.init.kaiming_uniform_(self.loda_A, a=math.sqrt(5))
        nn.init.zeros_(self.loda_B)

    @property
    def slope(self) -> float:
        """The slope of phi for z < 0; 1 is the identity."""
        return 1.0 if self.activation == "identity" else self.negative_slope

    def merge(self) -> nn.Module:
        """Make the ordinary layer with weight W + scale B A; only the identity activation allows it.

        Raises:
            ValueError: the activation is nonlinear, so that no weight computes the adapted layer, or the base is grouped.
        """
        if self.slope != 1.0:
            raise UserError(
                f"cannot merge: activation {self.activation!r} has slope {self.slope} for z < 0, so B phi(A x) is not linear "
                "in x and no weight equals it; only activation='identity' (LoRA) merges"
            )
        if (groups := getattr(self, "groups", 1)) != 1:
            raise UserError(f"cannot merge: the update B A is dense, but the base convolution has groups={groups}")
        merged = self._plain()
        update = self.loda_B.detach().flatten(1) @ self.loda_A.detach().flatten(1)
        weight = self.weight.detach() + self.scale * update.view_as(self.weight)
        merged.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        if isinstance(self.bias, nn.Parameter):
            merged.bias = self.bias
        return merged.train(self.training)

    def bare(self) -> nn.Module:
        """Make the layer without the adapter, which shares the frozen tensors."""
        layer: Any = self._plain()
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    def _plain(self) -> nn.Conv2d | nn.Linear:
        """Make the ordinary layer of the same shape, on the meta device."""
        raise NotImplementedError

    def _adopt(self, base: nn.Conv2d | nn.Linear) -> Self:
        """Take over the base layer's own tensors and mode (nothing is copied), with a new adapter on its device."""
        self.weight, self.bias = base.weight, base.bias
        for parameter in base.parameters(recurse=False):
            parameter.requires_grad_(False)
        for name in ("loda_A", "loda_B"):
            empty = torch.empty_like(getattr(self, name), device=base.weight.device)
            setattr(self, name, nn.Parameter(empty))
        self.reset_adapter()
        return self.train(base.training)

    def _apply(self, fn, recurse=True):
        """Apply fn, but keep the adapter in float32 under `half()`, `bfloat16()` and `to`: 16 bits are too coarse to train in."""
        adapter = [t for p in (self.loda_A, self.loda_B) for t in (p, p.grad) if t is not None]

        def apart(t: Tensor) -> Tensor:
            moved = fn(t)
            if any(t is own for own in adapter) and moved.dtype in (torch.float16, torch.bfloat16):
                return torch.empty_like(moved, dtype=torch.float32).copy_(t)
            return moved

        return super()._apply(apart, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Load also a `state_dict` of the unadapted layer: the adapter keeps its values then, and in any case its dtype."""
        for key in (prefix + "loda_A", prefix + "loda_B"):
            if key in state_dict:
                state_dict[key] = state_dict[key].to(self.loda_A.dtype)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        adapter = {prefix + "loda_A", prefix + "loda_B"}
        if prefix + "weight" in state_dict and adapter.isdisjoint(state_dict):
            missing_keys[:] = [key for key in missing_keys if key not in adapter]

    def extra_repr(self) -> str:
        phi = "identity" if self.slope == 1.0 else f"leaky_relu({self.slope})"
        return f"{super().extra_repr()}, rank={self.rank}, activation={phi}, scale={self.scale}"


class LoDAConv2d(_Adapted, nn.Conv2d):
    """A frozen `nn.Conv2d` with a trainable adapter: y = W * x + b + scale B phi(A * x).

    Parameters: `weight`, `bias` as in nn.Conv2d, frozen; `loda_A` (rank, in_channels, kh, kw), with the convolution's stride,
    padding and dilation; `loda_B` (out_channels, rank, 1, 1), zero at the start, so that the output starts unchanged.
    The adapter is dense even if the frozen convolution is grouped. It is float32 if the convolution is float16 or bfloat16, which
    are too coarse to train in; each call then casts it as autocast would.

    Args:
        in_channels, ..., dtype: the arguments of nn.Conv2d.
        rank: the number of channels of z, r >= 1.
        activation: the name of phi: "leaky_relu", or "identity" for LoRA.
        negative_slope: the slope of phi for z < 0.
        scale: the factor of the adapter's output.

    Raises:
        ValueError: rank < 1, an unknown activation, a non-finite slope or scale.
    """

    has_per_sample_rule = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
        *,
        rank: int = 4,
        activation: str = "leaky_relu",
        negative_slope: float = 0.1,
        scale: float = 1.0,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        shapes = (rank, in_channels, *self.kernel_size), (out_channels, rank, 1, 1)
        self._init_adapter(*shapes, rank, activation, negative_slope, scale, device)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **adapter) -> Self:
        """Make conv's adapted layer, sharing conv's tensors; adapter: `rank`, `activation`, `negative_slope`, `scale`."""
        return cls(**_conv_arguments(conv), device="meta", **adapter)._adopt(conv)

    def _plain(self) -> nn.Conv2d:
        return nn.Conv2d(**_conv_arguments(self), device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Compute y [N, O, OH, OW] of input [N, C, H, W]; or [O, OH, OW] of [C, H, W]."""
        x = input
        if x.dim() == 3:
            return self(x.unsqueeze(0)).squeeze(0)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        padding = (top, left)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, (left, right, top, bottom), mode=self.padding_mode), (0, 0)
        elif (left, top) != (right, bottom):  # "same" with an even kernel
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        op = ConvOp(Conv(self.kernel_size, self.stride, padding, self.dilation), self.groups, self.slope, self.scale)
        return apply_adapter(op, x, self.weight, self.bias, self.loda_A, self.loda_B, self.by_row)


class LoDALinear(_Adapted, nn.Linear):
    """A frozen `nn.Linear` with a trainable adapter, for any leading dimensions: y = W x + b + scale B phi(A x).

    Parameters: `weight`, `bias` as in nn.Linear, frozen; `loda_A` (rank, in_features); `loda_B` (out_features, rank), zero at
    the start. Arguments and errors as for `LoDAConv2d`.
    """

    has_per_sample_rule = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        rank: int = 4,
        activation: str = "leaky_relu",
        negative_slope: float = 0.1,
        scale: float = 1.0,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        shapes = (rank, in_features), (out_features, rank)
        self._init_adapter(*shapes, rank, activation, negative_slope, scale, device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **adapter) -> Self:
        """Make linear's adapted layer, sharing linear's tensors; adapter: `rank`, `activation`, `negative_slope`, `scale`."""
        return cls(**_linear_arguments(linear), device="meta", **adapter)._adopt(linear)

    def _plain(self) -> nn.Linear:
        return nn.Linear(**_linear_arguments(self), device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Compute y [N, ..., O] of input [N, ..., C]; or [O] of [C]."""
        if input.dim() == 1:
            return self(input.unsqueeze(0)).squeeze(0)
        op = LinearOp(self.slope, self.scale)
        return apply_adapter(op, input, self.weight, self.bias, self.loda_A, self.loda_B, self.by_row)


def unfilled(base: nn.Conv2d | nn.Linear, **adapter) -> LoDAConv2d | LoDALinear:
    """Make an adapted layer of base's shapes on the meta device; adapter: settings as in `from_conv`. base is left alone."""
    if isinstance(base, nn.Conv2d):
        return LoDAConv2d(**_conv_arguments(base), device="meta", **adapter)
    return LoDALinear(**_linear_arguments(base), device="meta", **adapter)


def _conv_arguments(conv: nn.Conv2d) -> dict:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None, "dtype": conv.weight.dtype}


def _linear_arguments(linear: nn.Linear) -> dict:
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    return sizes | {"bias": linear.bias is not None, "dtype": linear.weight.dtype}
