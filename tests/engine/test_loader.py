"""Private batches: only workers touch the data set, nobody's seed draws the batches, and no collate_fn mixes records."""

import collections
import dataclasses
import functools
import random
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from fastloda import PrivacyError
from fastloda.engine.collate import CollateOrEmpty
from fastloda.engine.engine import PrivacyEngine
from fastloda.engine.loader import BatchMemoryManager, PoissonLoader

# ---- who touches the data set


class LazyFile(Dataset):
    """Records of a file that is opened at the first read, as h5py requires."""

    def __init__(self, path, count):
        self.path, self.count, self.file = path, count, None

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if self.file is None:
            self.file = open(self.path, "rb")
        self.file.seek(8 * i)  # processes that share a handle share its position too
        return torch.frombuffer(bytearray(self.file.read(8)), dtype=torch.int64).clone(), torch.tensor(i)


class OpenedByWorkers(LazyFile):
    """Records of a file that only `worker_init_fn` opens."""

    def __getitem__(self, i):
        if self.file is None:
            raise TypeError("'NoneType' object is not subscriptable")
        return super().__getitem__(i)


def open_file(_worker):
    dataset = get_worker_info().dataset
    dataset.file = open(dataset.path, "rb")


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(np.arange(400, dtype=np.int64).tobytes())
    return path


def private_loader(loader, **options):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(secure_mode=options.pop("secure_mode", False))
    assert engine.validate(module=model, data_loader=loader) is None
    return engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, **options)


@pytest.mark.parametrize("workers", [{}, {"persistent_workers": True}, {"multiprocessing_context": "spawn"}])
def test_a_file_is_opened_by_the_workers_alone(workers, numbers):
    dataset = LazyFile(numbers, 400)
    loader = DataLoader(dataset, batch_size=50, num_workers=2, **workers)
    _, optimizer, loader = private_loader(loader)
    for _ in range(1 if "multiprocessing_context" in workers else 2):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=9, optimizer=optimizer) as parts:
            for value, index in parts:
                assert torch.equal(value[:, 0], index)
        assert dataset.file is None


@pytest.mark.parametrize("kind", [OpenedByWorkers, lambda *a: Subset(OpenedByWorkers(*a), range(40))])
def test_a_file_that_worker_init_fn_opens_is_read_after_that(kind, numbers):
    dataset = kind(numbers, 40)
    start = open_file if isinstance(dataset, OpenedByWorkers) else open_inner
    loader = DataLoader(dataset, batch_size=1, num_workers=2, worker_init_fn=start)
    seen = 0
    for value, index in private_loader(loader)[2]:  # 40 batches, of which a third are empty
        assert value.shape == (len(index), 1) and torch.equal(value[:, 0], index)
        seen += len(index)
    assert seen


def open_inner(_worker):
    dataset = get_worker_info().dataset.dataset
    dataset.file = open(dataset.path, "rb")


class Untouchable(Dataset):
    """A data set that fails while the test says that nobody may read yet."""

    ready = False

    def __len__(self):
        return 3

    def __getitem__(self, i):
        assert self.ready, "read before a batch was asked for"
        return torch.full((2,), float(i)), i


def test_making_private_reads_no_record():
    dataset = Untouchable()
    loader = private_loader(DataLoader(dataset, batch_size=1, collate_fn=lambda rows: default_collate(rows)))[2]
    iterator = iter(loader)
    dataset.ready = True
    batches = [*iterator, *[batch for _ in range(20) for batch in loader]]
    assert {tuple(x.shape) for x, _ in batches} >= {(0, 2), (1, 2)}


def test_an_empty_batch_that_comes_first_is_made_by_whoever_reads():
    dataset = Untouchable()
    dataset.ready = True
    collate = CollateOrEmpty(default_collate, dataset)
    x, y = collate([])
    assert x.shape == (0, 2) and x.dtype == torch.float32 and y.shape == (0,) and y.dtype == torch.int64


def test_values_that_cannot_be_made_empty_are_refused_with_the_first_batch():
    loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=4, collate_fn=lambda rows: object())
    with pytest.raises(TypeError, match="cannot make an empty batch"):
        next(iter(PoissonLoader.like(loader)))


class AtOnce(Untouchable):
    """A data set that reads a batch at once; `give` makes a list of it or something else."""

    def __init__(self, give):
        self.ready, self.give = True, give

    def __getitems__(self, indices):
        return self.give([self[i] for i in indices])


def test_records_that_are_read_at_once_are_a_list():
    x, y = zip(*[next(iter(PoissonLoader.like(DataLoader(AtOnce(list), batch_size=3)))) for _ in range(9)])
    assert {value.shape[1:] for value in x} == {(2,)}
    loader = DataLoader(AtOnce(lambda rows: {"x": torch.stack([x for x, _ in rows])}), batch_size=3, collate_fn=list)
    with pytest.raises(TypeError, match="__getitems__ gave a dict: it must return a list with one item a record"):
        list(PoissonLoader.like(loader))


# ---- who draws the batches


def drawn(make, **options):
    """Take two passes over the private loader of what `make` returns, each after setting all seeds that a user may set."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        found.append([x.tolist() for (x,) in private_loader(make(), **options)[2]])
    return found


RECORDS = TensorDataset(torch.arange(64))


def generator():
    return torch.Generator().manual_seed(3)


SEEDED = {
    "the recipe for workers": lambda: DataLoader(RECORDS, batch_size=8, shuffle=True, generator=generator()),
    "no shuffling": lambda: DataLoader(RECORDS, batch_size=8, generator=generator()),
    "a sampler": lambda: DataLoader(RECORDS, batch_size=8, sampler=RandomSampler(RECORDS, generator=generator())),
    "torch alone": lambda: DataLoader(RECORDS, batch_size=8),
    "a private loader again": lambda: PoissonLoader.like(SEEDED["no shuffling"](), repeatable=True),
}


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.parametrize("secure", [False, True])
def test_no_seed_of_the_user_draws_the_batches(kind, secure):
    one, two = drawn(SEEDED[kind], secure_mode=secure)
    assert one != two


@pytest.mark.parametrize("kind", ["no shuffling", "a private loader again"])
def test_an_experiment_repeats_its_batches(kind):
    one, two = drawn(SEEDED[kind], noise_generator=torch.Generator())
    assert one == two
    parts = []
    for _ in range(2):
        _, optimizer, loader = private_loader(SEEDED[kind](), noise_generator=torch.Generator())
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
            parts.append([x.tolist() for (x,) in batches])
    assert parts[0] == parts[1]


class Drawing(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.randint(2**40, (1,))


def test_the_loaders_generator_still_seeds_the_workers():
    firsts = []
    for _ in range(2):
        loader = DataLoader(Drawing(), batch_size=8, num_workers=1, generator=generator())
        firsts.append(int(next(iter(private_loader(loader)[2]))[0]))
    assert firsts[0] == firsts[1]


# ---- which records a row is made of


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    extra: dict


def stacked(rows):
    return torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def of(change):
    """Make a collate_fn that stacks images and labels and then changes the images."""

    def collate(rows):
        x, y = stacked(rows)
        return change(x), y

    return collate


def mixup(rows, partner=lambda n: torch.randperm(n), often=1.0):
    x, y = stacked(rows)
    weight = np.random.beta(1, 1)
    other = partner(len(x))
    return (weight * x + (1 - weight) * x[other], y) if random.random() < often else (x, y)


def standardised_targets(rows):
    x, y = stacked(rows)
    return x, (y - y.float().mean()) / (y.float().std() + 1e-3)


def class_weights(rows):
    x, y = stacked(rows)
    return x, y, 1 / torch.bincount(y, minlength=64)[y]


def smoothed(rows):
    """Insert a patch of the neighbour, as CutMix does."""
    x, y = stacked(rows)
    x[:, :2] = x.roll(1, 0)[:, :2]
    return {"x": x, "y": y}


class Centring:
    def __call__(self, rows):
        x, y = stacked(rows)
        return Batch(x - x.mean(0, keepdim=True), {"labels": y.tolist()})


MIXING = {
    "normalised over the batch": of(lambda x: (x - x.mean()) / x.std()),
    "each column": of(lambda x: x / (1 + x.abs().amax(0))),
    "numpy": lambda rows: (lambda x: (torch.from_numpy(x - np.median(x, 0)), 0))(stacked(rows)[0].numpy()),
    "ranks": of(lambda x: x.argsort(0).argsort(0).float()),
    "mixup": mixup,
    "mixup of neighbours": functools.partial(mixup, partner=lambda n: torch.arange(n).roll(1)),
    "mixup of pairs": functools.partial(mixup, partner=lambda n: (torch.arange(n) ^ 1).clamp(max=n - 1)),
    "mixup at times": functools.partial(mixup, often=0.7),
    "a patch": smoothed,
    "negatives from the batch": lambda rows: {"x": stacked(rows)[0], "negative": stacked(rows)[0].roll(1, 0)},
    "labels of others": lambda rows: (lambda x, y: (x, y[torch.randperm(len(y))], None))(*stacked(rows)),
    "two rows a record": of(lambda x: torch.cat([x, x + x.sum(0)])),
    "a statistic beside the batch": lambda rows: (*stacked(rows), float(stacked(rows)[0].mean())),
    "targets": standardised_targets,
    "class weights": class_weights,
    "an object": Centring(),
    "quantised by the batch": of(lambda x: (x / x.abs().max() * 7).round() / 7),
    "a batch in bf16": of(lambda x: (x - x.mean(0)).bfloat16()),
}


def image_records(count, seed=0, width=5):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(width, generator=draw), int(torch.randint(64, (1,), generator=draw))) for _ in range(count)]


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_collate_fn_that_mixes_records_is_refused(kind, count):
    collate = CollateOrEmpty(MIXING[kind], None)
    collate.empty = ()  # some of them could not make an empty batch
    with pytest.raises(PrivacyError, match="collate_fn mixes records.*in the data set's __getitem__"):
        for seed in range(64):  # one that mixes only at times is found within the first looks
            collate(image_records(count, seed))


def padded(rows):
    """Sort by length, as for packing, and pad."""
    rows = sorted(rows, key=lambda row: -len(row[0]))
    x = pad_sequence([row[0] for row in rows], batch_first=True, padding_value=-9.0)
    lengths = torch.tensor([len(row[0]) for row in rows])
    return {"x": x, "mask": torch.arange(x.shape[1]) < lengths[:, None], "lengths": lengths, "longest": x.shape[1]}


def masked(rows, own=None):
    """Mask entries as for a masked language model; the number of random numbers depends on the longest record."""
    batch = padded(rows)
    hidden = torch.rand(batch["x"].shape, generator=own) < 0.3
    return batch["x"].masked_fill(hidden, 0), hidden


class OwnGenerators:
    """A collate_fn that augments with generators of its own, of all kinds."""

    def __init__(self):
        self.numpy, self.old = np.random.default_rng(0), np.random.RandomState(0)
        self.inner = [generator(), random.Random(0)]

    def __call__(self, rows):
        x, y = stacked(rows)
        noise = self.numpy.normal(size=x.shape) + self.old.normal(size=x.shape) + self.inner[1].random()
        return x + torch.from_numpy(noise) + torch.randn(x.shape, generator=self.inner[0]), y


def popping(rows):
    """Take the records apart, which changes them."""
    return torch.stack([row.pop("x") for row in rows]), [row.pop("name") for row in rows]


def by_label(rows):
    x, y = stacked(rows)
    order = y.argsort(descending=True, stable=True)
    return x[order], y[order], [str(int(label)) for label in y[order]]


HONEST = {
    "default": (default_collate, "images"),
    "a list of records": (
        lambda rows: [{"x": x, "boxes": x[: 1 + y % 4, None] * torch.ones(4)} for x, y in rows],
        "images",
    ),
    "strings and nothing": (
        lambda rows: {"x": stacked(rows)[0], "names": [f"r{r[1]}" for r in rows], "no": None},
        "images",
    ),
    "two views": (of(lambda x: torch.cat([x, x.flip(1)])), "images"),
    "two views side by side": (of(lambda x: x.repeat_interleave(2, 0)), "images"),
    "batch second": (of(lambda x: x.T), "images"),
    "normalised by record": (of(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)), "images"),
    "random": (of(lambda x: x + torch.randn_like(x) + float(np.random.rand()) + random.random()), "images"),
    "its own generators": (OwnGenerators(), "images"),
    "one in its closure": (functools.partial(masked, own=generator()), "sequences"),
    "sorted by content": (by_label, "images"),
    "padded": (padded, "sequences"),
    "masked": (masked, "sequences"),
    "packed": (lambda rows: pack_sequence([row[0] for row in rows], enforce_sorted=False), "sequences"),
    "concatenated": (lambda rows: torch.cat([row[0] for row in rows]), "sequences"),
    "nested": (lambda rows: torch.nested.as_nested_tensor([row[0] for row in rows], layout=torch.jagged), "sequences"),
    "an object": (lambda rows: Batch(stacked(rows)[0], {"n": len(rows)}), "images"),
    "takes records apart": (popping, "dicts"),
    "changes records in place": (lambda rows: torch.stack([row[0].mul_(2) for row in rows]), "images"),
    "numpy": (lambda rows: np.stack([row[0].numpy() for row in rows]), "images"),
}


def some_records(kind, count, seed):
    images = image_records(count, seed)
    if kind == "sequences":
        return [(x.repeat(3)[: 1 + y % 13], y) for x, y in images]
    return [{"x": x, "name": str(y)} for x, y in images] if kind == "dicts" else images


@pytest.mark.parametrize("name", HONEST)
def test_honest_batches_are_what_they_are_without_the_looks(name):
    """They are equal bit for bit: the looks take nothing from any generator, and change no record."""
    collate, kind = HONEST[name]
    looked = CollateOrEmpty(collate, None)
    looked.empty = ()  # the empty batch does not matter here

    def run(function):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        for held in collate_generators(collate):
            held()
        return [function(some_records(kind, 1 + seed % 9, seed)) for seed in range(9)]

    for one, two in zip(run(collate), run(looked), strict=True):
        assert_equal(one, two)


def collate_generators(collate):
    """Yield the functions that reset an honest example's own generators."""
    if isinstance(collate, OwnGenerators):
        yield collate.__init__
    if isinstance(collate, functools.partial):
        yield lambda: collate.keywords["own"].manual_seed(3)


def assert_equal(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor) and one.is_nested:
        one, two = one.unbind(), two.unbind()
    if isinstance(one, Batch):
        one, two = vars(one), vars(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert_equal(list(one.items()), list(two.items()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert_equal(a, b)
    else:
        assert np.array_equal(one, two)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_that_are_mixed_linearly_are_found_and_no_others(data):
    """The change is x -> x + M x, for a matrix M that has entries off its diagonal, or none."""
    count, seed = data.draw(st.integers(2, 8)), data.draw(st.integers(0, 999))
    honest = data.draw(st.booleans())
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.diag(torch.rand(count, generator=draw) + 0.1)
    if not honest:
        matrix[0] += torch.rand(count, generator=draw) + 0.1
    collate = CollateOrEmpty(of(lambda x: x + matrix[: len(x), : len(x)] @ x), None)
    if honest:
        collate(image_records(count, seed))
    else:
        with pytest.raises(PrivacyError, match="mixes records"):
            collate(image_records(count, seed))


def test_mixing_that_begins_later_is_found_on_the_schedule():
    calls = collections.Counter()

    def collate(rows):
        calls["batches"] += len(rows) > 2
        return of(lambda x: x - x.mean(0) if calls["batches"] > 20 else x)(rows)

    looked = CollateOrEmpty(collate, None)
    with pytest.raises(PrivacyError, match="mixes records"):
        for seed in range(40):
            looked(image_records(4, seed))


def test_random_numbers_that_cannot_be_drawn_again_are_refused_by_their_name():
    system = random.SystemRandom()
    collate = CollateOrEmpty(of(lambda x: x + system.random()), None)
    with pytest.raises(PrivacyError, match="let it draw from the global generators of torch, numpy or random"):
        collate(image_records(4))
    CollateOrEmpty(of(lambda x: x + random.random()), None)(image_records(4))  # the remedy that the message names


@pytest.mark.parametrize("workers", [0, 2])
def test_the_refusal_of_a_mixing_collate_fn_arrives_readable(workers):
    loader = DataLoader(TensorDataset(torch.randn(64, 3)), batch_size=32, num_workers=workers, collate_fn=centred)
    with pytest.raises(PrivacyError, match="collate_fn mixes records: the rows of some changed"):
        list(private_loader(loader)[2])


def centred(rows):
    x = torch.stack([x for (x,) in rows])
    return (x - x.mean(0),)


# ---- data sets that read a batch at once


class ReadsAtOnce(Dataset):
    """40 records; `change` may change those of a batch together."""

    def __init__(self, change):
        self.x, self.change, self.own = torch.randn(40, 5, generator=generator()), change, np.random.default_rng()

    def __len__(self):
        return len(self.x)

    def __getitems__(self, indices):
        return [{"x": row, "id": f"record {i}"} for row, i in zip(self.change(self, self.x[indices]), indices)]


def cropped(dataset, x):
    """Draw more or fewer random numbers for each record, by its content."""
    return [torch.rand(1 + int(row[0] > 0)).sum() + row for row in x]


READINGS = {
    "centred": (lambda _, x: x - x.mean(0), "mixes records"),
    "mixup": (lambda _, x: x + 0.1 * x[torch.randperm(len(x))], "mixes records"),
    "scaled by the largest": (lambda _, x: (x / x.abs().amax() * 100).round(), "mixes records"),
    "unsteady": (lambda _, x: x + random.SystemRandom().random(), "other values of the same records each time"),
    "as they are": (lambda _, x: x, None),
    "cropped": (cropped, None),
    "its own generator": (lambda dataset, x: x + torch.from_numpy(dataset.own.standard_normal(x.shape)), None),
}


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("name", READINGS)
def test_a_data_set_that_mixes_what_it_reads_at_once_is_refused(name, subset):
    change, refused = READINGS[name]
    dataset = ReadsAtOnce(change)
    loader = PoissonLoader.like(DataLoader(Subset(dataset, range(30)) if subset else dataset, batch_size=10))
    if refused:
        with pytest.raises(PrivacyError, match=refused):
            [list(loader) for _ in range(5)]
    else:
        assert len([list(loader) for _ in range(5)]) == 5


def test_looking_at_what_is_read_at_once_draws_nothing():
    """The batches are the same with and without a look at the first one."""
    made = []
    for batches in (0, 2):
        torch.manual_seed(0)
        collate = CollateOrEmpty(default_collate, ReadsAtOnce(cropped))
        collate.empty, collate.batches = (), batches  # the third one is not looked at
        made.append([torch.rand(3), collate(collate.dataset.__getitems__([1, 2, 3]))["x"], torch.rand(3)])
    assert_equal(*made)


# ---- empty batches


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


def simple_object(rows):
    made = types.SimpleNamespace()
    made.x, made.y = stacked(rows)
    made.names, made.graphs = [str(y) for _, y in rows], len(rows)
    return made


@pytest.mark.parametrize(
    "collate",
    [
        lambda rows: Batch(stacked(rows)[0], {"n": len(rows)}),
        lambda rows: Frozen(*stacked(rows)),
        simple_object,
        lambda rows: types.SimpleNamespace(x=stacked(rows)[0].numpy(), weights=torch.ones(3), scale=2.0),
    ],
)
def test_batches_of_usual_kinds_can_be_empty(collate):
    one, empty = collate(image_records(1, 0)), CollateOrEmpty(collate, image_records(4, 0))([])
    assert type(empty) is type(one) and empty.x.shape == (0, *one.x.shape[1:]) and empty.x.dtype == one.x.dtype
    assert len(getattr(empty, "y", ())) == 0 and getattr(empty, "extra", {"n": 0}) == {"n": 0}
    assert getattr(empty, "names", []) == [] and getattr(empty, "graphs", 0) == 0
    assert torch.equal(getattr(empty, "weights", torch.ones(3)), torch.ones(3))


def test_what_takes_no_copies_of_records_is_said_to_be_unseen():
    def each_once(rows):
        if len({row[0].sum().item() for row in rows}) < len(rows) > 2:
            raise ValueError("twice the same record")
        return stacked(rows)

    with pytest.warns(UserWarning, match="was not seen.*twice the same record"):
        CollateOrEmpty(each_once, None)(image_records(6, 0))
