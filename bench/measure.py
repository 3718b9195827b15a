"""The measurements: interleaved rounds, fair while a machine's speed drifts, and the memory of a step in a fresh process."""

import gc
import multiprocessing
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import Case
from machine import CUDA, DEVICE, seconds
from providers import PROVIDERS, Privacy

from fastloda.synthesis.memory import peak_allocation


class Race:
    """A race of steps, which are timed in turn in every round; a step that raises drops out, and its error is kept."""

    def __init__(self, steps: Mapping[str, Callable[[], object]]):
        self.steps = dict(steps)
        self.times: dict[str, list[float]] = {name: [] for name in steps}
        self.errors: dict[str, str] = {}
        self._rounds = 0

    def round(self) -> None:
        """Time each step once, starting with another one in every round."""
        names = list(self.steps)
        first = self._rounds % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                self.times[name].append(seconds(self.steps[name]))
            except Exception as error:  # whatever a contender raises is its result
                self.errors[name] = describe(error)
            if name in self.errors:  # not above, where the traceback still holds the step's tensors
                del self.steps[name]
                free_memory()
        self._rounds += 1

    def paired(self, rounds: int) -> dict[str, list[float]]:
        """Return the times of the last `rounds` rounds, of the steps that finished."""
        return {name: self.times[name][-rounds:] for name in self.steps}


def free_memory() -> None:
    """Free what past contenders held: Opacus leaves reference cycles, and CUDA's allocator keeps freed memory."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def ratio(times: list[float], baseline: list[float]) -> float:
    """Compute the median over rounds of time over the baseline's time in the same round."""
    return statistics.median(t / b for t, b in zip(times, baseline, strict=True))


def describe(error: Exception) -> str:
    """Describe an error in one line, without paths, since results are published."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+){2,}', '(path)', text)}"[:200]


@dataclass(frozen=True)
class Memory:
    """The memory of one step, in bytes.

    allocated: the most that is allocated at a time, beyond what lives between steps. resident: on a CPU, the most by
    which the process grew, with the model and all that building it needed, such as a compiler.
    """

    allocated: int
    resident: int | None = None


def step_memory(case: Case, provider: str) -> Memory:
    """Measure a step's memory by a GPU's allocator, or on a CPU by the profiler, in a fresh process."""
    if CUDA:
        return _cuda_memory(case, provider)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_cpu_memory, (case, provider, torch.get_num_threads()))


def _cuda_memory(case: Case, provider: str) -> Memory:
    free_memory()
    step = PROVIDERS[provider].make(case, Privacy()).step
    step()
    return Memory(peak_allocation(step, DEVICE))


def _cpu_memory(case: Case, provider: str, threads: int) -> Memory:
    torch.set_num_threads(threads)
    before = _status_bytes("VmRSS")
    step, _, allocated = PROVIDERS[provider].make(case, Privacy())
    step()
    if allocated is None:
        allocated = peak_allocation(step, DEVICE)
    return Memory(allocated, None if before is None else _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int | None:
    """Read this process's memory: VmRSS, now, or VmHWM, the most so far (getrusage's maximum would include the parent's)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) << 10


def largest_batch(peak: Callable[[int], int], small: int, memory: int) -> int:
    """Find the largest batch whose step peaks within `memory` bytes: by a line through two small ones, then by trial.

    peak(batch) -> bytes; it may run out of memory, which is RuntimeError in PyTorch.
    """
    low, high = peak(small), peak(2 * small)
    batch = int(small + (memory - low) * small / max(1, high - low))
    while batch > small and not _fits(peak, batch, memory):
        batch = int(0.97 * batch)
    return max(batch, 0)


def _fits(peak: Callable[[int], int], batch: int, memory: int) -> bool:
    try:
        return peak(batch) <= memory
    except RuntimeError:
        pass
    free_memory()  # not above, where the traceback still holds the step's tensors
    return False
