"""Refuse, by name and before anything changes, whatever would void the per-sample sensitivity bound.

Three nets: the modules (layers known to mix samples), the graph (every use of every trainable parameter has a rule), and a
probe (backward from some samples must leave the others' gradients exactly zero). What they can't see is samples that mix
through values without gradient, such as a batch mean under `detach()`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastloda.errors import PrivacyError
from fastloda.graph import LossGraph
from fastloda.members import Members
from fastloda.records import run_backward
from fastloda.regions import COMPILED
from fastloda.rules import uncovered

HIDING = "CheckpointFunctionBackward"  # reentrant checkpointing: a graph within a node, which can't be looked into
COVERED_LAYERS = (
    "LoDAConv2d, LoDALinear, Linear, Bilinear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding, EmbeddingBag, GroupNorm, "
    "InstanceNorm, LayerNorm, RMSNorm, MultiheadAttention, PReLU"
)
UNCOVERED_REMEDY = (
    "call fastloda.cover(model) before the forward pass, which gives its layer an exact but slower rule (where it is a penalty "
    "added to the losses: the optimizer's weight_decay instead); give it a faster one by fastloda.register_rule; freeze it with "
    f"requires_grad_(False); or use a covered layer ({COVERED_LAYERS}), or a scale or shift that all samples share"
)
COMPILED_REMEDY = (
    "torch.compile made one operation of its layer and others; use fastloda.compile(model) for adapters (once more if they were "
    "attached since), and leave other trainable layers out of the compiled part, or freeze them"
)

# Model -> signature of the computation -> number of samples that the probe parted.
_probed: weakref.WeakKeyDictionary[nn.Module, dict[int, int]] = weakref.WeakKeyDictionary()


def trainable_parameters(members: Members) -> dict[str, nn.Parameter]:
    """Name -> parameter with requires_grad; tied parameters once, under their first name.

    Raises:
        PrivacyError: nothing trains, or a layer mixes samples.
    """
    check_layers(members)
    parameters = {name: p for name, p in members.parameters.items() if p.requires_grad}
    if complex_ones := [name for name, p in parameters.items() if p.is_complex()]:
        raise PrivacyError(
            f"parameter {complex_ones[0]!r} is complex, and no rule covers it: hold its two parts in a real parameter "
            "[..., 2], of which the forward pass makes it by torch.view_as_complex; or freeze it"
        )
    if not parameters:
        raise PrivacyError(
            "the model has no parameter with requires_grad: attach adapters first (fastloda.attach_loda)"
        )
    return parameters


def check_layers(members: Members) -> None:
    """Refuse batch statistics: in the output (BatchNorm) or in a buffer (running statistics of InstanceNorm)."""
    for name, module in members.modules.items():
        if getattr(module, "max_norm", None) is not None:
            raise PrivacyError(
                f"layer {name or '(the model)'!r} ({type(module).__name__}) has max_norm: its forward pass rescales the "
                "rows that the batch looks up, and so releases which they are"
            )
        batch_norm = isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats)
        instance_norm = isinstance(module, _InstanceNorm) and module.training and module.track_running_stats
        if batch_norm or instance_norm:
            raise PrivacyError(
                f"layer {name or '(the model)'!r} ({type(module).__name__}) takes statistics over the batch, so that one sample "
                "changes the others' gradients; use GroupNorm, or .eval() with public running statistics"
            )


def check_graph(graph: LossGraph) -> None:
    """Every use of a trainable parameter must have an exact rule."""
    if HIDING in graph.operations:
        raise PrivacyError(
            "reentrant activation checkpointing hides its parameters: pass use_reentrant=False to checkpoint"
        )
    for use in uncovered(graph):
        kind = use.node.name()
        remedy = COMPILED_REMEDY if kind == COMPILED else UNCOVERED_REMEDY
        raise PrivacyError(
            f"parameter {use.name!r} is used by {kind} (input {use.index}), which has no exact per-sample rule: {remedy}"
        )


def check_independence(
    losses: Tensor,
    graph: LossGraph,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    samples: int,
    agree: Callable[[int], int] = lambda passes: passes,
) -> None:
    """Backward from some samples must leave every gradient of the others exactly zero, for enough choices to part any two.

    Done once for each kind of computation that the model does (again for a batch of more than twice the samples, or where a
    gradient was zero anyway and showed nothing); it then costs 2 log2(samples) backward passes.

    agree: the passes wanted here -> those to be made, where all ranks must make the same number; the rest choose no sample.
    """
    probed = _probed.setdefault(model, {})
    finite, parts = torch.zeros(samples, dtype=torch.bool, device=losses.device), []
    if samples > 2 * probed.get(graph.signature, 0):  # first: what follows waits for the GPU
        finite = losses.detach().view(samples, -1).isfinite().all(1)
        parts = list(parting(finite))
    parts += [torch.zeros_like(finite)] * (agree(len(parts)) - len(parts))
    shown: set[Node] = set()
    for chosen in parts:
        shown |= _probe(losses, graph, parameters, chosen, others=finite & ~chosen)
    if parts and shown == set(graph.uses):
        probed[graph.signature] = samples


def parting(candidates: Tensor) -> Iterator[Tensor]:
    """Choices among the true, such that for any i and j of them one has i and not j: by the bits of their number."""
    count = int(candidates.sum())
    numbers = candidates.cumsum(0) - 1
    for bit in range((count - 1).bit_length() if count else 0):
        has_bit = (numbers >> bit) % 2 == 1
        yield candidates & has_bit
        yield candidates & ~has_bit


def _probe(
    losses: Tensor, graph: LossGraph, parameters: Mapping[str, nn.Parameter], chosen: Tensor, others: Tensor
) -> set[Node]:
    """Backward from the losses of the chosen samples alone. Returns the operations that some gradient reached."""
    samples, reached = len(chosen), set()
    weights = chosen.repeat_interleave(len(losses) // samples).to(losses.dtype)

    def on_record(node: Node, gy: Tensor, _) -> None:
        names = ", ".join(repr(use.name) for use in graph.uses[node])
        if gy.numel() % samples:
            raise PrivacyError(
                f"{names}: gradient of shape {tuple(gy.shape)} for {samples} samples: the batch must come first"
            )
        nonzero = ((gy != 0) & ~gy.isnan()).reshape(samples, -1).any(1)
        if nonzero[others].any():
            raise PrivacyError(
                f"samples mix: the loss of some depends on the features of others at {names}. Every loss must depend on "
                "its own sample only, and the batch must come first in every layer (batch_first=True)"
            )
        if nonzero.any():
            reached.add(node)

    run_backward(losses, weights, graph, parameters, on_record, retain_graph=True)
    return reached


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """What the optimizer moves must be exactly what the private gradient covers."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PrivacyError("LBFGS evaluates the loss by itself, outside the private step: use a first-order optimizer")
    listed = {}
    for g, group in enumerate(optimizer.param_groups):
        listed.update(
            {id(p): (f"optimizer.param_groups[{g}]['params'][{i}]", p) for i, p in enumerate(group["params"])}
        )
    covered = {id(p) for p in parameters.values()}
    for key, (place, parameter) in listed.items():
        if parameter.requires_grad and key not in covered:
            raise PrivacyError(
                f"{place} (shape {tuple(parameter.shape)}) trains but is no trainable parameter of the model"
            )
        if not parameter.requires_grad and parameter.grad is not None:
            raise PrivacyError(
                f"{place} (shape {tuple(parameter.shape)}) is frozen but holds a non-private .grad: set it to None"
            )
    missing = [name for name, p in parameters.items() if id(p) not in listed]
    if missing:
        raise PrivacyError(f"the optimizer lacks trainable parameters {missing[:5]}: add them, or freeze them")


class FrozenWatch:
    """Refuses buffers and frozen parameters that a forward pass wrote to: they would hold private statistics, unnoised."""

    def __init__(self, members: Members):
        self._seen = _versions(members)

    def check(self, members: Members) -> None:
        """members: of the same model, now."""
        for name, (tensor, version) in _versions(members).items():
            seen, seen_version = self._seen.get(name, (tensor, version))
            if tensor is not seen or version != seen_version:
                raise PrivacyError(
                    f"{name!r} changed since the last step: it would release private statistics, or how many batches there were, "
                    "unnoised. What only the weights determine (spectral_norm) stays as it is if that part is in eval mode"
                )


def _versions(members: Members) -> dict[str, tuple[Tensor, int]]:
    """Tensors, not their ids: the id of a tensor that was replaced may come back."""
    frozen = {name: p for name, p in members.parameters.items() if not p.requires_grad}
    return {name: (tensor, tensor._version) for name, tensor in (frozen | members.buffers).items()}
