"""Compile every kernel ahead of time, without a GPU, at every layer shape of the paper's U-Net.

    python scripts/compile_check.py                      bfloat16 and float32, both layouts, for sm_80, sm_90 and sm_100
    python scripts/compile_check.py --dtypes bfloat16 float16 float32 --json compile.json

The launchers are run on tensors without memory, and each kernel that they would launch is compiled as a launch would compile it.
Fails on an error, a register spill, or more shared memory than the card has.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction, MockTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from operations import RANK, Layer, unet_layers  # noqa: E402

from fastloda.kernels import adapter_backward, adapter_forward, clip_sum, input_grad, pointwise, sample_grad
from fastloda.progress import Progress

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SINCE_90 = {"_pointwise_backward_kernel"}  # not launched on older cards
BATCH, ADAPTED_NUMBERS = 128, 366_592


@dataclass(frozen=True)
class Report:
    """The result of one compilation: registers a thread, bytes of stack (spilled registers) and of shared memory."""

    kernel: str
    label: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    problem: str = ""


class NoDriver:
    """A stand-in for Triton's GPU driver, with only what compiling needs."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launch_all(layer: Layer, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Launch every kernel and variant for this layer, as the private step does."""

    def image(channels: int, size: tuple[int, int]) -> Tensor:
        return torch.empty(BATCH, channels, *size, dtype=dtype, device="meta").to(memory_format=memory_format)

    conv, out_size = layer.conv, layer.conv.output_size(*layer.size)
    x, y, gy = image(layer.channels, layer.size), image(layer.outputs, out_size), image(layer.outputs, out_size)
    A = torch.empty(RANK, layer.channels, *conv.kernel, dtype=dtype, device="meta")
    B = torch.empty(layer.outputs, RANK, 1, 1, dtype=dtype, device="meta")
    bias, factors = torch.empty(layer.outputs, dtype=dtype, device="meta"), torch.empty(BATCH, device="meta")
    weight = torch.empty(layer.outputs, layer.channels, *conv.kernel, dtype=dtype, device="meta")
    if pointwise.serves(x, weight, A, conv):
        pointwise.forward(x, weight, bias, A, B, 0.1, 1.0)
    z = adapter_forward.project(x, A, conv)
    if pointwise.serves_backward(x, weight, A, conv):
        pointwise.backward(gy, x, z, weight, A, B, 0.1, 1.0)
    adapter_forward.add_(y, z, B, bias, 0.1, 1.0)
    gz, parts = adapter_backward.adapter_backward(gy, z, B, 0.1, 1.0, conv, layer.size)
    adapter_backward.add_parts(parts, BATCH)
    input_grad.add_input_grad_(x, gz, A, conv)
    for g, of in ((gz, conv.full()), (gy, conv)):  # the adapter's gradient, and that of the full layer
        sample_grad.sample_grads(x, g, of, BATCH)
        sample_grad.sample_grad_squares(x, g, of, BATCH)
        sample_grad.weighted_grad_sum(x, g, of, factors)
    clip_sum.clip_sum(torch.empty(BATCH, ADAPTED_NUMBERS, device="meta"), factors)


@dataclass(frozen=True)
class Launch:
    """A launch to compile: its kernel, arguments (of a tensor the dtype) and options, its number of programs, its bytes."""

    kernel: JITFunction
    arguments: tuple
    options: tuple[tuple[str, object], ...]
    programs: int
    bytes: tuple[
        int, ...
    ]  # by tensor; one that is passed twice counts once, a scratch that stays in the cache not at all

    @property
    def key(self) -> tuple:
        """A key that launches share if they compile alike: integers matter by being 1 and by being multiples of 16."""
        kinds = tuple((a == 1, a % 16 == 0, abs(a) < 2**31) if isinstance(a, int) else a for a in self.arguments)
        return self.kernel.__name__, kinds, self.options


def launches(
    layers: list[Layer], dtypes: list[torch.dtype], layouts: list[torch.memory_format]
) -> Iterator[tuple[str, Launch]]:
    """Yield (label, launch), once for each launch that compiles differently."""
    seen = set()
    for layer, dtype, memory_format in product(layers, dtypes, layouts):
        with catching() as caught:
            launch_all(layer, dtype, memory_format)
        label = f"{layer.name}, {dtype}, {memory_format}"
        yield from ((label, launch) for launch in caught if launch.key not in seen)
        seen.update(launch.key for launch in caught)


@contextmanager
def catching() -> Iterator[list[Launch]]:
    """Collect launches inside the context instead of making them."""
    caught: list[Launch] = []

    def catch(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
        plain = tuple(a.dtype if isinstance(a, Tensor) else a for a in arguments)
        named = zip(kernel.arg_names, arguments)
        tensors = {id(a): a for name, a in named if isinstance(a, Tensor) and name != "scratch"}
        sizes = {key: t.numel() * t.element_size() for key, t in tensors.items()}
        caught.append(Launch(kernel, plain, tuple(sorted(options.items())), prod(grid), tuple(sizes.values())))

    original, JITFunction.run = JITFunction.run, catch
    try:
        yield caught
    finally:
        JITFunction.run = original


def compiled_for(arch: int, launch: Launch) -> CompiledKernel:
    """Compile one launch as the JIT would on that card."""
    triton.runtime.driver.set_active(NoDriver(arch))
    arguments = [MockTensor(a) if isinstance(a, torch.dtype) else a for a in launch.arguments]
    return launch.kernel.warmup(*arguments, grid=(1,), **dict(launch.options))


def report_of(arch: int, label: str, launch: Launch) -> Report:
    """Compile one launch, and report its resources and its problems."""
    name = launch.kernel.__name__
    try:
        compiled = compiled_for(arch, launch)
    except Exception as error:  # whatever the compiler says is the result
        lines = str(error).strip().splitlines() or [""]
        return Report(name, label, arch, problem=f"{type(error).__name__}: {lines[-1]}")
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    problems = [f"spills {stack} bytes"] * (stack > 0)
    problems += [f"{shared} bytes of shared memory"] * (shared > SHARED_MEMORY[arch])
    return Report(name, label, arch, registers, stack, shared, ", ".join(problems))


def resources(cubin: bytes) -> tuple[int, int]:
    """Read how many registers and bytes of stack a thread takes."""
    told = dump(cubin, "--dump-resource-usage")
    return tuple(int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", told).groups())


def dump(cubin: bytes, option: str) -> str:
    """Return what Triton's cuobjdump says of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _check_one(job: tuple[int, int]) -> Report:
    which, arch = job
    return report_of(arch, *_JOBS[which])


_JOBS: list[tuple[str, Launch]] = []  # filled before the workers fork: a kernel can't be pickled


def check(
    archs: list[int], dtypes: list[torch.dtype], layouts: list[torch.memory_format], workers: int
) -> list[Report]:
    _JOBS[:] = launches(list(unet_layers()), dtypes, layouts)
    every = [(which, arch) for arch in archs for which in range(len(_JOBS))]
    jobs = [(i, arch) for i, arch in every if arch >= 90 or _JOBS[i][1].kernel.__name__ not in SINCE_90]
    with ProcessPoolExecutor(workers) as pool:
        return list(Progress("compile", len(jobs), "kernel").over(pool.map(_check_one, jobs)))


def main(show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write a report of each compilation here")
    arguments = parser.parse_args()
    dtypes, layouts = [getattr(torch, name) for name in arguments.dtypes], [LAYOUTS[name] for name in arguments.layouts]
    reports = check(arguments.archs, dtypes, layouts, arguments.workers)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    bad = [report for report in reports if report.problem]
    for report in bad:
        show(f"sm_{report.arch} {report.kernel} {report.label}: {report.problem}")
    most = max((report.registers for report in reports), default=0)
    show(f"triton {triton.__version__}: {len(reports)} compilations, {len(bad)} bad, at most {most} registers a thread")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
