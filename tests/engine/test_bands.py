"""`make_private(bands=...)` against its matrices: what one record changes, what is counted, what resumes, what is refused."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import DELTA, private, records, small_net
from strategy import Given, strategy
from torch import Generator, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fastloda import BatchMemoryManager, PrivacyAccountant, PrivacyEngine, PrivacyError, calibrate_noise
from fastloda.accounting.history import HistoryAccountant
from fastloda.engine.loader import PoissonBatches, Tally
from fastloda.privacy.adaptive import AdaptiveClipping

MOST = 24  # the largest number of steps in a test


def written(state):
    """Save a state and read it again as `torch.load` does for users, which accepts plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(model, optimizer, loader, steps):
    """Take some steps, in as many passes over the loader as they need; the parts of a batch together are one step."""
    while steps:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if not optimizer.accumulating:
                steps -= 1
            if not steps:
                break


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- what one record changes


def silent_loop(bands, epoch, source, optimizer=None):
    """Make a loop over 12 records whose gradients are zero; `optimizer` is a state to load before the loop is made private."""
    model = nn.Linear(MOST, 1, bias=False).double()
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    if optimizer:
        plain.load_state_dict(optimizer)
    loader = DataLoader(TensorDataset(torch.zeros(12, MOST).double(), torch.arange(12)), batch_size=12 // epoch)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "noise_generator": source, "bands": bands}
    return PrivacyEngine().make_private(model, plain, loader, **options)


def take_steps(made, count, size, log, leave):
    """Take `count` steps of one pass in parts of `size`, or only the first part; log each step's records and its noise."""
    module, optimizer, loader = made
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer) as parts:
        entered = []
        for x, numbers in parts:
            module(x).sum(1).mean().backward()
            optimizer.step()
            entered += numbers.tolist()
            if not optimizer.accumulating:
                grad = optimizer.param_groups[0]["params"][0].grad
                log.append((entered, grad.flatten() * optimizer.expected_batch_size))
                entered, count = [], count - 1
            if leave or not count:
                return


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bands=st.integers(1, 4), every=st.booleans())
def test_one_record_moves_the_released_sums_as_it_moves_independent_ones(data, bands, every):
    """Loops may leave passes and batches early, load states before and after, and be copied while the original goes on."""
    draw, log, saved, epoch = data.draw, [], [], bands if every else 12
    source = Given(torch.eye(MOST, dtype=torch.float64))
    loops = [silent_loop(bands, epoch, source)]
    used = [loops[0][1]]
    for _ in range(draw(st.integers(2, 9))):
        place = draw(st.integers(0, len(loops) - 1))
        optimizer = loops[place][1]
        what = draw(st.sampled_from(["steps", "steps", "copied", "loaded", "loaded before", "put back"]))
        if what == "steps" and len(log) < MOST - 4:
            saved.append(written(optimizer.state_dict()))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such noise looks wrong on purpose
                take_steps(loops[place], draw(st.integers(1, 4)), draw(st.integers(1, 12)), log, draw(st.booleans()))
        elif what == "copied":
            loops.append(copy.deepcopy(loops[place]))
        elif what == "put back" and saved and optimizer.tally.noise.steps:
            optimizer.load_state_dict(draw(st.sampled_from(saved)))
        elif what.startswith("loaded"):  # another loop goes on in its place
            state = written(optimizer.state_dict())
            loops[place] = silent_loop(bands, epoch, source, state if what == "loaded before" else None)
            loops[place][1].load_state_dict(state)
        used.append(loops[place][1])
        used.append(loops[-1][1])
    if not log:
        return
    # The released sums are added @ (C G + z), where `added` has each step's noise as a row: its inverse is C.
    columns = torch.linalg.inv(torch.stack([noise[: len(log)] for _, noise in log]))
    account = HistoryAccountant()
    for optimizer in used:
        account.load_state_dict(optimizer.accountant.state_dict())
    assert {rate for _, rate, _ in account.history} == {bands / epoch}
    for record in range(12):
        mine = columns[:, [step for step, (entered, _) in enumerate(log) if record in entered]]
        together = mine.T @ mine
        assert torch.allclose(together, together.diag().diag(), atol=1e-6)
        assert (together.diag() < 1 + 1e-6).all() and len(together) <= len(account)


def strategy_at(bands, steps, noise):
    """Compute the covariance of the noise of correlated steps."""
    c = strategy(bands, steps)
    return noise**2 * torch.linalg.inv(c.T @ c)


def test_the_noise_is_the_strategys():
    """The noise is exactly the strategy's, for given numbers, over passes, parts and a state loaded in between."""
    log, source = [], Given(torch.eye(MOST, dtype=torch.float64))
    made = silent_loop(3, 4, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take_steps(made, 4, 12, log, False)
        take_steps(made, 3, 1, log, False)
        state = written(made[1].state_dict())
        made = silent_loop(3, 4, source)
        made[1].load_state_dict(state)
        take_steps(made, 3, 2, log, False)
    added = torch.stack([noise for _, noise in log])[:, : len(log)]
    assert torch.allclose(strategy(3, len(log)) @ added, torch.eye(len(log)).double(), atol=1e-6)
    turns = made[2].tally.turns
    assert [(turns[entered] == step % 3).all() for step, (entered, _) in enumerate(log)] == [True] * 10


def test_the_covariance_of_the_noise():
    """The engine's own noise has the right scale and correlation over steps, with a bound that changes in between."""
    model = nn.Linear(40_000, 1, bias=False).double()
    loader = DataLoader(TensorDataset(torch.zeros(8, 40_000).double()), batch_size=2)
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    made = PrivacyEngine().make_private(model, plain, loader, noise_multiplier=1.5, max_grad_norm=2.0, bands=3)
    module, optimizer, loader = made
    found = []
    for _ in range(2):
        for (x,) in loader:
            module(x).sum(1).mean().backward()
            optimizer.step()
            found.append(model.weight.grad.flatten() * 2 / optimizer.max_grad_norm)
            optimizer.max_grad_norm *= 1.1
    found = torch.stack(found)
    wanted = strategy_at(3, 8, 1.5)
    error = (wanted.diag().outer(wanted.diag()) + wanted**2).div(found.shape[1]).sqrt()
    assert ((found @ found.T / found.shape[1] - wanted).abs() < 5.5 * error).all()


# ---- what is counted


def test_rounds_are_counted():
    engine = PrivacyEngine()
    made = private(noise=1.3, bound=1.0, engine=engine, bands=2)
    for taken in range(1, 8):
        train(*made, steps=1)
        assert engine.accountant.history == [(1.3, 2 / 3, math.ceil(taken / 2))]
        assert engine.get_epsilon(DELTA) == PrivacyAccountant(2 / 3, 1.3).epsilon(DELTA, math.ceil(taken / 2))
    assert made[2].sample_rate == 1 / 3 and made[1].expected_batch_size == 8


def test_a_step_that_fails_after_its_release_is_charged():
    """Else the other steps of its round would be free."""
    module, optimizer, loader = made = private(noise=1.0, bound=1.0, batch_size=12, bands=2)
    for x, y in loader:
        F.cross_entropy(module(x * math.nan), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="not finite"):
                optimizer.step()
        break
    assert len(optimizer.accountant) == optimizer.tally.noise.steps == 1
    train(*made, steps=1)
    assert len(optimizer.accountant) == 1


@pytest.mark.parametrize("alike", [True, False])
def test_a_step_that_may_have_used_a_later_batch_is_followed_by_a_new_round(alike):
    """A batch was passed over, and the next one has as many records: nobody knows which one the step has used."""
    module, optimizer, loader = made = private(noise=1.0, bound=1.0, batch_size=12, bands=2)
    turns = loader.tally.turns  # with rate 1 in their turn, all records enter every second step
    turns[:] = torch.arange(24) % 2 if alike else (torch.arange(24) > 5).long()
    batches = iter(loader)
    next(batches)
    x, y = next(batches)
    F.cross_entropy(module(x), y).backward()
    if alike:
        optimizer.step()
        train(*made, steps=1)
        assert len(optimizer.accountant) == 2 and optimizer.tally.noise.steps == 1
    else:
        with pytest.raises(PrivacyError, match="this batch is for step 2, and step 1 is the next"):
            optimizer.step()


def test_a_budget_pays_for_rounds():
    engine = PrivacyEngine()
    plain = torch.optim.SGD((model := small_net()).parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*records()), batch_size=4)
    budget = {"target_epsilon": 3.0, "target_delta": DELTA, "max_grad_norm": 1.0, "epochs": 10 / 6}
    made = engine.make_private_with_epsilon(model, plain, loader, **budget, bands=4)
    assert made[1].noise_multiplier == calibrate_noise(3.0, DELTA, 4 / 6, 3)
    assert made[1].last_step == 12
    train(*made, steps=12)
    assert 2.9 < engine.get_epsilon(DELTA) <= 3.0
    with pytest.raises(PrivacyError, match="the 12 steps that the privacy budget pays for are taken"):
        train(*made, steps=1)


def test_what_sums_up_has_less_noise_at_equal_epsilon():
    """The noise in the running sums of all steps, which plain SGD adds up, has less variance with 4 bands than with one."""
    steps, rate = 600, 0.05
    prefix = torch.ones(steps, steps, dtype=torch.float64).tril()
    found = []
    for bands in (1, 4):
        noise = calibrate_noise(8.0, DELTA, rate * bands, math.ceil(steps / bands))
        found.append((prefix @ strategy_at(bands, steps, noise) @ prefix.T).trace().item())
    assert found[1] < found[0]


# ---- going on


def test_steps_in_parts_are_the_same_steps():
    def run(size):
        module, optimizer, loader = private(noise=1.0, bound=0.5, batch_size=4, bands=3)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer) as parts:
            train(module, optimizer, parts, steps=9)
        return values(module), len(optimizer.accountant)

    (whole, rounds), (parted, as_many) = run(100), run(2)
    torch.testing.assert_close(whole, parted, rtol=1e-9, atol=1e-12)
    assert rounds == as_many == 3


def repeatable(**options):
    """Make a loop whose batches and noise follow from generators; return (module, optimizer, loader) and the generators."""
    made = private(noise=1.0, bound=0.5, batch_size=4, bands=3, lr=0.1, **options)
    return made, (made[2].batch_sampler.generator, made[1].generator)


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("how", ["loaded", "loaded before", "checkpoint"])
def test_a_loop_resumes_bit_for_bit(how, taken, tmp_path):
    engine, again = PrivacyEngine(), PrivacyEngine()
    made, generators = repeatable(engine=engine)
    if taken:
        train(*made, steps=taken)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=made[0], optimizer=made[1])
    states = [generator.get_state() for generator in generators]
    train(*made, steps=5)

    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    if how == "loaded before":
        plain = torch.optim.SGD((model := small_net()).parameters(), lr=0.1)
        plain.load_state_dict(saved["optimizer_state_dict"])
        loader = DataLoader(TensorDataset(*records()), batch_size=4, generator=Generator().manual_seed(11))
        other = again.make_private(
            model, plain, loader, noise_multiplier=1.0, max_grad_norm=0.5, bands=3, noise_generator=Generator()
        )
        other[0].load_state_dict(saved["module_state_dict"])
        restored = other[2].batch_sampler.generator, other[1].generator
        assert not any("noise" in group.get("privacy", {}) for group in plain.param_groups)
    else:
        other, restored = repeatable(engine=again)
        if how == "checkpoint":
            again.load_checkpoint(path=tmp_path / "c.pt", module=other[0], optimizer=other[1])
        else:
            other[0].load_state_dict(saved["module_state_dict"])
            for _ in range(2):  # loading twice counts once
                other[1].load_state_dict(saved["optimizer_state_dict"])
    for generator, state in zip(restored, states):
        generator.set_state(state)
    train(*other, steps=5)
    assert torch.equal(values(made[0]), values(other[0]))
    assert again.accountant.history == engine.accountant.history == [(1.0, 0.5, math.ceil((taken + 5) / 3))]


def test_a_checkpoint_that_can_t_be_loaded_leaves_no_noise(tmp_path):
    """The noise goes on where it is loaded, and only once."""
    engine, again = PrivacyEngine(), PrivacyEngine()
    made, _ = repeatable(engine=engine)
    train(*made, steps=4)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=made[0], optimizer=made[1])

    class Failing:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            if state:
                raise RuntimeError("bad")

    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save(saved | {"noise_scheduler_state_dict": {"a": 1}}, tmp_path / "c.pt")
    other, _ = repeatable(engine=again)
    with pytest.raises(RuntimeError, match="bad"):
        again.load_checkpoint(path=tmp_path / "c.pt", module=other[0], optimizer=other[1], noise_scheduler=Failing())
    noise = other[1].tally.noise
    assert noise.steps == 0 and noise.state(dict(other[0].to_standard_module().named_parameters())) == []


def test_an_optimizer_that_has_taken_steps_goes_on_with_its_own_noise():
    made, _ = repeatable()
    train(*made, steps=4)
    state = written(made[1].state_dict())
    train(*made, steps=3)
    made[1].load_state_dict(state)
    assert made[1].tally.noise.steps == 7 and len(made[1].accountant) == 3


def test_a_private_optimizer_keeps_its_noise_to_itself():
    engine = PrivacyEngine()
    made, _ = repeatable(engine=engine)
    train(*made, steps=4)
    loader = DataLoader(TensorDataset(*records()), batch_size=4)
    again = engine.make_private(*made[:2], loader, noise_multiplier=1.0, max_grad_norm=0.5, bands=3)
    assert again[1].tally.noise.steps == 0
    train(*again, steps=1)
    assert len(engine.accountant) == 3  # two rounds, and the first round of another run


def test_adaptive_clipping_goes_along():
    style = AdaptiveClipping(initial=0.1, count_noise=2.0)
    made = private(noise=1.0, batch_size=4, bands=3, clipping=style)
    train(*made, steps=5)
    assert made[1].max_grad_norm != 0.1 and len(made[1].accountant) == 2


def test_the_records_turns_go_along():
    """A new optimizer takes them over, and a copy, whose steps are counted anew, has its own."""
    made, _ = repeatable()
    train(*made, steps=4)
    turns, state = made[2].tally.turns, written(made[1].state_dict())
    again = resumed(state)
    assert torch.equal(again[2].tally.turns, turns) and len(turns.unique()) == 3
    assert again[2].split(3).tally is again[2].tally is again[1].tally
    assert not torch.equal(copy.deepcopy(made)[2].tally.turns, turns)


def test_one_record_more_changes_no_other_records_steps():
    """Turns that followed from the records' order would leave the same records, of one sign, to every second step."""
    totals = []
    for _ in range(300):
        loader = DataLoader(TensorDataset(torch.tensor([1.0, -1.0] * 20)), batch_size=20)
        model = nn.Linear(1, 1)
        made = PrivacyEngine().make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.0), loader, noise_multiplier=1.0, max_grad_norm=1.0, bands=2
        )
        (first,) = next(iter(made[2]))
        totals.append(first.sum())
    totals = torch.stack(totals)
    assert totals.abs().max() > 1 and totals.mean().abs() < 5 * totals.std() / math.sqrt(len(totals))


# ---- what is refused


def test_a_batch_drawn_before_a_state_was_loaded():
    made, _ = repeatable()
    train(*made, steps=4)
    state = written(made[1].state_dict())
    fresh = resumed(without_noise(state))
    batches = iter(fresh[2])
    for _ in range(4):
        next(batches)
    fresh[2].tally.drawn.clear()
    x, y = next(batches)
    fresh[1].load_state_dict(state)
    F.cross_entropy(fresh[0](x), y).backward()
    with pytest.raises(
        PrivacyError, match="this batch is for step 5, drawn before a state was loaded, and step 5 is the"
    ):
        fresh[1].step()
    fresh[1].zero_grad()
    train(*fresh, steps=1)


def test_batches_that_make_no_step():
    made, _ = repeatable()
    module, optimizer, loader = made
    batches = iter(loader)
    for number, (x, y) in enumerate(batches):
        if number == 1:
            continue
        F.cross_entropy(module(x), y).backward()
        if number == 2:
            with pytest.raises(
                PrivacyError, match="this batch is for step 3, and step 2 is the next: with bands=3 each"
            ):
                optimizer.step()
            break
        optimizer.step()
    optimizer.zero_grad()
    train(*made, steps=1)  # a new pass begins with the right batch
    x, y = next(batches)  # this batch is of the earlier pass
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match="this batch is for step 4, and step 3 is the next"):
        optimizer.step()
    assert len(optimizer.accountant) == 1


def test_batches_that_are_added_up():
    module, optimizer, loader = private(noise=1.0, bound=1.0, batch_size=12, bands=2)
    (x, y), (z, w) = list(loader)[:2]
    F.cross_entropy(module(torch.cat([x, z])), torch.cat([y, w])).backward()
    with pytest.raises(PrivacyError, match="the loss has .* samples, but the batch has"):
        optimizer.step()
    assert len(optimizer.accountant) == optimizer.tally.noise.steps == 0


def test_less_noise_than_was_paid_for():
    made, _ = repeatable()
    optimizer = made[1]
    train(*made, steps=1)
    optimizer.noise_multiplier = 2.0
    train(*made, steps=1)  # this is more noise than was paid for
    optimizer.noise_multiplier = 0.9
    with pytest.raises(PrivacyError, match="=0.9 is less than the 1 that the first of these 3 steps.* step 4"):
        train(*made, steps=1)
    optimizer.zero_grad()
    state = written(optimizer.state_dict())
    again, _ = repeatable()
    again[1].load_state_dict(state)
    again[1].noise_multiplier = 0.9
    with pytest.raises(PrivacyError, match="=0.9 is less than the 1"):
        train(*again, steps=1)
    optimizer.noise_multiplier = 1.0
    train(*made, steps=1)
    optimizer.noise_multiplier = 0.9
    train(*made, steps=1)
    assert sorted(optimizer.accountant.history) == [(0.9, 0.5, 1), (1.0, 0.5, 1)]


def resumed(state, model=None, data=None, **options):
    model = model or small_net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data or TensorDataset(*records()), batch_size=options.pop("batch_size", 4))
    options = {"bands": 3} | options
    made = PrivacyEngine().make_private(model, plain, loader, noise_multiplier=1.0, max_grad_norm=0.5, **options)
    before = copy.deepcopy(plain.state_dict())
    try:
        made[1].load_state_dict(state)
    except ValueError:
        assert plain.state_dict() == before and len(made[1].accountant) == made[1].tally.noise.steps == 0
        raise
    return made


def without_noise(state):
    state = copy.deepcopy(state)
    del state["param_groups"][0]["privacy"]["noise"]
    return state


def of_other_turns(state):
    state = copy.deepcopy(state)
    noise = state["param_groups"][0]["privacy"]["noise"]
    noise["turns"] = noise["turns"][1:]
    return state


def of_other_noise(state):
    state = copy.deepcopy(state)
    for past in state["param_groups"][0]["privacy"]["noise"]["past"]:
        past["head.bias"] = past["head.bias"][:2]
    return state


OTHERS = {
    "other bands": (lambda state: resumed(state, bands=2), "differs in bands: .* take 'noise' out of"),
    "independent noise": (lambda state: resumed(state, bands=1), "differs in bands"),
    "another batch size": (lambda state: resumed(state, batch_size=3), "differs in sample_rate"),
    "more records": (
        lambda state: resumed(state, data=TensorDataset(*records(23))),
        "differs in the number of records",
    ),
    "other records": (
        lambda state: resumed(state, data=Subset(TensorDataset(*records()), range(24))),
        "differs in the Subset's records",
    ),
    "other parameters": (lambda state: resumed(of_other_noise(state)), "differs in the parameters"),
    "other turns": (lambda state: resumed(of_other_turns(state)), "differs in the records' turns"),
    "no turns": (lambda state: resumed(without(state, "turns", None)), "malformed privacy record"),
    "without the noise": (
        lambda state: resumed(without(state, "past", [])),
        "lacks the noise of the last steps, which rank 0 alone saves",
    ),
    "something else": (lambda state: resumed(without(state, "steps", -1)), "steps must be from 1"),
    "nothing": (lambda state: resumed(without(state, "run", {})), "malformed privacy record"),
}


def without(state, key, value):
    state = copy.deepcopy(state)
    state["param_groups"][0]["privacy"]["noise"][key] = value
    return state


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_run(name):
    made, _ = repeatable()
    train(*made, steps=4)
    resume, match = OTHERS[name]
    with pytest.raises(ValueError, match=match):
        resume(written(made[1].state_dict()))


def test_a_run_may_begin_anew_with_its_account():
    made, _ = repeatable()
    train(*made, steps=4)
    again = resumed(without_noise(written(made[1].state_dict())), batch_size=3, bands=2)
    train(*again, steps=1)
    assert sorted(again[1].accountant.history) == [(1.0, 0.25, 1), (1.0, 0.5, 2)]


@pytest.mark.parametrize("bands", [0, -1, 1.5, True, "2"])
def test_bands_that_are_none(bands):
    with pytest.raises(ValueError, match="bands must be an integer >= 1"):
        private(noise=1.0, bands=bands)


def test_more_bands_than_batches_in_a_pass():
    with pytest.raises(ValueError, match="with bands=4 a record enters a step with 4 x sample_rate"):
        private(noise=1.0, batch_size=8, bands=4)


def test_a_model_that_changes_between_steps():
    made, _ = repeatable()
    train(*made, steps=1)
    made[0].to_standard_module().float()
    for x, y in made[2]:
        F.cross_entropy(made[0](x.float()), y).backward()
        with pytest.raises(PrivacyError, match="moved or cast since the last step"):
            made[1].step()
        break


def test_the_length_is_the_expected_number_of_parts():
    generator = Generator().manual_seed(0)
    sampler = PoissonBatches(Tally(60, 5, generator), 0.1, 200, generator, 3)
    found = sum(1 for _ in sampler)
    assert abs(found / len(sampler) - 1) < 0.05
