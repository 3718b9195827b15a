"""Callbacks see each step; neither they nor an evaluation change, lose or repeat a step."""

import dataclasses
import random
from functools import partial

import numpy as np
import pytest
import torch
from small_runs import SETTINGS, assert_same_run, losses, small_data, trainer

from fastloda import evaluate_every


def test_a_callback_is_told_of_each_step():
    reports = []
    made = trainer(callbacks=[lambda _, report: reports.append(report)]).fit()
    assert [(r.step, r.steps_left) for r in reports] == [(n, 8 - n) for n in range(1, 9)]
    epsilons = [r.epsilon for r in reports]
    assert epsilons == sorted(epsilons) and epsilons[-1] == made.epsilon()
    exact = [made.accountant.epsilon(SETTINGS.delta, n) for n in range(1, 9)]
    assert all(bound >= true * (1 - 1e-9) for bound, true in zip(epsilons, exact))
    again = trainer()
    assert [r.private.mean_loss for r in reports] == [again.train_step().mean_loss for _ in range(8)]


def test_steps_left_count_to_the_budget():
    left = []
    with pytest.warns(UserWarning, match="stops after"):
        trainer(
            dataclasses.replace(SETTINGS, target_epsilon=3.0, steps=30),
            callbacks=[lambda _, report: left.append(report.steps_left)],
        ).fit()
    assert left[-1] == 0 and len(left) == left[0] + 1 < 30


def careless(trainer, report=None):
    """Draw from every generator, train nothing, and leave modes and gradients behind."""
    torch.randn(3), np.random.rand(), random.random()
    torch.randn(3, generator=trainer.run.generators["losses"])
    losses(trainer.model, small_data(), trainer.run.generators["losses"]).mean().backward()


def modes(trainer, report=None):
    trainer.model.train()
    trainer.model[2].eval()
    careless(trainer)


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("callback", [careless, evaluate_every(3, careless), evaluate_every(1, modes)])
def test_the_run_is_the_same_bit_for_bit(tmp_path, callback, seed):
    settings, path = dataclasses.replace(SETTINGS, seed=seed), tmp_path / "run.pt"
    trainer(settings, checkpoint=path).save()  # so that both runs resume with one secret
    runs = []
    for callbacks in ([], [callback]):
        made = trainer(settings, checkpoint=path, callbacks=callbacks)
        made.run.checkpoint = None
        runs.append(made.fit())
    assert_same_run(*runs)


def test_an_evaluation_sees_the_average_in_eval_mode_and_all_is_put_back():
    seen = []

    def evaluate(made):
        assert not made.model.training and not made.model[2].training
        assert all(torch.equal(p, made.average.values[name]) for name, p in made.parameters.items())
        seen.append(made.step)

    made = trainer(callbacks=[evaluate_every(3, evaluate)])
    made.model[1].eval()
    made.fit()
    assert seen == [3, 6, 8]
    assert made.model.training and made.model[2].training and not made.model[1].training
    assert any(not torch.equal(p, made.average.values[name]) for name, p in made.parameters.items())


class Stop(Exception):
    pass


def stop_at(number, made, report):
    made.model.eval()
    if report.step == number:
        raise Stop


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_callback_that_raises_loses_and_repeats_no_step(tmp_path, evaluating, secure, recwarn):
    settings = dataclasses.replace(SETTINGS, seed=None, secure_noise=secure)
    callback = partial(stop_at, 3)
    if evaluating:
        callback = evaluate_every(
            3, lambda made: stop_at(3, made, dataclasses.make_dataclass("R", ["step"])(made.step))
        )
    make = partial(trainer, settings, checkpoint=tmp_path / "run.pt")
    first = make(callbacks=[callback])
    with pytest.raises(Stop):
        first.fit()
    second = make()
    assert second.step == 3
    assert_same_run(first, second)
    assert second.fit().step == 8 and second.accountant.steps == 8
    assert not recwarn.list  # no step was charged without need


ACTS = {
    "train_step": lambda made: made.train_step(),
    "save": lambda made: made.save(),
    "averaged": lambda made: made.averaged().__enter__(),
}


@pytest.mark.parametrize("act", ACTS)
def test_the_average_is_neither_trained_nor_saved_as_the_parameters(tmp_path, act):
    made = trainer(checkpoint=tmp_path / "run.pt")
    made.train_step()
    with made.averaged(), pytest.raises(ValueError, match="the model holds the averaged parameters"):
        ACTS[act](made)
    assert made.train_step() and made.step == 2


@pytest.mark.parametrize("steps", [0, 2.5])
def test_an_evaluation_every_no_steps_is_refused(steps):
    with pytest.raises(ValueError, match="steps >= 1"):
        evaluate_every(steps, careless)
