"""Figures as PNG bytes, made with Matplotlib's objects on the Agg canvas: no backend is chosen, and no global state changed."""

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastloda.errors import UserError
from fastloda.synthesis.report.tables import Result, rounded_up

INK, LINE, DOT = "#1c2026", "#2f74c4", "#c9601a"
WIDTH = 4.6  # inches; text of ten points is then readable on a phone, where the figure is 320 pixels wide
CELL = 64  # side in pixels, to which small images are enlarged
GAP = 2  # pixels between images
NAME_WIDTH = 16  # length in characters above which a class name is wrapped
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def sample_grid(
    images: Tensor, labels: Tensor, names: Sequence[str] = (), *, columns: int = 10, max_rows: int = 10
) -> bytes:
    """Draw images [n, C, H, W] in [-1, 1]: a labelled row per class (labels [n]), scaled by a whole factor, with thin gaps.

    `names` are the names of all classes, by label; without them, classes are shown by number. Classes without images have no
    row, and only the first `max_rows` classes are shown.
    """
    classes = labels.unique()[:max_rows].tolist()
    if not classes:
        raise UserError("a grid of no images")
    rows = [images[labels == c][:columns] for c in classes]
    scale = max(1, CELL // images.shape[2])
    height, width = (scale * side + GAP for side in images.shape[2:])
    right = max(map(len, rows)) * width - GAP
    texts = [textwrap.fill(names[c] if names else str(c), NAME_WIDTH) for c in classes]
    font = ImageFont.truetype(FONT, max(14, right // 26))
    boxes = [ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font) for text in texts]
    left = round(max(box[2] for box in boxes)) + font.size // 2
    heights = [max(height, round(box[3]) + font.size // 2) for box in boxes]
    canvas = Image.new("RGB", (left + right, sum(heights) - GAP), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, text, row_height in zip(rows, texts, heights, strict=True):
        draw.multiline_text((0, top + (row_height - GAP) / 2), text, INK, font, anchor="lm")
        for j, image in enumerate(row):
            canvas.paste(Image.fromarray(_pixels(image, scale)), (left + j * width, top))
        top += row_height
    content = io.BytesIO()
    canvas.save(content, "PNG", optimize=True)
    return content.getvalue()


def epsilon_plot(steps: Sequence[int], epsilons: Sequence[float], *, target: float | None, delta: float) -> bytes:
    """Plot the epsilon spent against optimizer steps, and the target that it must not exceed."""
    with drawing(WIDTH, 3.0, "Privacy spent during training") as (axes, png):
        axes.plot(steps, epsilons, color=LINE, linewidth=2)
        if target is not None:
            axes.axhline(target, color=DOT, linestyle="--", linewidth=1.2)
            axes.annotate(f"target {target:g}", (0, target), (4, -13), textcoords="offset points", color=DOT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimizer steps", ylabel=f"epsilon at delta = {delta:g}", ylim=(0, None), xlim=(0, max(steps)))
    return png.getvalue()


def accuracy_plot(results: Sequence[Result]) -> bytes:
    """Plot the mean test accuracy of each method as a bar, with a dot for each seed if there are several."""
    title = "Accuracy of classifiers on real test images"
    with drawing(WIDTH, 0.9 + 0.52 * len(results), title) as (axes, png):
        places = range(len(results))
        axes.barh(places, [100 * r.mean for r in results], height=0.36, color=LINE)
        for place, result in zip(places, results, strict=True):
            text = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
            axes.annotate(_label(result), (0, place - 0.22), (2, 6), **text)
            axes.annotate(result.cells()[-1], (100, place), (6, 0), **text)
            if result.std is not None:
                values = [100 * a for a in result.accuracies]
                axes.plot(values, [place] * len(values), "o", color=DOT, markersize=4)
        axes.set(yticks=[], xlim=(0, 100), ylim=(len(results) - 0.6, -0.7), xlabel="accuracy, %")
    return png.getvalue()


def accuracy_curves(
    curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]], levels: Mapping[str, float]
) -> bytes:
    """Plot accuracy in percent against epsilon: a curve per method, with a band of one standard deviation over its seeds.

    `curves` maps a name to (epsilon, accuracies) pairs; `levels` maps a name to an accuracy without epsilon, drawn dashed.
    """
    lines = len(curves) + len(levels)
    with drawing(WIDTH, 3.4 + 0.12 * lines, "Accuracy of classifiers on real test images") as (axes, png):
        colours = matplotlib.rcParams["axes.prop_cycle"]
        axes.set_prop_cycle(matplotlib.cycler(marker=list("os^D")) * colours)
        for name, points in curves.items():
            epsilons, values = [p[0] for p in points], [np.asarray(p[1]) for p in points]
            means = np.array([v.mean() for v in values])
            spread = np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in values])
            (line,) = axes.plot(epsilons, means, markersize=4, linewidth=1.8, label=name)
            axes.fill_between(epsilons, means - spread, means + spread, color=line.get_color(), alpha=0.15, linewidth=0)
        for (name, value), dashes in zip(levels.items(), itertools.cycle(("--", ":", "-."))):
            axes.axhline(value, color=INK, linestyle=dashes, linewidth=1.2, label=name)
        epsilons = sorted({epsilon for points in curves.values() for epsilon, _ in points})
        lowest = min([*levels.values(), *(min(values) for points in curves.values() for _, values in points)])
        bottom = 10 * math.floor(lowest / 10 - 0.2)  # so that curves near the top can be distinguished
        axes.set(xlabel="epsilon", ylabel="accuracy, %", ylim=(max(0, bottom), 100), xscale="log")
        axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axes.minorticks_off()
        axes.figure.legend(loc="outside lower left", ncols=2, fontsize=9, frameon=False)
    return png.getvalue()


def _label(result: Result) -> str:
    private = 0 < result.epsilon < math.inf
    return f"{result.method}, ε = {rounded_up(result.epsilon)}" if private else result.method


@contextmanager
def drawing(width: float, height: float, title: str = "") -> Iterator[tuple[Axes, io.BytesIO]]:
    """Make the axes of a figure of width x height inches, and a buffer that holds its PNG once the context is left."""
    figure, png = Figure((width, height), dpi=200, layout="constrained"), io.BytesIO()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes, png
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    figure.savefig(png, format="png", metadata={"Software": None})


def _pixels(image: Tensor, scale: int) -> np.ndarray:
    """Convert an image [C, H, W] in [-1, 1] to pixels, uint8 [scale H, scale W, 3]."""
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rgb = levels.expand(3, -1, -1) if len(levels) == 1 else levels
    return rgb.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
