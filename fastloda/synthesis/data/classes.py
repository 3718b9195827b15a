"""Classes of two sets of images, matched by name."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fastloda.errors import UserError

from .images import LabelledImages

_SHOWN = 20  # number of names of a list that a message shows


def relabelled(
    images: LabelledImages, names: Sequence[str], class_map: Mapping[str, str] | None = None, *, of: str = "the model"
) -> LabelledImages:
    """Renumber the images' classes by name, so that their numbers are the positions in `names`.

    Args:
        images: labelled images; the old numbers of their classes make no difference.
        names: names of all classes, in the wanted order.
        class_map: for classes that have another name, their name in `names`.
        of: what `names` belong to, for the message.

    Raises:
        UserError: a class of the images is not among `names`; the message has both lists.
    """
    called = mapped_names(images, class_map)
    if strange := [name for name in called if name not in names]:
        example = f"{strange[0]}={next((name for name in names if name not in called), names[0])}"
        raise UserError(
            f"{listed(strange)} of the classes {listed(images.class_names)} are not among those of {of}, {listed(names)}: rename "
            f"them, or say which is which, as in --class-map {example}"
        )
    number = torch.tensor([list(names).index(name) for name in called])
    return replace(images, labels=number[images.labels], num_classes=len(names), class_names=tuple(names))


def mapped_names(images: LabelledImages, class_map: Mapping[str, str] | None = None) -> list[str]:
    """List the names of the images' classes after `class_map`, which may map several classes to one name."""
    return [(class_map or {}).get(name, name) for name in images.class_names]


def named_classes(table: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Read a table of classes with perhaps several names each, as "tench, Tinca tinca"; return names, and {synonym: name}.

    A class is called by its first name; by its whole entry if another class has that name too; or by its entry and its number
    if the entries are the same. What could mean two classes is not a synonym.
    """
    spellings = [[entry, *(part.strip() for part in entry.split(","))] for entry in table]
    meant = defaultdict(set)
    for label, spelled in enumerate(spellings):
        for spelling in spelled:
            meant[spelling].add(label)
    names = []
    for label, (entry, first, *_) in enumerate(spellings):
        alone = next((spelling for spelling in (first, entry) if meant[spelling] == {label}), None)
        names.append(alone or f"{entry} ({label})")
    synonyms = {spelling: names[min(labels)] for spelling, labels in meant.items() if len(labels) == 1}
    return tuple(names), {spelling: name for spelling, name in synonyms.items() if spelling != name}


def only(images: LabelledImages, names: Sequence[str]) -> LabelledImages:
    """Keep only the images of the classes `names`, all of which must exist, and number the classes as `names` does."""
    number = torch.full((images.num_classes,), -1)
    for i, name in enumerate(names):
        number[images.class_names.index(name)] = i
    labels = number[images.labels]
    return replace(images[labels >= 0], labels=labels[labels >= 0], num_classes=len(names), class_names=tuple(names))


def listed(names: Sequence[str]) -> str:
    """Write names as a list, which is cut after the first twenty."""
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
