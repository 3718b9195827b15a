"""The dict in which CIFAR-10 and ImageNet32 are published: `data`, one row of 3 x 32 x 32 bytes per image, and `labels`."""

from pathlib import Path

import numpy as np
from torch import Tensor

from fastloda.errors import UserError

from .images import read_npz, to_labels
from .safe_pickle import load_plain_pickle

SHAPE = (3, 32, 32)  # red, green, blue; rows from the top
PIXELS = 3 * 32 * 32

Batch = tuple[np.ndarray, Tensor]  # uint8 [n, PIXELS], int64 [n]


def read_batch(path: Path) -> Batch:
    """Read a batch from a pickle, or from an npz if its name ends so; no code in either is run.

    Raises:
        ValueError: the file holds something else.
    """
    if path.suffix == ".npz":
        return _check(read_npz(path, ("data", "labels")))
    batch = load_plain_pickle(path)
    if not isinstance(batch, dict):
        raise UserError(f"holds a {type(batch).__name__}, not a dict")
    return _check({key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()})


def _check(batch: dict) -> Batch:
    if missing := {"data", "labels"} - batch.keys():
        raise UserError(f"no {' or '.join(sorted(missing))}; it has {sorted(map(str, batch))}")
    pixels, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        raise UserError(f"data must be uint8 [n, {PIXELS}], not {pixels.dtype} {list(pixels.shape)}")
    if labels.shape != pixels.shape[:1]:
        raise UserError(f"labels must be of shape [{len(pixels)}], one an image, not {list(labels.shape)}")
    return pixels, to_labels(labels)
