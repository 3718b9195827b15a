"""A wrapper of a data loader's collate_fn that makes empty batches too and refuses a collate_fn that mixes records.

One record changes the clipped sum by at most max_grad_norm if each row of a batch comes from one record. A collate_fn can break
that (mixup, a mean over the batch), which no gradient shows. So where the records are read, collate_fn is also tried on changed
records: half of them are replaced, then the other half, and no value of the batch may change both times.
"""

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastloda.errors import PrivacyError
from fastloda.per_sample.refusals import is_power_of_two
from fastloda.randomness import generators_in

_halves = random.SystemRandom()  # draws from no generator that a training run uses
RELATIVE, ABSOLUTE = 1e-5, 1e-8  # tolerances: smaller differences are rounding
_UNSTEADY = (
    "so that it can't be seen whether it mixes them: let it draw from the global generators of torch, numpy or random, which "
    "PyTorch seeds in each worker"
)
_PLAIN = (np.generic, bool, int, float, complex, str, bytes)


class CollateOrEmpty:
    """The collate_fn that calls the given one, and also makes a batch of no records: that of one record, cut to 0 rows.

    It reads no record before a batch is requested: so records are read in the workers, if there are any, where the data set may
    open its files. At each worker's 1st, 2nd, 4th, 8th, ... batch of two or more records it checks whether collate_fn mixes
    them. These trials leave all random generators as they were.

    Raises:
        PrivacyError: collate_fn mixes records.
        TypeError: collate_fn's values can't be made empty, or the data set's __getitems__ returns no list of records.
    """

    def __init__(self, collate_fn: Callable, dataset: Dataset):
        self.collate_fn = collate_fn
        self.dataset: Any = dataset  # map-style: the type stubs do not declare all its methods
        self.empty, self.batches = None, 0

    def __call__(self, records: list) -> Any:
        if not isinstance(records, (list, tuple)):
            raise TypeError(
                f"the data set's __getitems__ gave a {type(records).__name__}: it must return a list with one item a record"
            )
        if self.empty is None:
            self.empty = self._make_empty(records)
        if not len(records):
            return copy.deepcopy(self.empty)
        if len(records) > 1:
            self.batches += 1
            if is_power_of_two(self.batches):
                self._refuse_mixed_reading(len(records))
                self._refuse_mixing(records)
        return self.collate_fn(records)

    def _make_empty(self, records: list) -> Any:
        with _nothing_drawn(self.collate_fn):
            record = records[0] if len(records) else self.dataset[0]
            one, two = (self.collate_fn([_like(record, record) for _ in range(count)]) for count in (1, 2))
        return _without_rows(one, two)

    def _refuse_mixed_reading(self, count: int) -> None:
        """Refuse a data set with __getitems__ if a batch's first record changes when others are read after it."""
        dataset = self.dataset
        while type(dataset) is Subset:  # a Subset reads record by record where its data set does
            dataset = dataset.dataset
        if not getattr(dataset, "__getitems__", None):
            return
        total = len(self.dataset)
        # a single first record is seldom the batch's largest one, or its own partner in mixup
        first, one, other = ([_halves.randrange(total) for _ in range(n)] for n in (1, count - 1, count - 1))
        plain, replaced = self._first_read(first, one), self._first_read(first, other)
        if not _differ(plain, replaced):
            return
        if _differ(plain, self._first_read(first, one)):
            raise PrivacyError(
                f"the data set's __getitems__ reads other values of the same records each time, {_UNSTEADY}"
            )
        raise PrivacyError(
            "the data set's __getitems__ mixes records: what it gives of one changed when others were read after it (a "
            "statistic over the batch, a transform that takes many records?), so that one record would move the gradients of "
            "others. Compute each from its own record, with public constants for statistics"
        )

    def _first_read(self, first: list[int], rest: list[int]) -> list:
        with _nothing_drawn(self.dataset):
            return list(self.dataset.__getitems__(first + rest))[: len(first)]

    def _refuse_mixing(self, records: list) -> None:
        order = _halves.sample(range(len(records)), len(records))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        plain = self._try(records, {})
        try:
            replaced = [
                self._try(records, {i: _halves.choice(kept) for i in others}) for kept, others in (halves, halves[::-1])
            ]
        except Exception as error:  # collate_fn can't take the made-up records
            warnings.warn(
                f"whether collate_fn mixes records was not seen, for it takes no copies of them ({error!r}): each row must "
                "come from its own record",
                stacklevel=4,
            )
            return
        if not _mixes(halves, plain, *replaced):
            return
        if _mixes(halves, plain, *[self._try(records, {})] * 2):
            raise PrivacyError(f"collate_fn makes another batch of the same records each time, {_UNSTEADY}")
        raise PrivacyError(
            "collate_fn mixes records: the rows of some changed when others of the batch were replaced (a statistic over the "
            "batch, mixup, random numbers drawn by content?), so that one record would move the gradients of others. Compute "
            "each row from its own record: in the data set's __getitem__, or in the model, with public constants for statistics"
        )

    def _try(self, records: list, sources: dict[int, int]) -> Any:
        """Collate copies of the records, with record sources[i] in place of record i, always with the same random numbers."""
        with _nothing_drawn(self.collate_fn):
            return self.collate_fn([_like(records[sources.get(i, i)], own) for i, own in enumerate(records)])


def _like(values: Any, shape: Any) -> Any:
    """Copy `values`, cut or repeated to the shapes in `shape`, so that padding and the count of random numbers stay equal."""
    if isinstance(values, Tensor) and isinstance(shape, Tensor) and values.numel():
        values = values.detach()
        if values.shape == shape.shape:
            return values.clone()
        return values.flatten()[torch.arange(shape.numel()) % values.numel()].view(shape.shape)
    if isinstance(values, np.ndarray) and isinstance(shape, np.ndarray) and values.size:
        return np.resize(values, shape.shape)
    if isinstance(values, MutableMapping) and isinstance(shape, MutableMapping):
        made = copy.copy(shape)
        for key in values.keys() & shape.keys():
            made[key] = _like(values[key], shape[key])
        return made
    if type(values) is type(shape) and (type(shape) in (list, tuple) or hasattr(shape, "_fields")) and len(values):
        fields = [_like(values[i % len(values)], own) for i, own in enumerate(shape)]
        return type(shape)(*fields) if hasattr(shape, "_fields") else type(shape)(fields)
    try:
        return copy.copy(values if type(values) is type(shape) else shape)
    except Exception:  # an open file, say
        return shape


# ---- which values come from which record


Halves = tuple[list[int], list[int]]


def _differ(one: list, two: list) -> bool:
    """Tell whether two readings of the same records differ; values of different shapes may be padded, and are not compared."""
    leaves = [list(_leaves(records, None)) for records in (one, two)]
    pairs = [(a.values, b.values) for a, b in zip(*leaves)]
    return len(leaves[0]) == len(leaves[1]) and any(
        _changed(a, b).any() for a, b in pairs if a.shape == b.shape and a.dtype.kind == b.dtype.kind
    )


def _mixes(halves: Halves, *batches: Any) -> bool:
    """Tell whether a row of the first batch changed in both others, in each of which one half of the records is replaced.

    A row is what all fields of a batch hold at one index. Rows that only changed their order, as when sorted by content, count
    as unchanged. The items of a list that is as long as the batch may be fields or records: both readings are tried, and rows
    are mixed only if both say so.
    """
    return all(_mixes_as_read(halves, batches, items_are_rows) for items_are_rows in (False, True))


def _mixes_as_read(halves: Halves, batches: tuple, items_are_rows: bool) -> bool:
    count = len(halves[0]) + len(halves[1])
    leaves_of = [list(_leaves(batch, count if items_are_rows else None)) for batch in batches]
    if len({len(leaves) for leaves in leaves_of}) > 1:
        return False  # the form of the batch depends on the records: there is nothing to compare
    changed, by_row, mixed = np.zeros((2, count), bool), [], False
    for leaves in zip(*leaves_of):
        same, in_rows = [leaf.values for leaf in leaves], leaves[0].in_rows
        if len({(values.shape, values.dtype.kind) for values in same}) > 1:
            continue
        rows = _rows_of_one_half(_changed(*same), count)
        if in_rows and len(same[0]) == count:
            by_row.append(same)
        elif rows is None:
            return True
        mixed |= rows is None
        if in_rows and rows is not None and rows.shape[1] == count:
            changed |= rows
    return bool(mixed or changed.all(0).any()) and not _only_in_another_order(by_row, halves)


def _rows_of_one_half(changed: np.ndarray, count: int) -> np.ndarray | None:
    """Find a dimension no row of which changed in both batches; return changed [2, ...] along it, [2, rows], or None.

    A dimension of `count` rows is preferred, since it is the batch's.
    """
    dims = range(1, changed.ndim)
    found = [np.asarray(changed.any(tuple(d for d in dims if d != dim))) for dim in dims]
    found = [rows for rows in found if not rows.all(0).any()]
    return max(found, key=lambda rows: rows.shape[1] == count, default=None)


def _only_in_another_order(by_row: list[list[np.ndarray]], halves: Halves) -> bool:
    """Tell whether each of the two batches still has all rows of the records that were not replaced, in some order."""
    count = len(halves[0]) + len(halves[1])
    rows = [Counter(tuple(_key(leaf[i]) for leaf in batch) for i in range(count)) for batch in zip(*by_row)]
    return all((rows[0] & found).total() >= len(kept) for found, kept in zip(rows[1:], halves))


def _key(row: np.ndarray | np.generic) -> bytes | str:
    return str(row) if row.dtype.kind in "US" else row.tobytes()


def _changed(plain: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Mark the values that differ by more than rounding in each of the other batches: bool [2, ...]."""
    changed = np.stack([plain != other for other in others])
    if plain.dtype.kind in "fc" and changed.all(0).any():
        changed &= ~np.stack([np.isclose(plain, other, RELATIVE, ABSOLUTE, equal_nan=True) for other in others])
    return changed


class _Leaf(NamedTuple):
    """An array of numbers or strings in a batch; in_rows: it may have a row for each record (not inside a list of records)."""

    values: np.ndarray
    in_rows: bool


def _leaves(batch: Any, count: int | None, in_rows: bool = True, depth: int = 16) -> Iterator[_Leaf]:
    """Yield all arrays in a batch, with a list of numbers or strings as one; a list of `count` items holds one per record."""
    if isinstance(batch, Tensor) and batch.is_nested:
        yield from _leaves(batch.unbind(), count, in_rows, depth)
    elif isinstance(batch, Tensor):
        dense = batch.detach().to_dense().cpu()
        dense = dense.float() if dense.dtype in (torch.bfloat16, torch.float16) else dense
        yield _Leaf(np.atleast_1d(dense.numpy()), in_rows)
    elif isinstance(batch, (np.ndarray, *_PLAIN)) or (isinstance(batch, (list, tuple)) and _is_plain(batch)):
        if (values := np.atleast_1d(batch)).dtype.kind != "O":
            yield _Leaf(values, in_rows)
    elif depth:
        in_rows = in_rows and not (isinstance(batch, (list, tuple)) and len(batch) == count)
        held = batch if isinstance(batch, (list, tuple)) else getattr(batch, "__dict__", {}).values()
        for value in batch.values() if isinstance(batch, Mapping) else held:
            yield from _leaves(value, count, in_rows, depth - 1)


def _is_plain(values: list | tuple) -> bool:
    return len({type(value) for value in values}) == 1 and isinstance(values[0], _PLAIN)


# ---- the same random numbers again


@contextmanager
def _nothing_drawn(collate_fn: Callable) -> Generator[None]:
    """Restore the global random generators, and those that collate_fn holds, after the context."""
    with ExitStack() as after, torch.random.fork_rng(range(torch.cuda.device_count()) if _on_gpu() else []):
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        for generator in generators_in(collate_fn):
            if isinstance(generator, torch.Generator):
                after.callback(generator.set_state, generator.get_state())
            elif isinstance(generator, np.random.Generator):
                after.callback(setattr, generator.bit_generator, "state", generator.bit_generator.state)
            elif isinstance(generator, np.random.RandomState):
                after.callback(generator.set_state, generator.get_state())
            else:
                after.callback(generator.setstate, generator.getstate())
        yield


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


# ---- the empty batch


def _without_rows(one: Any, two: Any) -> Any:
    """Make the empty batch: cut the batch `one` of one record along the dimensions that are longer in `two`, of two records."""
    if isinstance(one, (Tensor, np.ndarray)) and type(one) is type(two) and one.ndim == two.ndim:
        grew = [a != b for a, b in zip(one.shape, two.shape)]
        if any(grew):
            return copy.deepcopy(one[tuple(slice(0) if g else slice(None) for g in grew)])
        if bool((one == two).all()):
            return copy.deepcopy(one)
    elif isinstance(one, Mapping):
        return type(one)({key: _without_rows(one[key], two[key]) for key in one})
    elif isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return type(one)()
        fields = [_without_rows(a, b) for a, b in zip(one, two)]
        return type(one)(*fields) if hasattr(one, "_fields") else type(one)(fields)
    elif isinstance(one, (str, int, float, type(None))) and one == two:
        return one
    elif type(one) is int and (one, two) == (1, 2):  # the number of records
        return 0
    elif getattr(one, "__dict__", None) and type(one) is type(two):
        made = copy.copy(one)
        vars(made).update({name: _without_rows(value, vars(two)[name]) for name, value in vars(one).items()})
        return made
    raise TypeError(
        f"cannot make an empty batch: collate_fn gives {type(one).__name__} values that do not grow with the batch; it must "
        "return tensors with one row a record, in lists, tuples, dicts or simple objects"
    )
