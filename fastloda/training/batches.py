"""The private records, read one by one, and the batches made of them."""

from collections.abc import Callable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, default_collate

from fastloda.errors import UserError

Columns = Tensor | np.ndarray | tuple[Tensor | np.ndarray, ...] | Mapping[str, Tensor | np.ndarray]


class Batches:
    """The records of a map-style Dataset, or of columns: a tensor or array with one record per row, or a tuple or dict of them.

    Attributes:
        records: number of records.
        unit: the word for what is drawn, clipped and accounted for; here a record.
        rows: number of rows of a unit in a step.

    Raises:
        ValueError: the data is neither, or could be both, or is empty.
    """

    unit, rows = "record", 1

    def __init__(self, data: Columns | Dataset):
        self._data = data
        self._columns = _are_columns(data)
        if self._columns:
            lengths = {len(t) if t.ndim else 0 for t in tree_leaves(data)}
            if len(lengths) != 1 or 0 in lengths:
                raise UserError(
                    f"data's tensors must have one record per row, the same number >= 1 each; got {sorted(lengths)}"
                )
            self.records = lengths.pop()
        elif hasattr(data, "__getitem__") and isinstance(data, Sized) and len(data):
            self.records = len(data)
        else:
            raise UserError(f"data must be tensors or a map-style Dataset with records, got {type(data).__name__}")

    @property
    def units(self) -> int:
        """The number of units."""
        return self.records

    def facts(self) -> dict[str, Any]:
        """List what must be the same on all ranks, and when a run resumes."""
        return {"records": self.records, "owners": None}

    def read(self, units: Tensor, stream: Callable[[str], Generator]) -> list:
        """Read the units of these indices, in the form that `batch` takes; random choices draw from the step's `stream`s."""
        return units.tolist() if self._columns else [self._data[i] for i in units.tolist()]

    def batch(self, read: list, device: torch.device) -> Any:
        """Make a batch of `read`, as `default_collate` does or in the columns' structure, with its tensors on the device."""
        if self._columns:
            rows = torch.tensor(read, dtype=torch.long)
            batch = tree_map(lambda t: _rows(t, rows), self._data)
        else:
            batch = default_collate(read)
        return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)

    def weights(self, read: list) -> Tensor | None:
        """Compute the rows' weights, [len(read) * rows]: a unit's loss is the mean of its weighted rows; None if all are 1."""
        return None


def _are_columns(data: object) -> bool:
    """Tell whether `data` is columns. Raises ValueError if it is unclear what a record is, on which all privacy rests."""
    held = (
        list(data.values()) if isinstance(data, Mapping) else list(data) if isinstance(data, (tuple, list)) else [data]
    )
    columns = [isinstance(t, (Tensor, np.ndarray)) for t in held]
    if isinstance(data, list) and any(columns):
        raise UserError(
            "data is a list of tensors, which may be records or columns: give a tuple of columns with one record per row, "
            "(images, labels), or one tensor of all records, torch.stack(data)"
        )
    if isinstance(data, Mapping) and not all(columns) or any(columns) and not all(columns):
        other = next(type(t).__name__ for t, is_one in zip(held, columns) if not is_one)
        raise UserError(
            f"data is a {type(data).__name__} of columns, of which one is a {other}: each must be a tensor or an array with one "
            "record per row; a list of records holds tuples or dicts"
        )
    return bool(held) and all(columns)


def _rows(column: Tensor | np.ndarray, rows: Tensor) -> Tensor:
    return column[rows.to(column.device)] if isinstance(column, Tensor) else torch.as_tensor(column[rows.numpy()])
