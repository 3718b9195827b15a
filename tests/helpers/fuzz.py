"""Hostile records among ordinary ones, in models and losses of many kinds."""

import math
from dataclasses import dataclass

import drawn
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fastloda import GhostClipper, LoDAConv2d, LoDALinear

SLACK = 1 + 1e-5  # the relative excess over max_grad_norm that the guarantee allows for rounding


def clipped_sum(model, losses, max_grad_norm, mask=None, views=1):
    """Compute (the clipped sum of one micro-batch in float64, its statistics)."""
    clipper = GhostClipper(model, max_grad_norm, views)
    stats = clipper.accumulate(losses, mask)
    return flat(clipper), stats


def flat(clipper) -> Tensor:
    return torch.cat([total.double().flatten() for total in clipper._sums.by_name.values()])


def cancelling(x: Tensor, size: float) -> Tensor:
    """Make a checkerboard of +-size with a little noise; its positions cancel in a sum where the output gradient is constant."""
    signs = 1 - 2 * (torch.arange(x[0, 0].numel()).view(x.shape[2:]) % 2)
    return size * signs + 1e-3 * x


def spiked(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[torch.randint(x.numel(), ())] = value
    return x


RECORDS = {
    "ordinary": lambda x: x,
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.7),
    "cancelling": lambda x: cancelling(x, 1.0),
    "cancelling and large": lambda x: cancelling(x, 100.0),
    "large": lambda x: 100 * x,
    "huge": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
    "all magnitudes": lambda x: x * 10 ** (40 * torch.rand_like(x) - 20),
    "one huge": lambda x: spiked(x, 1e30),
    "one Inf": lambda x: spiked(x, math.inf),
    "one -Inf": lambda x: spiked(x, -math.inf),
    "one NaN": lambda x: spiked(x, math.nan),
    "all NaN": lambda x: torch.full_like(x, math.nan),
}


LOSS_SCALES = [1.0, 1.0, 1.0, 100.0, 1e30, 1e-30, 1e38, 0.0, -1.0, math.nan, math.inf]


C, SIZE = 4, (4, 6)


def adapters_only() -> nn.Module:
    return nn.Sequential(LoDAConv2d(C, C, 3, padding=1, rank=2), nn.SiLU(), LoDAConv2d(C, 3, 3, 2, rank=3))


def everything() -> nn.Module:
    head = nn.Linear(3 * 2, 2)
    return nn.Sequential(
        nn.Conv2d(C, C, 3, padding=1), nn.GroupNorm(2, C), nn.SiLU(), nn.Conv2d(C, 3, 3, 2), nn.Flatten(), head
    )


def used_twice() -> nn.Module:
    return nn.Sequential(
        drawn.Twice(LoDAConv2d(C, C, 3, padding=1, rank=2)), nn.Flatten(), LoDALinear(C * 24, 2, rank=1)
    )


MODELS = {"adapters": adapters_only, "everything": everything, "used twice": used_twice}


READOUTS = {
    "even": lambda y: y.flatten(1).sum(1),
    "curved": drawn.curved,
    "steep": lambda y: y.flatten(1).square().sum(1),
}


PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast": torch.float32,
}


@dataclass(frozen=True)
class Fuzz:
    """One hostile record among ordinary ones."""

    model: str
    precision: str
    record: str
    loss_scale: float
    readout: str
    views: int
    max_grad_norm: float
    keep: float
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def build(self) -> tuple[nn.Module, Tensor]:
        """Build the model, and three samples of which the second is hostile."""
        torch.manual_seed(self.seed)
        model = drawn.randomise(MODELS[self.model]().double())
        x = torch.randn(3 * self.views, C, *SIZE, dtype=torch.float64)
        x[self.views : self.views + 1] = RECORDS[self.record](x[self.views : self.views + 1])
        return model.to(self.dtype), x.to(self.dtype)

    def losses(self, model: nn.Module, x: Tensor, hostile: slice) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "autocast"):
            losses = READOUTS[self.readout](model(x)).to(torch.promote_types(self.dtype, torch.float32))
        scales = torch.ones_like(losses)
        scales[hostile] = self.loss_scale
        return losses * scales


fuzzed = st.builds(
    Fuzz,
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(PRECISIONS)),
    st.sampled_from(sorted(RECORDS)),
    st.sampled_from(LOSS_SCALES),
    st.sampled_from(sorted(READOUTS)),
    st.integers(1, 2),
    st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 50.0]),
    st.sampled_from([0.0, 4.0, math.inf]),
    st.integers(0, 1 << 20),
)
