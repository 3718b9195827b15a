"""A small Transformer in plain modules, which every provider can take."""

import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 1000  # of its vocabulary


class EncoderBlock(nn.Module):
    """A block of a Transformer's encoder with its norms first: attention, then a perceptron four times as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*qkv.unbind(2))  # each [n, heads, T, width / heads]
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A Transformer's encoder that classifies sequences of tokens. Its Linear layers train; embedding and norms are frozen."""

    def __init__(self, width: int, layers: int, classes: int = 10):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads=width // 64) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.LayerNorm):
                module.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))).mean(1))
