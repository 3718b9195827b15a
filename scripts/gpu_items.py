"""The items of `scripts/gpu_check`, one in a process: python scripts/gpu_items.py ITEM FIGURES.json [--rehearse]

Kernels are timed as many launches in one graph, over buffers that rotate so that the L2 cache holds none of them; the time of an
empty kernel is subtracted. `--rehearse` does all of it on a CPU, at tiny sizes, to see that it runs: its figures say nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "helpers")]
REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import machine  # noqa: E402
import operations  # noqa: E402
import pytest  # noqa: E402
import tape  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from cases import Case  # noqa: E402
from operations import Layer, Tensors, check, layer_operations  # noqa: E402
from providers import GRAPH, OPACUS_MODES, OURS, PLAIN, PROVIDERS, Privacy, captured  # noqa: E402

from fastloda.kernels import adapter_backward, adapter_forward, input_grad, sample_grad  # noqa: E402
from fastloda.kernels.conv import Conv  # noqa: E402
from fastloda.loda import arithmetic  # noqa: E402
from fastloda.per_sample import gradient, products  # noqa: E402
from fastloda.per_sample.tensors import KERNEL_DTYPES  # noqa: E402

DEVICE = machine.DEVICE
LAUNCHES = 20  # in a graph, at least
BELOW, SHARE = 8e-6, 0.8  # a kernel should reach this share of its floor, unless the floor is shorter
SHAPES = ((128, 32, 3), (128, 32, 1), (256, 16, 3), (512, 8, 3))  # channels, side, kernel
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Sizes:
    """The sizes that differ between a GPU and a rehearsal."""

    samples: int = 512
    rounds: int = 20
    model: str = "paper_unet"
    shrunk: int = 1  # factor of channels and sides

    def layer(self, channels: int, side: int, kernel: int) -> Layer:
        channels, side, padding = channels // self.shrunk, max(4, side // self.shrunk), kernel // 2
        return Layer(channels, channels, (side, side), Conv((kernel, kernel), padding=(padding, padding)))

    def case(self, layout: str = "channels_last", batch: int | None = None) -> Case:
        return Case(self.model, batch or self.samples, layout=layout, dtype="bfloat16")


ABOUT_KERNELS = {"right", "one", "kernels", "once", "ieee", "tf32x3"}  # items
SIZES = Sizes(4, 2, "digits_unet", 16) if REHEARSAL else Sizes()


# ---- time


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """Capture `run` in a graph; in a rehearsal it stays as it is."""
    return run if REHEARSAL else captured(run)


def gpu_seconds(run: Callable[[], object], rounds: int = SIZES.rounds) -> float:
    """Measure the median time of run() by the GPU's clock, in a rehearsal once by the CPU's."""
    run()
    if REHEARSAL:
        return machine.seconds(run)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def cpu_seconds(run: Callable[[], object], rounds: int = SIZES.rounds) -> float:
    """Measure the median CPU time to issue run(), without the GPU's."""
    times = []
    for _ in range(rounds):
        machine.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def seconds_each(runs: list[Callable[[], object]]) -> float:
    """Measure the time of one of `runs`, which do the same on different buffers and are launched in turn by one graph."""
    turns = list(islice(cycle(runs), max(LAUNCHES if not REHEARSAL else 2, len(runs))))
    return gpu_seconds(replayed(lambda: [run() for run in turns])) / len(turns)


@triton.jit
def _empty_kernel(x):
    pass


def empty_kernel() -> float:
    x = torch.zeros(16, device=DEVICE)
    return seconds_each([lambda: _empty_kernel[(1,)](x)])


def copies_beyond_l2(size: int) -> int:
    """Count how many buffers of `size` bytes fill the L2 cache four times; 2 to 16."""
    l2 = 1 if REHEARSAL else torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, min(16, -(-4 * l2 // size)))


def rehearse(item: str) -> None:
    """Use a tape in place of CUDA graphs, and the interpreter for items about kernels (which a tape does not see)."""
    patch = pytest.MonkeyPatch()
    tape.use(patch)
    for module in (arithmetic, gradient, products, operations) if item in ABOUT_KERNELS else ():
        patch.setattr(module, "on_triton", lambda t: t.dtype in KERNEL_DTYPES and t.numel() > 0)


# ---- the items: each yields the figures that it has so far, after every part


def peaks():
    found = machine.measure_peaks(quick=REHEARSAL)
    figures = {"machine": machine.name(), "versions": machine.versions(), "copy_bytes_per_second": found.copy}
    figures["matmul_flops_per_second"] = {str(dtype)[6:]: flops for dtype, flops in found.matmul.items()}
    yield figures
    yield figures | {"empty_kernel_seconds": empty_kernel()}


def right():
    """Compare every kernel at every shape with float64."""
    figures, wrong = {}, []
    for channels, side, kernel in SHAPES:
        for dtype in DTYPES:
            layer = SIZES.layer(channels, side, kernel)
            name = f"{layer.name}, {str(dtype)[6:]}"
            try:
                check(layer, dtype, torch.channels_last)
                figures[name] = "right"
            except Exception as error:
                figures[name] = f"{type(error).__name__}: {error}"[:300]
                wrong.append(name)
                print(name, figures[name], flush=True)
            yield figures
    if wrong:
        raise AssertionError(f"wrong: {wrong}")


def sanitizer():
    """Run the smallest shape of `right` under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"absent": "compute-sanitizer is not installed"}
        return
    script = [sys.executable, __file__, "one", os.devnull]
    done = subprocess.run([tool, "--error-exitcode", "9", *script], capture_output=True, text=True)
    yield {"exit": done.returncode, "said": done.stdout[-2000:]}
    done.check_returncode()


def one():
    check(SIZES.layer(64, 8, 3), torch.bfloat16, torch.channels_last)
    yield {}


def steps():
    """Time a step, plain, private, and private as a graph: in all, to issue it, and where the GPU's time goes."""
    figures: dict[str, dict] = {}
    for name in (PLAIN, OURS, GRAPH):
        figures[name] = step_figures(name, SIZES.case())
        print(name, {key: value for key, value in figures[name].items() if key != "profile"}, flush=True)
        yield figures
    failed = [name for name, found in figures.items() if "error" in found]
    if failed:
        raise AssertionError(f"failed: {failed}")


def step_figures(provider: str, case: Case) -> dict:
    try:
        step = PROVIDERS[provider].make(case, Privacy(noise_multiplier=0.0)).step
        for _ in range(6 if REHEARSAL else 18):  # compiling, the probes of the 1st, 4th and 16th batch, the captures
            step()
        figures = {"seconds": gpu_seconds(step), "issue_seconds": cpu_seconds(step), "profile": profile(step)}
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {error}"[:500]}
    step = None
    if machine.CUDA:
        torch.cuda.empty_cache()
    return figures


def profile(step: Callable[[], object]) -> dict[str, list]:
    """List the kernels of two steps that take most, with calls and microseconds of the GPU (in a rehearsal, of the CPU)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + machine.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        step(), step()
        machine.synchronize()
    key = "self_device_time_total" if machine.CUDA else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))[:40]
    return {event.key[:100]: [event.count, getattr(event, key)] for event in events}


def kernels():
    """Time every operation of a layer against the floor of its bytes and flops."""
    found, empty, figures = machine.measure_peaks(quick=REHEARSAL), empty_kernel(), []
    for channels, side, kernel in SHAPES:
        layer, dtype = SIZES.layer(channels, side, kernel), torch.bfloat16
        size = SIZES.samples * layer.channels * layer.size[0] * layer.size[1] * 2
        copies = [Tensors(layer, SIZES.samples, dtype, torch.channels_last) for _ in range(copies_beyond_l2(size))]
        for same in zip(*map(layer_operations, copies)):
            floor = found.floor(same[0].bytes, same[0].flops, dtype)
            row = {"operation": same[0].name, "layer": layer.name, "floor_seconds": floor}
            try:
                row["seconds"] = seconds_each([operation.run for operation in same]) - empty
                row["fraction_of_floor"] = floor / max(row["seconds"], 1e-9)
                row["asked"] = SHARE if floor >= BELOW else None
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            figures.append(row)
            print(row, flush=True)
            yield {"rows": figures, "empty_kernel_seconds": empty}


def ieee():
    """Time float32 products in full, which no tensor core computes."""
    yield from float32_products("ieee")


def tf32x3():
    """Time float32 products as three of tf32, on tensor cores, and see what they keep of their precision."""
    yield from float32_products("tf32x3")


def float32_products(precision: str):
    """Time the operations of layers in float32, and see how far norms and sums are from those of the stored gradients."""
    for module in (adapter_forward, adapter_backward, input_grad, sample_grad):
        module.FLOAT32_PRODUCTS = tl.constexpr(precision)  # nothing is compiled yet in this process
    figures = {}
    for layer in (SIZES.layer(*shape) for shape in SHAPES):
        check(layer, torch.float32, torch.channels_last)
        t = Tensors(layer, max(2, SIZES.samples // 8), torch.float32, torch.channels_last)
        figures[layer.name] = {"off": off_the_stored(t)}
        figures[layer.name]["seconds"] = {op.name: seconds_each([op.run]) for op in layer_operations(t)}
        print(precision, layer.name, figures[layer.name], flush=True)
        yield figures


def off_the_stored(t: Tensors) -> dict[str, float]:
    """Measure how far the full layer's norms and sum, taken without storing gradients, are from those of stored ones."""
    recipe, samples, factors = t.op.recipe_W(t.x, t.gy), len(t.x), t.factors.float()
    stored = recipe.compute(samples, slice(0, samples)).double()
    squares = recipe.fused.squares(*recipe.tensors, samples).sum(1) / stored.flatten(1).square().sum(1)
    total, whole = recipe.fused.weighted_sum(*recipe.tensors, factors), torch.tensordot(factors.double(), stored, 1)
    return {"squares": float((squares - 1).abs().max()), "sum": float((total - whole).norm() / whole.norm())}


def dram():
    """Read from Nsight Compute, where that is installed, what share of DRAM's peak each kernel reaches."""
    tool = shutil.which("ncu")
    if tool is None:
        yield {"absent": "ncu is not installed"}
        return
    metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum"
    command = [tool, "--clock-control", "none", "--metrics", metrics, "--csv", "-k", "regex:_kernel$"]
    done = subprocess.run([*command, sys.executable, __file__, "once", os.devnull], capture_output=True, text=True)
    yield {"exit": done.returncode, "csv": done.stdout[-20_000:]}


def once():
    """Run every operation of the largest layer once."""
    for operation in layer_operations(
        Tensors(SIZES.layer(*SHAPES[0]), SIZES.samples, torch.bfloat16, torch.channels_last)
    ):
        operation.run()
    machine.synchronize()
    yield {}


def cudnn():
    """Time a frozen convolution with eight or sixteen outputs more, to see whether [W; A] could be one convolution."""
    figures = {}
    for outputs in (64, 72, 80):
        x = torch.randn(SIZES.samples, 64, 32 // SIZES.shrunk, 32 // SIZES.shrunk, device=DEVICE, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, 64, 3, 3, device=DEVICE, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        figures[str(outputs)] = seconds_each([lambda x=x, weight=weight: F.conv2d(x, weight, padding=1)])
        yield figures


def layouts():
    """Time the private step in both memory layouts, over plain PyTorch's."""
    figures: dict[str, dict] = {}
    for layout in ("channels_last", "nchw"):
        for name in (PLAIN, OURS, GRAPH):
            figures[f"{name}, {layout}"] = step_figures(name, SIZES.case(layout, SIZES.samples // 2))
            yield figures


def opacus():
    figures = {}
    for name in (OURS, GRAPH, *(f"Opacus {mode}" for mode in OPACUS_MODES[: 1 if REHEARSAL else None])):
        figures[name] = step_figures(name, Case("digits_unet" if REHEARSAL else "paper_unet", SIZES.samples // 4))
        yield figures


ITEMS = {
    item.__name__: item
    for item in (peaks, right, sanitizer, one, steps, kernels, ieee, tf32x3, dram, once, cudnn, layouts, opacus)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", choices=ITEMS)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if REHEARSAL:
        rehearse(options.item)
    for figures in ITEMS[options.item]():
        options.figures.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
