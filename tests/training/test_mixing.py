"""DPTrainer looks whether records change each other's losses or gradients, and trains as if it had not looked."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, nn

from fastloda import DPTrainer, PrivacyError, PrivateTraining, attach_loda
from fastloda.randomness import Secret
from fastloda.training import mixing
from fastloda.training.looks import Looks

SETTINGS = PrivateTraining(
    sample_rate=0.4,
    expected_batch_size=16,
    steps=6,
    noise_multiplier=1.0,
    delta=1e-5,
    micro_batch_size=7,
    learning_rate=1e-2,
    seed=3,
)
RECORDS = 40


def small_model(dropout: float = 0.0, buffer: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Dropout(dropout), nn.Linear(8, 3))
        if buffer:
            model.register_buffer("constant", torch.ones(3))
        return model


def small_data():
    generator = Generator().manual_seed(7)
    y = torch.randint(3, (RECORDS,), generator=generator)
    return torch.randn(RECORDS, 6, generator=generator) + y[:, None], y


def trainer(losses, change=(), model=None, data=None) -> DPTrainer:
    return DPTrainer(
        model or small_model(),
        data or small_data(),
        losses,
        dataclasses.replace(SETTINGS, **dict(change)),
        progress=False,
    )


def cross_entropy(out, y):
    return F.cross_entropy(out, y, reduction="none")


# ---- what is refused


def views_first(model, batch, generator):
    """Return the views' losses one view after the other; each record's should be adjacent."""
    return torch.cat([cross_entropy(model(batch[0] + i), batch[1]) for i in range(2)])


def batch_statistic(model, batch, generator):
    out = model(batch[0])
    return cross_entropy(out - out.mean(0).detach(), batch[1])


def quantised_by_the_batch(model, batch, generator):
    x = batch[0]
    scale = (x.max() - x.min()) / 255
    return cross_entropy(model((x / scale).round() * scale), batch[1])


def standardised_targets(model, batch, generator):
    y = batch[1].float()
    return (model(batch[0])[:, 0] - (y - y.mean()) / (y.std() + 1e-3)) ** 2


def mixup(model, batch, generator):
    return cross_entropy(model(0.7 * batch[0] + 0.3 * batch[0].roll(1, 0)), batch[1])


def shuffled_targets(model, batch, generator):
    order = torch.randperm(len(batch[1]), generator=generator)
    return cross_entropy(model(batch[0]), batch[1][order])


def weighted_by_class(model, batch, generator):
    counts = torch.bincount(batch[1], minlength=3).clamp(min=1)
    return cross_entropy(model(batch[0]), batch[1]) / counts[batch[1]]


def first_as_reference(model, batch, generator):
    return (model(batch[0]) - model(batch[0][:1]).detach()).square().mean(1)


def largest_scaled(model, batch, generator):
    losses = cross_entropy(model(batch[0]), batch[1])
    return losses / losses.detach().max()


MIXING = {
    "views first": (views_first, {"views": 2}),
    "batch statistic": (batch_statistic, {}),
    "quantiser": (quantised_by_the_batch, {}),
    "targets": (standardised_targets, {}),
    "mixup": (mixup, {}),
    "shuffled": (shuffled_targets, {}),
    "class counts": (weighted_by_class, {}),
    "reference": (first_as_reference, {}),
    "scaled": (largest_scaled, {}),
}


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("kind", MIXING)
def test_records_that_change_each_others_losses_are_refused(kind, fixed):
    losses, change = MIXING[kind]
    for size in (2, 7, 64):
        t = trainer(losses, {"fixed_shape": fixed, "micro_batch_size": size} | change)
        before = [p.detach().clone() for p in t.parameters.values()]
        with pytest.raises(PrivacyError, match="depend on other records in the batch"):
            t.train_step()
        assert t.step == 0 and all(map(torch.equal, before, t.parameters.values()))


@pytest.mark.parametrize("kind", ["batch statistic", "targets", "scaled"])
def test_a_mixing_that_begins_later_is_refused_at_a_later_look(kind):
    """The weight of a term is zero at first. Steps 4, 16 and 64 are looked at, and some between them."""
    losses, _ = MIXING[kind]

    def begins(model, batch, generator):
        mixed, plain = losses(model, batch, generator), cross_entropy(model(batch[0]), batch[1])
        return plain if t.step < 4 else plain + 0.1 * mixed

    t = trainer(begins, {"steps": 100})
    with pytest.raises(PrivacyError, match="depend on other records"):
        t.fit()
    assert 4 <= t.step < 64


# ---- what shows in the gradients alone


def behind_a_constant(model, batch, generator):
    return 1e6 + cross_entropy(model(batch[0]), batch[1]) * batch[0].mean()


def surrogate(model, batch, generator):
    """Weight the losses by a batch statistic, in a term that does not change their value."""
    losses = cross_entropy(model(batch[0]), batch[1])
    return losses + (losses - losses.detach()) * losses.detach().mean()


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.clone()

    @staticmethod
    def backward(ctx, gy):
        return gy * ctx.saved_tensors[0], None


def scaled_backward(model, batch, generator):
    return cross_entropy(Scaled.apply(model(batch[0]), batch[0].abs().mean()), batch[1])


def scaling_hook(model, batch, generator):
    out, scale = model(batch[0]), batch[0].abs().mean()
    out.register_hook(lambda gy: gy * scale)
    return cross_entropy(out, batch[1])


@pytest.mark.parametrize("losses", [behind_a_constant, surrogate, scaled_backward, scaling_hook])
def test_records_that_change_each_others_gradients_alone_are_refused(losses):
    t = trainer(losses)
    with pytest.raises(PrivacyError, match="gradients of records depend on other records"):
        t.train_step()
    assert t.step == 0 and all(p.grad is None for p in t.parameters.values())


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(2, 9),
    constant=st.sampled_from([0.0, 1e4, 1e7]),
    strength=st.floats(0.05, 10.0),
    source=st.sampled_from(["mean", "max", "neighbour"]),
    number=st.integers(0, 10**6),
)
def test_looks_see_any_such_gradient(samples, constant, strength, source, number):
    generator = Generator().manual_seed(number)
    values, leaf = torch.rand(40, generator=generator) + 0.5, torch.ones((), requires_grad=True)
    of = {"mean": lambda v: v.mean(), "max": lambda v: v.max(), "neighbour": lambda v: v.roll(1, 0)}[source]

    def losses(read, mixes):
        own = values[read] * leaf
        return constant + own.detach() + (own - own.detach()) * (1 + (strength * of(values[read]) if mixes else 0))

    with pytest.raises(PrivacyError, match="gradients of records depend on other records"):
        for seed in range(10):
            looked_at(lambda read: losses(read, True), samples, leaf, seed)
    looked_at(lambda read: losses(read, False), samples, leaf)


# ---- places in the batch


def by_place(model, batch, generator):
    return cross_entropy(model(batch[0]), batch[1]) * torch.linspace(0.5, 2.0, len(batch[1]))


def half_turned(model, batch, generator):
    """Apply the usual augmentation to the first half of each batch."""
    x = batch[0].clone()
    x[: len(x) // 2] = x[: len(x) // 2].flip(1)
    return cross_entropy(model(x), batch[1])


def every_other_turned(model, batch, generator):
    """Turn every other record: removing one record turns all after it, 6.9 times the bound."""
    x = batch[0].clone()
    x[::2] = x[::2].flip(1)
    return cross_entropy(model(x), batch[1])


def divided(model, batch, generator):
    return cross_entropy(model(batch[0]), batch[1]) / len(batch[1])


@pytest.mark.parametrize("losses", [by_place, half_turned, every_other_turned, divided])
def test_losses_that_follow_the_place_or_the_number_of_records_are_refused(losses):
    """Adding one record changes those after it."""
    t = trainer(losses, {"fixed_shape": False, "micro_batch_size": 40})
    with pytest.raises(PrivacyError, match="places in the batch, or on its size"):
        t.train_step()
    assert t.step == 0


def divided_and_drawn(model, batch, generator):
    return cross_entropy(model(batch[0] + 0.1 * torch.randn(batch[0].shape, generator=generator)), batch[1]) / len(
        batch[1]
    )


@pytest.mark.parametrize("micro_batch_size", [40, 3])
def test_a_division_by_the_batchs_size_is_refused_where_random_numbers_are_drawn_too(micro_batch_size):
    """Adding one record makes all others' gradients smaller: 1.9 times the bound."""
    t = trainer(divided_and_drawn, {"fixed_shape": False, "micro_batch_size": micro_batch_size})
    with pytest.raises(PrivacyError, match="follows how many there"):
        t.fit()
    assert t.step <= 3  # it is refused as soon as the size has changed


def test_a_schedule_of_weights_is_no_division_by_the_batchs_size():
    made = []

    def losses(model, batch, generator):
        return cross_entropy(model(batch[0]), batch[1]) * 0.9 ** (made[0].step if made else 0) / 8

    made.append(trainer(losses, {"fixed_shape": False, "micro_batch_size": 40}))
    made[0].fit()
    assert made[0].step == made[0].last_step


def test_a_division_by_a_fixed_size_is_none_by_the_records():
    assert trainer(divided).fit().step == SETTINGS.steps


# ---- what one record alone brings about


def skipping(model, batch, generator):
    losses = cross_entropy(model(batch[0]), batch[1])
    return losses if losses.isfinite().all() else losses.nan_to_num(0, 0, 0) * 0


def capped(model, batch, generator):
    losses = cross_entropy(model(batch[0]), batch[1])
    return losses * (100 / losses.detach().amax()).clamp(max=1)


def hiding(model, batch, generator):
    """Halve the losses if one of them is not finite, without hiding that one."""
    losses = cross_entropy(model(batch[0]), batch[1])
    return losses * (0.5 if losses.isnan().any() else 1.0)


@pytest.mark.parametrize("losses", [skipping, capped, hiding])
def test_a_batch_that_one_bad_record_changes_is_looked_at_when_it_comes(losses, monkeypatch):
    """This is at step 6, between two scheduled looks; record 5 is in no earlier batch."""
    x, y = small_data()
    x[5] = torch.nan if losses is not capped else 1e4
    batches = iter([[1, 2, 3, 4, 6]] * 5 + [[1, 2, 3, 4, 5, 6]] * 9)
    monkeypatch.setattr("fastloda.training.run_state.cyclic_sample", lambda *_: torch.tensor(next(batches)))
    monkeypatch.setattr(Looks, "_others", lambda self, chosen, name: (chosen + 11) % 40)
    monkeypatch.setattr("fastloda.training.looks.is_due", lambda step, _: step in (1, 2, 4))
    t = trainer(losses, {"steps": 12, "fixed_shape": False}, data=(x, y))
    with pytest.raises(PrivacyError, match="skipped or rescaled for one of its records"):
        t.fit()
    assert t.step == 5
    honest = iter([[1, 2, 3, 4, 6]] * 5 + [[1, 2, 3, 4, 5, 6]] * 9)
    monkeypatch.setattr("fastloda.training.run_state.cyclic_sample", lambda *_: torch.tensor(next(honest)))
    plain = lambda model, batch, generator: cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    assert trainer(plain, {"steps": 12, "fixed_shape": False}, data=(x, y)).fit().step == 12


def test_a_batch_of_one_record_is_looked_at_with_a_partner(monkeypatch):
    monkeypatch.setattr("fastloda.training.run_state.cyclic_sample", lambda *_: torch.tensor([4]))
    data = small_data()
    t = trainer(
        batch_statistic, {"sample_rate": 1 / RECORDS, "expected_batch_size": 1, "fixed_shape": False}, data=data
    )
    with pytest.raises(PrivacyError, match="depend on other records"):
        t.train_step()
    alone = trainer(batch_statistic, {"micro_batch_size": 1})  # no record is ever beside another
    assert alone.fit().step == SETTINGS.steps


def looked_at(losses, samples, leaf=None, seed=0):
    """Look at the losses of records 0, 1, ..., by both halves and another order; `leaf` is the parameter that trains."""
    secret = Secret.of_seed(seed)
    parts = mixing.halves(samples, True, secret, "look")
    others = (20 + torch.randperm(20, generator=secret.generator("others"))).tolist()
    replaced = [(part, others[: int(part.sum())]) for part in parts]
    order = mixing.places(samples, bool(samples % 2), secret, "look")
    parameters = [] if leaf is None else [leaf]

    def evaluate(read, choices):
        return mixing.evaluated(losses(read), choices, parameters, lambda: False)

    return mixing.look(evaluate, list(range(samples)), replaced, order, steady=True)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(2, 9),
    views=st.integers(1, 3),
    strength=st.floats(1e-3, 10.0),
    source=st.sampled_from(["mean", "max", "first", "neighbour", "sorted"]),
    number=st.integers(0, 10**6),
)
def test_looks_see_any_such_dependence(samples, views, strength, source, number):
    generator = Generator().manual_seed(number)
    values = torch.rand(40, views, generator=generator) + 0.5
    others = {
        "mean": lambda v: v.mean(),
        "max": lambda v: v.max(),
        "first": lambda v: v[:1],
        "neighbour": lambda v: v.roll(1, 0),
        "sorted": lambda v: v.sort(0).values,
    }[source]

    def look(losses, seed=0):
        return looked_at(lambda read: losses(values[read]).flatten(), samples, seed=seed)

    with pytest.raises(PrivacyError, match="depend on other records"):
        for seed in range(10):  # a single look may replace records by others in the same order
            look(lambda v: v + strength * others(v), seed)
    assert torch.equal(
        look(lambda v: v + strength * v.square()), (values + strength * values.square())[:samples].flatten()
    )


def test_what_cannot_be_looked_at_is_refused_with_a_way_out():
    own, called = Generator().manual_seed(0), []

    def draws_elsewhere(model, batch, generator):
        return cross_entropy(model(batch[0] + torch.randn(batch[0].shape, generator=own)), batch[1])

    def remembers(model, batch, generator):
        losses = cross_entropy(model(batch[0]), batch[1])
        called.append(losses.detach().mean())
        return losses / called[-2] if len(called) > 1 else losses

    for losses in (draws_elsewhere, remembers):
        t = trainer(losses)
        with pytest.raises(PrivacyError, match="source of its own, or keeps something"):
            t.train_step()
        assert t.step == 0

    def differs_in_training(model, batch, generator):  # 1 call at the start, 4 for a look, then the step's
        called.append(None)
        return cross_entropy(model(batch[0]), batch[1]) * (2.0 if len(called) == 6 else 1.0)

    called.clear()
    with pytest.raises(PrivacyError, match="keeps something"):
        trainer(differs_in_training).train_step()

    def by_the_step(model, batch, generator):
        return cross_entropy(model(batch[0] + torch.randn(batch[0].shape, generator=generator)), batch[1]) * (
            1 + t.step
        )

    t = trainer(by_the_step)
    assert t.fit().step == SETTINGS.steps


# ---- what is not


def drawing(model, batch, generator):
    """Draw from every generator that losses may use."""
    x = batch[0] + 0.1 * torch.randn(batch[0].shape, generator=generator) + 0.1 * torch.rand(len(batch[0]), 1)
    return cross_entropy(model(x + float(np.random.rand()) + random.random()), batch[1])


def in_views(model, batch, generator):
    x = batch[0].repeat_interleave(3, 0)
    return cross_entropy(model(x + torch.randn(x.shape, generator=generator)), batch[1].repeat_interleave(3))


def view_by_view(model, batch, generator):
    """Run a forward pass for each view."""
    noisy = [batch[0] + torch.randn(batch[0].shape, generator=generator) for _ in range(3)]
    return torch.stack([cross_entropy(model(x), batch[1]) for x in noisy], 1).flatten()


def in_low_precision(model, batch, generator):
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model(batch[0]), batch[1])


def overflowing(model, batch, generator):
    return cross_entropy(model(batch[0]), batch[1]) * torch.where(batch[0][:, 0] > 0.5, torch.nan, 1.0)


HONEST = {
    "draws": (drawing, {}, {"dropout": 0.5}),
    "views": (in_views, {"views": 3}, {}),
    "views of short batches": (
        in_views,
        {"views": 3, "fixed_shape": False, "sample_rate": 0.05, "expected_batch_size": 2},
        {},
    ),
    "view by view, of lone records": (
        view_by_view,
        {"views": 3, "fixed_shape": False, "sample_rate": 0.05, "expected_batch_size": 2, "steps": 20},
        {},
    ),
    "low precision": (in_low_precision, {}, {}),
    "buffers": (drawing, {}, {"buffer": True}),
    "not finite": (overflowing, {}, {}),
    "empty": (drawing, {"sample_rate": 1e-6}, {}),
    "no seed": (drawing, {"seed": None}, {}),
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_losses_train_as_if_nobody_looked(kind, monkeypatch):
    losses, change, model = HONEST[kind]
    runs, batches = [], []
    for watched in (True, False):
        if not watched:
            monkeypatch.setattr(Looks, "look", lambda *_: None)
            monkeypatch.setattr(DPTrainer, "_try_losses", lambda _: None)
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        t = trainer(losses, {"steps": 9} | change, model=small_model(**model))
        if runs:
            t.run.secret.key = runs[0].run.secret.key
            t.run.generators["losses"] = t.run._losses_stream("")
        runs.append(t)
        t.fit()
        batches.append((torch.rand(3), np.random.rand(), random.random()))
    for name, p in runs[0].parameters.items():
        assert torch.equal(p, runs[1].parameters[name]), name
    assert torch.equal(batches[0][0], batches[1][0]) and batches[0][1:] == batches[1][1:]


def test_adapters_and_a_compiled_model_train(monkeypatch):
    import fastloda

    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    attach_loda(model, rank=1)
    x, y = torch.randn(RECORDS, 1, 6, 6), small_data()[1]
    t = trainer(lambda m, b, g: cross_entropy(m(b[0]), b[1]), {"steps": 2}, model=model, data=(x, y))
    assert t.fit().step == 2
    assert fastloda.compile  # tests/loda/test_compile.py trains compiled ones


def test_the_schedule_is_public_and_thin():
    secret = Secret()
    due = [step for step in range(1, 4097) if mixing.is_due(step, secret)]
    assert {4**k for k in range(7)} <= set(due) and len(due) <= 2 * 7
    assert due != [step for step in range(1, 4097) if mixing.is_due(step, Secret())]
    calls = []

    def counted(model, batch, generator):
        calls.append(len(batch[0]))
        return cross_entropy(model(batch[0]), batch[1])

    t = trainer(counted, {"steps": 64, "micro_batch_size": 40, "sample_rate": 0.9, "expected_batch_size": 36})
    t.fit()
    looks = sum(mixing.is_due(step, t.run.secret) for step in range(1, 65))
    # one call at the start; one for each step; at looks one half, at 1, 4 and 64 the other one too; other places at 1 and 16
    assert len(calls) == 1 + 64 + 2 * looks + 3 + 2


def test_kernels_that_add_up_in_varying_order_are_not_refused():
    """The rounding differs from call to call, as with atomic additions on a GPU."""
    torch.manual_seed(0)
    values = torch.rand(40, dtype=torch.float64) + 1

    def shaky(read):
        return values[read] * (1 + 3e-5 * torch.rand(len(read)).double())

    for _ in range(20):
        looked_at(shaky, 8)
