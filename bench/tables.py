"""The bench's result files as tables: for the terminal, for Markdown, for the README."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastloda.synthesis.report.tables import Table

OURS, PLAIN = "FastLoDA", "plain PyTorch"
COMPILED_OURS, COMPILED_PLAIN = f"{OURS}, compiled", f"{PLAIN}, compiled"
FORMAT = 2  # of the result files
MIB = 1 << 20
ERRORS = ("error", "memory_error", "fits_error")  # of the step, of measuring its memory, of finding the largest batch


def load(path: Path) -> dict:
    """Load a result file's document.

    Raises:
        OSError: it can't be read.
        ValueError: it is no result file of the bench.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is no result file of the bench (bench/results/<machine>-<date>.json)")
    return document


def tables(document: dict) -> Iterator[Table]:
    """Yield the tables for which something was measured: steps, growth, kernels."""
    if document["steps"]:
        yield step_table(document["steps"], "One training step")
    if document["growth"]:
        yield step_table(document["growth"], "As the work grows")
    if document["kernels"]:
        yield kernel_table(document["kernels"])


def step_table(cases: Sequence[dict], title: str) -> Table:
    """Make a table with a row for each provider under each case; what could not run is a note."""
    columns = [
        "case, provider", "samples/s", "median s", "iqr s", "/ plain", "/ compiled", "/ JAX", "/ best peer", "peak MiB",
        "/ plain", "RSS MiB", "largest batch",
    ]  # fmt: skip
    rows, notes = [], {}
    for case in cases:
        rows.append([case["case"], *[""] * (len(columns) - 1)])
        for provider, figures in case["providers"].items():
            rows.append([f"- {provider}", *_step_cells(figures)])
            for error in filter(None, map(figures.get, ERRORS)):
                notes.setdefault(f"{provider}: {error}", []).append(case["case"])
    return Table(title, columns, rows, notes=[f"{error} ({', '.join(found)})" for error, found in notes.items()])


def _step_cells(figures: dict) -> list[str]:
    if "error" in figures:
        return ["error", *[""] * 9, number(figures.get("largest_batch"))]
    return [
        number(figures["samples_per_second"]),
        number(figures["seconds"]["median"]),
        number(figures["seconds"]["iqr"]),
        *(ratio(figures.get(f"time_over_{baseline}")) for baseline in ("plain", "compiled", "jax", "best_peer")),
        number(figures.get("peak_bytes"), MIB),
        ratio(figures.get("peak_over_plain")),
        number(figures.get("resident_bytes"), MIB),
        number(figures.get("largest_batch")),
    ]


def kernel_table(kernels: Sequence[dict]) -> Table:
    """Make a table with a row for each operation and layer shape."""
    columns = ["operation", "layer", "layers", "MB moved", "Mflop", "median us", "iqr us", "floor us", "of the floor"]
    rows = [
        [
            kernel["operation"],
            kernel["layer"],
            str(kernel["layers"]),
            number(kernel["bytes"], 1e6),
            number(kernel["flops"], 1e6),
            number(kernel["seconds"]["median"], 1e-6),
            number(kernel["seconds"]["iqr"], 1e-6),
            number(kernel["floor_seconds"], 1e-6),
            f"{100 * kernel['fraction_of_floor']:.0f}%",
        ]
        for kernel in kernels
    ]
    return Table("Operations against the device's floor", columns, rows, left=2)


def summary_table(cases: Sequence[dict]) -> Table:
    """Make the README's table, with FastLoDA in one row for each case, and no column that is empty throughout."""
    columns = [
        "case", "plain, s", "FastLoDA, s", "/ plain", "compiled plain, s", "FastLoDA compiled, s", "/ compiled plain",
        "best peer", "its s", "faster than it", "peak memory / plain", "peak memory / best peer's",
    ]  # fmt: skip
    rows = [_summary_row(case) for case in cases]
    measured = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    return Table("FastLoDA", [columns[n] for n in measured], [[row[n] for n in measured] for row in rows])


def _summary_row(case: dict) -> list[str]:
    known = lambda name: case["providers"].get(name, {})  # noqa: E731
    plain, compiled, ours, ours_compiled, best = map(
        known, (PLAIN, COMPILED_PLAIN, OURS, COMPILED_OURS, case["best_peer"])
    )
    faster = ours.get("time_over_best_peer")
    both = ours.get("peak_bytes") and best.get("peak_bytes")
    return [
        f"`{case['case']}`",
        _median(plain),
        _median(ours),
        ratio(ours.get("time_over_plain")),
        _median(compiled),
        _median(ours_compiled),
        ratio(ours_compiled.get("time_over_compiled")),
        case["best_peer"] or "none runs",
        _median(best),
        f"{1 / faster:.2f} x" if faster else "",
        ratio(ours.get("peak_over_plain")),
        ratio(ours["peak_bytes"] / best["peak_bytes"] if both else None),
    ]


def _median(figures: dict) -> str:
    return number(figures["seconds"]["median"]) if "seconds" in figures else ""


def environment(document: dict) -> str:
    """Describe the machine, its versions and its measured limits in one line."""
    parts = [f"`{document['machine']}`", document["date"]]
    parts += [f"{name} {version}" for name, version in document["versions"].items()]
    if peaks := document.get("peaks"):
        parts.append(f"copy {peaks['copy_bytes_per_second'] / 1e9:.3g} GB/s")
        parts += [f"{dtype} {flops / 1e9:.3g} GFLOP/s" for dtype, flops in peaks["matmul_flops_per_second"].items()]
    return ", ".join(parts)


def number(value: float | None, unit: float = 1) -> str:
    """Write a number with at least three digits; None is empty."""
    if value is None:
        return ""
    return f"{value / unit:,.0f}" if abs(value / unit) >= 100 else f"{value / unit:.3g}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
