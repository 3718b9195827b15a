"""CIFAR-10 (Krizhevsky, 2009), from its Python pickles or from its binary version."""

from pathlib import Path

import numpy as np
import torch

from fastloda.errors import UserError

from .batches import PIXELS, SHAPE, Batch, read_batch
from .byte_images import to_floats
from .images import LabelledImages, check_labels, to_labels
from .published import Split, check_count, check_split, find_files, naming, warn_if_changed

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WHERE = (
    "CIFAR-10: put data_batch_1 to data_batch_5 and test_batch, or those of the binary version, which end in .bin, into the "
    "folder, or leave them in cifar-10-batches-py or cifar-10-batches-bin inside it (published as cifar-10-python.tar.gz and "
    "cifar-10-binary.tar.gz at www.cs.toronto.edu/~kriz/cifar.html)"
)
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
COUNT = 10_000  # number of images in each file


def cifar10(root: str | Path, split: Split = "train", *, partial: bool = False) -> LabelledImages:
    """Read small photographs of `CLASSES`, [n, 3, 32, 32]: 50,000 for training and 10,000 for tests, 614 MB as floats.

    The pickles are read as data: no code in them is run (see `safe_pickle`). With `partial`, missing files are left out.

    Raises:
        FileNotFoundError: a file is not there; the message says which files to put where.
        ValueError: a file's format or count is wrong, or a label is not in 0 .. 9; the message begins with the path.
    """
    check_split(split)
    names = [(name, f"{name}.bin") for name in FILES[split]]
    paths = find_files(root, names, FOLDERS, WHERE, partial)
    pixels, labels = zip(*(_read(path, partial) for path in paths), strict=True)
    images = torch.from_numpy(np.concatenate(pixels).reshape(-1, *SHAPE))
    return LabelledImages(to_floats(images), torch.cat(labels), num_classes=len(CLASSES))


def _read(path: Path, partial: bool) -> Batch:
    with naming(path):
        warn_if_changed(path, MD5.get(path.name))
        pixels, labels = _from_binary(path) if path.suffix == ".bin" else read_batch(path)
        check_count(len(pixels), COUNT, partial)
        check_labels(labels, 0, len(CLASSES) - 1)
        return pixels, labels


def _from_binary(path: Path) -> Batch:
    """Read records of one byte for the label and `PIXELS` bytes for the image."""
    content = np.fromfile(path, np.uint8)
    if len(content) % (1 + PIXELS):
        raise UserError(f"{len(content)} bytes are no whole number of records of {1 + PIXELS}")
    records = content.reshape(-1, 1 + PIXELS)
    return records[:, 1:], to_labels(records[:, 0])
