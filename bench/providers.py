"""The providers of the training step: plain PyTorch and JAX without privacy, FastLoDA, and its peers in each of their modes.

Whatever a provider raises, when it makes its contender or in a step, is its result for the case.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from adapters import trainable, use_loda_layers
from cases import Case
from torch import Tensor, nn

from fastloda import CapturedStep, GhostClipper, ghost_dp_step
from fastloda import compile as compile_adapted

LEARNING_RATE = 1e-4
COMPILED = {"fullgraph": True, "dynamic": False}  # a graph break is an error, and shapes are fixed


@dataclass(frozen=True)
class Privacy:
    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0


class Contender(NamedTuple):
    """A provider's training step.

    step() takes a whole one, after which no gradient is held. gradients() returns what a step gives its optimizer, in the
    order of the model's parameters, which stay as they are. peak: bytes that a step allocates where PyTorch's allocators
    don't see them.
    """

    step: Callable[[], object]
    gradients: Callable[[], list[Tensor]]
    peak: int | None = None


def _contender(step: Callable[[], object], optimizer: torch.optim.Optimizer) -> Contender:
    """Make a contender of a step that calls `optimizer`."""

    def gradients() -> list[Tensor]:
        found: list[Tensor] = []

        def keep(optimizer, *_) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                found.extend(p.grad.detach().clone() for p in group["params"])

        hook = optimizer.register_step_pre_hook(keep)
        step()
        hook.remove()
        return found

    return Contender(step, gradients)


def plain(case: Case, privacy: Privacy, compiled: bool = False) -> Contender:
    """Make the step without privacy: the same adapters in plain PyTorch, eager or as one graph of torch.compile."""
    model, batch = case.build(), case.inputs()
    optimizer = _sgd(model)
    mean_loss = lambda batch: case.losses(model, batch).mean()  # noqa: E731
    if compiled:
        _forget_compiled()
        mean_loss = torch.compile(mean_loss, **COMPILED)

    def step() -> None:
        mean_loss(batch).backward()
        optimizer.step()
        _clear(optimizer, batch)

    return _contender(step, optimizer)


def fastloda(case: Case, privacy: Privacy, compiled: bool = False) -> Contender:
    """Make FastLoDA's step, eager or with the model compiled by `fastloda.compile`."""
    model, batch = use_loda_layers(case.build()), case.inputs()
    optimizer = _sgd(model)
    if compiled:
        _forget_compiled()
        compile_adapted(model, **COMPILED)
    options = {"max_grad_norm": privacy.max_grad_norm, "noise_multiplier": privacy.noise_multiplier}

    def step() -> None:
        losses = case.losses(model, batch)
        ghost_dp_step(losses, model, optimizer, **options, expected_batch_size=case.batch, views=case.views)
        _clear(optimizer, batch)

    return _contender(step, optimizer)


def _forget_compiled() -> None:
    """Forget earlier models: PyTorch keeps few compiled versions of a line of code, and each case makes another one."""
    torch._dynamo.reset()


def fastloda_graph(case: Case, privacy: Privacy) -> Contender:
    """Make FastLoDA's step, of which one CUDA graph holds everything but the noise and the update."""
    model, batch = use_loda_layers(case.build()), tuple(t.detach() for t in case.inputs())
    optimizer, clipper = _sgd(model), GhostClipper(model, privacy.max_grad_norm, case.views)
    captured_step = CapturedStep(clipper, lambda *inputs: case.losses(model, inputs))

    def step() -> None:
        captured_step.accumulate(*batch)
        clipper.privatize(privacy.noise_multiplier, case.batch)
        optimizer.step()
        _clear(optimizer, batch)

    return _contender(step, optimizer)


@dataclass(frozen=True)
class Replay:
    """A captured run, which takes one launch."""

    graph: torch.cuda.CUDAGraph
    run: Callable[[], object]  # kept, for it may hold the only references to tensors that the graph reads

    def __call__(self) -> None:
        self.graph.replay()


def captured(run: Callable[[], object]) -> Replay:
    stream = torch.cuda.Stream()  # one-time work (compiling, probing) comes before the capture
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
    """Make Opacus's step on plain modules in NCHW: its Conv2d is wrong on channels_last (test_channels_last.py)."""
    from opacus.grad_sample.utils import prepare_module
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    _check_views(case)
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

    return _contender(step, inner)


def fastdp(case: Case, privacy: Privacy) -> Contender:
    """Make fastDP's step by book-keeping; "MixOpt" lets it choose the cheapest norms. fastDP is on GitHub only."""
    from fastDP import PrivacyEngine

    _check_views(case)
    model, batch = case.build(), case.inputs()
    optimizer = _sgd(model)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        engine = PrivacyEngine(
            model,
            batch_size=case.batch,
            sample_size=100 * case.batch,
            num_steps=1,
            max_grad_norm=privacy.max_grad_norm,
            noise_multiplier=privacy.noise_multiplier,
            clipping_mode="MixOpt",
            clipping_fn="Abadi",
        )
    engine.attach(optimizer)

    def step() -> None:
        case.losses(model, batch).mean().backward()
        optimizer.step()
        _clear(optimizer, batch)

    return _contender(step, optimizer)


def _check_views(case: Case) -> None:
    if case.views > 1:
        raise NotImplementedError("it has no views: each view would be clipped alone")


def on_jax(case: Case, privacy: Privacy, mode: str | None = None) -> Contender:
    """Make JAX's plain step, or jax_privacy's in one of its modes."""
    import jax_providers

    return jax_providers.private(case, privacy, mode) if mode else jax_providers.plain(case)


def _contiguous_inputs(model: nn.Module) -> nn.Module:
    """Make every convolution's input NCHW: attention, for one, gives channels_last outputs in an NCHW model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=LEARNING_RATE)


def _clear(optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> None:
    """Drop all gradients after a step, since the contenders share the memory."""
    optimizer.zero_grad(set_to_none=True)
    batch[0].grad = None


class Provider(NamedTuple):
    """A provider of steps: make(case, privacy) -> Contender, if the module `needs` is there; it clips by C / (norm + slack)."""

    make: Callable[[Case, Privacy], Contender]
    kind: Literal["plain", "ours", "peer"]
    needs: str = "torch"
    slack: float = 0.0

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


PLAIN, COMPILED_PLAIN, JAX = "plain PyTorch", "plain PyTorch, compiled", "plain JAX"
OURS, COMPILED_OURS, GRAPH = "FastLoDA", "FastLoDA, compiled", "FastLoDA, CUDA graph"
FASTDP = "fastDP MixOpt"
OPACUS_MODES = ("hooks", "functorch", "ghost", "ew")
JAX_MODES = ("vmap", "micro-batches", "one by one")
PROVIDERS = {
    PLAIN: Provider(plain, "plain"),
    COMPILED_PLAIN: Provider(partial(plain, compiled=True), "plain"),
    JAX: Provider(on_jax, "plain", "jax_privacy"),
    OURS: Provider(fastloda, "ours"),
    COMPILED_OURS: Provider(partial(fastloda, compiled=True), "ours"),
    GRAPH: Provider(fastloda_graph, "ours"),
    **{f"Opacus {mode}": Provider(partial(opacus, mode=mode), "peer", "opacus", 1e-6) for mode in OPACUS_MODES},
    FASTDP: Provider(fastdp, "peer", "fastDP", 1e-6),
    **{f"jax_privacy {mode}": Provider(partial(on_jax, mode=mode), "peer", "jax_privacy") for mode in JAX_MODES},
}
ALL = tuple(name for name in PROVIDERS if name != GRAPH)
EAGER = tuple(name for name in ALL if "compiled" not in name and PROVIDERS[name].needs != "jax_privacy")
