"""The bench's result files as tables: for the terminal, for Markdown, for the README."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastloda.synthesis.report.tables import Table

OURS, PLAIN = "FastLoDA", "plain PyTorch"
MIB = 1 << 20
ERRORS = ("error", "memory_error", "fits_error")  # of the step, of measuring its memory, of finding the largest batch


def load(path: Path) -> dict:
    """A result file's document.

    Raises:
        OSError: it can't be read.
        ValueError: it is no result file of the bench.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(document, dict) or document.get("format") != 1:
        raise ValueError(f"{path} is no result file of the bench (bench/results/<machine>-<date>.json)")
    return document


def tables(document: dict) -> Iterator[Table]:
    """Those for which something was measured: steps, growth, kernels."""
    if document["steps"]:
        yield step_table(document["steps"], "One training step")
    if document["growth"]:
        yield step_table(document["growth"], "As the work grows")
    if document["kernels"]:
        yield kernel_table(document["kernels"])


def step_table(cases: Sequence[dict], title: str) -> Table:
    """Under each case a row for each provider; what could not run is a note."""
    columns = [
        "case, provider", "samples/s", "median s", "iqr s", "/ plain", "/ best Opacus", "peak MiB", "/ plain", "RSS MiB",
        "largest batch",
    ]  # fmt: skip
    rows, notes = [], {}
    for case in cases:
        rows.append([case["case"], *[""] * 9])
        for provider, figures in case["providers"].items():
            rows.append([f"- {provider}", *_step_cells(figures)])
            for error in filter(None, map(figures.get, ERRORS)):
                notes.setdefault(f"{provider}: {error}", []).append(case["case"])
    return Table(title, columns, rows, notes=[f"{error} ({', '.join(found)})" for error, found in notes.items()])


def _step_cells(figures: dict) -> list[str]:
    if "error" in figures:
        return ["error", *[""] * 7, number(figures.get("largest_batch"))]
    return [
        number(figures["samples_per_second"]),
        number(figures["seconds"]["median"]),
        number(figures["seconds"]["iqr"]),
        ratio(figures.get("time_over_plain")),
        ratio(figures.get("time_over_best_opacus")),
        number(figures.get("peak_bytes"), MIB),
        ratio(figures.get("peak_over_plain")),
        number(figures.get("resident_bytes"), MIB),
        number(figures.get("largest_batch")),
    ]


def kernel_table(kernels: Sequence[dict]) -> Table:
    """A row for each operation and layer shape."""
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
    """FastLoDA in one row a case, as the README shows it."""
    columns = [
        "case", "plain, samples/s", "FastLoDA, samples/s", "time / plain", "peak memory / plain",
        "best Opacus", "faster than it", "peak memory / its",
    ]  # fmt: skip
    return Table("FastLoDA", columns, [_summary_row(case) for case in cases])


def _summary_row(case: dict) -> list[str]:
    providers = case["providers"]
    plain, ours, best = (providers.get(name, {}) for name in (PLAIN, OURS, case["best_opacus"]))
    faster = ours.get("time_over_best_opacus")
    both = ours.get("peak_bytes") and best.get("peak_bytes")
    return [
        case["case"],
        number(plain.get("samples_per_second")),
        number(ours.get("samples_per_second")),
        ratio(ours.get("time_over_plain")),
        ratio(ours.get("peak_over_plain")),
        (case["best_opacus"] or "none runs").removeprefix("Opacus "),
        f"{1 / faster:.2f} x" if faster else "",
        ratio(ours["peak_bytes"] / best["peak_bytes"] if both else None),
    ]


def environment(document: dict) -> str:
    """One line: the machine, its versions, its measured limits."""
    parts = [f"`{document['machine']}`", document["date"]]
    parts += [f"{name} {version}" for name, version in document["versions"].items()]
    if peaks := document.get("peaks"):
        parts.append(f"copy {peaks['copy_bytes_per_second'] / 1e9:.3g} GB/s")
        parts += [f"{dtype} {flops / 1e9:.3g} GFLOP/s" for dtype, flops in peaks["matmul_flops_per_second"].items()]
    return ", ".join(parts)


def number(value: float | None, unit: float = 1) -> str:
    """Three digits at least; empty for None."""
    if value is None:
        return ""
    return f"{value / unit:,.0f}" if abs(value / unit) >= 100 else f"{value / unit:.3g}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
