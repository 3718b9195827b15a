"""A small CNN that treats each sample by itself (GroupNorm), so that it can also be trained by DP-SGD."""

from torch import Tensor, nn

from fastloda.errors import UserError

_SMALLEST = 4  # largest side of the last feature map
_GROUPS = 8


class SmallCNN(nn.Module):
    """A small CNN from images [n, C, S, S] to logits [n, num_classes]: 3 x 3 convolutions, S halved down to 4, one Linear.

    Only Conv2d and Linear have parameters. GroupNorm has no affine ones, because the next layer has a scale already, and under
    DP-SGD every parameter costs noise.

    Args:
        in_channels: number of channels C.
        num_classes: number of logits.
        width: number of channels at full size, twice that below; a multiple of 8 (the groups).
        image_size: side S of the images.

    Raises:
        ValueError: an argument is less than 1, or `width` is no multiple of 8.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32, image_size: int = 8) -> None:
        super().__init__()
        if min(in_channels, num_classes, width, image_size) < 1 or width % _GROUPS:
            given = f"{in_channels=}, {num_classes=}, {width=}, {image_size=}"
            raise UserError(f"each must be at least 1 and width a multiple of {_GROUPS}: {given}")
        blocks = [_block(in_channels, width)]
        channels, side = width, image_size
        while side > _SMALLEST:
            blocks.append(_block(channels, 2 * width, stride=2))
            channels, side = 2 * width, (side + 1) // 2
        blocks.append(_block(channels, 2 * width))
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(2 * width * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1),
        nn.GroupNorm(_GROUPS, out_channels, affine=False),
        nn.ReLU(),
    )
