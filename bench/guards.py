"""The cost of the guards (probes, checks, watch): private steps with and without them, paired and interleaved.

    python bench/guards.py        # writes a result file

Without guards, the loss's graph is read for its parameters' uses only; no factor or dimension enters the signature, nothing is
probed, and no parameter or buffer is watched. Looks (the checks whether samples mix) come at few steps, so they are timed inside
whole runs of `DPTrainer`.
"""

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import machine  # noqa: E402
import torch  # noqa: E402
from adapters import use_loda_layers  # noqa: E402
from cases import Case  # noqa: E402
from measure import Race, ratio  # noqa: E402

from fastloda import DPTrainer, GhostClipper, PrivateTraining  # noqa: E402
from fastloda.engine.loss_check import check_loss  # noqa: E402
from fastloda.engine.module import PrivateModule, Tape  # noqa: E402
from fastloda.per_sample import compute, graph
from fastloda.per_sample import refusals as coverage
from fastloda.per_sample.graph import nodes_below  # noqa: E402
from fastloda.privacy import step
from fastloda.training.looks import Looks

CASES = (
    Case("digits_unet", batch=64),
    Case("wideresnet", batch=16, rank=None),
)
RUNS = ((CASES[0], True), (CASES[0], False), (replace(CASES[0], batch=256), False), (CASES[1], True))
STEPS = 1000  # of a run whose looks are timed


class NoWatch:
    """A stand-in for `Watch` that checks nothing."""

    def __init__(self, members):
        pass

    def check(self, members, thorough=True):
        pass


def without_guards() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(patch.object(step, "Watch", NoWatch))
    stack.enter_context(patch.object(compute, "check_independence", lambda *args, **kwargs: None))
    stack.enter_context(patch.object(graph, "_settings", lambda node: ()))
    return stack


class Run:
    """The private steps of one case, all with one clipper."""

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
    """Time whole steps in which no look is due."""
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
    return {
        "step, guarded / bare": ratio(times["guarded"], times["bare"]),
        "bare step, seconds": statistics.median(times["bare"]),
    }


def timed(function: Callable, times: list[float]) -> Callable:
    """Wrap a function so that it adds the time of each call to `times`."""

    def run(*args):
        found = []
        times.append(machine.seconds(lambda: found.append(function(*args))))
        return found[0]

    return run


def of_run(case: Case, fixed_shape: bool, steps: int = STEPS) -> dict[str, float]:
    """Measure the share of a run of DPTrainer that looks take: the probe's looks at the graph, the trainer's at the data."""
    settings = PrivateTraining(
        sample_rate=0.125,
        expected_batch_size=case.batch,
        steps=steps,
        noise_multiplier=1.0,
        delta=1e-5,
        micro_batch_size=case.batch if fixed_shape else 2 * case.batch,
        fixed_shape=fixed_shape,
        learning_rate=1e-6,
    )
    data = tuple(t.detach() for t in replace(case, batch=8 * case.batch).inputs())
    losses = lambda model, batch, generator: case.losses(model, batch)  # noqa: E731
    trainer = DPTrainer(use_loda_layers(case.build()), data, losses, settings, progress=False)
    probes, looks = [], []
    with (
        patch.object(coverage._Probe, "look", timed(coverage._Probe.look, probes)),
        patch.object(Looks, "look", timed(Looks.look, looks)),
    ):
        first = machine.seconds(trainer.train_step)
        first_probes, first_look = sum(probes), sum(looks)
        total = first + machine.seconds(trainer.fit)
    probe, look = sum(probes), sum(looks)
    step = (total - probe - look) / steps
    return {
        "probe, share of the run": probe / total,
        "trainer's looks, share of the run": look / total,
        "first probe, in steps": first_probes / step,
        "trainer's first look, in steps": first_look / step,
        "step without looks, seconds": step,
    }


def of_loss(rows: int = 128, classes: int = 10, rounds: int = 200) -> dict[str, float]:
    """Time the check of a loss that make_private does at every step."""
    module = PrivateModule(torch.nn.Linear(8, classes), Tape("mean"))
    x, y = torch.randn(rows, 8), torch.randint(classes, (rows,))
    loss = torch.nn.functional.cross_entropy(module(x), y)
    boundary, below = loss.grad_fn.next_functions[0][0].next_functions[0][0], nodes_below([loss.grad_fn])
    look = lambda: check_loss([(loss.grad_fn, 0)], [None], below, [boundary])  # noqa: E731
    times = [machine.seconds(look) for _ in range(rounds)]
    return {"look at a cross entropy, seconds": statistics.median(times)}


def main() -> None:
    torch.set_num_threads(2)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    found = {case.name: of_steps(case, rounds) for case in CASES} | {"make_private": of_loss()}
    for case, fixed in RUNS:
        found[f"{case.name}, {STEPS} steps, {'fixed' if fixed else 'varying'} shapes"] = of_run(case, fixed)
    document = {"machine": machine.name(), "versions": machine.versions(), "rounds": rounds, "figures": found}
    path = Path(__file__).parent / "results" / "guards" / f"{machine.name()}-{date.today()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
