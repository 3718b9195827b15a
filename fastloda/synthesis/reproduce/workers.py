"""Workers that compute cells in parallel: each is a process with its share of the cores.

Small convolutions cannot keep several cores busy: cells on one core each finish sooner than cells one by one on all cores.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch

from fastloda.progress import EVERY, Progress
from fastloda.synthesis.allocator import keep_freed_memory
from fastloda.synthesis.methods import Work
from fastloda.synthesis.methods.public_classifier import public_classifier
from fastloda.synthesis.metrics import Extractor, classifier_features, torchscript_features
from fastloda.synthesis.runs import RunError

from .cells import Cell, Problem, all_cells
from .known import known_cells, take_over
from .recipe import Recipe, TableName, Variant
from .recipes import recipe

logger = logging.getLogger("fastloda")


@dataclass(frozen=True)
class Order:
    """The request for a table. Each worker makes the table from it again, since a recipe's functions cannot be sent to it."""

    table: TableName
    variant: Variant
    run: Path
    seeds: int
    epsilons: tuple[float, ...]
    methods: tuple[str, ...]
    features: Path | None
    device: torch.device


class Experiment:
    """A table to compute: its recipe, its data, and its cells.

    Raises:
        ValueError, OSError: files are missing or damaged.
    """

    def __init__(self, order: Order):
        table = recipe(order.table, order.variant)
        chosen = table.only(order.methods)
        self.order, self.recipe = order, replace(chosen, epsilons=order.epsilons or chosen.epsilons)
        self._epsilons = sorted({*table.epsilons, *order.epsilons})
        self._methods = [*table.methods, *(method for method in chosen.methods if method not in table.methods)]
        images = {"private": chosen.private(), "public": chosen.public(), "test": chosen.test()}
        judging = {name: getattr(chosen, name) for name in ("delta", "classifiers", "synthetic_images", "public_seed")}
        self.problem = Problem(**images, **judging, extractor=self._extractor())
        self.cells = all_cells(chosen.methods, self.recipe.epsilons, order.seeds)

    def result(self, cell: Cell) -> dict:
        """Return the result of a cell; it is computed if it is not there."""
        return cell.result(self.order.run, self.problem, self.order.device)

    def to_do(self) -> list[int]:
        """List the numbers of the cells that have no result yet.

        Raises:
            RunError: a folder contains a cell with other settings.
        """
        stages = [cell.stage(self.order.run, self.problem, self.order.device) for cell in self.cells]
        return [index for index, stage in enumerate(stages) if not stage.is_done()]

    def finished(self) -> tuple[Recipe, dict[Cell, dict]]:
        """Collect the results of all finished cells of the table in the run's folder, whoever asked for them.

        The recipe that is returned with them has their rows and columns. Cells with other settings are left out.
        """
        seeds = [int(folder.name.removeprefix("seed-")) for folder in self.order.run.glob("cells/*/*/seed-*")]
        results, stale = {}, []
        for cell in all_cells(self._methods, self._epsilons, max(seeds, default=0) + 1):
            try:
                if cell.stage(self.order.run, self.problem, self.order.device).is_done():
                    results[cell] = self.result(cell)
            except RunError:
                stale.append(cell.name)
        if stale:
            logger.warning("left out of the report, for they were made with other settings: %s", "; ".join(stale))
        methods = [method for method in self._methods if any(cell.method is method for cell in results)]
        epsilons = tuple(e for e in self._epsilons if any(cell.epsilon == e for cell in results))
        return replace(self.recipe, methods=methods, epsilons=epsilons or self.recipe.epsilons), results

    def take_over(self, path: Path) -> None:
        """Take cells from the results.json of another run of the table, where they have the same settings; say which.

        Raises:
            OSError, ValueError: the file can't be read, or is not such a file.
        """
        known = known_cells(path, self.order.table)
        rows = {method.name: method for method in self._methods}
        cells = [Cell(rows[name], epsilon, seed) for name, epsilon, seed in known if name in rows]
        stages = {cell: cell.stage(self.order.run, self.problem, self.order.device) for cell in cells}
        taken = take_over(known, stages, path.parent, self.order.table)
        names = "; ".join(cell.name for cell in taken) or "none"
        logger.info("taken over from %s, for they were made with the same settings: %s", path, names)

    def compute(self, index: int) -> str:
        """Compute cell number `index`, and return a line that describes its result."""
        result = self.result(self.cells[index])
        accuracies = ", ".join(f"{100 * value:.1f}%" for value in result["accuracy"].values())
        return f"{self.cells[index].name}: {accuracies}, {sum(result['seconds'].values()):.0f} s"

    def _extractor(self) -> Callable[[], Extractor]:
        """Return the function that gives the extractor. A file is read now, so that a bad one is refused before any cell."""
        device = self.order.device
        if self.order.features is not None:
            found = torchscript_features(self.order.features, device=device)
            return lambda: found
        public, run = self.recipe.public(), self.order.run
        work = Work(run, run / "public", seed=0, device=device)
        name = f"a small CNN trained on {len(public)} public images"
        return cache(
            lambda: classifier_features(
                public_classifier(public, self.recipe.extractor_steps, work), name, device=device
            )
        )


def compute_cells(table: Experiment, jobs: int, progress: bool) -> None:
    """Compute all cells that are not done, `jobs` at a time; each writes its result to its folder.

    Raises:
        RunError: a folder contains a cell with other settings; raised before anything is computed.
        Any error of a cell; the cells running beside it are stopped, and continue in the next run if their method can.
    """
    to_do = table.to_do()
    done = len(table.cells) - len(to_do)
    with (
        _executor(table, jobs) as submit,
        Progress("cells", len(table.cells), "cell", done=done, shown=progress) as bar,
    ):
        waiting, running = iter(to_do), {}
        while True:
            for index in islice(waiting, jobs - len(running)):
                running[submit(index)] = table.cells[index].name
            if not running:
                return
            bar.update(0, f"running {', '.join(running.values())}")
            finished = wait(running, EVERY, return_when=FIRST_COMPLETED).done
            for future in finished:
                bar.say(future.result())
                del running[future]
            bar.update(len(finished))


def default_jobs(device: torch.device) -> int:
    """Return the number of cells to compute at a time: one on a GPU, which is hard to share; on a CPU, one per PyTorch thread."""
    return 1 if device.type == "cuda" else torch.get_num_threads()


@contextmanager
def _executor(table: Experiment, jobs: int) -> Iterator[Callable[[int], Future]]:
    """Yield a function that starts a cell: in this process, or in one of `jobs` processes."""
    if jobs == 1:
        yield partial(_now, table.compute)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")  # PyTorch's threads do not work in a forked process
    workers = {"mp_context": spawn, "initializer": _start_worker, "initargs": (table.order, threads)}
    with ProcessPoolExecutor(jobs, **workers) as pool:
        try:
            yield partial(pool.submit, _in_worker)
        except BaseException:
            for process in multiprocessing.active_children():  # else the pool would wait for the running cells
                process.terminate()
            raise


def _now(function: Callable[[int], str], index: int) -> Future:
    future = Future()
    future.set_result(function(index))
    return future


_workers_order: Order | None = None


def _start_worker(order: Order, threads: int) -> None:
    global _workers_order
    _workers_order = order
    torch.set_num_threads(threads)
    keep_freed_memory()
    logging.getLogger("fastloda").setLevel(logging.ERROR)  # the parent shows the progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent ends: a killed parent stops none, and the next run would compute the same cell twice."""
    multiprocessing.parent_process().join()
    os._exit(1)


@cache
def _workers_experiment() -> Experiment:
    """Make the worker's table at its first cell: an error at the worker's start would be reported as a broken pool."""
    return Experiment(_workers_order)


def _in_worker(index: int) -> str:
    return _workers_experiment().compute(index)
