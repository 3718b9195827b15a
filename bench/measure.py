"""Fair figures on a drifting machine: interleaved rounds, and the memory of a step in a process of its own."""

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
    """Steps in turn, each timed in every round; one that raises leaves the race with its error."""

    def __init__(self, steps: Mapping[str, Callable[[], object]]):
        self.steps = dict(steps)
        self.times: dict[str, list[float]] = {name: [] for name in steps}
        self.errors: dict[str, str] = {}
        self._rounds = 0

    def round(self) -> None:
        """Each once, starting with another one each time."""
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
        """The times of the last `rounds` rounds, of those who finished."""
        return {name: self.times[name][-rounds:] for name in self.steps}


def free_memory() -> None:
    """Of contenders that are gone: Opacus leaves activations in reference cycles, CUDA's allocator keeps what it had."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def ratio(times: list[float], baseline: list[float]) -> float:
    """Median over rounds of time over the baseline's time in the same round."""
    return statistics.median(t / b for t, b in zip(times, baseline, strict=True))


def describe(error: Exception) -> str:
    """One line, without paths: results are published."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+){2,}', '(path)', text)}"[:200]


@dataclass(frozen=True)
class Memory:
    """Bytes of one step. allocated: the most allocated at a time, beyond what lives between steps.

    resident: on a CPU, by how much the process grew at most, the model and everything else that building took included, such as
    a compiler.
    """

    allocated: int
    resident: int | None = None


def step_memory(case: Case, provider: str) -> Memory:
    """On a GPU from its allocator, here; on a CPU from the profiler, in a fresh process in which nothing else was cached."""
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
    """VmRSS: resident now; VmHWM: at most so far. (getrusage's maximum would include the parent's.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) << 10


def largest_batch(peak: Callable[[int], int], small: int, memory: int) -> int:
    """The largest batch whose step peaks within `memory` bytes, from the line through two small ones; tried before told.

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
