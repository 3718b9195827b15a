"""Try settings of a table's method on public images that stand in for the private ones, and write one table of what was tried.

    python scripts/trials.py mnist5k DP-LoDA --epsilon 1 --base '{"tunings.views": 4}' \\
        '{"tunings.training.learning_rate": 0.004}' '{"tunings.training.learning_rate": 0.016}'

Each argument is a setting: what differs from the table's, by path. The rules are those of docs/tuning.md: stand-ins alone, all
settings on the same seeds, and after each round the worse half stops. An interruption loses only the trials that were running.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stand_ins import MADE_OF, STAND_INS

from fastloda.errors import UserError
from fastloda.synthesis.classify import accuracy, train_classifier
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.methods import Budget, ChosenLoDA, Method, WarmUp, Work
from fastloda.synthesis.methods.base import ByEpsilon, at_budget
from fastloda.synthesis.methods.gaussian_release import noise_stream
from fastloda.synthesis.methods.warm_up import OneRelease
from fastloda.synthesis.report.tables import Table
from fastloda.synthesis.reproduce.recipe import Recipe, Variant
from fastloda.synthesis.reproduce.recipes import RECIPES, recipe
from fastloda.synthesis.runs import read_json, write_json

Setting = Mapping[str, Any]
SYNTHETIC_IMAGES = 2000  # half of a table's: a trial is short


@dataclass(frozen=True)
class Search:
    """A search among settings of one method.

    Attributes:
        table, method, epsilon: the table, its row and the budget, whose settings are searched.
        stand_ins: names of the stand-ins; each setting is tried on all of them.
        rounds: number of rounds; round k has seed k. After each the worse half stops.
        run: folder of the results.
        records: number of records to train on, the nominal number of private ones.
        quick: whether to use the table's quick form, which only shows that everything runs.
        chosen_only: whether a classifier is trained on the public images that a method chooses, in place of its samples: a trial
            of minutes, for no model is trained.
    """

    table: str
    method: str
    epsilon: float
    stand_ins: tuple[str, ...]
    rounds: int
    run: Path
    records: int
    quick: bool = False
    chosen_only: bool = False

    def __post_init__(self):
        if own := [name for name in self.stand_ins if MADE_OF.get(name) == self.table]:
            raise UserError(f"{', '.join(own)} is made of the private images of {self.table}: take another stand-in")
        if self.chosen_only and not isinstance(self._choice(self.recipe().methods[0]), OneRelease):
            raise UserError(f"--chosen-only needs a method with one warm-up, which {self.method} does not have")

    def recipe(self) -> Recipe:
        return recipe(self.table, Variant(quick=self.quick)).only([self.method])

    def trial(self, setting: Setting, stand_in: str, seed: int) -> float:
        """Return the accuracy on a stand-in's test images, 0 to 1; a trial that was finished is not repeated."""
        made = self.recipe()
        method = changed(made.methods[0], setting, self.epsilon)
        facts = (method, self.epsilon, stand_in, seed, *(["chosen only"] if self.chosen_only else []))
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        path = self.run / f"{key}.json"
        if not path.exists():
            began = time.monotonic()
            found = self._accuracy(made, method, stand_in, seed, self.run / key)
            about = {"method": repr(method), "epsilon": self.epsilon, "stand_in": stand_in, "seed": seed}
            write_json(path, about | {"accuracy": found, "seconds": round(time.monotonic() - began)})
        return read_json(path)["accuracy"]

    def _accuracy(self, made: Recipe, method: Method, stand_in: str, seed: int, folder: Path) -> float:
        public = made.public()
        private, test = STAND_INS[stand_in](public.images.shape[-1], self.records, seed)
        if self.chosen_only:
            pool = method.pool() if method.pool else public
            synthetic = chosen_images(self._choice(method), private, pool, seed)
        else:
            options = {"progress": False, "public_seed": 0}  # one public model for all
            work = Work(folder, self.run / "public", seed, torch.device("cpu"), **options)
            sampler = method.fit(private, public, Budget(self.epsilon, made.delta, len(private)), work)
            synthetic = sampler.images(min(SYNTHETIC_IMAGES, made.synthetic_images), seed)
        (judge,) = made.classifiers.values()
        return accuracy(train_classifier(synthetic, **asdict(replace(judge, seed=seed)), progress=False), test)

    def _choice(self, method: Method) -> WarmUp | None:
        return method.choice.at(self.epsilon) if isinstance(method, ChosenLoDA) else None

    def results(self, settings: Sequence[Setting], jobs: int) -> list[list[list[float]]]:
        """Run the rounds, and return each setting's accuracies, [round][stand-in]; a stopped one has fewer rounds."""
        found: list[list[list[float]]] = [[] for _ in settings]
        alive = list(range(len(settings)))
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), partial(torch.set_num_threads, 1)) as pool:
            for seed in range(self.rounds):
                running = {
                    i: [pool.submit(self.trial, settings[i], name, seed) for name in self.stand_ins] for i in alive
                }
                for i, futures in running.items():
                    found[i].append([future.result() for future in futures])
                    print(f"round {seed + 1}: {json.dumps(settings[i])}: {found[i][-1]}", flush=True)
                ranked = sorted(alive, key=lambda i: -statistics.fmean(sum(found[i], [])))
                alive = sorted(
                    {0, *ranked[: math.ceil(len(ranked) / 2)]}
                )  # the first is what the others are compared with
        return found


def chosen_images(choice: OneRelease, private: LabelledImages, public: LabelledImages, seed: int) -> LabelledImages:
    """Choose public images by a noisy release about `private`, and move them."""
    pool = choice.pool(public, private.class_names)
    released = choice.release(private, pool, len(private), seed, noise_stream(seed))
    return choice.training_images(pool, released[choice.kind], seed, progress=False)


def changed(method: Any, setting: Setting, epsilon: float) -> Any:
    """Replace fields of nested dataclasses, given by path; settings that depend on the budget become those for this epsilon.

    Raises:
        ValueError: there is no such field.
    """
    method = at_budget(method, epsilon)
    for path, value in setting.items():
        method = _with(method, path.split("."), value)
    return method


def _with(settings: Any, path: list[str], value: Any) -> Any:
    if isinstance(settings, ByEpsilon):
        return ByEpsilon({epsilon: _with(own, path, value) for epsilon, own in settings.settings.items()})
    if not path:
        return tuple(value) if isinstance(value, list) else value
    if not is_dataclass(settings) or not hasattr(settings, path[0]):
        raise ValueError(f"{type(settings).__name__} has no field {path[0]!r}")
    return replace(settings, **{path[0]: _with(getattr(settings, path[0]), path[1:], value)})


def as_table(search: Search, settings: Sequence[Setting], found: list[list[list[float]]]) -> Table:
    """Make the table: accuracies by round, and the mean difference to the first setting over the rounds that both had."""
    rows = []
    for setting, rounds in zip(settings, found, strict=True):
        shown = "; ".join(", ".join(f"{100 * a:.1f}" for a in accuracies) for accuracies in rounds)
        pairs = [a - b for ours, first in zip(rounds, found[0]) for a, b in zip(ours, first, strict=True)]
        spread = f" ({100 * statistics.stdev(pairs) / math.sqrt(len(pairs)):.1f})" if len(pairs) > 1 else ""
        text = ", ".join(f"{path} {value}" for path, value in setting.items()) or "as in the table"
        rows.append(
            (
                text,
                f"{shown}{' stopped' * (len(rounds) < search.rounds)}",
                f"{100 * statistics.fmean(pairs):+.1f}{spread}",
            )
        )
    title = f"{search.method} of {search.table}, epsilon {search.epsilon:g}, on {' and '.join(search.stand_ins)}"
    columns = ("what differs", "accuracy in %, by round and stand-in", "difference (standard error)")
    return Table(title, columns, rows)


def _usual(table: str) -> list[str]:
    return [name for name in ("swirled", "handwritten") if MADE_OF.get(name) != table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=RECIPES)
    parser.add_argument("method", help="name of the table's row")
    parser.add_argument("settings", nargs="*", type=json.loads, help="what differs, as JSON, by path")
    parser.add_argument("--base", type=json.loads, default={}, help="what differs in all settings, the first one too")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--stand-ins",
        nargs="+",
        choices=STAND_INS,
        help="default: swirled and handwritten, but the latter not for digits, of which it is made; usps needs its files",
    )
    parser.add_argument("--run", type=Path, default=Path("runs/trials"))
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="take the table's quick form, to see that everything runs")
    parser.add_argument(
        "--chosen-only", action="store_true", help="judge the public images that the method chooses, not its samples"
    )
    given = parser.parse_intermixed_args()
    settings = [given.base, *({**given.base, **setting} for setting in given.settings)]
    search = Search(
        given.table,
        given.method,
        given.epsilon,
        tuple(given.stand_ins or _usual(given.table)),
        given.rounds,
        given.run,
        given.records,
        given.quick,
        given.chosen_only,
    )
    for setting in settings:  # refused before the work begins
        changed(search.recipe().methods[0], setting, given.epsilon)
    table = as_table(search, settings, search.results(settings, given.jobs))
    print(f"\n{table.title}\n\n{table.to_markdown()}")
    with (given.run / "trials.md").open("a") as file:
        file.write(f"\n{table.title}\n\n{table.to_markdown()}")


if __name__ == "__main__":
    main()
