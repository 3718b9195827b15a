"""No two sums get the same noise, no release is uncounted, and only those that were there at the start take part in sums."""

import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, nn

import fastloda
from fastloda import DPTrainer, GhostClipper, PrivacyError, PrivateTraining
from fastloda.privacy import correlated
from fastloda.privacy import noise as noise_module
from fastloda.privacy.step import ghost_dp_step
from fastloda.randomness import Secret
from fastloda.training.releases import Releases, intent_path

SETTINGS = PrivateTraining(
    sample_rate=0.3,
    expected_batch_size=12,
    steps=8,
    noise_multiplier=50.0,
    delta=1e-5,
    micro_batch_size=64,
    optimizer="sgd",
)
RECORDS = 40


def losses(model, batch, generator):
    torch.randn(batch[1].shape, generator=generator)  # so that with another shape each record gets other noise
    noise = torch.randn(batch[0].shape, generator=generator)
    return F.cross_entropy(model(batch[0] + 0.1 * noise), batch[1], reduction="none")


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def small_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = Generator().manual_seed(7)
    y = torch.randint(3, (RECORDS,), generator=generator)
    return torch.randn(RECORDS, 6, generator=generator) + y[:, None], y


class NumpyAugmented(torch.utils.data.Dataset):
    """Records with noise from the global generators of NumPy and Python."""

    def __init__(self):
        self.x, self.y = small_data()

    def __len__(self):
        return RECORDS

    def __getitem__(self, i):
        return self.x[i] + np.float32(np.random.randn()) + random.random(), self.y[i]


def trainer(settings=SETTINGS, *, data=None, losses=losses, **options) -> DPTrainer:
    return DPTrainer(small_model(), data or small_data(), losses, settings, progress=False, **options)


def vector(t: DPTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in t.parameters.values()])


@pytest.fixture
def released(monkeypatch):
    """Collect (clipped sum, noise) of each release."""
    pairs, add_noise, gaussian = [], correlated.add_noise, noise_module.gaussian

    def sum_seen(total, *arguments):
        pairs.append([total.clone()])
        return add_noise(total, *arguments)

    def noise_seen(*arguments):
        noise = gaussian(*arguments)
        pairs[-1].append(noise.clone())
        return noise

    monkeypatch.setattr(correlated, "add_noise", sum_seen)
    monkeypatch.setattr(noise_module, "gaussian", noise_seen)
    return pairs


def assert_noise_never_repeats(pairs) -> None:
    for i, (total, noise) in enumerate(pairs):
        for other_total, other_noise in pairs[:i]:
            assert torch.equal(total, other_total) == torch.equal(noise, other_noise)


# ---- a step taken again


def other_losses(model, batch, generator):
    return 1.5 * losses(model, batch, generator)


def changed_data():
    x, y = small_data()
    return x + 0.01, y


CHANGES = {
    "shapes": lambda: (dataclasses.replace(SETTINGS, fixed_shape=False), {}),
    "losses": lambda: (SETTINGS, {"losses": other_losses}),
    "data": lambda: (SETTINGS, {"data": changed_data()}),
}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_over_another_sum_has_other_noise_and_stays_charged(tmp_path, released, change, seed):
    path, seeded = tmp_path / "run.pt", dataclasses.replace(SETTINGS, seed=seed)
    first = trainer(seeded, checkpoint=path)
    first.train_step()
    first.save()
    for _ in range(4):
        first.train_step()
    settings, options = CHANGES[change]()
    second = trainer(dataclasses.replace(settings, seed=seed), checkpoint=path, **options)
    assert second.step == 1
    with pytest.warns(UserWarning, match="4 steps gave other sums.*charged"):
        second.train_step()
    assert second.step == 6 and second.epsilon() == second.accountant.epsilon(1e-5, 6)
    assert trainer(dataclasses.replace(settings, seed=seed), checkpoint=path, **options).step == 5  # saved when charged
    second.fit()
    assert second.step == SETTINGS.steps
    assert_noise_never_repeats(released)
    assert len(released) == 8  # as many as were charged


def test_only_what_differs_is_charged_and_its_batches_are_not_taken_again(tmp_path, monkeypatch):
    """The losses change from a certain step on: earlier steps are repeated bit for bit, and no batch is sampled twice."""
    path, batches, sample = tmp_path / "run.pt", [], fastloda.training.run_state.cyclic_sample
    monkeypatch.setattr(
        fastloda.training.run_state, "cyclic_sample", lambda *a: batches.append(sample(*a)) or batches[-1]
    )
    first = trainer(checkpoint=path)
    first.save()
    states = [vector(first)]
    for _ in range(4):
        first.train_step()
        states.append(vector(first))
    second = trainer(checkpoint=path, losses=lambda *a: losses(*a) * (1.0 if second.step < 2 else 1.001))
    for step in (1, 2):
        second.train_step()
        assert second.step == step and torch.equal(vector(second), states[step])
    with pytest.warns(UserWarning, match="2 steps gave other sums"):
        second.train_step()
    assert second.step == 5
    drawn = [tuple(batch.tolist()) for batch in batches]
    assert drawn[4:7] == drawn[:3] and drawn[7] not in drawn[:7]


@pytest.mark.parametrize("change", ["bound", "device"])
def test_a_step_over_the_same_sum_with_other_noise_is_another_release(tmp_path, released, monkeypatch, change):
    """The bound scales the noise, and each kind of device draws other numbers: S + z and S + 2z together reveal S."""
    path = tmp_path / "run.pt"
    first = trainer(checkpoint=path, losses=lambda *a: 1e-6 * losses(*a))  # far below the bound
    first.save()
    first.train_step()
    second = trainer(checkpoint=path, losses=lambda *a: 1e-6 * losses(*a))
    if change == "bound":
        second.clipper.max_grad_norm = 2.0
    else:
        monkeypatch.setattr(fastloda.training.run_state, "draws_alike", lambda device: "another GPU")
    with pytest.warns(UserWarning, match="1 steps gave other sums"):
        second.train_step()
    assert second.step == 2 and len(released) == 2
    assert_noise_never_repeats(released)


def test_a_run_that_ends_while_it_is_charged_is_at_its_end(tmp_path):
    path = tmp_path / "run.pt"
    first = trainer(checkpoint=path)
    first.save()
    while first.step < SETTINGS.steps:
        first.train_step()
    second = trainer(checkpoint=path, losses=other_losses)
    before = vector(second)
    with pytest.warns(UserWarning, match="8 steps"):
        second.fit()
    assert second.step == SETTINGS.steps and torch.equal(vector(second), before)
    with pytest.raises(PrivacyError, match="no step is left"):
        second.train_step()


@pytest.mark.parametrize("seed", [None, 3])
def test_an_unchanged_run_resumes_bit_for_bit_with_its_data_sets_random_states(tmp_path, seed):
    path, settings = tmp_path / "run.pt", dataclasses.replace(SETTINGS, seed=seed)
    first = trainer(settings, data=NumpyAugmented(), checkpoint=path)
    for _ in range(2):
        first.train_step()
    first.save()
    saved = path.read_bytes()
    first.fit()
    np.random.seed(99)
    random.seed(99)
    assert trainer(settings, data=NumpyAugmented(), checkpoint=path).step == 8
    path.write_bytes(saved)
    again = trainer(settings, data=NumpyAugmented(), checkpoint=path)
    assert again.step == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(vector(again.fit()), vector(first))


def test_two_runs_from_one_checkpoint_share_no_noise(tmp_path, released):
    """Both files are copied: neither run knows of the other, but their noises differ because their sums do."""
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    trainer(checkpoint=paths[0]).save()
    paths[1].write_bytes(paths[0].read_bytes())
    runs = [trainer(checkpoint=path, losses=made) for path, made in zip(paths, (losses, other_losses))]
    for run in runs:
        run.train_step()
    assert len(released) == 2
    assert_noise_never_repeats(released)


def test_without_the_list_of_releases_batches_and_noise_start_anew(tmp_path):
    path = tmp_path / "run.pt"
    first = trainer(checkpoint=path)
    for _ in range(2):
        first.train_step()
    first.save()
    key, lines = first.run.secret.key, intent_path(path).read_bytes().splitlines(keepends=True)
    for content in (None, lines[0]):
        intent_path(path).unlink()
        if content:
            intent_path(path).write_bytes(content)
        with pytest.warns(UserWarning, match="gone or older"):
            second = trainer(checkpoint=path)
        assert second.step == 2 and second.run.secret.key != key
        second.train_step()
        assert Releases(path).last == 3


def test_the_list_tells_nothing_without_the_key(tmp_path):
    path = tmp_path / "run.pt"
    runs = []
    for name in ("a", "b"):
        t = trainer(checkpoint=tmp_path / name)
        t.train_step()
        runs.append(json.loads(intent_path(tmp_path / name).read_text())["sum"])
    assert runs[0] != runs[1]
    sums = [torch.zeros(4, dtype=torch.float64)]
    one, two = Secret(b"1" * 32), Secret(b"2" * 32)
    assert one.digest("sums 1", sums) == Secret(b"1" * 32).digest("sums 1", sums)
    assert (
        len({s.digest(n, t) for s in (one, two) for n in ("sums 1", "sums 2") for t in (sums, [sums[0] + 1e-300])}) == 8
    )
    assert not path.exists()


def test_an_unfinished_line_was_never_released(tmp_path):
    path = tmp_path / "run.pt"
    first = trainer(checkpoint=path)
    first.save()
    for _ in range(2):
        first.train_step()
    whole = intent_path(path).read_bytes()
    intent_path(path).write_bytes(whole + b'{"steps": 3, "su')
    second = trainer(checkpoint=path)
    while second.step < 3:
        second.train_step()
    assert Releases(path).last == 3 and intent_path(path).read_bytes().startswith(whole + b'{"steps": 3, "sum"')


def test_two_processes_on_one_checkpoint_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    first, second = trainer(checkpoint=path), trainer(checkpoint=path)
    first.train_step()
    first.train_step()
    with pytest.raises(PrivacyError, match="another process"):
        second.train_step()
    first.train_step()
    assert Releases(path).last == 3


@pytest.mark.parametrize("before", [0, 3])
def test_of_many_processes_at_one_moment_one_writes(tmp_path, monkeypatch, before):
    """All have read the same list; one process writes the next line, or the first, however slow the others are."""
    path, at, processes = tmp_path / "run.pt", multiprocessing.get_context("fork"), 4
    start = Releases(path)
    for number in range(1, before + 1):
        start.add({"steps": number}, "")
    barrier, results, look = at.Barrier(processes), at.Queue(), Releases._check_size

    def look_slowly(self, found: int) -> None:
        look(self, found)
        time.sleep(0.1)

    monkeypatch.setattr(Releases, "_check_size", look_slowly)

    def write(mine: str) -> None:
        releases = Releases(path)
        barrier.wait()
        try:
            for number in range(before + 1, before + 6):
                releases.add({"steps": number}, mine)
            results.put(mine)
        except PrivacyError:
            results.put(None)

    children = [at.Process(target=write, args=(str(i),)) for i in range(processes)]
    for child in children:
        child.start()
    done = [name for name in (results.get(timeout=60) for _ in children) if name]
    for child in children:
        child.join()
    assert len(done) <= 1, "two processes each counted their own releases only"
    sums = Releases(path).sums
    assert sorted(sums) == list(range(1, len(sums) + 1))
    assert len(set(sums[number] for number in range(before + 1, len(sums) + 1))) == 1
    assert len(intent_path(path).read_text().splitlines()) == len(sums)


def test_the_lists_first_line_unfinished_was_never_released(tmp_path):
    path = tmp_path / "run.pt"
    first = trainer(checkpoint=path)
    first.save()
    intent_path(path).write_text('{"sample_rate": 0.3, "st')
    second = trainer(checkpoint=path)
    second.train_step()
    assert second.step == Releases(path).last == 1


@pytest.mark.parametrize("way", ["fit", "save"])
def test_a_refused_run_leaves_the_checkpoint_of_the_other(tmp_path, way):
    path = tmp_path / "run.pt"
    first, second = trainer(checkpoint=path), trainer(checkpoint=path)
    first.fit()
    saved = path.read_bytes()
    with pytest.raises(PrivacyError, match="another process"):
        getattr(second, way)()
    assert path.read_bytes() == saved and trainer(checkpoint=path).step == SETTINGS.steps


# ---- a failed step


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_step_can_be_taken_again_as_if_it_had_not_been(error):
    settings = dataclasses.replace(SETTINGS, seed=3, micro_batch_size=5)
    whole = trainer(settings).fit()
    failing, calls = [], []

    def fail_once(*arguments):
        calls.append(None)
        made = losses(*arguments)  # which draws from the generator first
        if failing and len(calls) >= failing[-1]:
            failing.clear()
            raise error("on purpose")
        return made

    t = trainer(settings, losses=fail_once)
    t.train_step()
    failing.append(len(calls) + 2)  # the second micro-batch; this step has no look
    with pytest.raises(error, match="on purpose"):
        t.train_step()
    assert torch.equal(vector(t.fit()), vector(whole))


# ---- forks and copies


def in_child(compute) -> torch.Tensor:
    """Compute compute() in a forked child, and return its result."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, compute().double().numpy().tobytes())
        finally:
            os._exit(0)  # the child must not return into the tests
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return torch.frombuffer(bytearray(content), dtype=torch.float64)


def step_of(t: DPTrainer) -> torch.Tensor:
    t.train_step()
    return vector(t)


@pytest.mark.parametrize("seed", [None, 3])
def test_forked_children_of_a_trainer_draw_their_own(seed):
    t = trainer(dataclasses.replace(SETTINGS, seed=seed, learning_rate=1.0))
    theirs = [in_child(lambda: step_of(t)) for _ in range(2)]
    own = step_of(t).double()
    for a, b in ((theirs[0], theirs[1]), (theirs[0], own), (theirs[1], own)):
        assert len(a) == len(b) and not torch.isclose(a, b, rtol=0, atol=1e-3).all()


def noise_of(clipper: GhostClipper, generator=None) -> torch.Tensor:
    clipper.privatize(1.0, 1.0, generator)
    return torch.cat([p.grad.flatten() for p in clipper.parameters.values()])


def test_a_forked_child_begins_correlated_noise_anew():
    clipper = GhostClipper(small_model(), 1.0, bands=3)
    noise_of(clipper)
    assert in_child(lambda: torch.tensor([clipper.noise.steps])) == 0 < clipper.noise.steps
    theirs, again = (in_child(lambda: noise_of(clipper, Generator().manual_seed(1))) for _ in range(2))
    own = noise_of(clipper, Generator().manual_seed(1)).double()
    assert torch.equal(theirs, again) and not torch.equal(theirs, own)  # theirs lacks the noise of the step before
    assert torch.equal(theirs, noise_of(GhostClipper(small_model(), 1.0, bands=3), Generator().manual_seed(1)).double())


def private_optimizer(generator):
    model = small_model()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*small_data()), batch_size=20)
    made = fastloda.make_private(
        model, torch.optim.SGD(model.parameters(), 1.0), loader, noise_multiplier=50.0, max_grad_norm=1.0,
        noise_generator=generator,
    )  # fmt: skip
    return made, model


def loop_step(made, model) -> torch.Tensor:
    private, optimizer, _ = made
    for x, y in made[2]:
        optimizer.zero_grad()
        F.cross_entropy(private(x), y).backward()
        optimizer.step()
        break
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_forked_children_of_a_loop_draw_their_own_noise(given, used):
    made, model = private_optimizer(Generator().manual_seed(1) if given else None)
    if used:
        loop_step(made, model)
    theirs = [in_child(lambda: loop_step(made, model)) for _ in range(2)]
    own = loop_step(made, model).double()
    for a, b in ((theirs[0], theirs[1]), (theirs[0], own), (theirs[1], own)):
        # For independent noise this is about 23; the clipped sums of at most 40 records, over 20, differ by at most 4.
        assert (a - b).norm() > 8


module_generator = np.random.default_rng()


class OwnNoise:
    """A user's noise source, with a generator of any kind, inside the object or outside of it."""

    def __init__(self, kind):
        self.draw = {
            "torch": lambda n, g=Generator(): torch.randn(n, generator=g).tolist(),  # noqa: B008
            "numpy": lambda n, g=np.random.default_rng(): g.standard_normal(n),  # noqa: B008
            "old numpy": lambda n, g=np.random.RandomState(): g.standard_normal(n),  # noqa: B008
            "python": lambda n, g=random.Random(): [g.gauss(0, 1) for _ in range(n)],  # noqa: B008
            "module": lambda n: module_generator.standard_normal(n),
            "same": lambda n, numbers=torch.randn(100).tolist(): numbers[:n],  # noqa: B008
            "zeros": lambda n: [0.0] * n,
            "wide": lambda n: torch.full((n,), 100.0).tolist(),
            "not finite": lambda n: [np.nan] * n,
        }[kind]

    def normal(self, shape):
        return torch.tensor(np.asarray(self.draw(shape.numel())), dtype=torch.float64).view(shape)


class Attribute:
    """A noise source whose generator is an attribute, which a copy copies."""

    def __init__(self, generator):
        self.generator = generator

    def normal(self, shape):
        if isinstance(self.generator, Generator):
            return torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return torch.from_numpy(np.asarray(self.generator.standard_normal(tuple(shape))))


@pytest.mark.parametrize("kind", ["torch", "numpy", "old numpy", "python", "module"])
def test_forked_children_repeat_no_noise_of_ones_own(kind):
    source = private_optimizer(OwnNoise(kind))[0][1].generator
    draws = [in_child(lambda: source.normal(torch.Size([5]))) for _ in range(2)] + [source.normal(torch.Size([5]))]
    assert not any(torch.isclose(a, b).all() for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("make", [Generator, np.random.default_rng, np.random.RandomState])
def test_copies_repeat_no_noise_of_ones_own(make, again):
    (_, optimizer, _), _ = private_optimizer(Attribute(make()))
    shape, copied = torch.Size([5]), again(optimizer)
    assert not torch.isclose(copied.generator.normal(shape), optimizer.generator.normal(shape)).all()


@pytest.mark.filterwarnings("ignore:OwnNoise.normal gave noise that it, or another")  # these warnings come too
@pytest.mark.parametrize("kind", ["same", "zeros", "wide"])
def test_what_is_hardly_noise_is_said(kind):
    with pytest.warns(UserWarning, match="given before" if kind == "same" else "not 1"):
        made, model = private_optimizer(OwnNoise(kind))
        for _ in range(2):
            loop_step(made, model)


def test_noise_that_is_not_finite_is_refused():
    made, model = private_optimizer(OwnNoise("not finite"))
    with pytest.raises(PrivacyError, match="OwnNoise.normal must give finite numbers"):
        loop_step(made, model)
    assert not len(made[1].accountant)


@pytest.mark.parametrize("given", [np.random.default_rng(), np.random.RandomState()])
def test_a_bare_numpy_generator_is_no_source_of_noise(given):
    with pytest.raises(TypeError, match="must come from a torch.Generator or an object with normal"):
        private_optimizer(given)


def test_a_step_that_a_fork_falls_into_is_the_parents_alone():
    def forked() -> torch.Tensor:
        """Fork while losses are computed; tell whether the child was refused and the parent took its step."""
        t, within = trainer(), []
        t.train_step()

        def forking(*arguments):
            if not within:
                reading, writing = os.pipe()
                within.extend([os.fork(), reading, writing])
            return losses(*arguments)

        t.losses = forking
        try:
            t.train_step()
            refused = False
        except PrivacyError as error:
            refused = "forked in the middle" in str(error) and t.step == 1 and t.train_step() is not None
        child, reading, writing = within
        if child == 0:
            os.write(writing, bytes([refused]))
            os._exit(0)
        os.waitpid(child, 0)
        return torch.tensor([not refused and t.step == 2 and os.read(reading, 1) == b"\x01"])

    assert in_child(forked) == 1  # in a process of its own, because no fork may return into the tests


@pytest.mark.parametrize("noise", [torch.tensor(2.0), "1", True, -1.0, float("nan"), None])
def test_noise_that_cannot_be_counted_releases_nothing(noise):
    (private, optimizer, loader), model = private_optimizer(None)
    x, y = next(iter(loader))
    F.cross_entropy(private(x), y).backward()
    optimizer.noise_multiplier = noise
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match="noise_multiplier must be"):
        optimizer.step()
    assert all(p.grad is b or torch.equal(p.grad, b) for p, b in zip(model.parameters(), before))
    optimizer.noise_multiplier = 1.0
    optimizer.step()  # the batch still exists
    assert optimizer.accountant.history == [(1.0, 0.5, 1)]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("seed", [None, 3])
def test_copies_of_a_trainer_draw_and_count_their_own(again, seed):
    first = trainer(dataclasses.replace(SETTINGS, seed=seed, learning_rate=1.0))
    first.train_step()
    copied = again(first)
    assert torch.equal(vector(first), vector(copied)) and copied.step == 1
    assert not torch.isclose(step_of(first), step_of(copied), rtol=0, atol=1e-3).all()
    first.accountant.load_state_dict(copied.accountant.state_dict())
    assert copied.step == 2 and first.step == 3


def next_batch(parts) -> torch.Tensor:
    return torch.tensor(next(parts), dtype=torch.float64)


@pytest.mark.parametrize("made_by", ["make_private", "copy", "split", "seeded"])
def test_forked_children_of_a_loop_draw_batches_of_their_own(made_by):
    loader = private_optimizer(Generator().manual_seed(1) if made_by == "seeded" else None)[0][2]
    loader = {"copy": copy.deepcopy, "split": lambda one: one.split(1000)}.get(made_by, lambda one: one)(loader)
    parts = iter(loader.batch_sampler)
    next_batch(parts)
    draws = [in_child(lambda: next_batch(parts)) for _ in range(2)] + [next_batch(parts)]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("split", [False, True])
def test_a_batch_drawn_before_a_fork_is_the_parents_alone(split):
    (private, optimizer, loader), _ = private_optimizer(None)
    batches = iter(loader.split(5) if split else loader)

    def finish() -> torch.Tensor:
        """Take steps to the end of the batch that was begun; tell whether they were refused."""
        x, y = next(batches) if split else first
        while True:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            try:
                optimizer.step()
            except PrivacyError as error:
                return torch.tensor(["no batch is left" in str(error)])
            if not optimizer.accumulating:
                return torch.tensor([False])
            x, y = next(batches)

    first = next(batches)
    if split:  # one part is added, others follow
        x, y = first
        F.cross_entropy(private(x), y).backward()
        optimizer.step()
        assert optimizer.accumulating
    assert in_child(finish) == 1
    assert finish() == 0


def test_forked_children_of_a_clipper_draw_their_own_noise():
    clipper, generator = GhostClipper(small_model(), 1.0), Generator().manual_seed(1)
    for source in (None, generator):
        noise_of(clipper, source)
        draws = [in_child(lambda source=source: noise_of(clipper, source)) for _ in range(2)]
        draws.append(noise_of(clipper, source).double())
        for i, a in enumerate(draws):
            assert not any((a == b).any() for b in draws[:i])


def test_a_copied_secret_is_another():
    secret = Secret()
    for copied in (copy.deepcopy(secret), pickle.loads(pickle.dumps(secret))):
        assert copied.key != secret.key
    assert Secret.of_seed(3).key == Secret.of_seed(3).key != Secret.of_seed(4).key


# ---- a process group that comes or goes after the start


@pytest.fixture
def group(tmp_path):
    """Return a function that initialises a group of this many ranks, through which nothing is sent."""

    def initialise(ranks: int) -> None:
        store = dist.HashStore()
        dist.init_process_group("fake", store=store, rank=0, world_size=ranks)

    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  registers the backend

    yield initialise
    if dist.is_initialized():
        dist.destroy_process_group()


def clipper_step():
    model = small_model()
    clipper = GhostClipper(model, 1.0)

    def step():
        clipper.accumulate(losses(model, small_data(), None))
        clipper.privatize(1.0, 12.0)

    return step, clipper.parameters


def trainer_step():
    t = trainer()
    return t.train_step, t.parameters


def loop():
    made, model = private_optimizer(None)
    return lambda: loop_step(made, model), dict(model.named_parameters())


@pytest.mark.parametrize("made", [clipper_step, trainer_step, loop])
def test_a_group_that_is_initialised_later_is_refused(group, made):
    step, parameters = made()
    step()
    before = [p.detach().clone() for p in parameters.values()]
    group(3)
    with pytest.raises(PrivacyError, match="made for one process, and now is rank 0 of 3") as refusal:
        step()
    assert "first" in str(refusal.value) and all(map(torch.equal, before, parameters.values()))
    dist.destroy_process_group()
    step()  # without the group the step continues, without a new trainer


@pytest.mark.parametrize("ranks", [None, 2, 3])
def test_a_group_that_is_gone_or_another_is_refused(group, ranks):
    group(3)
    clipper = GhostClipper(small_model(), 1.0)
    assert clipper.world.size == 3
    dist.destroy_process_group()
    if ranks:
        group(ranks)
    with pytest.raises(PrivacyError, match="made for rank 0 of 3"):
        clipper.privatize(1.0, 12.0)


def test_a_forked_child_is_not_the_rank_that_it_was(group):
    group(2)
    clipper = GhostClipper(small_model(), 1.0)

    def refused():
        try:
            clipper.world  # noqa: B018
        except PrivacyError as error:
            return torch.tensor([float("process" in str(error))])
        return torch.zeros(1)

    assert in_child(refused).tolist() == [1.0]
    assert clipper.world.size == 2


def test_a_group_of_one_may_come_and_go(group):
    clipper = GhostClipper(small_model(), 1.0)
    group(1)
    noise_of(clipper)
    dist.destroy_process_group()
    noise_of(clipper)


def test_alone_does_not_care(group):
    clipper = GhostClipper(small_model(), 1.0, group="alone")
    group(3)
    noise_of(clipper)


def test_a_gone_subgroup_is_refused(group):
    group(3)
    part = dist.new_group([0, 1])
    clipper = GhostClipper(small_model(), 1.0, group=part)
    assert clipper.world.size == 2
    dist.destroy_process_group(part)
    with pytest.raises(PrivacyError, match="made for rank 0 of 2"):
        clipper.accumulate(losses(clipper.model, small_data(), None))


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_add_up_over_micro_batches(dtype):
    """Rounded to float32, nearly all parts would round this large sum up."""
    model = nn.Linear(64, 1, bias=False).to(dtype)
    clipper = GhostClipper(model, 1.0)
    torch.manual_seed(0)
    parts = [torch.randn(1, 64).abs() for _ in range(512)]
    for x in parts:
        clipper.accumulate(3.0 * model(x.to(dtype)).sum(1).float())
    exact = sum(F.normalize(x.to(dtype).double(), dim=1)[0] for x in parts)
    (found,) = clipper._sums.by_name.values()
    assert found.dtype == torch.float64
    assert (found[0] - exact).norm() < 1e-5 * (1 if dtype == torch.float32 else 1e3)
    assert all(sums.dtype == torch.float64 for sums in clipper._sums.buffers.values())


def test_removing_one_record_of_many_micro_batches_moves_the_sum_by_the_bound():
    model = nn.Linear(200, 1, bias=False)
    torch.manual_seed(0)
    common = torch.randn(1, 200)

    def total(parts):
        clipper = GhostClipper(model, 1.0)
        for x in parts:
            clipper.accumulate(50.0 * model(x).sum(1))
        return clipper._sums.by_name["weight"].double().clone()

    parts = [common * (1 + 0.1 * i) for i in range(256)]
    moved = (total([-common, *parts]) - total(parts)).norm().item()
    assert moved <= 1 + 1e-6


def test_ghost_dp_step_still_takes_a_generator():
    model = small_model()
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    options = dict(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=2, generator=Generator().manual_seed(1))
    ghost_dp_step(losses(model, small_data(), None), model, sgd, **options)
