"""The private records, read one by one, and batches of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, default_collate

Columns = Tensor | np.ndarray | tuple[Tensor | np.ndarray, ...] | Mapping[str, Tensor | np.ndarray]


class Batches:
    """A map-style Dataset, or columns: tensors or arrays with one record per row, one, a tuple or a dict of them.

    Attributes:
        records: how many.

    Raises:
        ValueError: the data is neither, or could be both, or is empty.
    """

    def __init__(self, data: Columns | Dataset):
        self._data = data
        self._columns = _are_columns(data)
        if self._columns:
            lengths = {len(t) if t.ndim else 0 for t in tree_leaves(data)}
            if len(lengths) != 1 or 0 in lengths:
                raise ValueError(
                    f"data's tensors must have one record per row, the same number >= 1 each; got {sorted(lengths)}"
                )
            self.records = lengths.pop()
        elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data):
            self.records = len(data)
        else:
            raise ValueError(f"data must be tensors or a map-style Dataset with records, got {type(data).__name__}")

    def read(self, indices: Tensor) -> list:
        """What `batch` takes, for each of the indices."""
        return indices.tolist() if self._columns else [self._data[i] for i in indices.tolist()]

    def batch(self, read: list, device: torch.device) -> Any:
        """The batch of what was read, as `default_collate` makes it or in the columns' structure; its tensors on the device."""
        if self._columns:
            rows = torch.tensor(read, dtype=torch.long)
            batch = tree_map(lambda t: _rows(t, rows), self._data)
        else:
            batch = default_collate(read)
        return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)


def _are_columns(data: object) -> bool:
    """Raises ValueError: it is open what a record is, on which all privacy rests."""
    held = (
        list(data.values()) if isinstance(data, Mapping) else list(data) if isinstance(data, (tuple, list)) else [data]
    )
    columns = [isinstance(t, (Tensor, np.ndarray)) for t in held]
    if isinstance(data, list) and any(columns):
        raise ValueError(
            "data is a list of tensors, which may be records or columns: give a tuple of columns with one record per row, "
            "(images, labels), or one tensor of all records, torch.stack(data)"
        )
    if isinstance(data, Mapping) and not all(columns) or any(columns) and not all(columns):
        other = next(type(t).__name__ for t, is_one in zip(held, columns) if not is_one)
        raise ValueError(
            f"data is a {type(data).__name__} of columns, of which one is a {other}: each must be a tensor or an array with one "
            "record per row; a list of records holds tuples or dicts"
        )
    return bool(held) and all(columns)


def _rows(column: Tensor | np.ndarray, rows: Tensor) -> Tensor:
    return column[rows.to(column.device)] if isinstance(column, Tensor) else torch.as_tensor(column[rows.numpy()])
