"""The machine that the bench runs on: its name, its versions, and how fast it copies and multiplies.

Nothing here holds a host name or a path.
"""

import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastloda

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
# For every program that imports this module: tf32, cuDNN's default, is less precise than FastLoDA's kernels.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@dataclass(frozen=True)
class Peaks:
    """The device's measured limits: bytes a second of a copy (read and written), flops a second of a matrix product."""

    copy: float
    matmul: dict[torch.dtype, float]

    def floor(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> float:
        """Compute the least seconds in which a kernel can move so many bytes and do so many flops."""
        return max(bytes_moved / self.copy, flops / self.matmul[dtype])


def measure_peaks(quick: bool = False) -> Peaks:
    """Measure the limits; `quick` uses small tensors, only to see that the code runs."""
    numbers = 1 << (22 if quick else 30 if CUDA else 28)
    side = 256 if quick else 8192 if CUDA else 2048
    source = torch.ones(numbers // 4, device=DEVICE)  # numbers: bytes of one copy
    target = torch.empty_like(source)
    copy = 2 * numbers / fastest(lambda: target.copy_(source))
    return Peaks(copy, {dtype: 2 * side**3 / _product_seconds(side, dtype) for dtype in DTYPES})


def _product_seconds(side: int, dtype: torch.dtype) -> float:
    a = torch.randn(side, side, device=DEVICE).to(dtype)
    out: Tensor = torch.empty_like(a)
    return fastest(lambda: torch.mm(a, a, out=out))


def fastest(run: Callable[[], object], rounds: int = 5) -> float:
    return min(seconds(run) for _ in range(rounds))


def seconds(run: Callable[[], object]) -> float:
    """Measure the wall time of run(), the device's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def name() -> str:
    """Return the machine's kind in a form that suits a file name: nvidia-h200, x86-64-cpu-2threads."""
    kind = torch.cuda.get_device_name() if CUDA else f"{platform.machine()}-cpu-{torch.get_num_threads()}threads"
    return kind.lower().replace(" ", "-").replace("_", "-")


def versions() -> dict[str, str]:
    """List the versions of everything that a time may depend on."""
    found = {"fastloda": fastloda.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "opacus", "fastDP", "jax", "jax_privacy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed: absent from the result too
    return found | (_gpu_versions() if CUDA else {})


def _gpu_versions() -> dict[str, str]:
    found = {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    if tool := shutil.which("nvidia-smi"):  # a container may lack it
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found
