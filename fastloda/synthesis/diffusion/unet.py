"""The U-Net: residual and attention blocks that are given the time and the class, and never mix samples.

Layer for layer it is the classifier-free-guidance U-Net of "Efficient Differentially Private Fine-Tuning of Diffusion Models",
with the same module names (`downblocks.1.0.block_1.2`, `upblocks.2.2.layer`), so that `fastloda.attach_loda` can name its
convolutions.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.synthesis.diffusion.ddpm import DDPM
from fastloda.synthesis.diffusion.edm import EDM
from fastloda.synthesis.diffusion.process import Process

PROCESSES: dict[str, type[DDPM] | type[EDM]] = {"ddpm": DDPM, "edm": EDM}


@dataclass(frozen=True)
class UNetConfig:
    """The configuration of a U-Net's shape; the defaults are the paper's. Invalid values raise ValueError.

    Attributes:
        image_size: side of the square images; divisible by 2^(levels - 1); there is one level per multiplier.
        in_channels: number of channels of the image, and of the predicted noise.
        width: number of channels of the first level, before its multiplier.
        multipliers: factors of the levels' channels: level i computes with `width * multipliers[i]` channels.
        blocks_per_level: number of residual blocks in a level on the way down; one more on the way up.
        num_classes: number of classes, labels 0 .. num_classes - 1; label num_classes is the null class of classifier-free
            guidance.
        class_width: length of the class code, at least num_classes + 1 (see `UNet`).
        dropout: probability of dropout in the residual blocks. It draws from PyTorch's global generator.
        norm_groups: number of groups of every GroupNorm, or the number of channels if that is smaller; must divide the channels.
        attention: whether attention follows the residual blocks: of every level (True), of none (False), or of the given levels.
            The middle of the U-Net counts as the last level.
        zero_init: whether the output and each block's last convolution start at zero, as Ho et al. (2020) nearly do.
            The first gradient is then zero except in the output: turn it off to probe an untrained model.
        process: name of the process that the model reverses: ddpm (Ho et al. 2020) or edm (Karras et al. 2022).
        patch: side of the patches whose pixels are the channels that the first level sees (Hoogeboom et al. 2023, section 2.4);
            1: pixels themselves. With 2, a level of the largest maps is saved, and most of the time of a small model.
    """

    image_size: int = 32
    in_channels: int = 3
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    num_classes: int = 10
    class_width: int = 64
    dropout: float = 0.0
    norm_groups: int = 32
    attention: bool | tuple[int, ...] = True
    zero_init: bool = True
    process: str = "ddpm"
    patch: int = 1

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if not isinstance(self.attention, bool):
            object.__setattr__(self, "attention", tuple(sorted(self.attention)))
        self._check_counts()
        self._check_shapes()

    def _check_counts(self):
        for name in ("image_size", "in_channels", "width", "blocks_per_level", "num_classes", "norm_groups", "patch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.process not in PROCESSES:
            raise UserError(f"process must be one of {', '.join(PROCESSES)}, got {self.process!r}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers must be positive, one a level, got {self.multipliers}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}")

    def _check_shapes(self):
        levels, factor = len(self.multipliers), self.patch * 2 ** (len(self.multipliers) - 1)
        if self.image_size % factor:
            patches = f" of patches of {self.patch} pixels" if self.patch > 1 else ""
            raise UserError(
                f"image_size must be divisible by {factor} for {levels} levels{patches}, got {self.image_size}"
            )
        if self.width % 2:
            raise UserError(f"width must be even, half sines and half cosines of the time, got {self.width}")
        if self.class_width <= self.num_classes:
            raise UserError(
                f"class_width must exceed num_classes, for the null class: "
                f"got class_width={self.class_width}, num_classes={self.num_classes}"
            )
        if not isinstance(self.attention, bool) and not set(self.attention) <= set(range(levels)):
            raise UserError(f"attention must name levels in 0..{levels - 1}, got {self.attention}")
        if self.image_size == factor and self.norm_groups >= self.widths[-1]:
            raise UserError(
                f"norm_groups={self.norm_groups} normalises single values, to zero, at the last "
                f"level: {self.widths[-1]} channels of 1 x 1"
            )
        joined = [a + b for a, b in pairwise((self.width, *self.widths))]  # a skip meets its neighbour
        for channels in (*self.widths, *joined, *(2 * w for w in self.widths)):
            if channels % min(self.norm_groups, channels):
                raise UserError(
                    f"norm_groups={self.norm_groups} does not divide {channels} channels "
                    f"(width={self.width}, multipliers={self.multipliers})"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of channels of each level, finest first."""
        return tuple(self.width * m for m in self.multipliers)

    def attends(self, level: int) -> bool:
        """Tell whether the blocks of this level have attention."""
        return self.attention if isinstance(self.attention, bool) else level in self.attention

    def to_dict(self) -> dict:
        """Convert the fields to JSON values (tuples become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "UNetConfig":
        """Make a configuration from `to_dict`'s values; missing fields take their defaults, unknown ones raise ValueError."""
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise UserError(f"unknown UNetConfig fields: {sorted(unknown)}")
        return cls(**values)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Embed timesteps [n] as float32 [n, width]: cosines and sines of frequencies 1 down to 1e-4 (Vaswani 2017)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(groups, channels), channels)


def _mlp(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))


class ResBlock(nn.Module):
    """A block x + conv(conv(x) + time + class), with norm and SiLU before each: [n, c_in, H, W] -> [n, c_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, embed: int, groups: int, dropout: float):
        super().__init__()
        self.block_1 = nn.Sequential(_norm(c_in, groups), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(embed, c_out))
        self.cemb_proj = nn.Sequential(nn.SiLU(), nn.Linear(embed, c_out))
        self.block_2 = nn.Sequential(
            _norm(c_out, groups), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.residual = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor, cemb: Tensor) -> Tensor:
        shift = self.temb_proj(temb) + self.cemb_proj(cemb)
        return self.residual(x) + self.block_2(self.block_1(x) + shift[:, :, None, None])


class Attention(nn.Module):
    """An attention block x + proj(softmax(q k^T / sqrt(C)) v), one head over the H * W positions, [n, C, H, W]."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.proj_q = nn.Conv2d(channels, channels, 1)
        self.proj_k = nn.Conv2d(channels, channels, 1)
        self.proj_v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [n, 1, H * W, C]; in channels_last these are views.
        q, k, v = (proj(h).flatten(2).mT.unsqueeze(1) for proj in (self.proj_q, self.proj_k, self.proj_v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.squeeze(1).mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """A stride-2 convolution that halves the side."""

    def __init__(self, channels: int):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Upsample(nn.Module):
    """A nearest-neighbour upsampling that doubles the side, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stack(nn.Sequential):
    """A Sequential whose residual blocks are also given the time and class embeddings."""

    def forward(self, x: Tensor, temb: Tensor, cemb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, temb, cemb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """A U-Net that predicts, for images of class y, the noise in x at time t, or whatever else its process requires.

    A class enters as a one-hot code of length class_width, scaled to mean square 1 (as in EDM's `map_label`):
    column y of `cemb_layer[0].weight` is the learned embedding of class y, column num_classes that of the
    null class. Thus the parameter count does not depend on the number of classes, and a private step needs no rule for embedding
    tables.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        embed = 4 * config.width
        resblock = partial(ResBlock, embed=embed, groups=config.norm_groups, dropout=config.dropout)

        def attention(channels: int, level: int) -> list[nn.Module]:
            return [Attention(channels, config.norm_groups)] if config.attends(level) else []

        self.to_patches = nn.PixelUnshuffle(config.patch) if config.patch > 1 else nn.Identity()
        self.to_pixels = nn.PixelShuffle(config.patch) if config.patch > 1 else nn.Identity()
        self.temb_layer = _mlp(config.width, embed)
        self.cemb_layer = _mlp(config.class_width, embed)
        code = math.sqrt(config.class_width) * torch.eye(config.num_classes + 1, config.class_width)
        self.register_buffer("class_code", code, persistent=False)

        c, last = config.width, len(config.widths) - 1
        channels = config.in_channels * config.patch**2
        self.downblocks = nn.ModuleList([Stack(nn.Conv2d(channels, c, 3, padding=1))])
        skips = [c]
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks_per_level):
                self.downblocks.append(Stack(resblock(c, width), *attention(width, level)))
                skips.append(c := width)
            if level < last:
                self.downblocks.append(Stack(Downsample(c)))
                skips.append(c)

        self.middleblocks = Stack(resblock(c, c), *attention(c, last), resblock(c, c))

        self.upblocks = nn.ModuleList()
        for level, width in reversed([*enumerate(config.widths)]):
            for _ in range(config.blocks_per_level + 1):
                self.upblocks.append(Stack(resblock(c + skips.pop(), width), *attention(width, level)))
                c = width
            if level > 0:
                self.upblocks[-1].append(Upsample(c))

        conv_out = nn.Conv2d(c, channels, 3, padding=1)
        self.out = nn.Sequential(_norm(c, config.norm_groups), nn.SiLU(), conv_out)
        if config.zero_init:
            self._zero_last_convolutions()

    def _zero_last_convolutions(self):
        blocks = [m.block_2[-1] for m in self.modules() if isinstance(m, ResBlock)]
        attentions = [m.proj for m in self.modules() if isinstance(m, Attention)]
        for conv in (*blocks, *attentions, self.out[-1]):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    @cached_property
    def process(self) -> Process:
        """The process that the model reverses."""
        return PROCESSES[self.config.process]()

    @property
    def null_class(self) -> int:
        """The label that stands for "no label"."""
        return self.config.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        return (self.config.in_channels, self.config.image_size, self.config.image_size)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise, shaped as x, in images x [n, C, H, W] at times t [n], 0 to 1,000, with labels y [n]."""
        if tuple(x.shape[1:]) != self.image_shape or t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise UserError(
                f"expected x [n, {', '.join(map(str, self.image_shape))}], t [n] and y [n], "
                f"got {tuple(x.shape)}, {tuple(t.shape)} and {tuple(y.shape)}"
            )
        temb = self.temb_layer(sinusoid(t, self.config.width).to(self.class_code.dtype))
        cemb = self.cemb_layer(F.embedding(y, self.class_code))
        x = self.to_patches(x)
        skips = []
        for block in self.downblocks:
            x = block(x, temb, cemb)
            skips.append(x)
        x = self.middleblocks(x, temb, cemb)
        for block in self.upblocks:
            x = block(torch.cat([x, skips.pop()], dim=1), temb, cemb)
        return self.to_pixels(self.out(x))


PRESETS = {  # name -> the fields of UNetConfig that the preset sets, without size, channels and classes
    "digits": {"width": 16, "multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 8, "attention": (1,)},
    "small": {"width": 32, "multipliers": (1, 2, 2), "blocks_per_level": 1, "norm_groups": 8, "attention": (2,)},
    "medium": {"width": 32, "multipliers": (1, 2, 2, 2), "blocks_per_level": 1, "norm_groups": 8, "attention": (3,)},
    "paper": {},
}


def preset_for(size: int) -> str:
    """Return the name of the preset for images of `size` pixels: attention is then at 4 x 4 to 11 x 11 positions."""
    return "digits" if size < 16 else "small" if size < 48 else "medium"


def paper_unet(**overrides) -> UNet:
    """Make the paper's U-Net for 3 x 32 x 32: 10,422,851 parameters, 52 3x3 and 97 1x1 convolutions."""
    return UNet(UNetConfig(**overrides))


def digits_unet(**overrides) -> UNet:
    """Make a U-Net for 1 x 8 x 8 images (scikit-learn's digits), quick on two CPU cores: 198,689 parameters.

    Channels are 16 at 8 x 8 and 32 at 4 x 4, multiples of the CPU's vectors; attention only at 4 x 4.
    """
    return UNet(UNetConfig(**PRESETS["digits"] | {"image_size": 8, "in_channels": 1} | overrides))
