"""Images in a folder that has a subfolder for each class."""

import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fastloda.errors import UserError
from fastloda.progress import Progress

from .byte_images import to_floats
from .images import LabelledImages, check_not_dark
from .published import naming

WHERE = "A folder of images: one subfolder for each class, which holds its images as png, jpg, webp, bmp, gif, tif, ppm or pgm"
ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))

_GREY = frozenset(("1", "L", "LA"))
_COLOUR = frozenset(("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"))
_SEE_THROUGH = frozenset(("LA", "RGBA", "PA"))
_SHOWN = 3
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # an Exif tag, and its values for quarter turns
_SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev|eval)([ _-]?(set|data|split|part|images?|imgs?|[0-9]+))?",
    re.IGNORECASE,
)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # only these, since for others PIL runs programs


def class_names(root: str | Path) -> list[str]:
    """List the subfolders of a folder of images, sorted: the names of class 0, class 1 and so on.

    Raises:
        FileNotFoundError: there is no such folder, or it has no subfolders; the message says what to put where.
        ValueError: the subfolders are the parts of a data set, or the only subfolder contains those of the classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder. {WHERE}")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{root}: no subfolders. {WHERE}")
    parts = [name for name in names if _SPLIT.fullmatch(name)]
    if len(parts) == len(names) or any(_classes_in(root / name) for name in parts):
        raise UserError(
            f"{root}: {', '.join(parts)} are parts of a data set by their names, not classes: give one of them, as "
            f"{root / parts[0]}. {WHERE}"
        )
    if len(names) == 1 and len(inner := _classes_in(root / names[0])) > 1:
        raise UserError(
            f"{root}: {names[0]} would be the only class, but it holds no images itself, and the folders {_some(inner)}: give "
            f"{root / names[0]} if those are the classes, or else put all images into {names[0]} itself"
        )
    return names


def _classes_in(folder: Path) -> list[str]:
    """List the folders in `folder`, or none if `folder` holds images itself."""
    held = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if any(path.suffix.lower() in ENDINGS for path in held if not path.is_dir()):
        return []
    return [path.name for path in held if path.is_dir()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


@dataclass(frozen=True)
class FolderFacts:
    """What a folder of images holds, according to the headers of its files.

    Attributes:
        class_names: names of the classes.
        count: number of image files.
        sizes: mapping from (width, height) in pixels to the number of files whose header says so, the most frequent first.
        channels: 1 if every file is grey, else 3.
    """

    class_names: tuple[str, ...]
    count: int
    sizes: Mapping[tuple[int, int], int]
    channels: int

    @property
    def smallest_side(self) -> int:
        """The shortest side of any image, in pixels."""
        return min(min(size) for size in self.sizes)


def look_at(root: str | Path) -> FolderFacts:
    """Read the headers of the images of `class_names(root)`, which is quick; files that can't be read are left out.

    Raises:
        FileNotFoundError, ValueError: `class_names` refuses the folder, a class has no images, or none can be read.
    """
    files, sizes, modes = _files_by_class(Path(root)), Counter(), set()
    for path in (path for paths in files for path in paths):
        try:
            with _opened(path) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
                sizes[image.size[::-1] if turned else image.size] += 1
                modes.add(image.mode)
        except Exception:  # image_folder names it
            continue
    if not sizes:
        raise UserError(f"{root}: none of the {sum(map(len, files))} images can be read. {WHERE}")
    grey = 1 if modes <= _GREY else 3
    return FolderFacts(tuple(class_names(root)), sum(map(len, files)), dict(sizes.most_common()), grey)


def image_folder(root: str | Path, *, size: int | None = None, skip_unreadable: bool = False) -> LabelledImages:
    """Read the images of `class_names(root)` as floats [n, C, H, W]; C is 1 if all of them are grey, else 3.

    Images in subfolders of a class belong to the class, in linked folders too; hidden files are left out. Transparent areas
    become white, rotated photographs are turned upright, an animation gives its first image. PIL's limit on image sizes holds.

    Args:
        root: the folder of the classes' folders.
        size: side to which the central square is resized, in pixels. Default: all images must have one size.
        skip_unreadable: whether to leave out, with a warning, the images that can't be read.

    Raises:
        FileNotFoundError: there are no classes, or one has no images; the message says what to put where.
        ValueError: some images can't be read, and the message has a line for each; an image has another size than the first, or
            is there twice by a link; `class_names` refuses the folder; or all images are so dark that 255 may not mean white.
    """
    root = Path(root)
    if size is not None and size < 1:
        raise UserError(f"size must be at least 1, not {size}")
    names, files = class_names(root), _files_by_class(root)
    if strays := sorted(p.name for p in root.glob("[!.]*") if not p.is_dir() and p.suffix.lower() in ENDINGS):
        _warn_of_left_out(root, strays, "images that are in no class's folder")
    found, unreadable = _open_all([path for paths in files for path in paths], size)
    if unreadable:
        _refuse_or_skip(root, unreadable, len(found), skip_unreadable)
    files = [[path for path in paths if path in found] for paths in files]
    for name, paths in zip(names, files, strict=True):
        if not paths:
            raise UserError(f"{root / name}: none of its images can be read: mend one, or remove the class's folder")
    _check_once([path for paths in files for path in paths])
    images = list(found.values())
    _check_sizes(list(found), images)
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    pixels = np.stack([np.asarray(image.convert(mode)).reshape(image.height, image.width, -1) for image in images])
    with naming(root):
        most = int(pixels.max())
        check_not_dark(
            most, f"Save white as 255, or give the images as an npz file with an array range=[0, {max(most, 1)}]"
        )
    labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(paths) for paths in files]))
    floats = to_floats(torch.from_numpy(pixels).movedim(3, 1).contiguous())
    return LabelledImages(floats, labels, len(names), tuple(names), tuple(found))


def _files_by_class(root: Path) -> list[list[Path]]:
    return [_images_in(root / name) for name in class_names(root)]


def _open_all(paths: Sequence[Path], size: int | None) -> tuple[dict[Path, Image.Image], dict[Path, str]]:
    """Open the images that can be read; for each of the others return the reason."""
    images, unreadable = {}, {}
    for path in Progress(f"reading {paths[0].parents[1].name}", len(paths), "image").over(paths):
        try:
            images[path] = _open(path, size)
        except UserError as error:
            unreadable[path] = str(error)
    return images, unreadable


def _refuse_or_skip(root: Path, unreadable: Mapping[Path, str], readable: int, skip: bool) -> None:
    """Name all files that can't be read, in a warning if they are to be skipped, otherwise in an error."""
    count, reasons = f"{len(unreadable)} of {len(unreadable) + readable} images", "\n".join(unreadable.values())
    if not skip:
        way_out = "mend or remove them, or leave them out by --skip-unreadable (skip_unreadable=True)"
        raise UserError(f"{root}: {count} can't be read: {way_out}\n{reasons}")
    warnings.warn(f"{root}: left out {count}, which can't be read\n{reasons}", stacklevel=3)


def _images_in(folder: Path) -> list[Path]:
    files = sorted(_files_in(folder))
    images = [path for path in files if path.suffix.lower() in ENDINGS]
    if not images:
        raise FileNotFoundError(f"{folder}: no images. {WHERE}")
    if others := [path.name for path in files if path.suffix.lower() not in ENDINGS]:
        _warn_of_left_out(folder, others, "files that are no images by their names")
    return images


def _files_in(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield all files that are not hidden, including those in linked folders."""
    if (place := folder.resolve()) in above:
        raise UserError(f"{folder} is a link to a folder that it is in: remove it")
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield from _files_in(path, (*above, place)) if path.is_dir() else (path,)


def _check_once(paths: list[Path]) -> None:
    """Refuse two links to one file, including hard links: as two records it would contribute twice the bound."""
    first: dict[tuple[int, int], Path] = {}
    for path in paths:
        found = path.stat()
        if (other := first.setdefault((found.st_dev, found.st_ino), path)) is not path:
            raise UserError(
                f"{path} and {other} are one file, by a link: a record may be there once; remove one of them"
            )


def _warn_of_left_out(folder: Path, names: list[str], what: str) -> None:
    warnings.warn(f"{folder}: left out {len(names)} {what}: {_some(names)}", stacklevel=4)


def _open(path: Path, size: int | None) -> Image.Image:
    """Open an image in mode L or RGB, cut and resized to `size` if given."""
    with naming(path, Exception):  # damaged files make PIL raise nearly any error
        with _opened(path) as file:
            image = _plain(ImageOps.exif_transpose(file))
            return image if size is None else _square(image).resize((size, size), Image.Resampling.LANCZOS)


def _opened(path: Path) -> Image.Image:
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError("no file that could be read, but a pipe or a device: remove it")
    return Image.open(path, formats=_FORMATS)


def _plain(image: Image.Image) -> Image.Image:
    if image.mode not in _GREY | _COLOUR:
        raise UserError(
            f"of mode {image.mode}: only images of 8 bits a channel are read, grey or in colour: save it as one"
        )
    mode = "L" if image.mode in _GREY else "RGB"
    if image.mode in _SEE_THROUGH or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _check_sizes(paths: list[Path], images: list[Image.Image]) -> None:
    for path, image in zip(paths, images, strict=True):
        if image.size != images[0].size:
            found, first = (f"{each.width} x {each.height}" for each in (image, images[0]))
            raise UserError(f"{path}: {found} pixels, but {paths[0]} has {first}; give a size to resize them all to")
