"""Put the measured figures into README.md from the committed result files: nobody types a number.

python scripts/readme_table.py
"""

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


def bench_table() -> str:
    """The newest result file of every machine."""
    newest = {document["machine"]: (path, document) for path, document in _results()}
    return "\n\n".join(_machine_table(path, document) for path, document in newest.values())


def _results() -> Iterator[tuple[Path, dict]]:
    """Oldest first."""
    documents = {path: tables.load(path) for path in (ROOT / "bench" / "results").glob("*.json")}
    return iter(sorted(documents.items(), key=lambda item: (item[1]["date"], item[0].name)))


def _machine_table(path: Path, document: dict) -> str:
    lead = (
        "One training step, medians of paired, interleaved rounds: FastLoDA's private step against the same step in plain "
        "PyTorch *without* privacy, eager and compiled, and against the fastest peer that gives right gradients (Opacus in each "
        "of its modes; fastDP and jax_privacy where they were installed). "
        f"Memory is the peak allocation of the step. {tables.environment(document)} "
        f"([`{path.name}`](bench/results/{path.name})):"
    )
    return f"{lead}\n\n{tables.summary_table(document['steps']).to_markdown()}".rstrip() + "\n\n" + OPACUS


def demo_table() -> str:
    text = (ROOT / "docs" / "results" / "demo.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return (
        "Accuracy on 360 real handwritten digits ([`docs/results/demo.md`](docs/results/demo.md): `fastloda demo --seeds 3 "
        "--epsilon 1,10`; font digits are public, 1,437 real digits private):\n\n" + table + "\n\n"
        "Of each budget, the first row is what one noisy statistic and public digits alone give. At epsilon 1 it and the "
        "adapters are far ahead of DP-SGD, tuned with as much care; at epsilon 10 the noisy gradients do most of the work, in "
        "both. DP-SGD gives one classifier; DP-LoDA gives images, for any later use."
    )


def main() -> None:
    path = ROOT / "README.md"
    before, _, rest = path.read_text().partition("## Measured\n")
    after = rest[rest.index("\n## ") :]
    path.write_text(f"{before}## Measured\n\n{demo_table()}\n\n{bench_table()}\n{after}")


if __name__ == "__main__":
    main()
