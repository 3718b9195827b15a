"""The sizes of `--bench-scale`: smoke to see that the code runs, cpu for two cores and 24 GiB, gpu for the full sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cases import Case
from providers import ALL, EAGER, GRAPH, OURS, PLAIN

GIB = 1 << 30
HALF = {"layout": "channels_last", "dtype": "bfloat16"}


@dataclass(frozen=True)
class Timed:
    """A case, and the providers that take it, if they are installed.

    memory: whether to measure peak memory too. fits: a number of bytes; the largest batch that fits in it is found too.
    """

    case: Case
    providers: tuple[str, ...] = EAGER
    memory: bool = True
    fits: int | None = None

    @property
    def name(self) -> str:
        return self.case.name + "-graph" * (GRAPH in self.providers)


@dataclass(frozen=True)
class Axis:
    """A case at growing values of one of its fields; `name` is that of the curve."""

    name: str
    field: str
    base: Case
    values: Sequence[int]
    memory: bool = True

    def timed(self) -> list[Timed]:
        return [Timed(replace(self.base, **{self.field: value}), memory=self.memory) for value in self.values]


@dataclass(frozen=True)
class Scale:
    """The sizes of a whole bench.

    rounds: number of rounds of a comparison. kernel_*: batch, rounds, number of the paper's layers and dtypes for timing
    single operations. headline: layers to begin with, (channels, size).
    """

    rounds: int
    steps: tuple[Timed, ...]
    growth: tuple[Axis, ...]
    kernel_batch: int
    kernel_rounds: int
    kernel_layers: int | None = None  # all of them
    kernel_dtypes: tuple[str, ...] = ("float32",)
    headline: tuple[tuple[int, int], ...] = ()


def scale_of(config) -> Scale:
    """Return the scale chosen by pytest's --bench-scale."""
    return SCALES[config.getoption("--bench-scale")]


def _both_layouts(case: Case, **options) -> list[Timed]:
    return [Timed(replace(case, layout=layout), **options) for layout in ("nchw", "channels_last")]


QUICK = tuple(name for name in ALL if name != "jax_privacy micro-batches")  # whose convolutions take many times as long
_TINY = Case("stack", 4, channels=8, size=8, layers=2)
_SMALL = Case("stack", 16, channels=32, size=16)
_REAL = Case("stack", 128, channels=128, **HALF)
_PAPER = Case("paper_unet", 512, **HALF)
_ENCODER = Case("encoder", 16, None, channels=256, size=64, layers=4)

SCALES = {
    "smoke": Scale(
        rounds=1,
        steps=(
            Timed(replace(_TINY, model="layer"), (PLAIN, OURS)),
            Timed(_TINY, ALL, memory=False),
            Timed(replace(_TINY, layout="channels_last"), memory=False),
            Timed(Case("digits_unet", 2), memory=False),
            Timed(Case("digits_unet", 2, None), memory=False),
            Timed(Case("paper_unet", 1), (PLAIN, OURS), memory=False),
            Timed(Case("wideresnet", 1, None), memory=False),
            Timed(replace(_ENCODER, batch=2, channels=64, size=4, layers=1), memory=False),
        ),
        growth=(Axis("views", "views", _TINY, (1, 2), memory=False),),
        kernel_batch=2,
        kernel_rounds=1,
        kernel_layers=2,
    ),
    "cpu": Scale(
        rounds=9,
        steps=(
            *_both_layouts(Case("layer", 32)),
            *_both_layouts(Case("stack", 32), providers=QUICK),
            *_both_layouts(Case("stack", 256, channels=32, size=8), providers=QUICK),
            *_both_layouts(Case("digits_unet", 128), providers=QUICK),
            Timed(Case("digits_unet", 128, None), QUICK),
            Timed(Case("wideresnet", 16, None), QUICK),
            Timed(_ENCODER, ALL),
            Timed(Case("paper_unet", 8), fits=GIB),
            Timed(Case("paper_unet", 8, None), fits=GIB),
        ),
        growth=(
            Axis("batch", "batch", _SMALL, (4, 16, 64, 256)),
            Axis("resolution", "size", replace(_SMALL, batch=8), (16, 32, 64)),
            Axis("rank at 16 x 16", "rank", _SMALL, (1, 4, 16, 32)),
            Axis("rank at 8 x 8", "rank", replace(_SMALL, channels=64, size=8), (1, 4, 16, 64)),
            Axis("views", "views", replace(_SMALL, batch=8), (1, 2, 4, 8, 16)),
            Axis("layers", "layers", _SMALL, (1, 4, 16, 32)),
        ),
        kernel_batch=16,
        kernel_rounds=9,
    ),
    "gpu": Scale(
        rounds=9,
        steps=(
            Timed(_PAPER, fits=32 * GIB),
            Timed(replace(_PAPER, rank=None), fits=32 * GIB),
            Timed(_REAL),
            Timed(replace(_REAL, model="layer")),
            Timed(Case("paper_unet", 128)),
            Timed(Case("wideresnet", 512, None, **HALF)),
            Timed(Case("digits_unet", 512, **HALF)),
            # Last: a capture that fails may leave the process unable to go on. A graph's memory is its pool's, not a step's.
            Timed(_PAPER, (PLAIN, OURS, GRAPH), memory=False),
        ),
        growth=(
            Axis("batch", "batch", _REAL, (16, 64, 256, 1024)),
            Axis("resolution", "size", replace(_REAL, batch=64), (16, 32, 64)),
            Axis("rank", "rank", _REAL, (1, 4, 16, 64)),
            Axis("views", "views", replace(_REAL, batch=32), (1, 2, 4, 8, 16)),
            Axis("layers", "layers", replace(_REAL, batch=64), (1, 4, 16, 32)),
        ),
        kernel_batch=128,
        kernel_rounds=50,
        kernel_dtypes=("bfloat16", "float32"),
        headline=((128, 32), (512, 8)),
    ),
}
