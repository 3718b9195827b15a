"""Wide residual networks (Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1605.07146), pre-activated."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastloda.errors import UserError

from .norms import Norm, norm_layer

_GROUPS = 16


class Block(nn.Module):
    """A pre-activation residual block: norm, ReLU and convolution, twice."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: Norm):
        super().__init__()
        layer = norm_layer(norm, _GROUPS)
        self.norm1, self.norm2 = layer(c_in), layer(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        return self.skip(h) + self.conv2(F.relu(self.norm2(self.conv1(h))))


class WideResNet(nn.Module):
    """A wide ResNet from images [n, C, S, S] to logits [n, num_classes], with 16, 32 and 64 times `width` channels.

    With norm="group" it is the network of private image classifiers (De et al. 2022, https://arxiv.org/abs/2204.13650), without
    their weight standardisation.

    Args:
        in_channels: number of channels C.
        num_classes: number of logits.
        width: widening factor, 4 in WRN-40-4.
        image_size: side S of the images; any size, because features are averaged over positions.
        depth: number of convolutions along the main path, 40 in WRN-40-4; depth - 4 is a multiple of 6.
        norm: normalisation, "group" or "batch".

    Raises:
        ValueError: the depth is not possible, or the norm is unknown.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 4,
        image_size: int = 32,
        *,
        depth: int = 16,
        norm: Norm = "group",
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or min(in_channels, num_classes, width, image_size) < 1:
            raise UserError(
                f"need depth = 6 k + 4 with k >= 1, and all else at least 1: {depth=}, {in_channels=}, {num_classes=}, {width=}"
            )
        blocks, channels = [], 16
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        for base, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(Block(channels, base * width, stride if i == 0 else 1, norm))
                channels = base * width
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = norm_layer(norm, _GROUPS)(channels), nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(h.mean((2, 3)))
