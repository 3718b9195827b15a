"""The usual training loop runs unchanged, and privately: Opacus's own examples, compared with one backward pass per sample.

The loops call everything in the order of Opacus's quick start, image classifier and MNIST example; only the import differs.
"""

import collections
import copy
import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from loops import (
    DELTA,
    HUGE,
    Net,
    Several,
    assert_same,
    first_batch,
    gradients,
    private,
    records,
    small_net,
    truth,
    unchanged,
)
from scipy.stats import chi2
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from fastloda import LoDAConv2d, PrivacyAccountant, PrivacyError, attach_loda
from fastloda.accounting.history import HistoryAccountant
from fastloda.engine.engine import PrivacyEngine, make_private, make_private_with_epsilon
from fastloda.engine.loader import BatchMemoryManager, PoissonLoader
from fastloda.privacy.adaptive import AdaptiveClipping

# ---- Opacus's loops


def test_quick_start():
    """https://github.com/pytorch/opacus#getting-started"""
    dataset = TensorDataset(*records(dtype=torch.float32))

    model = small_net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data_loader = DataLoader(dataset, batch_size=8)
    before = copy.deepcopy(model.state_dict())

    privacy_engine = PrivacyEngine()
    model, optimizer, data_loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data_loader,
        noise_multiplier=1.1,
        max_grad_norm=1.0,
    )
    criterion = nn.CrossEntropyLoss()
    for x, y in data_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()

    assert len(privacy_engine.accountant) == len(data_loader) == 3
    assert privacy_engine.get_epsilon(DELTA) == PrivacyAccountant(1 / 3, 1.1).epsilon(DELTA, 3)
    after = model.to_standard_module().state_dict()
    assert all(not torch.equal(after[name], value) and after[name].isfinite().all() for name, value in before.items())


def test_image_classifier_tutorial():
    """https://opacus.ai/tutorials/building_image_classifier: physical batches, accuracies, a budget, a test pass."""

    def accuracy(preds, labels):
        return (preds == labels).mean()

    train_dataset = TensorDataset(*records(40, torch.float32))
    train_loader = DataLoader(train_dataset, batch_size=10)
    model = small_net(torch.float32)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    privacy_engine = PrivacyEngine()
    assert privacy_engine.is_compatible(module=model)
    model, optimizer, train_loader = privacy_engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=train_loader,
        epochs=2,
        target_epsilon=5.0,
        target_delta=DELTA,
        max_grad_norm=1.2,
    )
    assert optimizer.noise_multiplier > 0

    def train(epoch):
        model.train()
        criterion = nn.CrossEntropyLoss()
        losses, top1_acc = [], []
        with BatchMemoryManager(
            data_loader=train_loader, max_physical_batch_size=4, optimizer=optimizer
        ) as memory_safe_data_loader:
            for images, target in memory_safe_data_loader:
                optimizer.zero_grad()
                output = model(images)
                loss = criterion(output, target)
                preds = np.argmax(output.detach().cpu().numpy(), axis=1)
                labels = target.detach().cpu().numpy()
                losses.append(loss.item())
                top1_acc.append(accuracy(preds, labels))
                loss.backward()
                optimizer.step()
                assert len(images) <= 4
        return privacy_engine.get_epsilon(DELTA)

    def test():
        model.eval()
        with torch.no_grad():
            for images, _ in DataLoader(train_dataset, batch_size=16):
                output = model(images)
                assert type(output) is torch.Tensor

    spent = [train(epoch) for epoch in range(2)]
    test()
    assert len(privacy_engine.accountant) == 8  # logical batches, not physical ones
    assert 0.9 * 5.0 < spent[1] <= 5.0 and spent[0] < spent[1]
    with pytest.raises(PrivacyError, match="the 8 steps that the privacy budget pays for are taken"):
        train(2)


def test_mnist_example_with_a_scheduler():
    """https://github.com/pytorch/opacus/blob/main/examples/mnist.py, with the learning rate schedule of its cifar10.py."""
    model, optimizer, train_loader = private(small_net(torch.float64), noise=1.0, bound=1.0, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _epoch in range(2):
        model.train()
        criterion = nn.CrossEntropyLoss()
        losses = []
        for data, target in train_loader:
            optimizer.zero_grad()
            output = model(data)
            loss = criterion(output, target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.original_optimizer.param_groups[0]["lr"] == 0.125
    assert len(losses) == len(train_loader)


def test_ghost_mode_returns_the_criterion_too():
    criterion = nn.CrossEntropyLoss()
    model, optimizer, criterion_back, loader = private(grad_sample_mode="ghost", criterion=criterion)
    assert criterion_back is criterion
    x, y = first_batch(loader)
    criterion_back(model(x), y).backward()
    optimizer.step()


# ---- exactness

LOSSES = {
    "mean": ("mean", lambda out, y: nn.CrossEntropyLoss()(out, y)),
    "sum": ("sum", lambda out, y: nn.CrossEntropyLoss(reduction="sum")(out, y)),
    "per sample, then mean": ("mean", lambda out, y: F.cross_entropy(out, y, reduction="none").mean()),
    "sum over the count": ("mean", lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y)),
    "one by one": ("sum", lambda out, y: sum(F.cross_entropy(o[None], t[None]) for o, t in zip(out, y))),
    "in place": ("mean", lambda out, y: F.cross_entropy(out.add_(1).sub_(1), y)),
    "closure": ("mean", lambda out, y: F.cross_entropy(out, y)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_step_is_the_clipped_sum(kind):
    reduction, criterion = LOSSES[kind]
    model, optimizer, loader = private(loss_reduction=reduction)
    inner = model.to_standard_module()
    for x, y in itertools.islice(loader, 3):
        samples = truth(inner, x, y)
        optimizer.max_grad_norm = float(oracle.norms(samples).median()) if samples else 1.0
        wanted = oracle.clipped_sum(samples, optimizer.max_grad_norm)

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)  # noqa: B023
            loss.backward()
            return loss

        if kind == "closure":
            assert optimizer.step(closure).item() > 0
        else:
            closure()
            assert all(p.grad is None for p in inner.parameters())  # backward leaves no gradient that is not private
            optimizer.step()
        assert_same(gradients(inner), wanted, divisor=8 if reduction == "mean" else 1)
        assert optimizer.stats.samples == len(x) and math.isnan(optimizer.stats.mean_loss)


@pytest.mark.parametrize("clipping", ["automatic", "per_layer", AdaptiveClipping(initial=0.1, count_noise=1e-3)])
def test_other_styles_of_clipping(clipping):
    model, optimizer, loader = private(clipping=clipping, bound=0.1)
    for _ in range(2):
        x, y = first_batch(loader)
        bound = optimizer.max_grad_norm
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        total = oracle.norm(gradients(model.to_standard_module())).item() * 8
        assert 0 < total <= bound * len(x) * (1 + 1e-5)
        # the bound continues from its last value, times exp(0.2 (1/2 - b)); b = 1/2 - len(x) / 2 / 8 where all are clipped
        moves = 0.2 * len(x) / 16 if isinstance(clipping, AdaptiveClipping) else 0
        assert math.log(optimizer.max_grad_norm / bound) == pytest.approx(moves, abs=1e-3)
    with pytest.raises(ValueError, match="count_noise"):  # this is known before the first step
        private(clipping=AdaptiveClipping(count_noise=0.1), noise=1.0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_without_clipping_and_noise_it_is_the_ordinary_step(optimizer):
    """Compare with two steps of plain PyTorch on the same Poisson batches, divided by the expected batch size."""
    plain = small_net()
    wrapped = copy.deepcopy(plain)
    loader = DataLoader(TensorDataset(*records()), batch_size=8, generator=torch.Generator().manual_seed(3))
    inner = optimizer(wrapped.parameters(), lr=0.1)
    model, private_optimizer, loader = make_private(wrapped, inner, loader, noise_multiplier=0.0, max_grad_norm=HUGE)
    ordinary = optimizer(plain.parameters(), lr=0.1)
    for x, y in loader:
        for m, o in ((model, private_optimizer), (plain, ordinary)):
            o.zero_grad()
            loss = F.cross_entropy(m(x), y) if m is model else F.cross_entropy(m(x), y, reduction="sum") / 8
            loss.backward()
            o.step()
    for p, q in zip(plain.parameters(), wrapped.parameters()):
        torch.testing.assert_close(p, q)


def test_several_inputs_and_outputs_in_one_loss():
    torch.manual_seed(2)
    inner = Several().double()
    model, optimizer, loader = private(inner, bound=0.5)

    def losses(m, x):
        out = m(x, t=x[:, 0, 0, 0])
        again = m(2 * x, t=out["pair"][1])  # called twice
        return out["mean"].square().sum(1) + out["pair"][0].sin() * again["mean"][:, 0]

    x, _ = first_batch(loader)
    wanted = oracle.clipped_sum(oracle.sample_grads(inner, losses, x), 0.5)
    losses(model, x).mean().backward()
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8)


def test_frozen_layers_with_adapters():
    inner = small_net()
    attach_loda(inner, rank=1)
    nn.init.normal_(inner.conv.loda_B)
    assert isinstance(inner.conv, LoDAConv2d) and not inner.conv.weight.requires_grad
    frozen = inner.conv.weight.clone()
    model, optimizer, loader = private(inner, bound=0.3)
    x, y = first_batch(loader)
    wanted = oracle.clipped_sum(truth(inner, x, y), 0.3)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8)
    assert torch.equal(inner.conv.weight, frozen) and inner.conv.weight.grad is None


def test_parts_of_a_batch_add_up_to_one_step():
    """The same logical batches, whole and in parts of 3, give equal gradients, and one noisy step each."""

    def run(split):
        model, optimizer, loader = private(bound=0.5, batch_size=8, noise=1.0, noise_generator=torch.Generator())
        optimizer.generator.manual_seed(2)
        found, sizes = [], []
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=split, optimizer=optimizer) as parts:
            for x, y in parts:
                optimizer.zero_grad()
                steps = len(optimizer.accountant)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                sizes.append(len(x))
                if len(optimizer.accountant) > steps:
                    found.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        return found, sizes, optimizer.stats.samples

    whole, sizes, last = run(100)
    split, parts, last_split = run(3)
    assert len(whole) == len(split) == 3 and sum(sizes) == sum(parts) and max(parts) <= 3 < max(sizes)
    assert last == last_split == sizes[-1]
    for a, b in zip(whole, split):
        torch.testing.assert_close(a, b)


def test_noise_has_the_promised_scale():
    x, y = torch.zeros(4, 1, 6, 6), torch.zeros(4).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3000))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.5, max_grad_norm=2.0)
    weight = model.to_standard_module()[1].weight
    before = weight.detach().clone()
    batch, _ = next(iter(loader))
    (model(batch) * 0).mean().backward()  # the gradients are zero
    optimizer.step()
    noise = (weight.detach() - before) * 2  # expected batch size 2
    statistic = (noise / 3.0).square().sum().item()
    low, high = chi2.ppf([1e-6, 1 - 1e-6], noise.numel())
    assert low < statistic < high


# ---- empty batches, samples that are not finite


def test_empty_batches_make_noisy_steps():
    """At rate 1/24, a third of the batches are empty; each is noised and counted, and nothing becomes NaN."""
    engine = PrivacyEngine()
    model, optimizer, loader = private(batch_size=1, noise=1.0, bound=1.0, engine=engine, lr=0.01)
    empty = 0
    for x, y in loader:
        before = [p.clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        empty += not len(x)
        assert x.shape[1:] == (1, 6, 6) and x.dtype == torch.float64 and y.dtype == torch.int64
        assert all(not torch.equal(p, q) and p.isfinite().all() for p, q in zip(model.parameters(), before))
    assert empty >= 3 and len(engine.accountant) == 24


def test_an_empty_batch_needs_no_backward():
    model, optimizer, loader = private(batch_size=1, noise=1.0, bound=1.0)
    for x, y in loader:
        optimizer.zero_grad()
        if len(x):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert len(optimizer.accountant) == 24


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_contributes_zero(bad):
    model, optimizer, loader = private(bound=0.5)
    x, y = first_batch(loader)
    assert len(x) > 2
    wanted = oracle.clipped_sum(truth(model.to_standard_module(), x[1:], y[1:]), 0.5)
    x[0, 0, 2, 2] = bad
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same(gradients(model.to_standard_module()), wanted, divisor=8)
    assert optimizer.stats.nonfinite == 1


# ---- what is refused, with nothing changed


class Opaque(torch.autograd.Function):
    """The product of x and p, by an operation that no rule covers."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx, gy):
        x, p = ctx.saved_tensors
        return gy * p, (gy * x).sum()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return Opaque.apply(x - x.detach().mean(0), self.p)


@pytest.mark.filterwarnings("ignore:.*has no per-sample rule")
def test_uncovered_and_mixing_layers():
    inner = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), Scale())
    model, optimizer, loader = private(inner.double())
    x, y = first_batch(loader)
    F.cross_entropy(model(x), y).backward()
    unchanged(optimizer.step, "'2.p': layer '2' .Scale.*mixes samples", inner)
    with pytest.raises(PrivacyError, match="BatchNorm2d"):
        private(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 3)).double())


def test_a_forward_pass_that_writes_to_a_buffer():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += x.sum()
            return super().forward(x)

    model, _, loader = private(Counting().double())
    with pytest.raises(PrivacyError, match="'seen' changed"):
        model(first_batch(loader)[0])


def centred(out, y):
    return F.cross_entropy(out - out.mean(0), y)


def contrastive(out, y):
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


MIXING = {
    "batch mean": (centred, "samples mix in the loss"),
    "contrastive": (contrastive, "samples mix in the loss"),
    "class weights": (lambda out, y: F.cross_entropy(out, y, torch.tensor([1.0, 2, 3]).double()), "class weights"),
    "ignored targets": (lambda out, y: F.cross_entropy(out, torch.where(y == y[0], -100, y)), "not\\s+ignored"),
    "a sum for a mean": (lambda out, y: F.cross_entropy(out, y, reduction="sum"), "loss_reduction='mean'"),
    "a plain sum": (lambda out, y: F.cross_entropy(out, y, reduction="none").sum(), "loss_reduction='mean'"),
}


@pytest.mark.parametrize("kind", MIXING)
def test_losses_that_couple_samples(kind):
    criterion, match = MIXING[kind]
    model, optimizer, loader = private()
    x, y = first_batch(loader)
    assert len(y) > 2 and len(set(y.tolist())) > 1
    loss = criterion(model(x), y)
    unchanged(loss.backward, match, model)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()  # the loop may go on
    optimizer.step()


def test_weights_that_do_not_couple_samples():
    model, optimizer, loader = private(loss_reduction="sum")
    weight = torch.full((3,), 2.0, dtype=torch.float64)
    for criterion in (nn.CrossEntropyLoss(weight, ignore_index=7), nn.CrossEntropyLoss(torch.arange(3).double())):
        x, y = first_batch(loader)
        one_by_one = [criterion(o[None], t[None]) for o, t in zip(model(x), torch.where(y == 0, 1, y))]
        sum(one_by_one).backward()
        optimizer.step()
    model, optimizer, loader = private()
    x, y = first_batch(loader)
    F.cross_entropy(model(x), y, weight, ignore_index=7).backward()
    optimizer.step()


def test_a_mean_for_a_sum():
    model, _, loader = private(loss_reduction="sum")
    x, y = first_batch(loader)
    unchanged(F.cross_entropy(model(x), y).backward, "loss_reduction='sum'", model)


def test_gradients_around_the_private_module():
    model, optimizer, loader = private()
    x, y = first_batch(loader)
    penalty = sum(p.square().sum() for p in model.parameters())
    unchanged((F.cross_entropy(model(x), y) + penalty).backward, "weight_decay", model)
    assert all(p.grad is None for p in model.parameters())
    trainable_input = torch.randn(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    unchanged(lambda: model(trainable_input), "requires grad", model, ValueError)
    F.cross_entropy(model.to_standard_module()(x), y).backward()
    unchanged(optimizer.step, "through the module that make_private returned", model)


def test_steps_without_a_batch_of_their_own():
    model, optimizer, loader = private()
    x, y = first_batch(loader)
    unchanged(optimizer.step, "needs one loss.backward", model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    F.cross_entropy(model(x), y).backward()
    unchanged(optimizer.step, "no batch is left for this step", model)
    optimizer.zero_grad()
    x, y = first_batch(loader)
    F.cross_entropy(model(torch.cat([x, x])), torch.cat([y, y])).backward()
    unchanged(optimizer.step, f"{2 * len(x)} samples, but the batch has {len(x)} records", model)


def test_gradient_scalers():
    model, optimizer, loader = private(small_net(torch.float32))
    scaler = torch.amp.GradScaler("cpu")
    x, y = first_batch(loader)
    scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
    unchanged(lambda: scaler.step(optimizer), "train in bfloat16", model)
    off = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.zero_grad()
    off.scale(F.cross_entropy(model(x.float()), y)).backward()
    off.step(optimizer)


def test_two_backward_passes_before_a_step():
    model, optimizer, loader = private()
    x, y = first_batch(loader)
    F.cross_entropy(model(x), y).backward()
    unchanged(F.cross_entropy(model(x), y).backward, "a second backward pass", model)
    optimizer.zero_grad()
    unchanged(optimizer.step, "needs one loss.backward", model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_outputs_that_have_no_row_for_each_sample():
    class Mean(Net):
        def forward(self, x):
            return super().forward(x).mean()

    model, _, loader = private(Mean().double())
    unchanged(model(first_batch(loader)[0]).backward, "one row per sample", model)

    class Rows(list):
        pass

    class Listed(Net):
        def forward(self, x):
            return Rows(super().forward(x))

    model, _, loader = private(Listed().double())
    unchanged(lambda: model(first_batch(loader)[0]), "returned a Rows", model, TypeError)


def test_parts_of_two_batches_never_mix():
    """One loop stops in the middle of a batch, and one skips a part."""
    model, optimizer, loader = private(bound=0.5, batch_size=12)

    def step(x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        step(*next(iter(parts)))
        assert len(optimizer.accountant) == 0  # this was the first part of several
    seen = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for x, y in parts:
            inner = copy.deepcopy(model.to_standard_module())
            step(x, y)
            seen.append((x, y))
            if len(optimizer.accountant):
                break
    samples = truth(inner, torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen]))
    assert_same(gradients(model.to_standard_module()), oracle.clipped_sum(samples, 0.5), divisor=12)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for i, (x, y) in enumerate(parts):
            if i == 1:
                with pytest.raises(PrivacyError, match="must follow every physical batch"):
                    step(x, y)
                break


BAD_ARGUMENTS = {
    "poisson_sampling": (False, ValueError, "poisson_sampling=False is refused"),
    "grad_sample_mode": ("no_op", ValueError, "'no_op'"),
    "rand_on_empty": (True, ValueError, "rand_on_empty=True"),
    "loss_reduction": ("none", ValueError, "'none'"),
    "clipping": ("by_hand", ValueError, "'by_hand'"),
    "alphas": ([2, 3], TypeError, "alphas"),
    "bound": ([1.0, 2.0], ValueError, r"max_grad_norm=\[1.0, 2.0\]"),
    "noise": (-1.0, ValueError, "noise_multiplier must be >= 0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments_that_cannot_be_honoured(name):
    value, error, match = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=match):
        private(**{name: value})
    with pytest.raises(ValueError, match="max_grad_norm must be a positive"):
        private(bound=0.0)


def test_optimizers_that_do_not_fit():
    model = small_net()
    loader = DataLoader(TensorDataset(*records()), batch_size=8)
    arguments = dict(noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(PrivacyError, match="lacks trainable parameters"):
        make_private(model, torch.optim.SGD(model.head.parameters(), lr=1), loader, **arguments)
    with pytest.raises(PrivacyError, match="LBFGS"):
        make_private(model, torch.optim.LBFGS(model.parameters()), loader, **arguments)


def test_what_trains_is_checked_at_every_step():
    inner = small_net()
    inner.conv.bias.requires_grad_(False)
    model, optimizer, loader = private(inner)
    inner.conv.bias.requires_grad_(True)  # this parameter is not in the optimizer
    x, y = first_batch(loader)
    F.cross_entropy(model(x), y).backward()
    unchanged(optimizer.step, r"lacks trainable parameters \['conv.bias'\]", model)


def test_batches_of_an_earlier_pass_pay_for_nothing():
    model, optimizer, loader = private(batch_size=24)  # every batch has all records
    for _ in range(3):
        for x, _ in loader:
            with torch.no_grad():
                model(x)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    F.cross_entropy(model(x), y).backward()
    unchanged(optimizer.step, "no batch is left", model)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


BAD_LOADERS = {
    "iterable": (lambda data: DataLoader(Stream(), batch_size=2), ValueError, "IterableDataset"),
    "no batches": (lambda data: DataLoader(data, batch_size=None), ValueError, "batch_size=None"),
    "subset sampler": (
        lambda data: DataLoader(data, batch_size=2, sampler=SubsetRandomSampler([0, 1])),
        ValueError,
        "SubsetRandomSampler",
    ),
    "weights": (
        lambda data: DataLoader(
            data, batch_size=2, sampler=torch.utils.data.WeightedRandomSampler([1.0] * len(data), len(data))
        ),
        ValueError,
        "WeightedRandomSampler",
    ),
    "drops all": (lambda data: DataLoader(data, batch_size=99, drop_last=True), ValueError, "nothing to draw"),
    "no loader": (lambda data: data, TypeError, "TensorDataset"),
}


@pytest.mark.parametrize("kind", BAD_LOADERS)
def test_loaders_that_cannot_be_poisson_sampled(kind):
    make, error, match = BAD_LOADERS[kind]
    with pytest.raises(error, match=match):
        PoissonLoader.like(make(TensorDataset(*records())))


# ---- the loader


def test_every_record_enters_every_batch_with_the_same_probability(counts):
    """20 records at rate 1/4: each record's count is binomial, and no two records' draws are correlated."""
    passes = counts(400, 4000)
    loader = PoissonLoader.like(DataLoader(TensorDataset(torch.arange(20)), batch_size=5))
    assert len(loader) == 4 and loader.sample_rate == 0.25
    hits = torch.zeros(passes * 4, 20)
    for i, (batch,) in enumerate(itertools.chain.from_iterable(loader for _ in range(passes))):
        hits[i, batch] = 1
    n, q = len(hits), 0.25
    single = ((hits.sum(0) - n * q) ** 2 / (n * q * (1 - q))).sum().item()
    assert single < chi2.ppf(1 - 1e-6, 20)
    centred = hits - q
    pairs = (centred.T @ centred / (n**0.5 * q * (1 - q)))[torch.triu(torch.ones(20, 20), 1).bool()]
    assert pairs.square().sum().item() < chi2.ppf(1 - 1e-6, 190)


def test_a_loader_without_a_generator_cannot_be_foreseen():
    torch.manual_seed(0)
    one = [x.tolist() for (x,) in PoissonLoader.like(DataLoader(TensorDataset(torch.arange(64)), batch_size=8))]
    torch.manual_seed(0)
    two = [x.tolist() for (x,) in PoissonLoader.like(DataLoader(TensorDataset(torch.arange(64)), batch_size=8))]
    assert one != two


def collate_dicts(rows):
    x, y = zip(*rows)
    Pair = collections.namedtuple("Pair", "a b")
    return {"x": torch.stack(x, 1), "names": [str(int(v)) for v in y], "both": Pair(torch.stack(y), "fixed")}


def test_an_empty_batch_has_the_form_of_the_others():
    loader = PoissonLoader.like(DataLoader(TensorDataset(*records(3)), batch_size=3, collate_fn=collate_dicts))
    empty = loader.collate_fn([])
    assert empty["x"].shape == (1, 0, 6, 6) and empty["names"] == []
    assert empty["both"].a.shape == (0,) and empty["both"].a.dtype == torch.int64 and empty["both"].b == "fixed"


class Rows(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.full((2,), float(i)), i


def test_workers_hand_out_the_right_parts():
    torch.manual_seed(3)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Rows(), batch_size=4, num_workers=2, persistent_workers=True)
    model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    assert loader.dataset.__class__ is Rows and loader.num_workers == 2

    def train(batches, stop=None):
        for x, y in itertools.islice(batches, stop):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y % 3).backward()
            optimizer.step()

    for passes in range(1, 3):
        train(loader, stop=1)  # the workers have drawn the other batches in vain
        train(loader)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
            train(parts)
        assert len(optimizer.accountant) == 7 * passes


def test_batches_taken_ahead_and_skipped():
    """One loop fetches the next batch before it steps, and one leaves a batch out: one step counts for one batch."""
    model, optimizer, loader = private(noise=1.0, bound=1.0)
    batches = iter(loader)
    ahead = next(batches)
    for _ in range(2):
        (x, y), ahead = ahead, next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for i, (x, y) in enumerate(loader):
        if i != 1:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert len(optimizer.accountant) == 4


class WithOneLoss(Net):
    """A model whose loss has shape [1], as many rows as a batch of one record has."""

    def forward(self, x):
        return super().forward(x).square().mean().reshape(1) if len(x) else super().forward(x).sum(1)


@pytest.mark.parametrize("wrap_model", [True, False])
def test_a_batch_is_not_taken_for_a_smaller_one_that_was_taken_ahead(wrap_model):
    """Otherwise all its records would be clipped as one sample: 2 times the bound."""
    inner = WithOneLoss().double()
    model, optimizer, loader = private(inner, batch_size=2, wrap_model=wrap_model)
    call, tried = model if wrap_model else inner, 0
    for _ in range(40):
        batches = list(loader)
        for number, ((x, _), (following, _)) in enumerate(zip(batches, batches[1:])):
            if len(x) > 1 and len(following) == 1 and not number:
                optimizer.zero_grad()
                call(x).sum().backward()
                with pytest.raises(PrivacyError, match=f"1 samples, but the batch has {len(x)} records"):
                    optimizer.step()
                optimizer.zero_grad()
                tried += 1
    assert tried


def test_physical_batches_need_their_own_optimizer():
    _, optimizer, loader = private()
    _, other, _ = private()
    with pytest.raises(TypeError, match="one call of fastloda's make_private"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=other)
    with pytest.raises(ValueError, match="got 0"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=0, optimizer=optimizer)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        assert len(parts) == 13 and len(loader) == 3  # of 4.25 parts each, for batches of 24 records at rate 1/3


def test_a_subset_is_sampled_by_its_own_records():
    loader = PoissonLoader.like(DataLoader(Subset(Rows(), [3, 5]), batch_size=1, shuffle=True))
    seen = {int(i) for _ in range(40) for _, labels in loader for i in labels}
    assert seen == {3, 5}


# ---- the module and the optimizer are what they wrap


def test_the_private_module_looks_like_its_own():
    inner = small_net()
    model, optimizer, loader = private(inner)
    assert model.conv is inner.conv and model.to_standard_module() is inner
    assert set(model.state_dict()) == {f"_module.{name}" for name in inner.state_dict()}  # names as in Opacus's wrapper
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    model.eval()
    assert not inner.training
    x = records()[0]
    with torch.no_grad():
        assert torch.equal(model(x), inner(x))
    kept = model(x).detach()
    assert type(kept) is torch.Tensor and not kept.requires_grad and type(model(x).argmax(1)) is torch.Tensor
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("inner step"))
    batch, labels = first_batch(loader)
    F.cross_entropy(model(batch), labels).backward()
    optimizer.step()
    assert calls == ["inner step"]
    average = copy.deepcopy(model)
    assert torch.equal(average(x), inner(x)) and average.to_standard_module() is not inner
    again, wrapped_again, _ = private(model)
    assert again.to_standard_module() is inner and type(wrapped_again.original_optimizer) is torch.optim.SGD


def test_a_model_in_eval_mode_trains():
    """Models with BatchNorm train so, with public statistics."""
    inner = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 3)).double().eval()
    inner[0].weight.requires_grad_(False)
    inner[0].bias.requires_grad_(False)
    model, optimizer, loader = private(inner)
    x, y = first_batch(loader)
    wanted = oracle.clipped_sum(truth(inner, x, y), HUGE)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8)


def test_autocast_computes_the_same_in_lower_precision():
    model, optimizer, loader = private(small_net(torch.float32), bound=0.5)
    x, y = first_batch(loader)
    inner = copy.deepcopy(model.to_standard_module()).double()
    wanted = oracle.clipped_sum(truth(inner, x, y), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x.float()), y)
    loss.backward()
    optimizer.step()
    got = torch.cat([g.flatten() for g in gradients(model.to_standard_module()).values()])
    wanted = torch.cat([g.flatten() for g in wanted.values()]).float() / 8
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_a_checkpoint_carries_module_optimizer_and_account(tmp_path):
    def loop(model, optimizer, loader):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    path = tmp_path / "private.pt"
    engine, again = PrivacyEngine(), PrivacyEngine()
    made = private(noise=1.0, bound=1.0, engine=engine)
    loop(*made)
    engine.save_checkpoint(path=path, module=made[0], optimizer=made[1], checkpoint_dict={"epoch": 1})
    other = private(Net().double(), noise=1.0, bound=1.0, engine=again)
    found = again.load_checkpoint(path=path, module=other[0], optimizer=other[1])
    assert found["epoch"] == 1 and again.get_epsilon(DELTA) == engine.get_epsilon(DELTA) > 0
    assert all(torch.equal(p, q) for p, q in zip(made[0].parameters(), other[0].parameters()))
    loop(*other)  # loading wrote to the module between two steps, which is no leak
    assert len(again.accountant) == 6
    again.load_checkpoint(path=path, module=other[0])
    assert len(again.accountant) == 6  # what was spent stays spent
    with pytest.raises(ValueError, match="malformed privacy record"):
        HistoryAccountant().load_state_dict({"history": [(1.0, 0.1, -3)], "mechanism": "prv"})
    torch.save({}, path)
    with pytest.raises(ValueError, match="lacks .*privacy_accountant_state_dict"):
        again.load_checkpoint(path=path, module=other[0])


def test_the_account_of_several_runs_is_joint():
    history = HistoryAccountant("rdp")
    assert history.get_epsilon(DELTA) == 0
    for _ in range(10):
        history.step(noise_multiplier=1.0, sample_rate=0.1)
    alone = history.get_epsilon(DELTA)
    assert alone == PrivacyAccountant(0.1, 1.0, "rdp").epsilon(DELTA, 10)
    history.step(noise_multiplier=2.0, sample_rate=0.2)
    assert history.history == [(1.0, 0.1, 10), (2.0, 0.2, 1)] and len(history) == 11
    assert alone < history.get_epsilon(DELTA) < alone + PrivacyAccountant(0.2, 2.0, "rdp").epsilon(DELTA, 1)
    with pytest.raises(ValueError, match="gdp.*approximation"):
        PrivacyEngine(accountant="gdp")
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            history.get_epsilon(delta)


def test_a_budget_is_for_an_unspent_engine():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*records()), batch_size=8)
    budget = dict(target_epsilon=3.0, target_delta=DELTA, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="epochs must be a positive finite number, got 0"):
        make_private_with_epsilon(model, optimizer, loader, epochs=0, **budget)
    _, private_optimizer, loader = make_private_with_epsilon(model, optimizer, loader, epochs=4, **budget)
    noise = private_optimizer.noise_multiplier
    assert private_optimizer.last_step == 12
    assert 0.99 * 3.0 <= PrivacyAccountant(1 / 3, noise).epsilon(DELTA, 12) <= 3.0
    spent = PrivacyEngine()
    spent.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(PrivacyError, match="this engine has taken 1 private steps"):
        spent.make_private_with_epsilon(model, optimizer, loader, epochs=1, **budget)


def test_secure_noise():
    engine = PrivacyEngine(secure_mode=True)
    model, optimizer, loader = private(engine=engine, noise=1.0, bound=1.0)
    x, y = first_batch(loader)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="exclude each other"):
        private(engine=engine, noise_generator=torch.Generator())
