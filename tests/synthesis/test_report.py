"""Tables, figures and the page: right numbers, self-contained, escaped, and without private images."""

import inspect
import io
import json
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from pages import check_page, png_pixels, source_pixels
from rich.console import Console

from fastloda import DPTrainer
from fastloda.accounting.compose import compose_epsilon
from fastloda.synthesis.account import releases
from fastloda.synthesis.report import (
    Blanks,
    Bullets,
    Facts,
    Figure,
    Page,
    Result,
    Section,
    Text,
    accuracy_plot,
    epsilon_plot,
    render,
    result_table,
    sample_grid,
)
from fastloda.synthesis.report.plots import accuracy_curves
from fastloda.synthesis.report.tables import rounded_up, settings_table, times_table

RESULTS = [
    Result("Public only", 0.0, "public samples", (0.5, 0.6)),
    Result("DP-LoDA | ours", 9.971, "private samples", (0.9, 0.92)),
    Result("No privacy", math.inf, "digits", (0.99,)),
]


def test_mean_and_standard_deviation():
    assert RESULTS[0].mean == pytest.approx(0.55)
    assert RESULTS[0].std == pytest.approx(math.sqrt(2) * 0.05)
    assert RESULTS[2].std is None


@pytest.mark.parametrize("accuracies", [(), (1.2,), (-0.1,), (math.nan,)])
def test_accuracies_are_checked(accuracies):
    with pytest.raises(ValueError, match="accuracies"):
        Result("m", 1.0, "x", accuracies)


@pytest.mark.parametrize(
    ("epsilon", "text"), [(0, "0"), (9.97, "9.97"), (9.9701, "9.98"), (0.001, "0.01"), (math.inf, "∞")]
)
def test_a_shown_epsilon_is_still_an_upper_bound(epsilon, text):
    assert rounded_up(epsilon) == text


def test_markdown_and_terminal_show_the_same_cells():
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(result_table(RESULTS).for_terminal())
    shown = console.export_text()
    text = result_table(RESULTS).to_markdown()
    for result in RESULTS:
        for cell in result.cells():
            assert cell in shown and cell.replace("|", r"\|") in text
    assert {line.replace(r"\|", "").count("|") for line in text.splitlines()} == {5}
    assert "55.0 ± 7.1" in text and "| 99.0 |" in text


def test_grid_has_a_row_for_each_class_and_exact_pixels():
    images = torch.tensor([-1.0, 0.0, 1.0, 0.5])[:, None, None, None].expand(4, 1, 8, 8)
    pixels = png_pixels(sample_grid(images, torch.tensor([1, 0, 1, 1]), columns=2))
    assert pixels.shape[0] == 2 * 64 + 2 and pixels.shape[1] > 2 * 64 + 2
    grid = pixels[:, -(2 * 64 + 2) :]
    corners = grid[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.tolist() == [[128] * 3, [255] * 3, [0] * 3, [255] * 3]  # class 0 has only one image
    assert (grid[64:66] == 255).all() and (grid[:64, :64] == 128).all()


def test_grid_of_colours_and_of_large_images_is_not_enlarged():
    images = torch.rand(4, 3, 40, 40) * 2 - 1
    pixels = png_pixels(sample_grid(images, torch.tensor([0, 0, 1, 1])))
    assert pixels.shape[0] == 82
    expected = ((images[3] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels[42:, -40:], expected)


def test_each_row_of_a_grid_has_its_class_name_and_nothing_is_cut_off():
    images, labels = torch.zeros(3, 1, 16, 16), torch.tensor([0, 2, 2])
    short = png_pixels(sample_grid(images, labels))
    named = png_pixels(
        sample_grid(
            images,
            labels,
            ("red", "never", "basophilic erythroblasts, Größe, 中性粒细胞, a neutrophil, and many more words"),
        )
    )
    width = 2 * 64 + 2
    assert named.shape[0] > short.shape[0] == 2 * 64 + 2 and named.shape[1] > short.shape[1]  # text goes on below
    for pixels in (short, named):
        labels = pixels[:, :-width]
        for row in (labels[:64], labels[66:]):
            assert (row < 128).any()
        assert (labels[-1] == 255).all() and (labels[0] == 255).all() and (labels[:, -1] == 255).all()


def test_figures_leave_matplotlib_as_it_was():
    before, backend = dict(matplotlib.rcParams), matplotlib.rcParams._get("backend")
    curves = accuracy_curves({"DP": [(1.0, [50.0, 60.0]), (10.0, [90.0])]}, {"No privacy": 99.0})
    for png in (accuracy_plot(RESULTS), epsilon_plot([0, 5, 10], [0.0, 1.0, 2.0], target=2.0, delta=1e-5), curves):
        assert (png_pixels(png)[0] == 255).all()  # opaque, so that it is dark on light on any page
        assert len(np.unique(png_pixels(png)[..., :3].reshape(-1, 3), axis=0)) > 10  # something is drawn
    assert dict(matplotlib.rcParams) == before and matplotlib.rcParams._get("backend") == backend
    import fastloda.synthesis.report.plots as plots

    assert "pyplot" not in inspect.getsource(plots)


def test_many_curves_differ_by_colour_or_marker(monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **options: drawn.extend(plot(*args, **options)) or drawn[-1:])
    accuracy_curves({f"method {i}": [(1.0, [50.0 + i]), (10.0, [60.0 + i])] for i in range(25)}, {})
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 25


def _page(text: str = "Said.") -> Page:
    figure = Figure("a figure", accuracy_plot(RESULTS))
    grid = Figure("a grid", sample_grid(torch.zeros(1, 1, 8, 8), torch.zeros(1).long()))
    settings = settings_table({"steps": (250, "by trial"), text: (1 / 7, text)})
    sections = [
        Section("", [result_table(RESULTS, "A table"), figure]),
        Section(text, [grid, Text([text], "notice"), Text([text], "alarm"), Bullets([text])]),
        Section("Facts", [Facts({"epsilon": 1 / 3, text: text}, "a run", folded=True), Facts({text: text}, text)]),
        Section("More", [settings, times_table({"train": 12.4, text: 1.0}), Blanks(["Signature", text])]),
    ]
    return Page("Title", text, sections)


def test_the_page_is_self_contained_and_says_everything():
    html = render(_page())
    assert [image["alt"] for image in check_page(html)] == ["a figure", "a grid"]
    shown = [
        "Title",
        "Said.",
        "A table",
        "55.0 ± 7.1",
        "DP-LoDA | ours",
        "0.333333",
        "0.142857",
        "by trial",
        "250",
        "train",
    ]
    assert all(text in html for text in [*shown, "12", "Signature", "<summary>a run"])
    assert "@media print" in html and 'content="width=device-width' in html and 'class="alarm"' in html


def test_the_page_escapes_what_it_is_given():
    html = render(_page("<script>alert('x')</script>"))
    assert "<script" not in html and html.count("&lt;script&gt;") == 14


# -- the demo, with so few steps that nothing is learned --------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    from fastloda.synthesis import demo
    from fastloda.synthesis.stages import preview

    run = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        demo.demo(run, epsilon=(10.0,), seeds=2, settings=_tiny(), progress=False)
        yield run


def _tiny(**changes):
    from fastloda.synthesis.demo import DemoSettings

    few = {"public_images": 64, "public_steps": 2, "choice_images": 80, "choice_steps": 2, "private_steps": 2}
    return DemoSettings(**few | {"synthetic_images": 20, "sampler_steps": 2, "classifier_steps": 2} | changes)


def test_every_setting_says_how_it_was_chosen(demo_run):
    from fastloda.synthesis.demo import HOW_CHOSEN

    assert json.loads((demo_run / "results.json").read_text())["settings"].keys() == HOW_CHOSEN.keys()


def test_the_demos_settings_are_those_of_any_images():
    """The settings are those that were tuned; the recipe is that of `fastloda synthesize`."""
    from fastloda.synthesis.demo import SHORT, DemoSettings

    relaxed, strict = (DemoSettings().recipe(epsilon, seed=0) for epsilon in (3.0, 2.9))
    assert (relaxed.privacy.steps, relaxed.privacy.views, strict.privacy.steps, strict.privacy.views) == (
        400,
        2,
        100,
        4,
    )
    assert {recipe.privacy.batch_size for recipe in (relaxed, strict)} == {256}
    assert relaxed.pretraining.ema_decay == 0.998 and relaxed.tuning.training.micro_batch_size == 512
    assert SHORT.recipe(10.0, seed=0).privacy.steps == SHORT.private_steps == 400 / 4


def test_results_are_complete(demo_run):
    document = json.loads((demo_run / "results.json").read_text())
    methods = ["Public only", "Public, chosen privately", "DP-LoDA (ours)", "DP-SGD", "No privacy"]
    assert [row["method"] for row in document["results"]] == methods
    for row in document["results"]:
        assert len(row["accuracy_by_seed"]) == 2 and 0 <= row["accuracy_mean"] <= 1 and row["accuracy_std"] >= 0
    epsilons = [row["epsilon"] for row in document["results"]]
    assert (
        epsilons[0] == 0 and epsilons[4] is None and 0 < epsilons[1] < 1 and all(9.9 < e <= 10 for e in epsilons[2:4])
    )
    assert len(document["privacy"]) == 6 and all(s["seed_was_fixed"] for s in document["privacy"].values())
    runs = [s for name, s in document["privacy"].items() if "chosen" not in name]
    assert len(runs) == 4 and sum(bool(s["earlier"]) for s in runs) == 2
    assert document["epsilon_of_all_private_runs_together"] == compose_epsilon(
        [m for s in runs for m in releases(s)], 1e-5
    )
    assert "experiment" in document["randomness"]
    assert len(document["seconds"]) == 22 and document["settings"]["private_steps"] == 2
    table = (demo_run / "results.md").read_text()
    assert all(f"| {method} |" in table for method in methods)


def test_the_report_shows_no_private_image(demo_run):
    from fastloda.synthesis.data import digits_split

    html = (demo_run / "report.html").read_text()
    images = check_page(html)
    assert [image["alt"].split(":")[0] for image in images[1:5]] == [
        "Public training images",
        "Before",
        "Of the public model trained on digits chosen for epsilon 10",
        "After private fine-tuning",
    ]
    private, test = (part.images for part in digits_split())
    real = {image.numpy().tobytes() for image in ((torch.cat([private, test]) + 1) * 127.5).round().byte()}
    for image in images[1:5]:
        grid = source_pixels(image)
        assert not {each.tobytes() for each in _cells(grid[:, grid.shape[1] % 66 + 2 :])} & real
    for text in ("add/remove one record", "Poisson", "experiment", "how each was chosen", "prv-accountant", "Before"):
        assert text in html


def _cells(grid: np.ndarray) -> list[np.ndarray]:
    """Cut a grid of 8 x 8 images, without its labels, into the images."""
    tops, lefts = (range(0, side, 66) for side in grid.shape[:2])
    large = [grid[top : top + 64, left : left + 64, 0] for top in tops for left in lefts]
    cells = [each[::8, ::8] for each in large]
    for cell, each in zip(cells, large, strict=True):
        np.testing.assert_array_equal(cell.repeat(8, 0).repeat(8, 1), each)
    return cells


def test_seeds_repeat_every_stage(demo_run):
    for name in (
        "public/model.safetensors",
        "epsilon-10/chosen/sums.safetensors",
        "epsilon-10/samples/samples.npz",
        "epsilon-10/dpsgd/classifier.safetensors",
    ):
        first, second = (demo_run / f"seed-{seed}" / name for seed in range(2))
        assert first.read_bytes() != second.read_bytes()


def test_a_finished_demo_is_reused_and_another_is_refused(demo_run, capsys):
    from fastloda.synthesis.demo import demo
    from fastloda.synthesis.runs import RunError

    stages = [p for p in demo_run.rglob("*") if p.is_file() and p.parent != demo_run]
    before = {p: p.stat().st_mtime_ns for p in stages}
    table = (demo_run / "results.md").read_text()
    demo(demo_run, epsilon=(10.0,), seeds=2, settings=_tiny(), progress=False)
    assert (demo_run / "results.md").read_text() == table
    with pytest.raises(RunError, match=r"count is 20 there and 30 here.*rm -r"):
        demo(demo_run, epsilon=(10.0,), seeds=1, settings=_tiny(synthetic_images=30), progress=False)
    assert {p: p.stat().st_mtime_ns for p in stages} == before


def test_an_interrupted_demo_continues_to_the_same_result(demo_run, tmp_path, monkeypatch):
    from fastloda.synthesis import demo
    from fastloda.synthesis.stages import preview

    monkeypatch.setattr(preview, "PREVIEW_COLUMNS", 1)
    options = {"epsilon": (10.0,), "seeds": 1, "settings": _tiny(), "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(DPTrainer, "fit", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.demo(tmp_path / "run", **options)
    made = (tmp_path / "run" / "seed-0" / "public" / "model.safetensors").stat().st_mtime_ns
    demo.demo(tmp_path / "run", **options)
    assert (tmp_path / "run" / "seed-0" / "public" / "model.safetensors").stat().st_mtime_ns == made
    ours, whole = (json.loads((run / "results.json").read_text()) for run in (tmp_path / "run", demo_run))
    firsts = [[row["accuracy_by_seed"][0] for row in document["results"]] for document in (ours, whole)]
    assert firsts[0] == firsts[1]


def _interrupt(trainer):
    raise KeyboardInterrupt
