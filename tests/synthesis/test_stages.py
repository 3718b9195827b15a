"""The stages: what they write, that they continue, and that a refusal changes nothing."""

import dataclasses
import functools
import json
import math
import pkgutil
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastloda import DPTrainer, load_loda
from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.accounting.compose import compose_epsilon
from fastloda.synthesis import bases, budget, samples
from fastloda.synthesis.account import account, read_statement, releases
from fastloda.synthesis.budget import Privacy
from fastloda.synthesis.classify import AUGMENTS, seeded_network
from fastloda.synthesis.cli import main
from fastloda.synthesis.data import LabelledImages, digits_split, font_digits, image_folder, load_npz, only, relabelled
from fastloda.synthesis.diffusion import EDM, digits_unet
from fastloda.synthesis.diffusion import pretrain as pretraining
from fastloda.synthesis.diffusion import sample as draw_samples
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import CentralImages, ClassQueries, LayerChoice, PublicChoice, Reach, diffusion_model
from fastloda.synthesis.methods.class_embeddings import ClassEmbeddings
from fastloda.synthesis.methods.dp_sgd import DPSGD, augmented_losses, train_dpsgd
from fastloda.synthesis.methods.generator import class_means
from fastloda.synthesis.methods.warm_up import load_released
from fastloda.synthesis.models import class_names_of, load_unet, was_chosen_privately
from fastloda.synthesis.report import sample_grid
from fastloda.synthesis.runs import RunError, Stage, digest
from fastloda.synthesis.samples import file_names
from fastloda.synthesis.settings import Adapter, Classifier, FineTuning, UNetShape
from fastloda.synthesis.stages import (
    choose,
    evaluate,
    evaluating,
    finetune,
    finetuning,
    pretrain,
    preview,
    sample,
    train_classifier_privately,
)

SHAPE = UNetShape(width=8, norm_groups=4)
PUBLIC = PublicTraining(steps=3, batch_size=8, warmup=1, seed=0)
PRIVACY = Privacy(target_epsilon=10.0, delta=1e-5, epochs=0.1, batch_size=48)
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _few_previews():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Make a run with every stage done; the tests leave it unchanged."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pretrain(folder, data="font-digits", count=64, unet=SHAPE, training=PUBLIC, **QUIET)
    finetune(folder, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    sample(folder, count=25, steps=2, **QUIET)
    sample(folder, count=25, steps=2, public=True, **QUIET)
    return folder


@pytest.fixture
def public_run(run, tmp_path) -> Path:
    """Make a run with only the public model."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "public").symlink_to(run / "public")
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# -- what the stages write -------------------------------------------------------------------------------------------


def test_pretrain_leaves_a_model_that_loads(run):
    model = load_unet(run / "public" / "model.safetensors")
    assert model.config == digits_unet(width=8, norm_groups=4).config
    assert class_names_of(run / "public" / "model.safetensors") == tuple("0123456789")
    assert sorted(p.name for p in (run / "public").iterdir()) == [
        "config.yaml",
        "done.json",
        "model.safetensors",
        "samples.png",
        "source.yaml",
    ]
    assert yaml.safe_load((run / "public" / "config.yaml").read_text())["training"]["steps"] == 3


def test_finetune_states_what_was_spent(run):
    statement = json.loads((run / "private" / "privacy.json").read_text())
    accountant = PrivacyAccountant(48 / 1437, statement["noise_multiplier"])
    assert statement["steps"] == round(0.1 * 1437 / 48) == 3
    assert statement["epsilon"] == accountant.epsilon(1e-5, 3) <= 10
    assert statement["epsilon_rdp"] == accountant.epsilon_rdp(1e-5, 3)
    assert (statement["adjacency"], statement["sampler"]) == ("add/remove one record", "Poisson")
    assert (statement["records"], statement["delta"], statement["views"]) == (1437, 1e-5, 2)
    assert statement["seed_was_fixed"] and "foresee" in statement["randomness"]


def test_nothing_that_depends_on_private_records_is_released(run, public_run, tmp_path):
    """As many other records give the same files except for the adapter, of which only the values differ."""
    records, _ = digits_split()
    swapped = public_run / "private.npz"
    LabelledImages(-records.images, records.labels.flip(0), 10).save_npz(swapped)
    finetune(public_run, PRIVACY, data=str(swapped), training=FineTuning(seed=1), **QUIET)
    one, other = (snapshot(r / "private") for r in (run, public_run))
    assert one.keys() == other.keys()
    one["privacy.json"], other["privacy.json"] = (
        each["privacy.json"].replace(digest(r / "private" / "adapter.safetensors")[:16].encode(), b"the adapter's hash")
        for each, r in ((one, run), (other, public_run))
    )
    assert b"the adapter's hash-0" in one["privacy.json"]
    assert {name for name in one if one[name] != other[name]} <= {
        "adapter.safetensors",
        "checkpoint.pt",
        "checkpoint.pt.spent",
        "done.json",
        "source.yaml",
    }
    assert str(tmp_path) in other["source.yaml"].decode() and "source.yaml" in other["README.txt"].decode()
    assert not [name for name in other if name != "source.yaml" and str(tmp_path).encode() in other[name]]
    assert json.loads(one["done.json"]).keys() == {"seconds", "resumed"}
    assert json.loads(one["inputs.json"]).keys() == {"model.safetensors"}


def test_the_private_folder_says_what_must_stay(run):
    assert (run / "private").stat().st_mode & 0o077 == 0
    assert "checkpoint.pt" in (run / "private" / "README.txt").read_text()


def test_without_a_seed_the_noise_differs_and_the_statement_says_so(public_run, run):
    finetune(public_run, PRIVACY, data="digits", **QUIET)
    assert "operating system" in json.loads((public_run / "private" / "privacy.json").read_text())["randomness"]
    ours, others = (tensors(r / "private" / "adapter.safetensors") for r in (public_run, run))
    assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_the_nominal_number_of_records_fixes_the_rate(public_run, caplog):
    with caplog.at_level("INFO", logger="fastloda"):
        finetune(
            public_run, dataclasses.replace(PRIVACY, records=2400), data="digits", training=FineTuning(seed=1), **QUIET
        )
    statement = read_statement(public_run)
    assert (statement["sample_rate"], statement["records"], statement["steps"]) == (48 / 2400, 2400, 5)
    assert "treated as public" not in caplog.text


def test_the_default_number_of_records_is_announced(caplog):
    with caplog.at_level("INFO", logger="fastloda"):
        assert PRIVACY.with_records(1000).records == 1000
    assert "1000, is treated as public" in caplog.text


def test_samples_are_balanced_repeatable_and_private(run, tmp_path):
    samples, public = (load_npz(run / name / "samples.npz") for name in ("samples", "samples-public"))
    assert samples.labels.bincount().tolist() == [3] * 5 + [2] * 5
    assert not torch.equal(samples.images, public.images)
    before = snapshot(run / "samples")
    again = tmp_path / "run"
    again.mkdir()
    for name in ("public", "private"):
        (again / name).symlink_to(run / name)
    sample(again, count=25, steps=2, batch_size=7, **QUIET)
    assert torch.equal(load_npz(again / "samples" / "samples.npz").images, samples.images)
    assert snapshot(run / "samples") == before


def test_evaluate_trains_on_the_samples_only(run, monkeypatch):
    seen = []

    def spy(images, **options):
        seen.append(images)
        return train(images, **options)

    train = evaluating.train_classifier
    monkeypatch.setattr(evaluating, "train_classifier", spy)
    quick = Classifier(steps=2, width=8)
    found = evaluate(run, test="digits-test", classifier=quick, **QUIET)
    assert torch.equal(seen[0].images, load_npz(run / "samples" / "samples.npz").images)
    assert (found["train_images"], found["test_images"]) == (25, 360) and 0 <= found["accuracy"] <= 1
    assert evaluate(run, test="digits-test", classifier=quick, **QUIET) == found and len(seen) == 1  # reused
    evaluate(run, test="digits-test", public=True, classifier=quick, **QUIET)
    evaluate(run, test="digits-test", train="digits", classifier=quick, **QUIET)
    assert len(seen) == 3
    assert json.loads((run / "evaluation.json").read_text()).keys() == {"samples", "samples-public", "digits"}


def test_evaluate_judges_files_anew_and_does_not_hash_them(public_run, monkeypatch):
    font_digits(30, seed=0).save_npz(public_run / "train.npz")
    font_digits(20, seed=1).save_npz(public_run / "test.npz")
    source, target = str(public_run / "train.npz"), str(public_run / "test.npz")
    options = {"train": source, "test": target, "classifier": Classifier(steps=1, width=8), **QUIET}
    evaluate(public_run, **options)
    written = (public_run / "evaluation.json").read_text()
    assert "sha256" not in written and str(public_run) not in written  # nor are the files named
    font_digits(21, seed=2).save_npz(target)
    assert evaluate(public_run, **options)["test_images"] == 21


def test_colour_images_from_files_go_through(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(40) % 3)
    data = str(tmp_path / "data.npz")
    pretrain(
        tmp_path / "r",
        data=data,
        unet=SHAPE,
        training=PUBLIC,
        **QUIET,
    )
    finetune(tmp_path / "r", dataclasses.replace(PRIVACY, epochs=1, batch_size=20), data=data, **QUIET)
    sample(tmp_path / "r", count=6, steps=2, **QUIET)
    found = evaluate(tmp_path / "r", test=data, classifier=Classifier(steps=1, width=8), **QUIET)
    assert (found["train_images"], found["test_images"]) == (6, 40)


def two_classes(path: Path, **more) -> str:
    digits = digits_split()[0]
    few = digits[digits.labels < 2][:60]
    np.savez(path, images=few.images.numpy(), labels=few.labels.numpy(), **more)
    return str(path)


def test_only_classes_that_the_adapter_saw_are_sampled(public_run, tmp_path):
    few = two_classes(tmp_path / "few.npz")
    statement = finetune(public_run, dataclasses.replace(PRIVACY, epochs=1, batch_size=30), data=few, **QUIET)
    assert statement["classes"] == ["0", "1"]
    drawn = load_npz(Path(sample(public_run, count=7, steps=2, **QUIET)["samples"]))
    assert drawn.labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and drawn.num_classes == 2
    public = load_npz(Path(sample(public_run, count=12, steps=2, public=True, **QUIET)["samples"]))
    assert public.labels.max() == 9  # the public model saw all classes
    found = evaluate(public_run, test=few, classifier=Classifier(steps=1, width=8), **QUIET)
    assert found["test_images"] == 60


def test_a_public_model_is_trained_on_all_its_classes(tmp_path, caplog):
    few = two_classes(tmp_path / "few.npz")
    pretrain(tmp_path / "r", data=few, unet=SHAPE, training=PUBLIC, **QUIET)
    assert load_unet(tmp_path / "r" / "public" / "model.safetensors").config.num_classes == 2
    assert not caplog.records or "no image of" not in caplog.text
    counted = two_classes(tmp_path / "counted.npz", num_classes=10)  # the file states ten classes: a warning
    with caplog.at_level("WARNING", logger="fastloda"):
        pretrain(tmp_path / "s", data=counted, unet=SHAPE, training=PUBLIC, **QUIET)
    assert "says that it has 10 classes, but has no image of 2, 3, 4, 5, 6, 7, 8, 9" in caplog.text


def test_classes_go_by_name_from_the_public_model_to_the_tests(tmp_path):
    """The numbers of classes do not matter; only the private classes are sampled."""
    digits = digits_split()[0]
    few = digits[digits.labels < 3][:90]

    def named(path: Path, order: str, keep: str) -> str:
        """Write digits 0, 1, 2 with names a, b, c and labels by `order`, only those in `keep`."""
        known = dataclasses.replace(few, num_classes=3, class_names=tuple("abc"))
        only(relabelled(known, order), [name for name in order if name in keep]).save_npz(path)
        return str(path)

    run, (public, private, tests) = (
        tmp_path / "run",
        (tmp_path / f"{name}.npz" for name in ("public", "private", "tests")),
    )
    pretrain(run, data=named(public, "abc", "abc"), unet=SHAPE, training=PUBLIC, **QUIET)
    assert class_names_of(run / "public" / "model.safetensors") == tuple("abc")
    promise = dataclasses.replace(PRIVACY, epochs=1, batch_size=20)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(finetuning, "private_trainer", lambda model, records, *_, **__: seen.append(records[1]) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(run, promise, data=named(private, "cba", "ca"), **QUIET)
        labels = load_npz(private).labels  # 0 is c, and 1 is a
        assert load_npz(private).class_names == ("c", "a") and torch.equal(seen[0], torch.where(labels == 0, 2, 0))
    statement = finetune(run, promise, data=str(private), name="three digits", **QUIET)
    assert (statement["name"], statement["classes"]) == ("three digits", ["a", "c"])
    sample(run, count=5, steps=2, **QUIET)
    drawn = load_npz(run / "samples" / "samples.npz")
    assert drawn.class_names == ("a", "c") and drawn.labels.tolist() == [0, 1, 0, 1, 0]
    assert sorted(path.name for path in (run / "samples" / "images").iterdir()) == ["a", "c"]
    model = load_unet(run / "public" / "model.safetensors")
    load_loda(model, run / "private" / "adapter.safetensors")
    of_classes_0_and_2 = draw_samples(model, torch.tensor([0, 2, 0, 2, 0]), steps=2, seed=0, progress=False)
    assert torch.equal(drawn.images, LabelledImages(of_classes_0_and_2.clamp(-1, 1), drawn.labels, 2).images) or (
        (drawn.images - of_classes_0_and_2).abs().max() < 0.01  # rounded to bytes
    )
    with pytest.raises(
        ValueError, match="b of the classes a, b, c are not among those of the training images, a, c: .*--class-map b="
    ):
        evaluate(run, test=named(tests, "abc", "abc"), classifier=Classifier(steps=1, width=8), **QUIET)
    found = evaluate(run, test=str(tests), class_map=("b=c",), classifier=Classifier(steps=1, width=8), **QUIET)
    assert found["test_images"] == 90


def test_a_model_of_edm_goes_through_all_stages(tmp_path):
    """The process belongs to the model: it is named once, to `pretrain`."""
    run, shape = tmp_path / "run", UNetShape(width=8, norm_groups=4, process="edm")
    pretrain(run, data="font-digits", count=64, unet=shape, training=PUBLIC, **QUIET)
    finetune(run, PRIVACY, data="digits", training=FineTuning(seed=1, timesteps=(100, 800)), **QUIET)
    with pytest.raises(ValueError, match="EDM's S_churn, must be finite and not negative, got -1"):
        sample(run, count=5, steps=3, stochasticity=-1.0, **QUIET)
    assert not (run / "samples").exists()
    sample(run, count=5, steps=3, guidance=0.5, stochasticity=1.0, **QUIET)
    model = load_unet(run / "public" / "model.safetensors")
    load_loda(model, run / "private" / "adapter.safetensors")
    how = {"steps": 3, "guidance": 0.5, "stochasticity": 1.0, "seed": 0}
    expected = draw_samples(model, torch.arange(5), **how, progress=False).clamp(-1, 1)
    assert isinstance(model.process, EDM)
    assert (load_npz(run / "samples" / "samples.npz").images - expected).abs().max() < 0.01  # rounded to bytes


@pytest.mark.parametrize("pairs", [("a",), ("a=",), ("=b",), ("a=b", "a=c")])
def test_a_map_of_classes_is_pairs(public_run, pairs):
    with pytest.raises(ValueError, match="--class-map takes pairs private=public"):
        finetune(public_run, PRIVACY, data="digits", class_map=pairs, **QUIET)


def test_the_folder_of_samples_can_be_published(run):
    folder = run / "samples"
    images = load_npz(folder / "samples.npz")
    read = image_folder(folder / "images")
    assert read.class_names == images.class_names and len(read) == 25
    for label in range(10):  # the PNGs are the same images
        assert torch.equal(read.images[read.labels == label], images.images[images.labels == label])
    assert json.loads((folder / "privacy.json").read_text()) == read_statement(run)
    text = (folder / "README.md").read_text()
    assert "They stand for: private images" in text and "(10.00, 1e-05)-differentially private" in text
    assert (
        "seed was fixed" in text and "no private image was used" in (run / "samples-public" / "README.md").read_text()
    )
    assert not (run / "samples-public" / "privacy.json").exists()
    named = sample_grid(images.images, images.labels, images.class_names, max_rows=40)
    assert (folder / "grid.png").read_bytes() == named


def test_a_run_may_hold_several_sets_of_samples(run, public_run):
    (public_run / "private").symlink_to(run / "private")
    for name, seed in ((None, 0), ("more", 1)):
        sample(public_run, count=10, steps=2, name=name, seed=seed, **QUIET)
    first, more = (load_npz(public_run / folder / "samples.npz").images for folder in ("samples", "samples-more"))
    assert not torch.equal(first, more)
    found = evaluate(public_run, test="digits-test", name="more", classifier=Classifier(steps=1, width=8), **QUIET)
    assert json.loads((public_run / "evaluation.json").read_text()).keys() == {"samples-more"}
    assert found["train_images"] == 10
    for name in ("public", "a/b", "..", ""):
        with pytest.raises(ValueError, match="--name must be letters"):
            sample(public_run, name=name, **QUIET)


def test_classes_get_folders_whatever_they_are_called():
    assert file_names(["a/b", "..", ".x", "é ü"]) == ["a_b", "_.", "_x", "é ü"]
    assert file_names(["a/b", "a_b", "A_B"]) == ["0 a_b", "1 a_b", "2 A_B"]


# -- continuing ------------------------------------------------------------------------------------------------------


def test_finished_stages_are_left_alone(run, caplog):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "evaluation.json"}
    with caplog.at_level("INFO", logger="fastloda"):
        pretrain(run, data="font-digits", count=64, unet=SHAPE, training=PUBLIC, **QUIET)
        statement = finetune(run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
        sample(run, count=25, steps=2, **QUIET)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert caplog.text.count("already there") == 3
    assert statement == json.loads((run / "private" / "privacy.json").read_text())


@pytest.mark.parametrize("when", [1, 2])
def test_an_interrupted_fine_tuning_continues_bit_for_bit(run, public_run, monkeypatch, when):
    monkeypatch.setattr(budget, "DPTrainer", functools.partial(DPTrainer, checkpoint_every=1))
    with monkeypatch.context() as patch:
        _interrupt(patch, "fastloda.training.trainer.DPTrainer.train_step", when)
        with pytest.raises(KeyboardInterrupt):
            finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    assert not (public_run / "private" / "adapter.safetensors").exists()
    with pytest.raises(RunError, match="training.seed is 1 there and 2 here"):
        finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=2), **QUIET)
    finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    ours, whole = (tensors(r / "private" / "adapter.safetensors") for r in (public_run, run))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert json.loads((public_run / "private" / "done.json").read_text())["resumed"]


def test_an_interrupted_pretraining_continues(run, tmp_path, monkeypatch):
    fast = functools.partial(diffusion_model.pretrain, checkpoint_every=1)
    monkeypatch.setattr(diffusion_model, "pretrain", fast)
    with monkeypatch.context() as patch:
        _interrupt(patch, "fastloda.synthesis.diffusion.pretrain._Run.train_step", 2)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "r", data="font-digits", count=64, unet=SHAPE, training=PUBLIC, **QUIET)
    assert (tmp_path / "r" / "public" / "checkpoint.pt").exists()
    pretrain(tmp_path / "r", data="font-digits", count=64, unet=SHAPE, training=PUBLIC, **QUIET)
    ours, whole = (r / "public" / "model.safetensors" for r in (tmp_path / "r", run))
    assert ours.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "r" / "public" / "checkpoint.pt").exists()


def test_ctrl_c_in_pretraining_loses_no_step(run, tmp_path, monkeypatch):
    """The signal comes in the second step, far from any scheduled save."""
    step, taken = pretraining._Run.train_step, []

    def interrupted(self):
        taken.append(self.step)
        if len(taken) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(pretraining._Run, "train_step", interrupted)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "r", data="font-digits", count=64, unet=SHAPE, training=PUBLIC, **QUIET)
    finally:
        signal.signal(signal.SIGINT, old)
    pretrain(tmp_path / "r", data="font-digits", count=64, unet=SHAPE, training=PUBLIC, **QUIET)
    assert taken == [0, 1, 2]
    ours, whole = (r / "public" / "model.safetensors" for r in (tmp_path / "r", run))
    assert ours.read_bytes() == whole.read_bytes()


def test_pretraining_saves_by_the_clock_too(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(pretraining._Run, "save", lambda self: saves.append(self.step))
    model, images = digits_unet(width=8, norm_groups=4), font_digits(20, 0)
    for seconds, expected in ((0.0, [1, 2, 3]), (1e9, [3])):
        saves.clear()
        pretraining.pretrain(model, images, PUBLIC, checkpoint_seconds=seconds, progress=False)
        assert saves == expected


def test_sampling_saves_by_the_clock_too(tmp_path, monkeypatch):
    labels, draw = torch.arange(5), lambda some, skip: some.float()[:, None, None, None] / 9
    for seconds, kept in ((1e9, False), (0.0, True)):
        monkeypatch.setattr(samples, "SECONDS", seconds)
        images = samples.draw_resumably(draw, labels, tmp_path / "part", batch_size=2, progress=False)
        assert torch.equal(images, draw(labels, 0)) and (tmp_path / "part").exists() == kept
    again = samples.draw_resumably(None, labels, tmp_path / "part", batch_size=2, progress=False)
    assert torch.equal(again, images)


def test_ctrl_c_in_sampling_loses_no_batch(run, public_run, monkeypatch):
    (public_run / "private").symlink_to(run / "private")
    draw, drawn = bases.draw_samples, []

    def interrupted(*args, **options):
        drawn.append(options["skip"])
        if len(drawn) == 2:
            signal.raise_signal(signal.SIGINT)
        return draw(*args, **options)

    monkeypatch.setattr(bases, "draw_samples", interrupted)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sample(public_run, count=25, steps=2, batch_size=7, **QUIET)
    finally:
        signal.signal(signal.SIGINT, old)
    sample(public_run, count=25, steps=2, batch_size=7, **QUIET)
    assert drawn == [0, 7, 14, 21] and not (public_run / "samples" / "drawn.safetensors").exists()
    ours, whole = (load_npz(r / "samples" / "samples.npz").images for r in (public_run, run))
    assert torch.equal(ours, whole)


def test_an_interrupted_evaluation_says_that_it_begins_anew(run, capsys, monkeypatch):
    _interrupt(monkeypatch, "torch.optim.lr_scheduler.CosineAnnealingLR.step", 3)
    options = ["--test", "digits-test", "--classifier.steps", "5", "--device", "cpu", "--progress", "false"]
    assert main(["evaluate", "--run", str(run), *options]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "fastloda evaluate: interrupted; the same command trains this classifier anew, and keeps all else"


def _interrupt(patch, name: str, call: int) -> None:
    """Raise KeyboardInterrupt in call number `call` of the function `name`, counted from 1."""
    calls = iter(range(1, 1000))
    *place, attribute = name.split(".")
    owner = functools.reduce(getattr, place[2:], __import__(".".join(place[:2]), fromlist=["x"]))
    real = getattr(owner, attribute)

    def interrupted(self):
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(self)

    patch.setattr(owner, attribute, interrupted)


def test_a_pretraining_that_goes_on_with_other_images_is_refused(tmp_path, monkeypatch):
    """The other images are as many, in the same file."""
    data, settings = tmp_path / "data.npz", {"unet": SHAPE, "training": PUBLIC} | QUIET
    font_digits(30, 0, 8).save_npz(data)
    with monkeypatch.context() as patch:
        die_at(patch, "fastloda.synthesis.stages.pretraining.save_unet")
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "run", data=str(data), **settings)
    font_digits(30, 1, 8).save_npz(data)
    with pytest.raises(RunError, match="was made from another .*data.npz"):
        pretrain(tmp_path / "run", data=str(data), **settings)


# -- choosing public images ------------------------------------------------------------------------------------------

CHOICE = PublicChoice(20.0, features=20, drawn=16, training=dataclasses.replace(PUBLIC, steps=2))
CHOOSING = {"delta": 1e-5, "data": "digits", "public": "font-digits", "choice": CHOICE, "count": 40} | QUIET


def test_what_the_choice_released_counts_with_the_run(public_run):
    found = choose(public_run, seed=3, **CHOOSING)
    assert found["epsilon"] == compose_epsilon([(1.0, 20.0, 1)], 1e-5) and found["records"] == 1437
    # It adapts the chosen model.
    statement = finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    own = (statement["sample_rate"], statement["noise_multiplier"], statement["steps"])
    assert statement["earlier"] == [[1.0, 20.0, 1]]
    assert statement["epsilon"] == compose_epsilon([(1.0, 20.0, 1), own], 1e-5) <= 10
    assert account(1e-5, composition=(str(public_run),))["epsilon"] == statement["epsilon"]
    sample(public_run, count=10, steps=2, **QUIET)
    inputs = json.loads((public_run / "private" / "inputs.json").read_text())
    assert inputs["model.safetensors"] == digest(public_run / "chosen" / "model.safetensors")


def test_the_sum_is_released_once(public_run, monkeypatch):
    """There is no seed, so that a second release would differ."""
    with monkeypatch.context() as patch:
        _interrupt(patch, "fastloda.synthesis.diffusion.pretrain._Run.train_step", 1)
        with pytest.raises(KeyboardInterrupt):
            choose(public_run, **CHOOSING)
    released = (public_run / "chosen" / "sums.safetensors").read_bytes()
    assert not (public_run / "chosen" / "model.safetensors").exists()
    choose(public_run, **CHOOSING)
    assert (public_run / "chosen" / "sums.safetensors").read_bytes() == released
    assert not list((public_run / "chosen").glob("*checkpoint.pt"))
    assert "operating system" in read_statement(public_run / "chosen")["randomness"]


IN_TURN = {
    "by": ["queries", "means", "choice"],
    "queries": ClassQueries(30.0, CHOICE.training, votes=2, kept=3, drawn=16, classifier_steps=2),
    "means": CentralImages(25.0, CHOICE.training, drawn=16),
    "public": "font-styles",
}


def test_warm_ups_in_turn_are_released_once_and_counted_together(public_run, monkeypatch):
    """The run has no seed, and is killed between the trainings."""
    turns, train = [], pretraining._Run.train_step

    def killed(self):
        turns.append(1)
        if len(turns) == 4:  # the second step of the second of three
            raise KeyboardInterrupt
        return train(self)

    with monkeypatch.context() as patch:
        patch.setattr("fastloda.synthesis.diffusion.pretrain._Run.train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            choose(public_run, **(CHOOSING | IN_TURN))
    released = (public_run / "chosen" / "sums.safetensors").read_bytes()
    statement = choose(public_run, **(CHOOSING | IN_TURN))
    assert (public_run / "chosen" / "sums.safetensors").read_bytes() == released
    assert not list((public_run / "chosen").glob("*checkpoint.pt"))
    each = [(1.0, 30.0, 1), (1.0, 25.0, 1), (1.0, 20.0, 1)]
    assert releases(statement) == each and len(statement["releases"]) == 3
    assert statement["epsilon"] == compose_epsilon(each, 1e-5)
    assert statement["mechanism"] == (
        "Gaussian noise on the votes for public classes, and on the sum of clipped images, and on the sum of joint embeddings, "
        "of sensitivity 1 each"
    )
    tuned = finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    assert tuned["earlier"] == [list(one) for one in each] and len(tuned["releases"]) == 4
    assert account(1e-5, composition=(str(public_run),))["epsilon"] == tuned["epsilon"] <= 10
    choose(public_run, **(CHOOSING | IN_TURN))  # this releases nothing more
    parts = IN_TURN["queries"], IN_TURN["means"], CHOICE
    assert set(load_released(public_run / "chosen" / "sums.safetensors", parts)) == {"queries", "means", "choice"}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (["means", "sums"], "--by takes queries, means, choice, got means, sums"),
        ([], "at least one"),
        (["means"] * 2, "kinds"),
        (["choice", "queries"], "queries must come first"),
    ],
)
def test_strange_warm_ups_are_refused(public_run, by, message):
    with pytest.raises(ValueError, match=message):
        choose(public_run, **(CHOOSING | {"by": by}))
    assert not (public_run / "chosen").exists()


def test_samples_are_not_moved_toward_what_says_no_features(public_run):
    choose(public_run, **(CHOOSING | IN_TURN | {"by": ["means"], "public": "font-digits"}))
    with pytest.raises(ValueError, match="no model of `fastloda choose` by choice"):
        sample(public_run, count=10, steps=2, public=True, reach=Reach(0.1), **QUIET)


def die_at(patch, target: str) -> None:
    """Raise KeyboardInterrupt when the function `target` is called."""
    owner, _, name = target.rpartition(".")

    def dies(*_, **__):
        raise KeyboardInterrupt

    patch.setattr(pkgutil.resolve_name(owner), name, dies)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"delta": 1e-15}, "delta"),
        ({"choice": dataclasses.replace(CHOICE, noise_multiplier=1e-170)}, "no finite epsilon"),
    ],
)
def test_a_choice_that_no_statement_could_be_made_of_releases_nothing(public_run, bad, message):
    with pytest.raises(ValueError, match=message):
        choose(public_run, **(CHOOSING | bad))
    assert not (public_run / "chosen").exists()


def test_a_choice_without_its_statement_stops_what_follows(public_run, monkeypatch):
    """Its sums are released, and not yet stated: another model may be meant, and they count all the same."""
    with monkeypatch.context() as patch:
        die_at(patch, "fastloda.synthesis.stages.choosing.with_ids")
        with pytest.raises(KeyboardInterrupt):
            choose(public_run, **CHOOSING)
    with pytest.raises(RunError, match="not finished: the same `fastloda choose` continues it"):
        finetune(public_run, PRIVACY, data="digits", model=public_run / "public", **QUIET)


@pytest.mark.parametrize("kind", ["choice", "means", "queries"])
def test_a_seed_that_would_be_ignored_is_refused(kind):
    made = {"choice": PublicChoice, "means": CentralImages, "queries": ClassQueries}[kind]
    with pytest.raises(ValueError, match=f"{kind}.training.seed would be ignored"):
        made(training=dataclasses.replace(PUBLIC, seed=7))


def test_images_per_owner_need_owners(public_run):
    with pytest.raises(ValueError, match="--per_owner 2 is for images of owners"):
        finetune(public_run, PRIVACY, data="digits", per_owner=2, layers=LayerChoice(0.5), **QUIET)
    assert not (public_run / "layers").exists() and not (public_run / "private").exists()


def test_samples_of_another_adapter_are_not_continued(public_run, monkeypatch):
    """Else the images of both would be published under the statement of the second."""
    tune = {"data": "digits", **QUIET}
    finetune(public_run, PRIVACY, training=FineTuning(seed=1), **tune)
    options = {"count": 30, "steps": 2, "batch_size": 10} | QUIET
    with monkeypatch.context() as patch:
        die_at(patch, "fastloda.synthesis.stages.sampling.write_samples")
        with pytest.raises(KeyboardInterrupt):
            sample(public_run, **options)
    shutil.rmtree(public_run / "private")
    finetune(public_run, PRIVACY, training=FineTuning(seed=2), **tune)
    with pytest.raises(RunError, match="was made from another .*adapter.safetensors"):
        sample(public_run, **options)


@pytest.mark.parametrize(
    "when",
    [
        "stages.choosing.noise_stream",
        "stages.choosing.with_ids",
        "stages.choosing.write_json",
        "diffusion.pretrain._Run.train_step",
    ],
)
def test_a_choice_killed_anywhere_is_stated_as_it_was_released(public_run, monkeypatch, when):
    with monkeypatch.context() as patch:
        die_at(patch, f"fastloda.synthesis.{when}")
        with pytest.raises(KeyboardInterrupt):
            choose(public_run, **CHOOSING)
    sums, released = public_run / "chosen" / "sums.safetensors", None
    if sums.exists():
        released = sums.read_bytes()
    assert (released is None) == (when == "stages.choosing.noise_stream")
    statement = choose(public_run, **CHOOSING)
    assert released in (None, sums.read_bytes())
    assert statement["epsilon"] == compose_epsilon([(1.0, 20.0, 1)], 1e-5) and statement["records"] == 1437
    assert statement["mechanism"] == "Gaussian noise on the sum of joint embeddings, of sensitivity 1"


def test_what_an_unfinished_choice_released_is_not_forgotten(public_run, monkeypatch):
    """What a finished choice released is not forgotten either, where another model is adapted."""
    with monkeypatch.context() as patch:
        die_at(patch, "fastloda.synthesis.diffusion.pretrain._Run.train_step")
        with pytest.raises(KeyboardInterrupt):
            choose(public_run, **CHOOSING)
    for work in (
        lambda: finetune(public_run, PRIVACY, data="digits", **QUIET),
        lambda: sample(public_run, public=True, **QUIET),
    ):
        with pytest.raises(
            RunError, match="chosen is not finished: the same `fastloda choose` continues it; or give --model"
        ):
            work()
    assert not (public_run / "private").exists() and not (public_run / "samples-public").exists()
    statement = finetune(public_run, PRIVACY, data="digits", model=public_run / "public", **QUIET)
    assert statement["earlier"] == [[1.0, 20.0, 1]] and len(statement["releases"]) == 2
    assert statement["epsilon"] == account(1e-5, composition=(str(public_run),))["epsilon"] <= 10
    choose(public_run, **CHOOSING)  # this releases nothing more
    assert finetune(public_run, PRIVACY, data="digits", model=public_run / "public", **QUIET) == statement


def test_two_choices_count_both(public_run, tmp_path):
    """The run has a choice of its own, and adapts another run's chosen model."""
    other = tmp_path / "other"
    choose(other, model=public_run / "public", **CHOOSING)
    choose(public_run, **(CHOOSING | {"choice": dataclasses.replace(CHOICE, noise_multiplier=30.0)}))
    statement = finetune(public_run, PRIVACY, data="digits", model=other / "chosen", **QUIET)
    assert statement["earlier"] == [[1.0, 20.0, 1], [1.0, 30.0, 1]] and len(statement["releases"]) == 3


def test_a_choice_after_the_fine_tuning_is_refused_before_it_releases(run, public_run, monkeypatch):
    (public_run / "private").symlink_to(run / "private")
    with pytest.raises(RunError, match="private was fine-tuned already, .* in another --run"):
        choose(public_run, **CHOOSING)
    assert not (public_run / "chosen").exists()


KEPT = ("config.yaml", "inputs.json"), ("config.yaml", "inputs.json", "source.yaml", "checkpoint.pt.spent")


@pytest.mark.parametrize("kept", [(), *KEPT])
def test_a_fine_tuning_of_which_only_the_results_are_left_does_not_begin_anew(run, public_run, kept):
    """A new run would replace its statement by one that leaves out what was spent before."""
    private = public_run / "private"
    private.mkdir()
    for name in ("adapter.safetensors", "privacy.json", *kept):
        shutil.copy(run / "private" / name, private)
    before = snapshot(private)
    with pytest.raises(RunError, match="says what was released, but .*checkpoint.pt is gone.*still counts"):
        finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    assert snapshot(private) == before


def test_a_lost_release_is_not_made_again(public_run, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, "fastloda.synthesis.diffusion.pretrain._Run.train_step")
        with pytest.raises(KeyboardInterrupt):
            choose(public_run, **CHOOSING)
    (public_run / "chosen" / "sums.safetensors").unlink()
    before = snapshot(public_run / "chosen")
    with pytest.raises(RunError, match="says what was released, but .* is gone.*still counts"):
        choose(public_run, **CHOOSING)
    assert snapshot(public_run / "chosen") == before


@pytest.mark.parametrize(
    ("kept", "message"), [("one class", "no public image of class 0, 1, 2, 4, "), ("one image", "too few or too alike")]
)
def test_public_images_that_nothing_can_be_chosen_from_cost_nothing(public_run, tmp_path, kept, message):
    pool, few = font_digits(60, 0, 8), tmp_path / "few.npz"
    pool = pool[pool.labels == 3] if kept == "one class" else pool[torch.zeros(60, dtype=torch.int64)]
    labels = pool.labels if kept == "one class" else torch.arange(60) % 10
    LabelledImages(pool.images, labels, 10).save_npz(few)
    with pytest.raises(ValueError, match=message):
        choose(public_run, **(CHOOSING | {"public": str(few)}))
    assert not (public_run / "chosen").exists()


def test_a_private_stage_is_one_processs(public_run, tmp_path):
    settings = {"a": 1}
    first, second = (Stage(tmp_path / "stage", settings, private=True) for _ in range(2))
    with first.work(), pytest.raises(RunError, match="another process works in"), second.work():
        pass
    with pytest.raises(RunError, match="was finished by another process just now"), second.work():
        pass
    assert second.is_done()


def test_everything_chosen_is_made_from_the_sum(public_run, tmp_path, monkeypatch):
    """With the released sums replaced by constants, other records give the same files."""
    constant = lambda self, private, public, records, seed, noise: ClassEmbeddings(  # noqa: E731
        torch.ones(10, 20, dtype=torch.float64), 20.0, records, torch.ones(64, 10)
    )
    monkeypatch.setattr(PublicChoice, "sums", constant)
    records, _ = digits_split()
    LabelledImages(-records.images, records.labels.flip(0), 10).save_npz(tmp_path / "other.npz")
    files = []
    for name, data in (("a", "digits"), ("b", str(tmp_path / "other.npz"))):
        choose(tmp_path / name, **(CHOOSING | {"data": data}), model=public_run / "public")
        files.append(
            {
                k: v
                for k, v in snapshot(tmp_path / name / "chosen").items()
                if k not in ("source.yaml", "done.json", ".lock")
            }
        )
    assert files[0] == files[1] and len(files[0]) == 7


def test_samples_are_moved_toward_the_release(public_run):
    choose(public_run, seed=3, **(CHOOSING | {"choice": dataclasses.replace(CHOICE, noise_multiplier=2.0)}))
    options = {"count": 200, "steps": 2, "public": True} | QUIET
    drawn = []
    for reach in (0.0, 0.3):
        drawn.append(load_npz(Path(sample(public_run, reach=Reach(reach), **options)["samples"])))
        (public_run / "samples-public").rename(public_run / f"reach-{reach}")
    released = load_released(public_run / "chosen" / "sums.safetensors", [CHOICE])["choice"]
    means = [class_means(released.embed(images.images), images.labels, 10) for images in drawn]
    before, after = ((mean - released.means).norm() for mean in means)
    assert after < 0.95 * before and torch.equal(drawn[0].labels, drawn[1].labels)
    inputs = json.loads((public_run / "reach-0.3" / "inputs.json").read_text())
    assert set(inputs) == {"model.safetensors", "sums.safetensors"}


def test_samples_without_a_release_are_not_moved(run, public_run):
    """Nor are they moved toward a release that no model's budget covers."""
    before = snapshot(run)
    with pytest.raises(ValueError, match="no model of `fastloda choose`"):
        sample(run, count=25, steps=2, reach=Reach(0.1), **QUIET)
    choose(public_run, seed=3, **CHOOSING)
    strange = public_run / "strange"
    strange.mkdir()
    for folder, name in (("public", "model.safetensors"), ("chosen", "sums.safetensors")):
        (strange / name).symlink_to(public_run / folder / name)
    with pytest.raises(ValueError, match="no model of `fastloda choose`"):
        sample(public_run, count=10, steps=2, public=True, reach=Reach(0.1), model=strange, **QUIET)
    (public_run / "chosen" / "sums.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no release of `fastloda choose`, or is damaged"):
        sample(public_run, count=10, steps=2, public=True, reach=Reach(0.1), **QUIET)
    assert snapshot(run) == before and not (public_run / "samples-public").exists()


def test_a_chosen_model_without_its_statement_is_refused(public_run):
    choose(public_run, seed=3, **CHOOSING)
    (public_run / "chosen" / "privacy.json").unlink()
    with pytest.raises(FileNotFoundError, match="no privacy.json"):
        finetune(public_run, PRIVACY, data="digits", **QUIET)
    assert not (public_run / "private").exists()


def test_a_chosen_model_is_known_wherever_it_goes(public_run, tmp_path):
    """Its file alone says so, without the folder that says what was released."""
    choose(public_run, seed=3, **CHOOSING)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    model = elsewhere / "model.safetensors"
    model.write_bytes((public_run / "chosen" / "model.safetensors").read_bytes())
    assert load_unet(model).config.width == 8 and was_chosen_privately(model)
    assert not was_chosen_privately(public_run / "public" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no privacy.json"):
        finetune(public_run, PRIVACY, data="digits", model=elsewhere, **QUIET)
    assert not (public_run / "private").exists()


def test_a_second_choice_on_top_of_the_first_is_refused(public_run, tmp_path):
    choose(public_run, seed=3, **CHOOSING)
    with pytest.raises(ValueError, match="chosen images already"):
        choose(tmp_path / "again", model=public_run / "chosen", **CHOOSING)
    assert not (tmp_path / "again").exists()


def test_a_choice_that_is_no_privacy_is_refused(public_run):
    with pytest.raises(ValueError, match="delta must be below 1 / records"):
        choose(public_run, **(CHOOSING | {"delta": 0.01}))
    choose(public_run, seed=3, **(CHOOSING | {"choice": dataclasses.replace(CHOICE, noise_multiplier=0.4)}))
    with pytest.raises(ValueError, match="too little is left"):
        finetune(public_run, PRIVACY, data="digits", **QUIET)
    assert not (public_run / "private").exists()


# -- refusing --------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused(run):
    before = snapshot(run)
    with pytest.raises(RunError, match=r"training.steps is 3 there and 4 here.*rm -r"):
        pretrain(run, data="font-digits", count=64, unet=SHAPE, training=dataclasses.replace(PUBLIC, steps=4), **QUIET)
    with pytest.raises(RunError, match=r"target_epsilon is 10.0 there and 1.0 here.*still counts"):
        finetune(
            run, dataclasses.replace(PRIVACY, target_epsilon=1.0), data="digits", training=FineTuning(seed=1), **QUIET
        )
    with pytest.raises(RunError, match="count is 25 there and 30 here"):
        sample(run, count=30, steps=2, **QUIET)
    assert snapshot(run) == before


def test_results_of_another_model_are_refused(run, tmp_path):
    other = tmp_path / "run"
    pretrain(other, data="font-digits", count=64, unet=SHAPE, training=dataclasses.replace(PUBLIC, seed=5), **QUIET)
    for name in ("private", "samples-public"):
        (other / name).symlink_to(run / name)
    with pytest.raises(ValueError, match="adapts another model"):
        sample(other, count=25, steps=2, **QUIET)
    with pytest.raises(RunError, match="made from another .*model.safetensors"):
        finetune(other, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    with pytest.raises(RunError, match="made from another .*model.safetensors"):
        sample(other, count=25, steps=2, public=True, **QUIET)


def test_a_lost_result_is_not_silently_made_again(public_run):
    finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)
    (public_run / "private" / "adapter.safetensors").unlink()
    with pytest.raises(RunError, match="adapter.safetensors is gone"):
        finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=1), **QUIET)


def test_a_stage_without_its_settings_is_refused(tmp_path):
    stage = Stage(tmp_path / "stage", {"a": 1})
    assert not stage.is_done() and not stage.folder.exists()
    with stage.work():
        pass
    (tmp_path / "stage" / "config.yaml").unlink()
    with pytest.raises(RunError, match="config.yaml is gone"):
        stage.is_done()


@pytest.mark.parametrize("name", ["config.yaml", "done.json"])
@pytest.mark.parametrize("content", ["[1, 2", "3", "[]"])
def test_a_damaged_record_is_refused(tmp_path, name, content):
    stage = Stage(tmp_path / "stage", {"a": 1})
    with stage.work():
        pass
    assert stage.is_done()
    (tmp_path / "stage" / name).write_text(content)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        stage.is_done()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon must be positive"),
        ({"target_epsilon": math.inf}, "target_epsilon must be positive and finite"),
        ({"target_epsilon": math.nan}, "target_epsilon must be positive"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"delta": 1.5}, "delta must be below 1"),
        ({"delta": 1 / 1437, "records": 1437}, "delta must be below 1 / records"),
        ({"batch_size": 2000, "records": 1437}, "exceeds the 1437 records"),
        ({"epochs": 1e-3, "records": 1437}, "less than a step"),
        ({"epochs": -1.0}, "epochs must be positive"),
        ({"views": 0}, "views must be at least 1"),
        ({"records": 0}, "records must be at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
    ],
)
def test_impossible_promises_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Privacy(**{"target_epsilon": 10.0, "delta": 1e-5, "batch_size": 64} | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"targets": "("}, "no regular expression"),
    ],
)
def test_impossible_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adapter(**options)


def test_finetune_checks_everything_before_it_writes(public_run, tmp_path):
    font_digits(20, seed=0, size=9).save_npz(tmp_path / "nine.npz")
    labels = LabelledImages(torch.zeros(30, 1, 8, 8), torch.full((30,), 10), 11)
    labels.save_npz(tmp_path / "eleven.npz")
    cases = [
        ({"data": str(tmp_path / "nine.npz")}, "1 x 9 x 9, the U-Net is for 1 x 8 x 8"),
        (
            {"data": str(tmp_path / "eleven.npz")},
            "10 of the classes 0, 1, .* are not among those of the public model, 0, 1, .* --class-map 10=0",
        ),
        ({"data": str(tmp_path / "none.npz")}, "no such file"),
        ({"data": "digitz"}, "data must be one of digits, "),
        ({"adapter": Adapter(rank=99)}, "no layer to adapt"),
        ({"adapter": Adapter(targets="nothing")}, "no layer to adapt"),
        ({"training": FineTuning(warmup=100)}, "warmup must be between"),
        ({"model": tmp_path}, "no public model"),
    ]
    for options, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            finetune(public_run, PRIVACY, **({"data": "digits"} | options), **QUIET)
    assert [p.name for p in public_run.iterdir()] == ["public"]


def test_a_damaged_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no model of"):
        load_unet(tmp_path / "model.safetensors")


# -- accounting ------------------------------------------------------------------------------------------------------


def test_account_both_ways():
    found = account(1e-5, sample_rate=0.1, noise_multiplier=1.5, steps=50)
    assert found["epsilon"] == PrivacyAccountant(0.1, 1.5).epsilon(1e-5, 50) < found["epsilon_rdp"]
    back = account(1e-5, sample_rate=0.1, target_epsilon=found["epsilon"], steps=50)
    assert back["noise_multiplier"] == pytest.approx(1.5, rel=0.01) and back["epsilon"] <= found["epsilon"]


def test_account_composes_runs(run, tmp_path):
    statement = read_statement(run)
    mechanism = (statement["sample_rate"], statement["noise_multiplier"], statement["steps"])
    other = tmp_path / "privacy.json"
    other.write_text(json.dumps(statement | {"releases": [release | {"id": "x"} for release in statement["releases"]]}))
    found = account(1e-5, composition=(str(run), str(other)))
    assert found["epsilon"] == compose_epsilon([mechanism] * 2, 1e-5) < 2 * statement["epsilon"]
    assert found["each"] == [statement["epsilon"]] * 2
    twice = account(1e-5, composition=(str(run), str(run / "private" / "privacy.json")))  # one release, stated twice
    assert twice["epsilon"] == statement["epsilon"]


def test_account_refuses_half_a_question(tmp_path):
    with pytest.raises(ValueError, match="--sample_rate and --steps missing"):
        account(1e-5, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="either --noise_multiplier"):
        account(1e-5, sample_rate=0.1, steps=5)
    with pytest.raises(ValueError, match="nothing else"):
        account(1e-5, sample_rate=0.1, composition=("x",))
    with pytest.raises(FileNotFoundError, match="no privacy.json"):
        account(1e-5, composition=(str(tmp_path),))
    (tmp_path / "privacy.json").write_text("{}")
    with pytest.raises(ValueError, match="no privacy statement"):
        account(1e-5, composition=(str(tmp_path),))


@pytest.mark.parametrize(("chosen", "tuned"), [(0, None), (None, 0), (None, None)])
def test_each_release_says_how_its_noise_was_drawn(public_run, chosen, tuned):
    """If one release can be foreseen and has moved the model, the adapters are no private release either."""
    choose(public_run, seed=chosen, **CHOOSING)
    statement = finetune(public_run, PRIVACY, data="digits", training=FineTuning(seed=tuned), **QUIET)
    first, own = statement["releases"]
    assert [first["seed_was_fixed"], own["seed_was_fixed"]] == [chosen is not None, tuned is not None]
    assert [[r[n] for n in ("sample_rate", "noise_multiplier", "steps")] for r in statement["releases"]] == [
        *statement["earlier"],
        [statement[n] for n in ("sample_rate", "noise_multiplier", "steps")],
    ]
    fixed = (chosen, tuned) != (None, None)
    assert statement["seed_was_fixed"] == fixed and ("foresee" in statement["randomness"]) == fixed
    assert ("operating system" in own["randomness"]) == (tuned is None)
    together = account(1e-5, composition=(str(public_run),))
    assert together["randomness"] == statement["randomness"]
    assert together["epsilon"] == compose_epsilon(releases(statement), 1e-5)
    # An old statement does not say this of each release; what it does not say is not taken for unforeseeable.
    (public_run / "old").mkdir()
    old = {key: value for key, value in statement.items() if key != "releases"}
    (public_run / "old" / "privacy.json").write_text(json.dumps(old))
    found = account(1e-5, composition=(str(public_run / "old"),))
    assert "foresee" in found["randomness"] and found["epsilon"] == together["epsilon"]


# -- DP-SGD ----------------------------------------------------------------------------------------------------------


def test_dpsgd_trains_privately_and_resumes(tmp_path, monkeypatch):
    data = font_digits(64, seed=0)
    privacy = Privacy(10.0, 1e-5, epochs=2, batch_size=32, records=64, max_grad_norm=1.0, views=2)
    options = {"device": "cpu", "progress": False}
    model = train_classifier_privately(tmp_path, privacy, data, DPSGD(width=8, seed=0), **options)
    assert not model.training
    statement = read_statement(tmp_path / "dpsgd")
    assert statement["epsilon"] <= 10 and statement["steps"] == 4 and statement["views"] == 2
    start = seeded_network("cnn", 0, width=8)
    assert not torch.equal(model.head.weight, start.head.weight)
    monkeypatch.setattr("fastloda.synthesis.stages.classifying.train_dpsgd", None)  # a finished classifier is loaded
    again = train_classifier_privately(tmp_path, privacy, data, DPSGD(width=8, seed=0), **options)
    images = data.images[:5]
    assert torch.equal(model(images), again(images))
    with pytest.raises(RunError, match="width is 8 there and 16 here"):
        train_classifier_privately(tmp_path, privacy, data, DPSGD(width=16, seed=0), **options)


def test_dpsgd_views_are_different_copies_of_each_record(monkeypatch):
    data, seen = font_digits(3, seed=0), []

    def model(x):
        seen.append(x)
        return torch.zeros(len(x), 10)

    losses = augmented_losses(4, "jitter")(model, (data.images, data.labels), torch.Generator().manual_seed(0))
    assert losses.shape == (12,)
    copies = seen[0].view(3, 4, -1)
    assert len(copies.flatten(0, 1).unique(dim=0)) == 12
    monkeypatch.setitem(AUGMENTS, "jitter", lambda images, generator: images)
    augmented_losses(4, "jitter")(model, (data.images, data.labels), torch.Generator())
    assert torch.equal(seen[1].view(3, 4, 1, 8, 8), data.images[:, None].expand(3, 4, 1, 8, 8))  # sample-major


def test_dpsgd_refuses_what_is_not_square():
    oblong = LabelledImages(torch.zeros(9, 1, 8, 6), torch.zeros(9).long(), 2)
    privacy = Privacy(10.0, 1e-5, epochs=1, batch_size=9, records=9)
    with pytest.raises(ValueError, match="square"):
        train_dpsgd(oblong, privacy, DPSGD(), progress=False)
