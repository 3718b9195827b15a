"""A stage of the demo: a classifier trained privately on the private images themselves, to compare with."""

from dataclasses import asdict
from pathlib import Path

from torch import nn

from fastloda.synthesis.arguments import Device, resolve_device
from fastloda.synthesis.budget import CHECKPOINT, EPSILON_CURVE, STATEMENT, Privacy, publish
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.methods.dp_sgd import DPSGD, network_config, train_dpsgd
from fastloda.synthesis.models import load_classifier, save_classifier
from fastloda.synthesis.runs import Stage

from .earlier import check_goes_on
from .layout import CLASSIFIER_WEIGHTS


def train_classifier_privately(
    run: Path,
    privacy: Privacy,
    data: LabelledImages,
    training: DPSGD,
    *,
    device: Device = "auto",
    progress: bool = True,
) -> nn.Module:
    """Train a classifier by DP-SGD, in dpsgd/ of the run's folder.

    `privacy.records` must be given. If a classifier with the same settings exists, it is loaded; an interrupted training
    continues.

    Raises:
        RunError: the folder contains a classifier with other settings.
    """
    place = resolve_device(device)
    settings = {"privacy": asdict(privacy), "training": asdict(training), "device": place.type}
    stage = Stage(Path(run) / "dpsgd", settings, outputs=(CLASSIFIER_WEIGHTS, STATEMENT, EPSILON_CURVE), private=True)
    if not stage.is_done():
        check_goes_on(stage, CHECKPOINT)
        with stage.work():
            options = {"device": place, "checkpoint": stage.folder / CHECKPOINT, "progress": progress}
            model, trainer = train_dpsgd(data, privacy, training, **options)
            about = network_config(data, training)
            save_classifier(model, stage.folder / CLASSIFIER_WEIGHTS, data.class_names, **about)
            publish(trainer, privacy, stage.folder / CLASSIFIER_WEIGHTS)
    network, _ = load_classifier(stage.folder / CLASSIFIER_WEIGHTS, place)
    return network
