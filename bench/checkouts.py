"""The step times of two checkouts, paired and interleaved: `python bench/checkouts.py OLD NEW [ROUNDS]`.

A checkout is a folder with FastLoDA's sources and a virtual environment `.venv` in which it is installed. A process in each makes
the same models with its own bench/cases.py, and the two take private steps in turn. Writes a result file.
"""

import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import machine

CASES = (
    {"model": "layer", "batch": 64},
    {"model": "stack", "batch": 32},
    {"model": "stack", "batch": 64, "channels": 16, "size": 8, "layout": "channels_last"},
    {"model": "digits_unet", "batch": 64},
    {"model": "digits_unet", "batch": 64, "rank": None},
    {"model": "wideresnet", "batch": 16, "rank": None},
)
WORKER = """
import json, sys, time
sys.path.insert(0, "bench")
import torch
from adapters import use_loda_layers
from cases import Case
from fastloda import GhostClipper
torch.set_num_threads(2)
for line in sys.stdin:
    if line.startswith("{"):
        case = Case(**json.loads(line))
        model, batch = use_loda_layers(case.build()), case.inputs()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-6)
        clipper = GhostClipper(model, 1.0)
        print(case.name, flush=True)
        continue
    start = time.perf_counter()
    clipper.accumulate(case.losses(model, batch))
    clipper.privatize(1.0, case.batch)
    optimizer.step()
    print(time.perf_counter() - start, flush=True)
"""


class Worker:
    """A process that takes private steps in one checkout."""

    def __init__(self, checkout: Path):
        command = [str(checkout / ".venv/bin/python"), "-c", WORKER]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=checkout, stdin=pipe, stdout=pipe, stderr=sys.stderr, text=True)

    def ask(self, line: str) -> str:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def main() -> None:
    old, new = (Worker(Path(path).absolute()) for path in sys.argv[1:3])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 40
    found = {}
    for case in CASES:
        (name,) = {worker.ask(json.dumps(case)) for worker in (old, new)}
        times = {old: [], new: []}
        for number in range(rounds + 12):  # the first ones, which are dropped, have most of the probes
            for worker in (old, new) if number % 2 else (new, old):
                times[worker].append(float(worker.ask("step")))
        pairs = list(zip(times[new][12:], times[old][12:], strict=True))
        ratios = sorted(a / b for a, b in pairs)
        found[name] = {
            "new / old, median": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
            "new, seconds": statistics.median(a for a, _ in pairs),
        }
        print(name, found[name], flush=True)
    document = {"machine": machine.name(), "versions": machine.versions(), "rounds": rounds, "figures": found}
    path = Path(__file__).parent / "results" / "checkouts" / f"{machine.name()}-{date.today()}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
