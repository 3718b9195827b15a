"""Users' own optimizers and schedulers: they train, resume bit for bit, and can't bypass the private step."""

import dataclasses
import warnings
from functools import partial

import pytest
import torch
from small_runs import RUN, SETTINGS, assert_same_run, small_model, trainer
from torch import nn
from torch.optim import SGD, Adagrad, Adam, NAdam, RMSprop
from torch.optim import lr_scheduler as schedulers

from fastloda import PrivacyError, PrivateTraining
from fastloda.training.checkpoint import CheckpointError


def trainable(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def warm_up_then_cosine(optimizer):
    parts = [schedulers.LinearLR(optimizer, 0.2, total_iters=3), schedulers.CosineAnnealingLR(optimizer, 5)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3])


OWN = {
    "NAdam": (NAdam, None),
    "RMSprop, steps": (partial(RMSprop, lr=1e-2, momentum=0.5), lambda o: schedulers.StepLR(o, 2, 0.5)),
    "Adagrad, decay": (partial(Adagrad, lr=1e-2), lambda o: schedulers.ExponentialLR(o, 0.7)),
    "SGD, one cycle": (partial(SGD, lr=1e-2, momentum=0.9), partial(schedulers.OneCycleLR, max_lr=1e-2, total_steps=8)),
    "SGD, in parts": (partial(SGD, lr=1e-2, nesterov=True, momentum=0.9), warm_up_then_cosine),
    "the settings', milestones": (None, partial(schedulers.MultiStepLR, milestones=[2, 5])),
}


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("own", OWN)
def test_ones_own_resume_bit_for_bit(tmp_path, own, seed):
    optimizer, scheduler = OWN[own]
    settings = dataclasses.replace(SETTINGS, seed=seed)
    make = partial(trainer, settings, optimizer=optimizer, scheduler=scheduler)
    first = make(checkpoint=tmp_path / "run.pt")
    for _ in range(3):
        first.train_step()
    first.save()
    second = make(checkpoint=tmp_path / "run.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            second.train_step()
    again = make(checkpoint=tmp_path / "run.pt")
    again.fit()
    assert_same_run(second, again)
    if seed is not None:
        assert_same_run(make().fit(), again)


def test_ones_own_is_the_settings_optimizer_if_it_says_the_same():
    of_settings = trainer(dataclasses.replace(SETTINGS, learning_rate=1e-2, optimizer="sgd", momentum=0.5)).fit()
    model = small_model()
    optimizer = SGD(trainable(model), lr=1e-2, momentum=0.5)
    of_ones_own = trainer(model=model, optimizer=optimizer, scheduler=schedulers.ConstantLR(optimizer, 1.0)).fit()
    assert_same_run(of_settings, of_ones_own)
    assert of_ones_own.optimizer is optimizer


def test_the_scheduler_is_stepped_once_a_step():
    made = trainer(optimizer=partial(SGD, lr=0.5), scheduler=partial(schedulers.StepLR, step_size=1, gamma=0.5))
    rates = []
    for _ in range(3):
        rates.append(made.optimizer.param_groups[0]["lr"])
        made.train_step()
    assert rates == [0.5, 0.25, 0.125]


def test_the_settings_schedule_applies_to_ones_own_optimizer():
    made = trainer(dataclasses.replace(SETTINGS, warmup=4), optimizer=partial(SGD, lr=0.8))
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_charged_steps_move_the_scheduler_too(tmp_path):
    """With secure noise the steps after the checkpoint are charged, so that their learning rates have passed as well."""
    settings = dataclasses.replace(SETTINGS, seed=None, secure_noise=True)
    make = partial(trainer, settings, optimizer=partial(SGD, lr=1.0), checkpoint=tmp_path / "run.pt")
    make = partial(make, scheduler=partial(schedulers.MultiplicativeLR, lr_lambda=halve))
    first = make()
    first.save()
    for _ in range(3):
        first.train_step()
    with pytest.warns(UserWarning, match="3 steps may have been released"):
        second = make()
    assert second.optimizer.param_groups[0]["lr"] == 0.125


def halve(step):
    return 0.5


class Closing(SGD):
    def step(self, closure):
        return super().step(closure)


class Unpicklable(SGD):
    def state_dict(self):
        return super().state_dict() | {"made by": halve}


def moved(params):
    optimizer = Adam(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


STRAY = nn.Parameter(torch.zeros(2))
SLIPS = {
    "too few": (dict(optimizer=lambda params: SGD(params[:1], 0.1)), PrivacyError, "lacks trainable parameters"),
    "too many": (dict(optimizer=lambda params: SGD([*params, STRAY], 0.1)), PrivacyError, "no trainable parameter"),
    "another model's": (dict(optimizer=SGD(trainable(small_model()), 0.1)), PrivacyError, "no trainable parameter"),
    "LBFGS": (dict(optimizer=torch.optim.LBFGS), PrivacyError, "LBFGS"),
    "a closure": (dict(optimizer=partial(Closing, lr=0.1)), ValueError, "closure of the loss"),
    "no optimizer": (dict(optimizer=lambda params: params), ValueError, "must be a torch.optim.Optimizer"),
    "steps taken": (dict(optimizer=moved), ValueError, "has taken steps already"),
    "a metric": (dict(scheduler=schedulers.ReduceLROnPlateau), PrivacyError, "follows a metric"),
    "no scheduler": (dict(scheduler=lambda optimizer: None), ValueError, "must be a torch.optim.lr_scheduler"),
    "a scheduler of another": (
        dict(scheduler=schedulers.StepLR(SGD([STRAY], 0.1), 1)),
        ValueError,
        "another optimizer",
    ),
    "a learning rate twice": (
        dict(optimizer=Adam, settings=dataclasses.replace(SETTINGS, learning_rate=0.1)),
        ValueError,
        r"settings.learning_rate=0.1 has no effect beside DPTrainer\(optimizer=...\): leave it out",
    ),
    "a warm-up twice": (
        dict(scheduler=partial(schedulers.StepLR, step_size=1), settings=dataclasses.replace(SETTINGS, warmup=2)),
        ValueError,
        "settings.warmup=2 has no effect",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_what_cannot_serve_is_refused_before_anything_changes(slip):
    options, error, said = SLIPS[slip]
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=said):
        trainer(model=model, **options)
    if slip != "steps taken":  # this slip moves the model itself
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_that_no_checkpoint_can_hold_is_refused_before_it_is_paid_for(tmp_path):
    own = partial(Unpicklable, lr=0.1)
    with pytest.raises(ValueError, match="Unpicklable.state_dict.. can't be kept in a checkpoint"):
        trainer(optimizer=own, checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())
    assert trainer(optimizer=own).fit().step == 8


def test_parameters_that_are_added_later_are_refused_before_the_step():
    made = trainer(optimizer=partial(SGD, lr=0.1))
    made.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(PrivacyError, match="no trainable parameter"):
        made.train_step()
    assert made.step == 0


FIRST = dict(optimizer=partial(SGD, lr=0.1, momentum=0.9), scheduler=partial(schedulers.StepLR, step_size=2))
OTHERS = {
    "class": dict(optimizer=partial(RMSprop, lr=0.1, momentum=0.9)),
    "the settings'": dict(optimizer=None),
    "rate": dict(optimizer=partial(SGD, lr=0.2, momentum=0.9)),
    "momentum": dict(optimizer=partial(SGD, lr=0.1, momentum=0.8)),
    "order": dict(optimizer=lambda params: SGD(params[::-1], lr=0.1, momentum=0.9)),
    "scheduler": dict(scheduler=partial(schedulers.CosineAnnealingLR, T_max=2)),
    "its settings": dict(scheduler=partial(schedulers.StepLR, step_size=3)),
    "its absence": dict(scheduler=None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_is_not_resumed_with_another(tmp_path, other):
    trainer(**FIRST, checkpoint=tmp_path / "run.pt").save()
    said = "the scheduler is" if "scheduler" in OTHERS[other] else "the optimizer is"
    with pytest.raises(CheckpointError, match=said):
        trainer(**FIRST | OTHERS[other], checkpoint=tmp_path / "run.pt")
    trainer(**FIRST, checkpoint=tmp_path / "run.pt")


# -- noise for a target ------------------------------------------------------------------------------------------------


def test_a_target_alone_gives_the_noise_that_spends_it():
    settings = PrivateTraining(**RUN, target_epsilon=8.0, earlier=((1.0, 5.0, 1),))
    made = trainer(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.fit()
    assert made.step == 8 and 0.99 * 8.0 < made.epsilon() <= 8.0
    assert PrivateTraining(**RUN, target_epsilon=8.0).noise_multiplier < settings.noise_multiplier


def test_both_keep_their_meaning_and_none_is_refused():
    assert PrivateTraining(**RUN, target_epsilon=8.0, noise_multiplier=0.3).noise_multiplier == 0.3
    with pytest.raises(ValueError, match="give noise_multiplier, or the target_epsilon"):
        PrivateTraining(**RUN)
    with pytest.raises(ValueError, match="too little is left"):
        PrivateTraining(**RUN, target_epsilon=1.0, earlier=((1.0, 1.0, 1),))
