"""`make_private` on two ranks is the same as in one process: one Poisson batch, one noise, one count."""

import copy
import runpy
from collections import Counter
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from loops import DELTA, Net, assert_same, gradients, records, small_net, truth
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from two_ranks import RANKS, case_of, two_ranks_of

from fastloda import BatchMemoryManager, PrivacyAccountant, PrivacyEngine
from fastloda.privacy.ranks import World

CASES: dict = {}
case, two_ranks = case_of(CASES), two_ranks_of(__name__)
BOUND, COUNT, BATCH = 0.1, 24, 8
EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed_loop.py"


def made(model=None, *, noise=0.0, data=None, engine=None, seed=11, sampler=None, **options):
    """Make a private loop whose batches are the same on any number of ranks."""
    model = small_net() if model is None else model
    data = TensorDataset(*records(COUNT), torch.arange(COUNT)) if data is None else data
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size=BATCH, generator=generator, sampler=sampler)
    options.setdefault("noise_generator", torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = engine or PrivacyEngine()
    options.setdefault("max_grad_norm", BOUND)
    return engine.make_private(model, optimizer, loader, noise_multiplier=noise, **options)


def run(call, optimizer, loader, passes=2, schedule=None):
    """Train; return each step's records, gradients and number of physical batches."""
    steps, numbers, parts = [], [], 0
    for x, y, i in (batch for _ in range(passes) for batch in loader):
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        numbers, parts = numbers + i.tolist(), parts + 1
        if not optimizer.accumulating:
            parameters = optimizer.param_groups[0]["params"]
            steps.append((numbers, [p.grad.clone() for p in parameters], parts))
            numbers, parts = [], 0
    return steps


def assert_shares_of(whole, shares):
    """Assert that one process and the ranks take the same batches and gradients; the ranks' gradients agree bit for bit."""
    assert len({len(whole), *map(len, shares)}) == 1
    for one, *of_ranks in zip(whole, *shares):
        assert sorted(one[0]) == sorted(number for numbers, *_ in of_ranks for number in numbers)
        for rank, (numbers, grads, _) in enumerate(of_ranks):
            assert all(number % RANKS == rank for number in numbers)
            for wanted, got, first in zip(one[1], grads, of_ranks[0][1]):
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
                assert torch.equal(got, first)


@case
def plain_loop(rank, folder):
    model, optimizer, loader = made(small_net() if rank == 0 else Drawn(), noise=1.0)
    steps = run(model, optimizer, loader)
    return steps, len(optimizer.accountant), optimizer.epsilon(DELTA), optimizer.stats.samples


class Drawn(Net):
    """A network whose weights differ from rank 0's."""

    def __init__(self):
        super().__init__()
        self.double()
        torch.nn.init.normal_(self.head.weight)


def test_a_plain_loop(two_ranks):
    shares = two_ranks("plain_loop")
    model, optimizer, loader = made(noise=1.0)
    assert_shares_of(run(model, optimizer, loader), [share[0] for share in shares])
    for _, count, epsilon, _ in shares:
        assert count == 2 * COUNT // BATCH
        assert epsilon == PrivacyAccountant(BATCH / COUNT, 1.0).epsilon(DELTA, count)
    assert sum(share[3] for share in shares) == optimizer.stats.samples


@case
def sum_of_clipped(rank, folder):
    model, optimizer, loader = made()
    inner = copy.deepcopy(model.to_standard_module())
    return inner, run(model, optimizer, loader, passes=1)[0]


def test_the_sum_is_that_of_the_whole_batch(two_ranks):
    (inner, (mine, grads, _)), (_, (theirs, _, _)) = two_ranks("sum_of_clipped")
    x, y = records(COUNT)
    chosen = sorted(mine + theirs)
    assert mine and theirs and len(set(chosen)) == len(chosen)
    wanted = oracle.clipped_sum(truth(inner, x[chosen], y[chosen]), BOUND)
    assert_same(dict(zip(wanted, grads)), wanted, divisor=BATCH)


@case
def virtual_batches(rank, folder):
    model, optimizer, loader = made(noise=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 99)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        found = len(parts), run(model, optimizer, parts, schedule=schedule)
    return *found, schedule.last_epoch


def test_virtual_batches_have_as_many_parts_on_each_rank(two_ranks):
    shares = two_ranks("virtual_batches")
    model, optimizer, loader = made(noise=1.0)
    assert_shares_of(run(model, optimizer, loader), [share[1] for share in shares])
    for (numbers, _, parts), (others, _, as_many) in zip(*(share[1] for share in shares)):
        assert parts == as_many == max(1, -(-max(len(numbers), len(others)) // 2))
    assert {share[2] for share in shares} == {6}
    assert {share[0] for share in shares} == {7}  # three steps of 2.3 parts each, as 12 records come at rate 1/3


@case
def adaptive(rank, folder):
    model, optimizer, loader = made(noise=1.0, clipping="adaptive", unclipped_num_std=1.0)
    return run(model, optimizer, loader), optimizer.max_grad_norm


def test_an_adaptive_bound_moves_together(two_ranks):
    (mine, bound), (theirs, their_bound) = two_ranks("adaptive")
    model, optimizer, loader = made(noise=1.0, clipping="adaptive", unclipped_num_std=1.0)
    assert_shares_of(run(model, optimizer, loader), [mine, theirs])
    assert bound == their_bound == pytest.approx(optimizer.max_grad_norm, rel=1e-12) != BOUND


BANDS = 2


@case
def correlated(rank, folder):
    """Take some steps, then as many from rank 0's state on both ranks, then as many with the first loop; try wrong states."""
    model, optimizer, loader = made(noise=1.0, bands=BANDS)
    steps = run(model, optimizer, loader, passes=1)
    torch.save(optimizer.state_dict(), folder / f"state.{rank}")
    states = torch.load(folder / f"state.{rank}", weights_only=True), World.of().from_first(optimizer.state_dict)
    generator = loader.batch_sampler.generator, optimizer.generator
    resumed = made(small_net(), noise=1.0, bands=BANDS)
    resumed[0].load_state_dict(model.state_dict())
    resumed[1].load_state_dict(states[1])
    for mine, before in zip((resumed[2].batch_sampler.generator, resumed[1].generator), generator):
        mine.set_state(before.get_state())
    again = run(*resumed, passes=1)
    other = made(small_net(), noise=1.0, bands=BANDS)[1]
    refused = error_of(lambda: other.load_state_dict(World.of().gather(states[0])[1]))
    alone = made(small_net(), noise=1.0, bands=BANDS)
    if rank == 0:
        alone[1].load_state_dict(states[0])
    apart = error_of(lambda: run(*alone, passes=1))
    return steps, again, run(model, optimizer, loader, passes=1), refused, apart, len(optimizer.accountant)


def test_correlated_noise(two_ranks):
    mine, theirs = two_ranks("correlated")
    model, optimizer, loader = made(noise=1.0, bands=BANDS)
    turns, whole = loader.tally.turns, run(model, optimizer, loader, passes=2)
    for at, wanted in enumerate([whole[:3], whole[3:], whole[3:]]):
        for one, first, second in zip(wanted, mine[at], theirs[at], strict=True):
            entered = sorted(one[0])
            assert entered == sorted(first[0] + second[0]) and len(turns[entered].unique()) == 1
            assert all(number % RANKS == rank for rank in (0, 1) for number in (first, second)[rank][0])
            for g, a, b in zip(one[1], first[1], second[1]):
                torch.testing.assert_close(a, g, rtol=1e-9, atol=1e-12)
                assert torch.equal(a, b)
    assert "lacks the noise of the last steps, which rank 0 alone saves" in mine[3] and theirs[3] == "nothing"
    assert all(
        "the number of steps with correlated noise is 3 on rank 0, 0 on rank 1" in of_rank[4]
        for of_rank in (mine, theirs)
    )
    assert mine[5] == theirs[5] == len(optimizer.accountant) == 3


@case
def without_a_generator(rank, folder):
    model, optimizer, loader = made(noise=1.0, noise_generator=None)
    return run(model, optimizer, loader, passes=20)


def test_without_a_generator_the_shares_are_of_one_batch_too(two_ranks):
    first, second = two_ranks("without_a_generator")
    sizes = Counter(len(a[0]) + len(b[0]) for a, b in zip(first, second))
    assert len(sizes) > 3 and {i for numbers, *_ in first for i in numbers} == set(range(0, COUNT, 2))
    for (_, mine, _), (_, theirs, _) in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


@case
def noise_alone(rank, folder):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 400)).double()
    model, optimizer, loader = made(model, noise=2.0, noise_generator=None, max_grad_norm=3.0)
    for x, *_ in loader:
        (model(x) * 0).sum(1).mean().backward()
        optimizer.step()
        break
    return (optimizer.param_groups[0]["params"][0].grad,)


def test_the_noise_is_added_once(two_ranks):
    (mine,), (theirs,) = two_ranks("noise_alone")
    assert torch.equal(mine, theirs)
    assert mine.std().item() * BATCH == pytest.approx(2.0 * 3.0, rel=0.03)  # not sqrt(2) times that


class Buffered(Net):
    """A network with a buffer, to which DistributedDataParallel writes rank 0's values at each call."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__()
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.double()

    def forward(self, x):
        return super().forward(x) * self.scale


def in_ddp(how):
    """Make a loop as users of DistributedDataParallel do; return (what to call, optimizer, loader)."""
    inner = Buffered()
    if how == "before":
        model, optimizer, loader = made(DistributedDataParallel(inner))
        assert model.to_standard_module() is inner
        return model, optimizer, loader
    if how == "after":
        model, optimizer, loader = made(inner)
        return DistributedDataParallel(model), optimizer, loader
    _, optimizer, loader = made(inner, wrap_model=False)
    return DistributedDataParallel(inner), optimizer, loader


DDP = ("before", "after", "in place")


@case
def wrapped(rank, folder):
    steps = {}
    for how in DDP:
        model, optimizer, loader = in_ddp(how)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
            steps[how] = run(model, optimizer, parts)
    return steps


@pytest.mark.parametrize("how", DDP)
def test_distributed_data_parallel_has_nothing_to_do(two_ranks, how):
    shares = [share[how] for share in two_ranks("wrapped")]
    assert_shares_of(run(*made(Buffered())), shares)


@case
def divided_loader(rank, folder):
    data = TensorDataset(*records(COUNT), torch.arange(COUNT))
    model, optimizer, loader = made(data=data, sampler=DistributedSampler(data))
    found = loader.sample_rate, len(loader), optimizer.expected_batch_size
    return *found, run(model, optimizer, loader)


def test_a_distributed_sampler_divides_the_batch_size(two_ranks):
    """The batch size of a loader is that of one rank, so that the batch of both ranks together is twice as large."""
    for rate, steps, expected, taken in two_ranks("divided_loader"):
        assert (rate, steps, expected, len(taken)) == (0.5, 2, COUNT / 2, 4)


def error_of(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@case
def disagreeing(rank, folder):
    data = TensorDataset(*records(COUNT), torch.arange(COUNT))
    chosen = torch.randperm(COUNT)[:16]  # another subset on each rank
    frozen = small_net()
    frozen.requires_grad_(rank == 0)
    return {
        "records": error_of(lambda: made(data=Subset(data, range(16 + rank)))),
        "which records": error_of(lambda: made(data=Subset(Subset(data, range(20)), chosen.clamp(max=19).tolist()))),
        "noise": error_of(lambda: made(noise=1.0 + rank)),
        "one fails": error_of(lambda: made(frozen)),
        "spent": error_of(lambda: made(noise=1.0, engine=spent_on(rank))),
    }


def spent_on(rank):
    engine = PrivacyEngine()
    for _ in range(rank):
        engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    return engine


@pytest.mark.parametrize(
    "what, match",
    [
        ("records", "the number of records is 16 on rank 0, 17 on rank 1"),
        ("which records", "the Subset's records"),
        ("noise", "noise_multiplier is 1.0 on rank 0, 2.0 on rank 1"),
        ("one fails", "no parameter with requires_grad"),
        ("spent", "the private steps taken is 0 on rank 0, 1 on rank 1"),
    ],
)
def test_ranks_that_disagree_are_refused_on_all_ranks(two_ranks, what, match):
    for errors in two_ranks("disagreeing"):
        assert match in errors[what]


@case
def one_fails(rank, folder):
    model, optimizer, loader = made(noise=1.0)
    for x, y, _ in loader:
        loss = F.cross_entropy(model(x), y)
        if rank == 0:
            loss.backward()
        error = error_of(optimizer.step)
        break
    steps = len(optimizer.accountant)
    return error, steps, len(run(model, optimizer, loader))


def test_a_step_that_fails_on_one_rank_fails_on_all_and_is_not_counted(two_ranks):
    (mine, *counts), (theirs, *their_counts) = two_ranks("one_fails")
    assert "rank 1 failed: PrivacyError: optimizer.step() needs one loss.backward()" in mine
    assert theirs.startswith("PrivacyError: optimizer.step() needs one loss.backward()")
    assert counts == their_counts == [0, 6]


@case
def copies(rank, folder):
    made_once = made(noise=1.0, noise_generator=None)
    model, optimizer, loader = copy.deepcopy(made_once)
    run(*made_once)
    return len(run(model, optimizer, loader)), len(optimizer.accountant), gradients(model)


def test_copies_train_on(two_ranks):
    (*counts, mine), (_, _, theirs) = two_ranks("copies")
    assert counts == [6, 6] and all(torch.equal(g, theirs[name]) for name, g in mine.items())


@case
def accelerated(rank, folder):
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(*made())
    steps = []
    for x, y, i in (batch for _ in range(2) for batch in loader):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        steps.append((i.tolist(), [p.grad.clone() for p in optimizer.param_groups[0]["params"]], 1))
    return accelerator.num_processes, type(model).__name__, steps


def test_accelerate_on_two_ranks(two_ranks):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    shares = two_ranks("accelerated")
    assert [share[:2] for share in shares] == [(RANKS, "DistributedDataParallel")] * RANKS
    assert_shares_of(run(*made()), [share[2] for share in shares])


@case
def example(rank, folder):
    return runpy.run_path(str(EXAMPLE))["main"]()


def test_the_example_on_two_ranks(two_ranks):
    first, second = two_ranks("example")
    assert first == second > 0.7
