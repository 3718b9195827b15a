"""Files of published data sets: they are found in a local folder, or a message names them; nothing is ever downloaded."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fastloda.errors import UserError

Split = Literal["train", "test"]

_SHOWN = 6  # number of names that a message shows of what the folder holds instead


def find_file(root: str | Path, names: Sequence[str], folders: Sequence[str], where: str) -> Path:
    """Find the first of `names` in `root` or in one of its `folders`.

    Raises:
        FileNotFoundError: none is there; the message has its name, what the folder holds instead, and `where` files belong.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder. {where}")
    for folder in (root, *(root / name for name in folders)):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    held = sorted(path.name for path in root.iterdir())
    shown = ", ".join(held[:_SHOWN]) + (f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else "")
    raise FileNotFoundError(f"{root}: no {' or '.join(names)}; it holds {shown or 'nothing'}. {where}")


def warn_if_changed(path: Path, published: str | None) -> None:
    """Warn unless the file's MD5 is `published`; None means that no checksum is published."""
    if published is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != published:
        warnings.warn(
            f"{path}: MD5 {found}, not the published {published}: the file is another one, or damaged", stacklevel=3
        )


def check_split(split: str) -> None:
    """Refuse a split other than "train" and "test" with a ValueError."""
    if split not in ("train", "test"):
        raise UserError(f"split must be train or test, not {split!r}")


def find_files(
    root: str | Path, files: Sequence[Sequence[str]], folders: Sequence[str], where: str, partial: bool
) -> list[Path]:
    """Find each of `files` (a tuple of its possible names) by `find_file`; with `partial`, leave out those that are missing.

    Raises:
        FileNotFoundError: a file is not there; with `partial`, none is.
    """
    found, missing = [], []
    for names in files:
        try:
            found.append(find_file(root, names, folders, where))
        except FileNotFoundError as error:
            missing.append(error)
    if missing and not (partial and found):
        raise missing[0]
    if missing:
        warnings.warn(
            f"{root}: {len(found)} of {len(files)} files are there: a part of the published set", stacklevel=3
        )
    return found


def check_count(found: int, published: int, partial: bool = False) -> None:
    """Refuse a number of images other than the published one with a ValueError; with `partial`, warn if it is smaller."""
    if partial and 0 < found < published:
        warnings.warn(f"{found} of the {published} published images", stacklevel=3)
    elif found != published:
        raise UserError(f"{found} images, not the {published} published")


@contextmanager
def naming(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn a ValueError inside the context, or one of `errors`, into a ValueError whose message begins with the path."""
    try:
        yield
    except (ValueError, *errors) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise UserError(f"{path}: {error}") from error
