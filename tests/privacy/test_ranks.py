"""Two ranks act as one process: the same sums, one noise, the same run; and where they can't, both raise an error.

All cases of `two_ranks` run in one pair of gloo processes on the CPU, one after the other, and store what they return for the
tests to check. A case that raises on one rank, or hangs, ends in an error on both: the process group times out.
"""

import dataclasses
import math
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from two_ranks import GROUP_TIMEOUT, LAUNCH_TIMEOUT, RANKS, case_of, run_all_cases

import fastloda.training.trainer
from fastloda import (
    DPTrainer,
    GhostClipper,
    PrivacyError,
    PrivateTraining,
    attach_loda,
    evaluate_every,
    ghost_dp_step,
    per_sample_grad_norms,
)
from fastloda.privacy.ranks import World, replicate
from fastloda.training.checkpoint import CheckpointError, fingerprint
from fastloda.training.sampling import largest_share, micro_batches, poisson_sample, share

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
SETTINGS = PrivateTraining(
    sample_rate=0.3,
    expected_batch_size=12,
    steps=6,
    noise_multiplier=0.5,
    delta=1e-5,
    learning_rate=1e-2,
    micro_batch_size=4,
    schedule="cosine",
    warmup=2,
    ema_decay=0.9,
    seed=3,
)

CASES = {}
case = case_of(CASES)


def small_model(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3))
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3), head).double()
        attach_loda(model, rank=1)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
    return model


def small_data(records: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(3, (records,), generator=generator)
    return torch.randn(records, 1, 6, 6, generator=generator).double() + labels.view(-1, 1, 1, 1), labels


def plain_losses(model, batch, generator):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def random_losses(model, batch, generator):
    noise = torch.randn(batch[0].shape, generator=generator, dtype=batch[0].dtype)
    return F.cross_entropy(model(batch[0] + 0.1 * noise), batch[1], reduction="none")


def trainer(settings=SETTINGS, *, model=None, data=None, losses=plain_losses, **options) -> DPTrainer:
    return DPTrainer(model or small_model(), data or small_data(), losses, settings, progress=False, **options)


def values(t: DPTrainer) -> dict[str, torch.Tensor]:
    """Collect the trained parameters, their average, and the clipping bound, which may adapt."""
    own = {name: p.detach().clone() for name, p in t.parameters.items()}
    own["bound"] = torch.tensor(t.clipper.max_grad_norm, dtype=torch.float64)
    return own | {f"average.{name}": value.clone() for name, value in t.average.values.items()}


def grads(clipper: GhostClipper) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in clipper.parameters.items()}


def error_of(function, *arguments) -> str:
    """Return what a call raised, as text."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# -- the two processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make the folder in which the test process and the ranks leave files for each other."""
    path = tmp_path_factory.mktemp("ranks")
    begun = trainer(checkpoint=path / "from-one.pt")
    for _ in range(3):
        begun.train_step()
    begun.save()
    return path


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_all_cases(__name__, folder)


# -- one private step --------------------------------------------------------------------------------------------------

DRAWN = 8  # cases
SPLITS = [lambda n: list(range(n)), lambda n: [i // 2 for i in range(n)], lambda n: [0] * n, lambda n: [1] * n]


def drawn_step(number: int):
    """Draw a model, samples, views and bound, and the rank of each sample: all on one of the ranks, or some on each."""
    generator = torch.Generator().manual_seed(number)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    views, samples = integer(1, 3), integer(0, 9)
    model, size = small_model(number), (6, 6)
    if number % 2:  # other layers, whose base trains too
        model, size = (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(32, 2)).double(),
            (6, 6),
        )
    x = torch.randn(samples * views, 1, *size, generator=generator).double()
    owners = [owner % RANKS for owner in SPLITS[integer(0, len(SPLITS) - 1)](samples)]
    return model, x, views, 10.0 ** integer(-2, 1), owners


def step_losses(model, x):
    return model(x).square().sum(1)


@case
def sums(rank, folder):
    left = []
    for number in range(DRAWN):
        model, x, views, bound, owners = drawn_step(number)
        replicate(model)
        clipper = GhostClipper(model, bound, views)
        mine = [i for i, owner in enumerate(owners) if owner == rank]
        for part in (mine[:2], mine[2:]):
            rows = [i * views + view for i in part for view in range(views)]
            clipper.accumulate(step_losses(model, x[rows]))
        clipper.privatize(0.0, 5.0)
        left.append(grads(clipper))
    return left


def test_the_clipped_sum_is_that_of_all_ranks_samples(two_ranks):
    left = two_ranks("sums")
    for number in range(DRAWN):
        model, x, views, bound, _ = drawn_step(number)
        total = oracle.clipped_sum(oracle.sample_grads(model, step_losses, x, views), bound)
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        assert_close(left[0][number], {name: t / 5 for name, t in (zeros | total).items()})
        assert_same_bits(left[1][number], left[0][number])


@case
def ghost_step(rank, folder):
    model, (x, y) = small_model(), small_data(8)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    losses = plain_losses(model, (x[rank::RANKS], y[rank::RANKS]), None)
    arguments = dict(max_grad_norm=0.1, noise_multiplier=0.0, expected_batch_size=8)
    norms = per_sample_grad_norms(losses, model)
    stats = ghost_dp_step(losses, model, optimizer, **arguments)
    return model.state_dict(), stats.samples, norms


def test_ghost_dp_step_on_two_ranks(two_ranks):
    model, batch = small_model(), small_data(8)
    losses = plain_losses(model, batch, None)
    norms = per_sample_grad_norms(losses, model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ghost_dp_step(losses, model, optimizer, max_grad_norm=0.1, noise_multiplier=0.0, expected_batch_size=8)
    for rank, (state, samples, of_rank) in enumerate(two_ranks("ghost_step")):
        assert_close(state, model.state_dict())
        assert samples == 4
        torch.testing.assert_close(of_rank, norms[rank::RANKS])


@case
def noise(rank, folder):
    model = nn.Linear(200, 100)
    replicate(model)
    clipper = GhostClipper(model, max_grad_norm=0.5)
    left = []
    for _ in range(2):
        clipper.privatize(3.0, 10.0)
        left.append(torch.cat([g.flatten() for g in grads(clipper).values()]))
    return left


def test_the_noise_is_added_once_and_is_the_same_on_all_ranks(two_ranks):
    """The standard deviation of 20,100 values is known to 0.5%. Noise on both ranks would make it 41% larger."""
    left = two_ranks("noise")
    for step in range(2):
        assert torch.equal(left[0][step], left[1][step])
        assert abs(left[0][step].std() / (3.0 * 0.5 / 10.0) - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack(left[0]))[0, 1]) < 0.05


@case
def low_precision(rank, folder):
    """Noise is added to parameters of several dtypes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).bfloat16(), nn.Linear(2, 2).double())
    replicate(model)
    clipper = GhostClipper(model, 1.0)
    clipper.privatize(1.0, 1.0)
    return model.state_dict(), grads(clipper)


def test_parameters_of_several_dtypes_stay_bit_equal(two_ranks):
    (state, of_first), (other_state, of_second) = two_ranks("low_precision")
    assert_same_bits(other_state, state)
    assert_same_bits(of_second, of_first)
    assert {g.dtype for g in of_first.values()} == {torch.float32, torch.bfloat16, torch.float64}


@case
def alone(rank, folder):
    model, (x, y) = small_model(), small_data(6)
    clipper = GhostClipper(model, 0.1, group="alone")
    if rank == 0:  # a collective operation would wait for rank 1
        clipper.accumulate(plain_losses(model, (x, y), None))
        clipper.privatize(0.0, 6.0)
        return grads(clipper)


def test_alone_opts_out(two_ranks):
    model, batch = small_model(), small_data(6)
    clipper = GhostClipper(model, 0.1)
    clipper.accumulate(plain_losses(model, batch, None))
    clipper.privatize(0.0, 6.0)
    assert_close(two_ranks("alone")[0], grads(clipper))


def disagreeing(what: str, rank: int):
    """Make a clipper and the arguments of privatize, in which rank 1 differs by `what`."""
    model, other = small_model(), float(rank)
    if what == "parameter":
        model[0].loda_A.requires_grad_(rank == 0)
    if what == "checksum":
        model[0].loda_A.data[0, 0, 0, 0] += other
    clipper = GhostClipper(model, 1.0 + other * (what == "max_grad_norm"), 1 + rank * (what == "views"))
    noise_multiplier = {"noise_multiplier": 1.0 + other, "nan": math.nan if rank else 1.0}.get(what, 1.0)
    return clipper, noise_multiplier, 4.0 + other * (what == "expected_batch_size")


DISAGREEMENTS = ("max_grad_norm", "views", "noise_multiplier", "expected_batch_size", "parameter", "checksum", "nan")


@case
def disagreements(rank, folder):
    left = {}
    for what in DISAGREEMENTS:
        clipper, noise_multiplier, expected = disagreeing(what, rank)
        before = {name: total.clone() for name, total in clipper._sums.by_name.items()}
        error = error_of(clipper.privatize, noise_multiplier, expected)
        untouched = all(p.grad is None for p in clipper.parameters.values())
        untouched &= all(torch.equal(before[name], total) for name, total in clipper._sums.by_name.items())
        left[what] = error, untouched
    return left


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_are_refused_on_all_ranks(two_ranks, what):
    for left in two_ranks("disagreements"):
        error, untouched = left[what]
        assert error.startswith("UserError: the ranks disagree: ")
        assert untouched
        assert {"nan": "noise_multiplier is 1.0 on rank 0, nan on rank 1"}.get(what, what) in error


@case
def wrappers(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    wrapped = nn.parallel.DistributedDataParallel(small_model())
    inside = nn.Sequential(nn.parallel.DistributedDataParallel(small_model()))
    sharded, own = fully_shard(small_model()), sharded_base(small_model())
    older = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor needs an accelerator
    nn.Module.__init__(older)
    errors = [error_of(GhostClipper, model, 1.0) for model in (wrapped, inside, sharded, older)]
    return [*errors, error_of(lambda: GhostClipper(own, 1.0, group="alone"))]


def test_wrappers_that_sum_gradients_themselves_are_refused(two_ranks):
    for ddp, inside, sharded, older, alone in two_ranks("wrappers"):
        assert ddp.startswith("PrivacyError: 'the model' is wrapped in DistributedDataParallel")
        assert inside.startswith("PrivacyError: '0' is wrapped in DistributedDataParallel")
        assert sharded.startswith("PrivacyError: trainable parameter '0.loda_A' is sharded")
        assert "FullyShardedDataParallel" in older
        assert alone.startswith("PrivacyError: '0.weight' is sharded over 2 ranks")


def test_torchrun_without_a_process_group_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with pytest.raises(PrivacyError, match="init_process_group"):
        GhostClipper(small_model(), 1.0)
    GhostClipper(small_model(), 1.0, group="alone")
    with pytest.raises(ValueError, match="'none'"):
        GhostClipper(small_model(), 1.0, group="none")


# -- training ----------------------------------------------------------------------------------------------------------

RUNS = {  # each as long as SETTINGS says, with these changes
    "usual": {},
    "varied shapes": {"fixed_shape": False, "micro_batch_size": 3},
    "all records": {"sample_rate": 1.0, "noise_multiplier": 0.0, "optimizer": "sgd", "momentum": 0.9},
    "empty batches": {"sample_rate": 1e-7},
    "rank 1 empty": {"sample_rate": 1.0, "records": 1},
    "adaptive": {"clipping": "adaptive"},
    "per layer": {"clipping": "per_layer"},
    "owners": {"per_owner": 2, "expected_batch_size": 6, "owners": [i * i % 23 for i in range(41)]},
}


def run_of(name: str, **options) -> DPTrainer:
    changes = dict(RUNS[name])
    data, owners = small_data(changes.pop("records", 41)), changes.pop("owners", None)
    return trainer(dataclasses.replace(SETTINGS, **changes), data=data, owners=owners, **options)


@case
def runs(rank, folder):
    left = {}
    for name in RUNS:
        model = small_model()
        if rank == 1:  # here attach_loda would have drawn other adapters
            nn.init.normal_(model[0].loda_A)
        t = run_of(name, model=model)
        left[name] = [t.train_step().totals for _ in range(3)], values(t.fit()), t.step
    return left


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_ranks_is_the_run_of_one_process(two_ranks, name):
    whole = run_of(name)
    totals = [whole.train_step().totals for _ in range(3)]
    whole.fit()
    left = [of_rank[name] for of_rank in two_ranks("runs")]
    for found, found_values, step in left:
        assert step == whole.step == SETTINGS.steps
        torch.testing.assert_close(torch.stack(found), torch.stack(totals))
        assert_close(found_values, values(whole))
    assert_same_bits(left[1][1], left[0][1])


@case
def streams(rank, folder):
    left = {}
    for seed in (None, 3):
        t = trainer(dataclasses.replace(SETTINGS, seed=seed))
        left[seed] = t.run.secret.key, t.run.generators["losses"].get_state(), t.progress
    shown = DPTrainer(small_model(), small_data(), plain_losses, SETTINGS, progress=True).progress
    return left, shown


def test_ranks_share_the_sampling_and_have_losses_of_their_own(two_ranks):
    (first, first_shows), (second, second_shows) = two_ranks("streams")
    for seed in (None, 3):
        assert first[seed][0] == second[seed][0]
        assert not torch.equal(first[seed][1], second[seed][1])
    seeded = trainer()
    assert first[3][0] == seeded.run.secret.key and first[None][0] != seeded.run.secret.key
    assert torch.equal(first[3][1], seeded.run.generators["losses"].get_state())  # rank 0's are those of one process
    assert (first_shows, second_shows) == (True, False)


@case
def budget(rank, folder):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        t = trainer(dataclasses.replace(SETTINGS, target_epsilon=4.0, noise_multiplier=1.5, steps=30)).fit()
    spent = [str(w.message) for w in told if "stops after" in str(w.message)]
    return t.step, t.epsilon(), error_of(t.train_step), len(spent)


def test_all_ranks_stop_at_the_budget(two_ranks):
    left = two_ranks("budget")
    assert left[0][:3] == left[1][:3]
    step, epsilon, error, _ = left[0]
    assert 0 < step < 30 and epsilon <= 4.0
    assert error.startswith("PrivacyError") and "spent" in error
    assert [told for *_, told in left] == [1, 0]


@case
def disagreeing_runs(rank, folder):
    return {
        "records": error_of(lambda: trainer(data=small_data(41 + rank))),
        "learning_rate": error_of(lambda: trainer(dataclasses.replace(SETTINGS, learning_rate=1e-2 * (1 + rank)))),
        "the model": error_of(lambda: trainer(model=small_model(rank))),
        "checkpoint_every": error_of(lambda: trainer(checkpoint_every=50 + rank)),
        "the optimizer": error_of(lambda: trainer(PLAIN, optimizer=partial(OWN_OPTIMIZER, weight_decay=rank))),
        "having a checkpoint": error_of(lambda: trainer(checkpoint=folder / "never.pt" if rank else None)),
    }


def test_ranks_with_different_runs_are_refused_on_all_ranks(two_ranks):
    for left in two_ranks("disagreeing_runs"):
        for what, error in left.items():
            assert error.startswith("UserError: the ranks disagree: ") and f"{what} is " in error, (what, error)


@case
def failures(rank, folder):
    """losses() fails once, on rank 1, in its second micro-batch."""
    calls = []

    def failing(model, batch, generator):
        calls.append(len(batch[0]))
        if rank == 1 and len(calls) == 2:
            raise ZeroDivisionError("on purpose")
        return plain_losses(model, batch, generator)

    settings = dataclasses.replace(SETTINGS, sample_rate=1.0, noise_multiplier=0.0, optimizer="sgd")
    t = trainer(settings, losses=failing)
    before = values(t)
    error = error_of(t.train_step)
    unchanged = all(torch.equal(v, before[name]) for name, v in values(t).items())
    return error, t.step, unchanged, values(t.fit())


def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_nothing_behind(two_ranks):
    """All records enter each step without noise, so that anything left by the failed step would show in the next one."""
    whole = trainer(dataclasses.replace(SETTINGS, sample_rate=1.0, noise_multiplier=0.0, optimizer="sgd")).fit()
    (told, *first), (own, *second) = two_ranks("failures")
    assert told == "RuntimeError: rank 1 failed: ZeroDivisionError: on purpose"
    assert own == "ZeroDivisionError: on purpose"
    for step, unchanged, after in (first, second):
        assert step == 0 and unchanged
        assert_close(after, values(whole))


@case
def callbacks(rank, folder):
    """Train with a user's optimizer and two callbacks: one evaluates, one fails on rank 1 after the fourth step."""
    told = []

    def evaluate(t):
        told.append(float(plain_losses(t.model, small_data(), None).mean()))

    def failing(t, report):
        if rank == 1 and report.step == 4:
            raise ZeroDivisionError("on purpose")

    options = dict(optimizer=OWN_OPTIMIZER, checkpoint=folder / "callbacks.pt", checkpoint_every=3)
    t = trainer(PLAIN, callbacks=[evaluate_every(2, evaluate), failing], **options)
    error = error_of(t.fit)
    again = trainer(PLAIN, **options)
    return told, error, t.step, again.step, values(again.fit())


PLAIN = dataclasses.replace(SETTINGS, learning_rate=1e-3)  # the default
OWN_OPTIMIZER = partial(torch.optim.NAdam, lr=0.01)


def test_callbacks_run_on_all_ranks_and_a_failure_of_one_is_raised_on_all(two_ranks):
    whole = trainer(PLAIN, optimizer=OWN_OPTIMIZER).fit()
    (told, error, *first), (other_told, own, *second) = two_ranks("callbacks")
    assert told == other_told and len(told) == 2
    assert error == "RuntimeError: rank 1 failed: ZeroDivisionError: on purpose"
    assert own == "ZeroDivisionError: on purpose"
    for step, resumed_at, after in (first, second):
        assert step == resumed_at == 4
        assert_close(after, values(whole))


@case
def secure(rank, folder):
    t = trainer(dataclasses.replace(SETTINGS, seed=None, secure_noise=True)).fit()
    return values(t), t.step


def test_secure_noise_is_the_same_on_all_ranks(two_ranks):
    (first, step), (second, other_step) = two_ranks("secure")
    assert step == other_step == SETTINGS.steps
    assert_same_bits(second, first)


@case
def example(rank, folder):
    t = runpy.run_path(str(EXAMPLE))["main"]()
    return values(t), t.world.size, t.epsilon()


def test_the_example_on_two_ranks(two_ranks):
    (first, size, epsilon), (second, *_) = two_ranks("example")
    assert size == RANKS and epsilon < 3
    assert_same_bits(second, first)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@case
def resumed(rank, folder):
    """Random losses and dropout, seeded by the operating system, resume bit for bit on the same number of ranks."""
    path = folder / "random.pt"
    settings = dataclasses.replace(SETTINGS, seed=None)
    torch.manual_seed(10 + rank)
    whole = trainer(settings, model=small_model(dropout=0.3), losses=random_losses, checkpoint=path)
    for _ in range(3):
        whole.train_step()
    whole.save()
    if rank == 0:
        shutil.copy(path, folder / "from-two-random.pt")
    whole.fit()
    if rank == 0:
        shutil.copy(folder / "from-two-random.pt", path)
    torch.manual_seed(99)
    again = trainer(settings, model=small_model(dropout=0.3), losses=random_losses, checkpoint=path)
    at = again.step
    return values(whole), at, values(again.fit())


def test_resume_on_as_many_ranks_is_bitwise_equal(two_ranks):
    left = two_ranks("resumed")
    for whole, at, again in left:
        assert at == 3
        assert_same_bits(again, whole)
    assert_same_bits(left[1][0], left[0][0])


@case
def handed_over(rank, folder):
    """A run goes from two ranks to one (in the test), and from one to two."""
    saves, save = [], fastloda.training.run_state.save_checkpoint
    fastloda.training.run_state.save_checkpoint = lambda *arguments: (saves.append(1), save(*arguments))
    try:
        t = trainer(checkpoint=folder / "from-two.pt")
        for _ in range(3):
            t.train_step()
        t.save()
    finally:
        fastloda.training.run_state.save_checkpoint = save
    path = folder / "from-one.pt" if rank == 0 else folder / "not-on-this-machine" / "from-one.pt"
    taken_over = trainer(checkpoint=path)
    stream = taken_over.run.generators["losses"].get_state()
    return len(saves), taken_over.step, stream, values(taken_over.fit())


def test_seeded_runs_go_on_with_another_number_of_ranks(two_ranks, folder):
    left = two_ranks("handed_over")
    whole = trainer().fit()
    for _, step, _, after in left:
        assert step == 3
        assert_close(after, values(whole))
    assert [saves for saves, *_ in left] == [1, 0]
    fresh = trainer().run.generators["losses"].get_state()
    streams = [stream for _, _, stream, _ in left] + [fresh]
    assert all(not torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])

    resumed = trainer(checkpoint=folder / "from-two.pt")
    assert resumed.step == 3
    assert_close(values(resumed.fit()), values(whole))


def test_private_runs_get_new_noise_with_another_number_of_ranks(two_ranks, folder):
    two_ranks("resumed")
    saved = torch.load(folder / "from-two-random.pt", weights_only=True)["state"]
    assert len(saved["generators"]) == 2
    resumes = []
    for number in range(2):
        path = shutil.copy(folder / "from-two-random.pt", folder / f"copy-{number}.pt")
        model, settings = small_model(dropout=0.3), dataclasses.replace(SETTINGS, seed=None)
        with pytest.warns(UserWarning, match="gone or older"):  # the list of releases was not copied
            resumes.append(trainer(settings, model=model, losses=random_losses, checkpoint=path))
    for t in resumes:
        assert t.step == 3
        assert_same_bits({name: p.detach() for name, p in t.parameters.items()}, saved["parameters"])
        assert t.run.secret.key.hex() != saved["secret"]
        assert not torch.equal(t.run.generators["losses"].get_state(), saved["generators"][0]["losses"])
    assert resumes[0].run.secret.key != resumes[1].run.secret.key
    assert resumes[0].fit().step == SETTINGS.steps


@case
def bad_files(rank, folder):
    if rank == 0:
        (folder / "damaged.pt").write_bytes(b"no checkpoint")
    dist.barrier()
    damaged = error_of(lambda: trainer(checkpoint=folder / "damaged.pt"))
    return damaged, error_of(lambda: trainer(checkpoint=folder / "damaged.pt" / "run.pt"))


def test_a_bad_file_is_an_error_on_all_ranks(two_ranks):
    for damaged, unwritable in two_ranks("bad_files"):
        assert damaged.startswith(CheckpointError.__name__) and "damaged" in damaged
        assert "cannot write" in unwritable


# -- a frozen base in shards -------------------------------------------------------------------------------------------


def sharded_base(model: nn.Module, **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    adapters = {p for p in model.parameters() if p.requires_grad}
    for block in (model[0], model[2]):
        fully_shard(block, ignored_params=adapters, **options)
    return fully_shard(model, ignored_params=adapters, **options)


def held_numbers(model: nn.Module) -> int:
    """Count the frozen numbers that this rank holds between steps."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(p.to_local().numel() for p in frozen)


@case
def shards(rank, folder):
    left = {}
    for options in ({}, {"reshard_after_forward": False}):
        model, (x, y) = sharded_base(small_model(), **options), small_data(7)
        rows = range(rank, 7, RANKS)
        x, y = x[rows], y[rows]
        if rank == 1:  # rank 1 has nothing to probe, but rank 0 probes
            x = torch.full_like(x, math.nan)
        clipper = GhostClipper(model, 0.1)
        for _ in range(2):
            losses = plain_losses(model, (x, y), None)
            norms = per_sample_grad_norms(losses, model)
            stats = clipper.accumulate(losses)
            clipper.privatize(0.0, 7.0)
        left[str(options)] = norms, stats.nonfinite, grads(clipper)
    refused = error_of(clipper.accumulate, plain_losses(model, (x[:0], y[:0]), None))
    return left, refused


def test_a_sharded_base_gives_the_same_gradients(two_ranks):
    model, (x, y) = small_model(), small_data(7)
    losses = plain_losses(model, (x[::RANKS], y[::RANKS]), None)
    expected = per_sample_grad_norms(losses, model)
    clipper = GhostClipper(model, 0.1)
    clipper.accumulate(losses)
    clipper.privatize(0.0, 7.0)
    for rank, (left, refused) in enumerate(two_ranks("shards")):
        for norms, nonfinite, found in left.values():
            assert_close(found, grads(clipper))
            assert nonfinite == (3 if rank else 0)
            assert rank or torch.allclose(norms, expected, rtol=1e-9)
        assert refused.startswith("UserError: losses is empty")


@case
def sharded_runs(rank, folder):
    left = {}
    for name in RUNS:
        model = sharded_base(small_model())
        t = run_of(name, model=model, checkpoint=folder / f"sharded {name}.pt", checkpoint_every=3)
        whole = sum(p.numel() for p in small_model().parameters() if not p.requires_grad)
        left[name] = values(t.fit()), held_numbers(model) / whole, fingerprint(model)
    return left


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_sharded_base_is_the_run_of_one_process(two_ranks, folder, name):
    whole = run_of(name).fit()
    left = [of_rank[name] for of_rank in two_ranks("sharded_runs")]
    for found, held, mark in left:
        assert_close(found, values(whole))
        assert held < 0.7
        assert mark == fingerprint(small_model())
    assert_same_bits(left[1][0], left[0][0])
    assert run_of(name, checkpoint=folder / f"sharded {name}.pt").step == SETTINGS.steps


# -- the end -----------------------------------------------------------------------------------------------------------


@case
def a_rank_dies(rank, folder):
    """In the last case rank 1 ends while rank 0 waits for it."""
    clipper = GhostClipper(small_model(), 1.0)
    if rank == 1:
        raise SystemExit(1)
    start = time.monotonic()
    error = error_of(clipper.privatize, 1.0, 1.0)
    return error, time.monotonic() - start, all(p.grad is None for p in clipper.parameters.values())


def test_the_others_do_not_wait_for_a_dead_rank(two_ranks, folder):
    with pytest.raises(AssertionError, match="rank 1 never finished"):
        two_ranks("a_rank_dies")
    kind, (error, seconds, unchanged) = torch.load(folder / "a_rank_dies.0", weights_only=False)
    assert kind == "result" and error != "nothing" and unchanged
    assert seconds < GROUP_TIMEOUT / 2


# -- in one process ----------------------------------------------------------------------------------------------------


def test_one_process_alone_is_a_world():
    world = World.of()
    tensors = {"a": torch.ones(3)}
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert world.sum_to_first(tensors) is tensors
    assert world.gather("x") == ["x"] and world.most(3) == 3 and world.from_first(lambda: "y") == "y"
    assert torch.equal(world.sum(tensors["a"]), torch.ones(3))
    world.check_same({"a": 1})
    replicate(small_model())


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_part_every_sample(ranks):
    generator = torch.Generator().manual_seed(0)
    for rate in (0.0001, 0.1, 0.6, 1.0):
        indices = poisson_sample(50, rate, generator)
        shares = [share(indices, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(shares).sort().values, indices)
        assert max(map(len, shares)) == largest_share(indices, ranks)
    whole = torch.arange(50)
    for rank in range(ranks):  # a record's rank does not depend on which others were drawn
        assert torch.equal(share(whole[7:], rank, ranks), whole[rank::ranks][whole[rank::ranks] >= 7])


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(("count", "at_least"), [(0, 1), (0, 3), (4, 1), (4, 3), (11, 3), (11, 5)])
def test_micro_batches_that_no_record_is_left_for_are_masked(count, at_least, fixed):
    indices = torch.arange(100, 100 + count)
    parts = list(micro_batches(indices, 5, fixed, at_least))
    assert len(parts) == max(at_least, math.ceil(count / 5))
    assert all(len(chosen) == len(mask) > 0 for chosen, mask in parts)
    assert torch.equal(torch.cat([chosen[mask] for chosen, mask in parts]), indices)


def test_a_failed_step_leaves_nothing_in_the_sum():
    def failing(model, batch, generator):
        if (batch[1] != small_data()[1][: len(batch[1])]).any():
            raise ZeroDivisionError
        return plain_losses(model, batch, generator)

    t = trainer(dataclasses.replace(SETTINGS, sample_rate=1.0, micro_batch_size=10), losses=failing)
    with pytest.raises(ZeroDivisionError):
        t.train_step()
    t.clipper.privatize(0.0, 1.0)
    assert all(not p.grad.any() for p in t.parameters.values())


def test_the_example_runs_under_torchrun(counts):
    if not counts(0, 1):
        pytest.skip("three more processes; with --prove. By default its main() runs in test_the_example_on_two_ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLE)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=LAUNCH_TIMEOUT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 of 2 ranks" in done.stdout and "rank 1 of 2 ranks" in done.stdout
