"""The launches and bytes of a training step of the paper's U-Net on a GPU, counted operation by operation without one.

    python bench/launches.py                  # 512 images, bfloat16 autocast, r = 4: private and plain, and time to issue them
    python bench/launches.py --write          # and write docs/results/launches.json, whose figures may only fall

Tensors have no memory here, but follow the code paths of a GPU's tensors; kernels are counted where they would be launched. Bytes
are those of each operation's inputs and outputs. Attention counts as nothing, in the private step and in the plain one.
"""

import argparse
import ast
import contextlib
import inspect
import json
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from adapters import adapt_plainly, trainable, use_loda_layers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastloda import GhostClipper
from fastloda.loda import arithmetic
from fastloda.per_sample import compute, gradient, products, reductions
from fastloda.per_sample.refusals import Looks
from fastloda.per_sample.tensors import KERNEL_DTYPES
from fastloda.privacy import captured
from fastloda.privacy.captured import CapturedStep
from fastloda.synthesis.diffusion import paper_unet, unet

FIGURES = Path(__file__).parent.parent / "docs" / "results" / "launches.json"
SAMPLES, RANK = 512, 4
# Operations that launch nothing.
VIEWS = set(
    "view _unsafe_view permute transpose t expand slice select split split_with_sizes unsqueeze squeeze detach alias as_strided "
    "empty empty_like new_empty empty_strided new_empty_strided unflatten _reshape_alias lift_fresh unbind set_ chunk "
    "resize_ promote_types result_type".split()
)


class Count(TorchDispatchMode):
    """A counter of the launches and bytes of all operations inside its context, by name."""

    def __init__(self):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in VIEWS and func.namespace == "aten":
            self.add(name, *_cost(name, args, _bytes((args, kwargs)), _bytes(out)))
        return out

    def add(self, name: str, launches: int, size: int) -> None:
        self.launches[name] += launches
        self.bytes[name] += size

    def figures(self) -> dict[str, int]:
        return {"launches": self.launches.total(), "bytes": self.bytes.total()}


def _cost(name: str, args: tuple, read: int, written: int) -> tuple[int, int]:
    """Count an operation's launches and bytes: one launch, and the bytes of inputs and outputs, except for those named here."""
    if name == "convolution" and args[2] is not None:  # the bias is added in a pass of its own
        return 2, read + 3 * written
    if name == "convolution_backward":
        gy, x, w = map(_bytes, args[:3])
        sizes = (gy + w + x, gy + x + w, gy)
        return sum(args[-1]), sum(size for size, wanted in zip(sizes, args[-1]) if wanted)
    if name == "native_group_norm":
        return 2, 3 * _bytes(args[0])
    if name == "native_group_norm_backward":
        return 3, 5 * _bytes(args[0])
    if name in ("_foreach_add_", "_foreach_copy_"):
        return _foreach(name, *args[:2]), read + written
    if name == "cat":
        return -(-len(args[0]) // 128), read + written
    return 1, read + written


def _foreach(name: str, ours: list[Tensor], others: list[Tensor]) -> int:
    """Count the launches of a foreach operation on a GPU: one for 64 pairs if all pairs are alike, else one for each pair."""
    dtypes = [{t.dtype for t in tensors} for tensors in (ours, others)]
    fast = all(len(of) == 1 for of in dtypes) and (name == "_foreach_copy_" or dtypes[0] == dtypes[1])
    fast = fast and all(a.stride() == b.stride() for a, b in zip(ours, others))
    return -(-len(ours) // 64) if fast else len(ours)


def _bytes(tree) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


# ---- FastLoDA's kernels


def counted_run(count: Count) -> Callable:
    """Make the function that counts a launch of a Triton kernel instead of making it."""

    def run(self: JITFunction, *arguments, **_) -> None:
        reads, writes = accesses(self)
        tensors = {name: t for name, t in zip(self.arg_names, arguments) if isinstance(t, Tensor)}
        times = {name: (name in reads) + (name in writes) for name in tensors}
        count.add(self.__name__, 1, sum(times[name] * _bytes(t) for name, t in tensors.items()))

    return run


@cache
def accesses(kernel: JITFunction) -> tuple[set[str], set[str]]:
    """Find from a kernel's source which arguments it loads from, and which it stores to."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    origin = {name: {name} for name in kernel.arg_names}  # variable -> the arguments that its value points into
    found: dict[str, set[str]] = {"load": set(), "store": set()}

    def pointed(expression: ast.AST) -> set[str]:
        if isinstance(expression, ast.Call) and _name(expression) in ("load", "dot", "sum", "zeros", "where", "arange"):
            return set()  # numbers
        own = origin.get(expression.id, set()) if isinstance(expression, ast.Name) else set()
        return own.union(*map(pointed, ast.iter_child_nodes(expression)))

    for node in sorted(ast.walk(function), key=lambda n: (getattr(n, "lineno", 0), isinstance(n, ast.Call))):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name in (n.id for n in ast.walk(target) if isinstance(n, ast.Name)):
                    origin[name] = origin.get(name, set()) | pointed(node.value)
        elif isinstance(node, ast.Call) and _name(node) == "store":
            found["store"] |= pointed(node.args[0])
        elif isinstance(node, ast.Call):  # a load, or a function that loads
            for argument in node.args if _name(node) != "load" else node.args[:1]:
                found["load"] |= pointed(argument)
    return found["load"], found["store"]


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


# ---- the step


def autocast_losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, t, y, noise = batch
    # what torch.autocast("cuda", cache_enabled=False) sets, here for CPU tensors that follow the code paths of a GPU's
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    torch.set_autocast_enabled("cpu", True)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return (model(x, t, y) - noise).square().flatten(1).mean(1).float()
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_cache_enabled(cached)


def build(private: bool, make: Callable[[], nn.Module]) -> nn.Module:
    model = adapt_plainly(make(), RANK)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return use_loda_layers(model) if private else model


def images(samples: int, size: int) -> tuple[Tensor, ...]:
    x = torch.zeros(samples, 3, size, size).contiguous(memory_format=torch.channels_last)
    index = torch.zeros(samples, dtype=torch.long)
    return x, index, index, torch.zeros_like(x)


def step_of(model: nn.Module, batch: tuple[Tensor, ...], private: bool) -> Callable[[], object]:
    """Make a step of SGD: plain, or private but without noise, which is not part of the comparison."""
    optimizer = torch.optim.SGD(trainable(model), lr=1e-4)
    clipper = GhostClipper(model, 1.0) if private else None

    def step() -> None:
        losses = autocast_losses(model, batch)
        if clipper:
            clipper.accumulate(losses)
            clipper.privatize(0.0, len(losses))
        else:
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _NoAttention(torch.autograd.Function):
    """An attention that computes nothing, and has the right shapes and dtypes."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(v)

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class _Functional:
    """A stand-in for torch.nn.functional whose attention computes nothing."""

    def __getattr__(self, name: str):
        return getattr(F, name)

    @staticmethod
    def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _NoAttention.apply(q.to(torch.bfloat16), k, v)


@contextlib.contextmanager
def ways_of_a_gpu(run: Callable) -> Iterator[None]:
    """Let tensors follow the code paths of a GPU's inside the context; `run` is called instead of launching Triton kernels."""
    group_norm = F.group_norm
    kernels_take = lambda t: t.dtype in KERNEL_DTYPES and t.numel() > 0  # noqa: E731
    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (JITFunction, "run", run),
            (InterpretedFunction, "run", run),
            (arithmetic, "on_triton", kernels_take),
            (gradient, "on_triton", kernels_take),
            (products, "on_triton", kernels_take),
            (gradient, "waits", lambda t: True),
            (reductions, "waits", lambda t: True),
            (compute, "check_independence", lambda *args, **options: None),  # rare, and needs real numbers
            (torch.cuda, "device_of", lambda t: contextlib.nullcontext()),
            (unet, "F", _Functional()),
            (
                F,
                "group_norm",
                lambda x, *rest, **named: group_norm(x.float(), *rest, **named),
            ),  # as autocast does on a GPU
        ):
            stack.enter_context(patch.object(target, name, new))
        yield


def counted(private: bool, samples: int = SAMPLES) -> Count:
    """Count the launches and bytes of a second step; the first one does what is done only once."""
    count = Count()
    with (
        ways_of_a_gpu(counted_run(count)),
        patch.object(FakeTensor, "is_cuda", property(lambda t: True)),
        patch.object(torch, "autocast", lambda *args, **options: contextlib.nullcontext()),
        patch.object(GhostClipper, "privatize", _privatize),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        step = step_of(build(private, lambda: paper_unet(zero_init=False)), images(samples, 32), private)
        with count:
            step()
    return count


def _privatize(clipper: GhostClipper, noise_multiplier: float, expected_batch_size: float) -> None:
    """Do what `GhostClipper.privatize` does, without the watch over the model, which compares numbers."""
    means = {alike: (total / expected_batch_size).to(alike[1]) for alike, total in clipper._sums.buffers.items()}
    for name, grad in clipper._sums.parted(means).items():
        clipper.parameters[name].grad = grad
    clipper.reset()


# ---- the time to issue it


def issue_times(rounds: int = 5) -> dict[str, float]:
    """Measure the CPU seconds to issue a step of the U-Net with tiny layers and stubbed launches: medians of rounds.

    Triton's own work at a launch, about 10 us each, is not included.
    """
    make = lambda: paper_unet(zero_init=False, width=16, image_size=8, norm_groups=4)  # noqa: E731
    recorders = {"cpu": record_nothing}
    with (
        warnings.catch_warnings(action="ignore"),  # memory that no kernel wrote may not be finite
        ways_of_a_gpu(lambda *args, **options: None),
        patch.dict(captured.RECORDERS, recorders),
        patch.multiple(Looks, knows=lambda self, samples: samples > 1, due=lambda self: False),
    ):
        steps = {
            "plain": step_of(build(False, make), images(2, 8), False),
            "private": step_of(build(True, make), images(2, 8), True),
            "private, captured": captured_step_of(build(True, make), images(2, 8)),
        }
        for step in steps.values():
            step(), step()
        times = {name: [_cpu_seconds(step) for _ in range(rounds)] for name, step in steps.items()}
    return {name: sorted(found)[rounds // 2] for name, found in times.items()}


def captured_step_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], object]:
    """Make the private step as a graph that launches nothing, so that only Python's work around a replay is left."""
    optimizer, clipper = torch.optim.SGD(trainable(model), lr=1e-4), GhostClipper(model, 1.0)
    step = CapturedStep(clipper, lambda *inputs: autocast_losses(model, inputs))

    def run() -> None:
        step.accumulate(*batch)
        clipper.privatize(0.0, len(batch[0]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def record_nothing(run: captured.Run, *_) -> tuple[captured.Run, captured.Outcome]:
    outcome = run()
    return lambda: outcome, outcome


def _cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


# ---- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FIGURES.name}")
    parser.add_argument("--each", action="store_true", help="show the operations")
    options = parser.parse_args()
    found = {}
    for name, private in (("plain", False), ("private", True)):
        count = counted(private)
        found[name] = count.figures()
        print(f"{name}: {found[name]['launches']:,} launches, {found[name]['bytes'] / 1e9:.1f} GB")
        for operation, size in count.bytes.most_common() if options.each else ():
            print(f"    {operation:40} {count.launches[operation]:6,} {size / 1e9:8.2f} GB")
    times = issue_times()
    for name, seconds in times.items():
        print(f"{name}: {1000 * seconds:.0f} ms of CPU to issue, {seconds / times['plain']:.2f} of plain")
    if options.write:
        FIGURES.write_text(
            json.dumps({"torch": torch.__version__.split("+")[0], "samples": SAMPLES, **found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
