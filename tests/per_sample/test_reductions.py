"""Norms and weighted sums of rows, and the small parts that a private step does once for all parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastloda import GhostClipper, PrivacyError
from fastloda.per_sample.gradient import PerSampleGrad, weighted_sums
from fastloda.per_sample.members import Members
from fastloda.per_sample.reductions import LONG, RUN, row_squares, run_squares, weighted_row_sum
from fastloda.privacy.sums import FlatSums

LENGTHS = st.sampled_from([1, 5, LONG - 1, LONG, LONG + 1, LONG + RUN - 1, 3 * LONG + 7])


@settings(deadline=None)
@given(LENGTHS, st.integers(-40, 36), st.integers(0, 1000))
def test_squares_are_those_of_float64_whatever_the_numbers_size(length, power, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, length, generator=generator, dtype=torch.float64) * 10.0**power
    rows[1] *= torch.rand(length, generator=generator, dtype=torch.float64) < 0.01  # nearly all entries are zero
    rows = rows.float()
    truth = rows.double().square().sum(1)
    assert ((row_squares(rows) - truth).abs() <= 1e-6 * truth).all()
    runs = rows[:, : length // RUN * RUN]
    truth = runs.double().square().unflatten(1, (-1, RUN)).sum(2)
    assert ((run_squares(runs) - truth).abs() <= 1e-6 * truth).all()


def test_gradients_side_by_side_are_summed_as_apart():
    """So are the gradients of a single sample, and those that lie apart or in another order."""
    for samples in (1, 3):
        line, factors = torch.randn(samples, 30), torch.rand(samples)
        kept = [line[:, :10], line[:, 10:18], torch.randn(samples, 5), line[:, 18:29], line[:, :10], line[:, 29:]]
        grads = {str(i): PerSampleGrad(rows.shape[1:], samples, kept=rows) for i, rows in enumerate(kept)}
        for i, total in weighted_sums(grads, factors).items():
            torch.testing.assert_close(total, factors @ kept[int(i)])


def test_rows_that_overflow_or_are_not_finite_do_not_spoil_the_others():
    rows = torch.ones(5, LONG)
    rows[0, 7], rows[1, 7], rows[2, 7], rows[3] = 1e30, torch.nan, torch.inf, 0.0
    squares = row_squares(rows)
    assert squares[0].item() == pytest.approx(1e60)
    assert not squares[1:3].isfinite().any()
    assert squares[3:].tolist() == pytest.approx([0.0, LONG], rel=1e-6)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_weighted_sum_rounds_as_float32_does_at_any_precision_of_products(precision):
    rows, weights = torch.randn(64, 30, 200), torch.rand(64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = weighted_row_sum(rows, weights)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = torch.einsum("n,nij->ij", weights.double(), rows.double())
    assert (found - truth).abs().max() <= 64 * 2.0**-24 * (rows.abs() * weights[:, None, None]).sum(0).max()


def test_a_row_of_weight_zero_may_be_anything():
    rows = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    assert weighted_row_sum(rows, torch.tensor([0.5, 0.0])).tolist() == [0.5, 1.0]
    assert weighted_row_sum(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])).item() == 3.0  # numbers, not rows


def test_members_are_what_the_model_itself_lists():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3)))
    model[2][0].weight = model[0].weight
    model.register_parameter("none", None)
    found = Members.of(model)
    assert found.modules == dict(model.named_modules())
    for mine, theirs in ((found.parameters, model.named_parameters()), (found.buffers, model.named_buffers())):
        assert [(name, id(t)) for name, t in mine.items()] == [(name, id(t)) for name, t in theirs]


def test_flat_sums_keep_shapes_and_precision():
    parameters = {
        "a": nn.Parameter(torch.zeros(2, 3)),
        "half": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        "scalar": nn.Parameter(torch.zeros(())),
        "double": nn.Parameter(torch.zeros(4, dtype=torch.float64)),
    }
    sums = FlatSums(parameters)
    assert {name: t.shape for name, t in sums.by_name.items()} == {name: p.shape for name, p in parameters.items()}
    assert all(t.dtype == torch.float64 for t in sums.by_name.values())
    sums.add_({"a": torch.ones(3, 2).t(), "scalar": torch.tensor(2.0), "half": None})
    sums.add_({"a": torch.ones(2, 3)})
    assert sum(buffer.sum().item() for buffer in sums.buffers.values()) == 14.0
    assert sums.by_name["a"].tolist() == [[2.0] * 3] * 2


def test_a_model_may_be_cast_between_steps():
    model = nn.Linear(3, 1)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    model.bfloat16()
    clipper.reset()
    clipper.accumulate(model(torch.ones(2, 3, dtype=torch.bfloat16)).flatten())
    clipper.privatize(noise_multiplier=1.0, expected_batch_size=2.0)
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_noise_drawn_in_parts_is_of_one_piece(monkeypatch):
    monkeypatch.setattr("fastloda.privacy.noise.AT_A_TIME", 100)
    model = nn.Linear(1000, 1)
    clipper = GhostClipper(model, max_grad_norm=2.0)
    clipper.privatize(noise_multiplier=3.0, expected_batch_size=6.0)
    noise = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert len(noise.unique()) > 990  # in float32 two of 1001 may be equal by chance
    assert noise.std().item() == pytest.approx(1.0, abs=0.15)


def test_a_gradient_of_another_shape_is_refused():
    grad = PerSampleGrad(torch.Size([2, 3]), 4, kept=torch.ones(4, 3, 2))
    with pytest.raises(PrivacyError, match=r"shape \(2, 3\) entered an operation as \(3, 2\)"):
        grad.weighted_sum(torch.ones(4))
