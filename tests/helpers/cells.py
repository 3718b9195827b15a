"""Folders of drawn blood cells with what real folders have: mixed formats, several images of a patient, a broken file."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("basophil", "lymphocyte", "monocyte", "éosinophile")  # sorted by name, as folders are
SIZE = (48, 40)  # width and height in pixels
OF_A_PATIENT = 5  # number of images of each patient
_LOBES = (3, 1, 1, 2)  # number of lobes of the nucleus, for each class
_SCALE = 4  # cells are drawn larger by this factor and then reduced, for smooth edges


def write_cells(
    root: Path,
    count: int = 600,
    *,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
    mixed: bool = True,
    broken: int = 1,
) -> Path:
    """Write `count` readable images of cells to `root`, a subfolder for each class, and return `root`.

    Image k of patient i is called p017_3.png, say, for i = 17 and k = 3; each patient has five, of several classes and of one
    tint. In a mixed folder a quarter of the images are JPEGs, a quarter are grey, a quarter have transparency, and every
    fiftieth has a name with a space and letters outside ASCII. All are 48 x 40 pixels. The same seed gives the same files.

    Args:
        root: folder to make.
        count: number of readable images.
        seed: seed of the cells; private and public folders take different ones.
        classes: names of the subfolders, at most four; image k of patient i is of class (i + k) mod their number.
        mixed: whether formats, modes and names are mixed; otherwise all are PNGs in RGB with plain names.
        broken: number of further files, JPEGs that are cut short, in the first class's folder: p900_0.jpg, p901_0.jpg, ...
    """
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
    tints = rng.uniform(-25, 25, (count // OF_A_PATIENT + 1, 3))
    for i in range(count):
        patient, k = divmod(i, OF_A_PATIENT)
        label = (patient + k) % len(classes)
        _save(_cell(rng, label, tints[patient]), root / classes[label], f"p{patient:03d}_{k}", i if mixed else 0)
    for i in range(broken):
        path = root / classes[0] / f"p{900 + i}_0.jpg"
        _cell(rng, 0, tints[0]).save(path)
        path.write_bytes(path.read_bytes()[:400])
    return root


def patient_of(path: Path) -> str:
    """Return the patient that an image's file name begins with, as p017."""
    return path.name.partition("_")[0]


def _save(image: Image.Image, folder: Path, stem: str, i: int) -> None:
    """Save image number i in the format that i determines; the class has no influence on it."""
    stem = f"{stem} größe µ" if i % 50 == 49 else stem
    match i // 4 % 4:
        case 1:
            image.save(folder / f"{stem}.jpg", quality=95)
        case 2:
            image.convert("L").save(folder / f"{stem}.png")
        case 3:
            image.putalpha(255)
            image.save(folder / f"{stem}.png")
        case _:
            image.save(folder / f"{stem}.png")


def _cell(rng: np.random.Generator, label: int, tint: np.ndarray) -> Image.Image:
    """Draw a cell in RGB: a pale plasma, and a dark nucleus with as many lobes as its class has."""
    width, height = (side * _SCALE for side in SIZE)
    image = Image.new("RGB", (width, height), _colour((235, 215, 220), tint))
    draw = ImageDraw.Draw(image)
    x, y = width / 2 + rng.normal(0, 6), height / 2 + rng.normal(0, 6)
    radius = height * rng.uniform(0.32, 0.42)
    _disc(draw, x, y, radius, _colour((205, 170, 195), tint))
    lobes, turn = _LOBES[label], rng.uniform(0, 2 * math.pi)
    size = radius * (0.75 if label == 1 else 0.45)
    for angle in turn + 2 * math.pi / lobes * np.arange(lobes):
        far = 0.0 if label == 1 else radius * 0.45
        _disc(draw, x + far * math.cos(angle), y + far * math.sin(angle), size, _colour((95, 55, 140), tint))
    pixels = np.asarray(image.resize(SIZE, Image.Resampling.BOX), np.float64)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _colour(base: tuple[int, int, int], tint: np.ndarray) -> tuple[int, ...]:
    return tuple(int(np.clip(value + shift, 0, 255)) for value, shift in zip(base, tint, strict=True))
