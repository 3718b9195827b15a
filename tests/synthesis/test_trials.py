"""`scripts/trials.py`: settings are changed by path and tried in pairs on stand-ins only, and the worse half stops."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastloda.synthesis.data import font_digits
from fastloda.synthesis.methods import Budget, ByEpsilon, Release, Sampler, Spent
from fastloda.synthesis.reproduce.recipe import Recipe, Variant
from fastloda.synthesis.reproduce.recipes import recipe
from fastloda.synthesis.settings import Classifier

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import stand_ins
import trials


@dataclass(frozen=True)
class Blurred:
    """A method that draws fonts with noise: the more noise, the worse."""

    tunings: ByEpsilon[Classifier]  # any class that has a field `lr`
    name: str = "Blurred"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private, public, budget: Budget, work) -> Sampler:
        noise = self.tunings.at(budget.epsilon).lr

        def draw(labels, seed):
            digits, generator = font_digits(len(labels), seed), torch.Generator().manual_seed(seed)
            images = torch.empty_like(digits.images)
            images[labels.argsort(stable=True)] = digits.images[digits.labels.argsort(stable=True)]
            return images + noise * torch.randn(images.shape, generator=generator)

        return Sampler(draw, 10, Spent(budget.delta, (Release("sum", 1.0, 5.0, 1),)))


def never(*_):
    raise AssertionError("private or test images were read")


@pytest.fixture
def search(monkeypatch, tmp_path) -> trials.Search:
    made = Recipe(
        name="digits",
        title="",
        lead="",
        private=never,
        test=never,
        public=lambda: font_digits(40, 0),
        methods=[Blurred(ByEpsilon({1.0: Classifier(lr=3.0)}))],
        classifiers={"cnn": Classifier(steps=60, width=8)},
        synthetic_images=400,
        how_chosen={},
    )
    monkeypatch.setattr(trials, "recipe", lambda name, variant: made)
    monkeypatch.setattr(trials, "ProcessPoolExecutor", _Here)
    return trials.Search("digits", "Blurred", 1.0, ("swirled",), 2, tmp_path, records=50)


class _Here:
    """A process pool that works in this process, in which the table is replaced."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, work, *arguments):
        found = work(*arguments)
        return type("Future", (), {"result": lambda _: found})()


def test_the_worse_half_stops_and_the_first_goes_on(search, monkeypatch):
    settings = [{}, {"tunings.lr": 0.1}, {"tunings.lr": 20.0}, {"tunings.lr": 30.0}]
    found = search.results(settings, jobs=1)
    assert [len(rounds) for rounds in found] == [2, 2, 1, 1]
    assert found[1][0][0] > found[2][0][0]
    table = trials.as_table(search, settings, found)
    assert len(table.rows) == 4 and "stopped" in table.rows[2][1] and table.rows[1][2].startswith("+")
    monkeypatch.setattr(trials.Search, "_accuracy", never)
    assert search.results(settings, jobs=1) == found  # a finished trial is not repeated


def test_the_chosen_public_images_alone_can_be_judged(tmp_path):
    options = {"rounds": 1, "run": tmp_path, "records": 50, "quick": True}
    search = trials.Search("mnist5k", "DP-LoDA on chosen data", 1.0, ("handwritten",), **options, chosen_only=True)
    assert 0 <= search.trial({"choice.drawn": 60}, "handwritten", 0) <= 1
    assert len(list(tmp_path.glob("*.json"))) == 1 and not (tmp_path / "public").exists()  # no model was trained


@pytest.mark.parametrize("method", ["DP-MERF", "DP-LoDA"])
def test_a_method_that_chooses_nothing_alone_is_refused_at_once(method, tmp_path):
    with pytest.raises(ValueError, match="needs a method with one warm-up"):
        trials.Search("mnist5k", method, 1.0, ("handwritten",), 1, tmp_path, records=50, quick=True, chosen_only=True)


def test_a_table_is_not_tuned_on_its_own_private_images(tmp_path):
    assert trials._usual("digits") == ["swirled"] and trials._usual("mnist5k") == ["swirled", "handwritten"]
    with pytest.raises(ValueError, match="handwritten is made of the private images of digits"):
        trials.Search("digits", "DP-LoDA", 1.0, ("swirled", "handwritten"), 1, tmp_path, records=50)


def test_settings_are_changed_by_path():
    made = recipe("mnist5k", Variant(quick=True)).only(["DP-LoDA"]).methods[0]
    changed = trials.changed(made, {"tunings.training.timesteps": [100, 800], "public.conditional.steps": 7}, 1.0)
    assert changed.tunings.at(1.0).training.timesteps == (100, 800) and changed.public.conditional.steps == 7
    assert replace(changed, tunings=made.tunings, public=made.public) == made
    with pytest.raises(ValueError, match="no field 'rate'"):
        trials.changed(made, {"tunings.training.rate": 1}, 1.0)


@pytest.fixture(scope="module")
def usps_files(tmp_path_factory):
    """Write files in the form of USPS's, with font digits: the real ones are not shipped by any package."""
    folder = tmp_path_factory.mktemp("usps")
    for part, seed in (("train", 0), ("test", 1)):
        digits = font_digits(1300, seed, size=16)
        rows = torch.cat([digits.labels[:, None].float(), digits.images.flatten(1)], 1)
        np.savetxt(folder / f"zip.{part}.gz", rows.numpy(), fmt="%.3f")
    return folder


@pytest.mark.parametrize("name", stand_ins.STAND_INS)
@pytest.mark.parametrize("side", [8, 28])
def test_stand_ins_are_images_of_all_classes_that_a_seed_repeats(name, side, usps_files, monkeypatch):
    monkeypatch.setattr(stand_ins, "USPS", usps_files)
    private, test = stand_ins.STAND_INS[name](side, 60, 3)
    assert private.images.shape == (60, 1, side, side) and len(test) == stand_ins.TEST_COUNT
    assert private.images.abs().max() <= 1 and len(private.labels.unique()) == 10
    again, _ = stand_ins.STAND_INS[name](side, 60, 3)
    assert torch.equal(private.images, again.images)
    assert not torch.equal(private.images, stand_ins.STAND_INS[name](side, 60, 4)[0].images)


def test_missing_files_of_a_stand_in_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stand_ins, "USPS", tmp_path)
    with pytest.raises(SystemExit, match="zip.train.gz and .*zip.test.gz"):
        stand_ins.usps(28, 60, 0)


@pytest.mark.parametrize("records", [0, 9, 10_000])
def test_impossible_numbers_of_records_are_refused(records, usps_files, monkeypatch):
    monkeypatch.setattr(stand_ins, "USPS", usps_files)
    with pytest.raises(SystemExit, match=f"from 10 to 600 records, not {records}"):
        stand_ins.usps(28, records, 0)


def test_a_trial_does_not_depend_on_the_settings_of_other_budgets():
    """Else a change at one budget would make finished trials at another be run again."""
    made = recipe("mnist5k", Variant(quick=True)).only(["DP-LoDA"]).methods[0]
    other = replace(made, tunings=ByEpsilon(made.tunings.settings | {10.0: replace(made.tunings.at(10.0), steps=9)}))
    setting = {"tunings.views": 3}
    assert repr(trials.changed(made, setting, 1.0)) == repr(trials.changed(other, setting, 1.0))
    assert repr(trials.changed(made, setting, 10.0)) != repr(trials.changed(other, setting, 10.0))
