"""The saliency release: a record changes its sum by at most 1, whatever it holds, and it finds the layers that matter.

Results are compared with one float64 backward pass per record.
"""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import losses, small_data, small_model
from torch import Generator, nn
from two_ranks import case_of, two_ranks_of

from fastloda import PrivacyError, attach_loda, compose_epsilon, detach_loda
from fastloda.accounting.compose import PrivacyAccountingWarning
from fastloda.training.saliency import Saliency, release_saliency, vectors

CASES = {}
case = case_of(CASES)
two_ranks = two_ranks_of(__name__)
BITS = 1e-12


def model_of(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def plain_losses(model, batch, generator=None):
    return F.cross_entropy(model(batch[0]) * batch[2], batch[1], reduction="none")


def sums(model, data, *, losses=plain_losses, **options) -> torch.Tensor:
    """Compute the sum over the records, without noise."""
    options = {"records": 1, "noise_multiplier": 0.0, "micro_batch_size": 4, "seed": 0} | options
    found = release_saliency(model, data, losses, **options)
    return options["records"] * torch.tensor(list(found.shares.values()), dtype=torch.float64)


def true_vector(model, record) -> torch.Tensor:
    """Compute the vector of one record by one backward pass."""
    grads = oracle.sample_grads(model, lambda model, x: plain_losses(model, (x, *record[1:])), record[0])[0]
    squares = {}
    for name, grad in grads.items():
        layer = name.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + grad.square().sum()
    vector = torch.stack(list(squares.values())).sqrt()
    return vector / vector.norm() if vector.isfinite().all() and vector.any() else torch.zeros_like(vector)


SIZES = st.sampled_from([0.0, 1e-200, 1e-30, 1e-3, 1.0, 30.0, 1e5, 1e30, 1e150, math.inf, math.nan])
RECORDS = st.lists(st.tuples(st.tuples(SIZES, SIZES, SIZES), st.integers(0, 1), SIZES), min_size=2, max_size=6)


def table(records) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, weights = zip(*records)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=Generator().manual_seed(len(records)))  # noqa: E731
    x = torch.tensor(x, dtype=torch.float64) * (1 + 0.1 * draw(len(records), 3))
    return x, torch.tensor(y), torch.tensor(weights, dtype=torch.float64)[:, None]


@settings(deadline=None, max_examples=20)
@given(RECORDS, st.integers(0, 100), st.data())
def test_no_record_moves_the_sum_by_more_than_1(records, seed, data):
    """Each is added or removed, hostile or not, in any micro-batch; the sum is that of the records' true vectors."""
    model, everything = model_of(seed), table(records)
    removed = data.draw(st.integers(0, len(records) - 1))
    rest = [i for i in range(len(records)) if i != removed]
    units = len(records)
    total = sums(model, everything, records=units)
    without = sums(model, tuple(t[rest] for t in everything), records=units)
    assert total.isfinite().all()
    assert (total - without).norm() <= 1 + BITS
    own = true_vector(model, [t[[removed]] for t in everything])
    assert own.norm() <= 1 + BITS
    torch.testing.assert_close(total - without, own, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(RECORDS, st.data())
def test_no_owner_moves_the_sum_by_more_than_1(records, data):
    """The owner has all of its records removed."""
    owners = [data.draw(st.integers(0, 2)) for _ in records]
    gone = owners[0]
    rest = [i for i, owner in enumerate(owners) if owner != gone]
    if not rest:
        return
    everything = table(records)
    options = {"records": 2, "per_owner": 4}
    total = sums(model_of(), everything, owners=owners, **options)
    without = sums(model_of(), tuple(t[rest] for t in everything), owners=[owners[i] for i in rest], **options)
    assert (total - without).norm() <= 1 + BITS
    own = torch.stack(
        [true_vector(model_of(), [t[[i]] for t in everything]) for i in range(len(records)) if i not in rest]
    )
    if len(own) <= 4:
        torch.testing.assert_close(total - without, own.mean(0), rtol=1e-6, atol=1e-6)


@given(
    st.lists(
        st.lists(st.one_of(st.floats(min_value=0), st.just(math.nan)), min_size=3, max_size=3), min_size=1, max_size=5
    )
)
def test_vectors_have_norm_1_or_are_zero(norms):
    norms = torch.tensor(norms, dtype=torch.float64).T
    found = vectors(norms)
    lengths = found.norm(dim=1)
    usable = norms.isfinite().all(0) & (norms > 0).any(0)
    assert found.isfinite().all() and not found[~usable].any() and (found >= 0).all()
    torch.testing.assert_close(lengths[usable], torch.ones_like(lengths[usable]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("views", [1, 3])
def test_views_are_one_record(views):
    """Their mean gradient gives one vector; opposite views cancel."""
    model, (x, y, weights) = model_of(), table([((1.0, 2.0, 3.0), 0, 1.0)] * 4)
    sign = torch.tensor([1.0, -1.0, 1.0])[:views].repeat(4)

    def of_views(model, batch, generator):
        expanded = tuple(t.repeat_interleave(views, 0) for t in batch)
        return plain_losses(model, expanded) * sign[: len(expanded[0])]

    total = sums(model, (x, y, weights), records=4, losses=of_views, views=views)
    plain = sums(model, (x, y, weights), records=4)
    torch.testing.assert_close(total, plain)  # one third of the gradient, in the same direction
    assert float(total.norm()) <= 4 + BITS


def test_it_finds_the_layer_that_matters():
    """It does so in spite of much noise, and leaves the model unchanged."""
    model = model_of()
    with torch.no_grad():
        model[4].weight.mul_(1e-3)  # little gradient reaches the layers below
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = (torch.randn(300, 3).double(), torch.randint(2, (300,)), torch.ones(300, 1).double())
    found = release_saliency(
        model, data, plain_losses, records=300, noise_multiplier=15.0, micro_batch_size=100, seed=1
    )
    assert found.best(0.1) == ["4"] and found.best(1.0) == ["0", "2", "4"] and found.release == (1.0, 15.0, 1)
    assert all(torch.equal(before[name], t) and before[name].dtype == t.dtype for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_adapters_stay_where_they_pay():
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    attach_loda(plain, rank=2, targets=nn.Linear)
    data = (torch.randn(40, 3), torch.randint(3, (40,)), torch.ones(40, 1))
    found = release_saliency(plain, data, plain_losses, records=40, noise_multiplier=1.0, seed=0)
    best = found.best(0.5)
    assert len(best) == 2 and sorted(detach_loda(plain, keep=best) + best) == ["0", "2", "4"]


def test_the_noise_is_of_the_stated_size_and_not_that_of_the_run_that_follows():
    model, data = model_of(), table([((1.0, 2.0, 3.0), 0, 1.0)] * 5)
    exact = sums(model, data)
    drawn = torch.stack([sums(model, data, noise_multiplier=7.0, seed=seed) - exact for seed in range(40)])
    assert 5.5 < float(drawn.std()) < 8.5 and abs(float(drawn.mean())) < 2.6
    unseeded = [sums(model, data, noise_multiplier=7.0, seed=None) for _ in range(2)]
    assert not torch.equal(*unseeded)
    assert not torch.equal(*(sums(model, data, noise_multiplier=7.0, seed=None, secure_noise=True) for _ in range(2)))
    assert torch.equal(*(sums(model, data, noise_multiplier=7.0, seed=3) for _ in range(2)))


def test_records_that_mix_are_refused():
    """They mix through values without a gradient, which no vector shows."""

    def mixed(model, batch, generator):
        x = batch[0] - batch[0].mean(0)
        return plain_losses(model, (x, *batch[1:]))

    data = (torch.randn(12, 3).double(), torch.randint(2, (12,)), torch.ones(12, 1).double())
    with pytest.raises(PrivacyError, match="depend on other records"):
        sums(model_of(), data, losses=mixed, micro_batch_size=12)


class Remembers(nn.Module):
    """A model that keeps a statistic of its inputs."""

    def __init__(self):
        super().__init__()
        self.inner = model_of()
        self.register_buffer("seen", torch.zeros(3).double())

    def forward(self, x):
        with torch.no_grad():
            self.seen.copy_(x.mean(0))
        return self.inner(x)


def test_a_model_that_records_would_change_is_refused():
    with pytest.raises(PrivacyError, match="seen"):
        sums(Remembers(), table([((1.0, 2.0, 3.0), 0, 1.0)] * 5))


def test_few_records_can_stand_for_all():
    """The sum is over a Poisson sample, and the mean is that sum over the expected number."""
    model, data = small_model(), small_data(60)
    options = {"records": 60, "noise_multiplier": 1e-6, "micro_batch_size": 5, "seed": 2}
    full, part = (release_saliency(model, data, losses, sample_rate=q, **options) for q in (1.0, 0.5))
    assert part.release == (0.5, 1e-6, 1)
    with pytest.warns(PrivacyAccountingWarning, match="no tight bound"):  # because there is next to no noise
        assert math.isfinite(compose_epsilon([part.release], 1e-5))
    assert 0.4 < sum(part.shares.values()) / sum(full.shares.values()) < 1.7


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match="share must be"):
        Saliency({"a": 1.0}, (1.0, 1.0, 1)).best(share)


@case
def noisy(rank, folder):
    torch.manual_seed(rank)  # the adapters differ until rank 0's are copied
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = table([((1.0, 2.0, 3.0), 0, 1.0), ((2.0, 0.5, 3.0), 1, 1.0), ((1.0, -2.0, 0.3), 1, 1.0)] * 4)
    return [sums(model, data, noise_multiplier=noise, seed=None) for noise in (0.0, 3.0)], model.state_dict()


def test_ranks_release_one_sum_together(two_ranks):
    ((exact, noisy), state), ((other_exact, other_noisy), _) = two_ranks("noisy")
    assert torch.equal(exact, other_exact) and torch.equal(noisy, other_noisy)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.load_state_dict(state)
    data = table([((1.0, 2.0, 3.0), 0, 1.0), ((2.0, 0.5, 3.0), 1, 1.0), ((1.0, -2.0, 0.3), 1, 1.0)] * 4)
    torch.testing.assert_close(sums(model, data), exact)
