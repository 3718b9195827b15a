"""Put measured speeds and tested versions into README.md and the site, from the committed result files.

python scripts/readme_table.py
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import tables  # noqa: E402

OPACUS = """\
Opacus 1.6's Conv2d reads channels_last memory as if it were NCHW; its gradients and norms are then wrong. The bench feeds it
NCHW and makes every convolution's input contiguous. `bench/test_channels_last.py` shows the fault, and FastLoDA right on both
layouts."""


def speed(results: str) -> str:
    """Make the tables of the newest result file of every machine; `results` is the link to their folder."""
    newest = {document["machine"]: (path, document) for path, document in _results()}
    return "\n\n".join(_machine_table(path, document, results) for path, document in newest.values())


def _results() -> Iterator[tuple[Path, dict]]:
    """Read all result files, the oldest first."""
    documents = {path: tables.load(path) for path in (ROOT / "bench" / "results").glob("*.json")}
    return iter(sorted(documents.items(), key=lambda item: (item[1]["date"], item[0].name)))


def _machine_table(path: Path, document: dict, results: str) -> str:
    lead = (
        "One training step, medians of paired, interleaved rounds: FastLoDA's private step against the same step in plain "
        "PyTorch *without* privacy, eager and compiled, and against the fastest peer that gives right gradients (Opacus in each "
        "of its modes; fastDP and jax_privacy where they were installed). "
        f"Memory is the peak allocation of the step. {tables.environment(document)} "
        f"([`{path.name}`]({results}{path.name})):"
    )
    return f"{lead}\n\n{tables.summary_table(document['steps']).to_markdown()}".rstrip() + "\n\n" + OPACUS


def versions() -> str:
    """Make the table of the versions with which scripts/versions.py has tested the sdist."""
    tested = json.loads((ROOT / "docs" / "results" / "versions.json").read_text())
    columns = ["python", "torch", "triton", "numpy", "passed", "failed", "skipped", "date"]
    return tables.Table("", columns, [[str(each[name]) for name in columns] for each in tested]).to_markdown().strip()


PAGES = {
    "README.md": ("speed", lambda: speed("bench/results/")),  # the argument: the path from the page to the result files
    "docs/benchmarks.md": ("speed", lambda: speed("../bench/results/")),
    "docs/installation.md": ("versions", versions),
}


def with_figures(page: str) -> str:
    """Return a page's text with the figures of today's result files between its marks."""
    name, make = PAGES[page]
    begin, end = f"<!-- {name}: written by scripts/readme_table.py -->\n", f"<!-- end of {name} -->"
    before, _, rest = (ROOT / page).read_text().partition(begin)
    return f"{before}{begin}\n{make()}\n\n{rest[rest.index(end) :]}"


def main() -> None:
    for page in PAGES:
        (ROOT / page).write_text(with_figures(page))


if __name__ == "__main__":
    main()
