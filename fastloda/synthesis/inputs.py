"""Data sets as the command line names them: NAME, a folder of images, or an npz file.

NAME is one of `data.NAMES`, as in "mnist:/data/mnist", "cifar10-test:/data" or "cifar10@1%:/data": the folder that a
published set lies in follows the colon, "-test" means its test part, and "@500" or "@1%" a stratified subset.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from fastloda.errors import UserError
from fastloda.synthesis.data import NAMES, LabelledImages, open_dataset, stratified_subset
from fastloda.synthesis.data.catalogue import ALWAYS_THERE
from fastloda.synthesis.data.folder import class_names
from fastloda.synthesis.diffusion import UNetConfig

logger = logging.getLogger("fastloda")

NAMED = frozenset(  # data sets that are the same everywhere and need no file
    f"{name}-test" if split == "test" else name for name, drawn in ALWAYS_THERE.items() for split in drawn.splits
)

_NAME = re.compile(
    rf"(?P<name>{'|'.join(map(re.escape, NAMES))})(?P<test>-test)?(@((?P<percent>\d+(\.\d+)?)%|(?P<count>\d+)))?(:(?P<root>.+))?"
)


class Takes(NamedTuple):
    """The images that a model takes, [in_channels, image_size, image_size], of at most num_classes classes; None: any number."""

    in_channels: int
    image_size: int
    num_classes: int | None


class _Named(NamedTuple):
    """The data set, part and subset that a name on the command line stands for."""

    name: str
    split: str
    count: int | None
    fraction: float | None
    root: str | None


def open_images(
    name: str,
    *,
    num_classes: int | None = None,
    count: int = 20_000,
    seed: int = 0,
    size: int | None = None,
    channels: int | None = None,
) -> LabelledImages:
    """Open a data set as the command line names it; the options are those of `open_dataset`.

    Raises:
        FileNotFoundError, ValueError: there is no such data set, it is damaged, or it has more classes than num_classes.
    """
    options = {"num_classes": num_classes, "count": count, "seed": seed, "size": size, "channels": channels}
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


def files_of(data: str) -> tuple[Path, ...]:
    """List the npz file that a name of a data set stands for, or nothing if it stands for something else."""
    return (Path(data),) if _parse(data) is None and not Path(data).is_dir() else ()


def names_of_classes(name: str, images: LabelledImages) -> list[str]:
    """List the names of the images' classes: those of the subfolders of a folder of images, else their numbers."""
    if _parse(name) is None and Path(name).is_dir():
        return class_names(name)
    return [str(label) for label in range(images.num_classes)]


def open_for_unet(name: str, unet: UNetConfig | Takes, **drawn) -> LabelledImages:
    """Open images by `open_images`, and refuse those that the U-Net can't take.

    Raises:
        ValueError: the images' shape is not the U-Net's, or they have more classes.
    """
    images = _open_as(name, unet.in_channels, unet.image_size, unet.num_classes, **drawn)
    if images.images.shape[1:] != (unet.in_channels, unet.image_size, unet.image_size):
        wanted = f"{unet.in_channels} x {unet.image_size} x {unet.image_size}"
        model, way_out = "pipeline", "convert them; a folder of colour images is resized by itself"
        if isinstance(unet, UNetConfig):
            model, way_out = "U-Net", "`fastloda pretrain` sets it by --unet.in_channels and --unet.image_size"
        raise UserError(f"{name} has images of {shape_text(images)}, the {model} is for {wanted}: {way_out}")
    if unseen := (images.labels.bincount(minlength=images.num_classes) == 0).nonzero().flatten().tolist():
        logger.warning("%s says that it has %d classes, but has no image of %s", name, images.num_classes, unseen[:10])
    return images


def open_to_pretrain(name: str, unet: UNetConfig, **drawn) -> LabelledImages:
    """Open images by `open_for_unet`, and refuse fewer classes than the U-Net's, for it would be sampled in unseen classes.

    Raises:
        ValueError: the images have fewer classes, or `open_for_unet` refuses them.
    """
    images = open_for_unet(name, unet, **drawn)
    if images.num_classes < unet.num_classes:
        raise UserError(
            f"{name} has {images.num_classes} classes, the U-Net is for {unet.num_classes}, and would never see the others: "
            f"set --unet.num_classes {images.num_classes}"
        )
    return images


def open_tests(name: str, train: LabelledImages) -> LabelledImages:
    """Open images by `open_images` to test what was trained on `train`, and refuse those of another shape.

    Raises:
        ValueError: the shape is another, or there are more classes.
    """
    tests = _open_as(name, train.images.shape[1], train.images.shape[3], train.num_classes)
    if tests.images.shape[1:] != train.images.shape[1:]:
        raise UserError(f"the training images are of {shape_text(train)}, {name} of {shape_text(tests)}")
    return tests


def shape_text(images: LabelledImages) -> str:
    """Write the shape of one image as "1 x 8 x 8"."""
    return " x ".join(map(str, images.images.shape[1:]))


def _open_as(name: str, channels: int, size: int, num_classes: int | None, **drawn) -> LabelledImages:
    """Open images, and make grey ones colour if three channels are wanted; colours are not made grey, which would lose them."""
    return open_images(name, num_classes=num_classes, size=size, channels=3 if channels == 3 else None, **drawn)


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
