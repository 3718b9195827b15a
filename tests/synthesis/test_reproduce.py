"""`fastloda reproduce`: cells are done once, measured and published values stay apart, every table's recipe is consistent."""

import json
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastloda.synthesis import methods
from fastloda.synthesis.classify import SmallCNN
from fastloda.synthesis.cli import main
from fastloda.synthesis.data import LabelledImages, font_digits
from fastloda.synthesis.data.glyphs import handwritten
from fastloda.synthesis.methods import (
    Budget,
    ByEpsilon,
    DirectDPSGD,
    Method,
    NoDP,
    PrivateClassifier,
    Release,
    Sampler,
    Spent,
)
from fastloda.synthesis.methods.dp_sgd import DPSGD
from fastloda.synthesis.reproduce import paper_tables
from fastloda.synthesis.reproduce.cells import all_cells
from fastloda.synthesis.reproduce.published import CIFAR10, CIFAR10_1PCT, MNIST
from fastloda.synthesis.reproduce.recipe import Recipe, Variant
from fastloda.synthesis.reproduce.recipes import RECIPES, recipe
from fastloda.synthesis.runs import CONFIG
from fastloda.synthesis.settings import Classifier, UNetShape

FITS: list[tuple] = []


class Redraw:
    """A stand-in for a method that draws: it returns fonts again and spends the budget that it is given."""

    name, trained_on, has_budget = "DP-LoDA", "its samples", True

    def fit(self, private, public, budget: Budget, work) -> Sampler:
        FITS.append((self.name, budget.epsilon, work.seed))
        draw = lambda labels, seed: font_digits(len(labels), seed).images  # noqa: E731
        spent = Spent(budget.delta, (Release("sum", 1.0, 5.0 / budget.epsilon, 1),))
        return Sampler(draw, 10, spent, loss=lambda images: len(images) / budget.epsilon + work.seed)

    def __repr__(self) -> str:
        return "Redraw()"


class Direct:
    name, trained_on, has_budget = "DP-SGD", "the private images", True

    def fit(self, private, public, budget: Budget, work) -> PrivateClassifier:
        FITS.append((self.name, budget.epsilon, work.seed))
        return PrivateClassifier(SmallCNN(width=8), Spent(budget.delta, (Release("gradients", 0.1, 2.0, 10),)))

    def __repr__(self) -> str:
        return "Direct()"


def small(variant: Variant | None = None, **changes) -> Recipe:
    data: dict[str, LabelledImages] = {
        name: font_digits(40, seed=i) for i, name in enumerate(("private", "test", "public"))
    }
    judge = Classifier(steps=3, width=8)
    methods: list[Method] = [Redraw(), Direct(), NoDP(judge)]
    made = Recipe(
        name="digits",
        title="A small table",
        lead="Fonts against fonts.",
        **{name: lambda images=images: images for name, images in data.items()},
        methods=methods,
        classifiers={"cnn": judge},
        synthetic_images=20,
        how_chosen={"all": "for the test"},
        epsilons=(1.0, 10.0),
        published={("DP-LoDA", 1.0): 60.2, ("No privacy", None): 90.7},
        extractor_steps=2,
    )
    return replace(made, **changes)


@pytest.fixture
def table(monkeypatch):
    FITS.clear()
    monkeypatch.setitem(RECIPES, "digits", small)


def reproduce(run: Path, *options: str) -> int:
    """Run the command in this process, where a test can change the table."""
    options = ["--device", "cpu", "--progress", "false", "--jobs", "1", *options]
    return main(["reproduce", "digits", "--run", str(run), *options])


def test_cells_are_done_once_and_reported(table, tmp_path, monkeypatch, capsys):
    assert reproduce(tmp_path, "--seeds", "2") == 0
    assert len(FITS) == 2 * 2 * 2
    shown = capsys.readouterr().out
    assert "DP-LoDA" in shown and "(60.2)" in shown
    for name in ("results.json", "results.md", "report.html"):
        assert (tmp_path / name).stat().st_size > 500
    pictures = re.findall(r"\]\((.+\.png)\)", (tmp_path / "results.md").read_text())
    assert pictures[0] == "digits-accuracy-on-real-test-images-by-epsilon.png" and len(pictures) == 2
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    first = json.loads((tmp_path / "results.json").read_text())
    assert reproduce(tmp_path, "--seeds", "3") == 0  # only the third seed is new
    assert len(FITS) == 3 * 2 * 2
    again = json.loads((tmp_path / "results.json").read_text())
    assert [cell for cell in again["measured"] if cell["seed"] < 2] == first["measured"]


def test_measured_and_published_never_mix(table, tmp_path):
    reproduce(tmp_path, "--seeds", "1")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["published"] == [
        {"method": "DP-LoDA", "epsilon": 1.0, "accuracy_percent": 60.2},
        {"method": "No privacy", "epsilon": None, "accuracy_percent": 90.7},
    ]
    cells = {(cell["method"], cell["epsilon"]): cell for cell in found["measured"]}
    assert set(cells) == {("DP-LoDA", 1.0), ("DP-LoDA", 10.0), ("DP-SGD", 1.0), ("DP-SGD", 10.0), ("No privacy", None)}
    assert cells["No privacy", None]["spent"]["epsilon"] is None
    assert cells["DP-LoDA", 1.0]["scores"]["fid"] >= 0 and cells["DP-SGD", 1.0]["scores"] is None
    text = (tmp_path / "results.md").read_text()
    measured = 100 * cells["DP-LoDA", 1.0]["accuracy"]["cnn"]
    assert f"| {measured:.1f} (60.2) |" in text and "quoted, not measured" in text
    spent = [cell["spent"]["releases"] for cell in found["measured"] if cell["spent"]["epsilon"]]
    assert found["epsilon_of_all_releases_together"] > max(cell["spent"]["epsilon"] or 0 for cell in cells.values())
    assert len(spent) == 4


def test_a_report_has_all_cells_of_the_run(table, tmp_path, capsys):
    """Parts of a table, with different numbers of seeds, make one report; a cell of other settings is left out and named."""
    reproduce(tmp_path, "--seeds", "1", "--methods", "DP-SGD,No privacy")
    assert "over 1 seed, " in (tmp_path / "results.md").read_text()
    slow = tmp_path / "cells" / "dp-sgd" / "epsilon-1" / "seed-0" / "result.json"
    slow.write_text(json.dumps(json.loads(slow.read_text()) | {"seconds": {"fit": 7200}}))
    reproduce(tmp_path, "--seeds", "2", "--methods", "DP-LoDA", "--epsilons", "10,0.5")
    text = (tmp_path / "results.md").read_text()
    assert "| Method | Classifier trained on | epsilon 0.5 | epsilon 1 | epsilon 10 |" in text
    assert re.search(r"\| DP-LoDA \| its samples \| .* ± .* \| – \(60\.2\) \| .* ± .* \|", text)
    assert "over 1 to 2 seeds, " in text and text.index("| DP-LoDA |") < text.index("| DP-SGD |")
    losses = text.partition("## Diffusion loss on the real test images")[2].partition("## ")[0]
    assert "| DP-LoDA | 80.5000 ± 0.7071 | – | 4.5000 ± 0.7071 |" in losses and "DP-SGD" not in losses
    assert "All 7 cells: 2.0 hours, if they were computed one after the other." in text

    other = tmp_path / "cells" / "dp-sgd" / "epsilon-1" / "seed-0" / CONFIG
    other.write_text(other.read_text().replace("Direct()", "Direct(2)"))
    reproduce(tmp_path, "--seeds", "1", "--methods", "No privacy")
    assert "made with other settings: DP-SGD, epsilon 1, seed 0" in capsys.readouterr().err
    cells = json.loads((tmp_path / "results.json").read_text())["measured"]
    assert [cell["epsilon"] for cell in cells if cell["method"] == "DP-SGD"] == [10.0]


def test_an_interrupted_table_keeps_its_finished_cells(table, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Direct, "fit", stop)
        assert reproduce(tmp_path, "--seeds", "1") == 130
    done = len(FITS)
    assert done == 2 and not (tmp_path / "results.json").exists()
    assert reproduce(tmp_path, "--seeds", "1") == 0
    assert FITS[:done] == [("DP-LoDA", 1.0, 0), ("DP-LoDA", 10.0, 0)] and len(FITS) == 4


def test_cells_side_by_side_give_what_they_give_alone(tmp_path):
    options = ["--quick", "--seeds", "1", "--methods", "DP-SGD,No privacy"]
    assert reproduce(tmp_path / "alone", *options) == reproduce(tmp_path / "beside", *options, "--jobs", "2") == 0
    alone, beside = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "beside"))
    assert len(alone["measured"]) == 4 and beside["environment"]["cells at a time"] == 2
    for one, other in zip(alone["measured"], beside["measured"], strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.05) and one["spent"] == other["spent"]


def test_a_killed_run_leaves_no_process_behind(tmp_path):
    command = ["reproduce", "digits", "--run", str(tmp_path), "--jobs", "2", "--methods", "DP-LoDA", "--device", "cpu"]
    run = subprocess.Popen([sys.executable, "-m", "fastloda", *command], stderr=subprocess.PIPE)
    while run.poll() is None and not list(tmp_path.rglob("*.lock")):  # of the public model, which takes minutes
        time.sleep(0.2)
    run.kill()
    run.communicate(timeout=30)  # the pipe is open as long as any process of the run lives


def test_a_cell_that_fails_in_its_process_is_told_in_a_line(tmp_path, capsys):
    folder = tmp_path / "cells" / "dp-sgd" / "epsilon-1" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "fit").write_text("in the way")
    assert reproduce(tmp_path, "--quick", "--seeds", "1", "--methods", "DP-SGD", "--jobs", "2") == 2
    assert "fit" in capsys.readouterr().err.strip().splitlines()[-1]


def test_rows_can_be_chosen(table, tmp_path, capsys):
    assert reproduce(tmp_path, "--seeds", "1", "--methods", "DP-SGD") == 0
    assert {name for name, *_ in FITS} == {"DP-SGD"}
    assert reproduce(tmp_path, "--methods", "DP-Magic") == 2
    assert "no row DP-Magic; it has DP-LoDA, DP-SGD, No privacy" in capsys.readouterr().err


def test_epsilons_can_be_chosen(table, tmp_path, capsys):
    assert reproduce(tmp_path, "--seeds", "1", "--methods", "DP-LoDA", "--epsilons", "3,0.5") == 0
    assert [epsilon for _, epsilon, _ in FITS] == [0.5, 3.0]
    assert reproduce(tmp_path, "--epsilons", "0") == 2
    assert "epsilons must be positive" in capsys.readouterr().err


IMPORTS = """
from dataclasses import dataclass
import torch
from fastloda import calibrate_noise
from fastloda.synthesis.methods import Release, Sampler, Spent
"""


def test_a_method_of_ones_own_is_a_row(table, tmp_path, monkeypatch, capsys):
    """The example is that of the docstring of `methods`."""
    code = textwrap.dedent("\n".join(methods.__doc__.splitlines()[4:]))
    (tmp_path / "my_module.py").write_text(IMPORTS + code + "\n\nclass Named:\n    name = 'x'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = ("--seeds", "1", "--methods", "DP-LoDA,my_module:Prototypes")
    assert reproduce(tmp_path / "run", *options) == 0 == reproduce(tmp_path / "run", *options)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    spent = {(cell["method"], cell["epsilon"]): cell["spent"]["epsilon"] for cell in found["measured"]}
    assert set(spent) == {(name, epsilon) for name in ("DP-LoDA", "Prototypes") for epsilon in (1.0, 10.0)}
    assert 0.9 < spent["Prototypes", 1.0] <= 1 and 9 < spent["Prototypes", 10.0] <= 10
    assert "No setting was chosen by" not in (tmp_path / "run" / "results.md").read_text()
    for name, message in (
        ("my_module:Nothing", "no method my_module:Nothing"),
        ("my_module:Named", "has no trained_on, has_budget, fit"),
        ("no_module:X", "No module named 'no_module'"),
    ):
        assert reproduce(tmp_path / "other", "--methods", name) == 2
        assert message in capsys.readouterr().err


def test_a_quick_run_says_so_and_claims_nothing(tmp_path):
    assert reproduce(tmp_path, "--quick", "--seeds", "1", "--methods", "DP-MERF", "--epsilons", "1") == 0
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Private handwritten digits, public font digits (quick run)")
    assert "A quick run, to see that everything works" in text and "not tuned" in text
    assert "No setting was chosen by" not in text and "by trials" not in text
    assert "quick run" in (tmp_path / "report.html").read_text()


def test_the_unet_can_be_chosen(tmp_path, capsys):
    methods = recipe("digits", Variant(quick=True, unet=UNetShape(width=24))).methods
    unet = methods[1].public.unet
    assert (unet.width, unet.image_size, unet.in_channels, unet.multipliers) == (24, 8, 1, (1, 2))
    of_latents = next(method for method in methods if method.name == "DP-LDM").public.unet
    assert of_latents.image_size == 4 and of_latents.width == 24
    assert reproduce(tmp_path, "--quick", "--unet.multipliers", "[1,2,2,2,2]") == 2
    assert "divisible by 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"synthetic_images": 30}, "synthetic_images is 20 there and 30 here"),
        ({"public": lambda: font_digits(40, 2, fonts=handwritten())}, "public is '40 images of 10 classes, mean "),
    ],
)
def test_a_cell_of_other_settings_is_not_taken(other, message, table, tmp_path, monkeypatch, capsys):
    reproduce(tmp_path, "--seeds", "1", "--methods", "No privacy")
    monkeypatch.setitem(RECIPES, "digits", lambda *_: small(**other))
    assert reproduce(tmp_path, "--seeds", "1", "--methods", "No privacy") == 2
    assert f"made with other settings: {message}" in capsys.readouterr().err


def test_known_cells_are_taken_over_where_the_settings_are_the_same(table, tmp_path, monkeypatch, capsys):
    reproduce(tmp_path / "there", "--seeds", "2")
    there = tmp_path / "there" / "results.json"
    there.write_text(there.read_text().replace('"cells at a time": 1', '"cells at a time": 7'))
    FITS.clear()

    def direct_of_other_settings(_):
        return "Direct(2)"

    monkeypatch.setattr(Direct, "__repr__", direct_of_other_settings)
    assert reproduce(tmp_path / "here", "--seeds", "1", "--methods", "DP-SGD", "--known", str(there)) == 0
    assert FITS == [("DP-SGD", 1.0, 0), ("DP-SGD", 10.0, 0)]
    assert "with the same settings: DP-LoDA, epsilon 1, seed 0; DP-LoDA, epsilon 1, seed 1" in capsys.readouterr().err
    first, second = (json.loads((tmp_path / run / "results.json").read_text())["measured"] for run in ("there", "here"))
    of_loda = [[cell for cell in cells if cell["method"] == "DP-LoDA"] for cells in (first, second)]
    environments = [cell.pop("environment") for cell in of_loda[1]]
    assert of_loda[0] == of_loda[1] and len(of_loda[0]) == 4
    assert all(each["cells at a time"] == 7 for each in environments)
    assert "6 of the cells: on device" in (tmp_path / "here" / "results.md").read_text()
    picture = "digits-samples-of-dp-loda-epsilon-10-seed-0.png"
    assert (tmp_path / "here" / picture).read_bytes() == (tmp_path / "there" / picture).read_bytes()

    assert reproduce(tmp_path / "here", "--seeds", "2", "--known", str(there)) == 0  # a cell of one's own is kept
    assert FITS[2:] == [("DP-SGD", 1.0, 1), ("DP-SGD", 10.0, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"table": "mnist5k"}', "has the results of mnist5k: give those of another run of digits"),
        ('{"table": "digits"}', "is not the results.json of a run of digits, or is damaged: KeyError"),
        ('{"table": "digits", "environment": {}, "measured": [1]}', "or is damaged: TypeError"),
        (
            '{"table": "digits", "environment": {}, "measured": [{"method": "DP-SGD", "epsilon": 1.0, "seed": "../x"}]}',
            "or is damaged: TypeError('an epsilon or a seed is no number')",
        ),
        ("[]", "holds no JSON object"),
    ],
)
def test_known_results_of_another_kind_are_refused(content, message, table, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert reproduce(tmp_path / "run", "--known", str(tmp_path / "results.json")) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_change_at_one_budget_leaves_the_cells_of_others(table, tmp_path, monkeypatch, capsys):
    made = small()
    for steps in (1, 2):
        runs = ByEpsilon({1.0: methods.Direct(DPSGD(width=8), 1, 8), 10.0: methods.Direct(DPSGD(width=8), steps, 8)})
        monkeypatch.setitem(RECIPES, "digits", lambda *_, runs=runs: replace(made, methods=[DirectDPSGD(runs)]))
        assert reproduce(tmp_path, "--seeds", "1", "--epsilons", "1") == 0
        assert reproduce(tmp_path, "--seeds", "1", "--epsilons", "10") == (0 if steps == 1 else 2)
    assert "DP-SGD, epsilon 10, seed 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table2"], "table2 reads published files: give their folder with --data"),
        (["table7"], "table"),
        (["digits", "--seeds", "0"], "seeds must be at least 1"),
        (["digits", "--jobs", "0"], "jobs must be at least 1"),
        (["table4", "--data", "/nowhere"], "/nowhere"),
        (["digits", "--features", "/no/file.pt", "--quick"], "no feature extractor /no/file.pt"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["reproduce", *arguments, "--run", str(tmp_path / "run"), "--progress", "false"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not (tmp_path / "run" / "cells").exists()


def test_built_in_tables_have_the_papers_rows():
    made = recipe("digits", Variant(quick=True))
    assert [m.name for m in made.methods] == [
        "Public only",
        "DP-LoDA",
        "DP-LoDA with correlated noise",
        "DP-LoDA of chosen layers",
        "DP-LoDA on chosen data",
        "DP-Diffusion",
        "DP-LDM",
        "DP-MEPF",
        "DP-MERF",
        "DP-SGD",
        "No privacy",
    ]
    assert made.epsilons == (1.0, 5.0, 10.0) and made.delta == 1e-5
    cells = all_cells(recipe("digits", Variant()).methods, (1.0, 5.0, 10.0), seeds=3)
    assert len(cells) == 3 * (9 * 3 + 2)


def test_published_values_are_those_of_the_paper():
    assert CIFAR10["DP-LoDA", 10.0] == 63.5 and CIFAR10["DP-MERF", 1.0] == 13.8 and CIFAR10["No privacy", None] == 90.7
    assert CIFAR10_1PCT["DP-SGD", 10.0] == 21.2 and MNIST["DP-Diffusion", 10.0] == 95.9
    names = {name for accuracies in (CIFAR10, CIFAR10_1PCT, MNIST) for name, _ in accuracies}
    rows = {method.name for method in recipe("digits", Variant(quick=True)).methods}
    assert names <= rows


def test_paper_tables_take_their_files(monkeypatch, tmp_path):
    """Check the recipes of the paper's tables, on images that replace their files."""
    opened = []

    def stand_in(name, root, split, *, size, channels, partial):
        opened.append((name, split, size, channels))
        fonts = font_digits(20, seed=len(opened), size=8)
        return LabelledImages(fonts.images.repeat(1, 3, 4, 4), fonts.labels, 10)

    monkeypatch.setattr(paper_tables, "open_dataset", stand_in)
    monkeypatch.setattr(paper_tables, "stratified_subset", lambda data, **_: data[:10])
    for name, private in (("table2", "cifar10"), ("table3", "cifar10"), ("table4", "mnist")):
        made = recipe(name, Variant(tmp_path, quick=True))
        assert {entry[0] for entry in opened} >= {private} and made.published
        assert ("our own choice" in made.lead) == (private == "cifar10")
        names = [method.name for method in made.methods]
        assert names[:3] == ["DP-LoDA", "DP-Diffusion", "DP-LDM"] and "DP-LoDA on latents" in names
        full = recipe(name, Variant(tmp_path))
        assert full.methods[0].public.unet.width == 64 and set(full.classifiers) == {"resnet9", "wrn-40-4"}
    assert all(entry[2:] == (32, 3) for entry in opened)
    torch.manual_seed(0)


def test_a_quick_cell_of_mnist5k(tmp_path):
    """Real images of 28 x 28 pixels are used, from the public model to a classifier of synthetic images."""
    options = ["--quick", "--seeds", "1", "--epsilons", "1", "--methods", "DP-LoDA,DP-MERF", "--progress", "false"]
    assert main(["reproduce", "mnist5k", "--run", str(tmp_path), "--jobs", "1", "--device", "cpu", *options]) == 0
    measured = json.loads((tmp_path / "results.json").read_text())["measured"]
    assert {cell["method"] for cell in measured} == {"DP-LoDA", "DP-MERF"}
    assert all(0 < cell["spent"]["epsilon"] <= 1 for cell in measured)
