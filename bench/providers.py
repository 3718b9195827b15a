"""Who takes the training step: plain PyTorch without privacy, FastLoDA, and Opacus in each of its modes.

A provider is `make(case, privacy) -> Contender`; whatever it raises, there or in a step, is its result for the case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from adapters import trainable, use_loda_layers
from cases import Case
from torch import Tensor, nn

from fastloda import CapturedStep, GhostClipper, ghost_dp_step


@dataclass(frozen=True)
class Privacy:
    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0


@dataclass(frozen=True)
class Contender:
    """step(): a whole training step, after which no gradient is held. optimizer: the torch optimizer that it steps."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer

    def gradients(self) -> list[Tensor]:
        """What one step gives its optimizer, in the order of the model's parameters."""
        found: list[Tensor] = []

        def keep(optimizer, *_) -> None:
            found.extend(p.grad.detach().clone() for group in optimizer.param_groups for p in group["params"])

        hook = self.optimizer.register_step_pre_hook(keep)
        self.step()
        hook.remove()
        return found


def plain(case: Case, privacy: Privacy) -> Contender:
    """Without privacy: the same adapters in plain PyTorch."""
    model, batch = case.build(), case.inputs()
    optimizer = _sgd(model)

    def step() -> None:
        case.losses(model, batch).mean().backward()
        optimizer.step()
        _clear(optimizer, batch)

    return Contender(step, optimizer)


def fastloda(case: Case, privacy: Privacy) -> Contender:
    model, batch = use_loda_layers(case.build()), case.inputs()
    optimizer = _sgd(model)
    options = {"max_grad_norm": privacy.max_grad_norm, "noise_multiplier": privacy.noise_multiplier}

    def step() -> None:
        losses = case.losses(model, batch)
        ghost_dp_step(losses, model, optimizer, **options, expected_batch_size=case.batch, views=case.views)
        _clear(optimizer, batch)

    return Contender(step, optimizer)


def fastloda_graph(case: Case, privacy: Privacy) -> Contender:
    """FastLoDA with forward, backward, norms and clipped sum captured in one CUDA graph; noise is drawn outside it."""
    model, batch = use_loda_layers(case.build()), tuple(t.detach() for t in case.inputs())
    optimizer, clipper = _sgd(model), GhostClipper(model, privacy.max_grad_norm, case.views)
    captured_step = CapturedStep(clipper, lambda *inputs: case.losses(model, inputs))

    def step() -> None:
        captured_step.accumulate(*batch)
        clipper.privatize(privacy.noise_multiplier, case.batch)
        optimizer.step()
        _clear(optimizer, batch)

    return Contender(step, optimizer)


@dataclass(frozen=True)
class Replay:
    """A captured run, as one launch."""

    graph: torch.cuda.CUDAGraph
    run: Callable[[], object]  # kept, for the graph reads tensors that perhaps nothing else holds

    def __call__(self) -> None:
        self.graph.replay()


def captured(run: Callable[[], object]) -> Replay:
    stream = torch.cuda.Stream()  # what is done once (compiling, probing) comes before the capture
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return Replay(graph, run)


def opacus(case: Case, privacy: Privacy, mode: str) -> Contender:
    """Opacus on the plain modules, fed NCHW: its Conv2d gives wrong gradients for channels_last (test_channels_last.py)."""
    from opacus.grad_sample.utils import prepare_module
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    if case.views > 1:
        raise NotImplementedError("Opacus has no views: it would clip each view alone")
    case = replace(case, layout="nchw")
    model, batch = _contiguous_inputs(case.build()).train(), case.inputs()
    ghost = {"max_grad_norm": privacy.max_grad_norm} if mode == "ghost" else {}
    wrapped = prepare_module(model, mode, loss_reduction="mean", **ghost)
    inner = _sgd(model)
    private = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
        inner,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=case.batch,
    )

    def step() -> None:
        losses = case.losses(wrapped, batch)
        (DPTensorFastGradientClipping(wrapped, private, losses) if ghost else losses.mean()).backward()
        private.step()
        private.zero_grad(set_to_none=True)
        _clear(inner, batch)

    return Contender(step, inner)


def _contiguous_inputs(model: nn.Module) -> nn.Module:
    """NCHW for every convolution: attention, for one, puts out channels_last memory within an NCHW model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=1e-4)


def _clear(optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> None:
    """No gradient stays between steps: the contenders share the memory."""
    optimizer.zero_grad(set_to_none=True)
    batch[0].grad = None


PLAIN, OURS, GRAPH, PEER = "plain PyTorch", "FastLoDA", "FastLoDA, CUDA graph", "Opacus "
OPACUS_MODES = ("hooks", "functorch", "ghost", "ew")
PROVIDERS: dict[str, Callable[[Case, Privacy], Contender]] = {PLAIN: plain, OURS: fastloda}
PROVIDERS |= {PEER + mode: partial(opacus, mode=mode) for mode in OPACUS_MODES}
PROVIDERS[GRAPH] = fastloda_graph
USUAL = tuple(name for name in PROVIDERS if name != GRAPH)
