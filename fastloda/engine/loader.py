"""Poisson batches in place of a DataLoader's shuffled ones, and the tally that ties every private step to one of them.

The accountant's amplification holds if each step uses one Poisson draw (Chua et al. 2024 show what shuffling costs), and the
sensitivity bound holds if each record is one row of the batch. The tally checks both: a step must match a batch that was drawn.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import bdtrc
from torch import Generator, Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from fastloda.engine.collate import CollateOrEmpty
from fastloda.errors import PrivacyError, UserError
from fastloda.privacy.correlated import CorrelatedNoise
from fastloda.privacy.ranks import World
from fastloda.randomness import hold, unpredictable_generator
from fastloda.training.sampling import cyclic_sample, draw_turns, largest_share, share

if TYPE_CHECKING:  # otherwise a circular import
    from fastloda.engine.optimizer import PrivateOptimizer

_batch_numbers = itertools.count()


class Part(NamedTuple):
    """A part of logical batch number `batch`: all its records or, if `split`, as many as fit; the `last` part ends the batch.

    Only the process that drew it, `process`, may use it: a forked child's steps would use its records a second time. With
    correlated noise only step number `step` may use it, and only while the records have the `turns` by which it was drawn: its
    records may enter no other step.
    """

    process: int
    batch: int
    records: int
    last: bool
    split: bool
    step: int
    turns: Tensor


class Tally:
    """The queue of the parts of batches that a loader has yielded and no step has used yet.

    Attributes:
        drawn: the queue.
        noise: the noise of the steps that use the parts; it counts these steps.
        turns: turns [records] of the records among these steps (`draw_turns`).
        unsure: whether the last step may have used another part than the one taken off, which has as many records.
    """

    def __init__(self, records: int, bands: int = 1, generator: Generator | None = None):
        self.drawn: deque[Part] = deque()
        self.noise, self.unsure = CorrelatedNoise(bands), False
        self.turns: Tensor = draw_turns(records, bands, generator or unpredictable_generator())

    def __reduce__(self):
        """Make copies empty, since a batch is for one step; their steps begin anew, with turns of their own."""
        return Tally, (len(self.turns), self.noise.bands)

    def take(self, rows: int, sizes: Collection[int] = ()) -> Part:
        """Take off the queue, and return, the part that a step over `rows` samples uses; drop the parts before it as skipped.

        sizes: the batch sizes with which the module was called; a part of such a size was not skipped.

        Raises:
            PrivacyError: no part has that many records, or parts of two split batches are in the queue, or the noise is
                correlated and it is another step's turn.
        """
        while self.drawn and self.drawn[0].process != os.getpid():
            self.drawn.popleft()
        if not self.drawn:
            raise PrivacyError(
                "no batch is left for this step: each step must use one new batch of the data loader that make_private returned "
                "(which transformers' Trainer takes by get_train_dataloader), for the accountant counts one Poisson draw a step. "
                "Several losses of one batch, as a discriminator's on real and on fake samples, are added up for one backward "
                "and one step"
            )
        if self.drawn[-1].split and len(self.drawn) > 1:
            self.drawn.clear()
            raise PrivacyError(
                "optimizer.step() must follow every physical batch of BatchMemoryManager, the empty ones included, before "
                "the next is taken: the parts of two logical batches must not mix"
            )
        others = [part for part in self.drawn if part.records in sizes and part.records != rows]
        computed = rows in sizes or not others  # whether a call of the module had `rows` records, as inputs show
        for skipped, part in enumerate(self.drawn if computed else others[:1]):
            if computed and part.records == rows:
                for _ in range(skipped + 1):
                    self.drawn.popleft()
                self._check_turn(part)
                self.unsure = any(other.records == rows for other in self.drawn)
                return part
            if part in others:
                break
        raise PrivacyError(
            f"the loss has {rows} samples, but the batch has {part.records} records: each record must be one row of "
            "the model's outputs, or one record could contribute several clipped gradients; weight a row by 0 to leave it out"
        )

    def _check_turn(self, part: Part) -> None:
        earlier = "" if part.turns is self.turns else ", drawn before a state was loaded"
        if self.noise.bands > 1 and (earlier or part.step != self.noise.steps):
            raise PrivacyError(
                f"this batch is for step {part.step + 1}{earlier}, and step {self.noise.steps + 1} is the next: with bands="
                f"{self.noise.bands} each batch must make its step, the empty ones included, and in the loader's order, or a "
                "record could enter two steps whose noise is correlated. A new pass over the loader begins with the right one"
            )


class PoissonBatches(Sampler[list[int]]):
    """The sampler of `steps` batches, each of which draws every record with probability `sample_rate`.

    A batch is yielded in parts of up to `max_records` records. If noise is correlated, the batches are those of the run's next
    steps, which the tally counts, each drawn from the records whose turn it is (`cyclic_sample`); `sample_rate` is then the mean
    over the steps.

    On rank `rank` of `ranks` it yields the rank's share of such batches, each in as many parts as the largest share needs. All
    ranks draw the same batches from generators in the same state. If the states come to differ, as when one rank alone draws a
    batch, the shares together still are one Poisson batch, since no record is in two shares.
    """

    def __init__(
        self,
        tally: Tally,
        sample_rate: float,
        steps: int,
        generator: Generator,
        max_records: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.tally, self.sample_rate, self.steps = tally, sample_rate, steps
        self.generator, self.max_records = hold(generator), max_records
        self.rank, self.ranks = rank, ranks
        self.parts: deque[Part] = deque()

    @property
    def records(self) -> int:
        """The number of records."""
        return len(self.tally.turns)

    def drawn_by(self, generator: Generator, tally: Tally, max_records: int | None = None) -> "PoissonBatches":
        """Make a sampler of as many batches at the same rate, drawn by another generator or in other parts."""
        return PoissonBatches(tally, self.sample_rate, self.steps, generator, max_records, self.rank, self.ranks)

    def divide(self, world: World) -> None:
        """Divide the batches that rank 0's generator and turns determine among the ranks of a world; this is a collective."""
        self.rank, self.ranks = world.rank, world.size
        self.generator.set_state(world.from_first(self.generator.get_state))
        self.tally.turns = world.from_first(lambda: self.tally.turns)

    def __getstate__(self) -> dict:
        """Leave out the generator: two runs on equal batches would reveal more than is accounted, so a copy draws its own."""
        return self.__dict__ | {"generator": None, "parts": deque()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, generator=hold(unpredictable_generator()))

    def __len__(self) -> int:
        """Return the number of steps, or the expected number of physical batches where batches are split."""
        if not self.max_records:
            return self.steps
        share = math.ceil(self.records / self.ranks)
        full = self.max_records * np.arange(1, math.ceil(share / self.max_records))  # records of 1, 2, ... full parts
        return math.ceil(self.steps * (1 + bdtrc(full, share, self.sample_rate).sum()))

    def __iter__(self) -> Iterator[list[int]]:
        self.parts = deque()  # a new queue for this pass over the data: an older iterator keeps its own
        return self._draw(self.parts, self.tally.noise.steps)

    def _draw(self, parts: deque[Part], first: int) -> Iterator[list[int]]:
        for step in range(first, first + self.steps):
            turns, bands = self.tally.turns, self.tally.noise.bands
            indices = cyclic_sample(turns, self.sample_rate, step, bands, self.generator)
            largest = largest_share(indices, self.ranks)
            count = math.ceil(largest / self.max_records) if self.max_records else 1
            chunks = share(indices, self.rank, self.ranks).tensor_split(max(1, count))
            batch = (os.getpid(), next(_batch_numbers))
            for i, chunk in enumerate(chunks):
                parts.append(Part(*batch, len(chunk), i == len(chunks) - 1, self.max_records is not None, step, turns))
                yield chunk.tolist()


class PoissonLoader(DataLoader):
    """The DataLoader like `source`, with the same data set, workers and collate_fn, that draws Poisson batches.

    A batch is empty with probability (1 - sample_rate)^records, and then has the tensors of any other with 0 rows: its noisy
    step counts like any other. `len()` is the number of steps of an epoch, as for the source.

    Attributes:
        sample_rate: 1 / len(source), so that a batch has source.batch_size records on average.
        tally: the parts that were yielded and not yet used by a step.
    """

    batch_sampler: PoissonBatches
    _is_accelerate_prepared = True  # so that accelerate's prepare leaves it as it is

    def __init__(self, source: DataLoader, batches: PoissonBatches, collate: Callable):
        self.sample_rate, self.tally = batches.sample_rate, batches.tally
        names = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator")
        names += ("prefetch_factor", "persistent_workers")
        kept = {name: getattr(source, name) for name in names}
        super().__init__(source.dataset, batch_sampler=batches, collate_fn=collate, **kept)

    @classmethod
    def like(cls, source: DataLoader, *, repeatable: bool = False, ranks: int = 1, bands: int = 1) -> "PoissonLoader":
        """Make a PoissonLoader from a DataLoader that samples a map-style data set uniformly; only the workers read records.

        Args:
            repeatable: let the source's generator, if it has one, draw the batches, for an experiment whose batches can be
                foreseen. Otherwise they can't be: the source's generator then seeds the workers only.
            ranks: the number of ranks that train together, among which a DistributedSampler may divide the source.
            bands: the number of steps over which the noise is correlated.

        Raises:
            TypeError, ValueError: the source samples in a way that Poisson batches can't replace, or would replace silently.
        """
        generator = getattr(source, "generator", None) if repeatable else None
        generator = generator or unpredictable_generator()
        if isinstance(source, PoissonLoader):
            tally = Tally(source.batch_sampler.records, bands, generator)
            return cls(source, source.batch_sampler.drawn_by(generator, tally), source.collate_fn)
        tally = Tally(_check_uniform(source, ranks), bands, generator)
        batches = PoissonBatches(tally, 1 / len(source), len(source), generator)
        return cls(source, batches, CollateOrEmpty(source.collate_fn, source.dataset))

    def facts(self) -> dict[str, object]:
        """List what decides which record may enter which step on which rank: the same on all ranks and when a run resumes."""
        dataset, chosen = self.dataset, []
        while type(dataset) is Subset:  # as random_split makes them
            chosen.append(hash(tuple(map(int, dataset.indices))))
            dataset = dataset.dataset
        facts = {"the number of records": self.batch_sampler.records, "sample_rate": self.sample_rate}
        return facts | {"the Subset's records": chosen, "bands": self.tally.noise.bands}

    def split(self, max_records: int) -> "PoissonLoader":
        """Make a loader of the same batches, each in parts of up to max_records."""
        whole = self.batch_sampler
        return PoissonLoader(self, whole.drawn_by(whole.generator, self.tally, max_records), self.collate_fn)

    def __iter__(self) -> Any:  # a generator, where a DataLoader promises a class of its own
        if self.tally.drawn and self.tally.unsure:
            self.tally.noise.forget()  # a new round, which is paid for, whichever batch an earlier pass has used
        self.tally.drawn.clear()
        iterator = super().__iter__()
        parts = self.batch_sampler.parts
        for batch in iterator:
            self.tally.drawn.append(parts.popleft())
            yield batch


class BatchMemoryManager:
    """The context manager that bounds a step's memory: it yields large Poisson batches in parts, as Opacus's does.

    The loop need not change:

    >>> with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as memory_safe_loader:
    ...     for x, y in memory_safe_loader:
    ...         optimizer.zero_grad()
    ...         criterion(model(x), y).backward()
    ...         optimizer.step()            # adds up; the noisy step comes with the last part

    Raises:
        TypeError, ValueError: loader and optimizer are not from one call of make_private, or the size is < 1.
    """

    def __init__(self, *, data_loader: PoissonLoader, max_physical_batch_size: int, optimizer: "PrivateOptimizer"):
        if not hasattr(optimizer, "tally"):  # accelerate's or Lightning's wrapper
            optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(data_loader, PoissonLoader) or data_loader.tally is not getattr(optimizer, "tally", None):
            raise TypeError("data_loader and optimizer must be what one call of fastloda's make_private returned")
        size = max_physical_batch_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"max_physical_batch_size must be an integer >= 1, got {size!r}")
        self._loader, self._size, self._optimizer = data_loader, size, optimizer

    def __enter__(self) -> PoissonLoader:
        return self._loader.split(self._size)

    def __exit__(self, *exception) -> None:
        self._optimizer.drop_parts()


def _check_uniform(source: DataLoader, ranks: int) -> int:
    """Refuse a loader that Poisson batches would replace silently; return the number of records."""
    if not isinstance(source, DataLoader):
        raise TypeError(f"data_loader must be a torch DataLoader, got {type(source).__name__}")
    if isinstance(source.dataset, IterableDataset):
        raise UserError("an IterableDataset can't be Poisson sampled by record: pass a map-style data set")
    among_ranks = ranks > 1 and type(source.sampler) is DistributedSampler and source.sampler.num_replicas == ranks
    uniform = type(source.sampler) in (RandomSampler, SequentialSampler) or among_ranks
    if type(source.batch_sampler) is not BatchSampler or not uniform:
        sampler = source.sampler if type(source.batch_sampler) in (BatchSampler, type(None)) else source.batch_sampler
        raise UserError(
            f"{type(sampler).__name__} (batch_size={source.batch_size}) would be replaced by Poisson sampling of all records: "
            "pass a DataLoader with a batch_size and no sampler of its own, over a Subset if only some records count"
        )
    dataset: Any = source.dataset  # map-style; the type stubs do not declare its length
    records = len(dataset)
    if not records or not len(source):
        raise UserError(f"data_loader has {records} records and {len(source)} batches: there is nothing to draw")
    return records
