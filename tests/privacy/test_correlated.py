"""Correlated noise against its matrices: what is added, what one record changes, what is accounted, and how runs resume."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import RUN, SETTINGS, assert_same_run, trainer
from strategy import Given, strategy
from torch import nn

from fastloda import GhostClipper, PrivacyAccountant, PrivacyError, PrivateTraining, compose_epsilon
from fastloda.accounting.mechanism import Mechanism
from fastloda.accounting.rdp import rdp_epsilon
from fastloda.privacy.correlated import CorrelatedNoise, square_root
from fastloda.synthesis.budget import Privacy, privacy_statement
from fastloda.training.checkpoint import CheckpointError
from fastloda.training.sampling import cyclic_sample, draw_turns

CORRELATED = dataclasses.replace(SETTINGS, bands=4)


def small_model() -> nn.Module:
    return nn.Linear(3, 2, bias=False)


def noise_added(bands: int, steps: int, forget_at: int | None = None) -> torch.Tensor:
    """Compute the matrix [steps, steps] that turns independent noise into what a clipper adds."""
    clipper = GhostClipper(nn.Linear(steps, 1, bias=False), max_grad_norm=2.0, bands=bands)
    rows, noise = [], Given(torch.eye(steps, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such noise looks wrong on purpose
        for step in range(steps):
            if step == forget_at:
                clipper.noise.forget()
            clipper.privatize(noise_multiplier=0.5, expected_batch_size=4.0, generator=noise)
            rows.append(clipper.model.weight.grad.flatten().double() * 4)
    return torch.stack(rows)


@settings(max_examples=20, deadline=None)
@given(bands=st.integers(1, 7), steps=st.integers(1, 12))
def test_the_noise_of_a_step_solves_the_strategy(bands, steps):
    added = noise_added(bands, steps)
    assert torch.allclose(strategy(bands, steps) @ added, torch.eye(steps, dtype=torch.float64), atol=1e-6)


def test_the_strategy_is_the_banded_square_root_of_prefix_sums():
    full = torch.tensor(square_root(30), dtype=torch.float64)
    full /= full[0].clone()
    c = sum(x * torch.diag(torch.ones(30 - k, dtype=torch.float64), -k) for k, x in enumerate(full.tolist()))
    assert torch.allclose(c @ c, torch.ones(30, 30, dtype=torch.float64).tril(), atol=1e-12)
    assert square_root(1) == [1.0]
    for bands in (2, 5, 50):
        assert math.hypot(*square_root(bands)) == pytest.approx(1, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bands=st.integers(1, 6), steps=st.integers(1, 20))
def test_one_record_moves_the_released_sums_as_it_moves_independent_ones(data, bands, steps):
    """Its contributions are within the bound, at any of its steps, before and after the noise begins again."""
    forget_at = data.draw(st.none() | st.integers(0, steps - 1))
    added = noise_added(bands, steps, forget_at)
    first = data.draw(st.integers(0, bands - 1))
    mine = range(first, steps, bands)
    gradients = torch.zeros(steps, 4, dtype=torch.float64)
    for step in mine:
        size = data.draw(st.floats(0, 1))
        direction = torch.randn(4, dtype=torch.float64)
        gradients[step] = size * direction / direction.norm()
    moved = torch.linalg.solve(added, gradients)  # the released sums are added @ (C G + z)
    assert moved.norm() <= math.sqrt(len(mine)) * (1 + 1e-6)
    accountant = PrivacyAccountant(0.1, 1.0, bands=bands)
    assert len(mine) <= accountant.mechanism(steps).steps == math.ceil(steps / bands)


def test_a_record_enters_its_own_steps_only_and_as_often_as_it_should():
    records, bands, steps, rate = 40, 4, 8000, 0.05
    generator = torch.Generator().manual_seed(0)
    turns = draw_turns(records, bands, generator)
    seen = torch.zeros(steps, records)
    for step in range(steps):
        seen[step, cyclic_sample(turns, rate, step, bands, generator)] = 1
    may = torch.arange(steps)[:, None] % bands == turns
    assert not seen[~may].any()
    deviation = math.sqrt(rate * bands * (1 - rate * bands) / (steps / bands))
    assert (seen.view(steps, records).sum(0) * bands / steps - rate * bands).abs().max() < 5 * deviation
    pairs = torch.corrcoef(seen[::bands].T[turns == 0])  # records of one group are drawn independently
    assert (pairs - torch.eye(len(pairs))).abs().max() < 6 / math.sqrt(steps / bands)


def test_one_record_more_changes_no_other_records_steps():
    """Turns are independent and uniform, so that those of the others are as likely with a record more: adding it is all it does.

    Turns that followed from the records' order would shift all later records by a step.
    """
    drawn = [trainer(dataclasses.replace(CORRELATED, seed=None)).run for _ in range(40)]
    turns = torch.stack([run.turns for run in drawn]).double()
    counts = torch.stack([(turns == turn).double().mean() for turn in range(4)])
    assert (counts - 1 / 4).abs().max() < 5 * math.sqrt(3 / 16 / turns.numel())
    pairs = torch.corrcoef(turns.T)
    assert (pairs - torch.eye(len(pairs))).abs().max() < 6 / math.sqrt(len(drawn))
    for run in drawn[:5]:
        assert (run.turns[run.batch()] == 0).all()


def test_turns_are_kept_for_the_whole_run(tmp_path):
    """They survive a resume, also where secure noise has other secrets by then."""
    for secure in (False, True):
        options = {"settings": dataclasses.replace(CORRELATED, seed=None, secure_noise=secure)}
        first = trainer(**options, checkpoint=tmp_path / f"{secure}.pt")
        first.train_step()
        first.save()
        again = trainer(**options, checkpoint=tmp_path / f"{secure}.pt")
        assert torch.equal(again.run.turns, first.run.turns)
        again.train_step()
        assert (again.run.turns[again.run.batch()] == 2).all()


def test_turns_that_are_drawn_anew_begin_with_a_round_of_their_own(tmp_path):
    """Else a record whose turn came before the interruption could have it again in the round that was paid for once."""
    settings, path = dataclasses.replace(CORRELATED, seed=None), tmp_path / "run.pt"
    trainer(settings, checkpoint=path).train_step()  # killed before it is saved
    path.unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="4 steps may have been released"):
        again = trainer(settings, checkpoint=path)
    assert again.step == 4 and again.run.accountant.mechanism(5).steps == 2


def test_steps_count_by_rounds():
    accountant = PrivacyAccountant(0.2, 1.5, bands=4)
    same = PrivacyAccountant(0.2, 1.5)
    for steps, rounds in ((1, 1), (4, 1), (5, 2), (8, 2), (401, 101)):
        assert accountant.epsilon(1e-5, steps) == same.epsilon(1e-5, rounds)
    assert accountant.mechanism(9) == Mechanism(0.2, 1.5, 3)
    settings = PrivateTraining(**RUN | {"steps": 10}, target_epsilon=5.0, bands=4)
    independent = PrivateTraining(**RUN | {"steps": 3, "sample_rate": 0.8}, target_epsilon=5.0)
    assert settings.noise_multiplier == independent.noise_multiplier
    assert settings.accountant().epsilon(1e-5, 10) <= 5.0
    saved = accountant.state_dict()
    with pytest.raises(ValueError, match="bands=4; this run has .*bands=1"):
        same.load_state_dict(saved)


def sigma(epsilon: float, rate: float, steps: int) -> float:
    low, high = 0.1, 100.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if rdp_epsilon((Mechanism(rate, middle, steps),), 1e-5) > epsilon else (low, middle)
    return high


@pytest.mark.parametrize("rate, steps, bands", [(0.05, 1000, 4), (0.02, 2000, 8), (0.005, 4000, 16)])
def test_prefix_sums_have_less_noise_at_equal_epsilon(rate, steps, bands):
    """The noise in the running sums of all steps, which plain SGD adds up, has a lower root mean square if correlated."""
    prefix = torch.ones(steps, steps, dtype=torch.float64).tril()
    independent = sigma(8.0, rate, steps) * (prefix.norm() / math.sqrt(steps))
    noise = torch.linalg.solve_triangular(strategy(bands, steps).mT, prefix.mT, upper=True).mT
    correlated = sigma(8.0, rate * bands, -(-steps // bands)) * (noise.norm() / math.sqrt(steps))
    assert correlated < independent


def test_a_step_that_is_interrupted_after_its_release_is_charged_and_not_taken_again(monkeypatch, tmp_path):
    """Taken again, it would have half of its noise: its numbers would be solved against themselves."""
    made = trainer(dataclasses.replace(CORRELATED, seed=None), checkpoint=tmp_path / "run.pt")
    made.train_step()
    released = made.clipper.noise.released

    def interrupted():
        released()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(made.clipper.noise, "released", interrupted)
        with (
            pytest.raises(KeyboardInterrupt),
            pytest.warns(UserWarning, match="1 steps were released, and interrupted"),
        ):
            made.train_step()
    assert made.step == 2 and made.clipper.noise.state(made.parameters) == []
    made.train_step()
    assert made.step == 3 and made.run.releases.last == 3


def test_an_account_of_rounds_holds_one_run():
    """A round of one run is none of another: three steps and three steps are two rounds of four, and five in one run too."""
    first, second = (PrivacyAccountant(0.4, 1.0, bands=4) for _ in range(2))
    first.step(3)
    second.step(3)
    state = first.state_dict()
    with pytest.raises(ValueError, match="with bands=4 an account holds one run, and these are two"):
        second.load_state_dict(state)
    assert second.steps == 3
    resumed = PrivacyAccountant(0.4, 1.0, bands=4)
    resumed.load_state_dict(state)
    resumed.step(2)
    for same in (state, resumed.state_dict(), state):
        resumed.load_state_dict(same)
    first.load_state_dict(resumed.state_dict())
    assert resumed.steps == first.steps == 5 and resumed.mechanism(5).steps == 2


def test_a_correlated_run_resumes_bit_for_bit(tmp_path):
    for seed in (None, 3):
        settings, path = dataclasses.replace(CORRELATED, seed=seed), tmp_path / f"{seed}.pt"
        first = trainer(settings, checkpoint=path)
        for _ in range(5):
            first.train_step()
        first.save()
        first.fit()
        again = trainer(settings, checkpoint=path).fit()
        assert_same_run(first, again)
    whole = trainer(dataclasses.replace(CORRELATED, seed=3)).fit()
    assert_same_run(whole, again)


def test_a_resumed_run_goes_on_with_the_noise_of_its_last_steps(tmp_path):
    """Otherwise the steps after a checkpoint would be repeated with other noise."""
    first = trainer(dataclasses.replace(CORRELATED, seed=None), checkpoint=tmp_path / "run.pt")
    for _ in range(3):
        first.train_step()
    first.save()
    first.train_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = trainer(dataclasses.replace(CORRELATED, seed=None), checkpoint=tmp_path / "run.pt")
        second.train_step()
    for name, p in first.parameters.items():
        assert torch.equal(p.grad, second.parameters[name].grad), name


def test_lost_steps_begin_the_noise_anew(tmp_path):
    settings = dataclasses.replace(CORRELATED, seed=None, secure_noise=True)
    first = trainer(settings, checkpoint=tmp_path / "run.pt")
    first.train_step()
    first.save()
    first.train_step()
    with pytest.warns(UserWarning, match="1 steps may have been released"):
        second = trainer(settings, checkpoint=tmp_path / "run.pt")
    assert second.step == 2 and second.clipper.noise.state(second.parameters) == []


def test_bands_belong_to_the_run(tmp_path):
    trainer(CORRELATED, checkpoint=tmp_path / "run.pt").fit()
    with pytest.raises(CheckpointError, match="bands"):
        trainer(SETTINGS, checkpoint=tmp_path / "run.pt")


def test_one_band_is_the_independent_noise_of_before():
    assert_same_run(trainer(SETTINGS).fit(), trainer(dataclasses.replace(SETTINGS, bands=1)).fit())


def test_a_failed_step_leaves_the_noise_where_it_was():
    clipper = GhostClipper(small_model(), 1.0, bands=3)
    clipper.privatize(1.0, 4.0)
    before = clipper.noise.state(clipper.parameters)
    clipper.noise.add(clipper._sums.buffers, 1.0, None)  # drawn, but not released
    after = clipper.noise.state(clipper.parameters)
    assert len(after) == 1 and torch.equal(before[0]["weight"], after[0]["weight"])
    clipper.privatize(0.0, 4.0)  # it releases no noise, and so none of what was drawn
    assert clipper.noise.state(clipper.parameters) == []


def test_a_copy_begins_anew():
    clipper = GhostClipper(small_model(), 1.0, bands=3)
    clipper.privatize(1.0, 4.0)
    noise = copy.deepcopy(clipper).noise
    assert (noise.bands, noise.steps, clipper.noise.steps) == (3, 0, 1)


def test_the_statement_counts_rounds():
    made = trainer(CORRELATED).fit()
    statement = privacy_statement(made, Privacy(10.0, 1e-5, batch_size=12, records=60))
    (own,) = statement["releases"]
    assert (own["sample_rate"], own["noise_multiplier"], own["steps"]) == (0.8, 1.0, 2)
    assert statement["bands"] == 4 and "of one of 4 random groups in turn" in statement["sampler"]
    assert statement["epsilon"] == compose_epsilon([(0.8, 1.0, 2)], 1e-5)


def test_what_cannot_be_is_refused():
    for bands in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="bands"):
            CorrelatedNoise(bands)
        with pytest.raises(ValueError, match="bands"):
            PrivateTraining(**RUN, noise_multiplier=1.0, bands=bands)
    with pytest.raises(ValueError, match="bands=6 a record enters a step with 6 x sample_rate"):
        PrivateTraining(**RUN, noise_multiplier=1.0, bands=6)
    clipper = GhostClipper(small_model(), 1.0, bands=2)
    clipper.privatize(1.0, 4.0)
    clipper.model.double()
    with pytest.raises(PrivacyError, match="moved or cast"):
        clipper.reset()
        clipper.privatize(1.0, 4.0)
