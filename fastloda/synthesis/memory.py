"""The peak memory of a computation."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

STDERR = 2


def peak_allocation(run: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of the bytes that run() allocates in addition to those before, by CUDA's allocator or the CPU profiler."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _silence(), torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _silence() -> Iterator[None]:
    """Drop everything that is written to stderr inside the context: the profiler writes messages there at its start and end."""
    kept, nowhere = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nowhere)
