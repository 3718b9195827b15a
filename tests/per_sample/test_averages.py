"""A penalty on gradients is exact if it uses each sample's own gradient, and refused if it uses the gradient of their mean."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastloda import GhostClipper, PrivacyError, per_sample_grads

N, C = 6, 5


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def features(rows=N):
    return torch.randn(rows, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def penalised(net, x, reduce):
    x = x.detach().requires_grad_()
    y = net(x)
    (gx,) = torch.autograd.grad(reduce(y), x, create_graph=True)
    return y.square().sum(1) + 20 * (gx.norm(dim=1) - 1).square()


def through_func(net, x):
    gx = torch.func.grad(lambda x: net(x).mean())(x)
    return net(x).square().sum(1) + gx.square().sum(1)


def left_in_grad(net, x):
    x = x.detach().requires_grad_()
    y = net(x)
    y.mean().backward(create_graph=True, inputs=[x])
    return y.square().sum(1) + x.grad.square().sum(1)


def sums_by_vmap(net, x):
    gx = torch.vmap(torch.func.grad(lambda row: (net(row).sum() * row).square().mean()))(x)
    return net(x).square().sum(1) + gx.square().sum(1)


MEANS = {
    "mean": torch.mean,
    "sum over samples": lambda y: y.sum() / len(y),
    "mean, then sum": lambda y: y.mean(0).sum(),
    "criterion": lambda y: F.mse_loss(y, torch.zeros_like(y)),
    "weighted": lambda y: 3 * F.logsigmoid(y).mean() - y.square().sum(),
    "weights of classes": lambda y: F.cross_entropy(y, torch.tensor([0, 1] * 3), torch.tensor([1.0, 2.0]).double()),
    "own Function": lambda y: Twice.apply(y).mean(),
    "one by one": lambda y: torch.stack([row.sum() for row in y]).mean(),
    "root": lambda y: y.square().mean().sqrt(),
    "divided before the sum": lambda y: (y / len(y)).sum(),
    "product": lambda y: y[:, 0] @ torch.full((len(y),), 1 / len(y)).double(),
}


def by_weights(net, x):
    x = x.detach().requires_grad_()
    y = net(x)
    (gx,) = torch.autograd.grad(y, x, torch.full_like(y, 1 / len(y)), create_graph=True)
    return y.square().sum(1) + gx.square().sum(1)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return 2 * y

    @staticmethod
    def backward(ctx, g):
        return 2 * g


SUMS = {
    "sum": torch.sum,
    "scaled": lambda y: 0.5 * y.sum(),
    "mean of features": lambda y: y.mean(1).sum(),
    "criterion": lambda y: F.mse_loss(y, torch.zeros_like(y), reduction="sum"),
    "own Function": lambda y: Twice.apply(y).sum(),
    "scaled inside by what happens to be the number of samples": lambda y: (y / N).softmax(1).square().sum(),
}


@pytest.mark.parametrize("name", MEANS)
def test_the_gradient_of_a_mean_is_refused(name):
    net = model()
    clipper = GhostClipper(net, 1.0)
    with pytest.raises(PrivacyError, match=r"y\.sum\(\)"):
        clipper.accumulate(penalised(net, features(), MEANS[name]))


@pytest.mark.parametrize("losses", [through_func, left_in_grad, by_weights])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_other_ways_to_the_gradient_of_a_mean(losses):
    net = model()
    with pytest.raises(PrivacyError, match=r"y\.sum\(\)"):
        per_sample_grads(losses(net, features()), net)


@pytest.mark.parametrize("name", SUMS)
def test_the_gradient_of_a_sum_is_exact(name):
    net, x = model(), features()
    found = per_sample_grads(penalised(net, x, SUMS[name]), net)
    for i in range(N):
        alone = dict(net.named_parameters())
        (loss,) = penalised(net, x[i : i + 1], SUMS[name])
        for (key, _), grad in zip(alone.items(), torch.autograd.grad(loss, alone.values())):
            assert torch.allclose(found[key][i], grad, atol=1e-10), key


def test_a_mean_of_each_samples_own_numbers():
    """Each mean is over as many numbers as there are samples."""
    net = model()
    x = features(C)
    found = per_sample_grads(sums_by_vmap(net, x), net)
    assert all(len(grad) == C for grad in found.values())
