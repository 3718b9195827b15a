"""The bench's plots as PNG bytes: bars of ratios to plain PyTorch, and curves over a growing size."""

from collections.abc import Sequence

from tables import COMPILED_OURS, COMPILED_PLAIN, OURS, PLAIN

from fastloda.synthesis.report.plots import DOT, INK, LINE, drawing

COLOURS = {
    OURS: DOT, COMPILED_OURS: "#e8a48a", PLAIN: INK, COMPILED_PLAIN: "#6b6b6b", "plain JAX": "#a8a8a8",
    "Opacus hooks": LINE, "Opacus functorch": "#1f5aa6", "Opacus ghost": "#7fb2ea", "fastDP MixOpt": "#3f8f5b",
    "jax_privacy vmap": "#b8860b", "jax_privacy micro-batches": "#d9b44a", "jax_privacy one by one": "#efd999",
}  # fmt: skip
OTHER = "#8e6cc4"
TIME, MEMORY = (
    ("time_over_plain", "time of a step / plain PyTorch's"),
    ("peak_over_plain", "peak memory / plain PyTorch's"),
)
Measure = tuple[str, str]  # name of the figure in the result file, label of its axis


def has(cases: Sequence[dict], measure: Measure) -> bool:
    return any(measure[0] in figures for case in cases for figures in case["providers"].values())


def ratio_bars(cases: Sequence[dict], measure: Measure) -> bytes:
    """Draw a group of bars for each case, a bar for each provider that ran; the line at 1 is plain PyTorch."""
    key, label = measure
    bars = [
        (case["case"], name, figures[key])
        for case in cases
        for name, figures in case["providers"].items()
        if key in figures and name != PLAIN
    ]
    groups = list(dict.fromkeys(case for case, _, _ in bars))
    places = [i + 1.2 * groups.index(case) for i, (case, _, _) in enumerate(bars)]  # a gap before each group
    with drawing(8.0, 1.0 + 0.24 * (places[-1] + 1)) as (axes, png):
        for provider in dict.fromkeys(name for _, name, _ in bars):
            mine = [(place, value) for place, (_, name, value) in zip(places, bars) if name == provider]
            axes.barh(*zip(*mine), height=0.85, color=COLOURS.get(provider, OTHER), label=provider)
        for place, (_, _, value) in zip(places, bars):
            axes.annotate(f"{value:.2f}", (value, place), (3, 0), textcoords="offset points", va="center", color=INK)
        middles = [_mean([p for p, (case, _, _) in zip(places, bars) if case == group]) for group in groups]
        axes.set(yticks=middles, yticklabels=groups, xlabel=label)
        axes.axvline(1.0, color=INK, linewidth=1, linestyle="--")
        axes.invert_yaxis()
        _legend(axes)
    return png.getvalue()


def growth_curve(points: Sequence[dict], measure: Measure) -> bytes:
    """Draw a line for each provider over the values of one size; points are the cases of one curve."""
    key, label = measure
    points = sorted(points, key=lambda point: point["value"])
    with drawing(6.0, 3.4) as (axes, png):
        for provider in dict.fromkeys(name for point in points for name in point["providers"]):
            found = [(p["value"], p["providers"].get(provider, {}).get(key)) for p in points]
            found = [pair for pair in found if pair[1] is not None]
            if found:
                style = {"linestyle": "--", "linewidth": 1} if provider == PLAIN else {"marker": "o", "markersize": 4}
                axes.plot(*zip(*found), color=COLOURS.get(provider, OTHER), label=provider, **style)
        axes.set_xscale("log", base=2)
        values = [point["value"] for point in points]
        axes.set_xticks(values, [str(value) for value in values])
        axes.set(xlabel=points[0]["curve"], ylabel=label, ylim=(0, None))
        _legend(axes)
    return png.getvalue()


def _legend(axes) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
