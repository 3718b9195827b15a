"""`fastloda synthesize`: one command makes private synthetic images from two folders of images."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cells import CLASSES, OF_A_PATIENT, patient_of, write_cells
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from fastloda.synthesis import effort, plan, presets, recipe
from fastloda.synthesis import synthesize as command
from fastloda.synthesis.cli import main
from fastloda.synthesis.data import font_digits, image_folder, load_npz
from fastloda.synthesis.diffusion import PRESETS, UNet, UNetConfig, preset_for
from fastloda.synthesis.inputs import SIZES
from fastloda.synthesis.settings import Adapter, Classifier, UNetShape
from fastloda.synthesis.stages import preview, sampling

NAMES = sorted(CLASSES)
FEW = "--public-steps 2 --private-steps 2 --count 9 --sampler-steps 2 --device cpu --epsilon 8".split()
TINY = "--unet.preset small --unet.width 8 --unet.norm-groups 4".split()


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    """Write a folder of 600 private cells with a broken file, one of public cells, and one of tests."""
    root = tmp_path_factory.mktemp("cells")
    write_cells(root / "private", 600, seed=0)
    write_cells(root / "public", 60, seed=1, mixed=False, broken=0)
    write_cells(root / "test", 40, seed=2, broken=0)
    return root


@pytest.fixture(scope="module", autouse=True)
def _few_previews_and_a_small_judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        patch.setattr(command, "judge", lambda size: Classifier(steps=1, width=8))
        patch.setattr(command, "measure", _measured_once)
        yield


_costs_by_shape: dict[UNetConfig, plan.Cost] = {}


def _measured_once(config: UNetConfig, *others) -> plan.Cost:
    """Measure the cost of each shape of U-Net only once, because this takes seconds."""
    if config not in _costs_by_shape:
        _costs_by_shape[config] = plan.measure(config, *others)
    return _costs_by_shape[config]


def arguments(cells: Path, out: Path, *options: str) -> list[str]:
    sets = ["--public", str(cells / "public"), "--private", str(cells / "private"), "--out", str(out)]
    return ["synthesize", *sets, *FEW, *TINY, *options]


def test_two_folders_become_private_synthetic_images(cells, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(arguments(cells, out)) == 2  # because of the broken file
    first, second = capfd.readouterr().err.splitlines()[-2:]
    assert "private: 1 of 601 images can't be read" in first and "--skip-unreadable" in first
    assert second.startswith(str(cells / "private" / "basophil" / "p900_0.jpg")) and not out.exists()

    skipping = arguments(cells, out, "--skip-unreadable", "--test", str(cells / "test"), "--name", "blood cells")
    assert main(skipping) == 0
    shown = capfd.readouterr()
    result = yaml.safe_load(shown.out)
    assert f"private: 600 images, 48 x 40 RGB, centre crop to 32 x 32, 4 classes: {', '.join(NAMES)}" in shown.err
    assert "note: the number of records, 600, is treated as public; or give --records" in shown.err
    assert shown.err.count("not adapted: ") == 1
    lines = [line for line in shown.err.splitlines() if not line.startswith((" ", "pretrain:", "finetune:", "sample:"))]
    assert (
        "\r" not in shown.err
        and len(lines) < 25
        and [line for line in lines if "warning" in line]
        == [f"warning: {cells / 'private'}: left out 1 of 601 images, which can't be read"]
    )
    assert "noise multiplier: " in shown.err and "delta: 0.0001\n" in shown.err and "p900_0.jpg" in shown.err

    statement = json.loads((out / "samples" / "privacy.json").read_text())
    assert statement == json.loads((out / "private" / "privacy.json").read_text())
    assert 7.9 < statement["epsilon"] <= 8 and statement["delta"] == 1e-4 and statement["records"] == 600
    assert statement["name"] == "blood cells" and statement["classes"] == NAMES and not statement["seed_was_fixed"]
    samples = load_npz(Path(result["samples"]))
    assert samples.images.shape == (9, 3, 32, 32) and list(samples.class_names) == NAMES
    assert image_folder(result["images"]).labels.bincount().tolist() == [3, 2, 2, 2]
    assert Image.open(result["grid"]).width > 3 * 33 and (out / "samples" / "README.md").exists()
    assert (
        0 <= result["accuracy"] <= 1
        and json.loads((out / "evaluation.json").read_text())["samples"]["test_images"] == 40
    )

    private = {out / "private" / name for name in ("checkpoint.pt", "checkpoint.pt.spent")}
    private |= {out / stage / "source.yaml" for stage in ("public", "private")}
    assert all(str(cells).encode() in path.read_bytes() for path in private if path.name == "source.yaml")
    published = [path for path in out.rglob("*") if path.is_file() and path not in private]
    assert not [path for path in published if str(cells).encode() in path.read_bytes()]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "evaluation.json" not in path.name}
    assert main(skipping) == 0  # the same command shows the existing results
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert capfd.readouterr().err.count("already there, with these settings") == 3


def test_the_cells_are_what_they_are_said_to_be(cells):
    files = [path for path in (cells / "private").rglob("*") if path.is_file() and not path.name.startswith("p90")]
    by_patient = [[path for path in files if patient_of(path) == f"p{i:03d}"] for i in range(120)]
    assert len(files) == 600 and {len(images) for images in by_patient} == {OF_A_PATIENT}
    assert {len({path.parent for path in images}) for images in by_patient} == {4}
    assert {path.suffix for path in files} == {".png", ".jpg"} and any("größe µ" in path.name for path in files)
    for label in CLASSES:  # a file's form does not show its class
        modes = {Image.open(path).mode for path in files if path.parent.name == label}
        assert modes == {"RGB", "L", "RGBA"}


def test_patients_of_several_images_are_the_unit_of_privacy(cells, tmp_path, capsys):
    """The unit is named from the two folders to the page that is signed."""
    out, owned = tmp_path / "out", ("--owner", r"(p\d+)_", "--per-owner", "3", "--skip-unreadable")
    assert main(arguments(cells, out, *owned)) == 0
    shown = capsys.readouterr()
    assert "note: privacy protects one owner of images, of whom there are 120. The" in shown.err
    assert "note: the number of owners, 120, is" in shown.err and "owners a step: 30 expected of 120" in shown.err
    statement = json.loads((out / "samples" / "privacy.json").read_text())
    assert statement["unit"] == "one owner of images, at most 3 of which are used in a step"
    assert statement["owners"] == 120 and "records" not in statement and 7.9 < statement["epsilon"] <= 8
    assert main(["report", "--run", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "one owner of images, at most 3 of which are used in a step" in page and str(cells) not in page
    capsys.readouterr()
    assert main(arguments(cells, tmp_path / "other", *owned, "--choose")) == 2
    assert "leave it out, or leave out --owner" in capsys.readouterr().err


def test_the_plan_counts_an_owners_images():
    settings = recipe.Recipe.fitting(8.0, 600, 32, count=10, public_steps=10, sampler_steps=2)
    cost = plan.Cost(10, 5, 0.01, 0.02, 0.001, 1e6, 2e6)
    times = [plan.Plan(settings, UNetConfig(), cost, images).to_dict(1.0)["finetune"]["time"] for images in (1, 3)]
    assert times == ["about 20 min", "about 60 min"]  # 400 steps of 150 records


def test_a_dry_run_writes_nothing(cells, tmp_path, capsys):
    assert main(arguments(cells, tmp_path / "out", "--skip-unreadable", "--dry-run", "--choose")) == 0
    planned = yaml.safe_load(capsys.readouterr().out)
    assert planned["finetune"]["records a step"] == "150 expected of 600, 2 views of each"
    assert (
        planned["finetune"]["steps"] == 2 and planned["finetune"]["trained numbers"] < planned["pretrain"]["parameters"]
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_follows_a_single_private_image(cells, tmp_path, capsys):
    """Size and channels do not, which one small or coloured image could change."""
    private = write_cells(tmp_path / "private", 40, broken=0)
    tiny = private / NAMES[0] / "tiny.png"
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(tiny)
    options = ["--private", str(private), "--dry-run", "--private-steps", "2"]
    found = []
    for _ in range(2):
        assert main(arguments(cells, tmp_path / "out", *options, "--records", "40")) == 0
        planned = yaml.safe_load(capsys.readouterr().out)
        found.append([{k: v for k, v in planned[stage].items() if k != "time"} for stage in ("finetune", "sample")])
        tiny.unlink(missing_ok=True)
    assert found[0] == found[1] and found[0][1]["channels and pixels"] == "3 x 32 x 32"
    for path in (cells / "public").rglob("*.png"):
        grey = tmp_path / "grey" / path.parent.name / path.name
        grey.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(grey)
    assert main(arguments(cells, tmp_path / "out", *options, "--public", str(tmp_path / "grey"))) == 2
    assert "has images of 3 x 32 x 32, the U-Net is for 1 x 32 x 32" in capsys.readouterr().err
    assert (
        main(arguments(cells, tmp_path / "out", *options, "--public", str(tmp_path / "grey"), "--channels", "3")) == 0
    )


def test_classes_of_other_names_are_refused_with_both_lists_and_can_be_mapped(cells, tmp_path, capsys):
    private = write_cells(tmp_path / "private", 40, classes=("basophil", "Lymphozyt"), broken=0)
    options = ["--private", str(private), "--dry-run"]
    assert main(arguments(cells, tmp_path / "out", *options)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "Lymphozyt of the classes Lymphozyt, basophil are not among those of the public images, " in message
    assert ", ".join(NAMES) in message and "--class-map Lymphozyt=" in message
    assert main(arguments(cells, tmp_path / "out", *options, "--class-map", "Lymphozyt=lymphocyte")) == 0


def test_all_broken_files_of_all_sets_are_named_in_one_run(cells, tmp_path, capsys):
    public = write_cells(tmp_path / "public", 20, seed=3, broken=2)
    assert main(arguments(cells, tmp_path / "out", "--public", str(public))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("p90" in line for line in lines) == 3 and sum("can't be read" in line for line in lines) == 2


def test_a_choice_is_paid_from_the_same_budget_and_an_interrupted_run_continues(tmp_path, capsys):
    font_digits(64, seed=0).save_npz(tmp_path / "fonts.npz")
    public = ["--public", str(tmp_path / "fonts.npz")]
    sets = [*public, "--private", "digits@300", "--out", str(tmp_path / "out"), "--choose"]
    command_line = ["synthesize", *sets, *FEW, "--unet.width", "8", "--unet.norm-groups", "4", "--seed", "0"]
    with pytest.MonkeyPatch.context() as patch:
        few = presets.PublicTraining(steps=2, batch_size=8, warmup=1)
        choice = presets.PublicChoice(4.0, features=20, drawn=16, training=few)
        patch.setattr(presets, "CHOICES", presets.ByEpsilon({0.0: choice}))
        with pytest.MonkeyPatch.context() as interrupting:
            interrupting.setattr(sampling, "draw_resumably", _interrupted)
            assert main(command_line) == 130
        shown = capsys.readouterr().err
        assert shown.splitlines()[-1] == "fastloda synthesize: interrupted; the same command continues"
        assert main(command_line) == 0
        assert capsys.readouterr().err.count("already there, with these settings") == 3
    statement = json.loads((tmp_path / "out" / "samples" / "privacy.json").read_text())
    assert statement["earlier"] == [[1.0, 4.0, 1]] and statement["epsilon"] <= 8 and statement["seed_was_fixed"]
    said = float(shown.split("noise multiplier: ")[1].split()[0])
    assert said == pytest.approx(statement["noise_multiplier"], abs=1e-3)


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", range(16, 65, 8))
def test_presets_cover_the_sizes(size):
    images = font_digits(2, 0, size)
    config = UNetShape().config(images)
    assert config.image_size == size and 0 < config.width < 64
    assert len(config.multipliers) == len(PRESETS[preset_for(size)]["multipliers"])
    small = UNet(UNetShape(width=8, norm_groups=4).config(images))
    assert small(images.images, torch.zeros(2).long(), images.labels).shape == images.images.shape


def test_every_sensible_size_has_a_preset_and_each_preset_a_name():
    assert {preset_for(size) for size in SIZES} | {"paper"} == set(PRESETS)
    config = UNetShape("paper", dropout=0.1).config(font_digits(2, 0, 32))
    assert (config.width, config.multipliers, config.dropout) == (64, (1, 2, 2, 2), 0.1)
    with pytest.raises(ValueError, match="image_size must be divisible by 4 for 3 levels, got 30"):
        UNetShape().config(font_digits(2, 0, 30))


@pytest.mark.parametrize(("records", "delta"), [(600, 1e-4), (999, 1e-4), (1000, 1e-5), (1437, 1e-5), (60_000, 1e-6)])
def test_the_default_delta_is_a_power_of_ten_below_a_tenth_of_the_inverse_count(records, delta):
    assert presets.default_delta(records) == delta and delta < 1 / (10 * records) <= 10 * delta


@pytest.mark.parametrize("records", [1, 3, 100, 600, 1437, 60_000, 10**7])
def test_a_batch_is_a_part_of_the_records(records):
    assert 1 <= presets.batch_size(records) <= records


def test_the_plan_measures_public_images_alone():
    images = font_digits(30, 0)
    config = UNetShape(width=8, norm_groups=4).config(images)
    cost = plan.measure(config, images, presets.private_tuning(8.0, 8, None), Adapter(4), torch.device("cpu"))
    model = UNet(config)
    assert cost.parameters == sum(p.numel() for p in model.parameters()) > cost.trained > 0
    assert min(cost.public_seconds, cost.private_seconds, cost.sampling_seconds) > 0
    assert cost.private_bytes > cost.public_bytes > 4 * 64 * 8  # two views, and at least one map of 8 channels


class _Operations(TorchDispatchMode):
    """A mode that counts the operations that are computed."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += 1
        return operation(*arguments, **options or {})


def test_the_private_step_that_is_timed_looks_at_no_record_again(monkeypatch):
    """A new U-Net's gradients are zero where its weights are, and therefore would be looked at in every step."""
    counts = []

    def count(step, _):
        for _ in range(3):
            with _Operations() as operations:
                step()
            counts.append(operations.count)
        return 1.0

    monkeypatch.setattr(plan, "_median_seconds", count)
    images = font_digits(8, 0)
    config = UNetShape(width=8, norm_groups=4).config(images)
    plan.measure(config, images, presets.private_tuning(8.0, 8, None), Adapter(4), torch.device("cpu"))
    first, second, third = counts[-3:]
    assert second == third < first / 2


SLOW = plan.Cost(1000, 100, 5e-3, 3e-2, 2e-3, 1e6, 2e6)  # about what two cores need for 32 x 32 pixels
FAST = plan.Cost(4000, 200, 1e-4, 3e-4, 2e-5, 1e6, 2e6)


def _costs(of_half: plan.Cost, of_all: plan.Cost):
    """Make a function that returns given costs: of a U-Net of half the width, and of one of full width."""
    return lambda config, *_: of_half if config.width < 32 else of_all


def _planned(cells: Path, *options: str) -> list[str]:
    sets = ["--public", str(cells / "public"), "--private", str(cells / "private"), "--skip-unreadable"]
    return ["synthesize", *sets, "--epsilon", "8", "--device", "cpu", "--progress", "false", *options]


def test_without_options_a_run_takes_what_the_machine_can_do_in_15_minutes(cells, tmp_path, capsys, monkeypatch):
    dry = _planned(cells, "--out", str(tmp_path / "out"), "--dry-run")
    shown = {}
    for name, half, whole in (("slow", SLOW, dataclasses.replace(SLOW, public_seconds=2e-2)), ("fast", FAST, FAST)):
        monkeypatch.setattr(command, "measure", _costs(half, whole))
        assert main(dry) == 0
        shown[name] = yaml.safe_load(capsys.readouterr().out)
    assert shown["slow"]["time in all"] == "about 15 min on this machine, within --minutes 15"
    assert shown["slow"]["with more time"].endswith(
        "1,000 parameters, 2000 public steps of 128 images, 400 private steps"
    )
    assert shown["slow"]["pretrain"]["steps"] == 2000 > 20 * shown["slow"]["pretrain"]["images a step"]
    full = shown["fast"]
    assert (full["pretrain"]["steps"], full["pretrain"]["images a step"], full["finetune"]["steps"]) == (2000, 128, 400)
    assert "with more time" not in full and full["sample"]["sampler steps"] == 50


def test_a_path_where_nothing_is_is_refused_before_anything_is_measured(cells, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure", None)
    for role in ("public", "private", "test"):
        assert main(_planned(cells, "--out", str(tmp_path), f"--{role}", str(cells / "privat"))) == 2
        assert capsys.readouterr().err.endswith("privat: there is no such file or folder\n")
    assert main(_planned(cells, "--out", str(tmp_path), "--private", "digitz")) == 2
    assert "data must be one of digits, font-digits" in capsys.readouterr().err


def test_costs_are_measured_before_the_private_images_are_read(cells, tmp_path, monkeypatch):
    done = []
    opened, seen = command.open_for_unet, command.look_at
    monkeypatch.setattr(command, "measure", lambda *_: done.append("measure") or FAST)
    monkeypatch.setattr(command, "look_at", lambda path: done.append(Path(path).name) or seen(path))
    monkeypatch.setattr(command, "open_for_unet", lambda *a, **k: done.append("private") or opened(*a, **k))
    assert main(_planned(cells, "--out", str(tmp_path / "out"), "--dry-run")) == 0
    assert done == ["public", "measure", "measure", "private", "private"]


def test_an_interrupted_run_keeps_what_was_chosen_on_a_busier_machine(cells, tmp_path, capsys, monkeypatch):
    trained = []

    def pretrain(self, run, **options):
        trained.append((self.pretraining, self.privacy.steps, options["unet"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe.Recipe, "pretrain", pretrain)
    same = _planned(cells, "--out", str(tmp_path / "out"))
    for half, whole in ((SLOW, SLOW), (FAST, FAST)):
        monkeypatch.setattr(command, "measure", _costs(half, whole))
        assert main(same) == 130
    assert trained[0] == trained[1] and trained[0][0].batch_size < 128 and trained[0][2].width == 16
    assert str(cells) not in (tmp_path / "out" / effort.FILE).read_text()
    capsys.readouterr()
    for changed, said in (
        ("--minutes", "minutes is 15.0 there and 30.0 here"),
        ("--public-steps", "public_steps is None"),
    ):
        assert main([*same, changed, "30"]) == 2 and len(trained) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "out" / effort.FILE).write_text("asked: 1")
    assert main(same) == 2
    assert "is damaged" in capsys.readouterr().err


def test_more_minutes_are_more_effort_and_what_is_given_stays():
    full = effort.Effort.full(32, 8.0)
    assert full == effort.Effort(None, 2000, 128, 400, 50)
    choices = effort.efforts(full, [None, 16], {})
    assert choices[:2] == [full, dataclasses.replace(full, width=16)] and len(set(choices)) == len(choices)
    images = [each.public_steps * each.public_batch for each in choices[1:]]
    assert images == sorted(images, reverse=True) and images[-1] == pytest.approx(0.1 * images[0], rel=0.01)
    assert {each.private_steps for each in choices} >= {400, 40} and min(each.public_batch for each in choices) == 32
    found = [effort.largest(choices, lambda each: each.private_steps, most) for most in (1000, 300, 1)]
    assert [each.private_steps for each in found] == [400, 280, 40] and found[0].width is None
    given = effort.efforts(full, [None], {"public_steps": 7})
    assert {(each.public_steps, each.public_batch, each.width) for each in given} == {(7, 128, None)}
    strict = effort.efforts(effort.Effort.full(8, 1.0), [None, 8], {})
    assert strict[0].private_steps == 100 and strict[0].public_batch == 256


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1, "about 1 s"), (80, "about 80 s"), (600, "about 10 min"), (9000, "about 2.5 h")]
)
def test_durations_have_a_unit_that_suits_them(seconds, text):
    assert plan.duration(seconds) == text
