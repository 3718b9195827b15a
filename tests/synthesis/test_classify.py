"""The classifier: it learns digits, treats each sample by itself, and leaves global random numbers unchanged."""

import math

import pytest
import torch
from torch import nn

from fastloda import progress
from fastloda.synthesis.classify import (
    NETWORKS,
    SmallCNN,
    accuracy,
    flip_crop,
    jitter,
    predict,
    seeded_network,
    train_classifier,
)
from fastloda.synthesis.data import LabelledImages, digits_split, font_digits


@pytest.fixture(scope="module")
def digits() -> tuple[LabelledImages, LabelledImages]:
    return digits_split()


@pytest.fixture(scope="module")
def learned(digits) -> SmallCNN:
    return train_classifier(digits[0], steps=120, progress=False)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_learns_the_real_digits(learned, digits, proof):
    share = accuracy(learned, digits[1])
    proof("classifier_accuracy_120_steps", share)
    assert share >= 0.97
    assert not learned.training


def test_public_digits_alone_teach_much_but_not_all(digits):
    model = train_classifier(font_digits(2000, seed=0), steps=120, progress=False)
    assert 0.5 < accuracy(model, digits[1]) < 0.95


def test_is_deterministic_and_leaves_the_global_generator(digits):
    train = digits[0][:64]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train_classifier(train, steps=3, seed=4, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = train_classifier(train, steps=3, seed=4, progress=False)
    other = train_classifier(train, steps=3, seed=5, progress=False)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize(("channels", "size", "side"), [(1, 8, 4), (3, 32, 4), (1, 28, 4), (1, 3, 3), (1, 1, 1)])
def test_network_fits_any_square(channels, size, side):
    model = SmallCNN(channels, num_classes=7, width=16, image_size=size)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)
    assert model.head.in_features == 32 * side * side


def test_only_convolutions_and_linear_have_parameters():
    owners = {type(module) for module in SmallCNN().modules() if list(module.parameters(recurse=False))}
    assert owners == {nn.Conv2d, nn.Linear}
    assert not list(SmallCNN().buffers())


def test_samples_do_not_mix():
    model = seeded_network("cnn", 0).double()
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    logits = model(images)
    (reached,) = torch.autograd.grad(logits[2].sum(), images)
    assert reached[2].abs().min() > 0
    assert reached[[0, 1, 3, 4]].abs().max() == 0
    torch.testing.assert_close(logits[2:3], model(images[2:3]))


def test_seeded_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (seeded_network("cnn", seed, width=8) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(first), weights(again)) and not torch.equal(weights(first), weights(other))


def test_jitter_moves_a_little_and_only_with_its_generator(digits):
    images = digits[0].images[:50]
    moved = jitter(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.abs().max() <= 1 + 1e-6
    assert torch.equal(moved, jitter(images, torch.Generator().manual_seed(0)))
    dot = torch.full((200, 1, 9, 9), -1.0)
    dot[:, 0, 4, 4] = 1
    mass = (jitter(dot, torch.Generator().manual_seed(0)) + 1)[:, 0]
    at = torch.arange(9) - 4.0
    shift = torch.stack([mass.sum(1) @ at, mass.sum(2) @ at], dim=1) / mass.sum((1, 2))[:, None]
    assert 0.9 < shift.abs().max() <= 9 / 8 + 0.2  # 0.2: sampling is bilinear, so a turned dot is not quite round
    assert shift.mean().abs() < 0.15


def test_no_augmentation_sees_the_images_as_they_are(digits):
    seen = []

    def look(images, generator):
        seen.append(images)
        return images

    train = digits[0][:7]
    with_identity = train_classifier(train, steps=4, batch_size=3, width=8, augment=look, progress=False)
    without = train_classifier(train, steps=4, batch_size=3, width=8, augment="none", progress=False)
    assert torch.equal(weights(with_identity), weights(without))
    assert [len(batch) for batch in seen] == [3, 3, 3, 3]  # batches continue across the end of an epoch
    epoch = torch.cat(seen)[:7]
    assert torch.equal(epoch.unique(dim=0), train.images.unique(dim=0))  # an epoch has every image once
    assert not torch.equal(epoch, train.images)


def test_the_step_size_falls_along_a_cosine(digits, monkeypatch):
    sizes = []
    step = torch.optim.AdamW.step

    def spy(optimizer, closure=None):
        sizes.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train_classifier(digits[0][:8], steps=4, lr=0.1, width=8, progress=False)
    assert sizes == pytest.approx([0.05 * (1 + math.cos(math.pi * done / 4)) for done in range(4)])


@pytest.mark.parametrize("option", [{"weight_decay": 0.5}, {"label_smoothing": 0.2}, {"lr": 0.01}])
def test_every_option_counts(digits, option):
    usual = {"steps": 2, "width": 8, "progress": False}
    plain, changed = (train_classifier(digits[0][:8], **usual, **extra) for extra in ({}, option))
    assert not torch.equal(weights(plain), weights(changed))


def test_a_set_smaller_than_a_batch_trains(digits):
    assert len(weights(train_classifier(digits[0][:5], steps=2, batch_size=32, width=8, progress=False)))


def test_predict_keeps_the_mode_and_ignores_the_batch_size(learned, digits):
    images = digits[1].images[:50]
    learned.train()
    classes = predict(learned, images)
    assert learned.training
    learned.eval()
    assert classes.dtype == torch.int64 and classes.shape == (50,)
    assert torch.equal(predict(learned, images, batch_size=7), classes)
    assert not learned.training


def test_accuracy_counts_the_right_ones(learned, digits):
    images = digits[1].images[:40]
    labels = predict(learned, images)
    labels[:10] = (labels[:10] + 1) % 10
    assert accuracy(learned, LabelledImages(images, labels, 10), batch_size=16) == 0.75


def blank(*shape: int) -> LabelledImages:
    return LabelledImages(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64), num_classes=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": blank(0, 1, 8, 8)}, "no images"),
        ({"train": blank(2, 1, 8, 6)}, r"square images, not \[8, 6\]"),
        ({"steps": 0}, "not 0 and 128"),
        ({"batch_size": 0}, "not 500 and 0"),
        ({"width": 12}, "multiple of 8: in_channels=1, num_classes=2, width=12, image_size=8"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(**{"train": blank(2, 1, 8, 8), "progress": False, **change})


def test_accuracy_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no images"):
        accuracy(SmallCNN(), blank(0, 1, 8, 8))


def test_progress_is_shown_on_request(digits, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHORT", 0.0)
    train_classifier(digits[0][:5], steps=1, width=8, progress=False)
    assert capsys.readouterr().err == ""
    train_classifier(digits[0][:5], steps=1, width=8)
    assert "classifier" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_learns_from_few_images(name):
    few = LabelledImages(torch.randn(4, 3, 8, 8).clamp(-1, 1), torch.arange(4), 4)
    width = 8 if name in ("cnn", "resnet9") else 1
    model = train_classifier(few, steps=20, batch_size=4, network=name, width=width, augment="none", progress=False)
    assert accuracy(model, few) == 1


@pytest.mark.parametrize(("name", "parameters"), [("resnet9", 6.57e6), ("wrn-40-4", 8.9e6), ("wrn-16-4", 2.7e6)])
def test_networks_have_the_published_sizes(name, parameters):
    """The sizes for CIFAR-10 are 6.57M (Page's network), and 8.9M and 2.7M (Zagoruyko & Komodakis, table 4)."""
    model = seeded_network(name, 0, in_channels=3, image_size=32)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)


def test_an_unknown_network_or_norm_is_named():
    with pytest.raises(ValueError, match="one of cnn, resnet9.*'resnet'"):
        seeded_network("resnet", 0)
    for name in ("cnn", "resnet9", "wrn-16-4"):
        with pytest.raises(ValueError, match="norm.*'layer'"):
            seeded_network(name, 0, norm="layer")


def test_flip_crop_mirrors_half_and_shifts_by_an_eighth():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(400, 1, 8, 8)
    moved = flip_crop(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, flip_crop(images, torch.Generator().manual_seed(0)))
    inner = moved[:, 0, 2:6, 2:6]
    steps = inner[:, 0, 1] - inner[:, 0, 0]
    assert set(steps.tolist()) == {1.0, -1.0} and 0.4 < (steps < 0).double().mean() < 0.6
    rows = ((moved[:, 0, 4, 3:5].sum(1) / 2 - 3.5) / 8 - 4).round()
    assert set(rows.tolist()) == {-1.0, 0.0, 1.0}
