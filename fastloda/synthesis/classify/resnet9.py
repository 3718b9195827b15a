"""ResNet-9, the nine-layer residual network of fast CIFAR-10 training (Page 2018, "How to train your ResNet")."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastloda.errors import UserError

from .norms import Norm, norm_layer

_GROUPS = 8


class ResNet9(nn.Module):
    """A ResNet-9 from images [n, C, S, S] to logits [n, num_classes]: `width` to 8 `width` channels, two residual blocks.

    Args:
        in_channels: number of channels C.
        num_classes: number of logits.
        width: number of channels of the first layer, 64 in the original; a multiple of 8.
        image_size: side S of the images, at least 8: it is halved three times.
        norm: normalisation, "group" or "batch".

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 64,
        image_size: int = 32,
        *,
        norm: Norm = "group",
    ):
        super().__init__()
        if min(in_channels, num_classes, width) < 1 or width % _GROUPS or image_size < 8:
            raise UserError(
                f"need image_size >= 8, width a multiple of {_GROUPS}, all else at least 1: "
                f"{in_channels=}, {num_classes=}, {width=}, {image_size=}"
            )

        def conv(c_in: int, c_out: int, pool: bool = False) -> nn.Sequential:
            layers = [nn.Conv2d(c_in, c_out, 3, padding=1), norm_layer(norm, _GROUPS)(c_out), nn.ReLU()]
            return nn.Sequential(*layers, *[nn.MaxPool2d(2)] * pool)

        self.stem = nn.Sequential(conv(in_channels, width), conv(width, 2 * width, pool=True))
        self.residual1 = nn.Sequential(conv(2 * width, 2 * width), conv(2 * width, 2 * width))
        self.middle = nn.Sequential(conv(2 * width, 4 * width, pool=True), conv(4 * width, 8 * width, pool=True))
        self.residual2 = nn.Sequential(conv(8 * width, 8 * width), conv(8 * width, 8 * width))
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        h = self.stem(images)
        h = self.middle(h + self.residual1(h))
        h = h + self.residual2(h)
        return self.head(F.adaptive_max_pool2d(h, 1).flatten(1))
