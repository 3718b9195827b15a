"""`fastloda bench-report`: the bench's result files as Markdown with figures."""

from collections.abc import Iterator
from pathlib import Path

from fastloda.files import write_atomically
from fastloda.synthesis.report import bench, bench_plots


def bench_report(files: list[Path], out: Path = Path("bench-report")) -> dict:
    """Tables and plots of result files of the bench.

    Args:
        files: bench/results/<machine>-<date>.json, as `pytest bench/` writes them.
        out: folder for bench.md and its PNG files.

    Raises:
        OSError: a file can't be read or written.
        ValueError: a file is no result file of the bench.
    """
    documents = {Path(file).stem: bench.load(file) for file in files}  # all, before anything is written
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = [part for stem, document in documents.items() for part in _parts(stem, document, out)]
    write_atomically(out / "bench.md", "\n".join(["# FastLoDA, measured\n", *parts]).encode())
    return {"report": str(out / "bench.md"), "figures": sum(part.startswith("![") for part in parts)}


def _parts(stem: str, document: dict, out: Path) -> Iterator[str]:
    """The document's Markdown, piece by piece; figures are written to `out` on the way."""
    yield f"## {document['machine']}, {document['date']}\n\n{bench.environment(document)}\n"
    if document["steps"]:
        yield bench.summary_table(document["steps"]).to_markdown()
    for caption, png in _figures(document):
        name = f"{stem}-{caption.replace(' ', '-')}.png"
        write_atomically(out / name, png)
        yield f"![{caption}]({name})\n"
    for table in bench.tables(document):
        yield f"### {table.title}\n\n{table.to_markdown()}"


def _figures(document: dict) -> Iterator[tuple[str, bytes]]:
    """(caption, PNG)"""
    for word, measure in (("time", bench_plots.TIME), ("memory", bench_plots.MEMORY)):
        if bench_plots.has(document["steps"], measure):
            yield f"{word} of a step", bench_plots.ratio_bars(document["steps"], measure)
        for curve in dict.fromkeys(point["curve"] for point in document["growth"]):
            points = [point for point in document["growth"] if point["curve"] == curve]
            if bench_plots.has(points, measure):
                yield f"{word} by {curve}", bench_plots.growth_curve(points, measure)
