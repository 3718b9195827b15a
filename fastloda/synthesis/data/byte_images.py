"""Images stored as bytes, in a quarter of the memory, and read as floats."""

import torch
from torch import Tensor

from fastloda.errors import UserError

WHITE = 255


def to_floats(pixels: Tensor) -> Tensor:
    """Convert uint8 0 .. 255 to float32 -1 .. 1."""
    return pixels.to(torch.float32).div_(WHITE / 2).sub_(1)


class ByteImages:
    """A uint8 array [n, C, H, W] that reads like the float32 tensor in [-1, 1] that it stands for.

    All of ImageNet32 takes 3.9 GB in this form, and 15.7 GB as floats. `images[index]` converts only what it picks; `len`,
    `shape`, `ndim`, `dtype`, `split` and `to` work as for the tensor. Other uses raise an error, because it is no tensor.

    Args:
        pixels: the bytes, uint8 [n, C, H, W]; not copied.

    Raises:
        ValueError: pixels are not uint8.
    """

    dtype = torch.float32

    def __init__(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8:
            raise UserError(f"pixels must be uint8, not {pixels.dtype}")
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice | int) -> Tensor:
        return to_floats(self.pixels[index])

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape

    @property
    def ndim(self) -> int:
        return self.pixels.ndim

    def split(self, size: int) -> "list[ByteImages]":
        """Split into parts of `size` images, still bytes."""
        return [ByteImages(part) for part in self.pixels.split(size)]

    def to(self, device: torch.device | str) -> Tensor:
        """Convert all images to floats on the device."""
        return to_floats(self.pixels.to(device))
