"""Labelled images as one checked, immutable value: no later step has to ask about range, layout or dtype."""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastloda.files import write_atomically

from .byte_images import WHITE, ByteImages, to_floats

CHANNELS = (1, 3)  # grey or RGB: what makes the layout of an npz readable from its shape
# What NumPy and zipfile raise, between them, for a damaged file (found by damaging one).
_UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with one class each.

    Args:
        images: float32 [n, C, H, W] in [-1, 1], C = 1 (grey) or 3 (RGB); n may be 0. Or `ByteImages`, which read as that
            and take a quarter of the memory.
        labels: int64 [n] in 0 .. num_classes - 1.
        num_classes: at least 1; classes without an image are allowed.

    Raises:
        ValueError: something above does not hold; the message has the offending values.
    """

    images: Tensor | ByteImages
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if (types := (images.dtype, labels.dtype)) != (torch.float32, torch.int64):
            raise ValueError(f"images must be float32 and labels int64, not {types[0]} and {types[1]}")
        if images.ndim != 4 or images.shape[1] not in CHANNELS:
            raise ValueError(f"images must be [n, C, H, W] with C in {CHANNELS}, not {list(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be of shape [{len(images)}], one an image, not {list(labels.shape)}")
        if not isinstance(images, ByteImages):
            _refuse(images, lambda x: ~x.isfinite(), "images must be finite")
            _refuse(images, lambda x: x.abs() > 1, "images must lie in [-1, 1]")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {self.num_classes}")
        check_labels(labels, 0, self.num_classes - 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "LabelledImages":
        """The images picked by a slice, an int64 tensor of positions or a boolean mask of length n; bytes stay bytes."""
        images = self.images
        picked = ByteImages(images.pixels[index]) if isinstance(images, ByteImages) else images[index]
        return LabelledImages(picked, self.labels[index], self.num_classes)

    def digest(self) -> str:
        """sha256 of pixels and labels: equal for equal images, kept alike."""
        pixels = self.images.pixels if isinstance(self.images, ByteImages) else self.images
        digest = hashlib.sha256(pixels.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()

    def save_npz(self, path: str | Path, *, uint8: bool = False) -> None:
        """Write `images` (NCHW), `labels` and `num_classes` to exactly `path`: all of the file or none of it.

        float32 comes back bit for bit from `load_npz`; `uint8` takes a quarter of the space: 256 levels. `ByteImages` are
        written as they are.
        """
        images = _to_array(self.images, uint8)
        labels = self.labels.cpu().numpy()
        _write_npz(Path(path), images=images, labels=labels, num_classes=self.num_classes)


def load_npz(path: str | Path, *, num_classes: int | None = None) -> LabelledImages:
    """Read labelled images from an npz file, written by `LabelledImages.save_npz` or by anyone else.

    `images`: uint8 0 .. 255 (mapped to [-1, 1]) or floats already in [-1, 1]; [n, C, H, W] or [n, H, W, C],
    C = 1 or 3. Where both readings are possible, as for [n, 3, 8, 3], it is [n, C, H, W].
    `labels`: integers [n].
    `num_classes`: optional. The argument wins over the file; with neither it is the largest label + 1.
    Nothing is ever unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an npz, lacks an array, holds pickled objects, or its values break a rule above.
            Every message begins with the path.
    """
    path = Path(path)
    arrays = read_npz(path, ("images", "labels"), optional=("num_classes",))
    try:
        images, labels = _to_nchw(arrays["images"]), to_labels(arrays["labels"])
        if num_classes is None:
            largest = int(labels.max()) if labels.numel() else 0
            num_classes = int(arrays["num_classes"]) if "num_classes" in arrays else max(largest, 0) + 1
        return LabelledImages(images, labels, num_classes)
    except (ValueError, TypeError) as error:  # TypeError: a num_classes that is not one number
        raise ValueError(f"{path}: {error}") from error


def check_labels(labels: Tensor, first: int, last: int) -> None:
    """ValueError, with the offending values, unless all are in first .. last."""
    _refuse(labels, lambda y: (y < first) | (y > last), f"labels must lie in {first} .. {last}")


def _refuse(values: Tensor, is_bad: Callable[[Tensor], Tensor], rule: str) -> None:
    bad = values[is_bad(values)]
    if bad.numel():
        some = ", ".join(f"{value:.8g}" for value in bad[:3].tolist())
        raise ValueError(f"{rule}; {bad.numel()} of {values.numel()} values do not: {some}")


def read_npz(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an npz file by name, those of `optional` if they are there; nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an npz, is damaged, lacks an array, or holds pickled objects; begins with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := set(needed) - set(archive.files):
                raise ValueError(f"no array {' or '.join(sorted(missing))}; it has {archive.files}")
            wanted = {*needed, *optional} & set(archive.files)
            return {name: np.asarray(archive[name]) for name in wanted}
    except _UNREADABLE as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path}: pickled objects are refused, because unpickling runs code") from error
        raise ValueError(f"{path}: {error}") from error


def _to_array(images: Tensor | ByteImages, uint8: bool) -> np.ndarray:
    if isinstance(images, ByteImages):
        return images.pixels.cpu().numpy()
    floats = images.cpu().numpy()
    return np.rint((floats + 1) * (WHITE / 2)).astype(np.uint8) if uint8 else floats


def _to_nchw(array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"images must be uint8 or floats, not {array.dtype}")
    if array.ndim != 4 or not {array.shape[1], array.shape[3]} & set(CHANNELS):
        rule = f"images must be [n, C, H, W] or [n, H, W, C] with C in {CHANNELS}"
        raise ValueError(f"{rule}, not {list(array.shape)}")
    if array.shape[1] not in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    if array.dtype == np.uint8:
        return to_floats(torch.from_numpy(np.ascontiguousarray(array)))
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def to_labels(array: np.ndarray) -> Tensor:
    """int64 of any integers.

    Raises:
        ValueError: they are no integers.
    """
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be integers, not {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _write_npz(path: Path, **arrays: np.ndarray | int) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, savez would append .npz to it
            np.savez(file, **arrays)

    write_atomically(path, write)
