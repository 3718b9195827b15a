"""The bench's options, fixtures and final tables; the figures go to bench/results/<machine>-<date>.json."""

import io
import sys
import time
from pathlib import Path

import pytest
from pytest import StashKey
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

import machine  # noqa: E402
import tables  # noqa: E402
from providers import PROVIDERS  # noqa: E402
from results_file import Results  # noqa: E402
from scales import SCALES, Scale, scale_of  # noqa: E402

RESULTS = StashKey[Results]()
STARTED = time.monotonic()


def pytest_addoption(parser):
    default = "gpu" if machine.CUDA else "cpu"
    parser.addoption("--bench-scale", choices=SCALES, default=default, help="sizes; smoke: seconds, writes nothing")
    parser.addoption("--bench-budget", type=float, help="seconds after which no further case is started")


def pytest_configure(config):
    config.stash[RESULTS] = Results.at_scale(config.getoption("--bench-scale"))


@pytest.fixture(scope="session")
def scale(request) -> Scale:
    return scale_of(request.config)


@pytest.fixture(scope="session")
def results(request) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def peaks(request, results) -> machine.Peaks:
    """Measure the limits of this device, once."""
    found = machine.measure_peaks(quick=request.config.getoption("--bench-scale") == "smoke")
    results.set_peaks(found)
    return found


@pytest.fixture(autouse=True)
def _budget(request):
    budget = request.config.getoption("--bench-budget")
    if budget is not None and time.monotonic() - STARTED > budget:
        pytest.skip(f"the budget of {budget:g} s is spent")


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    for module in sorted({provider.needs for provider in PROVIDERS.values() if not provider.installed}):
        names = ", ".join(name for name, provider in PROVIDERS.items() if provider.needs == module)
        terminalreporter.write_line(f"left out, for there is no module {module}: {names}")
    if not results.measured:
        return
    screen = io.StringIO()
    console = Console(file=screen, width=max(180, terminalreporter._tw.fullwidth))
    for table in tables.tables(results.document):
        console.print(table.for_terminal())
    terminalreporter.section("FastLoDA beside the others")
    terminalreporter.write(screen.getvalue())
    if results.path is not None:
        terminalreporter.write_line(f"written to bench/results/{results.path.name}")
