"""What Opacus's users write around `make_private` runs, or is refused with the reason and with what to write instead."""

import copy
import dataclasses
import io
import pickle
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from loops import (
    DELTA,
    assert_same,
    first_batch,
    gradients,
    private,
    records,
    small_net,
    truth,
    unchanged,
    with_labels,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fastloda
from fastloda import (
    BatchMemoryManager,
    CrossEntropyLoss,
    ModuleValidator,
    PrivacyAccountant,
    PrivacyEngine,
    PrivacyError,
)
from fastloda.engine import schedulers
from fastloda.privacy.adaptive import AdaptiveClipping


def train(model, optimizer, loader, passes=1):
    for _ in range(passes):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def written(state):
    """Save a state and read it again as `torch.load` does for users, which accepts plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_budget(engine, epochs=4, count=24, batch_size=8, **options):
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*records(count)), batch_size=batch_size)
    budget = dict(target_epsilon=3.0, target_delta=DELTA, epochs=epochs, max_grad_norm=1.0)
    return engine.make_private_with_epsilon(model, optimizer, loader, **budget, **options)


# ---- saving and loading


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_state_carries_the_account(optimizer_class):
    """A run resumes in the ordinary way: load both state dicts, use a new engine, train on."""

    def made(engine):
        model = small_net()
        optimizer = optimizer_class(model.parameters(), lr=0.01)
        loader = DataLoader(TensorDataset(*records()), batch_size=8)
        return engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)

    first, second = PrivacyEngine(), PrivacyEngine()
    model, optimizer, loader = made(first)
    train(model, optimizer, loader, passes=2)
    saved = written({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert saved["optimizer"]["state"].keys() == optimizer.original_optimizer.state_dict()["state"].keys()

    model, optimizer, loader = made(second)
    model.load_state_dict(saved["model"])
    for _ in range(2):  # loading twice counts once
        optimizer.load_state_dict(saved["optimizer"])
        assert second.get_epsilon(DELTA) == first.get_epsilon(DELTA) > 0
    train(model, optimizer, loader, passes=2)
    assert second.get_epsilon(DELTA) == PrivacyAccountant(1 / 3, 1.0).epsilon(DELTA, 12)


@pytest.mark.parametrize("again", [False, True])
def test_an_ordinary_optimizer_carries_the_account_on(again):
    """The state is loaded before make_private, and perhaps saved once more by an ordinary optimizer."""
    model, optimizer, loader = private(noise=1.0, bound=1.0, lr=0.01)
    train(model, optimizer, loader)
    plain = torch.optim.SGD(small_net().parameters(), lr=1.0)
    plain.load_state_dict(written(optimizer.state_dict()))
    assert plain.param_groups[0]["lr"] == 0.01
    plain.step()
    inner = small_net()
    plain_again = torch.optim.SGD(inner.parameters(), lr=1.0)
    plain_again.load_state_dict(written((plain if again else optimizer).state_dict()))
    engine, loader = PrivacyEngine(), DataLoader(TensorDataset(*records()), batch_size=8)
    for _ in range(2):
        made = engine.make_private(inner, plain_again, loader, noise_multiplier=1.0, max_grad_norm=1.0)
        assert len(engine.accountant) == 3
    train(*made)
    assert engine.get_epsilon(DELTA) == PrivacyAccountant(1 / 3, 1.0).epsilon(DELTA, 6)
    assert made[1].state_dict()["param_groups"][0]["privacy"]["accountant"] == engine.accountant.state_dict()
    plain_again.param_groups[0]["privacy"] = {"accountant": 3}
    with pytest.raises(ValueError, match="malformed privacy record"):
        engine.make_private(inner, plain_again, loader, noise_multiplier=1.0, max_grad_norm=1.0)


def test_another_engine_takes_over_what_a_private_optimizer_has_spent():
    model, optimizer, loader = private(noise=1.0, bound=1.0)
    train(model, optimizer, loader)
    model, optimizer, loader = fastloda.make_private(model, optimizer, loader, noise_multiplier=2.0, max_grad_norm=1.0)
    train(model, optimizer, loader)
    assert sorted(optimizer.accountant.history) == [(1.0, 1 / 3, 3), (2.0, 1 / 3, 3)]


def test_an_optimizer_state_without_an_account_says_so():
    model, optimizer, _ = private(noise=1.0)
    plain = torch.optim.SGD(small_net().parameters(), lr=0.25)
    with pytest.warns(UserWarning, match="no privacy account: .* not counted"):
        optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25 and len(optimizer.accountant) == 0


@pytest.mark.parametrize("privacy", [{}, {"accountant": {"history": [(1.0, 0.5, -1)], "mechanism": "prv"}}, 7])
def test_a_malformed_account_changes_nothing(privacy):
    model, optimizer, _ = private(noise=1.0)
    state = torch.optim.SGD(small_net().parameters(), lr=9.0).state_dict()
    state["param_groups"][0]["privacy"] = {"max_grad_norm": 1.0} | privacy if isinstance(privacy, dict) else privacy
    with pytest.raises(ValueError, match="malformed privacy record"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1.0 and len(optimizer.accountant) == 0


def test_adaptive_clipping_goes_on_from_its_bound():
    style = AdaptiveClipping(initial=0.1, count_noise=1.0)
    model, optimizer, loader = private(clipping=style, noise=1.0)
    train(model, optimizer, loader)
    bound = optimizer.max_grad_norm
    assert bound != 0.1
    _, again, _ = private(clipping=style, noise=1.0)
    again.load_state_dict(written(optimizer.state_dict()))
    assert again.max_grad_norm == bound
    _, flat, _ = private(noise=1.0, bound=2.0)
    flat.load_state_dict(written(optimizer.state_dict()))
    assert flat.max_grad_norm == 2.0  # the bound given to make_private


def test_a_budget_counts_what_was_loaded():
    model, optimizer, loader = with_budget(PrivacyEngine())
    train(model, optimizer, loader, passes=3)
    saved, engine = written(optimizer.state_dict()), PrivacyEngine()
    model, optimizer, loader = with_budget(engine)
    optimizer.load_state_dict(saved)
    train(model, optimizer, loader)
    assert len(engine.accountant) == 12
    with pytest.raises(PrivacyError, match="the 12 steps that the privacy budget pays for are taken"):
        train(model, optimizer, loader)
    assert len(engine.accountant) == 12 and engine.get_epsilon(DELTA) <= 3.0


@pytest.mark.parametrize("how", ["loaded", "set", "another optimizer", "of a higher rate"])
def test_a_budget_is_of_epsilon_not_of_steps(how):
    """Steps with less noise than planned, wherever they come from, end the run before the budget is exceeded."""
    engine = PrivacyEngine()
    model, optimizer, loader = with_budget(engine)
    less = 0.8 * optimizer.noise_multiplier
    if how == "loaded":
        other = private(noise=less, bound=1.0)
        train(*other)
        optimizer.load_state_dict(written(other[1].state_dict()))
    elif how == "another optimizer":
        train(*private(noise=less, bound=1.0, engine=engine))
    elif how == "of a higher rate":
        train(*private(noise=1.7 * less, bound=1.0, engine=engine, batch_size=24))
    else:
        optimizer.noise_multiplier = less
    with pytest.raises(PrivacyError, match="would exceed the privacy budget"):
        train(model, optimizer, loader, passes=4)
    assert 0 < len(engine.accountant) < 12 and 1.5 < engine.get_epsilon(DELTA) <= 3.0


def test_more_noise_than_planned_is_counted_as_planned():
    engine = PrivacyEngine()
    model, optimizer, loader = with_budget(engine)
    optimizer.noise_multiplier *= 2
    train(model, optimizer, loader, passes=4)
    assert len(engine.accountant) == 12 and engine.get_epsilon(DELTA) < 3.0


def test_checkpoints_count_once_and_may_lack_an_optimizer(tmp_path):
    path, engine, again = tmp_path / "c.pt", PrivacyEngine(), PrivacyEngine()
    made = private(noise=1.0, engine=engine, lr=0.5)
    train(*made)
    engine.save_checkpoint(path=path, module=made[0], optimizer=made[1])
    other = private(noise=1.0, engine=again)
    again.load_checkpoint(path=path, module=other[0], optimizer=other[1])
    assert len(again.accountant) == 3 and other[1].param_groups[0]["lr"] == 0.5
    engine.save_checkpoint(path=path, module=made[0])
    third = PrivacyEngine()
    other = private(noise=1.0, engine=third)
    with pytest.warns(UserWarning, match="no optimizer_state_dict: the optimizer stays"):
        third.load_checkpoint(path=path, module=other[0], optimizer=other[1])
    assert len(third.accountant) == 3 and other[1].param_groups[0]["lr"] == 1.0


def test_a_checkpoint_of_opacus_counts_once(tmp_path):
    """The checkpoint's account has no id, and its optimizer's state no account."""
    history = {"history": [(1.0, 0.5, 4)], "mechanism": "prv"}
    module, optimizer, _ = private(noise=1.0, engine=(engine := PrivacyEngine()))
    document = {"module_state_dict": module.state_dict(), "privacy_accountant_state_dict": history}
    document["optimizer_state_dict"] = torch.optim.SGD(small_net().parameters(), lr=0.5).state_dict()
    torch.save(document, tmp_path / "c.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.load_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    assert len(engine.accountant) == 4 and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("of", ["module", "optimizer"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, of):
    module, optimizer, _ = private(noise=1.0, engine=(engine := PrivacyEngine()))
    fits = {name: t + 1 for name, t in module.state_dict().items()}
    *others, last = fits
    misfits = {name: fits[name] for name in others} | {last: torch.zeros(99)}
    groups = torch.optim.SGD(small_net().parameters(), lr=0.5).state_dict()
    document = {
        "module_state_dict": misfits if of == "module" else fits,
        "privacy_accountant_state_dict": {"history": [(1.0, 0.5, 4)], "mechanism": "prv"},
        "optimizer_state_dict": groups if of == "module" else {"state": {}, "param_groups": []},
    }
    torch.save(document, tmp_path / "c.pt")
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises((RuntimeError, ValueError), match="size mismatch|parameter groups"):
        engine.load_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    assert len(engine.accountant) == 0 and optimizer.param_groups[0]["lr"] == 1.0
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


# ---- copies


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
@pytest.mark.parametrize("when", ["new", "after a backward pass", "in the middle of a batch", "with a scheduler"])
def test_copies_train_and_go_on_with_the_account(again, when):
    generator = torch.Generator().manual_seed(1)
    made = private(noise=1.0, bound=1.0, batch_size=12, noise_generator=generator)
    model, optimizer, loader = made
    if when == "with a scheduler":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if when != "new":
        train(*made)
    taken = len(optimizer.accountant)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        x, y = next(iter(parts))
        if "of a batch" in when or "backward" in when:
            F.cross_entropy(model(x), y).backward()
        if when == "in the middle of a batch":
            optimizer.step()
            assert optimizer.accumulating
        copies = [again(made), again(made)]
    for copied in copies:
        assert not copied[1].accumulating and len(copied[1].accountant) == taken
        assert copied[0].to_standard_module() is not model.to_standard_module() and copied[2].tally is copied[1].tally
        with pytest.raises(PrivacyError, match="needs one loss.backward"):
            copied[1].step()
        train(*copied)
        assert len(copied[1].accountant) == taken + 2 and len(optimizer.accountant) == taken
        assert all(p.isfinite().all() for p in copied[0].parameters())
    train(*made)
    assert len(optimizer.accountant) == taken + 2
    alone = again(optimizer)
    assert type(alone.original_optimizer) is torch.optim.SGD and len(alone.accountant) == taken + 2


def test_copies_repeat_neither_noise_nor_batches():
    x = torch.zeros(400, 4)
    model = nn.Linear(4, 3)
    loader = DataLoader(TensorDataset(x), batch_size=100, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    made = PrivacyEngine().make_private(
        model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, noise_generator=torch.Generator()
    )
    ends, sizes = [], []
    for module, optimizer, loader in (copy.deepcopy(made), copy.deepcopy(made), made):
        batches = list(loader)
        sizes.append([len(batch) for (batch,) in batches])
        module(batches[-1][0]).sum(1).mean().backward()
        optimizer.step()
        ends.append(module.weight.detach().clone())
    assert sizes[0] != sizes[1] != sizes[2] != sizes[0]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])


# ---- virtual batches


def test_what_a_part_of_a_batch_is_can_be_told():
    model, optimizer, loader = private(noise=1.0, bound=1.0, batch_size=12)
    assert not optimizer.accumulating
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for x, y in parts:
            before, steps = [p.clone() for p in model.parameters()], len(optimizer.accountant)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            real = len(optimizer.accountant) > steps
            assert optimizer.accumulating is optimizer._is_last_step_skipped is not real
            assert real != all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_a_batch_that_was_left_is_no_batch():
    model, optimizer, loader = private(noise=1.0, bound=1.0, batch_size=12)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for x, y in parts:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            assert optimizer.accumulating
            break
    assert not optimizer.accumulating and len(optimizer.accountant) == 0


def test_opacus_batch_memory_manager_names_its_replacement():
    manager = pytest.importorskip("opacus.utils.batch_memory_manager").BatchMemoryManager
    _, optimizer, loader = private(noise=1.0)
    with manager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        with pytest.raises(PrivacyError, match="from fastloda import BatchMemoryManager"):
            next(iter(parts))


SCHEDULES = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=9),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_of_the_learning_rate_count_private_steps(kind):
    def rates(physical):
        model, optimizer, loader = private(noise=1.0, bound=1.0, batch_size=12, lr=0.1)
        schedule, seen = SCHEDULES[kind](optimizer), []
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as parts:
            for x, y in (part for _ in range(2) for part in parts):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                schedule.step()
                if optimizer.accumulating:
                    assert schedule.last_epoch == len(optimizer.accountant)
                else:
                    seen.append((schedule.last_epoch, optimizer.param_groups[0]["lr"]))
        return seen

    assert rates(physical=2) == rates(physical=99)
    assert [steps for steps, _ in rates(physical=2)] == [1, 2, 3, 4]


def test_a_schedule_may_begin_in_the_middle_of_a_batch():
    model, optimizer, loader = private(noise=1.0, bound=1.0, batch_size=12, lr=0.1)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        x, y = next(iter(parts))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert optimizer.accumulating
        assert lr_scheduler.LambdaLR(optimizer, lambda step: 0.5).get_last_lr() == [0.05]
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = lr_scheduler.StepLR(plain, 1)
    plain.step(), schedule.step()
    assert schedule.last_epoch == 1  # a schedule of another optimizer counts as ever


# ---- models that have to be changed first


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        )
        self.head = nn.Sequential(nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


@pytest.mark.parametrize(
    "fix", [PrivacyEngine.get_compatible_module, ModuleValidator.fix, PrivacyEngine().get_compatible_module]
)
def test_compatible_modules(fix):
    model = Norms()
    before = copy.deepcopy(model.state_dict())
    assert [type(error) for error in ModuleValidator.validate(model)] == [PrivacyError] * 3
    with pytest.raises(PrivacyError, match="(?s)body.1.*body.3.*head.1"):
        ModuleValidator.validate(model, strict=True)
    assert not ModuleValidator.is_valid(model) and not PrivacyEngine().is_compatible(module=model)
    fixed = fix(model)
    assert ModuleValidator.is_valid(fixed) and PrivacyEngine().is_compatible(module=fixed)
    assert model.state_dict().keys() == before.keys() and type(model.body[1]) is nn.BatchNorm2d
    assert type(fixed.body[1]) is nn.GroupNorm and not list(fixed.buffers())
    mine = {id(p) for p in model.parameters()}
    assert all(id(p) not in mine for p in fixed.parameters())
    assert all(torch.equal(p, before[name]) for name, p in fixed.named_parameters())
    x = torch.randn(5, 1, 6, 6)
    assert fixed.head[:2](fixed.body(x).flatten(1)).std() > 0.1  # no layer normalises single numbers
    train(*private(fixed.double(), noise=1.0, bound=1.0))


def test_a_layer_that_has_no_counterpart_is_named():
    with pytest.raises(PrivacyError, match="'0' .Embedding. has max_norm"):
        PrivacyEngine.get_compatible_module(nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)))


# ---- gradients around the private module


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(36, 4), nn.Linear(4, 3)

    def encode(self, x):
        return torch.tanh(self.encoder(x.flatten(1)))

    def forward(self, x):
        return self.decoder(self.encode(x))

    def parts(self, x):
        code = self.encode(x)
        return {"code": code, "trained": list(self.parameters()), "name": "parts"}

    def loss(self, out, y):
        return F.cross_entropy(out, y)

    def penalty(self):
        return sum(p.square().sum() for p in self.parameters())

    def freeze(self):
        self.decoder.bias.requires_grad_(False)
        return self


def test_methods_of_the_wrapped_module_are_private():
    inner = Autoencoder().double()
    model, optimizer, loader = private(inner, bound=0.1)
    for use in (lambda x: model.encode(x), lambda x: model.parts(x=x)["code"]):
        x, _ = first_batch(loader)
        wanted = oracle.clipped_sum(oracle.sample_grads(inner, lambda m, x: m.encode(x).square().sum(1), x), 0.1)
        use(x).square().sum(1).mean().backward()
        assert all(p.grad is None for p in inner.parameters())
        optimizer.step()
        found = {name: g if g is not None else torch.zeros_like(wanted[name]) for name, g in gradients(inner).items()}
        assert_same(found, wanted, divisor=8)
        optimizer.zero_grad()
    assert model.encode.__name__ == "encode" and model.encode(x[:0]).shape == (0, 4)
    assert all(p is q for p, q in zip(model.parts(x)["trained"], inner.parameters()))
    x, y = first_batch(loader)
    model.loss(model(x), y).backward()  # a method may take the module's outputs
    optimizer.step()
    with pytest.raises(PrivacyError, match="weight_decay"):
        (model.loss(model(x), y) + model.penalty()).backward()
    assert model.freeze() is inner and not inner.decoder.bias.requires_grad


def test_methods_may_write_only_what_they_do_not_learn_from():
    class Writing(Autoencoder):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

        def reset(self, value):
            self.seen.copy_(value)

        def counting(self, x):
            self.seen += len(x)
            return self.encode(x)

    model, _, loader = private(Writing().double())
    model.reset(torch.ones(()))
    assert model.seen == 1
    with pytest.raises(PrivacyError, match="'seen' changed"):
        model.counting(first_batch(loader)[0])


def test_calls_around_the_private_module_name_the_cause():
    inner = Autoencoder().double()
    model, optimizer, loader = private(inner)
    x, y = first_batch(loader)
    for call in (inner, lambda x: model.decoder(model.encoder(x.flatten(1)))):
        F.cross_entropy(call(x), y).backward()
        unchanged(optimizer.step, "a call of the wrapped module, or of one of its submodules", model)
        optimizer.zero_grad()


def test_clipping_gradients_that_are_not_there_yet():
    model, optimizer, loader = private(noise=1.0, bound=1.0)
    seen = []
    optimizer.attach_step_hook(lambda o: seen.append(nn.utils.clip_grad_norm_(o.param_groups[0]["params"], 1e-3)))
    x, y = first_batch(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(model.parameters())
        F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="private gradients do not exist yet"):
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0
    before = [p.clone() for p in model.state_dict().values()]
    optimizer.step()  # the hook sees the noisy gradient, and may change it
    assert seen[0] > 1e-3
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.state_dict().values(), before)])
    assert moved.norm() == pytest.approx(1e-3, rel=1e-3)


# ---- what forward returns


class Pair:
    def __init__(self, first, second):
        self.first, self.second, self.itself = first, {"second": [second]}, self


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    cache: object = None


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(36, 3), make

    def forward(self, x):
        return self.make(self.layer(x.flatten(1)))


OBJECTS = {
    "a distribution": (lambda h: torch.distributions.Categorical(logits=h), lambda out, y: -out.log_prob(y)),
    "a dataclass": (
        lambda h: Output(h, Pair(2 * h, h.exp())),
        lambda out, y: F.cross_entropy(out.logits, y, reduction="none"),
    ),
    "nested objects": (
        lambda h: (Pair(h.sin(), h), len),
        lambda out, y: out[0].first.sum(1) * out[0].second["second"][0][:, 0],
    ),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_hold_outputs(kind):
    make, criterion = OBJECTS[kind]
    inner = Returning(make).double()
    model, optimizer, loader = private(inner, bound=0.1)
    x, y = first_batch(loader)
    losses = lambda m, x: criterion(m(x[..., :-1]), x[:, 0, 0, -1].long())  # noqa: E731
    wanted = oracle.clipped_sum(
        oracle.sample_grads(inner, losses, torch.cat([x, y.view(-1, 1, 1, 1).expand(-1, 1, 6, 1)], -1)), 0.1
    )
    criterion(model(x), y).mean().backward()
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8)
    with torch.no_grad():
        assert type(model(x)) is type(inner(x))


def test_objects_that_the_module_keeps_stay_as_they_are():
    kept = []
    model, _, loader = private(Returning(lambda h: kept.append(Pair(h, h)) or kept[-1]).double())
    out = model(first_batch(loader)[0])
    assert out is not kept[-1] and out.first is not kept[-1].first
    assert "Addmm" in kept[-1].first.grad_fn.name() and "Addmm" not in out.first.grad_fn.name()


# ---- generators and discriminators


def gan_step(how):
    """Train both networks for one step, as in Opacus's dcgan.py; return the generator's gradient, and what it should be."""
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Linear(5, 36), nn.Tanh(), nn.Unflatten(1, (1, 6, 6))).double()
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1)).double()
    inner[0].bias.requires_grad_(False)
    netD, optimizerD, loader = private(inner, noise=1.0, bound=1.0)
    criterion = nn.BCEWithLogitsLoss()
    for real, _ in loader:
        optimizerD.zero_grad()
        fake = generator(torch.randn(len(real), 5, dtype=torch.float64))
        label = torch.ones(len(real), 1, dtype=torch.float64)
        errD = criterion(netD(real), label) + criterion(netD(fake.detach()), 0 * label)
        errD.backward()
        optimizerD.step()
        if not len(real):
            continue
        generator.zero_grad()
        if how == "frozen":
            with netD.frozen():
                errG = criterion(netD(fake), label)
        else:
            trained = [p for p in netD.parameters() if p.requires_grad]
            netD.requires_grad_(False)
            errG = criterion(netD(fake), label)
            for p in trained:
                p.requires_grad_(True)
        errG.backward(retain_graph=True)
        wanted = torch.autograd.grad(criterion(inner(fake), label), list(generator.parameters()))
        assert [p.requires_grad for p in inner.parameters()] == [True, False, True, True]
        for p, g in zip(generator.parameters(), wanted):
            torch.testing.assert_close(p.grad, g)
            assert g.abs().max() > 0
    assert len(optimizerD.accountant) == 3


@pytest.mark.parametrize("how", ["frozen", "requires_grad_"])
def test_a_generator_learns_from_a_private_discriminator(how):
    gan_step(how)


def test_gan_loops_that_must_change_say_how():
    netD, optimizerD, loader = private(noise=1.0, bound=1.0)
    real, label = first_batch(loader)
    fake = torch.randn_like(real).requires_grad_()
    unchanged(lambda: netD(fake), "with model.frozen", netD, ValueError)
    F.cross_entropy(netD(fake.detach()), label).backward()
    optimizerD.step()
    F.cross_entropy(netD(real), label).backward()
    with pytest.raises(PrivacyError, match="added up for one backward and one step"):
        optimizerD.step()


def test_several_backward_passes_say_what_replaces_them():
    model, optimizer, loader = private(noise=1.0, bound=1.0)
    x, y = first_batch(loader)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match=r"(?s)second backward.*BatchMemoryManager\(.*\) as parts:\n.*step\(\)"):
        F.cross_entropy(model(x), y).backward()


# ---- Opacus's arguments


def test_settings_of_opacus_accountants_are_ignored_with_a_note():
    engine = PrivacyEngine(accountant="rdp")
    train(*private(noise=1.0, engine=engine))
    epsilon = engine.get_epsilon(DELTA)
    for get in (engine.get_epsilon, engine.accountant.get_epsilon):
        with pytest.warns(UserWarning, match="'alphas'. ignored"):
            assert get(DELTA, alphas=[1.1, 2, 3]) == epsilon
    with pytest.raises(TypeError, match="alphos"):
        engine.get_epsilon(DELTA, alphos=[2])


@pytest.mark.parametrize("epochs, steps", [(0.5, 2), (1 / 3, 1), (1.5, 5), (2, 6), (0.1, 1)])
def test_parts_of_a_pass(epochs, steps):
    model, optimizer, loader = with_budget(engine := PrivacyEngine(), epochs=epochs)
    assert optimizer.last_step == steps
    with pytest.raises(PrivacyError, match=f"the {steps} steps"):
        train(model, optimizer, loader, passes=3)
    assert engine.get_epsilon(DELTA) <= 3.0


def test_parts_of_a_pass_are_whole_steps():
    assert 0.28 * 25 > 7
    assert with_budget(PrivacyEngine(), epochs=0.28, count=25, batch_size=1)[1].last_step == 7


@pytest.mark.parametrize("epochs", [0, -1.0, float("nan"), True, "2"])
def test_passes_that_mean_nothing(epochs):
    with pytest.raises(ValueError, match="epochs must be a positive finite number"):
        with_budget(PrivacyEngine(), epochs=epochs)


def test_a_bound_for_each_parameter():
    """Compare with https://github.com/pytorch/opacus/blob/main/opacus/optimizers/perlayeroptimizer.py."""
    bounds = [0.5, 0.01, 0.2, 0.03]
    model, optimizer, loader = private(clipping="per_layer", bound=bounds)
    x, y = first_batch(loader)
    samples = truth(model.to_standard_module(), x, y)
    wanted = {name: 0 for name in samples[0]}
    for sample in samples:
        for (name, g), bound in zip(sample.items(), bounds):
            wanted[name] = wanted[name] + g * min(1.0, bound / g.norm().item())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same(gradients(model.to_standard_module()), wanted, divisor=8)
    assert optimizer.max_grad_norm == pytest.approx(sum(b * b for b in bounds) ** 0.5)
    for bad, match in (([1.0], "1 bounds for 4 trainable"), ([1.0, 1, 1, -1], "positive finite")):
        with pytest.raises(ValueError, match=match):
            private(clipping="per_layer", bound=bad)
    with pytest.raises(ValueError, match="needs clipping='per_layer', got 'flat'"):
        private(bound=bounds)


def test_adaptive_clipping_by_opacus_names():
    names = dict(target_unclipped_quantile=0.9, clipbound_learning_rate=5.0, unclipped_num_std=1.0)
    model, optimizer, loader = private(
        clipping="adaptive", bound=0.1, noise=1.0, max_clipbound=0.25, min_clipbound=0.05, **names
    )
    assert optimizer.clipping == AdaptiveClipping(0.9, 5.0, 1.0, None, 0.05, 0.25)
    seen = []
    for _ in range(4):
        train(model, optimizer, loader)
        seen.append(optimizer.max_grad_norm)
    assert all(0.05 <= bound <= 0.25 * (1 + 1e-9) for bound in seen) and max(seen) > 0.2
    with pytest.raises(TypeError, match="target_unclipped_quantile"):
        private(**names)
    for least, largest in ((1.0, 1.0), (0.0, 1.0), (1.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="min_bound must be less than max_bound"):
            AdaptiveClipping(min_bound=least, max_bound=largest)


@pytest.mark.parametrize("source", ["opacus", "ours"])
def test_schedules_of_noise_and_bound(source, tmp_path):
    if source == "opacus":
        pytest.importorskip("opacus")
        from opacus import schedulers as theirs

        made_of = theirs
    else:
        made_of = schedulers
    engine = PrivacyEngine()
    model, optimizer, loader = private(noise=2.0, bound=1.0, engine=engine)
    noise = made_of.ExponentialNoise(optimizer, gamma=0.5)
    bound = made_of.StepGradClip(optimizer, step_size=2, gamma=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        noise.step()
        bound.step()
    assert [(z, n) for z, _, n in optimizer.accountant.history] == [(2.0, 1), (1.0, 1), (0.5, 1)]
    assert optimizer.max_grad_norm == pytest.approx(0.1) and optimizer.noise_multiplier == 0.25
    path = tmp_path / "c.pt"
    engine.save_checkpoint(
        path=path, module=model, optimizer=optimizer, noise_scheduler=noise, grad_clip_scheduler=bound
    )
    _, other, _ = private(noise=2.0, bound=1.0, engine=(again := PrivacyEngine()))
    later, later_bound = made_of.ExponentialNoise(other, gamma=1.0), made_of.StepGradClip(other, step_size=9, gamma=1.0)
    again.load_checkpoint(path=path, module=model, noise_scheduler=later, grad_clip_scheduler=later_bound)
    assert (later.gamma, later.last_epoch, later_bound.step_size) == (0.5, 3, 2)


def test_schedules_agree_with_opacus():
    theirs = pytest.importorskip("opacus.schedulers")
    for name, arguments in (
        ("ExponentialNoise", {"gamma": 0.9}),
        ("StepNoise", {"gamma": 0.5, "step_size": 3}),
        ("LambdaNoise", {"noise_lambda": lambda step: 1 + step}),
        ("ExponentialGradClip", {"gamma": 0.9}),
        ("StepGradClip", {"gamma": 0.5, "step_size": 3}),
        ("LambdaGradClip", {"scheduler_function": lambda step: 1 / (1 + step)}),
    ):
        values = []
        for module in (theirs, schedulers):
            _, optimizer, _ = private(noise=2.0, bound=3.0)
            schedule = getattr(module, name)(optimizer, **arguments)
            seen = []
            for _ in range(7):
                schedule.step()
                seen.append((optimizer.noise_multiplier, optimizer.max_grad_norm))
            values.append(seen)
        assert values[0] == values[1] and len(set(values[0])) > 1
        assert written(schedule.state_dict())["last_epoch"] == 7
        _, resumed, _ = private(noise=2.0, bound=3.0)
        again = getattr(schedulers, name)(resumed, **arguments)
        again.load_state_dict(written(schedule.state_dict()))
        for _ in range(4):
            assert (resumed.noise_multiplier, resumed.max_grad_norm) == seen[-1]
            again.step(), schedule.step()
            seen.append((optimizer.noise_multiplier, optimizer.max_grad_norm))
        with pytest.warns(UserWarning, match="does not say what"):
            again.load_state_dict({"last_epoch": 2})
    with pytest.raises(TypeError, match="the one that make_private returned, got SGD"):
        schedulers.ExponentialNoise(torch.optim.SGD(small_net().parameters(), lr=1.0), gamma=1.0)


def test_schedules_count_private_steps():
    model, optimizer, loader = private(noise=8.0, bound=4.0, batch_size=12)
    noise = schedulers.ExponentialNoise(optimizer, gamma=0.5)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for x, y in parts:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            noise.step()
            if optimizer.accumulating:
                optimizer.max_grad_norm = 1.0  # this holds from the next batch on
    assert [z for z, *_ in optimizer.accountant.history] == [8.0, 4.0] and optimizer.max_grad_norm == 1.0


# ---- criterions, users' own noise, users' own gradients

TARGETS = {
    "labels": ((8, 3), lambda: torch.randint(3, (8,))),
    "labels and positions": ((8, 3, 5, 2), lambda: torch.randint(3, (8, 5, 2))),
    "probabilities": ((8, 3), lambda: torch.rand(8, 3).softmax(1)),
    "probabilities and positions": ((8, 3, 4), lambda: torch.rand(8, 3, 4).softmax(1)),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_samples(kind, smoothing):
    """Each loss is PyTorch's of that sample alone, but for the weights in PyTorch's divisor; none depends on other samples."""
    shape, make = TARGETS[kind]
    out, target = torch.randn(shape), make()
    plain = nn.CrossEntropyLoss(label_smoothing=smoothing)
    torch.testing.assert_close(CrossEntropyLoss(label_smoothing=smoothing)(out, target), plain(out, target))
    weight = torch.tensor([0.5, 1.0, 3.0])
    ignored, labels = target.clone(), not target.is_floating_point()
    if labels:
        ignored[::2] = 1  # all targets of every second sample are ignored
        ignored[1, ...] = 2
    criterion = CrossEntropyLoss(
        weight, ignore_index=1 if labels else -100, label_smoothing=smoothing, reduction="none"
    )
    losses = criterion(out, ignored)
    one_by_one = torch.stack([criterion(out[i : i + 1], ignored[i : i + 1])[0] for i in range(8)])
    torch.testing.assert_close(losses, one_by_one)
    if labels:
        assert (losses[::2] == 0).all() and losses[1] > 0
        own = CrossEntropyLoss(ignore_index=1, label_smoothing=smoothing, reduction="none")(out, ignored)
        theirs = nn.CrossEntropyLoss(ignore_index=1, label_smoothing=smoothing)
        for i in range(1, 8, 2):  # for one sample alone, PyTorch's divisor is that of the sample
            if (ignored[i] != 1).any():
                torch.testing.assert_close(own[i], theirs(out[i : i + 1], ignored[i : i + 1]))
    for reduction in ("mean", "sum"):
        criterion.reduction = reduction
        torch.testing.assert_close(criterion(out, ignored), getattr(losses, reduction)())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_and_ignored_targets_train(reduction):
    model, optimizer, loader = private(bound=0.1, loss_reduction=reduction)
    criterion = CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0]).double(), ignore_index=1, reduction=reduction)
    x, y = first_batch(loader)
    assert (y == 1).any() and (y != 1).any()
    losses = lambda m, x: criterion(m(x[..., :-1]), x[:, 0, 0, -1].long())  # noqa: E731
    wanted = oracle.clipped_sum(oracle.sample_grads(model.to_standard_module(), losses, with_labels(x, y)), 0.1)
    criterion(model(x), y).backward()
    optimizer.step()
    assert_same(gradients(model.to_standard_module()), wanted, divisor=8 if reduction == "mean" else 1)


class Threes:
    """A user's own noise source."""

    def __init__(self, bad=None):
        self.bad, self.drawn = bad, 0

    def normal(self, shape):
        self.drawn += shape.numel()
        if self.bad is not None:
            return self.bad
        return torch.full(shape, 3.0, dtype=torch.float64)


def test_noise_of_ones_own():
    source = Threes()
    model, optimizer, loader = private(bound=0.1, noise=2.0, noise_generator=source)
    x, y = first_batch(loader)
    clipped = oracle.clipped_sum(truth(model.to_standard_module(), x, y), 0.1)
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="squares have mean 9, not 1"):
        optimizer.step()
    assert_same(
        gradients(model.to_standard_module()), {name: g + 2.0 * 0.1 * 3.0 for name, g in clipped.items()}, divisor=8
    )
    assert source.drawn == sum(p.numel() for p in model.parameters())
    assert copy.deepcopy(optimizer).generator.drawn == source.drawn
    with pytest.raises(TypeError, match="noise_generator must be a torch.Generator, or have normal"):
        private(noise_generator=7)
    for bad in (torch.zeros((), dtype=torch.float64), torch.zeros(3, 3), torch.zeros(1).double()):
        model, optimizer, loader = private(noise=1.0, bound=1.0, noise_generator=Threes(bad))
        x, y = first_batch(loader)
        F.cross_entropy(model(x), y).backward()
        unchanged(optimizer.step, "Threes.normal must give float64 numbers of shape", model, ValueError)
        assert len(optimizer.accountant) == 0


def test_gradients_of_single_samples():
    inner = small_net()
    model, optimizer, loader = private(inner)
    x, y = first_batch(loader)
    wanted = truth(inner, x, y)
    losses = F.cross_entropy(inner(x), y, reduction="none")
    found = fastloda.per_sample_grads(losses, inner)
    assert all(p.grad is None for p in inner.parameters())
    torch.autograd.grad(losses.sum(), list(inner.parameters()))  # the graph still exists
    for name, grads in found.items():
        torch.testing.assert_close(grads, torch.stack([sample[name] for sample in wanted]))
    empty = fastloda.per_sample_grads(F.cross_entropy(inner(x), y, reduction="none")[:0], inner)
    assert {name: g.shape for name, g in empty.items()} == {n: (0, *p.shape) for n, p in inner.named_parameters()}
    with pytest.raises(AttributeError, match="fastloda.per_sample_grads"):
        _ = optimizer.grad_samples


class Recurrent(nn.Module):
    """A module whose inputs have the batch second; its outputs have it second, first, second again, or nowhere, as a cache."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.across = nn.GRU(6, 4), nn.Linear(4, 3), nn.Linear(4, 6)

    def forward(self, x, scale):
        h, last = self.rnn(x)
        return {
            "steps": self.head(h) * scale[:, None],
            "logits": self.across(last[0]),
            "last": last,
            "count": torch.ones(6),
        }

    def positions(self, x):
        return self.head(F.relu(x[..., :4]))


def sequence_losses(model, x):
    out = model(x.transpose(0, 1), scale=x[:, 0, 0])
    return out["steps"].square().sum((0, 2)) + out["logits"].sin().sum(1) + out["last"].sum((0, 2))


def sequences(inner, count, **options):
    """Make a loop over `count` records with six positions and six logits each; every batch has all the records."""
    x = torch.randn(count, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    loader = DataLoader(
        TensorDataset(x), batch_size=count, collate_fn=lambda rows: torch.stack([r for (r,) in rows], 1)
    )
    make = PrivacyEngine().make_private
    return x, make(inner, optimizer, loader, noise_multiplier=0.0, max_grad_norm=0.1, batch_first=False, **options)


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("count", [6, 4, 1])
def test_the_batch_may_come_second(count, wrap_model):
    inner = Recurrent().double()
    plain = copy.deepcopy(inner)
    x, (model, optimizer, loader) = sequences(inner, count, wrap_model=wrap_model)
    model = model if wrap_model else inner
    wanted = oracle.clipped_sum(oracle.sample_grads(plain, sequence_losses, x), 0.1)
    batch = next(iter(loader))
    assert torch.equal(batch, x.transpose(0, 1))
    sequence_losses(model, batch.transpose(0, 1)).mean().backward()
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=count)
    empty = model(x[:0].transpose(0, 1), scale=x[:0, 0, 0])
    assert {name: tuple(t.shape) for name, t in empty.items()} == {
        "steps": (6, 0, 3),
        "logits": (0, 6),
        "last": (1, 0, 4),
        "count": (0,),  # as every output of the empty batch is
    }
    with torch.no_grad():
        plain.load_state_dict(inner.state_dict())
        torch.testing.assert_close(model(batch, scale=x[:, 0, 0]), plain(batch, scale=x[:, 0, 0]))


def test_an_output_without_the_batch_is_named():
    class Summed(Recurrent):
        def forward(self, x):
            return self.rnn(x)[0].sum(1)

    _, (model, _, loader) = sequences(Summed().double(), 6)
    with pytest.raises(PrivacyError, match=r"an output of shape \(6, 4\) has no dimension that grows"):
        model(next(iter(loader)))


def test_positions_are_not_taken_for_records():
    """There are as many positions as records, and a layer treats both alike: only the layout tells which are which."""
    inner = Recurrent().double()
    x, (model, optimizer, loader) = sequences(inner, 6)
    losses = lambda m, x: m.positions(x.transpose(0, 1)).square().sum((0, 2))  # noqa: E731
    wanted = oracle.clipped_sum(oracle.sample_grads(inner, losses, x), 0.1)
    losses(model, next(iter(loader)).transpose(0, 1)).mean().backward()
    optimizer.step()
    assert_same(
        {n: g for n, g in gradients(inner).items() if "head" in n}, {n: g for n, g in wanted.items() if "head" in n}, 6
    )
