"""Figures as PNG bytes: Matplotlib's objects on the Agg canvas; no backend is chosen, no global state touched."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastloda.errors import UserError
from fastloda.synthesis.report.tables import Result, rounded_up

INK, LINE, DOT = "#767b85", "#3b82d6", "#e0803a"  # readable on white and on near-black: the background is transparent
CELL = 32  # side in pixels to which small images are enlarged


def sample_grid(images: Tensor, labels: Tensor, *, columns: int = 20, max_rows: int = 10) -> bytes:
    """Draw images [n, C, H, W] in [-1, 1], a row per class (labels [n]), enlarged by whole factors, with thin gaps.

    Classes without an image have no row; the first `max_rows` classes are shown.
    """
    classes = labels.unique()[:max_rows]
    if not len(classes):
        raise UserError("a grid of no images")
    rows = [images[labels == c][:columns] for c in classes]
    scale = max(1, CELL // images.shape[2])
    gap = max(1, scale // 2)
    height, width = (scale * side + gap for side in images.shape[2:])
    canvas = np.zeros((len(rows) * height - gap, max(map(len, rows)) * width - gap, 4), np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            canvas[i * height : (i + 1) * height - gap, j * width : (j + 1) * width - gap] = _pixels(image, scale)
    content = io.BytesIO()
    Image.fromarray(canvas, "RGBA").save(content, "PNG", optimize=True)
    return content.getvalue()


def epsilon_plot(steps: Sequence[int], epsilons: Sequence[float], *, target: float | None, delta: float) -> bytes:
    """Plot epsilon spent by optimizer steps, and the target that it may not exceed."""
    with drawing(6.0, 3.2) as (axes, png):
        axes.plot(steps, epsilons, color=LINE, linewidth=2)
        if target is not None:
            axes.axhline(target, color=DOT, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"target {target:g}", (0, target), (2, -12), textcoords="offset points", color=DOT, fontsize=9
            )
        axes.set(xlabel="optimizer steps", ylabel=f"epsilon at delta = {delta:g}", ylim=(0, None), xlim=(0, max(steps)))
    return png.getvalue()


def accuracy_plot(results: Sequence[Result]) -> bytes:
    """Plot the mean test accuracy by method: a bar each, and a dot for each seed if there are several."""
    with drawing(6.0, 0.9 + 0.42 * len(results)) as (axes, png):
        places = range(len(results))
        axes.barh(places, [100 * r.mean for r in results], height=0.6, color=LINE, alpha=0.75)
        for place, result in zip(places, results, strict=True):
            text = {"textcoords": "offset points", "va": "center", "color": INK, "annotation_clip": False}
            axes.annotate(result.cells()[-1], (100, place), (8, 0), **text)
            if result.std is not None:
                values = [100 * a for a in result.accuracies]
                axes.plot(values, [place] * len(values), "o", color=DOT, markersize=4)
        axes.set(
            yticks=places,
            yticklabels=[_label(r) for r in results],
            xlim=(0, 100),
            xlabel="accuracy on real test images, %",
        )
        axes.invert_yaxis()
    return png.getvalue()


def accuracy_curves(
    curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]], levels: Mapping[str, float]
) -> bytes:
    """Plot accuracy in percent by epsilon: a curve per method, with a band of one standard deviation over its seeds.

    `curves` maps a name to (epsilon, accuracies) pairs; `levels` a name to the accuracy of what has no epsilon, dashed.
    """
    with drawing(7.6, 4.0) as (axes, png):
        for name, points in curves.items():
            epsilons, values = [p[0] for p in points], [np.asarray(p[1]) for p in points]
            means, spread = np.array([v.mean() for v in values]), np.array([v.std() for v in values])
            (line,) = axes.plot(epsilons, means, marker="o", markersize=4, linewidth=1.8, label=name)
            axes.fill_between(epsilons, means - spread, means + spread, color=line.get_color(), alpha=0.15, linewidth=0)
        for name, value in levels.items():
            axes.axhline(value, color=INK, linestyle="--", linewidth=1)
            axes.annotate(
                name,
                (1, value),
                (-2, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                color=INK,
                fontsize=8,
            )
        epsilons = sorted({epsilon for points in curves.values() for epsilon, _ in points})
        lowest = min([*levels.values(), *(min(values) for points in curves.values() for _, values in points)])
        bottom = 10 * math.floor(lowest / 10 - 0.2)  # so that curves near the top can be told apart
        axes.set(xlabel="epsilon", ylabel="accuracy on real test images, %", ylim=(max(0, bottom), 100), xscale="log")
        axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axes.minorticks_off()
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return png.getvalue()


def _label(result: Result) -> str:
    private = 0 < result.epsilon < math.inf
    return f"{result.method}, ε = {rounded_up(result.epsilon)}" if private else result.method


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Make axes of a figure of width x height inches, and a buffer that holds its PNG after the context."""
    figure, png = Figure((width, height), dpi=144, layout="constrained"), io.BytesIO()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes, png
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    figure.savefig(png, format="png", transparent=True, metadata={"Software": None})


def _pixels(image: Tensor, scale: int) -> np.ndarray:
    """Convert an image [C, H, W] in [-1, 1] to opaque pixels, uint8 [scale H, scale W, 4]."""
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rgb = levels.expand(3, -1, -1) if len(levels) == 1 else levels
    rgba = torch.cat([rgb, torch.full_like(rgb[:1], 255)])
    return rgba.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
