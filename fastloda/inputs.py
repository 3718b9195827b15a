"""Data sets as the command line names them: a word, or an npz file."""

from pathlib import Path

from fastloda.data import LabelledImages, digits_split, font_digits, load_npz
from fastloda.diffusion import UNetConfig

NAMED = {
    "digits": lambda count, seed, size: digits_split()[0],
    "digits-test": lambda count, seed, size: digits_split()[1],
    "font-digits": lambda count, seed, size: font_digits(count, seed, size),
}


def open_images(
    name: str, *, num_classes: int | None = None, count: int = 20_000, seed: int = 0, size: int = 8
) -> LabelledImages:
    """A data set by name, or an npz file; count, seed and size are of font-digits.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or a label is not in 0 .. num_classes - 1.
    """
    if name in NAMED:
        images = NAMED[name](count, seed, size)
        if num_classes is not None and images.num_classes > num_classes:
            raise ValueError(f"{name} has {images.num_classes} classes, more than the {num_classes} expected")
        return images
    if not name.endswith(".npz") and not Path(name).exists():
        raise ValueError(f"data must be one of {', '.join(NAMED)} or an npz file, got {name!r}")
    images = load_npz(name, num_classes=num_classes)
    if not len(images):
        raise ValueError(f"{name} holds no images")
    return images


def full_name(data: str) -> str:
    """The same from any working directory."""
    return data if data in NAMED else str(Path(data).resolve())


def open_for_unet(name: str, unet: UNetConfig, **font_digits) -> LabelledImages:
    """`open_images`, refused unless the U-Net can take them.

    Raises:
        ValueError: their shape is not the U-Net's, or they have more classes.
    """
    images = open_images(name, num_classes=unet.num_classes, size=unet.image_size, **font_digits)
    if images.images.shape[1:] != (unet.in_channels, unet.image_size, unet.image_size):
        wanted = f"{unet.in_channels} x {unet.image_size} x {unet.image_size}"
        raise ValueError(
            f"{name} has images of {shape_text(images)}, the U-Net is for {wanted}: `fastloda pretrain` sets it by "
            "--unet.in_channels and --unet.image_size"
        )
    return images


def shape_text(images: LabelledImages) -> str:
    """Of one image, "1 x 8 x 8"."""
    return " x ".join(map(str, images.images.shape[1:]))
