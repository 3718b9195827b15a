"""Averages made after training, compared with those tracked from the start, and runs that resume with their snapshots."""

import math

import numpy as np
import pytest
import torch
from small_runs import SETTINGS, trainer
from torch import nn

from fastloda.errors import UserError
from fastloda.synthesis.data.images import LabelledImages
from fastloda.synthesis.diffusion import UNet, UNetConfig
from fastloda.synthesis.diffusion.pretrain import PublicTraining, pretrain
from fastloda.training.posthoc import KEPT, LONGEST, MISFIT, Snapshots, power, weights

STEPS = 640


def tracked(length, walk):
    """Compute the average [steps, numbers] of a walk as training would, step by step."""
    average = walk[0]
    for step in range(1, len(walk) + 1):
        average = torch.lerp(average, walk[step - 1], 1 - ((step - 1) / step) ** power(length))
    return average


def followed(walk, count, left_out=()):
    parameter = nn.Parameter(walk[0].clone())
    snapshots = Snapshots({"p": parameter}, len(walk), count)
    for step, values in enumerate(walk, start=1):
        parameter.data = values
        if step not in left_out:
            snapshots.update(step)
    return snapshots


@pytest.mark.parametrize("drift", [0.0, 0.2])
@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.1, 0.15, 0.2])
def test_an_average_of_any_length_is_the_one_tracked_all_the_way(length, drift):
    torch.manual_seed(0)
    walk = torch.cumsum(torch.randn(STEPS, 50, dtype=torch.float64) + drift, 0) + 100
    wanted, got = tracked(length, walk), followed(walk, 32).average(length)["p"]
    scale = (walk - wanted).square().mean().sqrt()
    assert (got - wanted).square().mean().sqrt() < (1e-9 if length in KEPT else 0.01) * scale
    others = [tracked(other, walk) for other in (0.6 * length, min(LONGEST, 1.6 * length))]
    assert min((got - other).norm() for other in others if not torch.equal(other, wanted)) > 5 * (got - wanted).norm()


@pytest.mark.parametrize("length", [0.02, 0.05, 0.2, LONGEST])
def test_weights_are_of_their_length(length):
    found, place = weights(length, 20_000, 20_000), np.arange(1, 20_001) / 20_000
    assert found.sum() == pytest.approx(1) and (found > 0).sum() > 19_000 * length
    assert math.sqrt(found @ place**2 - (found @ place) ** 2) == pytest.approx(length, rel=1e-3)
    assert not weights(length, 7, 20)[7:].any() and weights(length, 7, 20)[:7].sum() == pytest.approx(1)


def test_steps_that_were_lost_are_given_to_the_next():
    walk = torch.cumsum(torch.randn(STEPS, 5, dtype=torch.float64), 0)
    lost = range(301, 305)
    without = walk.clone()
    without[300:304] = walk[304]
    snapshots = followed(walk, 32, lost)
    torch.testing.assert_close(snapshots.average(0.07), followed(without, 32).average(0.07), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_averaged_is_refused():
    walk = torch.zeros(STEPS, 1, dtype=torch.float64)
    with pytest.raises(UserError, match="no snapshots .*: train with snapshots=32"):
        followed(walk, 0).average(0.1)
    for length in (0, -0.1, 0.3, math.nan):
        with pytest.raises(UserError, match="length of an average must be above 0"):
            followed(walk, 8).average(length)
    with pytest.raises(UserError, match="off by .*%: 4 snapshots are too few"):
        followed(walk, 4).average(0.02)
    with pytest.raises(UserError, match="off by .*%: 32 snapshots are too few"):
        followed(walk, 32).average(LONGEST)  # one copy holds all of the first steps
    for count in (-1, 1.5, True):
        with pytest.raises(UserError, match="snapshots must be an integer >= 0"):
            followed(walk, count)
    assert MISFIT < 0.1


def test_a_private_run_makes_its_averages_after_it_has_resumed(tmp_path):
    first = trainer(SETTINGS, checkpoint=tmp_path / "run.pt", snapshots=4)
    for _ in range(5):
        first.train_step()
    first.save()
    first.fit()
    again = trainer(SETTINGS, checkpoint=tmp_path / "run.pt", snapshots=4).fit()
    own = {name: p.detach().clone() for name, p in first.parameters.items()}
    with first.averaged(length=0.2), again.averaged(length=0.2):
        for name, p in first.parameters.items():
            assert torch.equal(p, again.parameters[name]) and not torch.equal(p, own[name])
    assert all(torch.equal(p, own[name]) for name, p in first.parameters.items())
    with pytest.raises(UserError, match="begun with snapshots=4, and not 0"):
        trainer(SETTINGS, checkpoint=tmp_path / "run.pt")


def test_pretraining_leaves_the_average_that_was_asked_for(tmp_path):
    data = LabelledImages(torch.randn(20, 1, 8, 8).clamp(-1, 1), torch.randint(2, (20,)), 2)
    settings = PublicTraining(steps=40, batch_size=4, warmup=1)
    found = {}
    for length in (0.05, 0.1, None):  # the second and third call train nothing
        model = UNet(
            UNetConfig(image_size=8, in_channels=1, width=8, multipliers=(1,), blocks_per_level=1, norm_groups=4)
        )
        pretrain(model, data, settings, checkpoint=tmp_path / "m.pt", progress=False, snapshots=10, length=length)
        found[length] = torch.cat([p.detach().flatten() for p in model.parameters()])
    taken = torch.load(tmp_path / "m.pt", weights_only=True)["state"]["snapshots"]["taken"]
    assert [(step, kept) for step, kept, _ in taken] == [(4 * n, kept) for n in range(1, 11) for kept in KEPT]
    for kept, (*_, values) in zip(KEPT, taken[-2:]):
        torch.testing.assert_close(found[kept], torch.cat([value.flatten() for value in values.values()]))
    assert not torch.equal(found[0.05], found[0.1]) and not torch.equal(found[None], found[0.1])
