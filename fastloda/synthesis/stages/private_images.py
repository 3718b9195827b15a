"""The private images of a stage: how they are opened, whose they are, and what may be said about them."""

import logging
from collections.abc import Sequence

from fastloda.errors import UserError
from fastloda.synthesis.arguments import Names
from fastloda.synthesis.bases import Base
from fastloda.synthesis.budget import ADJACENCY, OWNER_ADJACENCY
from fastloda.synthesis.data import LabelledImages, listed, mapped_names, read_owners, relabelled
from fastloda.synthesis.inputs import full_name, open_for_unet, read_class_map

logger = logging.getLogger("fastloda")
PRIVATE_NAME = "private images"


def open_private(data: str, base: Base, class_map: Sequence[str], skip_unreadable: bool, name: str) -> LabelledImages:
    """Open the private images, with those of the model's classes that they have, by name; log what they are.

    If the model's classes have no names, the classes of the images are the first ones of the model.
    """
    images = open_for_unet(data, base.takes, skip_unreadable=skip_unreadable)
    called = {own: base.synonyms.get(known, known) for own, known in read_class_map(class_map).items()}
    mapping = {**base.synonyms, **called}
    found = mapped_names(images, mapping)
    known = base.class_names or tuple(dict.fromkeys(found))
    if base.takes.num_classes is not None and len(known) > base.takes.num_classes:
        raise UserError(f"{data} has {len(known)} classes, more than the model's {base.takes.num_classes}")
    relabelled(images, known, mapping, of="the public model")  # refuses unknown classes
    private = relabelled(images, [each for each in known if each in found], mapping)
    logger.info("private: %s, called %r in what is published: %d images", data, name, len(private))
    logger.info("note: the names of their classes are published: %s", listed(private.class_names))
    return private


def source_of(data: str, class_map: Names, skip_unreadable: bool) -> dict:
    """Collect the settings on where private images are, and how they are read."""
    return {"data": full_name(data), "class_map": list(class_map), "skip_unreadable": skip_unreadable}


def about_private(name: str, classes: Sequence[str]) -> dict:
    """Collect the public facts about private images that a statement begins with."""
    return {"name": name, "classes": list(classes)}


def owners_of(data: str, private: LabelledImages, owner: str | None, before: list[dict]) -> list[str] | None:
    """Read who owns each image, if that is asked for; UserError if an earlier release has another unit of privacy."""
    adjacency, other = (ADJACENCY, "owner") if owner is None else (OWNER_ADJACENCY, "image")
    if any(statement["adjacency"] != adjacency for statement in before):
        raise UserError(
            f"something was released before in which each {other} counts by itself, which this run's epsilon would not cover: "
            "fine-tune in another --run, with --model for the public model"
        )
    return None if owner is None else read_owners(data, private.files, owner)
