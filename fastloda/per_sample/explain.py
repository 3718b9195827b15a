"""A table of how a private step would handle each layer, at what cost, and of what it would refuse.

    fastloda.explain(model, x)

The costs are the planner's: bytes held until the clip factors are known, and flops as opt_einsum counts them.
"""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.backward import of_parameter, run_backward
from fastloda.per_sample.batch_axis import LAYER_CALL
from fastloda.per_sample.fallback.functional import FunctionalRule, cover
from fastloda.per_sample.fallback.layer_call import tensors
from fastloda.per_sample.gradient import PerSampleGrad
from fastloda.per_sample.graph import LossGraph, Use, trace
from fastloda.per_sample.members import Members
from fastloda.per_sample.node import Node, output_shape
from fastloda.per_sample.planner import Sizes, Way, choose, costs
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.refusals import check_graph, check_independence, trainable_parameters
from fastloda.per_sample.rules import uncovered

HEAD = "layer,class,operation,parameters,rows,way,gradients,recipe,flops: kept,made again,ghost,".split(",")
LEFT = (0, 1, 2, 5, 11)  # columns aligned to the left


@dataclass(frozen=True)
class Row:
    """The table's row for one trainable layer. Costs are summed over its parameters and calls.

    Attributes:
        layer, kind: the layer's name and class.
        operations: the kinds of the operations that use its parameters.
        parameters: how many numbers it trains.
        samples, positions: the operation has samples x positions rows; a sample uses each of the largest parameter's entries
            `positions` times.
        way: "kept", "made again" or "ghost", as the planner chooses for the largest parameter; "functional" through torch.func;
            "registered" by the layer's own rule; "refused"; or "unused", if the loss does not depend on the layer.
        gradient_bytes: the size of the per-sample gradients, if all were kept.
        recipe_bytes: the size of the recipes.
        flops: way -> the flops of norms and clipped sum, for the ways that are open to the largest parameter.
        held_bytes, planned_flops: the costs of the ways that the planner chooses.
        note: why another way is not open, or what it would cost.
    """

    layer: str
    kind: str
    operations: tuple[str, ...]
    parameters: int
    samples: int
    positions: int
    way: str
    gradient_bytes: int
    recipe_bytes: int
    flops: Mapping[str, int]
    held_bytes: int
    planned_flops: int
    note: str


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`, whose `str` is the table.

    Attributes:
        rows: one row for each trainable layer.
        refused: what a step would refuse, and why; empty if it would run.
    """

    rows: tuple[Row, ...]
    refused: tuple[str, ...]

    @property
    def held_bytes(self) -> int:
        """The bytes that a step holds until the clip factors are known."""
        return sum(row.held_bytes for row in self.rows)

    @property
    def flops(self) -> int:
        """The flops of norms and clipped sums, without those of the forward and backward passes."""
        return sum(row.planned_flops for row in self.rows)

    def __str__(self) -> str:
        sums = [
            sum(getattr(row, name) for row in self.rows) for name in ("parameters", "gradient_bytes", "recipe_bytes")
        ]
        total = ("total", "", "", f"{sums[0]:,}", "", "", _bytes(sums[1]), _bytes(sums[2]), "", "", "", "")
        planned = f"as planned: {_bytes(self.held_bytes)} held, {_count(self.flops)} flops beside forward and backward"
        return "\n".join(
            [*_align([HEAD, *map(_cells, self.rows), total]), planned, *map("refused: {}".format, self.refused)]
        )


def explain(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, show: bool = True
) -> Explanation:
    """Print how a private step would handle each trainable layer, at what cost, and what it would refuse, by name.

    Runs one forward pass on inputs and several backward passes. Changes no parameter, `.grad` or buffer, and no default random
    number generator.

    Args:
        inputs: the model's arguments; the batch is the first dimension of the first tensor among them.
        loss: a function from what the model returns to one number per sample. Default: the sum of squares of all it returns.
        show: whether to print the table; it is returned in any case, as an object whose `str` is the table.

    Raises:
        ValueError: no input has a batch, nothing trains, or loss does not give one number per sample.
    """
    given = [t for t in tensors(inputs) if t.dim()]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not given or not parameters:
        raise UserError(
            f"explain needs an input with a batch, got {len(given)}, and trainable parameters, got {len(parameters)}"
        )
    with _as_it_is(model, given), torch.enable_grad():
        losses = loss(model(*inputs)) if loss else _squares(model(*inputs))
        samples = len(given[0])
        if losses.dim() != 1 or len(losses) != samples:
            raise UserError(f"loss must give one number for each of {samples} samples, got shape {tuple(losses.shape)}")
        found = _explanation(model, losses, parameters, samples)
    if show:
        print(found)
    return found


@contextmanager
def _as_it_is(model: nn.Module, given: Sequence[Tensor]) -> Generator[None]:
    """Cover the model inside, and restore its buffers and forwards and the random number generators afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {t.device for t in given if t.is_cuda}
    forwards = {layer: layer.__dict__.get("forward") for layer in model.modules()}
    cover(model)
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no per-sample rule.*")  # the table shows it
            yield
    finally:
        for layer, forward in forwards.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


def _explanation(model: nn.Module, losses: Tensor, parameters: Mapping[str, nn.Parameter], samples: int) -> Explanation:
    whole = trace(losses, parameters)
    lacking = {use.name: use for use in reversed(uncovered(whole))}
    sound = {name: p for name, p in parameters.items() if name not in lacking}
    graph = trace(losses, sound)
    refused, found = [], {}
    for check in (
        lambda: trainable_parameters(Members.of(model)),
        lambda: check_graph(whole),
        lambda: check_independence(losses, graph, model, sound, samples),
        lambda: found.update(_sizes(losses, graph, sound, samples)),
    ):
        try:
            check()
        except PrivacyError as error:
            refused.append(str(error))
    layers = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    rows = tuple(_row(model, layer, parameters, found, lacking, samples) for layer in layers)
    others = [f"parameter {name!r} too: {use.node.name()}" for name, use in list(lacking.items())[1:]]
    return Explanation(rows, tuple(refused + others))


Found = Mapping[str, Sequence[tuple[Use, Sizes]]]  # parameter -> its uses, each with its sizes for the planner


def _sizes(losses: Tensor, graph: LossGraph, parameters: Mapping[str, nn.Parameter], samples: int) -> Found:
    found = {name: [] for name in parameters}

    def on_use(node: Node, gy: Tensor, make_recipes: Callable[[int], dict[int, Recipe]]) -> None:
        recipes = make_recipes(samples)
        for use in graph.uses[node]:
            grad = PerSampleGrad(parameters[use.name].shape, samples)
            found[use.name].append((use, grad.sizes(of_parameter(use, recipes[use.index], samples))))

    run_backward(losses, torch.ones_like(losses), graph, parameters, on_use, retain_graph=True)
    return found


def _row(
    model: nn.Module,
    layer: str,
    parameters: Mapping[str, nn.Parameter],
    found: Found,
    lacking: Mapping[str, Use],
    samples: int,
) -> Row:
    names = [name for name in parameters if name.rpartition(".")[0] == layer]
    uses = [pair for name in names for pair in found.get(name, ())]
    refused = [lacking[name] for name in names if name in lacking]
    largest = max(uses, key=lambda pair: pair[1].numbers, default=None)
    way, note = _way(refused, largest)
    planned = [costs(s)[choose(s)] for _, s in uses]
    return Row(
        layer=layer or "(the model)",
        kind=type(model.get_submodule(layer)).__name__,
        operations=tuple(dict.fromkeys(map(_operation, [u for u, _ in uses] + refused))),
        parameters=sum(parameters[name].numel() for name in names),
        samples=samples,
        positions=_positions(largest),
        way=way,
        gradient_bytes=sum(4 * s.samples * s.numbers for _, s in uses),
        recipe_bytes=sum(s.recipe for _, s in uses),
        flops=_flops(largest, [s for _, s in uses]),
        held_bytes=sum(cost.held for cost in planned),
        planned_flops=sum(cost.flops for cost in planned),
        note=note,
    )


def _operation(use: Use) -> str:
    return use.node.name().removesuffix("0").removesuffix("Backward")


def _flops(largest: tuple[Use, Sizes] | None, all_sizes: Sequence[Sizes]) -> dict[str, int]:
    """Count the flops of each way open to the largest parameter; where it is not open to another, that counts as planned."""
    ways = costs(largest[1]) if largest else ()
    return {str(way): sum((costs(s).get(way) or costs(s)[choose(s)]).flops for s in all_sizes) for way in ways}


def _way(refused: Sequence[Use], largest: tuple[Use, Sizes] | None) -> tuple[str, str]:
    """Name the way that is chosen for a layer's largest parameter, with a note on the alternative."""
    if refused:
        return "refused", f"{refused[0].name!r} has no rule for {refused[0].node.name()}"
    if largest is None:
        return "unused", "no gradient reached it"
    use, sizes = largest
    if use.node.name() == LAYER_CALL:
        slow = isinstance(use.node.call.rule, FunctionalRule)
        return ("functional", "through torch.func: slower") if slow else ("registered", "by its own rule")
    way = choose(sizes)
    if way is Way.GHOST:
        return way, ""
    if not sizes.ghost:
        return (
            way,
            "ghost: kernels store no gradient either" if sizes.fused else "ghost: no bound that is sound and tight",
        )
    return way, f"ghost: {costs(sizes)[Way.GHOST].time / costs(sizes)[way].time:.2g} x the cost of {way}"


def _positions(largest: tuple[Use, Sizes] | None) -> int:
    if largest is None:
        return 0
    use, sizes = largest
    if sizes.product:
        return sizes.product[1][0][0 if len(sizes.product[1][0]) == 2 else 2] // sizes.samples
    entries = use.shape[-1] if "Embedding" in use.node.name() else use.shape.numel()
    return max(1, output_shape(use.node).numel() // (sizes.samples * max(1, entries)))


def _squares(outputs: Any) -> Tensor:
    found = [t for t in tensors(outputs) if t.is_floating_point() and t.requires_grad]
    if not found:
        raise UserError("the model returns nothing that depends on its trainable parameters: pass a loss")
    rows = len(found[0])
    return reduce(torch.add, (t.reshape(rows, -1).float().square().sum(1) for t in found if t.dim() and len(t) == rows))


# ---- as text


def _cells(row: Row) -> tuple[str, ...]:
    flops = [_count(row.flops[way]) if way in row.flops else "-" for way in Way]
    operations = ", ".join(row.operations)
    rows = f"{row.samples} x {row.positions}"
    numbers = (f"{row.parameters:,}", rows, str(row.way), _bytes(row.gradient_bytes), _bytes(row.recipe_bytes))
    return row.layer, row.kind, operations, *numbers, *flops, row.note


def _align(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    pad = lambda i, cell: cell.ljust(widths[i]) if i in LEFT else cell.rjust(widths[i])  # noqa: E731
    return ["  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines]


def _bytes(count: int) -> str:
    return _scale(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _count(count: int) -> str:
    return _scale(count, 1000, ("", "k", "M", "G", "T", "P"))


def _scale(count: int, step: int, units: Sequence[str]) -> str:
    value, unit = float(count), 0
    while value >= step and unit < len(units) - 1:
        value, unit = value / step, unit + 1
    return f"{value:.3g} {units[unit]}".rstrip()
