"""Fair figures on a drifting machine: paired, interleaved rounds; peak allocation from the profiler in a fresh process."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Paired:
    """Medians over rounds in which every contender ran once, in turn."""

    seconds: dict[str, float]
    ratio: dict[str, float]  # median over rounds of time / the baseline's time in the same round


def paired_rounds(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> Paired:
    """Time every contender once a round; the first is the baseline."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(-warmup, rounds):
        for name, run in contenders.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if round_number >= 0:
                times[name].append(time.perf_counter() - start)
    baseline = times[next(iter(contenders))]
    return Paired(
        {name: statistics.median(values) for name, values in times.items()},
        {name: statistics.median(t / b for t, b in zip(values, baseline)) for name, values in times.items()},
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_allocation(make_step: Callable[..., Callable[[], object]], *args) -> int:
    """Bytes that the second call of make_step(*args)() allocates at most at a time, beyond what lives between steps.

    In a fresh process, so that nothing cached by others counts; make_step must be importable.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (make_step, args))


def _measure_peak(make_step: Callable[..., Callable[[], object]], args: tuple) -> int:
    torch.set_num_threads(2)
    step = make_step(*args)
    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
