"""Two gloo processes on the CPU that run all cases of a test module, one after the other, and store what each case returned.

>>> CASES = {}
>>> @case_of(CASES)
... def sums(rank, folder): ...            # on both ranks
>>> two_ranks = two_ranks_of(__name__)     # a fixture: two_ranks("sums") -> what it returned on rank 0 and on rank 1

A case that raises on one rank, or hangs, ends in an error on both: the process group times out.
"""

import importlib
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

RANKS = 2
GROUP_TIMEOUT, LAUNCH_TIMEOUT = 40, 240  # seconds; a launch takes about ten


def case_of(cases: dict):
    """Return a decorator that adds a function (rank, folder) -> result to `cases`; both ranks run them in this order."""

    def case(function):
        cases[function.__name__] = function
        return function

    return case


def two_ranks_of(module: str):
    """Make the fixture `two_ranks` of a test module, which runs its cases in a folder of their own."""

    @pytest.fixture(scope="module")
    def two_ranks(tmp_path_factory):
        return run_all_cases(module, tmp_path_factory.mktemp("ranks"))

    return two_ranks


def run_all_cases(module: str, folder: Path):
    """Run a module's cases on both ranks; return a function that maps a case's name to its results on rank 0 and on rank 1."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run_cases, args=(module, rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LAUNCH_TIMEOUT
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
    return lambda name: [_outcome(folder / f"{name}.{rank}") for rank in range(RANKS)]


def _run_cases(module: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}  # as torchrun sets them
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # not used
    rendezvous, timeout = f"file://{folder}/rendezvous", timedelta(seconds=GROUP_TIMEOUT)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timeout)
    for name, run in importlib.import_module(module).CASES.items():
        torch.manual_seed(rank)
        try:
            outcome = ("result", run(rank, folder))
        except Exception:
            outcome = ("error", traceback.format_exc())
        torch.save(outcome, folder / f"{name}.{rank}.part")
        (folder / f"{name}.{rank}.part").rename(folder / f"{name}.{rank}")


def _outcome(path: Path):
    name, _, rank = path.name.rpartition(".")
    assert path.exists(), f"rank {rank} never finished {name}"
    kind, value = torch.load(path, weights_only=False)
    assert kind == "result", f"rank {rank}: {value}"
    return value
