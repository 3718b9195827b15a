"""Street View House Numbers (Netzer et al., 2011), format 2: cropped digits in MATLAB files."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from fastloda.errors import UserError

from .byte_images import to_floats
from .images import LabelledImages, check_labels, to_labels
from .published import Split, check_count, check_split, find_file, naming, warn_if_changed

WHERE = (
    "SVHN: put train_32x32.mat and test_32x32.mat (format 2, cropped digits) into the folder, or into SVHN or svhn inside it "
    "(published at ufldl.stanford.edu/housenumbers)"
)
FOLDERS = ("SVHN", "svhn")
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
COUNTS = {"train": 73_257, "test": 26_032}

_ZERO = 10  # the label of the digit 0, because MATLAB counts from 1
# Errors that SciPy raises for a damaged file, besides ValueError (found by damaging one).
_DAMAGED = (MatReadError, NotImplementedError, TypeError, LookupError, EOFError, OSError, struct.error, zlib.error)


def svhn(root: str | Path, split: Split = "train", *, partial: bool = False) -> LabelledImages:
    """Read house numbers, digit by digit, [n, 3, 32, 32]; 73,257 for training and 26,032 for tests, 900 MB as floats.

    With `partial`, the file may have fewer images.

    Raises:
        FileNotFoundError: the file is not there; the message says which to put where.
        ValueError: the file's format or count is wrong, or a label is not in 1 .. 10; the message begins with the path.
    """
    check_split(split)
    path = find_file(root, (FILES[split],), FOLDERS, WHERE)
    warn_if_changed(path, MD5.get(path.name))
    with naming(path, *_DAMAGED):
        content = loadmat(path, variable_names=("X", "y"))
        if missing := {"X", "y"} - content.keys():
            raise UserError(f"no {' or '.join(sorted(missing))} in it")
        pixels, labels = content["X"], content["y"].reshape(-1)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
            raise UserError(f"X must be uint8 [32, 32, 3, n], not {pixels.dtype} {list(pixels.shape)}")
        check_count(pixels.shape[3], COUNTS[split], partial)
        images = to_floats(torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))))
        return LabelledImages(images, _digits(labels), num_classes=10)


def _digits(labels: np.ndarray) -> torch.Tensor:
    """Convert the labels 1 .. 9 and 10 to the digits 1 .. 9 and 0."""
    labels = to_labels(labels)
    check_labels(labels, 1, _ZERO)
    return labels % _ZERO
