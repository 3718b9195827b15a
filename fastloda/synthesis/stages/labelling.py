"""The stage `label`: a classifier trained privately, which labels the samples in place of the classes they are drawn for."""

import logging
from dataclasses import asdict
from pathlib import Path

from fastloda.errors import UserError
from fastloda.synthesis.account import known_releases, read_statement
from fastloda.synthesis.arguments import NO_NAMES, Device, Names, resolve_device
from fastloda.synthesis.bases import OwnUNet
from fastloda.synthesis.budget import CHECKPOINT, STATEMENT, check_delta, nominal_records, release_statement, with_ids
from fastloda.synthesis.data import listed
from fastloda.synthesis.methods.dp_sgd import network_config
from fastloda.synthesis.methods.private_labels import PrivateLabels
from fastloda.synthesis.models import save_classifier
from fastloda.synthesis.runs import CONFIG, Stage, digest, reuse, write_json
from fastloda.training.releases import intent_path

from .choosing import chosen_images
from .earlier import check_comes_first, check_goes_on
from .layout import CHOSEN, CHOSEN_IMAGES, CLASSIFIER_WEIGHTS, LABELS
from .private_images import PRIVATE_NAME, about_private, open_private, source_of

logger = logging.getLogger("fastloda")


def label(
    run: Path,
    labels: PrivateLabels,
    *,
    delta: float,
    data: str,
    name: str = PRIVATE_NAME,
    class_map: Names = NO_NAMES,
    skip_unreadable: bool = False,
    records: int | None = None,
    seed: int | None = None,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Train a classifier privately, which then labels the samples.

    This stage is optional, and comes between `choose` and `finetune`. A sample that was asked for as one class and looks like
    another teaches the wrong thing; a classifier that has learned from the private images says which class it shows
    (`methods/private_labels.py`). It is trained on the public images that `choose` left, then on the private ones by DP-SGD.
    Writes labels/ in the run's folder. `sample` then labels with it, and the target epsilon of `finetune` covers it too. If
    interrupted, it continues. Once it has finished, all of labels/ except its .yaml files and done.json may be released, on the
    terms in its privacy.json, which counts what `choose` released too.

    Args:
        run: folder of the run, in which `choose` has finished.
        labels: settings of the classifier. Noise, number of steps and of records in each determine its cost, which is shown
            before it starts: `fastloda account` computes it beforehand.
        delta: delta for which epsilon is reported; the same as for `finetune`, below 1 / records.
        data: private images, as in `fastloda finetune`.
        name: public name of the private images, which is written to privacy.json.
        class_map: as in `fastloda finetune`.
        skip_unreadable: whether to leave out the images of a folder that cannot be read, instead of refusing the folder.
        records: public, nominal number of private records. Default: the count of the data, which thereby becomes public.
        seed: seed of the noise and of everything else. Default: the operating system's randomness. A number makes an experiment
            that can be repeated, and whose noise can be foreseen.
        device: device to compute on.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
    """
    place, folder = resolve_device(device), Path(run) / CHOSEN
    chosen = chosen_images(folder)
    private = open_private(data, OwnUNet(folder, place), class_map, skip_unreadable, name)
    if private.class_names != chosen.class_names:
        raise UserError(
            f"{data} has the classes {listed(private.class_names)}, but images were chosen for {listed(chosen.class_names)}"
        )
    nominal = nominal_records(records, len(private), "--records")
    check_delta("delta", delta, nominal)
    statement = about_private(name, private.class_names)
    before = known_releases(read_statement(folder))
    statement |= release_statement(labels.releases(nominal), delta, nominal, seed, before=before)
    training = labels.private_training(nominal, delta, seed, place)
    training.check_units(len(private), "record")
    settings = {"labels": asdict(labels), "delta": delta, "records": nominal, "name": name, "seed": seed}
    settings |= {"device": place.type}
    source, inputs = source_of(data, class_map, skip_unreadable), (folder / CHOSEN_IMAGES,)
    stage = Stage(Path(run) / LABELS, settings, inputs, (CLASSIFIER_WEIGHTS, STATEMENT), private=True, source=source)
    checkpoint = stage.folder / CHECKPOINT
    if not reuse(stage):
        check_comes_first(stage, CONFIG)
        check_goes_on(stage, CHECKPOINT)
        logger.info("with the classifier that labels, epsilon comes to %.3g so far", statement["epsilon"])
        with stage.work():
            options = {"seed": seed, "device": place, "progress": progress}
            network = labels.teacher(private, chosen, training, checkpoint=checkpoint, **options)
            about = network_config(chosen, labels.training)
            save_classifier(network, stage.folder / CLASSIFIER_WEIGHTS, chosen.class_names, **about)
            write_json(stage.folder / STATEMENT, with_ids(statement, digest(stage.folder / CLASSIFIER_WEIGHTS)))
    for kept in (checkpoint, intent_path(checkpoint)):  # also if an earlier call was killed just before
        kept.unlink(missing_ok=True)
    return read_statement(stage.folder) | {"classifier": str(stage.folder / CLASSIFIER_WEIGHTS)}
