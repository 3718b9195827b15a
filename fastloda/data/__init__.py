"""Small data sets with one type for all of them: real digits (private), font digits (public), npz files."""

from .digits import digits_split
from .font_digits import font_digits
from .images import LabelledImages, load_npz

__all__ = ["LabelledImages", "digits_split", "font_digits", "load_npz"]
