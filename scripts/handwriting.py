"""Make the picture of handwritten digits that `font_digits` draws from: one row for each font, ten digits in it.

    npm pack @expo-google-fonts/caveat @expo-google-fonts/kalam ...    # each unpacked into a folder of its own
    python scripts/handwriting.py FOLDER

The fonts are families of handwriting and script of Google Fonts, in their regular weight, under the SIL Open Font License or the
Apache License. A font is left out if its zero has a stroke or a curl inside, or if its hairlines break at this size.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import label

from fastloda.synthesis.data.glyphs import CANVAS, DIGITS, GLYPH, HANDWRITING, drawn

REGULAR = "_400Regular.ttf"
MOST_STROKES = 2  # "4", "5" and "7" may be written in two strokes that do not touch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the fonts, at any depth")
    found = {path.name.removesuffix(REGULAR): path for path in parser.parse_args().folder.rglob(f"*{REGULAR}")}
    drawings = {name: [drawn(found[name], digit) for digit in DIGITS] for name in sorted(found)}
    rows = {name: np.concatenate(digits, axis=1) for name, digits in drawings.items() if is_clear(digits)}
    about = PngInfo()
    about.add_text("fonts", " ".join(rows))
    about.add_text("source", "digits drawn from Google Fonts, under the SIL Open Font License or the Apache License")
    Image.fromarray(np.concatenate(list(rows.values()))).save(HANDWRITING, pnginfo=about, optimize=True)
    print(f"{HANDWRITING}: {len(rows)} of {len(found)} fonts, {HANDWRITING.stat().st_size / 1024:.0f} KiB")


def is_clear(digits: Sequence[np.ndarray]) -> bool:
    """Say whether digits are whole, and the middle of the zero is empty."""
    middle = digits[0][GLYPH // 2 - 4 : GLYPH // 2 + 4, CANVAS // 2 - 4 : CANVAS // 2 + 4]
    return not middle.any() and all(label(digit)[1] <= MOST_STROKES for digit in digits)


if __name__ == "__main__":
    main()
