"""Public images chosen by a noisy statistic: the weights are as stated, and larger on images like the private ones."""

from dataclasses import replace

import pytest
import torch

from fastloda.synthesis.data import LabelledImages, font_digits
from fastloda.synthesis.data.font_digits import MANY_HANDS
from fastloda.synthesis.methods import PublicChoice, Reach
from fastloda.synthesis.methods.class_embeddings import ClassEmbeddings
from fastloda.synthesis.methods.gaussian_release import noise_stream
from fastloda.synthesis.methods.generator import class_means
from fastloda.synthesis.methods.moves import moved
from fastloda.synthesis.methods.public_choice import tilted


@pytest.fixture(scope="module")
def pool() -> LabelledImages:
    """Make public images of which every second one is a negative."""
    digits = font_digits(600, seed=0)
    sign = torch.tensor([1.0, -1.0]).repeat(300)
    return LabelledImages(digits.images * sign[:, None, None, None], digits.labels, 10)


def features_and_target(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(80, 6, generator=generator, dtype=torch.float64))
    return features, features[:10].mean(0) + 0.05 * torch.randn(6, generator=generator, dtype=torch.float64)


def of_means(means: torch.Tensor, noise: float) -> ClassEmbeddings:
    """Make class embeddings of 8 x 8 images that stand for one record per class."""
    frequencies = torch.randn(64, means.shape[1] // 2, generator=torch.Generator().manual_seed(0))
    return ClassEmbeddings(means, noise, len(means), frequencies)


def effective_number(weights: torch.Tensor) -> float:
    """Compute how many images the weights effectively use: 1 / sum w^2, for weights of sum 1 (Kish)."""
    return float(1 / weights.square().sum())


def objective(w: torch.Tensor, features: torch.Tensor, target: torch.Tensor, tau: float) -> float:
    """Compute the objective that the tested module's docstring states."""
    divergence = torch.special.xlogy(w, w * len(w)).sum()
    return float(divergence + (features.T @ w - target).square().sum() / (2 * tau**2))


@pytest.mark.parametrize("tau", [0.03, 0.1, 1.0])
def test_no_other_weights_do_better(tau):
    features, target = features_and_target()
    w = tilted(features, target, tau)
    assert w.sum() == pytest.approx(1) and w.min() > 0
    best = objective(w, features, target, tau)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(20):
            other = (w.log() + size * torch.randn(80, generator=generator, dtype=torch.float64)).softmax(0)
            assert objective(other, features, target, tau) > best
    even = torch.full_like(w, 1 / 80)
    assert objective(even, features, target, tau) > best


def test_the_less_is_known_the_more_even_the_weights():
    features, target = features_and_target()
    numbers = [effective_number(tilted(features, target, tau)) for tau in (0.03, 0.1, 0.3, 1.0, 100.0)]
    assert numbers == sorted(numbers) and numbers[0] < 70 and numbers[-1] == pytest.approx(80)


@pytest.mark.parametrize("noise, least", [(0.3, 0.95), (3.0, 0.8)])
def test_images_like_the_private_ones_weigh_more(pool, noise, least):
    private = font_digits(500, seed=7)
    choice = PublicChoice(noise, features=200)
    released = choice.sums(private, pool, 500, 0, noise_stream(0))
    weights = choice.weights(pool, released)
    assert float(weights[0::2].sum()) > least  # the positives
    by_class = torch.zeros(10, dtype=torch.float64).index_add_(0, pool.labels, weights)
    torch.testing.assert_close(by_class, torch.full((10,), 0.1, dtype=torch.float64))
    drawn = choice.draw(pool, weights, seed=0)
    assert len(drawn) == choice.drawn and float((drawn.images.mean((1, 2, 3)) < 0).float().mean()) > least - 0.1


def test_noise_alone_chooses_almost_nothing(pool):
    choice = PublicChoice(1000.0, features=200)
    released = choice.sums(font_digits(500, seed=7), pool, 500, 0, noise_stream(0))
    assert effective_number(choice.weights(pool, released)) > 0.8 * len(pool)


def test_the_embedding_depends_on_public_images_alone(pool):
    choice, images = PublicChoice(features=40), font_digits(30, seed=3)
    first, second = (
        choice.sums(private, pool, 30, 0, noise_stream(0)) for private in (images, font_digits(30, seed=4))
    )
    assert torch.equal(first.embed(images.images), second.embed(images.images))
    torch.testing.assert_close(first.embed(images.images * 50).norm(dim=1), torch.ones(30))


def test_a_class_without_public_images_is_named(pool):
    some = pool.labels != 4
    rest = LabelledImages(pool.images[some], pool.labels[some], 10)
    with pytest.raises(ValueError, match="no public image of class 4"):
        PublicChoice(features=4).pool(rest, rest.class_names)


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
        {"features": 1},
        {"tolerance": 0.0},
        {"drawn": 0},
    ],
)
def test_impossible_choices_are_refused(bad):
    with pytest.raises(ValueError, match="choice"):
        PublicChoice(**bad)


@pytest.mark.parametrize("bad", [{"pixels": -0.1}, {"points": float("inf")}, {"pixels": float("nan")}])
def test_impossible_reaches_are_refused(bad):
    with pytest.raises(ValueError, match="reach.*must be finite and not negative"):
        Reach(**bad)


def mean_distance(images: LabelledImages, phi, means: torch.Tensor) -> float:
    return float((class_means(phi(images.images), images.labels, 10) - means).norm())


@pytest.mark.parametrize(
    "noise, reach, least, most",
    [
        (0.3, Reach(0.25), 0.0, 0.5),
        (0.3, Reach(1e-3), 0.99, 1.01),
        (1e4, Reach(0.25), 0.99, 1.01),
        (0.3, Reach(points=0.1), 0.0, 0.8),
        (0.3, Reach(points=1e-3), 0.95, 1.01),
        (0.3, Reach(0.25, 0.1), 0.0, 0.5),
    ],
)
def test_images_move_as_far_as_the_release_is_known_and_no_further(noise, reach, least, most):
    """`least` and `most` bound the share of the distance from the private means that is left."""
    narrow = MANY_HANDS._replace(stretch=(0.4, 0.6), slant=(-0.1, 0.1))
    private, public = font_digits(500, seed=7, hands=narrow), font_digits(400, seed=0)
    public = LabelledImages(
        (public.images + 0.5).clamp(-1, 1), public.labels, 10
    )  # brighter and wider than private images
    choice = PublicChoice(noise, features=200)
    released = choice.sums(private, public, 500, 0, noise_stream(0))
    exact = class_means(released.embed(private.images), private.labels, 10)
    found = moved(public, released, reach, 0, progress=False)
    left = mean_distance(found, released.embed, exact) / mean_distance(public, released.embed, exact)
    assert least <= left <= most
    assert found.images.abs().max() <= 1 and torch.equal(found.labels, public.labels)


def test_images_bend_smoothly_and_each_in_its_own_way():
    """Without information in the release, an image has its own bend: a draw of the process, with the stated deviation."""
    public = font_digits(400, seed=0)
    ramps = torch.linspace(-0.875, 0.875, 8).expand(400, 1, 8, 8)  # read at a shifted place, it tells the shift
    released = of_means(torch.zeros(10, 20), noise=1e6)
    shifts = moved(replace(public, images=ramps), released, Reach(points=0.02), 0, progress=False).images - ramps
    inner = shifts[:, 0, 2:-2, 2:-2]
    assert inner.std().item() == pytest.approx(0.02, rel=0.15)
    neighbours, across = (torch.corrcoef(torch.stack([inner[:, 0, 0], inner[:, 0, i]]))[0, 1] for i in (1, 3))
    assert neighbours > 0.85 and across < 0.65
    again, other = (moved(public, released, Reach(points=0.1), seed, progress=False).images for seed in (0, 1))
    assert torch.equal(again, moved(public, released, Reach(points=0.1), 0, progress=False).images)
    assert not torch.equal(again, other)


def test_a_choice_trains_on_moved_images_or_on_public_ones(pool):
    private = font_digits(500, seed=7)
    for reach in (0.25, 0.0):
        choice = PublicChoice(0.5, features=200, drawn=300, reach=Reach(reach))
        released = choice.sums(private, pool, 500, 0, noise_stream(0))
        images = choice.training_images(pool, released, seed=0, progress=False)
        known = {image.numpy().tobytes() for image in pool.images}
        assert all(image.numpy().tobytes() in known for image in images.images) == (reach == 0)
        assert len(images) == 300


def test_images_are_moved_part_by_part(monkeypatch):
    images = font_digits(60, seed=0)
    released = of_means(torch.zeros(10, 20), noise=0.1)
    monkeypatch.setattr("fastloda.synthesis.methods.moves._TOGETHER", 30)
    halves = [
        moved(images[part], released, Reach(0.25), 0, progress=False).images for part in (slice(30), slice(30, 60))
    ]
    assert torch.equal(moved(images, released, Reach(0.25), 0, progress=False).images, torch.cat(halves))
