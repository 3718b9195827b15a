"""The trainer's promises: Poisson sampling, the budget, one noise per step, and runs that survive a kill bit for bit."""

import dataclasses
import os
import random
import signal
import sys
import threading
import time
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, chi2
from small_runs import losses, small_data
from torch import nn

from fastloda import GhostClipper, PrivacyError, attach_loda, compose_epsilon, make_private
from fastloda.files import write_atomically
from fastloda.training.checkpoint import CheckpointError, fingerprint, load_checkpoint, save_checkpoint
from fastloda.training.sampling import micro_batches, poisson_sample
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer

SETTINGS = PrivateTraining(
    sample_rate=0.2,
    expected_batch_size=12,
    steps=8,
    noise_multiplier=1.0,
    delta=1e-5,
    learning_rate=1e-2,
    micro_batch_size=5,
    schedule="cosine",
    warmup=2,
    ema_decay=0.9,
    seed=3,
)


def small_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv2d(4, 4, 3),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
        attach_loda(model, rank=1)
    return model


def trainer(settings=SETTINGS, model=None, **options) -> DPTrainer:
    return DPTrainer(model or small_model(), small_data(), losses, settings, progress=False, **options)


def values(t: DPTrainer) -> dict[str, torch.Tensor]:
    return t.model.state_dict() | {f"average.{name}": value for name, value in t.average.values.items()}


def assert_same(a: DPTrainer, b: DPTrainer) -> None:
    assert a.step == b.step
    for (name, x), y in zip(values(a).items(), values(b).values()):
        assert torch.equal(x, y), name


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_inclusion_has_the_stated_rate_and_is_pairwise_independent():
    records, rate, draws = 20, 0.1, 4000
    generator = torch.Generator().manual_seed(0)
    included = torch.zeros(draws, records)
    for row in included:
        row[poisson_sample(records, rate, generator)] = 1
    assert binomtest(int(included.sum()), draws * records, rate).pvalue > 1e-3
    pairs = (included.T @ included)[torch.triu_indices(records, records, 1).unbind()]
    expected = draws * rate**2
    statistic = float(((pairs - expected) ** 2 / (expected * (1 - rate**2))).sum())
    assert chi2.sf(statistic, len(pairs)) > 1e-3
    assert len({int(n) for n in included.sum(1)}) > 5  # batch sizes vary, unlike those of shuffled epochs


def test_tiny_rates_are_not_inflated_by_float32():
    """A float32 uniform is a multiple of 2^-24, and 0 if it is smaller: 0 would be below any rate, and count as a draw."""
    generator = torch.Generator().manual_seed(0)
    assert sum(len(poisson_sample(1_000_000, 1e-9, generator)) for _ in range(20)) <= 2


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_micro_batches_hold_every_record_once(count, fixed):
    indices = torch.arange(100, 100 + count)
    parts = list(micro_batches(indices, 5, fixed))
    assert torch.equal(torch.cat([chosen[mask] for chosen, mask in parts] or [indices]), indices)
    if fixed:
        assert all(len(chosen) == 5 for chosen, _ in parts)


# -- training ----------------------------------------------------------------------------------------------------------


def test_micro_batch_size_and_padding_do_not_change_the_run():
    def one_at_a_time(model, batch, generator):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    runs = []
    for size, fixed in ((60, True), (5, True), (7, False)):
        settings = dataclasses.replace(SETTINGS, micro_batch_size=size, fixed_shape=fixed)
        model = small_model().double().eval()
        x, y = small_data()
        runs.append(DPTrainer(model, (x.double(), y), one_at_a_time, settings, progress=False).fit())
    for other in runs[1:]:
        for name, value in values(runs[0]).items():
            torch.testing.assert_close(values(other)[name], value, rtol=1e-9, atol=1e-12)


def test_empty_batches_are_noised_and_counted():
    settings = dataclasses.replace(SETTINGS, sample_rate=1e-6, steps=200, noise_multiplier=2.0)
    t = trainer(settings)
    before = {name: p.detach().clone() for name, p in t.parameters.items()}
    for _ in range(200):
        assert t.train_step().samples == 0
    assert t.step == 200
    assert all((p != before[name]).all() for name, p in t.parameters.items())


def test_training_stops_before_the_budget_is_exceeded():
    with pytest.warns(UserWarning, match="stops after"):
        t = trainer(dataclasses.replace(SETTINGS, target_epsilon=3.0, steps=30, warmup=0)).fit()
    assert 0 < t.step < 30
    assert t.epsilon() <= 3.0 < t.accountant.epsilon(SETTINGS.delta, t.step + 1)
    with pytest.raises(PrivacyError, match="spent"):
        t.train_step()


def test_the_divisor_is_the_expected_batch_size():
    """Without noise, SGD moves by lr * clipped sum / expected_batch_size, whatever the actual batch size."""
    settings = dataclasses.replace(
        SETTINGS,
        sample_rate=1.0,
        noise_multiplier=0.0,
        optimizer="sgd",
        steps=1,
        warmup=0,
        max_grad_norm=1e-3,
        learning_rate=1.0,
    )
    moves = []
    for expected in (30.0, 60.0):
        t = trainer(dataclasses.replace(settings, expected_batch_size=expected))
        before = torch.cat([p.detach().flatten().clone() for p in t.parameters.values()])
        torch.manual_seed(0)  # dropout draws from the global generator
        t.fit()
        moves.append(torch.cat([p.detach().flatten() for p in t.parameters.values()]) - before)
    torch.testing.assert_close(moves[0], 2 * moves[1], rtol=1e-3, atol=1e-9)


def test_learning_lowers_the_loss():
    settings = dataclasses.replace(
        SETTINGS, sample_rate=0.5, expected_batch_size=30, steps=60, noise_multiplier=0.02, micro_batch_size=60, seed=0
    )
    t = trainer(dataclasses.replace(settings, learning_rate=0.03))
    losses = [t.train_step().mean_loss for _ in range(settings.steps)]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2


def test_a_dataset_serves_as_well_as_tensors():
    data = torch.utils.data.TensorDataset(*small_data())
    from_dataset = DPTrainer(small_model(), data, losses, SETTINGS, progress=False)
    from_tensors = trainer()
    for t in (from_dataset, from_tensors):
        torch.manual_seed(0)
        t.fit()
    assert_same(from_dataset, from_tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"delta": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("inf")},
        {"steps": 0},
        {"steps": 2.5},
        {"views": 0},
        {"micro_batch_size": True},
        {"expected_batch_size": 0},
        {"learning_rate": float("nan")},
        {"ema_decay": 1.0},
        {"optimizer": "lbfgs"},
        {"target_epsilon": -1.0},
        {"warmup": 9},
    ],
    ids=str,
)
def test_bad_settings_are_refused(change):
    with pytest.raises((ValueError, TypeError), match=r"."):
        dataclasses.replace(SETTINGS, **change)


def test_bad_data_and_models_are_refused():
    for data in ((), (torch.zeros(3), torch.zeros(4)), (torch.zeros(0),), iter([1])):
        with pytest.raises(ValueError, match="data"):
            DPTrainer(small_model(), data, losses, SETTINGS)
    with pytest.raises(PrivacyError):
        DPTrainer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), small_data(), losses, SETTINGS)
    with pytest.raises(ValueError, match="losses"):
        DPTrainer(small_model(), small_data(), lambda m, b, g: losses(m, b, g)[:-1], SETTINGS, progress=False).fit()


def test_a_model_on_an_apple_gpu_is_refused_by_name():
    """float64 tensors can't be made there, which would otherwise give one of PyTorch's errors."""

    class OnAppleGPU(nn.Module):
        def parameters(self, recurse=True):
            return iter([types.SimpleNamespace(device=torch.device("mps"))])

    with pytest.raises(ValueError, match="float64, which Apple's GPUs .* lack"):
        trainer(model=OnAppleGPU())


class Records(torch.utils.data.Dataset):
    """A data set of small_data, whose records have the form that `form` makes."""

    def __init__(self, form):
        self.x, self.y = small_data()
        self.form = form

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.form(self.x[i], self.y[i])


def of_dict(model, batch, generator):
    return losses(model, (batch["x"], batch["y"]), generator)


x, y = small_data()
FORMS = {
    "arrays": ((x.numpy(), y.numpy()), losses),
    "an array and a tensor": ((x.numpy(), y), losses),
    "a dict of columns": ({"x": x, "y": y.numpy()}, of_dict),
    "records of arrays": (Records(lambda x, y: (x.numpy(), int(y))), losses),
    "dicts": (Records(lambda x, y: {"x": x, "y": int(y)}), of_dict),
    "nested": (
        Records(lambda x, y: (x, {"name": f"is {y}", "y": (y, 1.0)})),
        lambda m, b, g: losses(m, (b[0], b[1]["y"][0]), g),
    ),
    "a list of records": ([(a, int(b)) for a, b in zip(x, y)], losses),
    "one tensor": (x, lambda m, b, g: losses(m, (b, torch.zeros(len(b), dtype=torch.long)), g)),
}


@pytest.mark.parametrize("form", FORMS)
def test_records_of_any_usual_form_train(form):
    data, of_form = FORMS[form]
    runs = []
    for t in (DPTrainer(small_model(), data, of_form, SETTINGS, progress=False), trainer()):
        torch.manual_seed(0)
        runs.append(t.fit())
    assert runs[0].records == 60
    if form != "one tensor":
        assert_same(*runs)


def a_mean(model, batch, generator):
    return losses(model, batch, generator).mean()


SLIPS = {
    "a mean": (
        {"losses": a_mean},
        "losses.*one floating-point number for each sample and view.*reduction='none'.*shape \\(\\)",
    ),
    "a number": ({"losses": lambda m, b, g: a_mean(m, b, g).item()}, "losses.*got [0-9]"),
    "logits": ({"losses": lambda m, b, g: m(b[0])}, "losses.*shape \\(5, 3\\)"),
    "too few": ({"losses": lambda m, b, g: losses(m, b, g)[1:]}, "losses.*shape \\(4,\\)"),
    "views": ({"settings": {"views": 2}}, "5 samples x 2 views"),
    "integers": ({"losses": lambda m, b, g: (m(b[0])[:, 0] > 0).long()}, "losses.*int64"),
    "objects": ({"data": Records(lambda x, y: (x, object()))}, "records can't be made a batch"),
    "ragged": ({"data": Records(lambda x, y: (x[:, : 1 + int(y)], y))}, "records can't be made a batch"),
    "a list of records that are tensors": ({"data": list(x)}, "may be records or columns.*torch.stack"),
    "a list of arrays": ({"data": list(x.numpy())}, "may be records or columns"),
    "a list of columns": ({"data": [x, y]}, "may be records or columns.*a tuple of columns"),
    "a list beside a column": ({"data": (x, y.tolist())}, "tuple of columns, of which one is a list"),
    "a dict of lists": ({"data": {"x": x.tolist(), "y": y.tolist()}}, "dict of columns, of which one is a list"),
    "a dict of records": ({"data": {i: (a, b) for i, (a, b) in enumerate(zip(x, y))}}, "of which one is a tuple"),
    "no columns": ({"data": (x.numpy(), y[:-1])}, "one record per row"),
    "no records": ({"data": {"x": x[:0]}}, "one record per row"),
    "an expected batch 100 times too large": (
        {"settings": {"expected_batch_size": 1200}},
        "expected_batch_size.*0.2 x 60 = 12, got 1200",
    ),
    "and 100 times too small": ({"settings": {"expected_batch_size": 0.12}}, "expected_batch_size.*got 0.12"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_named_before_anything_changes(slip):
    wrong, said = SLIPS[slip]
    model, before, draws = small_model(), torch.get_rng_state(), {"losses": losses, "data": small_data()} | wrong
    values_before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = dataclasses.replace(SETTINGS, **draws.pop("settings", {}))
    with pytest.raises(ValueError, match=said):
        DPTrainer(model, draws["data"], draws["losses"], settings, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, values_before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("place", ["folder", "file/run.pt", "file/in/run.pt"])
def test_a_checkpoint_that_cannot_be_written_is_named_at_once(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write .*{place}"):
        trainer(checkpoint=tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")


def test_the_checkpoints_folder_is_made(tmp_path):
    trainer(checkpoint=tmp_path / "missing" / "too" / "run.pt").fit()
    assert (tmp_path / "missing" / "too" / "run.pt").exists()


# -- budget spent on nothing -------------------------------------------------------------------------------------------


def overflowing(share: float):
    def made(model, batch, generator):
        lost = torch.rand(len(batch[0]), generator=generator) < share
        return torch.where(lost, torch.inf, 1.0) * losses(model, batch, generator)

    return made


def test_a_run_whose_samples_all_overflow_warns_and_stops(tmp_path):
    path = tmp_path / "run.pt"
    settings = dataclasses.replace(SETTINGS, steps=30)
    t = DPTrainer(small_model(), small_data(), overflowing(1.0), settings, progress=False, checkpoint=path)
    with (
        pytest.warns(UserWarning, match="samples had a gradient that is not finite"),
        pytest.raises(RuntimeError, match="of the last 3 steps had no finite gradient"),
    ):
        t.fit()
    assert t.step == 3
    mended = trainer(settings, checkpoint=path)
    assert mended.step == 3 and mended.fit().step == 30


@pytest.mark.parametrize(("share", "rate"), [(0.5, 0.2), (1.0, 1 / 60)])
def test_a_run_with_some_finite_samples_or_hardly_any_goes_on(share, rate):
    """Half of the samples overflow; or all, but batches have about one sample, and few samples prove little."""
    settings = dataclasses.replace(SETTINGS, sample_rate=rate, expected_batch_size=60 * rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if share == 1 else "error")
        assert DPTrainer(small_model(), small_data(), overflowing(share), settings, progress=False).fit().step == 8


def test_parameters_that_are_not_finite_stop_a_run_at_once():
    t = trainer()
    t.train_step()
    next(iter(t.parameters.values())).data.view(-1)[0] = torch.nan
    with pytest.raises(RuntimeError, match="'0.loda_A' is not finite after step 1"):
        t.train_step()
    assert t.step == 1


def test_loops_are_warned_of_a_wasted_step_too():
    model, (x, y) = nn.Linear(6, 3), (torch.randn(20, 6), torch.randint(3, (20,)))
    clipper = GhostClipper(model, 1.0)
    for factor, wasted in ((1.0, False), (torch.inf, True)):
        clipper.accumulate(F.cross_entropy(model(x[:10]), y[:10], reduction="none") * factor)
        clipper.accumulate(F.cross_entropy(model(x[10:]), y[10:], reduction="none") * factor)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            clipper.privatize(1.0, 20.0)
            clipper.privatize(1.0, 20.0)  # an empty batch wastes nothing
        assert [("20 of 20" in str(w.message)) for w in told] == [True] * wasted
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    made = make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    with pytest.warns(UserWarning, match="not finite and contributed zero"):
        for a, b in made[2]:
            (F.cross_entropy(made[0](a), b) * torch.inf).backward()
            made[1].step()


# -- interruptions -----------------------------------------------------------------------------------------------------


def at_call(number: int, act):
    calls = []

    def made(*arguments):
        calls.append(None)
        if len(calls) == number:
            act()
        return losses(*arguments)

    return made


def raise_interrupt():
    raise KeyboardInterrupt


INTERRUPTIONS = {
    "Ctrl-C": (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
    "twice": (lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)], KeyboardInterrupt),
    "in the middle": (raise_interrupt, KeyboardInterrupt),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
    "an error": (lambda: 1 / 0, ZeroDivisionError),
}


@pytest.mark.parametrize("how", INTERRUPTIONS)
@pytest.mark.parametrize("seed", [3, None])
def test_an_interrupted_run_continues_where_it_was(tmp_path, how, seed):
    act, raised = INTERRUPTIONS[how]
    path, settings = tmp_path / "run.pt", dataclasses.replace(SETTINGS, seed=seed)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores this signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        torch.manual_seed(5)
        acted = []

        def after_three_steps(*arguments):
            if first.step == 3 and not acted:
                acted.append(True)
                act()
            return losses(*arguments)

        first = DPTrainer(small_model(), small_data(), after_three_steps, settings, progress=False, checkpoint=path)
        with pytest.raises(raised):
            first.fit()
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    assert 0 < first.step < SETTINGS.steps
    second = trainer(settings, checkpoint=path)
    assert_same(first, second)
    first.losses = losses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(second.fit(), trainer(settings, checkpoint=path))
        torch.manual_seed(5)
        if seed is not None:
            assert_same(second, trainer(settings).fit())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_ends_no_run(number):
    """nohup ignores SIGINT, and so does a background job of a shell script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        run = trainer()
        run.losses = lambda *arguments: (os.kill(os.getpid(), number), losses(*arguments))[1]
        run.fit()
        assert run.step == SETTINGS.steps and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_that_python_does_not_know_is_left_alone(monkeypatch):
    known = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else known(number))
    assert trainer().fit().step == SETTINGS.steps


def test_a_killed_run_continues_from_its_first_step_on(tmp_path):
    """After kill -9 in the second step, the first checkpoint exists, and the run can be completed."""
    settings, path = dataclasses.replace(SETTINGS, seed=None), tmp_path / "run.pt"
    child = os.fork()
    if child == 0:
        kill = at_call(10, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            DPTrainer(small_model(), small_data(), kill, settings, progress=False, checkpoint=path).fit()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer(settings, checkpoint=path).fit().step == SETTINGS.steps


def test_fit_works_outside_of_the_main_thread():
    t = trainer()
    thread = threading.Thread(target=t.fit)
    thread.start()
    thread.join()
    assert t.step == SETTINGS.steps


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "saves"), [(0.0, SETTINGS.steps - 1), (300.0, 0)])
def test_long_steps_are_saved_by_time(tmp_path, monkeypatch, seconds, saves):
    """The first save comes before the first step, the last one after the last step."""
    monkeypatch.setattr("fastloda.training.trainer.SAVE_SECONDS", seconds)
    path, seen = tmp_path / "c.pt", []
    t = trainer(checkpoint=path, checkpoint_every=1000, callbacks=[lambda *_: seen.append(path.stat().st_mtime_ns)])
    t.save()
    before = path.stat().st_mtime_ns
    t.fit()
    assert len(seen) == SETTINGS.steps and len({before, *seen}) - 1 == saves


def test_what_was_released_before_counts_and_a_run_resumes_with_it_alone(tmp_path):
    before = dataclasses.replace(SETTINGS, earlier=((1.0, 5.0, 1),), target_epsilon=30.0)
    first = trainer(before, checkpoint=tmp_path / "c.pt", checkpoint_every=1)
    assert first.epsilon() == compose_epsilon([(1.0, 5.0, 1)], 1e-5) > 0
    for _ in range(3):
        first.train_step()
        first.save()
    assert first.epsilon() == compose_epsilon([(1.0, 5.0, 1), (0.2, 1.0, 3)], 1e-5)
    again = trainer(before, checkpoint=tmp_path / "c.pt")
    assert_same(first, again)
    assert again.epsilon() == first.epsilon()
    with pytest.raises(CheckpointError, match="earlier is"):
        trainer(checkpoint=tmp_path / "c.pt")
    poor = dataclasses.replace(SETTINGS, earlier=((1.0, 1.0, 1),), target_epsilon=first.epsilon())
    with (
        pytest.warns(UserWarning, match="training stops after 0"),
        pytest.raises(PrivacyError, match="no step is left"),
    ):
        trainer(poor).train_step()


def test_resume_is_bitwise_equal(tmp_path, counts, proof):
    resumes = counts(4, 100)
    torch.manual_seed(5)
    whole = trainer().fit()
    equal = 0
    for i in range(resumes):
        path = tmp_path / f"{i}.pt"
        torch.manual_seed(5)
        first = trainer(checkpoint=path)
        for _ in range(1 + i % (SETTINGS.steps - 1)):
            first.train_step()
        first.save()
        first.train_step()  # lost in the crash, and taken again below
        torch.manual_seed(99)
        second = trainer(checkpoint=path).fit()
        assert_same(whole, second)
        equal += 1
    proof("resumes bitwise equal", f"{equal} of {resumes}")


def test_kill_during_save_leaves_a_whole_checkpoint_that_never_under_counts(tmp_path, counts, proof):
    """A child saves repeatedly and is killed at a random moment; what it announced as saved must be on disk."""
    kills, path, chance = counts(40, 1000), tmp_path / "run.pt", random.Random(0)
    model = small_model()
    mark = fingerprint(model)
    state = {"tensor": torch.arange(50_000), "steps": 0}
    save_checkpoint(path, state, mark)
    corrupt = under_counted = 0
    for _ in range(kills):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            steps = load_checkpoint(path, mark)["steps"]
            while True:
                steps += 1
                save_checkpoint(path, {"tensor": torch.arange(50_000) + steps, "steps": steps}, mark)
                os.write(send, steps.to_bytes(8, "little"))
        os.close(send)
        time.sleep(0.002 + chance.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(receive, "rb") as pipe:
            announced = pipe.read()
        try:
            found = load_checkpoint(path, mark)
            corrupt += int(found["tensor"][0]) != found["steps"]
            if announced:
                under_counted += found["steps"] < int.from_bytes(announced[-8:], "little")
        except CheckpointError:
            corrupt += 1
    proof("kill -9 during a save", f"{kills} kills, {corrupt} corrupt, {under_counted} under-counted")
    assert (corrupt, under_counted) == (0, 0)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"junk", b"\x80\x04X", None])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    trainer(checkpoint=path).save()
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(checkpoint=path)


def test_a_checkpoint_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    torch.save(Bomb(), tmp_path / "run.pt")
    with pytest.raises(CheckpointError):
        trainer(checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "exploded").exists()


def test_checkpoints_of_another_model_or_run_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    t = trainer(checkpoint=path)
    t.train_step()
    t.save()
    with pytest.raises(CheckpointError, match="another model"):
        trainer(model=small_model(seed=1), checkpoint=path)
    with pytest.raises(CheckpointError, match="noise_multiplier is 1.0 there and 0.5 here"):
        trainer(dataclasses.replace(SETTINGS, noise_multiplier=0.5), checkpoint=path)
    with pytest.raises(CheckpointError, match="records"):
        DPTrainer(small_model(), small_data(61), losses, SETTINGS, checkpoint=path)


def test_noise_without_a_seed_ignores_manual_seed():
    settings = dataclasses.replace(SETTINGS, seed=None, steps=1, warmup=0)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(values(trainer(settings).fit()))
    assert any(not torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values()))
