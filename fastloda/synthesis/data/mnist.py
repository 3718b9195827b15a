"""MNIST from its idx files (LeCun, Cortes and Burges, 1998)."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastloda.errors import UserError

from .byte_images import to_floats
from .images import LabelledImages, to_labels
from .published import Split, check_count, check_split, find_file, naming, warn_if_changed

WHERE = (
    "MNIST: put train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, "
    "each as it is or with .gz, into the folder or into MNIST/raw inside it (published at yann.lecun.com/exdb/mnist)"
)
FOLDERS = ("MNIST/raw", "raw")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
COUNTS = {"train": 60_000, "test": 10_000}
SIDE = 28

_UNSIGNED_BYTE = 0x08
_GZIP = b"\x1f\x8b"


def mnist(root: str | Path, split: Split = "train", *, size: int = SIDE, partial: bool = False) -> LabelledImages:
    """Read handwritten digits, [n, 1, size, size], with ink 1 and background -1; 60,000 for training and 10,000 for tests.

    `size` above 28 adds background around the digits: 32 fits a U-Net that halves its images several times. Other sets in this
    format (Fashion-MNIST, KMNIST) are read too if their counts are the same, with a warning about their checksums; with
    `partial`, if their counts are smaller.

    Raises:
        FileNotFoundError: a file is not there; the message says which files to put where.
        ValueError: a file is no idx file of the right shape, or a label is not in 0 .. 9; the message begins with the path.
    """
    check_split(split)
    if size < SIDE:
        raise UserError(f"size must be at least {SIDE}, not {size}")
    paths = [find_file(root, (name, f"{name}.gz"), FOLDERS, WHERE) for name in FILES[split]]
    for path in paths:
        warn_if_changed(path, MD5.get(path.name))
    count = COUNTS[split]
    pixels, labels = _read_idx(paths[0], (count, SIDE, SIDE), partial), _read_idx(paths[1], (count,), partial)
    before = (size - SIDE) // 2
    images = F.pad(torch.from_numpy(pixels)[:, None], 2 * (before, size - SIDE - before))
    with naming(paths[1]):
        return LabelledImages(to_floats(images), to_labels(labels), num_classes=10)


def _read_idx(path: Path, shape: tuple[int, ...], partial: bool) -> np.ndarray:
    """Read uint8 of this shape, or fewer rows of it; the header is checked before any data of the size that it states is read."""
    with naming(path, EOFError, gzip.BadGzipFile, zlib.error), _open(path) as file:
        header = file.read(4 + 4 * len(shape))
        if len(header) < 4 + 4 * len(shape):
            raise UserError(f"{len(header)} bytes are no idx file")
        zeros, kind, dimensions, *found = struct.unpack(f">HBB{len(shape)}I", header)
        if (zeros, kind, dimensions) != (0, _UNSIGNED_BYTE, len(shape)):
            wanted = bytes([0, 0, _UNSIGNED_BYTE, len(shape)])
            raise UserError(f"begins with {header[:4].hex()}, an idx file of such bytes with {wanted.hex()}")
        check_count(found[0], shape[0], partial)
        shape = (found[0], *shape[1:])
        if tuple(found) != shape:
            raise UserError(f"images of {found[1:]} pixels, not {list(shape[1:])}")
        content = file.read(math.prod(shape) + 1)
        if len(content) != math.prod(shape):
            amount = "more" if len(content) > math.prod(shape) else "less"
            raise UserError(f"holds {amount} than the {math.prod(shape)} bytes that its header states")
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)


def _open(path: Path):
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP
    return gzip.open(path) if compressed else path.open("rb")
