"""The Triton kernels compared with float64: alone at corner-case shapes, and in a private step.

Without a GPU they run in Triton's interpreter (conftest.py), which computes products of bfloat16 and float16 in float32, and
truncates to bfloat16 where a GPU rounds. With a GPU they run there (`scripts/gpu_check`).
"""

import copy
import functools
import itertools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import drawn
import pytest
import torch
import torch.nn.functional as F
from exactness import KINDS, check_float32

from fastloda import per_sample_grad_norms, per_sample_grads
from fastloda.kernels.conv import Conv
from fastloda.loda import arithmetic
from fastloda.per_sample import gradient, products
from fastloda.per_sample import planner as plan
from fastloda.per_sample.gradient import PerSampleGrad, squared_norms
from fastloda.per_sample.recipe import as_it_is
from fastloda.per_sample.tensors import KERNEL_DTYPES

pytest.importorskip("triton", reason="Triton is not installed")
from fastloda.kernels import adapter_backward, adapter_forward, clip_sum, input_grad, pointwise, sample_grad, tiles  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPE, SCALE = 0.1, 0.7
torch.backends.cudnn.allow_tf32 = False  # errors are compared with PyTorch's, which should be float32's


class Shape(NamedTuple):
    """The numbers of samples and views of each, channels in and out, rank, image size and convolution of a case."""

    samples: int
    views: int
    channels: int
    outputs: int
    rank: int
    size: tuple[int, int]
    conv: Conv


SAME = Conv((3, 3), padding=(1, 1))
SHAPES = {
    "one sample, one channel, one position": Shape(1, 1, 1, 1, 1, (1, 1), Conv((1, 1))),
    "3 x 3": Shape(3, 1, 20, 24, 4, (9, 9), SAME),
    "views": Shape(2, 3, 5, 7, 3, (6, 5), SAME),
    "more positions than a tile": Shape(2, 1, 4, 6, 4, (17, 13), SAME),
    "more channels than a tile": Shape(2, 1, 70, 80, 4, (5, 5), SAME),
    "1 x 1, rank 16": Shape(2, 1, 40, 20, 16, (5, 5), Conv((1, 1))),
    "1 x 1, rank 64": Shape(2, 1, 65, 70, 64, (4, 4), Conv((1, 1))),
    "3 x 3, rank 17: several tiles of taps": Shape(2, 1, 8, 8, 17, (6, 6), SAME),
    "stride 2": Shape(2, 2, 20, 17, 3, (9, 7), Conv((3, 3), (2, 2), (1, 1))),
    "stride 3 leaves positions out": Shape(2, 1, 3, 5, 2, (10, 11), Conv((2, 2), (3, 3))),
    "dilation": Shape(2, 1, 20, 30, 5, (9, 8), Conv((3, 3), (1, 1), (2, 2), (2, 2))),
    "nothing is square": Shape(2, 1, 6, 9, 4, (7, 12), Conv((1, 5), (1, 2), (0, 3), (1, 1))),
    "5 x 5, padding beyond the kernel": Shape(2, 1, 3, 4, 1, (5, 6), Conv((5, 5), (1, 1), (5, 6))),
    "several strips of rows": Shape(1, 1, 3, 5, 4, (24, 14), SAME),
    "several strips, stride 2": Shape(1, 1, 3, 5, 4, (40, 15), Conv((3, 3), (2, 2), (1, 1))),
    "wide: cuDNN computes z": Shape(1, 1, 3, 4, 4, (2, 140), SAME),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
every_case = pytest.mark.parametrize(
    "shape, dtype, layout", list(itertools.product(SHAPES.values(), DTYPES, LAYOUTS.values())),
    ids=["-".join((s, str(d)[6:], m)) for s, d, m in itertools.product(SHAPES, DTYPES, LAYOUTS)],
)  # fmt: skip


class Tensors:
    """Random tensors of a shape: x, gy and y in the layout, z and gz [N, r, OH, OW], A, B, and factors of which one is zero."""

    def __init__(self, shape: Shape, dtype: torch.dtype, layout: torch.memory_format):
        rows, out_size = shape.samples * shape.views, shape.conv.output_size(*shape.size)

        def image(channels, size):
            return torch.randn(rows, channels, *size).to(DEVICE, dtype).to(memory_format=layout)

        self.x, self.gy, self.y = (
            image(shape.channels, shape.size),
            image(shape.outputs, out_size),
            image(shape.outputs, out_size),
        )
        self.z = image(shape.rank, out_size)
        self.gz = adapter_backward.among_zeros(image(shape.rank, out_size), shape.conv, shape.size)
        self.A = torch.randn(shape.rank, shape.channels, *shape.conv.kernel).to(DEVICE, dtype)
        self.B = torch.randn(shape.outputs, shape.rank, 1, 1).to(DEVICE, dtype)
        self.bias = torch.randn(shape.outputs).to(DEVICE, dtype)
        self.factors = torch.rand(shape.samples).to(DEVICE)
        self.factors[0] = 0.0 if shape.samples > 1 else 1.0


@pytest.fixture
def dirty_memory():
    """Let torch.empty fill memory with NaN, so that numbers which a kernel leaves unwritten show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(ours, reference, *inputs, through=()):
    """Check that `ours` is reference(*inputs), up to twice the error of PyTorch in the same dtype.

    Args:
        through: inputs whose magnitudes, put through the reference, set the tolerance where the kernel rounds an intermediate.
    """
    exact = reference(*(t.double() for t in inputs))
    own = (reference(*(t.to(ours.dtype) for t in inputs)).double() - exact).abs().max()
    size = reference(*(t.double().abs() for t in through)).max() if through else exact.abs().max()
    half_a_unit = torch.finfo(inputs[0].dtype if through else ours.dtype).eps / 2
    truncated = 2 if DEVICE == "cpu" and ours.dtype == torch.bfloat16 else 1  # the interpreter truncates when it stores
    assert ours.shape == exact.shape
    assert (ours.double() - exact).abs().max() <= 2 * own + truncated * half_a_unit * size


@every_case
def test_adapter_forward(shape, dtype, layout, dirty_memory):
    t = Tensors(shape, dtype, layout)
    check(
        adapter_forward.project(t.x, t.A, shape.conv),
        lambda x, A: adapter_forward.project_reference(x, A, shape.conv),
        t.x,
        t.A,
    )
    for bias in ([], [t.bias]):
        y = t.y.clone()
        assert adapter_forward.add_(y, t.z, t.B, *(bias or [None]), SLOPE, SCALE) is y
        check(y, added, t.y, t.z, t.B, *bias)


POINTWISE = [s for s in SHAPES.values() if s.conv.kernel == (1, 1)] + [
    Shape(2, 1, 64, 64, 4, (8, 8), Conv((1, 1))),  # it fills its tiles
    Shape(3, 2, 130, 128, 4, (5, 7), Conv((1, 1))),
    Shape(1, 1, 16, 24, 3, (1, 9), Conv((1, 1))),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", POINTWISE, ids=str)
def test_pointwise_forward(shape, with_bias, dtype, dirty_memory):
    t = Tensors(shape, dtype, torch.channels_last)
    weight = torch.randn(shape.outputs, shape.channels, 1, 1).to(DEVICE, dtype)
    bias = t.bias if with_bias else None
    assert pointwise.serves(t.x, weight, t.A, shape.conv)
    y, z = pointwise.forward(t.x, weight, bias, t.A, t.B, SLOPE, SCALE)
    check(z, adapter_forward_z, t.x, t.A)
    assert y.is_contiguous(memory_format=torch.channels_last) and z.is_contiguous(memory_format=torch.channels_last)
    exact, _ = pointwise.forward_reference(
        *(None if v is None else v.double() for v in (t.x, weight, bias, t.A, t.B)), SLOPE, SCALE
    )
    own = (pointwise.forward_reference(t.x, weight, bias, t.A, t.B, SLOPE, SCALE)[0].double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * own + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*POINTWISE, Shape(2, 1, 20, 24, 4, (30, 20), Conv((1, 1)))], ids=str)
def test_pointwise_backward(shape, dtype, dirty_memory):
    t = Tensors(shape, dtype, torch.channels_last)
    weight = torch.randn(shape.outputs, shape.channels, 1, 1).to(DEVICE, dtype)
    if shape.channels > tiles.POINTWISE["channels"]:
        assert not pointwise.serves_backward(t.x, weight, t.A, shape.conv)
        return
    assert pointwise.serves_backward(t.x, weight, t.A, shape.conv)
    tensors = (t.gy, t.x, t.z, weight, t.A, t.B)
    dx, *parts = pointwise.backward(*tensors, SLOPE, SCALE)
    dx_is, *are = pointwise.backward_reference(*(v.double() for v in tensors), SLOPE, SCALE)
    magnitudes = pointwise.backward_reference(*(v.double().abs() for v in tensors), SLOPE, SCALE)
    eps = torch.finfo(dtype).eps
    assert (dx.double() - dx_is).abs().max() <= 2 * eps * magnitudes[0].max()
    for part, of_image, magnitude in zip(parts, are, magnitudes[1:]):
        grads, squares = adapter_backward.add_parts(part, shape.samples)
        exact = of_image.view(shape.samples, -1, *of_image.shape[1:]).sum(1)
        largest = magnitude.view(shape.samples, -1, *of_image.shape[1:]).sum(1).max()
        assert (grads[..., 0, 0].double() - exact).abs().max() <= 2 * eps * largest  # gz is rounded to its dtype
        check_squares(squares, grads)


def test_pointwise_serves_only_what_it_computes():
    t = Tensors(SHAPES["1 x 1, rank 16"], torch.bfloat16, torch.channels_last)
    weight, conv = torch.zeros(20, 40, 1, 1, dtype=t.x.dtype), Conv((1, 1))
    assert pointwise.serves(t.x, weight, t.A, conv)
    assert not pointwise.serves(t.x.contiguous(), weight, t.A, conv)
    assert not pointwise.serves(t.x.float(), weight, t.A, conv)
    assert not pointwise.serves(t.x, weight[:, :20], t.A, conv)  # as with two groups
    assert not pointwise.serves(t.x, weight.expand(20, 40, 1, 1).repeat(10, 1, 1, 1), t.A, conv)
    assert not any(
        pointwise.serves(t.x, weight, t.A, conv._replace(**{k: (2, 2)})) for k in ("stride", "padding", "kernel")
    )


def adapter_forward_z(x, A):
    return adapter_forward.project_reference(x, A, Conv((1, 1)))


def added(y, z, B, bias=None):
    return adapter_forward.add_reference(y, z, B, bias, SLOPE, SCALE)


@every_case
def test_adapter_backward(shape, dtype, layout, dirty_memory):
    t = Tensors(shape, dtype, layout)
    gz, parts = adapter_backward.adapter_backward(t.gy, t.z, t.B, SLOPE, SCALE, shape.conv, shape.size)
    gB, squares = adapter_backward.add_parts(parts, shape.samples)

    def reference(which):
        return lambda *a: adapter_backward.adapter_backward_reference(
            *a, SLOPE, SCALE, shape.conv, shape.size, shape.samples
        )[which]

    assert gz[adapter_backward.among_zeros(torch.ones_like(t.z), shape.conv, shape.size) == 0].eq(0).all()
    check(gz, reference(0), t.gy, t.z, t.B)
    check(gB, reference(1), t.gy, t.z, t.B, through=(t.gy, t.z, t.B))
    check_squares(squares, gB)
    torch.testing.assert_close(adapter_backward.add_parts_reference(parts.sums, shape.samples), gB)


def check_squares(squares, grads):
    """Check that the squared norms are those of the very numbers in `grads`."""
    torch.testing.assert_close(squares.sum(1), grads.double().flatten(1).square().sum(1), rtol=1e-12, atol=1e-300)


@every_case
@pytest.mark.parametrize("of", ["adapter", "full layer"])
def test_sample_grad(shape, dtype, layout, of, dirty_memory):
    t = Tensors(shape, dtype, layout)
    g, conv = (t.gz, shape.conv.full()) if of == "adapter" else (t.gy, shape.conv)
    grads, squares = sample_grad.sample_grads(t.x, g, conv, shape.samples)
    check(
        sample_grad.lay_out(grads), lambda x, g: sample_grad.sample_grads_reference(x, g, conv, shape.samples), t.x, g
    )
    check_squares(squares, grads)
    assert torch.equal(sample_grad.sample_grad_squares(t.x, g, conv, shape.samples), squares)
    summed = sample_grad.weighted_grad_sum(t.x, g, conv, t.factors)
    check(summed, lambda G, c: torch.einsum("n...,n->...", G, c), grads, t.factors)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_gz_among_zeros_has_the_same_gradients(shape):
    """The gradients of the convolution itself with respect to x and A are those of `conv.full()`."""
    x, A = torch.randn(2, 3, *shape.size).double().requires_grad_(), torch.randn(2, 3, *shape.conv.kernel).double()
    z, full = adapter_forward.project_reference(x, A.requires_grad_(), shape.conv), shape.conv.full()
    gz = torch.randn(z.shape).double()
    dx, gA = torch.autograd.grad(z, (x, A), gz)
    gz, x = adapter_backward.among_zeros(gz, shape.conv, shape.size), x.detach()
    zeros = torch.zeros_like(x)
    torch.testing.assert_close(input_grad.add_input_grad_reference(zeros, gz, A.detach(), shape.conv), dx)
    torch.testing.assert_close(sample_grad.sample_grads_reference(x, gz, full, 1)[0], gA)


@every_case
def test_input_grad(shape, dtype, layout):
    t = Tensors(shape, dtype, layout)
    dx = t.x.clone()
    assert input_grad.add_input_grad_(dx, t.gz, t.A, shape.conv) is dx
    check(dx, lambda *a: input_grad.add_input_grad_reference(*a, shape.conv), t.x, t.gz, t.A)


@pytest.mark.parametrize("samples, numbers", [(1, 1), (3, 700), (70, 40), (300, 5)])
def test_clip_sum(samples, numbers):
    G, factors = torch.randn(samples, numbers, device=DEVICE), torch.rand(samples, device=DEVICE)
    check(clip_sum.clip_sum(G, factors), clip_sum.clip_sum_reference, G, factors)


def test_sums_in_parts_that_do_not_come_out_even(monkeypatch):
    """With few programs, each adds up several samples, and the last one fewer."""
    monkeypatch.setattr(tiles, "PROGRAMS", 2)
    t = Tensors(Shape(5, 1, 20, 6, 4, (6, 5), SAME), torch.float32, torch.channels_last)
    grads, _ = sample_grad.sample_grads(t.x, t.gz, SAME.full(), 5)
    summed = sample_grad.weighted_grad_sum(t.x, t.gz, SAME.full(), t.factors)
    check(summed, lambda G, c: torch.einsum("n...,n->...", G, c), grads, t.factors)
    G = torch.randn(37, 50, device=DEVICE)
    factors = torch.rand(37, device=DEVICE)
    check(clip_sum.clip_sum(G, factors), clip_sum.clip_sum_reference, G, factors)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter is numpy
def test_a_refused_sample_adds_nothing_however_broken():
    t = Tensors(SHAPES["3 x 3"], torch.float32, torch.channels_last)
    wanted = sample_grad.weighted_grad_sum(t.x, t.gz, SAME.full(), t.factors)
    t.gz[0], t.gz[0, 0, 0] = math.inf, math.nan
    assert torch.equal(sample_grad.weighted_grad_sum(t.x, t.gz, SAME.full(), t.factors), wanted)
    G = torch.tensor([[math.nan, math.inf], [1.0, 2.0]], device=DEVICE)
    assert clip_sum.clip_sum(G, torch.tensor([0.0, 0.5], device=DEVICE)).tolist() == [0.5, 1.0]


def test_a_norm_neither_overflows_nor_vanishes():
    """The squares of 1e25 and 1e-25 are beyond float32."""
    x = torch.tensor([1e25, 1e-25], device=DEVICE).view(2, 1, 1, 1)
    squares = sample_grad.sample_grad_squares(x, torch.ones_like(x), Conv((1, 1)), 2).sum(1)
    torch.testing.assert_close(squares.sqrt(), torch.tensor([1e25, 1e-25], device=DEVICE).double(), rtol=1e-6, atol=0)


def test_positions_that_cancel_leave_no_more_than_the_norm_says(monkeypatch):
    """Each sample's sum is finished before it is scaled and added to others: 1e8 - 1e8 must not leave their rounding error."""
    monkeypatch.setattr(tiles, "PROGRAMS", 1)  # one program adds up both samples
    x = torch.ones(2, 1, 1, 200, device=DEVICE)
    g = torch.full_like(x, 5.0015)
    g[1], g[1, ..., 100:], g[1, ..., 150] = 1e8, -1e8, -1e8 + 8
    norms = sample_grad.sample_grad_squares(x, g, Conv((1, 1)), 2).sum(1).sqrt()
    without, both = (
        sample_grad.weighted_grad_sum(x, g, Conv((1, 1)), torch.tensor([1.0, factor], device=DEVICE))
        for factor in (0.0, 1.0)
    )
    assert (both - without).abs().item() <= norms[1].item() + 1e-3


def test_rows_may_lie_beyond_what_32_bits_can_count():
    """Two samples are 2^31 numbers apart. On a CPU only the pages that are touched occupy memory."""
    apart = 2**31
    x, g = (
        torch.empty(apart + 36 * 4, dtype=torch.float16, device=DEVICE).as_strided((2, 4, 6, 6), (apart, 36, 6, 1))
        for _ in range(2)
    )
    A, B = torch.randn(4, 4, 3, 3, device=DEVICE).half(), torch.randn(4, 4, 1, 1, device=DEVICE).half()
    x.copy_(torch.randn(x.shape)), g.copy_(torch.randn(g.shape))
    near_x, near_g = x.clone(), g.clone()
    far, near = (sample_grad.sample_grads(*pair, SAME, 2) for pair in ((x, g), (near_x, near_g)))
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])
    assert torch.equal(adapter_forward.project(x, A, SAME), adapter_forward.project(near_x, A, SAME))
    far, near = (adapter_backward.adapter_backward(gy, near_g, B, SLOPE, SCALE, SAME, (6, 6)) for gy in (g, near_g))
    assert torch.equal(far[0], near[0]) and all(map(torch.equal, far[1], near[1]))
    gz = near[0]
    assert torch.equal(input_grad.add_input_grad_(x, gz, A, SAME), input_grad.add_input_grad_(near_x, gz, A, SAME))
    assert torch.equal(
        adapter_forward.add_(g, near_x, B, None, SLOPE, SCALE),
        adapter_forward.add_(near_g, near_x, B, None, SLOPE, SCALE),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_from_run_to_run(name):
    shape = SHAPES[name]
    t = Tensors(shape, torch.float32, torch.channels_last)

    def run():
        gz, parts = adapter_backward.adapter_backward(t.gy, t.z, t.B, SLOPE, SCALE, shape.conv, shape.size)
        grads, squares = sample_grad.sample_grads(t.x, gz, shape.conv.full(), shape.samples)
        total = clip_sum.clip_sum(grads.flatten(1), t.factors)
        return gz, *adapter_backward.add_parts(parts, shape.samples), grads, squares, total

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_in_place_needs_evenly_spaced_positions():
    y = torch.zeros(1, 2, 4, 4, device=DEVICE)[:, :, ::2, ::2]
    with pytest.raises(ValueError, match="contiguous or channels_last"):
        adapter_forward.add_(
            y, torch.zeros(1, 1, 2, 2, device=DEVICE), torch.zeros(2, 1, 1, 1, device=DEVICE), None, 0.1, 1.0
        )


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_powers_of_2_whatever_the_shape(itemsize):
    for rows, channels, positions in itertools.product((1, 3, 36, 576, 4608), (1, 3, 64, 1280), (1, 49, 4096)):
        chosen = [
            tiles.gradient(SAME, rows, channels, positions, itemsize),
            tiles.elementwise(positions, channels, itemsize),
            tiles.backward(1, positions, 1, positions, channels, rows, itemsize),
            tiles.input_grad(rows, positions, channels, itemsize),
        ]
        for sizes in chosen:
            sides = [value for name, value in sizes.items() if name in ("BP", "BC", "BM")]
            assert all(16 <= side <= 128 and side & (side - 1) == 0 for side in sides)


# ---- under a private step


@pytest.fixture
def on_kernels(monkeypatch):
    """Let the kernels compute for all tensors with numbers in the kernels' dtypes."""
    used = lambda t: t.dtype in KERNEL_DTYPES and t.numel() > 0  # noqa: E731
    for module in (arithmetic, gradient, products):
        monkeypatch.setattr(module, "on_triton", used)


PLANS = {"as planned": {}, "kept": dict.fromkeys(("KEEP_FACTOR", "FUSED_KEEP_FACTOR"), math.inf)}
PLANS["made again"] = dict.fromkeys(PLANS["kept"], 0.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="drawn shapes compile for minutes; scripts/gpu_step_check.py runs there")
@pytest.mark.parametrize("chosen", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_private_steps_are_exact(kind, chosen, counts, monkeypatch, on_kernels):
    for name, value in PLANS[chosen].items():
        monkeypatch.setattr(plan, name, value)
    drawn.hold_for(KINDS[kind][0], counts(3, 40), check_float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="scripts/gpu_step_check.py runs there")
@pytest.mark.parametrize("views", [1, 2])
def test_a_private_step_of_1_x_1_layers_in_16_bits(views, on_kernels, monkeypatch):
    """Norms are those of the very gradients, and these are the true ones up to 16-bit rounding."""
    called = []
    for name in ("forward", "backward"):
        original = getattr(pointwise, name)
        monkeypatch.setattr(pointwise, name, lambda *a, n=name, f=original: (called.append(n), f(*a))[1])
    conv = functools.partial(drawn.LoDAConv2d, activation="identity")  # no sign can change by rounding
    model = torch.nn.Sequential(
        conv(5, 8, 3, padding=1, rank=2), conv(8, 16, 1, rank=3), torch.nn.SiLU(), conv(16, 12, 1, rank=2, bias=False)
    )
    for layer in (layer for layer in model if hasattr(layer, "loda_B")):
        torch.nn.init.normal_(layer.loda_B, std=0.3)
    x = torch.randn(3 * views, 5, 6, 7)
    truth = copy.deepcopy(model).double()
    losses_of = lambda model, x: model(x).float().square().sum((1, 2, 3))  # noqa: E731
    model = model.half().to(memory_format=torch.channels_last)
    losses = lambda: losses_of(model, x.half().contiguous(memory_format=torch.channels_last))  # noqa: E731
    grads = per_sample_grads(losses(), model, views=views)
    norms = per_sample_grad_norms(losses(), model, views=views)
    assert called.count("forward") == 4 and called.count("backward") >= 4
    stacked = torch.cat([g.flatten(1) for g in grads.values()], 1).double()
    torch.testing.assert_close(norms, stacked.norm(dim=1), rtol=1e-7, atol=0)
    with monkeypatch.context() as exact:
        exact.setattr(arithmetic, "on_triton", lambda t: False)
        wanted = per_sample_grads(losses_of(truth, x.double()), truth, views=views)
    for name, grad in grads.items():
        assert (grad - wanted[name]).abs().max() <= 0.01 * wanted[name].abs().max(), name


def test_the_kernels_are_what_runs(on_kernels, monkeypatch):
    """Without the kernels, the step above would be exact too."""
    called = []
    names = [(adapter_forward, "project"), (adapter_forward, "add_"), (adapter_backward, "adapter_backward")]
    names += [(adapter_backward, "add_parts"), (input_grad, "add_input_grad_"), (sample_grad, "sample_grads")]
    for module, name in names:
        original = getattr(module, name)
        spy = lambda *a, name=name, original=original: (called.append(name), original(*a))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    model = torch.nn.Sequential(*(drawn.LoDAConv2d(4, 4, 3, padding=1, rank=2) for _ in range(2))).to(DEVICE)
    x = torch.randn(2, 4, 9, 9, device=DEVICE)
    per_sample_grad_norms(F.silu(model(x)).sum((1, 2, 3)), model)
    assert set(called) == {name for _, name in names}


@pytest.mark.parametrize("first_kept", [True, False])
def test_a_parameter_that_is_kept_in_part_is_summed_before_its_norm(first_kept, monkeypatch, on_kernels):
    """A layer is called twice; the gradients of one call are kept, with the kernel's squares, those of the other recomputed."""
    t = Tensors(SHAPES["3 x 3"], torch.float32, torch.channels_last)
    grad = PerSampleGrad(torch.Size([4, 20, 3, 3]), 3)
    full = SAME.full()
    recipes = [products.conv_recipe(None, as_it_is, x, t.gz, full, 0) for x in (t.x, t.x.flip(0))]
    for recipe, kept in zip(recipes, (first_kept, not first_kept)):
        monkeypatch.setattr(plan, "FUSED_KEEP_FACTOR", math.inf if kept else 0.0)
        grad.add(recipe)
    assert grad.kept is not None and len(grad.again) == 1
    truth = sum(sample_grad.sample_grads_reference(x.double(), t.gz.double(), full, 3) for x in (t.x, t.x.flip(0)))
    norms = squared_norms([grad], 3, t.x.device).sqrt()
    torch.testing.assert_close(norms, truth.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    summed = gradient.weighted_sums({"w": grad}, t.factors)["w"]
    check(summed, lambda G, c: torch.einsum("n...,n->...", G, c), truth.float(), t.factors)


# ---- import


@pytest.mark.parametrize("triton", ["absent", "installed"])
def test_import_needs_neither_triton_nor_a_driver(triton):
    """The GPU driver is needed only at the first launch."""
    program = f"""
import sys
if {triton == "absent"}:
    sys.modules["triton"] = None  # import raises ImportError
import torch, fastloda
layer = fastloda.LoDAConv2d(2, 3, 3, rank=1)
assert fastloda.per_sample_grad_norms(layer(torch.randn(4, 2, 5, 5)).sum((1, 2, 3)), layer).shape == (4,)
if {triton == "installed"}:
    import triton
    assert triton.runtime.driver._active is None
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
