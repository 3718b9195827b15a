"""A training step as the work grows: batch, resolution, rank, views, number of adapted layers."""

import pytest
from compare import compare
from scales import scale_of


def pytest_generate_tests(metafunc):
    points = [(axis, timed) for axis in scale_of(metafunc.config).growth for timed in axis.timed()]
    ids = [f"{axis.field}-{getattr(timed.case, axis.field)}-{timed.name}" for axis, timed in points]
    metafunc.parametrize("axis, timed", points, ids=ids)


@pytest.mark.filterwarnings("ignore")  # Opacus's, about hooks
def test_growth(axis, timed, scale, benchmark, results):
    row = compare(timed, scale.rounds, benchmark.pedantic)
    curve = {"curve": axis.name, "field": axis.field, "value": getattr(timed.case, axis.field)}
    results.add("growth", row | curve | {"case": f"{axis.name}: {row['case']}"})
