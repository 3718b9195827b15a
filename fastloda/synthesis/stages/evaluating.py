"""The stage `evaluate`: what a classifier learns from synthetic images alone."""

import logging
import time
from dataclasses import asdict
from pathlib import Path

from fastloda.errors import UserError
from fastloda.files import held
from fastloda.synthesis.arguments import NO_NAMES, Device, Names, resolve_device
from fastloda.synthesis.classify import accuracy, train_classifier
from fastloda.synthesis.inputs import NAMED, open_images, open_tests, public_name, read_class_map
from fastloda.synthesis.runs import digest, make_folder, read_json, write_json
from fastloda.synthesis.samples import SAMPLES
from fastloda.synthesis.settings import Classifier

from .layout import EVALUATION, samples_folder

logger = logging.getLogger("fastloda")
CLASSIFIER = Classifier()


def evaluate(
    run: Path,
    *,
    test: str,
    train: str | None = None,
    public: bool = False,
    name: str | None = None,
    class_map: Names = NO_NAMES,
    skip_unreadable: bool = False,
    classifier: Classifier = CLASSIFIER,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Train a classifier on synthetic images only, and test it on real ones.

    Adds its accuracy to evaluation.json in the run's folder; no file is named there. The run's epsilon does not cover the test
    images.

    Args:
        run: folder of the run.
        test: real images with labels, of the same classes by name: a folder of images or an npz file; digits-test (360 digits
            that are not in `digits`), colour-digits-test, mnist-test:FOLDER or cifar10-test:FOLDER.
        train: images to train on instead: anything that `pretrain` and `finetune` take. With private images it has no privacy.
        public: whether to train on samples-public/ instead of samples/.
        name: name of the set of samples, if `fastloda sample` was given one.
        class_map: pairs test=train, separated by commas, for test classes that have another name in the samples.
        skip_unreadable: whether to leave out the images of a folder that cannot be read, instead of refusing the folder.
        classifier: settings of the classifier and its training.
        device: device to compute on.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
    """
    if train is not None and (public or name):
        raise UserError(f"give --train {train}, or --public or --name, not both")
    place, samples = resolve_device(device), samples_folder(public, name)
    source = train or str(Path(run) / samples / SAMPLES)
    if train is None and not Path(source).is_file():
        raise FileNotFoundError(f"no samples {source}: draw them with `fastloda sample{' --public' if public else ''}`")
    images = open_images(source, skip_unreadable=skip_unreadable)
    tests = open_tests(test, images, read_class_map(class_map), skip_unreadable=skip_unreadable)
    key = samples if train is None else public_name(train, "other images")
    settings = {"test": public_name(test, "test images"), "classifier": asdict(classifier), "device": place.type}
    # Samples are identified by their hash. No other file is hashed, since it may be private: its results are computed each time.
    settings |= {"sha256": digest(Path(source))} if train is None else {}
    record = Path(run) / EVALUATION
    known = read_json(record) if record.exists() else {}
    if known.get(key, {}).get("settings") == settings and {train or "digits", test} <= NAMED:
        logger.info("%s: already there, with these settings", record)
    else:
        make_folder(Path(run))
        began = time.monotonic()
        try:
            judge = train_classifier(images, **asdict(classifier), device=place, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command trains this classifier anew, and keeps all else") from None
        result = {
            "accuracy": accuracy(judge, tests),
            "train_images": len(images),
            "test_images": len(tests),
            "seconds": round(time.monotonic() - began, 1),
            "settings": settings,
        }
        known = _added(record, key, result)
    return {key: value for key, value in known[key].items() if key != "settings"}


def _added(record: Path, key: str, result: dict) -> dict:
    """Add a result to the file of results, which another process may have changed in the meantime, and return them all."""
    with record.with_name(f".{record.name}.lock").open("w") as lock, held(lock):
        known = (read_json(record) if record.exists() else {}) | {key: result}
        write_json(record, known)
    return known
