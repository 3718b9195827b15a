"""Put the measured figures into README.md from the committed result files: nobody types a number.

python scripts/readme_table.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "<!-- measured -->"


def bench_table() -> str:
    path = max((ROOT / "bench" / "results").glob("*.json"), key=lambda p: p.name[-15:])
    document = json.loads(path.read_text())
    lines = [
        f"One training step of six adapted 3 x 3 convolutions (r = 4): FastLoDA's private step against the same step in plain "
        f"PyTorch *without* privacy. Medians of paired, interleaved rounds; peak allocation of a step. `{document['machine']}`, "
        f"torch {document['torch']} ([`{path.name}`](bench/results/{path.name})):",
        "",
        "| case | plain, samples/s | private, samples/s | time x | peak memory x |",
        "|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        lines.append(
            f"| {row['case']} | {row['plain img/s']:.0f} | {row['private img/s']:.0f} | {row['time x']:.2f} "
            f"| {row['memory x']:.2f} |"
        )
    return "\n".join(lines)


def demo_table() -> str:
    text = (ROOT / "docs" / "results" / "demo.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return (
        "Accuracy on 360 real handwritten digits ([`docs/results/demo.md`](docs/results/demo.md): `fastloda demo --seeds 3 "
        "--epsilon 1,10`; font digits are public, 1,437 real digits private):\n\n" + table + "\n\n"
        "On these small images DP-SGD, tuned with the same care, is level with DP-LoDA. It gives one classifier; DP-LoDA gives "
        "images, for any later use."
    )


def main() -> None:
    path = ROOT / "README.md"
    before, _, rest = path.read_text().partition("## Measured\n")
    after = rest[rest.index("\n## ") :]
    path.write_text(f"{before}## Measured\n\n{demo_table()}\n\n{bench_table()}\n{after}")


if __name__ == "__main__":
    main()
