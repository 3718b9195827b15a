"""Owners of several records as the unit of privacy: one owner moves the clipped sum by at most max_grad_norm.

Results are compared with one float64 backward pass per owner, of the mean loss over the records that the step used.
"""

import dataclasses
import re
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare
from torch import Generator, nn
from torch.utils.data import Dataset

from fastloda import AdaptiveClipping, DPTrainer, PrivacyError, PrivateTraining
from fastloda.training.checkpoint import CheckpointError
from fastloda.training.owners import OwnerBatches

C, FEATURES = 0.5, 3
SETTINGS = PrivateTraining(
    sample_rate=0.4,
    expected_batch_size=4,
    steps=6,
    noise_multiplier=1.0,
    delta=1e-5,
    max_grad_norm=C,
    per_owner=3,
    micro_batch_size=4,
    learning_rate=1e-2,
    seed=3,
)
EXACT = dataclasses.replace(SETTINGS, sample_rate=1.0, noise_multiplier=0.0, optimizer="sgd", learning_rate=1e-9)


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def small_data(records: int, sizes=(1.0,)) -> tuple[torch.Tensor, torch.Tensor]:
    """Make features and classes."""
    generator = Generator().manual_seed(7)
    y = torch.randint(3, (records,), generator=generator)
    x = torch.randn(records, FEATURES, generator=generator, dtype=torch.float64)
    return x * torch.tensor(sizes).repeat(records)[:records, None], y


def owners_of(counts) -> list[str]:
    """Make owners with these numbers of records, which are not adjacent."""
    ids = [f"p{owner}" for owner, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(ids), generator=Generator().manual_seed(1)).tolist()
    return [ids[i] for i in order]


OWNERS = owners_of([1, 2, 3, 4, 7, 1, 5, 2, 1, 1])


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def plain(model, batch, generator):
    return cross_entropy(model, batch)


def random_losses(model, batch, generator):
    noise = torch.randn(batch[0].shape, generator=generator, dtype=torch.float64)
    return cross_entropy(model, (batch[0] + 0.1 * noise, batch[1]))


def trainer(settings=SETTINGS, losses=plain, owners=OWNERS, data=None, **options) -> DPTrainer:
    data = small_data(len(owners)) if data is None else data
    return DPTrainer(small_model(), data, losses, settings, owners=owners, progress=False, **options)


def sum_of_step(t: DPTrainer) -> dict[str, torch.Tensor]:
    """Take a step without noise; return its clipped sum."""
    t.train_step()
    return {name: p.grad * t.settings.expected_batch_size for name, p in t.parameters.items()}


def vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors.values()])


@contextmanager
def noted():
    """Collect the records of each owner in each micro-batch that enters a sum."""
    used, weights = [], OwnerBatches.weights

    def noting(self, read):
        used.append([owner.records for owner in read])
        return weights(self, read)

    with mock.patch.object(OwnerBatches, "weights", noting):
        yield used


def truth(data, used: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Compute each owner's clipped gradient of the mean loss over the records used, by a backward pass of its own."""
    grads = []
    for records in used:
        of_them = oracle.sample_grads(
            small_model(),
            lambda model, x, of=records: cross_entropy(model, (x, data[1][of])),
            data[0][records],
            len(records),
        )
        grads.append(oracle.clipped_sum(of_them, C))
    return grads


def by_owner(used: list[list[int]], owners) -> dict[str, list[int]]:
    """Find the distinct records of each owner; all records of a row's list must belong to the same owner."""
    found = {}
    for rows in used:
        (owner,) = {owners[record] for record in rows}
        found[owner] = sorted(set(rows))
    assert len(found) == len(used)
    return found


# ---- the sensitivity


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=2, max_size=7),
    per_owner=st.integers(1, 5),
    micro_batch_size=st.sampled_from([1, 2, 3, 64]),
    fixed_shape=st.booleans(),
    views=st.sampled_from([1, 2]),
    sizes=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3]), min_size=1, max_size=5),
)
@example([2, 3], 3, 64, True, 1, [1.0])
def test_an_owner_moves_the_sum_by_its_clipped_mean_gradient(
    counts, per_owner, micro_batch_size, fixed_shape, views, sizes
):
    owners = owners_of(counts)
    data = small_data(len(owners), sizes)
    of_views = lambda *arguments: plain(*arguments).repeat_interleave(views)  # noqa: E731
    change = {"per_owner": per_owner, "micro_batch_size": micro_batch_size, "fixed_shape": fixed_shape, "views": views}
    chosen = dataclasses.replace(EXACT, expected_batch_size=len(counts), **change)
    with noted() as used:
        found = sum_of_step(trainer(chosen, of_views, owners, data))
    owned = by_owner([rows for part in used for rows in part][: len(counts)], owners)
    held = Counter(owners)
    assert {owner: len(records) for owner, records in owned.items()} == {o: min(per_owner, held[o]) for o in held}
    grads = dict(zip(owned, truth(data, list(owned.values()))))
    wanted = {name: sum(g[name] for g in grads.values()) for name in found}
    torch.testing.assert_close(vector(found), vector(wanted), rtol=1e-9, atol=1e-9)

    gone = owners[0]
    others = [i for i, owner in enumerate(owners) if owner != gone]
    without = trainer(chosen, of_views, [owners[i] for i in others], tuple(column[others] for column in data))
    share = vector(found) - vector(sum_of_step(without))
    assert share.norm() <= C * (1 + 1e-5)
    torch.testing.assert_close(share, vector(grads[gone]), rtol=1e-9, atol=1e-9)


def test_a_repeated_record_counts_once_in_the_mean_however_its_rows_are_drawn():
    """There are two records in three rows: a mean over rows would count one of them twice."""
    values = torch.tensor([1.0, 4.0], dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    t = DPTrainer(
        model,
        values[:, None],
        lambda m, x, _: m(x)[:, 0],
        dataclasses.replace(EXACT, expected_batch_size=1, max_grad_norm=100.0),
        owners=[5, 5],
        progress=False,
    )
    torch.testing.assert_close(sum_of_step(t)["weight"], torch.tensor([[2.5]], dtype=torch.float64))


@pytest.mark.parametrize("spoiled", [0, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_record_that_is_not_finite_takes_out_its_owner_alone(spoiled, value):
    """The first owner's records also fill the last micro-batch, where their rows have no weight."""
    owners = owners_of([2, 1, 3, 2, 1])
    data = small_data(len(owners))
    record = next(i for i, owner in enumerate(owners) if owner == (owners[0] if spoiled == 0 else f"p{spoiled}"))
    data[0][record, 0] = value
    with noted() as used:
        found = sum_of_step(trainer(dataclasses.replace(EXACT, expected_batch_size=5), plain, owners, data))
    assert [len(part) for part in used] == [4, 4]
    owned = by_owner([*used[0], used[1][0]], owners)
    del owned[owners[record]]
    wanted = truth(data, list(owned.values()))
    torch.testing.assert_close(vector(found), sum(vector(g) for g in wanted), rtol=1e-9, atol=1e-9)


def test_rows_that_fill_a_micro_batch_do_not_spoil_it():
    """The owner that is not finite fills the micro-batch, but was not drawn."""
    data = small_data(len(OWNERS))
    data[0][[i for i, owner in enumerate(OWNERS) if owner == OWNERS[0]]] = torch.nan
    t = trainer(dataclasses.replace(EXACT, sample_rate=0.5), data=data)
    while 0 in t.run.batch().tolist():
        t.run.secret.key = t.run.secret.digest("another")
    assert t.train_step().nonfinite == 0 and all(p.grad.isfinite().all() for p in t.parameters.values())


# ---- what is drawn


def test_owners_are_drawn_at_the_rate_and_their_records_evenly_anew_each_step():
    steps = 400
    t = trainer(dataclasses.replace(SETTINGS, per_owner=2, steps=steps, micro_batch_size=10))
    assert (t.records, t.units) == (len(OWNERS), 10)
    times, drawn, choices = Counter(), 0, set()
    for _ in range(steps):
        with noted() as used:
            samples = t.train_step().samples
        drawn += samples
        for owner, records in by_owner(used[-1][:samples], OWNERS).items():
            times.update(records)
            choices.update([tuple(records)] if owner == "p4" else [])
    assert binomtest(drawn, steps * 10, SETTINGS.sample_rate).pvalue > 1e-3
    of_largest = [times[i] for i, owner in enumerate(OWNERS) if owner == "p4"]
    assert len(of_largest) == 7 and chisquare(of_largest).pvalue > 1e-3
    assert len(choices) == 21  # every pair of the seven


def test_an_owners_choice_depends_on_no_other_owner():
    chosen, found = dataclasses.replace(EXACT, per_owner=2, micro_batch_size=10), []
    for records in (range(len(OWNERS)), range(5, len(OWNERS))):
        owners, records = [OWNERS[i] for i in records], list(records)
        with noted() as used:
            trainer(chosen, owners=owners, data=tuple(c[records] for c in small_data(len(OWNERS)))).train_step()
        of_owners = by_owner(used[-1][: len(set(owners))], owners)
        found.append({owner: [records[i] for i in chosen] for owner, chosen in of_owners.items()})
    whole, part = found
    untouched = [owner for owner in part if owner not in OWNERS[:5]]
    assert len(untouched) > 2 and all(whole[owner] == part[owner] for owner in untouched)


def test_owners_of_as_many_records_choose_independently():
    owners, alike, steps = ["a"] * 4 + ["b"] * 4, 0, 60
    t = trainer(
        dataclasses.replace(EXACT, per_owner=1, steps=steps, expected_batch_size=2), owners=owners, data=small_data(8)
    )
    for _ in range(steps):
        with noted() as used:
            t.train_step()
        (of_a,), (of_b,) = used[-1][:2]
        alike += of_b - of_a == 4
    assert binomtest(alike, steps, 1 / 4).pvalue > 1e-3


def test_empty_batches_are_noised_and_counted():
    t = trainer(dataclasses.replace(SETTINGS, sample_rate=1e-9, expected_batch_size=1.0))
    before = vector(t.parameters).clone()
    assert t.train_step().samples == 0 and t.step == 1 and (vector(t.parameters) != before).all()


def test_the_bound_follows_owners_not_records():
    """All owners' gradients exceed the bound, so that it grows as much as if each owner had one record."""
    bounds = []
    for owners in (OWNERS, sorted(set(OWNERS))):
        style = AdaptiveClipping(initial=1e-6, learning_rate=0.5)
        t = trainer(dataclasses.replace(EXACT, clipping=style, expected_batch_size=10), owners=owners)
        t.train_step()
        bounds.append(t.clipper.max_grad_norm)
    assert bounds[0] == bounds[1] > 1e-6


# ---- the run


class Rows(Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        return tuple(column[i] for column in self.columns)


def test_micro_batches_padding_and_the_form_of_data_and_ids_do_not_change_the_run():
    numbers = [int(owner[1:]) for owner in OWNERS]
    data = small_data(len(OWNERS))
    runs = [
        trainer(owners=numbers),
        trainer(dataclasses.replace(SETTINGS, micro_batch_size=1), owners=torch.tensor(numbers)),
        trainer(dataclasses.replace(SETTINGS, micro_batch_size=64), owners=np.array(numbers)),
        trainer(dataclasses.replace(SETTINGS, fixed_shape=False), owners=numbers, data=Rows(*data)),
    ]
    first, *others = (vector(t.fit().parameters) for t in runs)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", [3, None])
def test_a_run_resumes_bit_for_bit(tmp_path, seed):
    path, chosen = tmp_path / "run.pt", dataclasses.replace(SETTINGS, seed=seed, per_owner=2)
    first = trainer(chosen, random_losses, checkpoint=path)
    for _ in range(2):
        first.train_step()
    first.save()
    saved = path.read_bytes()
    first.fit()
    path.write_bytes(saved)
    again = trainer(chosen, random_losses, checkpoint=path)
    assert again.step == 2 and torch.equal(vector(again.fit().parameters), vector(first.parameters))


def test_a_run_of_other_owners_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    trainer(checkpoint=path).save()
    swapped = [OWNERS[-1], *OWNERS[1:-1], OWNERS[0]]
    alone = dataclasses.replace(SETTINGS, per_owner=1, expected_batch_size=10)
    assert swapped != OWNERS
    for owners, chosen, said in (
        (swapped, SETTINGS, "owners is 'sha256"),
        (OWNERS, dataclasses.replace(SETTINGS, per_owner=2), "per_owner is 3 there and 2 here"),
        (None, alone, "owners is 'sha256.* there and None here"),
    ):
        with pytest.raises(CheckpointError, match=said):
            trainer(chosen, owners=owners, data=small_data(len(OWNERS)), checkpoint=path)


def test_an_ordinary_runs_checkpoint_is_none_of_owners(tmp_path):
    path, alone = tmp_path / "run.pt", dataclasses.replace(SETTINGS, per_owner=1, expected_batch_size=10)
    trainer(alone, owners=None, data=small_data(len(OWNERS)), checkpoint=path).save()
    with pytest.raises(CheckpointError, match="owners is None there"):
        trainer(alone, checkpoint=path)


# ---- the looks


def mixing_of_all(model, batch, generator):
    out = model(batch[0])
    return F.cross_entropy(out - out.mean(0).detach(), batch[1], reduction="none")


def mixing_of_an_owner(model, batch, generator):
    out = model(batch[0])
    centre = out.view(-1, 3, 3).mean(1).repeat_interleave(3, 0).detach()
    return F.cross_entropy(out - centre, batch[1], reduction="none")


def test_looks_replace_whole_owners():
    """A loss that mixes owners is refused; one that mixes an owner's own records is within the bound."""
    with pytest.raises(PrivacyError, match="depend on other records in the batch"):
        trainer(losses=mixing_of_all).train_step()
    assert trainer(dataclasses.replace(SETTINGS, steps=20), mixing_of_an_owner).fit().step == 20


# ---- what is refused


REFUSED = {
    "too few": (OWNERS[1:], f"each of the {len(OWNERS)} records, got {len(OWNERS) - 1}"),
    "one": (torch.tensor(3), "got a single one"),
    "a string": ("p1", "a list of integers or strings"),
    "numbers": (torch.rand(len(OWNERS)), "all of one kind: got float"),
    "missing ones": ([None, *OWNERS[1:]], "got NoneType and str"),
    "integers among strings": ([1, *OWNERS[1:]], "got int and str"),
    "truth values": ([True] * len(OWNERS), "got bool"),
    "columns": (torch.zeros(len(OWNERS), 2), "got list"),
    "nothing": (7, "a list of integers or strings"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_owners_that_are_none_are_refused_before_anything_changes(kind):
    owners, said = REFUSED[kind]
    model = small_model()
    with pytest.raises(ValueError, match=re.escape(said)):
        DPTrainer(model, small_data(len(OWNERS)), plain, SETTINGS, owners=owners, progress=False)
    assert all(p.grad is None for p in model.parameters())


def test_settings_that_do_not_fit_owners_are_refused():
    data = small_data(len(OWNERS))
    with pytest.raises(ValueError, match="per_owner=3 needs the owners of the records"):
        trainer(owners=None, data=data)
    with pytest.raises(ValueError, match="sample_rate x owners, 0.4 x 10 = 4, got 400"):
        trainer(dataclasses.replace(SETTINGS, expected_batch_size=400))
    with pytest.raises(ValueError, match="per_owner must be an integer >= 1"):
        dataclasses.replace(SETTINGS, per_owner=0)
    with pytest.raises(ValueError, match="shape \\(12,\\) for 12 samples x 1 views"):
        trainer(losses=lambda *arguments: plain(*arguments)[:4])
