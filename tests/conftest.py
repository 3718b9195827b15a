"""Options and fixtures that all tests share: `--prove` runs the slow full counts and records their figures."""

import json
import os
import platform
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
# The same cases in every run, so that no change fails by chance; --prove draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other
PROOF_FILE = Path(__file__).parent.parent / "docs" / "results" / "prove.json"
_figures: dict[str, object] = {}


def pytest_addoption(parser):
    parser.addoption("--prove", action="store_true", help="full counts (slow); writes docs/results/prove.json")


def pytest_configure(config):
    if not config.getoption("--prove"):
        hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def counts(request):
    """`counts(small, full)`: how many cases to run, the small share by default, all of them under --prove."""
    return lambda small, full: full if request.config.getoption("--prove") else small


@pytest.fixture
def proof(request):
    """`proof(name, value)`: record a measured figure; kept in docs/results/prove.json under --prove."""
    return lambda name, value: _figures.__setitem__(name, value)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Give the test session a cache of its own, so that no calibrated noise of an earlier session is found."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_sessionfinish(session):
    if session.config.getoption("--prove") and _figures:
        known = json.loads(PROOF_FILE.read_text())["figures"] if PROOF_FILE.exists() else {}
        PROOF_FILE.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "figures": dict(sorted({**known, **_figures}.items())),
        }
        PROOF_FILE.write_text(json.dumps(document, indent=2) + "\n")
