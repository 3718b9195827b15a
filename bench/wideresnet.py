"""WideResNet-16-4 with GroupNorm, as private image classifiers are trained (De et al. 2022; without weight standardisation)."""

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 16


class Block(nn.Module):
    """Pre-activation residual block: norm, ReLU, convolution, twice."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, c_in), nn.GroupNorm(GROUPS, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        return self.skip(h) + self.conv2(F.relu(self.norm2(self.conv1(h))))


class WideResNet(nn.Module):
    """Images [n, 3, S, S] -> logits [n, 10]; depth 6 blocks + 4, widths 16, 32, 64 times `widen`."""

    def __init__(self, depth: int = 16, widen: int = 4):
        super().__init__()
        blocks, channels = [], 16
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(Block(channels, width * widen, stride if i == 0 else 1))
                channels = width * widen
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.GroupNorm(GROUPS, channels), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(h.mean((2, 3)))
