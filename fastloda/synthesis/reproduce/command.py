"""The command `fastloda reproduce`: computes every cell of a table, and writes the report."""

import logging
from pathlib import Path

import rich

from fastloda.errors import UserError
from fastloda.synthesis.arguments import Device, Floats, Names, resolve_device
from fastloda.synthesis.environment import environment
from fastloda.synthesis.settings import UNetShape

from .recipe import TableName, Variant
from .report import Findings
from .workers import Experiment, Order, compute_cells, default_jobs

logger = logging.getLogger("fastloda")

NO_NAMES, NO_FLOATS = Names(), Floats()


def reproduce(
    table: TableName,
    *,
    data: Path | None = None,
    allow_partial: bool = False,
    run: Path | None = None,
    seeds: int = 3,
    epsilons: Floats = NO_FLOATS,
    methods: Names = NO_NAMES,
    unet: UNetShape | None = None,
    features: Path | None = None,
    known: Path | None = None,
    quick: bool = False,
    jobs: int | None = None,
    device: Device = "auto",
    progress: bool = True,
) -> None:
    """Compare all methods as in the paper's tables: fit each at each epsilon, test its images, and write a report.

    digits and mnist5k (real digits of 8 x 8 and 28 x 28 pixels) need no files. table2 (CIFAR-10, public ImageNet32),
    table3 (1% of CIFAR-10) and table4 (MNIST, public SVHN) read the published files from --data. Each cell, a method at an
    epsilon with a seed, is computed once: after an interruption, the same command continues. It writes results.json,
    results.md and report.html with all cells that the run has by then: a table can be computed in parts, and some rows with
    more seeds than others. The published values are shown beside the measured ones, and marked as such. Seeds are fixed, so
    that a table can be repeated: this is an experiment, not a private release.

    Args:
        table: name of the table: digits, mnist5k, table2, table3 or table4.
        data: folder with the published files; if files are missing, an error says which must be where.
        allow_partial: whether some of the published files, or files with fewer images, are enough.
        run: folder for all results. Default: runs/ and the table's name.
        seeds: number of repetitions of each cell; the table shows their mean and standard deviation.
        epsilons: columns of the table, separated by commas. Default: the paper's. The settings at an epsilon are those of the
            largest tuned epsilon that is not above it.
        methods: names of the rows to compute, separated by commas, as in DP-LoDA,DP-SGD. Default: all. A method of your own is
            named by its module and class, as in my_module:MyMethod (`fastloda.synthesis.methods` says what it needs).
        unet: shape of the U-Net in place of the table's.
        features: TorchScript file of an Inception network for FID and the other scores. Default: a small classifier trained on
            the public images.
        known: results.json of another run of the table, such as docs/results/mnist5k.json: its cells are taken over, not computed
            again, where all settings are the same.
        quick: whether to take minutes instead of hours, with too few steps and images for good results; the report says so.
        jobs: number of cells to compute at a time, each in a process with its share of the cores. Default: one on a GPU; on a
            CPU, one per core.
        device: device to compute on.
        progress: whether to show how many cells are done, and which are running.
    """
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    if bad := [epsilon for epsilon in epsilons if not 0 < epsilon < float("inf")]:
        raise UserError(f"epsilons must be positive and finite, got {bad[0]}")
    place, folder = resolve_device(device), Path(run or f"runs/{table}{'-quick' * quick}")
    jobs = jobs or default_jobs(place)
    variant = Variant(data, quick, allow_partial, unet)
    made = Experiment(
        Order(table, variant, folder, seeds, tuple(sorted(set(epsilons))), tuple(methods), features, place)
    )
    if known is not None:
        made.take_over(known)
    compute_cells(made, jobs, progress)
    findings = Findings(*made.finished(), folder, environment(place) | {"cells at a time": jobs})
    findings.write()
    rich.print(findings.accuracy_table.for_terminal())
    logger.info("report: %s", folder / "report.html")
