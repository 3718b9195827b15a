"""Releases before private training: no record changes one by more than stated, and the rest is computed from it alone."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloda.synthesis.classify import train_classifier
from fastloda.synthesis.data import ByteImages, LabelledImages, font_digits, font_styles
from fastloda.synthesis.diffusion import UNet, digits_unet
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import CentralImages, ClassQueries, InTurn, PublicChoice, private_evolution
from fastloda.synthesis.methods.central_images import CentredSums
from fastloda.synthesis.methods.gaussian_release import ClassSums, alone, noise_stream, release_class_sums
from fastloda.synthesis.methods.generator import class_means
from fastloda.synthesis.methods.private_evolution import nearest, winners
from fastloda.synthesis.methods.warm_up import load_released, save_released

FEW = PublicTraining(steps=2, batch_size=8, warmup=1)
POOL = font_styles(600, seed=0)
DIGITS = font_digits(300, seed=0)
WARM_UPS = {
    "choice": (PublicChoice(3.0, FEW, features=40, drawn=40), DIGITS),
    "means": (CentralImages(3.0, FEW, drawn=40), DIGITS),
    "queries": (ClassQueries(3.0, FEW, votes=3, kept=5, drawn=40, classifier_steps=3), POOL),
}
CANDIDATES = torch.randn(10, 7, 64, generator=torch.Generator().manual_seed(0))


def evolution(private, noise) -> torch.Tensor:
    """Release a round's votes, by features that are the pixels."""
    embedded = alone(lambda images: images.flatten(1), private.images)
    votes = nearest(embedded, private.labels, CANDIDATES)
    return release_class_sums("votes", votes, private.labels, 10, 3.0, noise)[0]


@pytest.fixture(scope="module")
def releases():
    """Make functions from records to the noisy sums of each release; the classifier of public images is trained once."""
    trained = train_classifier(POOL, steps=3, augment="none", seed=0, progress=False)

    def release(warm_up, pool, private, noise):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastloda.synthesis.methods.class_queries.train_classifier", lambda *_, **__: trained)
            return warm_up.sums(private, pool, 50, 0, noise).sums

    return {name: partial(release, *of) for name, of in WARM_UPS.items()} | {"evolution": evolution}


SOUND = [0.0, 1.0, -1.0, 0.3, 1e-40, 1e4, 3e38, -3e38]
BROKEN = [math.nan, math.inf, -math.inf]


@st.composite
def hostile(draw) -> tuple[torch.Tensor, bool]:
    """Draw an image that no data set would hold, and whether all of it is finite."""
    kind = draw(st.sampled_from(["constant", "one pixel", "random", "extremes"]))
    broken = draw(st.booleans())
    value = draw(st.sampled_from(BROKEN if broken else SOUND))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    image = torch.rand(1, 8, 8, generator=generator) * 2 - 1
    if kind == "constant":
        image.fill_(value)
    elif kind == "random":
        image *= draw(st.sampled_from([1e-30, 1.0, 1e3, 1e20, 3e38]))
    elif kind == "extremes":
        image = image.sign() * 3e38
    if kind in ("one pixel", "random", "extremes") and (broken or kind == "one pixel"):
        image.view(-1)[draw(st.integers(0, 63))] = value
    return image, bool(image.isfinite().all())


@pytest.mark.parametrize("name", [*WARM_UPS, "evolution"])
@settings(deadline=None, max_examples=60)
@given(hostile(), st.integers(0, 9), st.integers(0, 3), st.integers(0, 1000))
def test_a_record_moves_a_release_by_at_most_one(releases, name, image, label, others, seed):
    """This holds for any content and any place among the others; a record that is not finite changes nothing."""
    (record, finite), rest = image, font_digits(others + 1, seed)
    place = seed % (others + 2)
    images = torch.cat([rest.images[:place], record[None], rest.images[place:]])
    labels = torch.cat([rest.labels[:place], torch.tensor([label]), rest.labels[place:]])
    release = releases[name]
    with_all = release(SimpleNamespace(images=images, labels=labels, num_classes=10), noise_stream(0))
    without = release(rest, noise_stream(0))
    moved = (with_all - without).norm()
    rounding = 1e-5  # rounding of float32 features in batches of other sizes; votes have none
    assert with_all.isfinite().all() and moved <= 1 + rounding
    if not finite:
        assert moved <= rounding


def test_a_record_is_embedded_by_itself():
    """In a batch, the number of other records could flip a tie's last bit, and with it another record's vote."""
    images = torch.rand(5, 1, 2, 2)
    bytes_of = ByteImages((images * 255).to(torch.uint8))
    for kept in (images, bytes_of):
        seen = alone(lambda one: torch.full((len(one), 1), float(len(one))), kept)
        assert seen.tolist() == [[1.0]] * 5
    assert torch.equal(alone(lambda one: one.flatten(1), bytes_of), bytes_of[:].flatten(1))


@pytest.mark.parametrize("name", WARM_UPS)
def test_what_was_released_comes_back_bit_for_bit(name, tmp_path):
    warm_up, pool = WARM_UPS[name]
    released = warm_up.release(font_digits(50, seed=1), pool, 50, 0, noise_stream(0))
    save_released(tmp_path / "sums", released)
    ((kind, sums),) = load_released(tmp_path / "sums", [warm_up]).items()
    assert kind == name and type(sums) is type(released[name]) and (sums.records, sums.noise_multiplier) == (50, 3.0)
    assert torch.equal(sums.sums, released[name].sums) and sums.sums.dtype == torch.float64
    for field, value in vars(released[name]).items():
        assert torch.equal(torch.as_tensor(getattr(sums, field)), torch.as_tensor(value))
    assert warm_up.releases == ((warm_up.what, 1.0, 3.0, 1),)


# ---- central images


def centred(numbers: int) -> CentredSums:
    """Make sums of no records, whose public means are grey."""
    return CentredSums(torch.zeros(10, numbers, dtype=torch.float64), 1.0, 50, torch.zeros(numbers), 1.0)


def test_the_divisor_is_the_nominal_count():
    """Twice as many records give twice the distance from the public mean, since their true number is private."""
    private = font_digits(200, seed=3)
    bright = LabelledImages((private.images + 0.3).clamp(-1, 1), private.labels, 10)
    twice = LabelledImages(bright.images.repeat(2, 1, 1, 1), bright.labels.repeat(2), 10)
    once, doubled = (CentralImages(1e-9).sums(data, DIGITS, 200, 0, noise_stream(0)).means for data in (bright, twice))
    torch.testing.assert_close(doubled, 2 * once)


def test_central_images_are_the_private_means_at_half_the_resolution():
    """The records are as near to the public means as public ones, so that few are shortened."""
    private = font_digits(2000, seed=3, size=16)
    pool = font_digits(500, seed=0, size=16)
    means = CentralImages(1e-6, sharpening=0.0)
    drawn = means.centrals(means.sums(private, pool, 2000, 0, noise_stream(0)), (1, 16, 16))
    halved = lambda images: torch.nn.functional.avg_pool2d(images, 4)  # noqa: E731, the median blurs by a pixel
    expected = class_means(private.images.flatten(1), private.labels, 10).view(10, 1, 16, 16)
    assert (halved(drawn) - halved(expected)).abs().mean() < 0.15 * halved(expected).std()
    images = means.training_images(pool, centred(64), 0)
    assert len(images) == 2000 and images.labels.bincount().tolist() == [200] * 10


def test_central_images_are_learnt_at_the_noisiest_levels_alone(monkeypatch):
    seen = []
    model = tiny()
    losses = type(model.process).losses
    monkeypatch.setattr(
        "fastloda.synthesis.diffusion.ddpm.DDPM._errors",
        lambda self, predict, x0, t, noise: (seen.extend(t.tolist()), (predict(x0, t) - x0).square())[1],
    )
    assert losses is type(model.process).losses
    means, pool = WARM_UPS["means"]
    released = {"means": centred(16)}
    means.train_further(model, pool, released, 0, progress=False)
    assert means.next_pool(pool, pool[:5]) is pool
    assert len(seen) == 16 and min(seen) >= 700


# ---- class queries


def of_styles(count: int, seed: int, wanted) -> LabelledImages:
    images = font_styles(count, seed)
    labels = [label for label, name in enumerate(images.class_names) if wanted(name)]
    return images[torch.isin(images.labels, torch.tensor(labels))]


def test_votes_find_the_public_classes_that_are_like_the_private_ones():
    """Private digits have one family and style; each class keeps public classes of its digit, with the right one among them."""
    pool = font_styles(6000, seed=0)
    private = of_styles(8000, 1, lambda name: "STIXGeneral leaning narrow" in name)
    digit = torch.tensor([int(name[0]) for name in private.class_names])
    digits = LabelledImages(private.images, digit[private.labels], 10)
    queries = ClassQueries(0.1, FEW, votes=2, kept=2, drawn=500, classifier_steps=250)
    released = queries.sums(digits, queries.pool(pool, digits.class_names), len(digits), 0, noise_stream(0))
    most = [pool.class_names[label] for label in released.sums.argmax(1).tolist()]
    assert sum(name.startswith(str(digit)) for digit, name in enumerate(most)) >= 9
    assert sum("STIXGeneral leaning" in name for name in most) >= 5  # by chance 1 in 8
    images = queries.training_images(pool, released, 0)
    assert len(images) == 500 and images.labels.bincount().tolist() == [50] * 10
    known = {image.numpy().tobytes() for image in pool.images}
    assert all(image.numpy().tobytes() in known for image in images.images)
    assert queries.next_pool(pool, images) is images


def test_absent_classes_are_never_kept():
    some = POOL[torch.isin(POOL.labels, torch.arange(0, 160, 10))]
    queries = ClassQueries(3.0, FEW, kept=8, drawn=100, classifier_steps=1)
    released = ClassSums(torch.randn(10, 160, dtype=torch.float64), 3.0, 50)
    assert len(queries.training_images(some, released, 0)) == 100
    with pytest.raises(ValueError, match="more public classes than the 8"):
        queries.pool(DIGITS[DIGITS.labels < 8], ("0",))


# ---- in turn


def tiny() -> UNet:
    torch.manual_seed(0)
    return digits_unet(width=8, norm_groups=4)


def test_warm_ups_in_turn_release_once_and_train_after_each_other(tmp_path):
    fewer = replace(WARM_UPS["choice"][0], drawn=30)
    both = InTurn((WARM_UPS["queries"][0], WARM_UPS["means"][0], fewer))
    private, model = font_digits(50, seed=1), tiny()
    pool = both.pool(POOL, private.class_names)
    released = both.release(private, pool, 50, 0, noise_stream(0))
    assert list(released) == ["queries", "means", "choice"] and len(both.releases) == 3
    seen = both.train_further(model, pool, released, 0, checkpoint=tmp_path / "c.pt", progress=False)
    assert len(seen) == 30 and seen.num_classes == 10  # the last one's
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["choice-c.pt", "means-c.pt", "queries-c.pt"]
    again = tiny()
    both.train_further(again, pool, released, 0, checkpoint=tmp_path / "c.pt", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny().state_dict().values()))


def test_the_model_numbers_the_private_classes_as_it_likes(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fastloda.synthesis.methods.warm_up.pretrain", lambda model, images, *_, **__: seen.append(images)
    )
    means, pool = WARM_UPS["means"]
    released = {"means": centred(16)}
    means.train_further(tiny(), pool, released, 0, numbers=torch.arange(10).flip(0), progress=False)
    plain = means.training_images(pool, released["means"], 0)
    assert torch.equal(seen[0].labels, 9 - plain.labels)


@pytest.mark.parametrize("parts", [(), (PublicChoice(), PublicChoice(3.0))])
def test_warm_ups_of_one_kind_are_refused(parts):
    with pytest.raises(ValueError, match="of different kinds"):
        InTurn(parts)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (CentralImages, {"noise_multiplier": 0.0}),
        (CentralImages, {"least_noise": 0.0}),
        (CentralImages, {"sharpening": -1.0}),
        (ClassQueries, {"noise_multiplier": math.inf}),
        (ClassQueries, {"votes": 0}),
        (ClassQueries, {"kept": 0}),
        (private_evolution.Evolution, {"strengths": ()}),
        (private_evolution.Evolution, {"strengths": (0.5, 1.1)}),
        (private_evolution.Evolution, {"threshold": -1.0}),
        (private_evolution.Evolution, {"samples": 0}),
    ],
)
def test_impossible_settings_are_refused(make, bad):
    with pytest.raises(ValueError, match=r"means|queries|evolution"):
        make(**bad)


# ---- private evolution


def test_votes_go_to_the_nearest_sample_of_the_own_class():
    candidates = torch.tensor([[[0.0], [1.0]], [[10.0], [11.0]]])
    records, labels = torch.tensor([[0.9], [0.1], [0.9], [math.nan], [1e30]]), torch.tensor([0, 0, 1, 0, 1])
    assert nearest(records, labels, candidates).tolist() == [[0, 1], [1, 0], [1, 0], [0, 0], [1, 0]]


def test_winners_are_above_the_threshold_and_even_where_there_are_none():
    noisy = torch.tensor([[5.0, 1.0, -3.0], [0.5, -1.0, 0.2]])
    assert winners(noisy, 2.0).tolist() == [[3, 0, 0], [1, 1, 1]]
    assert winners(noisy, 0.0).tolist() == [[5, 1, 0], [0.5, 0, pytest.approx(0.2)]]
