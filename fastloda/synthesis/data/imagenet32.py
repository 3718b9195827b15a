"""ImageNet at 32 x 32 pixels (Chrabaszcz, Loshchilov and Hutter, 2017): all of it, or the classes that are wanted.

Its labels 1 .. 1000 are those of ILSVRC's map_clsloc.txt (1 is kit fox). They do not follow the sorted WordNet ids (where tench
is the first), which most networks of ImageNet use.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastloda.errors import UserError

from .batches import PIXELS, SHAPE, Batch, read_batch
from .byte_images import ByteImages
from .images import LabelledImages, check_labels
from .published import Split, check_count, check_split, find_files, naming

WHERE = (
    "ImageNet32: put train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz, or the pickles of those names "
    "without .npz, into the folder, or leave them in Imagenet32_train_npz and Imagenet32_val_npz, or Imagenet32_train and "
    "Imagenet32_val, inside it; map_clsloc.txt of ILSVRC is used if it is there (published at image-net.org as downsampled "
    "ImageNet, which asks for an account)"
)
FOLDERS = ("Imagenet32_train_npz", "Imagenet32_val_npz", "Imagenet32_train", "Imagenet32_val")
FILES = {"train": tuple(f"train_data_batch_{i}" for i in range(1, 11)), "test": ("val_data",)}
COUNTS = {"train": 1_281_167, "test": 50_000}
CLASSES = 1000
MAP = "map_clsloc.txt"


class Match(NamedTuple):
    """A class of CIFAR-10 and the class of ImageNet that shows the same, with its WordNet id and its label in 1 .. 1000."""

    cifar10: str
    imagenet: str
    wordnet: str
    label: int


# In CIFAR-10's order. It stands for Table I of "Efficient Differentially Private Fine-Tuning of Diffusion Models" (Liu et al.,
# 2024), which we could not look up: it is our own choice, by WordNet's names, and other classes can be given as `classes`.
# ImageNet's 1,000 classes have no deer; the impala is the brown, antlered one among its antelopes. CIFAR-10's trucks are only
# big trucks, no pickups.
MATCHES = (
    Match("airplane", "airliner", "n02690373", 230),
    Match("automobile", "sports_car", "n04285008", 274),
    Match("bird", "robin", "n01558993", 391),
    Match("cat", "tabby", "n02123045", 174),
    Match("deer", "impala", "n02422699", 57),
    Match("dog", "golden_retriever", "n02099601", 125),
    Match("frog", "tree_frog", "n01644373", 500),
    Match("horse", "sorrel", "n02389026", 39),
    Match("ship", "container_ship", "n03095699", 243),
    Match("truck", "trailer_truck", "n04467665", 283),
)


def imagenet32(
    root: str | Path, split: Split = "train", *, classes: Sequence[int | str] | None = None, partial: bool = False
) -> LabelledImages:
    """Read photographs, [n, 3, 32, 32] as `ByteImages`; 1,281,167 to train (3.9 GB) and 50,000 to test (the validation set).

    Args:
        root: folder of the files.
        split: part of the data set, "train", or "test" for the validation set.
        classes: classes to keep, as labels 1 .. 1000 or WordNet ids; the first becomes label 0. An id that is not in
            `MATCHES` needs map_clsloc.txt in the folder. Default: all, in the published order; label 1 becomes 0.
        partial: whether missing files are left out, and files may have fewer images.

    Raises:
        FileNotFoundError: a file is not there; the message says which files to put where.
        ValueError: a file's format or the count is wrong, a label is not in 1 .. 1000, or map_clsloc.txt contradicts
            `MATCHES`; the message begins with the path. Or classes are unknown, or one is given twice.
    """
    check_split(split)
    number = _numbers(Path(root), range(1, CLASSES + 1) if classes is None else classes)
    pixels = np.empty((COUNTS[split], PIXELS), np.uint8)  # one array, for two copies of ImageNet would take 8 GB
    labels, seen, kept = [], 0, 0
    for batch_pixels, batch_labels in _batches(root, split, partial):
        seen += len(batch_labels)
        if seen > len(pixels):
            break
        renumbered = number[batch_labels]
        wanted = renumbered >= 0
        labels.append(renumbered[wanted])
        end = kept + len(labels[-1])
        pixels[kept:end] = batch_pixels[wanted.numpy()]
        kept = end
    with naming(Path(root)):
        check_count(seen, COUNTS[split], partial)
    pixels = pixels if kept == len(pixels) else pixels[:kept].copy()
    images = ByteImages(torch.from_numpy(pixels.reshape(-1, *SHAPE)))
    return LabelledImages(images, torch.cat(labels), num_classes=int(number.max()) + 1)


def imagenet10(root: str | Path, split: Split = "train", *, partial: bool = False) -> LabelledImages:
    """Read ImageNet32's ten classes that match CIFAR-10's (`MATCHES`), with its labels 0 .. 9; about 13,000 and 500 images."""
    return imagenet32(root, split, classes=[match.label for match in MATCHES], partial=partial)


def as_imagenet32(cifar10: LabelledImages) -> LabelledImages:
    """Relabel CIFAR-10 by the labels of the matching classes in `imagenet32`, for a model of all 1,000 classes of ImageNet.

    Raises:
        ValueError: the images do not have ten classes.
    """
    if cifar10.num_classes != len(MATCHES):
        raise UserError(f"CIFAR-10 has {len(MATCHES)} classes, these images {cifar10.num_classes}")
    labels = torch.tensor([match.label - 1 for match in MATCHES])[cifar10.labels]
    return LabelledImages(cifar10.images, labels, num_classes=CLASSES)


def _batches(root: str | Path, split: Split, partial: bool) -> Iterator[Batch]:
    """Yield the batches file by file, after checking that all files exist."""
    for path in find_files(root, [(f"{name}.npz", name) for name in FILES[split]], FOLDERS, WHERE, partial):
        with naming(path):
            pixels, labels = read_batch(path)
            check_labels(labels, 1, CLASSES)
        yield pixels, labels


def _numbers(root: Path, classes: Sequence[int | str]) -> torch.Tensor:
    """Map published labels to new ones: int64 [1001], -1 for a class that is not wanted."""
    known = {match.wordnet: match.label for match in MATCHES} | _read_map(root)
    wanted = [known.get(name, name) for name in classes]
    for name in wanted:
        if isinstance(name, str):
            hint = "" if (root / MAP).exists() else f"; others than those of the ten matches need {MAP} in {root}"
            raise UserError(f"no class of ImageNet has the WordNet id {name!r}{hint}")
    wanted = torch.tensor(wanted, dtype=torch.int64)
    check_labels(wanted, 1, CLASSES)
    if not len(wanted) or len(wanted.unique()) != len(wanted):
        raise UserError(f"classes must be different ones, at least one, not {list(classes)}")
    number = torch.full((CLASSES + 1,), -1)
    number[wanted] = torch.arange(len(wanted))
    return number


def _read_map(root: Path) -> dict[str, int]:
    """Read WordNet id -> label from ILSVRC's map, with lines like "n02119789 1 kit_fox"; without the file the map is empty."""
    path = root / MAP
    if not path.is_file():
        return {}
    lines = [line.split() for line in path.read_text().splitlines() if line.startswith("n")]
    with naming(path):
        if any(len(line) < 2 or not line[1].isdecimal() for line in lines):
            raise UserError('its lines must be like "n02119789 1 kit_fox"')
        labels = {line[0]: int(line[1]) for line in lines}
        if sorted(labels.values()) != list(range(1, CLASSES + 1)):
            raise UserError(f"it must give each of the labels 1 .. {CLASSES} to one WordNet id")
        for match in MATCHES:
            if labels.get(match.wordnet) != match.label:
                found = labels.get(match.wordnet, "no")
                raise UserError(f"it gives {match.wordnet} ({match.imagenet}) label {found}, not {match.label}")
    return labels
