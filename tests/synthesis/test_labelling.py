"""The stage `label`, and samples that begin at chosen images: what they cost, that they continue, and what is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from fastloda import DPTrainer
from fastloda.accounting.compose import compose_epsilon
from fastloda.errors import UserError
from fastloda.synthesis.account import account, read_statement
from fastloda.synthesis.arguments import Names
from fastloda.synthesis.budget import Privacy
from fastloda.synthesis.classify import predict
from fastloda.synthesis.data import digits_split, font_digits, load_npz, only
from fastloda.synthesis.diffusion import class_balanced_labels
from fastloda.synthesis.diffusion import sample as draw_samples
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import CentralImages, PrivateLabels, PublicChoice
from fastloda.synthesis.methods.chosen_loda import of_classes
from fastloda.synthesis.methods.dp_sgd import DPSGD
from fastloda.synthesis.models import load_classifier, load_unet
from fastloda.synthesis.report.release import report
from fastloda.synthesis.runs import RunError
from fastloda.synthesis.settings import FineTuning, UNetShape
from fastloda.synthesis.stages import choose, finetune, label, labelling, pretrain, preview, sample

QUIET = {"progress": False, "device": "cpu"}
PUBLIC = PublicTraining(steps=3, batch_size=8, warmup=1, seed=0)
CHOICE = PublicChoice(20.0, features=20, drawn=300, training=dataclasses.replace(PUBLIC, steps=2))
LABELS = PrivateLabels(30.0, steps=2, batch_size=50, public_steps=3, training=DPSGD(learning_rate=0.1, width=8))
COST = [50 / 1437, 30.0, 2]
LABELLING = {"labels": LABELS, "delta": 1e-5, "data": "digits"} | QUIET
PRIVACY = Privacy(target_epsilon=10.0, delta=1e-5, epochs=0.1, batch_size=48)
TUNING = {"privacy": PRIVACY, "data": "digits"} | QUIET


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Path:
    """Make a run up to `choose`; the tests leave it unchanged."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        pretrain(run, data="font-digits", count=64, unet=UNetShape(width=8, norm_groups=4), training=PUBLIC, **QUIET)
        choose(run, delta=1e-5, data="digits", public="font-digits", choice=CHOICE, count=200, **QUIET)
    return run


@pytest.fixture
def run(chosen, tmp_path) -> Path:
    return Path(shutil.copytree(chosen, tmp_path / "run"))


@pytest.fixture(scope="module")
def labelled(chosen, tmp_path_factory) -> Path:
    """Make a run up to `finetune`, with a classifier that labels; the tests leave it unchanged."""
    run = Path(shutil.copytree(chosen, tmp_path_factory.mktemp("runs") / "run"))
    label(run, **LABELLING)
    finetune(run, **TUNING, training=FineTuning(seed=1))
    return run


def dies(*_, **__):
    raise KeyboardInterrupt


def test_a_classifier_counts_with_the_run_and_labels_its_samples(labelled, tmp_path):
    run = Path(shutil.copytree(labelled, tmp_path / "run"))
    found = label(run, **LABELLING)  # it is there
    assert found["epsilon"] == compose_epsilon([(1.0, 20.0, 1), tuple(COST)], 1e-5) and found["records"] == 1437
    assert found["earlier"] == [[1.0, 20.0, 1]]  # the images that it began with were chosen by it
    statement = read_statement(run)
    own = tuple(statement[name] for name in ("sample_rate", "noise_multiplier", "steps"))
    assert statement["earlier"] == [[1.0, 20.0, 1], COST]
    assert statement["epsilon"] == compose_epsilon([(1.0, 20.0, 1), tuple(COST), own], 1e-5) <= 10
    assert account(1e-5, composition=(str(run),))["epsilon"] == statement["epsilon"]
    assert not list((run / "labels").glob("checkpoint*"))

    drawn = load_npz(sample(run, count=30, steps=2, **QUIET)["samples"])
    network, names = load_classifier(run / "labels" / "classifier.safetensors")
    assert names == drawn.class_names == tuple("0123456789")
    # They are stored as bytes, which may move a logit across a boundary.
    assert (predict(network, drawn.images) == drawn.labels).float().mean() > 0.9
    assert not torch.equal(drawn.labels, class_balanced_labels(30, 10))
    public = load_npz(sample(run, count=30, steps=2, public=True, **QUIET)["samples"])
    assert torch.equal(public.labels, class_balanced_labels(30, 10))
    page = Path(report(run)["report"]).read_text()
    assert "labels/classifier.safetensors" in page and "chosen/images.npz" in page and "samples.labelled" in page


def test_samples_begin_at_chosen_images(labelled, tmp_path):
    run, options = Path(shutil.copytree(labelled, tmp_path / "run")), {"count": 25, "steps": 4, "seed": 5}
    drawn = load_npz(sample(run, public=True, strength=0.5, batch_size=10, **options, **QUIET)["samples"])
    labels, images = class_balanced_labels(25, 10), load_npz(run / "chosen" / "images.npz")
    start = {"varied": of_classes(images, labels, 5), "strength": 0.5}
    model = load_unet(run / "chosen" / "model.safetensors")
    expected = draw_samples(model, labels, steps=4, seed=5, progress=False, **start).clamp(-1, 1)
    assert (drawn.images - expected).abs().max() < 1.01 / 127.5
    with pytest.raises(RunError, match="strength"):
        sample(run, public=True, strength=1.0, batch_size=10, **options, **QUIET)


@pytest.mark.parametrize("at", ["save_classifier", "write_json"])
def test_an_interrupted_labelling_continues_and_nothing_is_tuned_before_it_is_finished(run, monkeypatch, at):
    """There is no seed, so that a second training would differ."""
    with monkeypatch.context() as patch:
        patch.setattr(labelling, at, dies)
        with pytest.raises(KeyboardInterrupt):
            label(run, **LABELLING)
    with pytest.raises(RunError, match="labels is not finished: the same `fastloda label` continues it"):
        finetune(run, **TUNING)
    assert not (run / "private").exists()
    monkeypatch.setattr(DPTrainer, "train_step", dies)
    label(run, **LABELLING)
    assert not list((run / "labels").glob("checkpoint*"))


def test_a_classifier_after_the_fine_tuning_is_refused_before_it_releases(run):
    finetune(run, **TUNING)
    with pytest.raises(RunError, match="private was fine-tuned already, .*labels releases.* in another --run"):
        label(run, **LABELLING)
    assert not (run / "labels").exists()


def test_samples_are_not_labelled_by_what_their_statement_does_not_count(labelled, run):
    finetune(run, **TUNING)
    shutil.copytree(labelled / "labels", run / "labels")
    with pytest.raises(UserError, match="does not count .*labels: label and fine-tune in one --run, in this order"):
        sample(run, count=10, steps=2, **QUIET)
    assert not (run / "samples").exists()


def test_a_unit_of_owners_is_refused_after_a_classifier_of_single_images(labelled, tmp_path):
    run = Path(shutil.copytree(labelled, tmp_path / "run"))
    shutil.rmtree(run / "private")
    with pytest.raises(UserError, match="in which each image counts by itself"):
        finetune(run, **TUNING, owner="subfolder")


def test_what_cannot_be_labelled_costs_nothing(run, tmp_path):
    digits, _ = digits_split()
    few = tmp_path / "few.npz"
    only(digits, ["1", "2"]).save_npz(few)
    for changed, message in (
        ({"data": str(few)}, "the classes 1, 2, but images were chosen for 0, 1, 2"),
        ({"labels": dataclasses.replace(LABELS, batch_size=2000)}, "labels.batch_size 2000 exceeds the 1437 records"),
        ({"delta": 0.5}, "delta"),
        ({"records": 50_000}, "expected_batch_size must be sample_rate x records"),
    ):
        with pytest.raises(ValueError, match=message):
            label(run, **(LABELLING | changed))
    shutil.rmtree(run / "chosen")
    with pytest.raises(FileNotFoundError, match="`fastloda choose` makes it, and comes first"):
        label(run, **LABELLING)
    assert not (run / "labels").exists()


def test_the_secret_of_the_noise_does_not_stay(run, monkeypatch):
    """A kill just before it is deleted leaves it; the next call deletes it."""
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "intent_path", dies)
        with pytest.raises(KeyboardInterrupt):
            label(run, **LABELLING)
    assert (run / "labels" / "done.json").exists() and (run / "labels" / "checkpoint.pt").exists()
    label(run, **LABELLING)
    assert not list((run / "labels").glob("checkpoint*"))


def test_a_classifier_that_was_begun_with_other_images_is_not_continued(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "save_classifier", dies)
        with pytest.raises(KeyboardInterrupt):
            label(run, **LABELLING)
    chosen = load_npz(run / "chosen" / "images.npz")
    dataclasses.replace(chosen, images=-chosen.images[:]).save_npz(run / "chosen" / "images.npz")
    with pytest.raises(RunError, match="was made from another .*images.npz"):
        label(run, **LABELLING)


def test_chosen_images_have_the_private_classes_whatever_chose_them(tmp_path):
    names, run = tuple(f"digit {number}" for number in range(10)), tmp_path / "run"
    for name, images in (("public", font_digits(200, 0, 8)), ("private", digits_split()[0])):
        dataclasses.replace(images, class_names=names).save_npz(tmp_path / f"{name}.npz")
    data, shape = {"data": str(tmp_path / "private.npz")}, UNetShape(width=8, norm_groups=4)
    means = CentralImages(20.0, CHOICE.training, drawn=40)
    pretrain(run, data=str(tmp_path / "public.npz"), unet=shape, training=PUBLIC, **QUIET)
    choose(run, delta=1e-5, public=str(tmp_path / "public.npz"), by=Names(["means"]), means=means, **data, **QUIET)
    assert load_npz(run / "chosen" / "images.npz").class_names == names
    assert label(run, **(LABELLING | data))["classes"] == list(names)


def test_a_strength_without_chosen_images_is_refused(chosen, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chosen / "public", run / "public")
    for strength, message in (
        (0.5, "no model of `fastloda choose`, with whose images --strength would begin"),
        (0.0, "strength"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(run, count=10, steps=2, public=True, strength=strength, **QUIET)
    assert not (run / "samples-public").exists()


def test_a_damaged_classifier_is_refused_by_name(labelled, tmp_path):
    run = Path(shutil.copytree(labelled, tmp_path / "run"))
    (run / "labels" / "classifier.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="classifier.safetensors is no classifier of FastLoDA, or is damaged"):
        sample(run, count=10, steps=2, **QUIET)
    assert not (run / "samples").exists()
