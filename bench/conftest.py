"""Sizes by `--bench-scale`, a table at the end, and the figures in bench/results/<machine>-<date>.json."""

import datetime
import json
import platform
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
RESULTS = Path(__file__).parent / "results"
_rows: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--bench-scale", choices=("smoke", "cpu"), default="cpu", help="smoke: seconds, writes nothing")


@pytest.fixture(scope="session")
def scale(request) -> str:
    return request.config.getoption("--bench-scale")


@pytest.fixture
def record_row():
    """`record_row(**figures)`: a row of the final table and of the result file."""
    return lambda **figures: _rows.append(figures)


def pytest_terminal_summary(terminalreporter, config):
    if not _rows:
        return
    terminalreporter.section("FastLoDA against plain PyTorch")
    columns = list(dict.fromkeys(key for row in _rows for key in row))
    cells = [columns] + [[_show(row.get(column, "")) for column in columns] for row in _rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths)))
    if config.getoption("--bench-scale") != "smoke":
        terminalreporter.write_line(f"written to {_write()}")


def _show(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write() -> Path:
    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}-cpu"
    machine = f"{device}-{torch.get_num_threads()}threads".lower().replace(" ", "-").replace("_", "-")
    path = RESULTS / f"{machine}-{datetime.date.today()}.json"
    document = {"machine": machine, "torch": torch.__version__, "python": platform.python_version(), "rows": _rows}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
