"""What the guards cost: private steps with and without, paired and interleaved. `python bench/guards.py` writes a result file.

Without: the loss's graph is read for its parameters' uses only; no factor or dimension enters the signature, nothing is probed,
and no parameter or buffer is watched. The looks are timed apart, for they come at few steps.
"""

import json
import math
import statistics
import sys
from contextlib import ExitStack, nullcontext
from datetime import date
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import machine  # noqa: E402
import torch  # noqa: E402
from adapters import use_loda_layers  # noqa: E402
from cases import Case  # noqa: E402
from measure import Race, ratio  # noqa: E402

from fastloda import GhostClipper, coverage, graph, step  # noqa: E402
from fastloda.graph import nodes_below  # noqa: E402
from fastloda.private_loss import check_loss  # noqa: E402
from fastloda.private_module import PrivateModule, Tape  # noqa: E402

CASES = (
    Case("digits_unet", batch=64),
    Case("wideresnet", batch=16, rank=None),
)
CHANCE = coverage.LOOK_AGAIN
STEPS = 1000  # of the run over which the looks are counted


class NoWatch:
    """A watch that looks at nothing."""

    def __init__(self, members):
        pass

    def check(self, members, thorough=True):
        pass


def without_guards() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(patch.object(step, "Watch", NoWatch))
    stack.enter_context(patch.object(step, "check_independence", lambda *args, **kwargs: None))
    stack.enter_context(patch.object(graph, "_settings", lambda node: ()))
    return stack


class Run:
    """Private steps of one case, with a clipper that is kept."""

    def __init__(self, case: Case, guarded: bool):
        self.case, self.guards = case, nullcontext if guarded else without_guards
        self.model, self.batch = use_loda_layers(case.build()), case.inputs()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, 1e-6)
        with self.guards():
            self.clipper = GhostClipper(self.model, 1.0)

    def __call__(self) -> None:
        with self.guards():
            self.clipper.accumulate(self.case.losses(self.model, self.batch))
            self.clipper.privatize(1.0, self.case.batch)
            self.optimizer.step()


def of_steps(case: Case, rounds: int) -> dict[str, float]:
    """Times of whole steps without a look, and of the looks."""
    with patch.object(coverage, "LOOK_AGAIN", 0):
        guarded, bare = Run(case, True), Run(case, False)
        for run in (guarded, bare) * 4:  # past the first scheduled looks
            run()
        (looks,) = [looks for looks in coverage._looks[guarded.model].values() if looks.batches > 1]
        looks.batches = 2**30 + 1  # no look is due
        race = Race({"guarded": guarded, "bare": bare})
        for _ in range(rounds):
            race.round()
        times = race.paired(rounds)
        plain, again, first = [], [], []
        for _ in range(max(3, rounds // 6)):
            plain.append(machine.seconds(guarded))
            looks.batches = 2**30 - 1
            again.append(machine.seconds(guarded))
            looks.parted = 0
            first.append(machine.seconds(guarded))
    median = statistics.median
    look, begin = (median(times) / median(plain) - 1 for times in (again, first))
    share = (begin + look * (math.log2(STEPS) + CHANCE * STEPS)) / STEPS
    return {
        "step, guarded / bare": ratio(times["guarded"], times["bare"]),
        "first look, in steps": begin,
        "later look, in steps": look,
        f"all looks of {STEPS} steps, as a share": share,
        "bare step, seconds": median(times["bare"]),
    }


def of_loss(rows: int = 128, classes: int = 10, rounds: int = 200) -> dict[str, float]:
    """A look at make_private's loss, which comes at every step."""
    module = PrivateModule(torch.nn.Linear(8, classes), Tape("mean"))
    x, y = torch.randn(rows, 8), torch.randint(classes, (rows,))
    loss = torch.nn.functional.cross_entropy(module(x), y)
    boundary, below = loss.grad_fn.next_functions[0][0].next_functions[0][0], nodes_below([loss.grad_fn])
    times = [machine.seconds(lambda: check_loss([(loss.grad_fn, 0)], below, [boundary])) for _ in range(rounds)]
    return {"look at a cross entropy, seconds": statistics.median(times)}


def main() -> None:
    torch.set_num_threads(2)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    found = {case.name: of_steps(case, rounds) for case in CASES} | {"make_private": of_loss()}
    document = {"machine": machine.name(), "versions": machine.versions(), "rounds": rounds, "figures": found}
    path = Path(__file__).parent / "results" / "guards" / f"{machine.name()}-{date.today()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
