"""Owners of a folder's images, where people have several: they are read from subfolders, file names or a table."""

import csv
import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastloda.errors import UserError

SUBFOLDER = "subfolder"
WAYS = (
    f"Owners are read from `{SUBFOLDER}` (the folder right inside the class's folder), by a regular expression with one group "
    r"that matches from the start of the file name, as `(p\d+)_`, or from a .csv file with the columns file (relative to the "
    "folder of images) and owner"
)
_SHOWN = 5


def read_owners(root: str | Path, files: Sequence[Path], how: str) -> list[str]:
    """Read the owner of each image of a folder, in the order of `files`.

    An owner may have images of several classes: equal names are one owner.

    Args:
        root: the folder of the classes' folders.
        files: file of each image, as `LabelledImages.files` has them.
        how: "subfolder", a regular expression, or the path of a table that ends in .csv: see `WAYS`.

    Raises:
        FileNotFoundError: there is no such table.
        UserError: root is no folder of images, images have no owner (the message names some), two owners differ only in case,
            spaces or Unicode form, or `how` is none of the three.
    """
    root = Path(root)
    if not files:
        raise UserError(f"{root} is no folder of images: owners can be read for a folder of images only")
    relative = [path.relative_to(root) for path in files]
    if how == SUBFOLDER:
        owners = [path.parts[1] if len(path.parts) > 2 else None for path in relative]
    elif how.lower().endswith(".csv"):
        table = _read_table(Path(how))
        owners = [table.get(path.as_posix()) for path in relative]
    else:
        pattern = _pattern(how)
        owners = [match[1] if (match := pattern.match(path.name)) else None for path in relative]
    named = [owner for owner in owners if owner]
    if len(named) < len(files):
        without = [path.as_posix() for path, owner in zip(relative, owners) if not owner]
        some = ", ".join(without[:_SHOWN]) + (", ..." if len(without) > _SHOWN else "")
        raise UserError(f"{root}: {len(without)} of {len(files)} images have no owner by {how!r}: {some}. {WAYS}")
    _check_names(named)
    return named


def _read_table(path: Path) -> Mapping[str, str]:
    """Read a table as {file: owner}; files are normalised relative paths."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table of owners. {WAYS}")
    owners: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not {"file", "owner"} <= set(table.fieldnames or ()):
            raise UserError(f"{path} must have the columns file and owner, got {table.fieldnames}")
        for row in table:
            name, owner = os.path.normpath((row["file"] or "").strip()), (row["owner"] or "").strip()
            if owners.setdefault(name, owner) != owner:
                raise UserError(f"{path} names two owners of {name}: {owners[name]!r} and {owner!r}")
    return owners


def _pattern(how: str) -> re.Pattern:
    try:
        pattern = re.compile(how)
    except re.error as error:
        raise UserError(f"{how!r} is no regular expression ({error}). {WAYS}") from error
    if pattern.groups != 1:
        raise UserError(f"{how!r} must have one group, which is the owner, and has {pattern.groups}. {WAYS}")
    return pattern


def _check_names(owners: list[str]) -> None:
    """Refuse two spellings of one owner's name, which would count as two owners; warn if nobody has two images."""
    spelt: dict[str, str] = {}
    for owner in owners:
        if (other := spelt.setdefault(_plain(owner), owner)) != owner:
            raise UserError(
                f"owners {other!r} and {owner!r} differ in case, spaces or the form of their characters only: give one owner one "
                "name"
            )
    if len(spelt) == len(owners):
        warnings.warn(
            "every image has an owner of its own: if people have several, the owner was read from the wrong place",
            stacklevel=3,
        )


def _plain(name: str) -> str:
    """Write a name in a form in which equal names are equal strings: without case, spaces, or other Unicode forms."""
    return unicodedata.normalize("NFKC", "".join(unicodedata.normalize("NFKC", name).casefold().split()))
