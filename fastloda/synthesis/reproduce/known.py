"""Cells that another run of the same table has computed, so that a long table can be continued on another machine."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from fastloda.errors import UserError
from fastloda.synthesis.runs import Stage, read_json, write_json

from .cells import GRID, RESULT, Cell, picture_file, settings_digest

WHICH = ("method", "epsilon", "seed")  # in results.json, beside the cell's own result


def known_cells(path: Path, table: str) -> dict[tuple, dict]:
    """Read the results.json of a run of the table: (method, epsilon, seed) -> the cell's result, and where it was measured.

    Raises:
        OSError: the file can't be read.
        UserError: it is not such a file, or that of another table.
    """
    found = read_json(path)
    try:
        if found["table"] != table:
            raise UserError(f"{path} has the results of {found['table']}: give those of another run of {table}")
        there = {"environment": found["environment"]}
        known = {tuple(cell[name] for name in WHICH): there | cell for cell in found["measured"]}
        if not all(isinstance(epsilon, float | None) and isinstance(seed, int) for _, epsilon, seed in known):
            raise TypeError("an epsilon or a seed is no number")  # a cell's folder is named after them
        return known
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the results.json of a run of {table}, or is damaged: {error!r}") from error


def take_over(known: Mapping[tuple, dict], stages: Mapping[Cell, Stage], pictures: Path, table: str) -> list[Cell]:
    """Make known cells with the same settings those of this run, with their samples' pictures from a folder; return them.

    A cell that this run has begun or finished is left as it is.
    """
    taken = []
    for cell, stage in stages.items():
        result = known.get((cell.method.name, cell.epsilon, cell.seed), {})
        if result.get("settings_digest") != settings_digest(stage) or stage.folder.exists():
            continue
        with stage.work():
            picture = pictures / picture_file(table, cell.caption)
            if picture.exists():
                shutil.copyfile(picture, stage.folder / GRID)
            write_json(stage.folder / RESULT, {name: value for name, value in result.items() if name not in WHICH})
        taken.append(cell)
    return taken
