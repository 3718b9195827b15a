"""The same step on JAX: plain, and private by jax_privacy's per-sample clipping. Needs the extra `fastloda[peers]`.

No model is written twice: PyTorch exports the losses of a case as a graph of operations, and `OPERATIONS` has JAX's version of
each. JAX compiles the graph and chooses its own memory layout, whatever the case's.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from cases import WORKLOADS, Case
from jax import Array, lax
from jax_privacy import clipping, noise_addition
from providers import LEARNING_RATE, Contender, Privacy
from torch import Tensor, fx, nn

Arrays = Sequence[Array]


class Port(NamedTuple):
    """A case on JAX; losses(weights, frozen, batch) -> one number for each row of `batch`, a tuple of arrays."""

    losses: Callable[[Arrays, Arrays, Arrays], Array]
    weights: list[Array]  # those that train, in the order of the model's parameters
    frozen: list[Array]
    batch: tuple[Array, ...]


class Losses(nn.Module):
    """The losses of a case as a module, which is what PyTorch exports."""

    def __init__(self, case: Case):
        super().__init__()
        self.model, self.losses = case.build(), WORKLOADS[case.model].losses

    def forward(self, *batch: Tensor) -> Tensor:
        return self.losses(self.model, *batch)


class OnJax(fx.Interpreter):
    """A graph of PyTorch's operations, run on JAX's arrays."""

    def call_function(self, target, args, kwargs):
        if not isinstance(target, torch._ops.OpOverload):
            return target(*args, **kwargs)
        if (name := target.overloadpacket.__name__) not in OPERATIONS:
            raise NotImplementedError(f"jax_providers.OPERATIONS has no {name}")
        return OPERATIONS[name](*args, **kwargs)


def port(case: Case) -> Port:
    """Export a case's losses for any number of rows, and convert its weights and batch to JAX's arrays."""
    if case.dtype != "float32":
        raise NotImplementedError("only float32 is ported to JAX")
    rows, batch = torch.export.Dim("rows"), case.inputs()
    two = tuple(t.detach()[:1].expand(2, *t.shape[1:]) for t in batch)  # a single row would be taken for a constant
    exported = torch.export.export(Losses(case), two, dynamic_shapes=(tuple({0: rows} for _ in two),))
    names = [spec.target for spec in exported.graph_signature.input_specs][: -len(batch)]
    tensors = {**exported.state_dict, **exported.constants}
    trains = [tensors[name].requires_grad for name in names]
    graph = OnJax(exported.graph_module)

    def losses(weights: Arrays, frozen: Arrays, batch: Arrays) -> Array:
        weights, frozen = iter(weights), iter(frozen)
        return graph.run(*(next(weights if train else frozen) for train in trains), *batch)[0]

    arrays = [to_jax(tensors[name]) for name in names]
    return Port(
        losses,
        [a for a, train in zip(arrays, trains) if train],
        [a for a, train in zip(arrays, trains) if not train],
        tuple(map(to_jax, batch)),
    )


def to_jax(t: Tensor) -> Array:
    return jnp.array(t.detach().cpu().numpy())  # int64 becomes int32, JAX's default


def to_torch(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array))


def plain(case: Case) -> Contender:
    """Make JAX's step without privacy."""
    model = port(case)
    return _contender(model, jax.grad(_mean_loss(model)), [model.batch], optax.identity())


def private(case: Case, privacy: Privacy, mode: str) -> Contender:
    """Make jax_privacy's step: by vmap over all samples, by its own loop over micro-batches, or one by one in Python.

    A micro-batch is a single sample: where all weights train, that was faster on a CPU than two, four or eight at a time.
    """
    model = port(case)
    clip = clipping.clipped_grad(
        _mean_loss(model),
        l2_clip_norm=privacy.max_grad_norm,
        normalize_by=case.batch,
        batch_argnums=2,
        keep_batch_dim=False,
        microbatch_size=1 if mode == "micro-batches" else None,
    )
    samples = [t.reshape(case.batch, case.views, *t.shape[1:]) for t in model.batch]
    size = 1 if mode == "one by one" else case.batch
    chunks = [tuple(t[i : i + size] for t in samples) for i in range(0, case.batch, size)]
    std = privacy.noise_multiplier * clip.sensitivity()
    return _contender(model, clip, chunks, noise_addition.gaussian_privatizer(stddev=std, prng_key=0))


def _mean_loss(model: Port) -> Callable[[Arrays, Arrays, Arrays], Array]:
    return lambda weights, frozen, batch: model.losses(weights, frozen, batch).mean()


def _contender(
    model: Port, gradient: Callable, chunks: Sequence[Arrays], noise: optax.GradientTransformation
) -> Contender:
    """Make a step that sums gradient(weights, frozen, chunk) over the chunks, and then applies noise.update."""
    weights, state = [w.copy() for w in model.weights], noise.init(model.weights)
    like = model.weights
    gradient = _compiled(gradient, like, model.frozen, chunks[0])
    add = _compiled(partial(jax.tree.map, jnp.add), like, like, donate=0)
    add_noise = _compiled(noise.update, like, state, donate=0)
    descend = _compiled(partial(jax.tree.map, lambda w, g: w - LEARNING_RATE * g), like, like, donate=0)

    def mean_gradient() -> Arrays:
        nonlocal state
        total = gradient(weights, model.frozen, chunks[0])
        for chunk in chunks[1:]:
            total = add(total, gradient(weights, model.frozen, chunk))
        total, state = add_noise(total, state)
        return total

    def step() -> None:
        nonlocal weights
        weights = jax.block_until_ready(descend(weights, mean_gradient()))

    memory = [part.memory_analysis() for part in (gradient, add, add_noise, descend)]
    kept = sum(m.output_size_in_bytes - m.alias_size_in_bytes for m in memory)
    peak = kept + max(m.temp_size_in_bytes for m in memory)
    return Contender(step, lambda: list(map(to_torch, mean_gradient())), peak)


def _compiled(function: Callable, *args, donate: int | tuple[()] = ()) -> jax.stages.Compiled:
    return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def _conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    pads = [(p, p) for p in padding]
    form = ("NCHW", "OIHW", "NCHW")
    y = lax.conv_general_dilated(x, weight, stride, pads, None, dilation, form, groups)
    return y if bias is None else y + bias[:, None, None]


def _linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def _normalised(x, axes, eps):
    centred = x - x.mean(axes, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + eps)


def _group_norm(x, groups, weight, bias, eps, _):
    y = _normalised(x.reshape(len(x), groups, -1), 2, eps).reshape(x.shape)
    shape = (-1, *[1] * (x.ndim - 2))
    return y * weight.reshape(shape) + bias.reshape(shape)


def _layer_norm(x, shape, weight, bias, eps=1e-5, _=True):
    return _normalised(x, tuple(range(-len(shape), 0)), eps) * weight + bias


def _attention(q, k, v):
    return jax.nn.softmax(q @ k.mT / math.sqrt(q.shape[-1])) @ v


def _cross_entropy(logits, target, *_):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1)[:, 0]


def _dropout(x, p, _):
    if p:
        raise NotImplementedError("a port draws no random numbers")
    return x


def _flatten(x, start=0, end=-1):
    end %= x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


def _upsample(x, _, factors):
    return x.repeat(int(factors[0]), 2).repeat(int(factors[1]), 3)


OPERATIONS = {
    "_assert_tensor_metadata": lambda *_, **__: None,
    "add": jnp.add,
    "arange": lambda n, **_: jnp.arange(n),
    "cat": jnp.concatenate,
    "conv2d": _conv2d,
    "cos": jnp.cos,
    "cross_entropy_loss": _cross_entropy,
    "dropout": _dropout,
    "embedding": lambda weight, index: weight[index],
    "exp": jnp.exp,
    "flatten": _flatten,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": _linear,
    "mT": lambda x: x.mT,
    "mean": lambda x, axes: x.mean(tuple(axes)),
    "mul": jnp.multiply,
    "relu": jax.nn.relu,
    "scaled_dot_product_attention": _attention,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "slice": lambda x, axis, start, end: lax.slice_in_dim(x, start, min(end, x.shape[axis]), axis=axis),
    "square": jnp.square,
    "squeeze": jnp.squeeze,
    "sub": jnp.subtract,
    "to": lambda x, dtype: x.astype(str(dtype).removeprefix("torch.")),
    "transpose": jnp.swapaxes,
    "unbind": lambda x, axis=0: tuple(jnp.moveaxis(x, axis, 0)),
    "unflatten": lambda x, axis, sizes: x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :]),
    "unsqueeze": jnp.expand_dims,
    "upsample_nearest2d": _upsample,
}
