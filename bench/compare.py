"""The comparison of all providers in one case: whether they are right, how fast they are, and how much memory they take."""

from collections.abc import Callable
from dataclasses import replace

import truth
from measure import Memory, Race, describe, free_memory, largest_batch, ratio, step_memory
from providers import COMPILED_PLAIN, JAX, PLAIN, PROVIDERS, Privacy
from pytest_benchmark.stats import Stats
from scales import Timed

WARMUP = 2
MEMORY_ERROR, FITS_ERROR = "memory_error", "fits_error"
Figures = dict[str, dict]  # provider -> name of a figure -> its value


def compare(timed: Timed, rounds: int, run_rounds: Callable[..., object]) -> dict:
    """Compare the providers, and make a row of the result file; run_rounds: pytest-benchmark's `benchmark.pedantic`.

    Raises:
        WrongAnswer: some provider's gradient is wrong. Nothing has been timed then.
    """
    figures: Figures = {name: {} for name in timed.providers if PROVIDERS[name].installed}
    race = Race(_keeping_errors(figures, lambda name: _checked_step(timed, name)))
    run_rounds(race.round, rounds=rounds, warmup_rounds=WARMUP)
    for name, error in race.errors.items():
        figures[name]["error"] = error
    row = {"case": timed.name, **timed.case.to_dict(), "providers": figures}
    row |= _add_times(figures, race.paired(rounds), timed.case.batch)
    del race  # the contenders' memory
    if timed.memory:
        _add_memory(figures, timed)
    return row


def _checked_step(timed: Timed, provider: str) -> Callable[[], object]:
    truth.check(timed.case, provider)
    return PROVIDERS[provider].make(timed.case, Privacy()).step


def _keeping_errors(figures: Figures, make: Callable[[str], object], key: str = "error") -> dict:
    """Call make(provider) for all that `_goes_on` lets through; keep errors, except WrongAnswer, as figures[provider][key]."""
    made = {}
    for name in [name for name, known in figures.items() if key not in known and _goes_on(known, key)]:
        try:
            made[name] = make(name)
        except truth.WrongAnswer:
            raise
        except Exception as error:  # whatever a provider raises is its result
            figures[name][key] = describe(error)
        if name not in made:  # not above, where the traceback still holds the provider's tensors
            free_memory()
    return made


def _goes_on(known: dict, key: str) -> bool:
    """Tell whether a provider goes on; one that ran out of memory when timed can still say what batch would fit."""
    return "error" not in known or (key == FITS_ERROR and known["error"].startswith("OutOfMemoryError"))


def _add_times(figures: Figures, times: dict[str, list[float]], batch: int) -> dict:
    """Add statistics of the rounds, and ratios as medians of paired rounds; return which peer was the fastest."""
    stats = {name: statistics_of(values) for name, values in times.items()}
    peers = [name for name in stats if PROVIDERS[name].kind == "peer"]
    best = min(peers, key=lambda name: stats[name]["median"], default=None)
    baselines = {"plain": PLAIN, "compiled": COMPILED_PLAIN, "jax": JAX, "best_peer": best}
    for name, values in times.items():
        figures[name] |= {"seconds": stats[name], "samples_per_second": batch / stats[name]["median"]}
        for key, baseline in baselines.items():
            if baseline in times:
                figures[name][f"time_over_{key}"] = ratio(values, times[baseline])
    return {"best_peer": best}


def statistics_of(values: list[float]) -> dict[str, float]:
    stats = Stats()
    for value in values:
        stats.update(value)
    return {key: getattr(stats, key) for key in ("min", "max", "mean", "stddev", "median", "iqr", "rounds")}


def _add_memory(figures: Figures, timed: Timed) -> None:
    peaks: dict[str, Memory] = _keeping_errors(figures, lambda name: step_memory(timed.case, name), MEMORY_ERROR)
    for name, peak in peaks.items():
        figures[name] |= {"peak_bytes": peak.allocated, "resident_bytes": peak.resident}
        if PLAIN in peaks:
            figures[name]["peak_over_plain"] = peak.allocated / peaks[PLAIN].allocated
    if timed.fits is not None:
        for name, batch in _keeping_errors(figures, lambda name: _largest(timed, name), FITS_ERROR).items():
            figures[name] |= {"largest_batch": batch, "largest_batch_in_bytes": timed.fits}


def _largest(timed: Timed, provider: str) -> int:
    peak = lambda batch: step_memory(replace(timed.case, batch=batch), provider).allocated  # noqa: E731
    return largest_batch(peak, max(1, timed.case.batch // 4), timed.fits)
