"""Checks of the HTML pages and PNG images that reports consist of."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image


def png_pixels(content: bytes) -> np.ndarray:
    """Decode a PNG to its pixels."""
    return np.asarray(Image.open(io.BytesIO(content)))


def source_pixels(image: dict) -> np.ndarray:
    """Decode the pixels of a page's image, given the image's attributes."""
    return png_pixels(base64.b64decode(image["src"].split(",")[1]))


class _Checker(HTMLParser):
    """A parser that fails on tags that do not nest, and collects images."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.images = [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def without_images(html: str) -> str:
    """Remove the images' bytes, in which any short word may occur by chance."""
    return re.sub(r'src="data:[^"]*"', "", html)


def check_page(html: str) -> list[dict]:
    """Check that a page is well-formed and self-contained, and each image described; return its images' attributes."""
    checker = _Checker()
    checker.feed(html)
    assert not checker.open
    text = without_images(html)
    assert not re.search(r"(src|href)=\"(?!data:)", html) and "http" not in text and "<script" not in text
    assert "url(" not in text and "@import" not in text
    for image in checker.images:
        assert image["alt"] and source_pixels(image).size
    return checker.images
