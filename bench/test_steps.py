"""A whole training step by each provider.

The models are a layer, a stack of six, the U-Nets (adapted, and trained in full), a WideResNet, and a Transformer's encoder.

Nothing here fails on time; a wrong gradient fails.
"""

import pytest
from compare import compare
from scales import scale_of


def pytest_generate_tests(metafunc):
    metafunc.parametrize("timed", scale_of(metafunc.config).steps, ids=lambda timed: timed.name)


@pytest.mark.filterwarnings("ignore")  # Opacus's, about hooks
def test_step(timed, scale, benchmark, results):
    results.add("steps", compare(timed, scale.rounds, benchmark.pedantic))
