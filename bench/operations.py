"""The operations of a LoDA layer one by one, as the private step calls them, with the bytes they must move and their flops.

Bytes are the least that any implementation moves: every input read once, every output written once. On a GPU the Triton
kernels run; on a CPU the same operations in PyTorch, where forward and input gradient include the frozen convolution's.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from machine import DEVICE
from providers import captured
from torch import Tensor, nn

from fastloda.kernels.conv import Conv
from fastloda.loda.arithmetic import ConvOp
from fastloda.per_sample.gradient import PerSampleGrad, squared_norms, weighted_sums
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.tensors import on_triton
from fastloda.synthesis.diffusion import paper_unet

RANK, SLOPE, SCALE = 4, 0.1, 1.0
FLOAT32 = 4  # bytes of a gradient's number
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}  # without tf32


class Layer(NamedTuple):
    """A convolution as a model runs it."""

    channels: int
    outputs: int
    size: tuple[int, int]
    conv: Conv

    @property
    def name(self) -> str:
        (kh, kw), (height, width) = self.conv.kernel, self.size
        stride = f", stride {self.conv.stride[0]}" if self.conv.stride != (1, 1) else ""
        return f"{self.channels} to {self.outputs}, {kh} x {kw}{stride}, {height} x {width}"


def unet_layers() -> Counter[Layer]:
    """Count the adapted convolutions of the paper's U-Net at 32 x 32, by shape."""
    found: Counter[Layer] = Counter()

    def note(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        conv = Conv(module.kernel_size, module.stride, module.padding, module.dilation)
        found[Layer(module.in_channels, module.out_channels, tuple(inputs[0].shape[2:]), conv)] += 1

    with torch.device("meta"):
        model = paper_unet()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and RANK <= min(module.in_channels, module.out_channels):
                module.register_forward_pre_hook(note)
        index = torch.zeros(1, dtype=torch.long)
        model(torch.empty(1, 3, 32, 32), index, index)
    return found


class Tensors:
    """The random tensors of a layer: x and gy in the given layout; W, A, B; and the results of forward and backward."""

    def __init__(self, layer: Layer, samples: int, dtype: torch.dtype, memory_format: torch.memory_format):
        torch.manual_seed(0)
        out_size = layer.conv.output_size(*layer.size)
        normal = lambda *shape: torch.randn(shape).to(DEVICE, dtype)  # noqa: E731
        self.x = normal(samples, layer.channels, *layer.size).contiguous(memory_format=memory_format)
        self.gy = normal(samples, layer.outputs, *out_size).contiguous(memory_format=memory_format)
        fan_in = layer.channels * layer.conv.taps
        self.W = normal(layer.outputs, layer.channels, *layer.conv.kernel) / fan_in**0.5
        self.A = normal(RANK, layer.channels, *layer.conv.kernel) / fan_in**0.5
        self.B = normal(layer.outputs, RANK, 1, 1) / RANK**0.5
        self.factors = torch.rand(samples, device=DEVICE, dtype=torch.float64)
        self.op = ConvOp(layer.conv, 1, SLOPE, SCALE)
        self.y, self.z = self.op.forward(self.x, self.W, None, self.A, self.B)
        self.gz, self.recipe_B = self.op.backward_up(self.gy, self.x, self.z, self.B)


@dataclass(frozen=True)
class Operation:
    """An operation, which run() does once, with the least bytes and flops it takes; in_graph: run() replays a CUDA graph."""

    name: str
    run: Callable[[], object]
    bytes: int
    flops: int
    in_graph: bool = False

    def captured(self) -> "Operation":
        """Capture the operation in a graph, if possible: else several launches would be timed at the pace of Python."""
        try:
            return replace(self, run=captured(self.run), in_graph=True)
        except Exception:  # whatever capture raises: the row says that there was none
            return self


def layer_operations(t: Tensors) -> list[Operation]:
    """List everything that the private step does in this layer, and the norm of the full layer's own weight."""
    x, gy, z, gz, A, B = t.x, t.gy, t.z, t.gz, t.A, t.B
    samples, taps, positions = len(x), t.op.conv.taps, gy[0, 0].numel()
    low, high = 2 * samples * positions * RANK * x.shape[1] * taps, 2 * samples * positions * RANK * gy.shape[1]
    gA_bytes, gB_bytes = (samples * p.numel() * FLOAT32 for p in (A, B))
    full = high // RANK * x.shape[1] * taps
    recipe_A, recipe_W = t.op.recipe_A(x, gz), t.op.recipe_W(x, gy)
    return [
        *(_kernel_forward(t, low, high) if on_triton(x) else _frozen_and_forward(t, low, high, full)),
        Operation("backward: gz, gB", lambda: _backward(t), _bytes(gy, z, gz) + gB_bytes, 2 * high),
        Operation("gA: norm and store", lambda: _norm_and_store(recipe_A, A, samples), _bytes(x, gz) + gA_bytes, low),
        Operation("gA: norm", lambda: _norm(recipe_A, A, samples), _bytes(x, gz), low),
        Operation("gA: weighted sum", lambda: _again(recipe_A, A, samples).weighted_sum(t.factors), _bytes(x, gz), low),
        Operation("full layer: norm", lambda: _norm(recipe_W, t.W, samples), _bytes(x, gy), full),
        Operation(
            "full layer: weighted sum",
            lambda: _again(recipe_W, t.W, samples).weighted_sum(t.factors),
            _bytes(x, gy, t.W),
            full,
        ),
    ]


def _kernel_forward(t: Tensors, low: int, high: int) -> list[Operation]:
    from fastloda.kernels import adapter_forward, input_grad

    y, dx, conv = torch.empty_like(t.y), torch.empty_like(t.x), t.op.conv
    return [
        Operation("forward: z", lambda: adapter_forward.project(t.x, t.A, conv), _bytes(t.x, t.z), low),
        Operation(
            "forward: y +=", lambda: adapter_forward.add_(y, t.z, t.B, None, SLOPE, SCALE), _bytes(y, y, t.z), high
        ),
        Operation(
            "backward: dx +=", lambda: input_grad.add_input_grad_(dx, t.gz, t.A, conv), _bytes(dx, dx, t.gz), low
        ),
    ]


def _frozen_and_forward(t: Tensors, low: int, high: int, full: int) -> list[Operation]:
    forward, backward = _bytes(t.x, t.y, t.W), _bytes(t.gy, t.gz, t.x, t.W)
    run = lambda: t.op.forward(t.x, t.W, None, t.A, t.B)  # noqa: E731
    return [
        Operation("forward, with W", run, forward + _bytes(t.z), full + low + high),
        Operation("backward: dx, with W", lambda: t.op.grad_x(t.gy, t.gz, t.x, t.W, t.A), backward, full + low),
    ]


def clip_and_sum(layers: Counter[Layer], samples: int) -> Operation:
    """Make the operation sum_n c_n G[n] over the stored adapter gradients of all layers."""
    sizes = [RANK * (layer.channels * layer.conv.taps + layer.outputs) for layer in layers.elements()]
    grads = {
        str(i): PerSampleGrad(torch.Size([size]), samples, kept=torch.randn(samples, size, device=DEVICE))
        for i, size in enumerate(sizes)
    }
    factors = torch.rand(samples, device=DEVICE, dtype=torch.float64)
    numbers = sum(sizes)
    least = (samples + 1) * numbers * FLOAT32
    return Operation("clip and sum", lambda: weighted_sums(grads, factors), least, 2 * samples * numbers)


def _backward(t: Tensors) -> Tensor:
    _, recipe = t.op.backward_up(t.gy, t.x, t.z, t.B)
    return _norm_and_store(recipe, t.B, len(t.x))


def _norm_and_store(recipe: Recipe, parameter: Tensor, samples: int) -> Tensor:
    if recipe.with_squares is not None:
        return recipe.with_squares(*recipe.tensors, samples)[1].sum(1)
    kept = recipe.compute(samples, slice(0, samples))
    return squared_norms([PerSampleGrad(parameter.shape, samples, kept=kept)], samples, DEVICE)


def _norm(recipe: Recipe, parameter: Tensor, samples: int) -> Tensor:
    return squared_norms([_again(recipe, parameter, samples)], samples, DEVICE)


def _again(recipe: Recipe, parameter: Tensor, samples: int) -> PerSampleGrad:
    """Make a per-sample gradient that stores nothing and is computed from the recipe each time."""
    return PerSampleGrad(parameter.shape, samples, again=[recipe])


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def check(layer: Layer, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Compare y, dx, the norms of two samples' gradients and their weighted sum with autograd in float64."""
    t = Tensors(layer, 2, dtype, memory_format)
    x, W, A, B = (tensor.double().contiguous().requires_grad_() for tensor in (t.x, t.W, t.A, t.B))
    y = t.op.reference(x, W, None, A, B)
    dx, *grads = zip(*(torch.autograd.grad(y[n], (x, W, A, B), t.gy[n].double(), retain_graph=True) for n in (0, 1)))
    squares = [sum(g.square().sum() for g in of_sample) for of_sample in zip(grads[1], grads[2])]
    found = _norm_and_store(t.op.recipe_A(t.x, t.gz), A, 2) + _backward(t)
    close = lambda a, b: _assert_close(a, b, TOLERANCE[dtype])  # noqa: E731
    close(t.y, y)
    close(t.op.grad_x(t.gy, t.gz, t.x, t.W, t.A), sum(dx))
    close(found, torch.stack(squares))
    recipes = t.op.recipe_W(t.x, t.gy), t.op.recipe_A(t.x, t.gz)
    for recipe, gradients, parameter in zip(recipes, grads, (t.W, t.A)):
        close(_norm(recipe, parameter, 2), torch.stack([g.square().sum() for g in gradients]))
        close(_again(recipe, parameter, 2).weighted_sum(t.factors), sum(c * g for c, g in zip(t.factors, gradients)))


def _assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Compare two tensors by the length of their difference (tests/kernels/test_kernels.py is the strict judge)."""
    off = (found.double() - wanted).norm() / wanted.norm()
    assert off <= tolerance, f"off by {off:.2g} of its length"
