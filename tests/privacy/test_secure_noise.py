"""Noise from the secure generator: its distribution, that it can't be repeated, and that runs are never charged too little."""

import dataclasses
import json
import math
import os
import random
import signal
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from scipy import stats as statistics
from torch import Generator, nn

from fastloda import GhostClipper, PrivacyError, ghost_dp_step
from fastloda.privacy import correlated
from fastloda.privacy import secure_noise as secure
from fastloda.privacy.noise import gaussian
from fastloda.privacy.secure_noise import SecureGenerator, box_muller, uniform
from fastloda.synthesis.budget import Privacy, privacy_statement
from fastloda.synthesis.settings import FineTuning
from fastloda.training import run_state as run_state_module
from fastloda.training.checkpoint import CheckpointError, load_checkpoint
from fastloda.training.releases import intent_path, read_intent
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer

# ---- the distribution


@pytest.mark.parametrize("averaged", [1, 4])
def test_noise_is_normal(averaged, counts):
    """Check moments, tail, the Kolmogorov-Smirnov test, and that numbers are not correlated, not even within a pair."""
    n = counts(300_001, 10_000_001)
    values = gaussian(torch.Size([n]), 3.0, torch.device("cpu"), SecureGenerator(averaged)) / 3.0
    assert values.dtype == torch.float64 and values.shape == (n,)
    assert abs(values.std().item() - 1) <= 4 / math.sqrt(2 * n) and abs(values.mean().item()) <= 4 / math.sqrt(n)
    assert statistics.kstest(values[:100_000].numpy(), "norm").pvalue > 1e-4
    for power, expected, variance in ((3, 0, 15), (4, 3, 96)):
        assert abs(values.pow(power).mean().item() - expected) <= 5 * math.sqrt(variance / n)
    for lag in (1, 2, secure.CHUNK // 2, secure.CHUNK):
        assert abs((values[:-lag] * values[lag:]).mean().item()) <= 5 / math.sqrt(n - lag), lag


@pytest.mark.parametrize("averaged", [1, 4])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (secure.CHUNK + 3,)])
def test_any_shape(shape, averaged):
    values = SecureGenerator(averaged).normal(torch.Size(shape))
    assert values.shape == shape and len(values.unique()) == values.numel() and (values != 0).all()


def test_the_transform_is_box_and_mullers():
    """The angles and radii of the numbers give the uniforms back."""
    uniforms = uniform(20_000)
    x, y = box_muller(uniforms).view(2, -1)
    torch.testing.assert_close(torch.exp(-(x**2 + y**2) / 2), uniforms[:10_000], rtol=1e-12, atol=0)
    angle = (torch.atan2(y, x) / (2 * math.pi)) % 1
    torch.testing.assert_close(angle, uniforms[10_000:], rtol=0, atol=1e-14)


def test_uniforms_are_never_zero_and_reach_the_tail(monkeypatch):
    """All-zero bits give the smallest, 2^-64: 9.4 sigma. All ones give the largest, 1, which becomes 0, not NaN."""
    for byte, expected in ((b"\x00", 2.0**-64), (b"\xff", 1.0)):
        monkeypatch.setattr(os, "urandom", lambda n, byte=byte: byte * n)
        assert uniform(3).tolist() == [expected] * 3
        values = SecureGenerator(1).normal(torch.Size([4]))
        assert values.isfinite().all() and values.abs().max().item() == pytest.approx(
            math.sqrt(-2 * math.log(expected)), abs=1e-12
        )
        if byte == b"\x00":
            assert values.abs().max() > 9.4
            assert SecureGenerator(4).normal(torch.Size([4])).abs().max() > 16
    monkeypatch.undo()
    values = uniform(100_000)
    assert 0 < values.min() and values.max() <= 1 and statistics.kstest(values.numpy(), "uniform").pvalue > 1e-4
    low_bits = (values[values < 0.5] * 2**53) % 1
    assert (low_bits != 0).any(), "small uniforms are finer than 2^-53"


def test_every_bit_of_the_system_counts(monkeypatch):
    """Each of the 63 bits changes the uniform, unless float64 can't hold it."""
    for bit in range(63):
        monkeypatch.setattr(os, "urandom", lambda n, bit=bit: (1 << bit).to_bytes(8, "little") * (n // 8))
        assert uniform(1).item() == (2.0**bit + 0.5) * 2.0**-63


@pytest.mark.parametrize("averaged", [0, -1, 2.0, True, None])
def test_bad_counts_are_refused(averaged):
    with pytest.raises(ValueError, match=f"averaged.*{averaged}"):
        SecureGenerator(averaged)


# ---- it can't be repeated


def test_no_seed_and_no_state_repeat_it():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        draws.append(gaussian(torch.Size([64]), 1.0, torch.device("cpu"), SecureGenerator()))
    assert not torch.isin(*draws).any()
    before = torch.get_rng_state()
    SecureGenerator().normal(torch.Size([8]))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(hasattr(SecureGenerator(), name) for name in ("manual_seed", "set_state", "get_state"))


def test_a_forked_child_has_noise_of_its_own():
    source = SecureGenerator()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, source.normal(torch.Size([16])).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(reading, 1 << 12)), dtype=torch.float64)
    assert len(theirs) == 16 and not torch.isin(theirs, source.normal(torch.Size([16]))).any()


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_a_private_step_takes_it_as_its_generator(clipping):
    model = nn.Linear(200, 200, bias=False)
    clipper = GhostClipper(model, 2.0, clipping=clipping)
    clipper.privatize(0.5, 40.0, SecureGenerator())
    std = clipper.clipping.gradient_noise(0.5, 40.0) * 2.0 / 40.0
    assert model.weight.grad.double().std().item() == pytest.approx(std, rel=0.02)
    assert (clipper.max_grad_norm != 2.0) == (clipping == "adaptive")


def test_one_step_alone_takes_it():
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    before = model.weight.detach().clone()
    options = dict(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=2, generator=SecureGenerator())
    ghost_dp_step(model(torch.randn(2, 3)).sum(1), model, sgd, **options)
    assert (model.weight != before).all()


# ---- the trainer


SETTINGS = PrivateTraining(
    sample_rate=0.3,
    expected_batch_size=18,
    steps=12,
    noise_multiplier=1.0,
    delta=1e-5,
    micro_batch_size=60,
    schedule="cosine",
    secure_noise=True,
)


def losses(model, batch, generator):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trainer(settings=SETTINGS, **options) -> DPTrainer:
    generator = Generator().manual_seed(7)
    y = torch.randint(3, (60,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    data = torch.randn(60, 6, generator=generator) + y[:, None], y
    return DPTrainer(model, data, losses, settings, progress=False, **options)


def state_of(t: DPTrainer) -> dict:
    return load_checkpoint(t.checkpoint, t.run.fingerprint)


def test_it_has_no_seed():
    for make in (
        lambda: dataclasses.replace(SETTINGS, seed=0),
        lambda: FineTuning(seed=0, secure_noise=True),
    ):
        with pytest.raises(ValueError, match="seed.*0"):
            make()
    assert FineTuning(secure_noise=True).optimization()["secure_noise"] is True


def test_noise_comes_from_it_in_training(monkeypatch):
    drawn = []
    monkeypatch.setattr(secure, "uniform", lambda count: drawn.append(count) or torch.full((count,), 0.5).double())
    before = torch.cat([p.detach().flatten() for p in trainer().parameters.values()])
    t = trainer(
        dataclasses.replace(SETTINGS, sample_rate=1e-9, optimizer="sgd", learning_rate=1.0, schedule="constant")
    )
    t.train_step()
    moved = torch.cat([p.detach().flatten() for p in t.parameters.values()]) - before
    assert len(drawn) == 4  # four numbers are averaged, in one draw for all parameters
    assert len((moved * 1e4).round().unique()) == 2  # u = v = 1/2 gives only -r and 0
    drawn.clear()
    trainer(dataclasses.replace(SETTINGS, secure_noise=False)).train_step()
    assert not drawn


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "cryptographically secure"),
        ({"secure_noise": False}, "seeded by the operating system"),
        ({"secure_noise": False, "seed": 5}, "fixed seed: an experiment"),
    ],
)
def test_checkpoint_and_statement_say_where_the_noise_came_from(change, said, tmp_path):
    t = trainer(dataclasses.replace(SETTINGS, **change), checkpoint=tmp_path / "run.pt")
    t.train_step()
    t.save()
    assert said in state_of(t)["randomness"]
    statement = privacy_statement(t, Privacy(10.0, 1e-5, records=60, batch_size=18))
    assert said in statement["randomness"]
    assert statement["seed_was_fixed"] == ("seed" in change) and statement["secure_noise"] == (not change)
    assert json.loads(json.dumps(statement)) == statement
    assert ("secret" in state_of(t)) == bool(change)  # secure noise has no secret that could be stolen
    assert read_intent(t.checkpoint)["steps"] == 1


def test_the_report_says_where_the_noise_came_from():
    from fastloda.synthesis.report.demo import Outcome

    texts = ("a fixed seed", "a secure generator", "a fixed seed")
    statements = {("m", 1.0, seed): {"randomness": text, "records": 5} for seed, text in enumerate(texts)}
    outcome = Outcome(
        {}, statements, {}, {"delta": 1e-5, "public_images": 1, "synthetic_images": 1}, {}, {}, {}, {}, ""
    )
    outcome.__dict__["all_together"] = 1.0
    assert any("Randomness: a fixed seed; a secure generator." in paragraph for paragraph in outcome._statement())


# ---- interrupted runs


def test_steps_after_the_checkpoint_are_charged_and_not_made_again(tmp_path):
    path = tmp_path / "run.pt"
    first = trainer(checkpoint=path)
    for _ in range(3):
        first.train_step()
    first.save()
    for _ in range(4):
        first.train_step()
    with pytest.warns(UserWarning, match="4 steps"):
        second = trainer(checkpoint=path)
    assert second.step == 7 and second.epsilon() == first.epsilon()
    assert second.scheduler.last_epoch == 7
    second.train_step()
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 8 / 12)))
    second.fit()
    assert second.step == 12 and second.optimizer.state_dict()["state"][0]["step"] == 3 + 5
    with pytest.raises(PrivacyError, match="spent"):
        second.train_step()
    assert trainer(checkpoint=path).step == 12


def test_steps_before_the_first_checkpoint_are_charged_too(tmp_path):
    first = trainer(checkpoint=tmp_path / "run.pt")
    for _ in range(2):
        first.train_step()
    with pytest.warns(UserWarning, match="2 steps"):
        assert trainer(checkpoint=tmp_path / "run.pt").step == 2
    with pytest.warns(UserWarning, match="2 steps"):  # whichever noise the next run uses
        assert trainer(dataclasses.replace(SETTINGS, secure_noise=False), checkpoint=tmp_path / "run.pt").step == 2


def test_a_resumed_run_does_not_repeat_its_batches(tmp_path, monkeypatch):
    """New noise on the same batch would cost more than the step that is charged for it."""
    batches, sample = [], run_state_module.cyclic_sample
    monkeypatch.setattr(run_state_module, "cyclic_sample", lambda *a: batches.append(sample(*a)) or batches[-1])
    first = trainer(checkpoint=tmp_path / "run.pt")
    first.train_step()
    first.save()
    for _ in range(3):
        first.train_step()
    with pytest.warns(UserWarning, match="3 steps"):
        second = trainer(checkpoint=tmp_path / "run.pt")
    for _ in range(3):
        second.train_step()
    sets = [frozenset(batch.tolist()) for batch in batches]
    assert len(set(sets)) == 7, "60 records at 0.3: two equal batches do not happen"


@pytest.mark.parametrize("secure", [True, False])
def test_the_count_is_on_the_disk_before_the_release(tmp_path, monkeypatch, secure):
    path, seen, add_noise = tmp_path / "run.pt", [], correlated.add_noise

    def spying(*arguments):
        seen.append(read_intent(path)["steps"])
        return add_noise(*arguments)

    monkeypatch.setattr(correlated, "add_noise", spying)
    trainer(dataclasses.replace(SETTINGS, secure_noise=secure), checkpoint=path).fit()
    assert seen == list(range(1, 13))


def test_no_step_without_a_count(tmp_path, monkeypatch):
    """When the disk is full, nothing is released and nothing charged."""
    t = trainer(checkpoint=tmp_path / "run.pt")
    t.train_step()
    before = [p.detach().clone() for p in t.parameters.values()]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        t.train_step()
    assert t.step == 1 and all(map(torch.equal, before, t.parameters.values()))
    assert read_intent(t.checkpoint)["steps"] == 1


def test_a_missing_or_foreign_count_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    t = trainer(checkpoint=path)
    t.train_step()
    old = intent_path(path).read_bytes()
    t.train_step()
    t.save()
    for content in (None, b"", old[:-1], old):
        intent_path(path).unlink(missing_ok=True)
        if content is not None:
            intent_path(path).write_bytes(content)
        with pytest.raises(CheckpointError, match="gone or older"):
            trainer(checkpoint=path)
    record = json.loads(old)
    for content in ("", "[]", "{}", json.dumps(record | {"steps": "9"}), json.dumps(record | {"steps": None})):
        intent_path(path).write_text(content + "\n")
        with pytest.raises(CheckpointError, match="damaged"):
            trainer(checkpoint=path)
    intent_path(path).write_text(json.dumps(record | {"noise_multiplier": 9.0, "steps": 2}) + "\n")
    with pytest.raises(CheckpointError, match="another run"):
        trainer(checkpoint=path)


def test_killed_runs_are_never_under_charged(tmp_path, counts, proof):
    """A run is killed at random moments until it is done: the final count contains every release that a child announced."""
    path, chance = tmp_path / "run.pt", random.Random(1)
    settings = dataclasses.replace(SETTINGS, steps=counts(40, 1000))
    trainer(settings, checkpoint=path).save()
    released = kills = 0
    while trainer_steps(settings, path) < settings.steps:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            train_and_announce(settings, path, send)
        os.close(send)
        with os.fdopen(receive, "rb", buffering=0) as pipe:
            seen = sum(len(pipe.read(1)) for _ in range(chance.randint(1, 8)))
            time.sleep(chance.random() * 0.01)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            released += seen + len(pipe.read())
        kills += 1
        assert released <= trainer_steps(settings, path)
    proof("kill -9 with secure noise", f"{kills} kills, {released} releases seen, {settings.steps} charged")
    assert released > settings.steps / 2 and kills > 3


def trainer_steps(settings, path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer(settings, checkpoint=path).step


def train_and_announce(settings, path, send) -> None:
    """In a child process: train, and write a byte after each release."""
    warnings.simplefilter("ignore")
    privatize = GhostClipper.privatize

    def announcing(self, *arguments):
        privatize(self, *arguments)
        os.write(send, b".")

    GhostClipper.privatize = announcing
    try:
        trainer(settings, checkpoint=path, checkpoint_every=5).fit()
    finally:
        os._exit(0)  # the child must not return into the tests
