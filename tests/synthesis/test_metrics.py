"""FID, KID, precision and recall: exact on Gaussians of known distance, and equal to slow definitions."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fastloda.synthesis.classify import SmallCNN, train_classifier
from fastloda.synthesis.data import digits_split, font_digits
from fastloda.synthesis.metrics import (
    classifier_features,
    fid,
    kid,
    precision_recall,
    scores,
    torchscript_features,
)


def cloud(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 4), (30, 30, 1), (40, 90, 12), (6, 8, 20)])
def test_fid_is_the_textbook_formula(n, m, d):
    a, b = cloud(n, d, 0), cloud(m, d, 1, shift=0.5)
    cov = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b)]
    root = np.real(sqrtm(cov[0] @ cov[1]))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov[0] + cov[1] - 2 * root)
    assert fid(a, b) == pytest.approx(
        expected, rel=1e-3 if d > 6 else 1e-6
    )  # the root of a singular product is inexact


def test_fid_of_gaussians_far_apart_is_their_distance():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 2))
    b = rng.normal(size=(200_000, 2)) * [2, 3] + [3, 4]
    assert fid(a, b) == pytest.approx(25 + 1 + 4, rel=0.01)
    assert fid(a, a) == pytest.approx(0, abs=1e-8)


def test_kid_is_the_mean_over_pairs():
    a, b = cloud(9, 3, 0), cloud(9, 3, 1)
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(t[i], t[j]) for i in range(9) for j in range(9) if i != j]) for t in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kid(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


def test_kid_is_unbiased():
    values = [
        kid(np.random.default_rng(s).normal(size=(60, 4)), np.random.default_rng(s + 1000).normal(size=(60, 4)))
        for s in range(60)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)


def test_precision_and_recall_tell_few_modes_from_poor_images():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(300, 2)), rng.normal(size=(300, 2)) + 20])
    one_mode, astray = rng.normal(size=(300, 2)), np.concatenate([real[::2] + 1e-3, rng.normal(size=(300, 2)) + 200])
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.9 and 0.4 < recall < 0.6
    precision, recall = precision_recall(real, astray)
    assert precision == pytest.approx(0.5, abs=0.02) and recall > 0.9


def test_precision_is_the_definition():
    real, made = cloud(40, 3, 0), cloud(30, 3, 1)
    radius = [np.sort(np.linalg.norm(real - r, axis=1))[3] for r in real]
    inside = [any(np.linalg.norm(m - r) <= rad for r, rad in zip(real, radius)) for m in made]
    assert precision_recall(real, made)[0] == pytest.approx(np.mean(inside))


def test_scores_put_other_real_digits_nearer_than_fonts():
    train, test = digits_split()
    fonts = font_digits(600, seed=0)
    extractor = classifier_features(train_classifier(fonts, steps=60, progress=False), "a small CNN")
    near, far = (
        scores(train.images[:360], test.images, extractor),
        scores(train.images[:360], fonts.images[:360], extractor),
    )
    assert near.fid < far.fid and near.kid < far.kid and near.precision > far.precision
    assert near.features == "a small CNN"


def test_classifier_features_are_what_its_head_reads():
    model, images = SmallCNN(width=8), torch.randn(5, 1, 8, 8)
    expected = model.features(images).flatten(1).detach()
    found = classifier_features(model, batch_size=2)(images)
    np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Identity has no layer `head`"):
        classifier_features(torch.nn.Identity())


class Inception(torch.nn.Module):
    """A stand-in that is called like StyleGAN's file."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return x.float().mean((2, 3)) if return_features else x.float()


def test_a_users_inception_gets_uint8_colour(tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    extractor = torchscript_features(tmp_path / "inception.pt")
    assert extractor(torch.ones(2, 1, 4, 4)).tolist() == [[255.0] * 3] * 2
    assert extractor.name == "inception.pt"
    with pytest.raises(FileNotFoundError, match="no feature extractor"):
        torchscript_features(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="text.pt is no TorchScript"):
        torchscript_features(tmp_path / "text.pt")


def test_bad_features_are_refused():
    good = np.zeros((5, 3))
    with pytest.raises(ValueError, match="same d"):
        fid(good, np.zeros((5, 2)))
    with pytest.raises(ValueError, match="at least 2 images"):
        kid(good, good[:1])
    with pytest.raises(ValueError, match="generated images are not finite"):
        precision_recall(good, np.full((5, 3), np.nan))
