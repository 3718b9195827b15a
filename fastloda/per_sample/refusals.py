"""The refusals, by name and before anything changes, of whatever would void the per-sample sensitivity bound.

There are three checks: of the modules (no layer known to mix samples), of the graph (every use of every trainable parameter has
a rule), and a probe (backward from some samples must leave the others' gradients exactly zero). They can't see samples that mix
through values without gradient, such as a batch mean under `detach()`.
"""

import itertools
import math
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastloda.errors import PrivacyError
from fastloda.per_sample.backward import run_backward
from fastloda.per_sample.graph import LossGraph
from fastloda.per_sample.members import Members
from fastloda.per_sample.node import Node, parts_of
from fastloda.per_sample.regions import COMPILED
from fastloda.per_sample.rules import uncovered

JOINING = ("CatBackward0", "StackBackward0")
HIDING = "CheckpointFunctionBackward"  # reentrant checkpointing: the node hides a graph
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
    "attached since; a layer's rows must be those of the model's first input, k for each or one for every k), and leave other "
    "trainable layers out of the compiled part, or freeze them"
)
SCRIPTED_REMEDY = (
    "TorchScript made one operation of several layers; train the Python module that was scripted or traced"
)

LOOK_AGAIN = 1 / 800  # the probability that a batch is probed beside the schedule
_chance = random.SystemRandom()  # its choices are public, and no other random numbers of a run come from it


def is_power_of_two(count: int) -> bool:
    """Tell whether a count is 1, 2, 4, 8, ...: the public schedule of checks that cost little."""
    return count & (count - 1) == 0


def is_scheduled(count: int) -> bool:
    """Tell whether a count is 1, 4, 16, 64, ...: the public schedule of checks that cost as much as a step."""
    return is_power_of_two(count) and count.bit_length() % 2 == 1


@dataclass
class Looks:
    """The counts of what the probe has seen of one kind of computation, and what it must see next."""

    parted: int = 0  # the most samples with a finite loss that the probe told apart
    batches: int = 0  # the batches with this kind of computation
    by_chance: bool = False  # whether chance wants the next batch probed

    def knows(self, samples: int) -> bool:
        """Tell whether the probe has told apart at least half as many samples as there are now."""
        return samples <= 2 * self.parted

    def due(self) -> bool:
        """Tell whether to probe the next batch of a known kind: batches 1, 4, 16, 64, ... are due, and some others by chance.

        No record influences this, so that the schedule is public.
        """
        return self.by_chance or is_scheduled(self.batches + 1)

    def count(self) -> None:
        """Count a batch, probed or not, and draw whether chance wants the next one probed."""
        self.batches += 1
        self.by_chance = _chance.random() < LOOK_AGAIN


# Model -> `LossGraph.signature` of the computation -> what the probe has seen of it.
_looks: weakref.WeakKeyDictionary[nn.Module, dict[int, Looks]] = weakref.WeakKeyDictionary()


def looks_of(model: nn.Module, graph: LossGraph) -> Looks:
    """Find what the probe has seen of a model's computation."""
    return _looks.setdefault(model, {}).setdefault(graph.signature, Looks())


def trainable_parameters(members: Members) -> dict[str, nn.Parameter]:
    """Find the parameters with requires_grad by name, tied ones once under their first name, and refuse layers that mix samples.

    Raises:
        PrivacyError: nothing trains, a complex parameter trains, or a layer mixes samples.
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
    """Refuse layers with max_norm, and those with batch statistics in their output (BatchNorm) or a buffer (InstanceNorm).

    Raises:
        PrivacyError: a layer is of these kinds; the message names it.
    """
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
    """Refuse a graph in which a use of a trainable parameter has no exact rule, or rows that do not belong to one sample each.

    Raises:
        PrivacyError: names the operation, and the parameter where there is one.
    """
    if HIDING in graph.operations:
        raise PrivacyError(
            "reentrant activation checkpointing hides its parameters: pass use_reentrant=False to checkpoint"
        )
    if graph.crossings:
        raise PrivacyError(
            f"samples mix: {graph.crossings[0]} hands a sample the rows of others, by an index along the batch"
        )
    for node, kind in graph.picked.items():
        raise PrivacyError(
            f"parameter {graph.uses[node][0].name!r} is used by {node.name()} on {_cause_of_picks(kind)}; or cover(model, "
            "[name]) of a module around it that takes one row for each sample (a layer of experts), which is exact but slower"
        )
    for use in uncovered(graph):
        kind = use.node.name()
        remedy = COMPILED_REMEDY if kind == COMPILED else UNCOVERED_REMEDY
        remedy = SCRIPTED_REMEDY if kind.startswith("torch::jit::") else remedy
        raise PrivacyError(
            f"parameter {use.name!r} is used by {kind} (input {use.index}), which has no exact per-sample rule: {remedy}"
        )


def _cause_of_picks(kind: str) -> str:
    if kind in JOINING:
        return (
            f"a part of the samples, which {kind} joins with others. Call that layer once for all of them (records of unequal "
            "length padded); or hand each part's losses to GhostClipper.accumulate, one part after another"
        )
    return (
        f"rows that {kind} picks by data (a mask, an index, lengths), so that whose each row is changes from batch to batch. "
        "Compute that layer at all positions, and weigh the losses of those that do not count by 0"
    )


def check_independence(
    losses: Tensor,
    graph: LossGraph,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    samples: int,
    agree: Callable[[int], int] = lambda passes: passes,
) -> None:
    """Refuse losses if backward from some samples gives others a gradient, or these another gradient than backward from all.

    When a kind of computation is new (or its batch has more than twice the samples, or a gradient was zero and showed
    nothing), enough sets of samples are probed to tell any two samples apart: 9 backward passes for 64 samples, 14 for 1,024
    (`parting`). After that a random half is probed on a public schedule (`Looks`): two passes.

    agree: the number of passes that this process wants -> the number to make, the same on all ranks. Additional passes start
        from no sample.
    """
    looks = looks_of(model, graph)
    anew = graph.unsure or not looks.knows(samples)
    due = anew or looks.due()
    looks.count()
    parts: list[Tensor] = []
    finite = torch.zeros(samples, dtype=torch.bool, device=losses.device)
    if due:  # tested first, as what follows waits for a GPU
        finite = losses.detach().view(samples, -1).isfinite().all(1)
        parts = [finite, *(parting(finite) if anew else _random_half(finite))]
    parts += [torch.zeros_like(finite)] * (agree(len(parts)) - len(parts))
    probe = _Probe(losses, graph, parameters, finite)
    for chosen in parts:
        probe.look(chosen)
    if anew and parts and probe.saw_all:
        looks.parted = int(finite.sum())


def parting(candidates: Tensor) -> Iterator[Tensor]:
    """Yield choices [n] among the true entries of candidates [n], such that for any two entries some choice has only the first.

    Each entry is in a different half of the choices. No family of fewer choices has this property (Sperner's theorem).
    """
    entries = candidates.nonzero().flatten()
    choices = next(k for k in itertools.count() if math.comb(k, k // 2) >= len(entries))
    halves = list(itertools.islice(itertools.combinations(range(choices), choices // 2), len(entries)))
    for choice in range(choices):
        chosen = torch.zeros_like(candidates)
        chosen[entries[[choice in half for half in halves]]] = True
        yield chosen


def _random_half(candidates: Tensor) -> Iterator[Tensor]:
    numbers = candidates.nonzero().flatten().tolist()
    chosen = torch.zeros_like(candidates)
    chosen[_chance.sample(numbers, (len(numbers) + 1) // 2)] = True
    yield chosen


class _Probe:
    """The probe: it runs backward from some samples' losses, and compares each pass with the first, from all finite losses."""

    def __init__(self, losses: Tensor, graph: LossGraph, parameters: Mapping[str, nn.Parameter], finite: Tensor):
        self._losses, self._graph, self._parameters, self._finite = losses, graph, parameters, finite
        # (operation, part of its output) -> [samples]: the gradients' norms in the pass from all samples
        self._sizes: dict[tuple[Node, int], Tensor] = {}
        self._shown: set[tuple[Node, int]] = set()  # the keys of `_sizes` that a nonzero gradient has reached

    @property
    def saw_all(self) -> bool:
        """Whether nonzero gradients have reached all operations that use a parameter, and all parts of their outputs."""
        return self._shown == self._sizes.keys() and {node for node, _ in self._shown} == set(self._graph.uses)

    def look(self, chosen: Tensor) -> None:
        """Run backward from the losses of the chosen samples alone; chosen: bool [samples].

        Raises:
            PrivacyError: another sample's gradient is not zero, or a chosen one's differs from that of the first pass.
        """
        samples = len(chosen)
        weights = chosen.repeat_interleave(len(self._losses) // samples).to(self._losses.dtype)

        def on_use(node: Node, gy: Tensor, _) -> None:
            names = ", ".join(repr(use.name) for use in self._graph.uses[node])
            if gy.numel() % samples:
                raise PrivacyError(
                    f"{names}: gradient of shape {tuple(gy.shape)} for {samples} samples: the batch must come first"
                )
            for number, part in enumerate(parts_of(node, gy)):
                check(names, (node, number), part.reshape(samples, -1))

        def check(names: str, place: tuple[Node, int], rows: Tensor) -> None:
            nonzero = ((rows != 0) & ~rows.isnan()).any(1)
            if nonzero[self._finite & ~chosen].any():
                raise PrivacyError(
                    f"samples mix: the loss of some depends on the features of others at {names}. Every loss must depend on "
                    "its own sample only, and the batch must come first in every layer (batch_first=True)"
                )
            sizes = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
            whole = self._sizes.setdefault(place, sizes)
            if (_differ(sizes, whole, rows.dtype) & chosen).any():
                raise PrivacyError(
                    f"samples mix in the backward pass: some samples' gradient at {names} depends on which others are in the "
                    "batch. A hook or an autograd.Function above it may scale gradients by all of them"
                )
            if nonzero.any():
                self._shown.add(place)

        run_backward(self._losses, weights, self._graph, self._parameters, on_use, retain_graph=True)


def _differ(sizes: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Tell, for each sample, whether two finite sizes are further apart than rounding in `dtype` explains."""
    allowed = torch.finfo(dtype).eps ** 0.5 * whole + 1e-6 * whole.nan_to_num(0, 0, 0).amax()
    return ((sizes - whole).abs() > allowed) & sizes.isfinite() & whole.isfinite()


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that moves other tensors than the trainable `parameters`, which the private gradient covers.

    Raises:
        PrivacyError: the optimizer has a tensor too many or lacks one, which the message names; or it is LBFGS.
    """
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
