"""Layers, inputs and losses that the property tests draw, as awkward as PyTorch allows, all in float64.

A drawn case is a model with random parameters, inputs [samples * views, ...] in some memory layout, and a readout
that turns outputs into one loss per row. Every row's loss depends on that row alone, whatever the batch around it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import oracle
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fastloda import LoDAConv2d, LoDALinear


def hold_for(cases: st.SearchStrategy, count: int, check: Callable) -> None:
    """Run `check(case)` on `count` drawn cases, the same ones every time."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.large_base_example]
    phases = [Phase.generate, Phase.shrink]
    limits = dict(max_examples=count, deadline=None, phases=phases, suppress_health_check=quiet)

    def checked(case):
        check(case)

    settings(derandomize=True, **limits)(given(cases)(checked))()


@dataclass(repr=False)
class Case:
    model: nn.Module
    x: Tensor
    readout: str = "curved"
    views: int = 1

    @property
    def samples(self) -> int:
        return len(self.x) // self.views

    def loss_of(self, model: nn.Module, x: Tensor) -> Tensor:
        """Compute one loss per row, in the dtype of x: autocast's bf16 ends at the model's output, as it should for a loss."""
        return READOUTS[self.readout](model(x).to(x.dtype))

    def losses(self) -> Tensor:
        return self.loss_of(self.model, self.x)

    def truth(self, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
        """Compute each sample's gradient by its own backward pass through plain PyTorch, from a contiguous input.

        The input is contiguous because PyTorch 2.13 crashes in the backward of a GroupNorm whose channels_last input needs no
        gradient.
        """
        return oracle.sample_grads(composed(self.model), self.loss_of, self.x.contiguous(), self.views, dtype)

    def to(self, dtype: torch.dtype) -> "Case":
        """Round the case to `dtype`; the model is converted in place."""
        return Case(self.model.to(dtype), self.x.to(dtype), self.readout, self.views)

    def nudged(self, seed: int) -> "Case":
        """Copy the case with every parameter moved by up to half a unit of bf16, so that its roundings are new ones."""
        model = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 2**-8 * (torch.rand(p.shape, generator=generator) - 0.5))
        return Case(model, self.x, self.readout, self.views)

    def __repr__(self) -> str:
        trains = [name for name, p in self.model.named_parameters() if p.requires_grad]
        x = f"x {tuple(self.x.shape)}, strides {self.x.stride()}"
        return f"{self.model}, {x}, readout {self.readout}, views {self.views}, trains {trains}"


# ---- the same function made of PyTorch's own layers


class Composed(nn.Module):
    """A LoDA layer written out by its definition, with the layer's parameters under their names."""

    def __init__(self, layer: LoDAConv2d | LoDALinear):
        super().__init__()
        for name in ("weight", "bias", "loda_A", "loda_B"):
            self.register_parameter(name, getattr(layer, name))
        self.slope, self.scale, self.conv = layer.slope, layer.scale, None
        if isinstance(layer, LoDAConv2d):
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            settings = {name: getattr(layer, name) for name in names} | {"device": "meta"}
            base = nn.Conv2d(layer.in_channels, layer.out_channels, groups=layer.groups, **settings)
            adapter = nn.Conv2d(layer.in_channels, layer.rank, **settings)
            self.conv = base._conv_forward, adapter._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            h = F.leaky_relu(F.linear(x, self.loda_A), self.slope)
            return F.linear(x, self.weight, self.bias) + self.scale * F.linear(h, self.loda_B)
        base, adapter = self.conv
        h = F.leaky_relu(adapter(x, self.loda_A, None), self.slope)
        return base(x, self.weight, self.bias) + self.scale * F.conv2d(h, self.loda_B)


def composed(model: nn.Module) -> nn.Module:
    """Copy the model with every LoDA layer written out in plain PyTorch: same function, same parameter names, same ties."""
    model = copy.deepcopy(model)
    adapted = [layer for layer in model.modules() if isinstance(layer, (LoDAConv2d, LoDALinear))]
    plain = {layer: Composed(layer) for layer in adapted}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = plain.get(child, child)
    return plain.get(model, model)


# ---- readouts: each makes its own kind of grad_output


def ramp(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)


def curved(y: Tensor) -> Tensor:
    """A dense grad_output, different at every position."""
    y = y.flatten(1)
    return (y * ramp(y)).tanh().sum(1)


READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "curved": curved,
    "expanded": lambda y: y.flatten(1).sum(1),  # a grad_output whose strides are 0
    "channels_last": lambda y: curved(y.movedim(1, -1)),
    "transposed": lambda y: curved(y.transpose(1, -1).clone()),
    "sliced": lambda y: curved(y[..., ::2]),
    "mean": lambda y: y.flatten(1).square().mean(1),
}

# ---- memory layouts of the input

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 2 else x.t().contiguous().t(),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[..., :1].expand_as(x),
    "one channel": lambda x: x[:, :1].expand_as(x),
    "offset": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
}


def draw_case(draw, model: nn.Module, shape: tuple[int, ...], samples=None, inputs=torch.randn) -> Case:
    """Draw a case around `model`, whose inputs have `shape` after the batch dimension."""
    views = draw(st.integers(1, 3))
    samples = draw(st.integers(1, 4)) if samples is None else samples
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    model = randomise(model.double())
    lay_out = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    x = lay_out(inputs(samples * views, *shape, dtype=torch.float64))
    return Case(model, x, draw(st.sampled_from(sorted(READOUTS))), views)


def randomise(model: nn.Module) -> nn.Module:
    """Set all parameters, B included, to random values of a size that keeps activations near 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=1 / math.sqrt(max(1, p[:1].numel() if p.dim() else 1)))
    return model


def thaw_some(draw, model: nn.Module) -> nn.Module:
    """Let a drawn set of the parameters train, at least one of them."""
    parameters = list(model.parameters())
    chosen = draw(st.sets(st.integers(0, len(parameters) - 1), min_size=1))
    for i, p in enumerate(parameters):
        p.requires_grad_(i in chosen)
    return model


# ---- convolutions

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def conv_geometry(draw, dims: int = 2, largest_kernel: int = 5) -> tuple[dict, tuple[int, ...]]:
    """Draw (a convolution's arguments except its channels, an input size for which it has an output)."""
    several = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    padding = draw(st.sampled_from(["int", "pair", "same", "valid"]))
    kernel, dilation = several(1, largest_kernel), several(1, 3)
    stride = (1,) * dims if padding == "same" else several(1, 3)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation)]
    sides = {"int": [draw(st.integers(0, 3))] * dims, "pair": several(0, 3), "same": [], "valid": [0] * dims}[padding]
    mode = draw(st.sampled_from(PADDING_MODES))
    total = [2 * p for p in sides] or reach
    widest = list(sides) or [math.ceil(r / 2) for r in reach]
    smallest = [max(1, r + 1 - t, 0 if mode == "zeros" else w + 1) for r, t, w in zip(reach, total, widest)]
    size = tuple(low + extra for low, extra in zip(smallest, several(0, 5)))
    given_padding = {"int": sides[0] if sides else 0, "pair": tuple(sides)}.get(padding, padding)
    arguments = dict(kernel_size=kernel, stride=stride, padding=given_padding, dilation=dilation, padding_mode=mode)
    return arguments, size


@st.composite
def channels(draw) -> tuple[int, int, int]:
    """Draw (in_channels, out_channels, groups), often uneven numbers."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    width = st.sampled_from([1, 3, 5, 20] if groups == 1 else [1, 2, 3])
    return groups * draw(width), groups * draw(width), groups


@st.composite
def adapters(draw) -> dict:
    activation = draw(st.sampled_from(["leaky_relu", "identity"]))
    slope, scale = draw(st.sampled_from([0.1, 0.3, -0.5, 0.0])), draw(st.sampled_from([1.0, 0.5, -2.0, 0.3]))
    return dict(rank=draw(st.integers(1, 16)), activation=activation, negative_slope=slope, scale=scale)


@st.composite
def adapted_convs(draw, samples: int | None = None, base_trains: bool | None = None) -> Case:
    """Draw one LoDAConv2d of any geometry; its base may train too."""
    (c_in, c_out, groups), (geometry, size) = draw(channels()), draw(conv_geometry())
    layer = LoDAConv2d(c_in, c_out, groups=groups, bias=draw(st.booleans()), **geometry, **draw(adapters()))
    if draw(st.booleans()) if base_trains is None else base_trains:
        thaw_some(draw, layer)
    return draw_case(draw, layer, (c_in, *size), samples)


@st.composite
def adapted_linears(draw, samples: int | None = None) -> Case:
    """Draw one LoDALinear whose inputs have one to three leading dimensions."""
    c_in, c_out = draw(st.sampled_from([1, 3, 5, 20])), draw(st.sampled_from([1, 3, 5, 20]))
    layer = LoDALinear(c_in, c_out, draw(st.booleans()), **draw(adapters()))
    if draw(st.booleans()):
        thaw_some(draw, layer)
    return draw_case(draw, layer, (*draw(leading()), c_in), samples)


def leading() -> st.SearchStrategy[tuple[int, ...]]:
    """Draw the sizes of the dimensions between the batch and the features."""
    return st.lists(st.integers(1, 4), max_size=2).map(tuple)


# ---- a fault of some processors


class UnwrittenMemory(TorchDispatchMode):
    """A mode that imitates a fault of oneDNN with AMX: strided and dilated half-precision convolutions give any numbers."""

    CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.CONVOLUTIONS and args[0].dtype in (torch.bfloat16, torch.float16):
            stride, dilation = (args[3], args[5]) if func is self.CONVOLUTIONS[0] else (args[4], args[6])
            if max(stride) > 1 and max(dilation) > 1:
                tree_map(lambda t: t.fill_(torch.rand(()) * 1e3), result)
        return result


def strided_and_dilated(case: Case) -> bool:
    return max(case.model.stride) > 1 and max(case.model.dilation) > 1


# ---- plain layers


class Rows(nn.Embedding):
    """An embedding whose indices come as floats, so that the oracle can convert its inputs to any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.long())


@st.composite
def plain_linears(draw) -> Case:
    c_in, c_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    layer = thaw_some(draw, nn.Linear(c_in, c_out, draw(st.booleans())))
    return draw_case(draw, layer, (*draw(leading()), c_in))


@st.composite
def plain_convs(draw) -> Case:
    dims = draw(st.integers(1, 3))
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    groups, wide = draw(st.sampled_from([1, 2, 3])), st.integers(1, 3)
    c_in, c_out, (geometry, size) = groups * draw(wide), groups * draw(wide), draw(conv_geometry(dims, 5 - dims))
    layer = make(c_in, c_out, groups=groups, bias=draw(st.booleans()), **geometry)
    return draw_case(draw, thaw_some(draw, layer), (c_in, *size))


@st.composite
def embeddings(draw) -> Case:
    entries = draw(st.integers(2, 9))
    padding_idx = draw(st.one_of(st.none(), st.integers(-entries, entries - 1)))
    indices = lambda *shape, dtype: torch.randint(entries, shape).to(dtype)  # noqa: E731
    layer = Rows(entries, draw(st.integers(1, 4)), padding_idx)
    return draw_case(draw, layer, (draw(st.integers(1, 5)),), inputs=indices)


@st.composite
def norms(draw) -> Case:
    sizes = draw(st.lists(st.integers(1, 4), max_size=3))
    if draw(st.booleans()):
        groups = draw(st.integers(1, 3))
        layer, shape = nn.GroupNorm(groups, width := groups * draw(st.integers(2, 3))), (width, *sizes)
    else:
        normalised = draw(st.lists(st.integers(2, 5), min_size=1, max_size=2))
        layer, shape = nn.LayerNorm(normalised, bias=draw(st.booleans())), (*sizes[:2], *normalised)
    return draw_case(draw, thaw_some(draw, layer), shape)


@st.composite
def transposed_convs(draw) -> Case:
    """Draw nn.ConvTranspose1d/2d/3d with strides, paddings, dilations, groups and output_padding."""
    dims = draw(st.integers(1, 3))
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    several = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    groups, wide = draw(st.sampled_from([1, 2, 3])), st.integers(1, 3)
    kernel, stride, dilation, size = several(1, 4 - dims // 2), several(1, 3), several(1, 3), several(1, 4)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    full = [(n - 1) * s + d * (k - 1) + 1 + e for n, s, d, k, e in zip(size, stride, dilation, kernel, extra)]
    padding = tuple(draw(st.integers(0, min(2, (f - 1) // 2))) for f in full)
    c_in, c_out = groups * draw(wide), groups * draw(wide)
    layer = make(c_in, c_out, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation)
    return draw_case(draw, thaw_some(draw, layer), (c_in, *size))


class ContiguousGrad(nn.Module):
    """An identity that makes the output gradient contiguous.

    PyTorch 2.13's own backward of InstanceNorm is wrong for a single image whose output gradient is channels_last.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten().view_as(x)


@st.composite
def more_norms(draw) -> Case:
    """Draw RMSNorm, InstanceNorm1d/2d/3d with affine parameters, or BatchNorm in eval mode with trainable parameters."""
    kind = draw(st.sampled_from(["rms", "instance", "batch"]))
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    width = draw(st.integers(1, 3))
    if kind == "rms":
        normalised = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
        return draw_case(draw, nn.RMSNorm(normalised), (*sizes[:2], *normalised))
    makes = {
        "instance": [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d],
        "batch": [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d],
    }
    layer = makes[kind][len(sizes) - 1](width, affine=True)
    if kind == "batch" or draw(st.booleans()):
        layer = makes[kind][len(sizes) - 1](width, affine=True, track_running_stats=True).eval()
        layer.running_mean.normal_()
    return draw_case(draw, nn.Sequential(thaw_some(draw, layer), ContiguousGrad()), (width, *sizes))


class Bags(nn.EmbeddingBag):
    """An EmbeddingBag of bags of equal length, whose indices come as floats."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.long())


class RaggedBags(nn.EmbeddingBag):
    """An EmbeddingBag whose bags have the length that the first number of a row says, perhaps 0, and perhaps weights."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, 0].long() % x.shape[1]
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        weights = x[inside].cos() if self.mode == "sum" else None
        offsets = lengths.cumsum(0) - lengths
        return super().forward(x[inside].long(), offsets, weights)


@st.composite
def bags(draw) -> Case:
    entries, padding = draw(st.integers(2, 6)), draw(st.one_of(st.none(), st.integers(0, 1)))
    make, mode = draw(st.sampled_from([Bags, RaggedBags])), draw(st.sampled_from(["sum", "mean", "max"]))
    indices = lambda *shape, dtype: torch.randint(entries, shape).to(dtype)  # noqa: E731
    layer = make(entries, draw(st.integers(1, 3)), mode=mode, padding_idx=padding)
    return draw_case(draw, layer, (draw(st.integers(2, 5)),), inputs=indices)


class Pair(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x[..., : self.in2_features].sin())


@st.composite
def slopes_and_pairs(draw) -> Case:
    """Draw PReLU with one slope or one for each channel, or nn.Bilinear."""
    width, rest = draw(st.integers(2, 4)), draw(leading())
    if draw(st.booleans()):
        layer, shape = nn.PReLU(draw(st.sampled_from([1, width]))), (width, *rest)
    else:
        second = draw(st.integers(1, width))
        layer, shape = Pair(width, second, draw(st.integers(1, 3)), draw(st.booleans())), (*rest, width)
    return draw_case(draw, thaw_some(draw, layer), shape)


# ---- sequence first


class Attention(nn.Module):
    """nn.MultiheadAttention from x [N, L, E] to itself, to another sequence, or to keys and values of other widths."""

    def __init__(self, width: int, heads: int, keys: str, mask: str, need_weights: bool, batch_first: bool, **options):
        super().__init__()
        sizes = dict(kdim=width + 1, vdim=width + 2) if keys == "other widths" else {}
        self.inner = nn.MultiheadAttention(width, heads, batch_first=batch_first, **sizes, **options)
        self.keys, self.mask, self.need_weights, self.batch_first = keys, mask, need_weights, batch_first

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        k = {"self": x, "other": x[:, :1].sin(), "other widths": F.pad(x, (0, 1)).cos()}[self.keys]
        v = F.pad(x, (0, 2)).sin() if self.keys == "other widths" else k
        masks = {}
        if self.mask == "positions":
            masks["attn_mask"] = torch.ones(length, k.shape[1], dtype=torch.bool).triu(1)
        if self.mask == "samples":  # the mask depends on the sample, as padding does
            masks["key_padding_mask"] = (torch.arange(k.shape[1]) > 0) & (x.sum((1, 2)) > 0)[:, None]
        q, k, v = (x, k, v) if self.batch_first else (t.transpose(0, 1) for t in (x, k, v))
        y, weights = self.inner(q, k, v, need_weights=self.need_weights, **masks)
        y = y if self.batch_first else y.transpose(0, 1)
        return y + weights.sum((1, 2))[:, None, None] if self.need_weights else y

    def extra_repr(self) -> str:
        return f"keys {self.keys}, mask {self.mask}, need_weights {self.need_weights}, batch_first {self.batch_first}"


@st.composite
def attentions(draw) -> Case:
    heads = draw(st.integers(1, 2))
    width, length = heads * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    choice = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    keys = choice("self", "other", "other widths")
    options = dict(bias=draw(st.booleans()), add_bias_kv=draw(st.booleans()), add_zero_attn=draw(st.booleans()))
    mask = choice("none", "positions", "samples")
    model = Attention(width, heads, keys, mask, draw(st.booleans()), draw(st.booleans()), **options)
    return draw_case(draw, thaw_some(draw, model), (length, width))


class SequenceFirst(nn.Module):
    """A map x [N, L, C] -> y [N, L, C] whose layers see [L, N, C], or L N flattened rows, or channels and positions exchanged."""

    def __init__(self, layers: nn.Module, order: str):
        super().__init__()
        self.layers, self.order = layers, order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "rows":
            return self.layers(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], len(x))).transpose(0, 1)
        if self.order == "stacked":
            return torch.stack([self.layers(x[:, t]) for t in range(x.shape[1])]).transpose(0, 1).contiguous()
        if self.order == "pooled":
            return self.layers(x.transpose(0, 1)).mean(0)
        if self.order == "unbound":
            return sum(y.sin() for y in self.layers(x.movedim(1, 0)).unbind(0))
        order = (1, 0, 2) if self.order == "permuted" else (1, 2, 0)  # back from [L, N, C], or from [L, C, N] by a copy
        y = self.layers(x.permute(1, 0, 2).contiguous())
        return y.permute(order) if order == (1, 0, 2) else y.permute(0, 2, 1).contiguous().permute(2, 0, 1)

    def extra_repr(self) -> str:
        return self.order


class Table(nn.Module):
    """A table of positions that is added, and a scale, for x [L, N, C]."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.empty(length, 1, width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + (self.table if x.dim() == 3 else self.table[0])


@st.composite
def sequences_first(draw) -> Case:
    """Draw layers that see the sequence dimension first. In the order "rows" no dimension is left for a table of positions."""
    width, length = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    order = draw(st.sampled_from(["rows", "stacked", "pooled", "unbound", "permuted", "copied"]))
    makes = {
        "linear": lambda: nn.Linear(width, width),
        "adapter": lambda: LoDALinear(width, width, rank=2),
        "layer norm": lambda: nn.LayerNorm(width) if width > 1 else nn.Linear(1, 1, bias=False),
        "table": lambda: Table(length if order not in ("rows", "stacked") else 1, width),
        "no bias": lambda: nn.Linear(width, width, bias=False),
    }
    names = draw(st.lists(st.sampled_from(sorted(makes)), min_size=1, max_size=3))
    model = SequenceFirst(nn.Sequential(*(makes[name]() for name in names)), order)
    return draw_case(draw, thaw_some(draw, model), (length, width))


class Recurrent(nn.Module):
    """An RNN, LSTM or GRU. In float64 on the CPU, PyTorch composes it of linear maps that see the sequence dimension first."""

    def __init__(self, inner: nn.RNNBase):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        turn = (lambda t: t) if self.inner.batch_first else (lambda t: t.transpose(0, 1))
        return turn(self.inner(turn(x))[0])


@st.composite
def recurrent(draw) -> Case:
    make = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
    options = dict(bias=draw(st.booleans()), batch_first=draw(st.booleans()), bidirectional=draw(st.booleans()))
    width = draw(st.integers(1, 3))
    layer = make(width, draw(st.integers(1, 3)), draw(st.integers(1, 2)), **options)
    return draw_case(draw, Recurrent(thaw_some(draw, layer)), (draw(st.integers(1, 4)), width))


# ---- parameters reshaped, combined and repeated

# name -> (shape of the parameter p, function of x [N, 3, 4] and p)
FORMS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "x / p": ((4,), lambda x, p: x / p),
    "p / x": ((3, 1), lambda x, p: p / (x.square() + 1)),
    "x - p": ((4,), lambda x, p: x - p),
    "p - 2 x": ((3, 4), lambda x, p: torch.sub(p, x, alpha=2)),
    "addcmul's first": ((4,), lambda x, p: torch.addcmul(p, x, x.sin(), value=0.5)),
    "addcmul's second": ((3, 1), lambda x, p: torch.addcmul(x, p, x.sin(), value=-2)),
    "addcmul's third": ((), lambda x, p: torch.addcmul(x, x.sin(), p)),
    "view": ((12,), lambda x, p: x * p.view(3, 4)),
    "unsqueeze": ((3,), lambda x, p: x * p[:, None]),
    "permute": ((4, 1, 3), lambda x, p: x + p.permute(1, 2, 0)),
    "slice": ((5, 6), lambda x, p: x * p[1:4, 1:5]),
    "strided slice": ((6, 8), lambda x, p: x * p[::2, 1::2]),
    "select": ((2, 4), lambda x, p: x * p[1] + p[0]),
    "split": ((8,), lambda x, p: x * p.split(4)[1] + p.chunk(2)[0]),
    "uneven split": ((7,), lambda x, p: x * p.split([3, 4])[1] + p.split([3, 4])[0][:, None]),
    "expand": ((4,), lambda x, p: x * p.expand(3, 4)),
    "expand as x": ((1, 4), lambda x, p: x * p.expand_as(x)),
    "repeat": ((2,), lambda x, p: x * p.repeat(3, 2)),
    "repeat as x": ((1, 2), lambda x, p: x * p.repeat(len(x), 3, 2)),
    "class token": ((1, 1, 4), lambda x, p: torch.cat([p.expand(len(x), 1, 4), x.sin()], 1)),
    "repeated token": ((2, 4), lambda x, p: torch.cat([p.repeat(len(x), 1, 1), x.sin()], 1)),
    "token in the middle": ((3, 1, 2), lambda x, p: torch.cat([p.transpose(0, 1).repeat(len(x), 1, 2), x], 2)),
    "repeated with the batch second": (
        (3, 1, 2),
        lambda x, p: torch.cat([p.repeat(1, len(x), 2), x.transpose(0, 1)], 2).transpose(0, 1).contiguous(),
    ),
    "matrix times vector": ((4,), lambda x, p: (x @ p)[..., None] * x),
    "x @ p": ((4, 2), lambda x, p: x @ p),
    "x.mT @ p": ((3, 2), lambda x, p: x.mT @ p),
    "einsum": ((2, 4), lambda x, p: torch.einsum("ntc,oc->nto", x, p)),
    "einsum, p first": ((4, 2), lambda x, p: torch.einsum("co,ntc->nto", p, x)),
    "einsum over positions": ((3, 2), lambda x, p: torch.einsum("ntc,to->noc", x, p)),
    "einsum by position": ((3, 4, 2), lambda x, p: torch.einsum("ntc,tco->nto", x, p)),
    "a slice of a weight": ((5, 6), lambda x, p: F.linear(x, p[1:3, 2:])),
    "batch second": ((4,), lambda x, p: (x[None] * p)[0]),
}


class Form(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        shape, self.form = FORMS[name]
        self.name, self.p = name, nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.p)

    def extra_repr(self) -> str:
        return self.name


@st.composite
def forms(draw) -> Case:
    return draw_case(draw, Form(draw(st.sampled_from(sorted(FORMS)))), (3, 4))


# ---- parameters broadcast along the batch


def turned(p: Tensor) -> Tensor:
    """Transpose p once if that leaves its shape as it is, otherwise twice."""
    if p.dim() > 2:
        return p
    return p.t() if p.shape == p.shape[::-1] else p.t().t()


COMBINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "x - 3 p": lambda x, p: torch.add(x, p, alpha=-3),
    "p + x / 2": lambda x, p: torch.add(p, x, alpha=0.5),
    "x * p": lambda x, p: x * p,
    "p * x": lambda x, p: p * x,
    "cast": lambda x, p: x * p.to(x.dtype, copy=True),
    "transposed": lambda x, p: x + turned(p),
    "in place +": lambda x, p: (x * torch.ones_like(x + p)).add_(p, alpha=2),
    "in place *": lambda x, p: (x * torch.ones_like(x + p)).mul_(p),
}


class Combined(nn.Module):
    """A combination of features with two parameters of any shapes that broadcast, or with the same parameter twice."""

    def __init__(self, first: str, second: str, p_shape: tuple[int, ...], q_shape: tuple[int, ...] | None):
        super().__init__()
        self.first, self.second = first, second
        self.p = nn.Parameter(torch.empty(p_shape))
        self.q = self.p if q_shape is None else nn.Parameter(torch.empty(q_shape))

    def forward(self, x: Tensor) -> Tensor:
        y = COMBINED[self.second](COMBINED[self.first](x, self.p).sin(), self.q)
        return y.reshape(len(x), -1)

    def extra_repr(self) -> str:
        return f"{self.first}, {self.second}, p {tuple(self.p.shape)}, q {tuple(self.q.shape)}"


@st.composite
def broadcasts(draw) -> Case:
    """Draw x [N, *size] and parameters of shape [1, *size] or the end of it; any dimension may be 1 instead."""
    size = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    thinned = lambda sizes: tuple(draw(st.sampled_from([1, n])) for n in sizes)  # noqa: E731
    shape = lambda: thinned([1, *size][draw(st.integers(0, len(size) + 1)) :])  # noqa: E731
    ways = st.sampled_from(sorted(COMBINED))
    model = Combined(draw(ways), draw(ways), shape(), shape() if draw(st.booleans()) else None)
    return draw_case(draw, thaw_some(draw, model), thinned(size))


# ---- several layers, and several uses of one


class Twice(nn.Module):
    """A layer applied to its own output."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.sin(self.layer(x)))


class TiedBack(nn.Module):
    """W^T sin(W x + b): the same weight is used once as it is and once transposed."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.there = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.there(x).sin(), self.there.weight.t())


class TiedTable(nn.Module):
    """An embedding whose table also computes the output scores, as in language models with tied weights."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.table = Rows(entries, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.table(x).sin(), self.table.weight)


def tied_adapters(width: int) -> nn.Module:
    """Make two adapted convolutions that share A; the second also shares its weight with a plain convolution."""
    first, second = (LoDAConv2d(width, width, 3, padding=1, rank=2) for _ in range(2))
    plain = nn.Conv2d(width, width, 3, padding=1)
    second.loda_A, second.weight = first.loda_A, plain.weight
    return nn.Sequential(first, nn.SiLU(), second, plain)


def _lora(width: int) -> nn.Module:
    return LoDAConv2d(width, width, 3, padding=1, rank=3, activation="identity", scale=0.5)


BLOCKS: dict[str, Callable[[int], nn.Module]] = {  # each maps [N, width, H, W] to that shape
    "loda": lambda width: LoDAConv2d(width, width, 3, padding=1, rank=2),
    "lora": _lora,
    "conv": lambda width: nn.Conv2d(width, width, 3, padding=1),
    "grouped": lambda width: nn.Conv2d(width, width, 1, groups=2),
    "group norm": lambda width: nn.GroupNorm(2, width),
    "in place": lambda width: nn.Sequential(nn.SiLU(), nn.LeakyReLU(0.2, inplace=True)),
    "smooth": lambda width: nn.SiLU(),
    "twice loda": lambda width: Twice(LoDAConv2d(width, width, (1, 3), padding=(0, 1), rank=2)),
    "twice conv": lambda width: Twice(nn.Conv2d(width, width, 1)),
    "tied": tied_adapters,
}
TRAINABLE_BLOCKS = sorted(name for name in BLOCKS if name not in ("in place", "smooth"))


class Checkpointed(nn.Module):
    """A checkpoint around `inner`, which is computed again in backward."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def checkpoint_some(draw, layers: list[nn.Module]) -> list[nn.Module]:
    """Checkpoint a drawn set of the layers, and perhaps the first few once more as one."""
    layers = [Checkpointed(layer) if draw(st.booleans()) else layer for layer in layers]
    together = draw(st.integers(0, len(layers)))
    return [Checkpointed(nn.Sequential(*layers[:together])), *layers[together:]]


@st.composite
def stacks(draw, checkpointed: bool = False) -> Case:
    """Draw blocks in a row, some called twice or tied, and perhaps a linear head; any of the parameters train."""
    width, size = draw(st.sampled_from([2, 4, 6])), draw(st.tuples(st.integers(1, 5), st.integers(2, 6)))
    names = [draw(st.sampled_from(TRAINABLE_BLOCKS)), *draw(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=3))]
    layers = [BLOCKS[name](width) for name in names]
    numbers = width * size[0] * size[1]
    heads = [[], [nn.Flatten(), nn.Linear(numbers, 3)], [nn.Flatten(), LoDALinear(numbers, 3, rank=2)]]
    layers += draw(st.sampled_from(heads))
    model = nn.Sequential(*(checkpoint_some(draw, layers) if checkpointed else layers))
    return draw_case(draw, thaw_some(draw, model), (width, *size))


@st.composite
def reused_linears(draw) -> Case:
    """Draw linear weights that are used twice, tied to an embedding, or transposed."""
    width, inner = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    kind = draw(st.sampled_from(["back", "table", "twice", "twice loda"]))
    shape, inputs = (draw(st.integers(1, 3)), width), torch.randn
    if kind == "table":
        model, shape = TiedTable(7, width), shape[:1]
        inputs = lambda *shape, dtype: torch.randint(7, shape).to(dtype)  # noqa: E731
    else:
        square = nn.Linear(width, width) if kind == "twice" else LoDALinear(width, width, rank=2)
        model = TiedBack(width, inner) if kind == "back" else Twice(square)
    return draw_case(draw, model, shape, inputs=inputs)


def plain_layers() -> st.SearchStrategy[Case]:
    return st.one_of(plain_linears(), plain_convs(), embeddings(), norms())
