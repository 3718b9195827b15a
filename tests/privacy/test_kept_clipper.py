"""What `ghost_dp_step` keeps from one step to the next: only what a new clipper would have too, and no model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from fastloda import GhostClipper, PrivacyError, ghost_dp_step
from fastloda.privacy import step as step_module
from fastloda.privacy.styles import Automatic
from fastloda.privacy.watch import accept_changes


class Net(nn.Module):
    """A network of two layers, one of them frozen, and a buffer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)
        self.one.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))).square().sum(1)


def made(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def step(model: nn.Module, x: Tensor, noise: float = 0.0, **options):
    """Take one step; return its gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    settings = {"max_grad_norm": 0.3, "noise_multiplier": noise, "expected_batch_size": 4.0} | options
    ghost_dp_step(model(x), model, optimizer, **settings)
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture
def count(monkeypatch):
    """Count the clippers that are made, in a list of one number."""
    number, init = [0], step_module._KeptClipper.__init__

    def counted(*arguments, **options):
        number[0] += 1
        init(*arguments, **options)

    monkeypatch.setattr(step_module._KeptClipper, "__init__", counted)
    return number


def x_of(number: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(number))


def test_later_steps_take_the_clipper_over_and_come_out_the_same(count):
    kept, anew = made(), made()
    for number in range(4):
        gradients = step(kept, x_of(number))
        step_module._kept.pop(anew, None)
        assert all(map(torch.equal, gradients, step(anew, x_of(number))))
    assert count[0] == 1 + 4


CHANGES = {
    "bound": (lambda model: None, {"max_grad_norm": 0.7}),
    "views": (lambda model: None, {"views": 2}),
    "style": (lambda model: None, {"clipping": Automatic()}),
    "per layer": (lambda model: None, {"clipping": "per_layer"}),
    "ranks": (lambda model: None, {"group": "alone"}),
    "thawed": (lambda model: model.one.requires_grad_(True), {}),
    "frozen": (lambda model: model.two.bias.requires_grad_(False), {}),
    "cast": (lambda model: model.double(), {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_makes_another_clipper(name, count):
    change, options = CHANGES[name]
    results = []
    for keeps in (True, False):
        model = made()
        step(model, x_of(0))
        change(model)
        if not keeps:
            step_module._kept.pop(model)
        results.append(step(model, x_of(1).to(model.two.weight.dtype), **options))
    assert count[0] == 4 and all(map(torch.equal, *results))


def test_a_clipping_bound_holds_after_it_was_lowered():
    """The bound is that of the second step, not of the first."""
    model = made()
    step(model, 100 * x_of(0), max_grad_norm=5.0)
    gradients = step(model, 100 * x_of(1), max_grad_norm=1e-3, expected_batch_size=1.0)
    assert torch.cat([g.flatten() for g in gradients]).norm() <= 6 * 1e-3 * (1 + 1e-5)


# ---- the watch goes on between steps

WRITES = {
    "'seen'": lambda model: model.seen.add_(1),
    "'one.weight'": lambda model: model.one.weight.add_(1),
    "'two.weight'": lambda model: model.two.weight.detach().mul_(2),
    "an uncounted one to a buffer": lambda model: model.seen.data.fill_(7.0),
    "an uncounted one to a parameter": lambda model: model.two.bias.data.fill_(7.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_write_between_two_steps_is_seen(name):
    model = made()
    step(model, x_of(0))
    with torch.no_grad():
        WRITES[name](model)
    before = model.two.weight.clone()
    with pytest.raises(PrivacyError, match=f"{name} changed" if name[0] == "'" else "changed outside the private step"):
        step(model, x_of(1))
    assert torch.equal(model.two.weight, before)
    step(model, x_of(1))  # after the error the user may go on: the next step accepts the model as it is


@pytest.mark.parametrize("name", ["an uncounted one to a buffer", "an uncounted one to a parameter"])
def test_a_write_is_seen_if_the_next_step_has_other_settings(name):
    """The clipper does not fit the new settings, and must check for uncounted writes before it is dropped."""
    model = made()
    step(model, x_of(0))
    WRITES[name](model)
    with pytest.raises(PrivacyError, match="changed outside the private step"):
        step(model, x_of(1), max_grad_norm=0.7)


@pytest.mark.parametrize("how", [accept_changes, lambda model: GhostClipper(model, 1.0)])
def test_changes_of_ones_own_can_be_accepted(how):
    model = made()
    step(model, x_of(0))
    with torch.no_grad():
        model.seen.add_(1)
        model.two.weight.mul_(0.5)
    how(model)
    step(model, x_of(1))


def test_a_write_by_a_forward_pass_is_seen_by_the_step_itself():
    """A write that PyTorch does not count is found before the noise, and nothing is released."""
    model = made()
    step(model, x_of(0))
    optimizer = torch.optim.SGD(model.two.parameters(), 0.1)
    losses = model(x_of(1))
    model.seen.data.add_(losses.mean().item())
    before = model.two.weight.clone()
    with pytest.raises(PrivacyError, match="changed outside the private step"):
        ghost_dp_step(losses, model, optimizer, max_grad_norm=0.3, noise_multiplier=1.0, expected_batch_size=4.0)
    assert torch.equal(model.two.weight, before)


def test_an_optimizer_that_pytorch_knows_nothing_of_ends_the_update_too():
    class Own:
        def __init__(self, model):
            self.param_groups, self.model = [{"params": list(model.two.parameters())}], model

        def step(self):
            with torch.no_grad():
                for p in self.model.two.parameters():
                    p -= 0.1 * p.grad

    model = made()
    for number in range(3):
        ghost_dp_step(
            model(x_of(number)), model, Own(model), max_grad_norm=0.3, noise_multiplier=1.0, expected_batch_size=4.0
        )
    torch.optim.SGD(model.two.parameters(), 0.1).step()  # an optimizer that is not private
    with pytest.raises(PrivacyError, match="changed"):
        step(model, x_of(3))


def test_a_layer_that_begins_to_mix_samples_is_refused():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False).eval(), nn.Linear(4, 1), nn.Flatten(0))
    step(model, x_of(0))
    losses = model(x_of(1))
    model[1].train()
    with pytest.raises(PrivacyError, match="statistics over the batch"):
        ghost_dp_step(
            losses, model, torch.optim.SGD(model.parameters(), 0.1), max_grad_norm=0.3, noise_multiplier=1.0,
            expected_batch_size=4.0,
        )  # fmt: skip


# ---- nothing is left of a step that failed, nor of a model


class Failing:
    def normal(self, shape):
        raise OSError("no noise")


def test_nothing_of_a_failed_step_enters_the_next():
    """The noise fails when the sum is complete; the next step must not release that sum."""
    model, other = made(), made()
    for one in (model, other):
        step(one, x_of(0))
    with pytest.raises(OSError, match="no noise"):
        step(model, x_of(1), noise=1.0, generator=Failing())
    with pytest.raises(ValueError, match="losses"):
        ghost_dp_step(
            model(x_of(1)).mean(), model, torch.optim.SGD(model.two.parameters(), 0.1), max_grad_norm=0.3,
            noise_multiplier=1.0, expected_batch_size=4.0,
        )  # fmt: skip
    assert all(map(torch.equal, step(model, x_of(2)), step(other, x_of(2))))


def test_no_model_is_kept_alive():
    model = made()
    step(model, x_of(0), noise=1.0)
    again, kept = weakref.ref(model), weakref.ref(step_module._kept[model])
    del model
    gc.collect()
    assert again() is None and kept() is None


def test_copies_of_a_model_take_nothing_over(count):
    model = made()
    step(model, x_of(0))
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert one not in step_module._kept
        step(one, x_of(1))
    assert count[0] == 3 and model in step_module._kept
