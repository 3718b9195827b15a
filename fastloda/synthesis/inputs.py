"""Data sets by their names on the command line: NAME, a folder of images, or an npz file.

NAME is one of `data.NAMES`, as in "mnist:/data/mnist", "cifar10-test:/data" or "cifar10@1%:/data": after the colon comes the
folder that holds a published set, "-test" means its test part, and "@500" or "@1%" means a stratified subset.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastloda.errors import UserError
from fastloda.synthesis.data import (
    NAMES,
    FolderFacts,
    LabelledImages,
    listed,
    look_at,
    open_dataset,
    relabelled,
    stratified_subset,
)
from fastloda.synthesis.data.catalogue import ALWAYS_THERE
from fastloda.synthesis.diffusion import UNetConfig

logger = logging.getLogger("fastloda")

OWN_IMAGES = "images of one's own"  # published instead of a path
SIZES = (8, 16, 24, 32, 48, 64)  # sides in pixels to which folders of images are cut if no size is given

NAMED = frozenset(  # data sets that are the same everywhere and need no file
    f"{name}-test" if split == "test" else name for name, drawn in ALWAYS_THERE.items() for split in drawn.splits
)

_NAME = re.compile(
    rf"(?P<name>{'|'.join(map(re.escape, NAMES))})(?P<test>-test)?(@((?P<percent>\d+(\.\d+)?)%|(?P<count>\d+)))?(:(?P<root>.+))?"
)


class Takes(NamedTuple):
    """The images that a model takes: [in_channels, image_size, image_size], with at most num_classes classes (None: any)."""

    in_channels: int
    image_size: int
    num_classes: int | None


class _Named(NamedTuple):
    """The parts of a data set's name on the command line: data set, split, subset and folder."""

    name: str
    split: str
    count: int | None
    fraction: float | None
    root: str | None


def open_images(name: str, **options) -> LabelledImages:
    """Open a data set by its name on the command line; the options are those of `open_dataset`.

    Raises:
        FileNotFoundError, ValueError: there is no such data set, or it is damaged.
    """
    if (named := _parse(name)) is None:
        return open_dataset(name, **options)
    images = open_dataset(named.name, named.root, named.split, **options)
    if named.count is None and named.fraction is None:
        return images
    return stratified_subset(images, count=named.count, fraction=named.fraction)


def full_name(data: str) -> str:
    """Make the name of a data set independent of the working directory: its paths become absolute."""
    named = _parse(data)
    if named is None:
        return str(Path(data).resolve())
    if named.root is None:
        return data
    return data.removesuffix(named.root) + str(Path(named.root).resolve())


def check_there(data: str | None) -> None:
    """Refuse a path that does not exist, without reading anything; None and names pass.

    Raises:
        FileNotFoundError, ValueError: there is no such file or folder.
    """
    if data is not None and _parse(data) is None and not Path(data).exists():
        if Path(data).name != data:
            raise FileNotFoundError(f"{data}: there is no such file or folder")
        open_images(data)  # this refuses it, and lists the names that exist


def public_name(data: str, otherwise: str) -> str:
    """Return the name of a data set without its folder, or `otherwise` if it has only a path."""
    named = _parse(data)
    if named is None:
        return otherwise
    return data if named.root is None else data.removesuffix(f":{named.root}")


def files_of(data: str) -> tuple[Path, ...]:
    """List the npz file that `data` names; empty if it names something else."""
    return (Path(data),) if _parse(data) is None and not Path(data).is_dir() else ()


def open_public(name: str, *, size: int | None = None, **options) -> LabelledImages:
    """Open images by `open_images` to train a new model on; without a size, images of a folder get `sensible_size`.

    Raises:
        FileNotFoundError, ValueError: `open_images` refuses them.
    """
    if size is None and _parse(name) is None and Path(name).is_dir():
        size = sensible_size(look_at(name))
    images = open_images(name, size=size, **options)
    _warn_of_unseen_classes(name, images)
    return images


def sensible_size(facts: FolderFacts) -> int:
    """Return the largest of `SIZES` that is not above the smallest side of a folder's images, or the smallest of `SIZES`."""
    return max((size for size in SIZES if size <= facts.smallest_side), default=min(SIZES))


def open_for_unet(name: str, unet: UNetConfig | Takes, **options) -> LabelledImages:
    """Open images by `open_images` in the U-Net's size and channels; their classes may differ from its classes.

    Raises:
        FileNotFoundError, ValueError: `open_images` refuses them, or the images' shape is not the U-Net's.
    """
    images = _open_as(name, unet.in_channels, unet.image_size, **options)
    if images.images.shape[1:] != (unet.in_channels, unet.image_size, unet.image_size):
        wanted = f"{unet.in_channels} x {unet.image_size} x {unet.image_size}"
        model, way_out = "pipeline", "convert them; a folder of colour images is resized by itself"
        if isinstance(unet, UNetConfig):
            model, way_out = "U-Net", "`fastloda pretrain` takes --size and --channels"
        raise UserError(f"{name} has images of {shape_text(images)}, the {model} is for {wanted}: {way_out}")
    _warn_of_unseen_classes(name, images)
    return images


def open_tests(
    name: str, train: LabelledImages, class_map: Mapping[str, str] | None = None, **options
) -> LabelledImages:
    """Open images by `open_images` to test a model that was trained on `train`, and match their classes by name.

    Raises:
        FileNotFoundError, ValueError: `open_images` refuses them, the shape differs, or `train` does not have a class.
    """
    tests = _open_as(name, train.images.shape[1], train.images.shape[3], **options)
    if tests.images.shape[1:] != train.images.shape[1:]:
        raise UserError(f"the training images are of {shape_text(train)}, {name} of {shape_text(tests)}")
    return relabelled(tests, train.class_names, class_map, of="the training images")


def read_class_map(pairs: Sequence[str]) -> dict[str, str]:
    """Read pairs "private=public" as a mapping.

    Raises:
        UserError: an item is not such a pair, or a name is mapped twice.
    """
    split = [pair.partition("=") for pair in pairs]
    mapping = {private: public for private, _, public in split}
    if len(mapping) < len(split) or not all(private and public for private, _, public in split):
        raise UserError(f"--class-map takes pairs private=public,..., each private name once, got {','.join(pairs)}")
    return mapping


def _warn_of_unseen_classes(name: str, images: LabelledImages) -> None:
    if unseen := (images.labels.bincount(minlength=images.num_classes) == 0).nonzero().flatten().tolist():
        names = listed([images.class_names[label] for label in unseen])
        logger.warning("%s says that it has %d classes, but has no image of %s", name, images.num_classes, names)


def shape_text(images: LabelledImages) -> str:
    """Write the shape of one image as "1 x 8 x 8"."""
    return " x ".join(map(str, images.images.shape[1:]))


def _open_as(name: str, channels: int, size: int, **options) -> LabelledImages:
    """Open images, and make grey ones colour if three channels are wanted; colour images are never made grey."""
    return open_images(name, size=size, channels=3 if channels == 3 else None, **options)


def _parse(text: str) -> _Named | None:
    """Parse the name of a data set; None if it is a path."""
    if (match := _NAME.fullmatch(text)) is None:
        return None
    percent, count = match["percent"], match["count"]
    return _Named(
        match["name"],
        "test" if match["test"] else "train",
        int(count) if count else None,
        float(percent) / 100 if percent else None,
        match["root"],
    )
