"""torch.compile for a model whose adapters train privately: `fastloda.compile`.

A compiled region is one node of the autograd graph, in which no rule can tell the samples apart. So the adapters enter it once
for each row of the batch (`rowwise.py`): the node that writes them is outside the region and receives one gradient per row.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch._functorch.config as autograd_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastloda.errors import PrivacyError, UserError
from fastloda.loda.attach import ADAPTED, loda_layers
from fastloda.loda.layers import LoDAConv2d, LoDALinear
from fastloda.loda.rowwise import ByRow, Lines, widths

M = TypeVar("M", bound=nn.Module)

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that replay into the same memory


def compile(model: M, **options) -> M:
    """Compile `model(...)` in place by torch.compile; private steps stay exact, and so does ordinary training.

    >>> model = fastloda.compile(model)              # or its parts: for block in unet.downblocks: fastloda.compile(block)
    >>> losses = F.mse_loss(model(x), target, reduction="none").mean((1, 2, 3))
    >>> fastloda.ghost_dp_step(losses, model, optimizer, ...)

    Like `nn.Module.compile` it works in place: names, `state_dict`, adapter files, hooks and train / eval mode stay the model's
    own; copies and pickles of it are eager. What works:

    - No graph breaks: `fullgraph=True` holds where it does for the unadapted model, the paper's U-Net included. The compiler
      sees through the layers and fuses them with what lies between them. On a GPU, while gradients are wanted, a layer's forward
      and its gradients are single operations that the compiler does not look into, with the kernels of the eager layer.
    - Where PyTorch gives up compiling (graph breaks, too many versions), the rest runs eagerly and stays exact.
    - The first batch size gets code of its own, the second one code for all further sizes (`dynamic` of torch.compile);
      `DPTrainer`'s fixed-shape micro-batches need only the first. Parts with equal code share it, and PyTorch keeps 8 versions:
      for more unequal parts raise `torch._dynamo.config.recompile_limit`, or compile the whole model.
    - Autocast, channels_last memory, checkpointing inside or around the compiled part, layers that are called twice or share
      adapters.

    Memory: the adapters' gradients are held for each row, in float32 (float64 for float64), rows x adapter parameters, twice at
    the end of backward, when they are brought together. The compiled backward does not reuse what it saved ("donated buffers"),
    since a private step's probe runs it several times.

    Args:
        model: a model whose trainable parameters, if any, are adapters (`attach_loda`). The batch comes first, a sample's rows
            together, in its first tensor argument and in every LoDA layer. A layer may see several rows for one row of that
            argument, or one for several.
        options: the options of torch.compile (`fullgraph`, `dynamic`, `backend`, `mode`, `options`, `disable`).

    Raises:
        TypeError: model is no nn.Module.
        ValueError: CUDA graphs are asked for: they overwrite gradients that a step still holds.
        PrivacyError: another parameter trains in the model. Compile the parts around it instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}: compile the module that is called")
    _check_mode(**options)
    _check_trainable(model)
    layers = [layer for _, layer in loda_layers(model)]
    for layer in layers:  # set on the instance now, or the second call would be compiled anew
        layer.by_row = None
    model._compiled_call_impl = _by_row(model._call_impl, layers, options)
    return model


def _by_row(call: Callable, layers: Sequence[LoDAConv2d | LoDALinear], options: dict) -> Callable:
    """Compile call, and wrap it so that layers get their adapters by row while it runs."""

    def whole(lines, args, kwargs):  # torch.compile traces PyTorch's own modules only if something else calls them
        try:
            _give_by_row(layers, lines)
            return call(*args, **kwargs)
        finally:
            for layer in layers:
                layer.by_row = None

    compiled = torch.compile(whole, **options)

    def run(*args, **kwargs):
        rows = _leading_size((args, kwargs))
        if not rows or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return call(*args, **kwargs)
        groups = _alike(layers) if torch.is_grad_enabled() else []
        with autograd_config.patch(donated_buffer=False):
            return compiled([Lines.apply(rows, *adapters) for adapters in groups], args, kwargs)

    return run


def _leading_size(arguments) -> int:
    """Count the rows of the first tensor among the arguments; 0 if there is none."""
    return next((len(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _alike(layers: Sequence[LoDAConv2d | LoDALinear]) -> list[list[nn.Parameter]]:
    """Group the layers' adapters, each once, by their devices and dtypes."""
    groups: dict[tuple[torch.device, torch.dtype], dict[int, nn.Parameter]] = {}
    for layer in layers:
        for p in (layer.loda_A, layer.loda_B):
            groups.setdefault((p.device, p.dtype), {})[id(p)] = p
    return [list(adapters.values()) for adapters in groups.values()]


def _give_by_row(layers: Sequence[LoDAConv2d | LoDALinear], lines: Sequence[Tensor]) -> None:
    """Give the layers their adapters by row; without lines give nothing, and the layers' plain definition is compiled."""
    parts = {}
    for of_group, adapters in zip(lines, _alike(layers)):
        each = of_group.split(widths([p.shape for p in adapters]), 1)
        parts |= {id(p): part for p, part in zip(adapters, each)}
    for layer in layers if parts else ():
        layer.by_row = ByRow(parts[id(layer.loda_A)], parts[id(layer.loda_B)])


def _check_mode(mode: str | None = None, options: dict | None = None, **_) -> None:
    if mode in CUDA_GRAPHS or (options or {}).get("triton.cudagraphs"):
        raise UserError(
            f"mode={mode!r}, options={options!r} ask for CUDA graphs, which overwrite per-sample gradients that a step still "
            "holds: use the default mode or 'max-autotune-no-cudagraphs'"
        )


def _check_trainable(model: nn.Module) -> None:
    others = [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None and p.requires_grad and not (isinstance(module, ADAPTED) and key in ("loda_A", "loda_B"))
    ]
    if others:
        raise PrivacyError(
            f"{others[:5]} train in the model and are no adapters, so that a compiled step could not tell their gradients "
            "apart: freeze them, or compile the parts around them (`fastloda.compile(model.body)`) and leave their layers eager"
        )
