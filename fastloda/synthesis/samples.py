"""A folder of synthetic images, drawn so that an interrupted drawing can continue, and written in several forms.

samples.npz      all images as bytes, with labels and the classes' names
images/CLASS/    the same as PNGs, in a folder that `fastloda pretrain --data` accepts
grid.png         a contact sheet: some images of each class, next to the name of the class
privacy.json     the statement of the private run that the images come from, if there is one
README.md        what may be published
"""

import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from fastloda.files import write_atomically
from fastloda.interrupts import interrupts_wait
from fastloda.progress import Progress
from fastloda.synthesis.budget import STATEMENT
from fastloda.synthesis.data import LabelledImages, listed
from fastloda.synthesis.report.plots import sample_grid
from fastloda.synthesis.report.tables import rounded_up
from fastloda.synthesis.runs import write_json

SAMPLES, IMAGES, GRID, README, PART = "samples.npz", "images", "grid.png", "README.md", "drawn.safetensors"
SECONDS = 60.0  # between two saves of what is drawn
ROWS = 40  # number of classes on a contact sheet


def draw_resumably(
    draw: Callable[[Tensor, int], Tensor], labels: Tensor, part: Path, batch_size: int, progress: bool = True
) -> Tensor:
    """Draw an image for each label, batch by batch. What is drawn is saved every minute, and at SIGINT (Ctrl-C) or SIGTERM.

    Args:
        draw: function of (labels of a batch, number of images drawn before it) that returns images [n, C, H, W] in [-1, 1].
        labels: labels of all images, [n].
        part: file of what is drawn, from which an interrupted drawing continues; the caller deletes it once the images are saved.
        batch_size: number of images in a batch.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
    """
    batches = [load_file(part)["images"]] if part.exists() else []
    drawn, saved = sum(map(len, batches)), time.monotonic()
    with (
        interrupts_wait() as received,
        Progress("sampling", len(labels), "image", done=drawn, shown=progress) as bar,
    ):
        while drawn < len(labels) and not received:
            batches.append(draw(labels[drawn : drawn + batch_size], drawn).clamp(-1, 1))
            drawn += len(batches[-1])
            bar.update(len(batches[-1]))
            if received or time.monotonic() - saved >= SECONDS:
                batches, saved = [torch.cat(batches)], time.monotonic()
                write_atomically(part, save({"images": batches[0]}))
    return torch.cat(batches)


def write_samples(folder: Path, images: LabelledImages, statement: dict | None) -> None:
    """Write the images in all forms; `statement` is the private run's, None if the images come from a public model."""
    images.save_npz(folder / SAMPLES, uint8=True)
    _write_pngs(folder / IMAGES, images)
    write_atomically(folder / GRID, contact_sheet(images))
    if statement is not None:
        write_json(folder / STATEMENT, statement)
    write_atomically(folder / README, _readme(images, statement).encode())


def contact_sheet(images: LabelledImages) -> bytes:
    """Draw some images of each class as a PNG: one row per class, with the name of the class on the left."""
    return sample_grid(images.images[:], images.labels, images.class_names, max_rows=ROWS)


def file_names(names: Sequence[str]) -> list[str]:
    """Return a folder name for each class: its own name, without the characters and beginnings that folders must not have."""
    safe = [re.sub(r"[/\\:*?\"<>|\x00-\x1f]|^\.", "_", name) for name in names]
    return safe if len({name.casefold() for name in safe}) == len(safe) else [f"{i} {n}" for i, n in enumerate(safe)]


def _write_pngs(folder: Path, images: LabelledImages) -> None:
    """Write a PNG for each image, in a folder per class; the folder `folder` appears only when all are written."""
    unfinished = folder.with_name(f".{folder.name}")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    places = [unfinished / name for name in file_names(images.class_names)]
    for place in places:
        place.mkdir(parents=True)
    pixels = ((images.images[:] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for number, (image, label) in enumerate(zip(pixels, images.labels.tolist(), strict=True)):
        Image.fromarray(np.squeeze(image, 2) if image.shape[2] == 1 else image).save(
            places[label] / f"{number:06d}.png"
        )
    unfinished.rename(folder)


def _readme(images: LabelledImages, statement: dict | None) -> str:
    kinds = f"{len(images):,} synthetic images of {len(images.class_names)} classes: {listed(images.class_names)}."
    if statement is None:
        return f"# Synthetic images\n\n{kinds} They come from a public model: no private image was used.\n"
    promise = f"({rounded_up(statement['epsilon'])}, {statement['delta']:g})-differentially private"
    foreseeable = (
        "\n\nBut a seed was fixed, so that the noise can be foreseen by whoever knows it: an experiment, not a private release."
        if statement["seed_was_fixed"]
        else ""
    )
    return (
        f"# Synthetic images\n\n{kinds}\n\nThey stand for: {statement['name']}. All of this folder may be published: the model "
        f"that drew them is {promise} ({statement['adjacency']}), on the terms in {STATEMENT}, and images drawn from it are as "
        "private as it is, however many there are. The number of records and the names of the classes are published with "
        f"them.{foreseeable}\n\nWhat was trained or released beside them about the same records "
        "counts as well: `fastloda account --composition` adds it up.\n"
    )
