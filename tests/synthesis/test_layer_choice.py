"""Layers chosen privately for the adapters: what fine-tuning and the methods release, count, and keep."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from fastloda.accounting.compose import compose_epsilon
from fastloda.loda.attach import attach_loda, loda_layers
from fastloda.synthesis import stages
from fastloda.synthesis.account import account, read_statement
from fastloda.synthesis.budget import Privacy
from fastloda.synthesis.data import LabelledImages, font_digits
from fastloda.synthesis.diffusion import digits_unet
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import (
    Budget,
    ByEpsilon,
    ChosenLoDA,
    DPLoDA,
    LayerChoice,
    PrivateTuning,
    PublicChoice,
    PublicModel,
    Release,
    Work,
)
from fastloda.synthesis.methods.layer_choice import WHAT, at_random, once
from fastloda.synthesis.report.release import report
from fastloda.synthesis.runs import RunError
from fastloda.synthesis.settings import Adapter, FineTuning, UNetShape
from fastloda.synthesis.stages import finetuning, preview
from fastloda.training.saliency import Saliency

PUBLIC = PublicTraining(steps=3, batch_size=8, warmup=1, seed=0)
PRIVACY = Privacy(target_epsilon=10.0, delta=1e-5, epochs=1, batch_size=30, views=1)
QUIET = {"progress": False, "device": "cpu"}
HALF = LayerChoice(0.5, 20.0)
TUNING = {"data": "digits@60", "layers": HALF} | QUIET


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        shape = UNetShape(width=8, norm_groups=4)
        run = tmp_path_factory.mktemp("runs") / "run"
        stages.pretrain(run, data="font-digits", count=64, unet=shape, training=PUBLIC, **QUIET)
    return run / "public"


@pytest.fixture
def run(public, tmp_path) -> Path:
    """Make a run with only the public model."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "public").symlink_to(public)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(public, tmp_path_factory) -> Path:
    """Make a fine-tuned run, which the tests leave unchanged."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run.mkdir()
    (run / "public").symlink_to(public)
    stages.finetune(run, PRIVACY, **TUNING)
    return run


def adapted(run: Path) -> set[str]:
    from safetensors.torch import load_file

    return {name.rpartition(".")[0] for name in load_file(run / "private" / "adapter.safetensors")}


def dies(*_, **__):
    raise KeyboardInterrupt


# -- the stage -------------------------------------------------------------------------------------------------------


def test_the_best_layers_are_adapted_and_the_release_counts(finished):
    found = once(finished / "layers" / "privacy.json", dies)
    assert found.release == (1.0, 20.0, 1) and len(found.shares) == 39
    assert adapted(finished) == set(found.best(0.5)) and len(adapted(finished)) == 20
    own, statement = (read_statement(finished / name) for name in ("layers", "private"))
    assert own["epsilon"] == compose_epsilon([(1.0, 20.0, 1)], 1e-5) and own["records"] == 60
    assert own["mechanism"] == f"Gaussian noise on the {WHAT}, of sensitivity 1" and not own["seed_was_fixed"]
    spent = (statement["sample_rate"], statement["noise_multiplier"], statement["steps"])
    assert statement["earlier"] == [[1.0, 20.0, 1]] and len(statement["releases"]) == 2
    assert statement["epsilon"] == compose_epsilon([(1.0, 20.0, 1), spent], 1e-5) <= 10
    assert account(1e-5, composition=(str(finished),))["epsilon"] == statement["epsilon"]
    assert not statement["seed_was_fixed"] and "operating system" in statement["randomness"]


def test_what_is_released_holds_no_path_and_nothing_else(finished):
    names = {path.name for path in (finished / "layers").iterdir()}
    assert names == {"config.yaml", "done.json", "inputs.json", "privacy.json", "source.yaml", ".lock"}
    statement = json.loads((finished / "layers" / "privacy.json").read_text())
    assert statement["saliency"].keys() == {"shares", "release"} and str(finished) not in str(statement)
    assert (finished / "layers").stat().st_mode & 0o077 == 0


def test_samples_and_the_report_follow(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    stages.sample(run, count=10, steps=2, **QUIET)
    page = Path(report(run)["report"]).read_text()
    assert page.count("layers/privacy.json") == 2


@pytest.mark.parametrize("at", ["once", "release_statement", "private_trainer", "fit_average"])
def test_an_interrupted_release_is_never_made_again(run, monkeypatch, at):
    """There is no seed, so that a second release would differ."""
    path = run / "layers" / "privacy.json"
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, at, dies)
        with pytest.raises(KeyboardInterrupt):
            stages.finetune(run, PRIVACY, **TUNING)
    released = path.read_bytes() if path.exists() else None
    assert (released is None) == (at in ("once", "release_statement"))
    statement = stages.finetune(run, PRIVACY, **TUNING)
    assert released in (None, path.read_bytes()) and statement["earlier"] == [[1.0, 20.0, 1]]
    assert stages.finetune(run, PRIVACY, **TUNING) == statement


def test_a_release_serves_again_and_counts_once(finished, tmp_path):
    """It serves another share, another optimization, and a run that chooses no layers."""
    for number, (layers, adapted_layers) in enumerate([(LayerChoice(0.1, 20.0), 4), (LayerChoice(), 39)]):
        run = tmp_path / str(number)
        shutil.copytree(finished, run)
        shutil.rmtree(run / "private")
        options = TUNING | {"layers": layers, "training": FineTuning(learning_rate=1e-3)}
        statement = stages.finetune(run, PRIVACY, **options)
        assert statement["earlier"] == [[1.0, 20.0, 1]] and len(adapted(run)) == adapted_layers


def test_a_lost_release_is_refused(run, monkeypatch):
    """Fine-tuning began with the release."""
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "fit_average", dies)
        with pytest.raises(KeyboardInterrupt):
            stages.finetune(run, PRIVACY, **TUNING)
    (run / "layers" / "privacy.json").unlink()
    with pytest.raises(RunError, match="layers was finished, but privacy.json is gone.*still counts"):
        stages.finetune(run, PRIVACY, **TUNING)
    shutil.rmtree(run / "layers")
    with pytest.raises(RunError, match=r"goes on from layers/privacy.json, which is gone.*still counts"):
        stages.finetune(run, PRIVACY, **TUNING)
    assert not (run / "layers").exists()


def test_nothing_is_released_that_the_budget_cannot_pay(run):
    with pytest.raises(ValueError, match="too little is left"):
        stages.finetune(run, PRIVACY, **(TUNING | {"layers": LayerChoice(0.5, 0.4)}))
    assert not (run / "layers").exists() and not (run / "private").exists()


def test_other_losses_need_another_release(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "private")
    with pytest.raises(RunError, match="layers was made with other settings: training.label_dropout"):
        stages.finetune(run, PRIVACY, **TUNING, training=FineTuning(label_dropout=0.5))


def test_a_random_choice_costs_nothing(run):
    statement = stages.finetune(run, PRIVACY, **(TUNING | {"layers": LayerChoice(0.5, math.inf)}))
    assert statement["earlier"] == [] and not (run / "layers").exists() and len(adapted(run)) == 20


def test_a_release_by_images_is_not_counted_as_by_owners(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "private")
    with pytest.raises(ValueError, match="each image counts by itself"):
        stages.finetune(run, PRIVACY, **TUNING, owner="subfolder")


# -- methods ---------------------------------------------------------------------------------------------------------

with torch.device("meta"):
    UNET = digits_unet(width=8, norm_groups=4).config
MODEL = PublicModel(UNET, PublicTraining(steps=2, batch_size=8, warmup=1))
STEPS = PrivateTuning(steps=2, batch_size=10, views=2, training=FineTuning(learning_rate=1e-3), sampler_steps=2)
LODA = DPLoDA(MODEL, ByEpsilon({1.0: STEPS}))
CHOSEN = ByEpsilon({1.0: LayerChoice(0.3, 8.0)})


def fit(method, folder: Path, private: LabelledImages | None = None):
    work = Work(folder / "fit", folder / "public", 0, torch.device("cpu"), progress=False)
    return method.fit(private or font_digits(40, seed=1), font_digits(60, seed=0), Budget(2.0, 1e-5, 40), work)


def trained(fitted) -> int:
    return fitted.cost.trained


def test_the_variants_to_compare_are_settings(tmp_path):
    """They are all layers, attention alone, chosen layers, as many at random, and chosen layers with chosen data."""
    everywhere = fit(LODA, tmp_path / "all")
    attention = fit(dataclasses.replace(LODA, adapter=Adapter(targets="attention")), tmp_path / "attention")
    chosen = fit(dataclasses.replace(LODA, layers=CHOSEN), tmp_path / "chosen")
    random = fit(dataclasses.replace(LODA, layers=ByEpsilon({1.0: LayerChoice(0.3, math.inf)})), tmp_path / "random")
    choice = ByEpsilon({1.0: PublicChoice(10.0, features=40, drawn=30, training=MODEL.conditional)})
    both = fit(ChosenLoDA(dataclasses.replace(LODA, layers=CHOSEN), choice), tmp_path / "both")
    counts = [len(each.spent.releases) for each in (everywhere, attention, chosen, random, both)]
    assert counts == [1, 1, 2, 1, 3]
    assert both.spent.releases[1] == chosen.spent.releases[0] == Release(WHAT, 1.0, 8.0, 1)
    assert all(1.9 < each.spent.epsilon <= 2.0 for each in (everywhere, attention, chosen, random, both))
    assert max(trained(attention), trained(chosen), trained(random)) < trained(everywhere)
    noise = [each.spent.releases[-1].noise_multiplier for each in (everywhere, chosen, both)]
    assert noise == sorted(noise) and len(set(noise)) == 3


def test_only_the_release_carries_private_records(tmp_path, monkeypatch):
    """With the sums replaced by constants, two private sets give the same samples."""
    monkeypatch.setattr("fastloda.privacy.step.group_sums", lambda grads, groups, factors: dict.fromkeys(grads))
    one = font_digits(40, seed=1)
    other = LabelledImages(-one.images, one.labels.flip(0), 10)
    method = dataclasses.replace(LODA, layers=CHOSEN)
    drawn = [fit(method, tmp_path / str(i), data).images(10, seed=0).images for i, data in enumerate((one, other))]
    assert torch.equal(*drawn)


def test_a_method_that_goes_on_does_not_release_again(tmp_path, monkeypatch):
    method = dataclasses.replace(LODA, layers=CHOSEN)
    with monkeypatch.context() as patch:
        patch.setattr("fastloda.synthesis.methods.diffusion_model.fit_average", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(method, tmp_path)
    monkeypatch.setattr("fastloda.synthesis.methods.diffusion_model.release_saliency", dies)
    assert len(fit(method, tmp_path).spent.releases) == 2


def test_a_random_choice_is_even():
    network = digits_unet(width=8, norm_groups=4)
    attach_loda(network)
    names = [name for name, _ in loda_layers(network)]
    times = torch.zeros(len(names))
    for seed in range(400):
        best = at_random(network, seed).best(0.5)
        times += torch.tensor([float(name in best) for name in names])
    assert times.min() > 150 and times.max() < 260


@pytest.mark.parametrize(
    "bad", [{"share": 0.0}, {"share": 1.5}, {"noise_multiplier": 0.0}, {"noise_multiplier": math.nan}]
)
def test_impossible_choices_are_refused(bad):
    with pytest.raises(ValueError, match="layers"):
        LayerChoice(**bad)


def test_a_damaged_release_is_named(tmp_path):
    path = tmp_path / "saliency.json"
    path.write_text('{"shares": {}}')
    with pytest.raises(ValueError, match="no release of the layers' saliency, or is damaged"):
        once(path, lambda: Saliency({}, (1.0, 1.0, 1)))
