"""Many images in a quarter of the memory: kept as bytes, read as floats."""

import torch
from torch import Tensor

from fastloda.errors import UserError

WHITE = 255


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 -1 .. 1."""
    return pixels.to(torch.float32).div_(WHITE / 2).sub_(1)


class ByteImages:
    """uint8 [n, C, H, W] that reads like the float32 tensor in [-1, 1] that it stands for.

    All of ImageNet32 takes 3.9 GB this way, and 15.7 GB as floats. `images[index]` converts what is picked, and that alone;
    `len`, `shape`, `ndim`, `dtype`, `split` and `to` are those of the tensor. Anything else fails loudly: it is no tensor.

    Args:
        pixels: uint8 [n, C, H, W]; not copied.

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
        """Parts of `size` images, still bytes."""
        return [ByteImages(part) for part in self.pixels.split(size)]

    def to(self, device: torch.device | str) -> Tensor:
        """All of them, as floats on the device."""
        return to_floats(self.pixels.to(device))
