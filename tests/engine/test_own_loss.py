"""A module may compute its loss itself, from rows that it returns too; a loss that is no mean over the samples is refused."""

from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from loops import HUGE, assert_same, first_batch, gradients, private, truth, unchanged
from torch import nn

from fastloda import PrivacyError

BOUND = 0.05


class WithLoss(nn.Module):
    """A model that returns (logits, loss), as nanoGPT does, or another `form`; `of` computes the loss of logits, h, labels."""

    def __init__(self, of=None, form=lambda logits, h, loss: (logits, loss)):
        super().__init__()
        self.hidden, self.head, self.of, self.form = nn.Linear(36, 5), nn.Linear(5, 3), of, form
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, y=None):
        h = torch.tanh(self.hidden(x.flatten(1)))
        logits = self.head(h) * self.scale
        return logits if y is None else self.form(logits, h, self.of(logits, h, y))


def plain(logits, h, y):
    return F.cross_entropy(logits, y)


def with_labels_of_its_own(of=plain, **options):
    torch.manual_seed(2)
    return private(WithLoss(of).double(), bound=BOUND, **options)


def expected(inner, x, y):
    """Compute the clipped sum of the gradients of the samples' cross entropies."""
    return oracle.clipped_sum(truth(inner, x, y), BOUND)


FORMS = {
    "tuple": (lambda logits, h, loss: (logits, loss), lambda out: out[1]),
    "object": (lambda logits, h, loss: SimpleNamespace(loss=loss, logits=logits, hidden=[h]), lambda out: out.loss),
    "dict": (lambda logits, h, loss: {"loss": loss, "hidden": h, "logits": logits}, lambda out: out["loss"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_step_is_that_of_the_loss_outside(form, reduction):
    make, loss_of = FORMS[form]
    inner = WithLoss(lambda logits, h, y: F.cross_entropy(logits, y, reduction=reduction), make).double()
    model, optimizer, loader = private(inner, bound=BOUND, loss_reduction=reduction)
    x, y = first_batch(loader)
    wanted = expected(inner, x, y)
    loss = loss_of(model(x, y))
    with torch.no_grad():
        assert loss.item() == F.cross_entropy(inner(x), y, reduction=reduction).item()
    loss.backward()
    assert all(p.grad is None for p in inner.parameters())
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8 if reduction == "mean" else 1)


def test_a_loss_inside_and_a_loss_outside_add_up():
    model, optimizer, loader = private(inner := WithLoss(plain).double(), bound=HUGE)
    x, y = first_batch(loader)
    logits, loss = inner(x, y)
    wanted = torch.autograd.grad(loss / 2 + 0.1 * logits.square().sum(1).mean(), list(inner.parameters()))
    logits, loss = model(x, y)
    (loss / 2 + 0.1 * logits.square().sum(1).mean()).backward()
    optimizer.step()
    scale = len(x) / 8
    assert_same(gradients(inner), {n: g * scale for (n, _), g in zip(inner.named_parameters(), wanted)})


def test_low_precision_rounds_nothing_away():
    torch.manual_seed(2)
    model, optimizer, loader = private(inner := WithLoss(plain).float(), bound=BOUND)
    x, y = first_batch(loader)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x.float(), y)[1]
    loss.backward()
    optimizer.step()
    wanted = torch.cat([g.flatten() for g in expected(inner.double(), x, y).values()]) / 8
    got = torch.cat([g.flatten() for g in gradients(inner).values()])
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_a_sample_that_is_not_finite_stays_alone():
    model, optimizer, loader = with_labels_of_its_own()
    x, y = first_batch(loader)
    inner = model.to_standard_module()
    wanted = expected(inner, x[1:], y[1:])
    x = x.clone()
    x[0] = torch.inf
    model(x, y)[1].backward()
    optimizer.step()
    assert optimizer.stats.nonfinite == 1
    assert_same(gradients(inner), wanted, divisor=8)


def test_a_logit_of_minus_infinity_is_none_of_a_loss():
    """Logits are minus infinity where choices are masked out."""
    mask = torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64)
    form = lambda logits, h, loss: (logits + mask, loss)  # noqa: E731
    inner = WithLoss(plain, form).double()
    model, _, loader = private(inner)
    x, y = first_batch(loader)
    with pytest.raises(PrivacyError, match="not computed of its other outputs alone"):  # but of others before the mask
        model(x, y)[1].backward()

    class Masked(WithLoss):
        def forward(self, x, y):
            logits = WithLoss.forward(self, x) + mask
            return logits, F.cross_entropy(logits, torch.where(y == 1, 0, y))

    model, optimizer, loader = private(inner := Masked().double())
    x, y = first_batch(loader)
    logits, loss = model(x, y)
    assert loss.isfinite() and logits.isinf().any()
    wanted = torch.autograd.grad(inner(x, y)[1] * len(x) / 8, list(inner.parameters()))
    loss.backward()
    optimizer.step()
    assert_same(gradients(inner), {n: g for (n, _), g in zip(inner.named_parameters(), wanted)})


def test_an_empty_batch_has_a_loss():
    model, optimizer, loader = with_labels_of_its_own(noise=1.0, count=3, batch_size=1)
    seen = 0
    for x, y in (batch for _ in range(8) for batch in loader):
        optimizer.zero_grad()
        loss = model(x, y)[1]
        assert len(x) or loss == 0
        loss.backward()
        optimizer.step()
        seen += not len(x)
    assert seen and len(optimizer.accountant) == 24


def contrastive(logits, h, y):
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


def hooked(logits, h, y):
    losses = F.cross_entropy(logits, y, reduction="none")
    losses.register_hook(lambda g: g / g.norm())
    return losses.mean()


def hooked_below(logits, h, y):
    # Only once, so that the step itself sees no hook.
    handles = [logits.register_hook(lambda g: handles.pop().remove() or g / g.norm())]
    return plain(logits, h, y)


REFUSED = {
    "contrastive": (contrastive, "samples mix"),
    "maximum": (lambda logits, h, y: F.cross_entropy(logits, y, reduction="none").max(), "samples mix"),
    "sum": (lambda logits, h, y: F.cross_entropy(logits, y, reduction="sum"), "is a sum over the samples"),
    "ignored": (lambda logits, h, y: F.cross_entropy(logits, y, ignore_index=1), "targets that are not ignored"),
    "of features too": (
        lambda logits, h, y: plain(logits, h, y) + h.square().mean(),
        "not computed of its other outputs",
    ),
    "hook": (hooked, "gradient hook"),
    "hook on the logits": (hooked_below, "gradient hook"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_loss_that_is_no_mean_is_refused_by_its_backward(kind):
    of, match = REFUSED[kind]
    model, optimizer, loader = with_labels_of_its_own(of)
    x, y = first_batch(loader)
    logits, loss = model(x, y)
    unchanged(loss.backward, match, model)
    unchanged(lambda: (loss + logits.mean()).backward(), match, model)
    optimizer.zero_grad()
    F.cross_entropy(logits, y).backward()  # the rows that were returned with it train as ever
    optimizer.step()


def test_rows_below_rows_are_not_counted_twice():
    form = lambda logits, h, loss: (h, logits, loss)  # noqa: E731
    of = lambda logits, h, y: plain(logits, h, y) + h.square().sum(1).mean()  # noqa: E731
    model, _, loader = private(WithLoss(of, form).double())
    x, y = first_batch(loader)
    unchanged(model(x, y)[2].backward, "not computed of its other outputs alone", model)


def test_equally_many_ignored_targets_divide_by_a_constant():
    class Shifted(nn.Module):
        """A causal language model, whose last position predicts nothing."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x, y=None):
            logits = self.head(x.flatten(1, 2))
            labels = torch.cat([torch.ones(len(x), 5).long(), torch.full((len(x), 1), -100)], 1) if y is None else y
            return logits, F.cross_entropy(logits.view(-1, 4), labels.view(-1))

    inner = Shifted().double()
    model, optimizer, loader = private(inner, bound=BOUND)
    x, y = first_batch(loader)
    wanted = oracle.clipped_sum(oracle.sample_grads(inner, lambda m, x: m(x)[1][None], x), BOUND)
    model(x)[1].backward()
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8)
    uneven = torch.zeros(len(x), 6).long()
    uneven[0, 0] = -100
    unchanged(model(x, uneven)[1].backward, "fastloda.CrossEntropyLoss divides by a sample's own", model)


def test_a_divisor_that_trainer_counts_is_left_out():
    """transformers' Trainer gives the model the number of targets in the batch, which depends on all records."""
    seen = []

    class Dividing(WithLoss):
        def forward(self, x, y, num_items_in_batch=None):
            seen.append(num_items_in_batch)
            return WithLoss.forward(self, x, y)

    model, _, loader = private(Dividing(plain).double())
    x, y = first_batch(loader)
    model(x, y, num_items_in_batch=torch.tensor(7))
    assert set(seen) == {None}
