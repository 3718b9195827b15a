"""The peak memory of a computation."""

from collections.abc import Callable

import torch


def peak_allocation(run: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of bytes that run() allocates beyond those there before, by CUDA's allocator or the CPU profiler."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
