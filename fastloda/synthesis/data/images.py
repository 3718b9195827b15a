"""Labelled images as a checked, immutable value, so that no later step has to check range, layout or dtype."""

import hashlib
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.files import write_atomically

from .byte_images import WHITE, ByteImages, to_floats

CHANNELS = (1, 3)  # grey or RGB, so that an npz file's shape shows its layout
MOST_CLASSES = 100_000  # more could not be classes, and their names would fill the memory
# Errors that NumPy and zipfile raise for a damaged file (found by damaging one).
_UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A set of images with one class each.

    Args:
        images: float32 [n, C, H, W] in [-1, 1], C = 1 (grey) or 3 (RGB); n may be 0. Or `ByteImages`, which stand for the same
            in a quarter of the memory.
        labels: classes, int64 [n] in 0 .. num_classes - 1.
        num_classes: number of classes, 1 to `MOST_CLASSES`; classes without an image are allowed.
        class_names: name of each class, all different. Default: the numbers "0", "1", ...
        files: file of each image, if each has one.

    Raises:
        ValueError: an argument breaks a rule above; the message has the offending values.
    """

    images: Tensor | ByteImages
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if (types := (images.dtype, labels.dtype)) != (torch.float32, torch.int64):
            raise UserError(f"images must be float32 and labels int64, not {types[0]} and {types[1]}")
        if images.ndim != 4 or images.shape[1] not in CHANNELS:
            raise UserError(f"images must be [n, C, H, W] with C in {CHANNELS}, not {list(images.shape)}")
        if not all(images.shape[2:]):
            raise UserError(f"images must have pixels, not the shape {list(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise UserError(f"labels must be of shape [{len(images)}], one an image, not {list(labels.shape)}")
        if not isinstance(images, ByteImages):
            _refuse(images, lambda x: ~x.isfinite(), "images must be finite")
            _refuse(images, lambda x: x.abs() > 1, "images must lie in [-1, 1]")
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise UserError(f"num_classes must be 1 to {MOST_CLASSES:,}, not {self.num_classes}")
        check_labels(labels, 0, self.num_classes - 1)
        object.__setattr__(self, "class_names", _checked_names(self.class_names, self.num_classes))
        if self.files and len(self.files) != len(labels):
            raise UserError(f"files must be {len(labels)} paths, one an image, not {len(self.files)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "LabelledImages":
        """Pick images by a slice, an int64 tensor of positions or a boolean mask of length n; bytes stay bytes."""
        images = self.images
        picked = ByteImages(images.pixels[index]) if isinstance(images, ByteImages) else images[index]
        files = [self.files[i] for i in torch.arange(len(self))[index].tolist()] if self.files else ()
        return replace(self, images=picked, labels=self.labels[index], files=tuple(files))

    def digest(self) -> str:
        """Compute the sha256 of pixels and labels: equal for equal images of the same type (floats or bytes)."""
        pixels = self.images.pixels if isinstance(self.images, ByteImages) else self.images
        digest = hashlib.sha256(pixels.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()

    def save_npz(self, path: str | Path, *, uint8: bool = False) -> None:
        """Write `images` (NCHW), `range`, `labels`, `num_classes` and `class_names` to exactly `path`, all or nothing.

        `load_npz` returns float32 bit for bit; `uint8` takes a quarter of the space, with 256 levels. `ByteImages` are written
        as bytes.
        """
        images = _to_array(self.images, uint8)
        labels = self.labels.cpu().numpy()
        white = np.array([0, WHITE] if images.dtype == np.uint8 else [-1, 1])
        named = {"num_classes": self.num_classes, "class_names": np.array(self.class_names)}
        _write_npz(Path(path), images=images, range=white, labels=labels, **named)


def _checked_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return the classes' names in Unicode's composed form, so that equal names are equal strings; numbers if there are none."""
    if not names:
        return tuple(map(str, range(num_classes)))
    names = tuple(unicodedata.normalize("NFC", name) for name in names)
    if len(names) != num_classes or len(set(names)) < num_classes or not all(names):
        raise UserError(f"class_names must be {num_classes} different names, one a class, not {list(names)}")
    return names


def load_npz(path: str | Path, *, num_classes: int | None = None) -> LabelledImages:
    """Read labelled images from an npz file, written by `LabelledImages.save_npz` or by anyone else.

    `images`: uint8 or floats, [n, C, H, W] or [n, H, W, C], C = 1 or 3. Where both readings are possible, as for
    [n, 3, 8, 3], it is [n, C, H, W].
    `range`: optional; the values of black and white. Default: [0, 255] for uint8, [-1, 1] for floats. Without it, images that
    look as if another range was meant (floats without a negative value; uint8 in the dark half only) are refused: what one
    record holds may not decide how all are read.
    `labels`: integers [n], from 0.
    `num_classes`: optional. The argument wins over the file; with neither it is the number of `class_names`, or else the largest
    label + 1, and each class must have an image.
    `class_names`: optional strings [num_classes].

    Nothing is ever unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an npz, lacks an array, holds pickled objects, or its values break a rule above.
            Every message begins with the path.
    """
    path = Path(path)
    arrays = read_npz(path, ("images", "labels"), optional=("range", "num_classes", "class_names"))
    try:
        images, labels = _to_nchw(arrays["images"]), to_labels(arrays["labels"])
        images = _in_range(images, arrays.get("range"))
        names = _names(arrays["class_names"]) if "class_names" in arrays else ()
        if num_classes is None:
            given = _one_integer(arrays["num_classes"]) if "num_classes" in arrays else len(names)
            num_classes = given or _classes_of(labels)
        return LabelledImages(images, labels, num_classes, names)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _names(array: np.ndarray) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1:
        raise UserError(f"class_names must be strings, one a class, not {array.dtype} of shape {list(array.shape)}")
    return tuple(array.tolist())


def _one_integer(array: np.ndarray) -> int:
    if array.size != 1 or array.dtype.kind not in "iuf" or array.item() % 1:
        raise UserError(f"num_classes must be an integer, not {array!r}")
    return int(array.item())


def _in_range(images: Tensor, black_and_white: np.ndarray | None) -> Tensor:
    """Convert uint8 or float images to float32 in [-1, 1], by the values of black and white if given."""
    if black_and_white is None:
        _refuse_other_ranges(images)
        return to_floats(images) if images.dtype == torch.uint8 else images.float()
    if black_and_white.shape != (2,) or black_and_white.dtype.kind not in "iuf":
        raise UserError(f"range must be two numbers, those of black and of white, not {black_and_white!r}")
    black, white = map(float, black_and_white)
    if not 0 < white - black < float("inf"):
        raise UserError(f"range must be the number of black, then the larger one of white, not [{black:g}, {white:g}]")
    if (black, white) == (0, WHITE) and images.dtype == torch.uint8:
        return to_floats(images)
    if (black, white) == (-1, 1):
        return images.float()
    _refuse(images, lambda x: ~((x >= black) & (x <= white)), f"images must lie in range, [{black:g}, {white:g}]")
    return ((images.double() - black) / (white - black) * 2 - 1).clamp(-1, 1).float()  # clamp: of rounding errors


def _refuse_other_ranges(images: Tensor) -> None:
    if not images.numel():
        return
    least, most = images.min().item(), images.max().item()
    if images.dtype == torch.uint8:
        way_out = f"Say what black and white are, by an array range=[0, {most}] in the file, or [0, {WHITE}] if they are so dark"
        check_not_dark(most, way_out)
    elif 0 <= least and most <= 1:
        raise UserError(
            f"images are floats from {least:g} to {most:g}, where black may be 0 or -1: say which, by an array range=[0, 1] or "
            "range=[-1, 1] in the file"
        )
    elif max(-least, most) > 1:
        raise UserError(
            f"images must lie in [-1, 1], not from {least:g} to {most:g}; or say what black and white are, by an array as "
            "range=[0, 255] in the file"
        )


def check_not_dark(most: int, way_out: str) -> None:
    """Refuse bytes whose largest value `most` is in the dark half, as in masks of 0 and 1, with a ValueError."""
    if most <= WHITE // 2:
        raise UserError(f"images are bytes of at most {most}, dark to black if white is {WHITE}. {way_out}")


def _classes_of(labels: Tensor) -> int:
    """Count the classes from the labels, if num_classes is not given."""
    if not labels.numel():
        return 1
    if (least := int(labels.min())) < 0:
        raise UserError(f"labels must count from 0, and the least of them is {least}")
    count = int(labels.max()) + 1
    if unseen := sorted(set(range(min(count, len(labels) + 1))) - set(labels.flatten().tolist())):
        counted = f"subtract {least}, so that they count from 0, or " if least else ""
        raise UserError(
            f"labels are {least} .. {count - 1}, but no image has label {unseen[0]}: {counted}say how many classes there are by "
            f"num_classes={count} in the file"
        )
    return count


def check_labels(labels: Tensor, first: int, last: int) -> None:
    """Refuse labels outside first .. last with a ValueError that shows them."""
    _refuse(labels, lambda y: (y < first) | (y > last), f"labels must lie in {first} .. {last}")


def _refuse(values: Tensor, is_bad: Callable[[Tensor], Tensor], rule: str) -> None:
    bad = values[is_bad(values)]
    if bad.numel():
        some = ", ".join(f"{value:.8g}" for value in bad[:3].tolist())
        raise UserError(f"{rule}; {bad.numel()} of {values.numel()} values do not: {some}")


def read_npz(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read arrays of an npz file by name, those of `optional` only if they exist; nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an npz, is damaged, lacks an array, or holds pickled objects; the message begins with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := set(needed) - set(archive.files):
                raise UserError(f"no array {' or '.join(sorted(missing))}; it has {archive.files}")
            wanted = {*needed, *optional} & set(archive.files)
            return {name: np.asarray(archive[name]) for name in wanted}
    except _UNREADABLE as error:
        if "allow_pickle" in str(error):
            raise UserError(f"{path}: pickled objects are refused, because unpickling runs code") from error
        raise UserError(f"{path}: {error}") from error


def _to_array(images: Tensor | ByteImages, uint8: bool) -> np.ndarray:
    if isinstance(images, ByteImages):
        return images.pixels.cpu().numpy()
    floats = images.cpu().numpy()
    return np.rint((floats + 1) * (WHITE / 2)).astype(np.uint8) if uint8 else floats


def _to_nchw(array: np.ndarray) -> Tensor:
    array = array.astype(np.uint8) if array.dtype == np.bool_ else array
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"images must be uint8 or floats, not {array.dtype}: give other integers as floats, with their range"
        )
    if array.ndim != 4 or not {array.shape[1], array.shape[3]} & set(CHANNELS):
        rule = f"images must be [n, C, H, W] or [n, H, W, C] with C in {CHANNELS}"
        raise UserError(f"{rule}, not {list(array.shape)}")
    if array.shape[1] not in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    kept = array.dtype if array.dtype in (np.uint8, np.float64) else np.float32
    return torch.from_numpy(np.ascontiguousarray(array, dtype=kept))


def to_labels(array: np.ndarray) -> Tensor:
    """Convert an array of any integers to int64 labels.

    Raises:
        ValueError: the array does not hold one integer per image.
    """
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"labels must be integers, not {array.dtype}: number the classes from 0")
    if array.ndim != 1:
        raise UserError(f"labels must be one integer an image, not an array of shape {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))


def _write_npz(path: Path, **arrays: np.ndarray | int) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, np.savez would append .npz to it
            np.savez(file, **arrays)

    write_atomically(path, write)
