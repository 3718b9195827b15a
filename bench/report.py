"""Turn the bench's result files into Markdown with plots: `python bench/report.py bench/results/*.json --out bench-report`."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import plots
import tables

from fastloda.files import write_atomically


def main(arguments: Sequence[str] | None = None) -> None:
    """Write bench.md and its PNG files into a folder, once all result files have been read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="<machine>-<date>.json, as `pytest bench/` writes them")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="the folder")
    chosen = parser.parse_args(arguments)
    try:
        documents = {file.stem: tables.load(file) for file in chosen.files}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    chosen.out.mkdir(parents=True, exist_ok=True)
    parts = [part for stem, document in documents.items() for part in _parts(stem, document, chosen.out)]
    write_atomically(chosen.out / "bench.md", "\n".join(["# FastLoDA, measured\n", *parts]).encode())
    print(f"{chosen.out / 'bench.md'}, with {sum(part.startswith('![') for part in parts)} figures")


def _parts(stem: str, document: dict, out: Path) -> Iterator[str]:
    """Yield the document's Markdown, piece by piece, and write its figures to `out` on the way."""
    yield f"## {document['machine']}, {document['date']}\n\n{tables.environment(document)}\n"
    if document["steps"]:
        yield tables.summary_table(document["steps"]).to_markdown()
    for caption, png in _figures(document):
        name = f"{stem}-{caption.replace(' ', '-')}.png"
        write_atomically(out / name, png)
        yield f"![{caption}]({name})\n"
    for table in tables.tables(document):
        yield f"### {table.title}\n\n{table.to_markdown()}"


def _figures(document: dict) -> Iterator[tuple[str, bytes]]:
    """Yield the document's figures, each as (caption, PNG)."""
    for word, measure in (("time", plots.TIME), ("memory", plots.MEMORY)):
        if plots.has(document["steps"], measure):
            yield f"{word} of a step", plots.ratio_bars(document["steps"], measure)
        for curve in dict.fromkeys(point["curve"] for point in document["growth"]):
            points = [point for point in document["growth"] if point["curve"] == curve]
            if plots.has(points, measure):
                yield f"{word} by {curve}", plots.growth_curve(points, measure)


if __name__ == "__main__":
    main()
