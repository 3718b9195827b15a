"""A small data set, a network, a private training loop around them, and its true gradients."""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloda import PrivacyError
from fastloda.engine.engine import PrivacyEngine

DELTA = 1e-5


HUGE = 1e9  # a clipping norm that nothing reaches


class Net(nn.Module):
    """A classifier whose flatten fails on an empty batch."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width * 16, 3)

    def forward(self, x):
        x = F.silu(self.conv(x))
        return self.head(x.view(x.size(0), -1))


class Several(nn.Module):
    """A network of two inputs whose output is a dict with two outputs that have gradients and one that has none."""

    def __init__(self):
        super().__init__()
        self.image, self.time = nn.Linear(36, 5), nn.Linear(1, 5)

    def forward(self, x, *, t):
        h = torch.tanh(self.image(x.flatten(1)) + self.time(t[:, None]))
        return {"mean": h, "pair": (h.square().sum(1), t)}


def records(count=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (count,), generator=generator)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=dtype) + labels.view(-1, 1, 1, 1)
    return x, labels


def small_net(dtype=torch.float64):
    torch.manual_seed(1)
    return Net().to(dtype)


def private(model=None, *, count=24, batch_size=8, lr=1.0, noise=0.0, bound=HUGE, engine=None, **options):
    """Make the private (module, optimizer, loader), whose batches are the same in every run."""
    model = small_net() if model is None else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    loader = DataLoader(
        TensorDataset(*records(count)), batch_size=batch_size, generator=torch.Generator().manual_seed(11)
    )
    engine = engine or PrivacyEngine()
    if not engine.secure_mode:  # an experiment, in which the loader's generator draws the batches
        options.setdefault("noise_generator", torch.Generator().manual_seed(12))
    make = engine.make_private
    return make(model, optimizer, loader, noise_multiplier=noise, max_grad_norm=bound, **options)


def first_batch(loader):
    """Return the loader's next batch that is not empty."""
    return next(batch for batch in loader if len(batch[0]))


def loss_of(model, x):
    """Compute losses of rows that carry their label in a corner, so that the oracle needs inputs only."""
    return F.cross_entropy(model(x[..., :-1]), x[:, 0, 0, -1].long(), reduction="none")


def with_labels(x, y):
    return torch.cat([x, y.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, 6, 1)], -1)


def truth(model, x, y):
    return oracle.sample_grads(model, loss_of, with_labels(x, y))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got, wanted, divisor=1.0):
    assert got.keys() == wanted.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, wanted[name].to(g.dtype) / divisor, msg=lambda text, name=name: f"{name}: {text}")


def unchanged(run, match, model, error=PrivacyError):
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad for _, p in model.named_parameters()]
    with pytest.raises(error, match=match):
        run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is g for (_, p), g in zip(model.named_parameters(), grads))
