"""The stages from public images to private synthetic ones: functions on a run's folder; `runs.py` lets them resume.

pretrain    public/model.safetensors, samples.png
finetune    private/adapter.safetensors, privacy.json, epsilon.png, checkpoint.pt (the one file that must stay private)
sample      samples/samples.npz, grid.png; of the public model alone: samples-public/
evaluate    evaluation.json
account     nothing: epsilon for noise, noise for epsilon, or several runs together
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from fastloda.accountant import PrivacyAccountant, calibrate_noise, compose_epsilon
from fastloda.adapt import attach_loda, load_loda, save_loda
from fastloda.arguments import Device, Names, resolve_device
from fastloda.budget import (
    ADJACENCY,
    CHECKPOINT,
    EPSILON_CURVE,
    SAMPLER,
    STATEMENT,
    Privacy,
    private_training,
    publish,
)
from fastloda.classify import accuracy, train_classifier
from fastloda.data import LabelledImages, digits_split, font_digits, load_npz
from fastloda.diffusion import Diffusion, UNet, UNetConfig, class_balanced_labels, digits_unet
from fastloda.diffusion import sample as draw_samples
from fastloda.diffusion.pretrain import PublicTraining
from fastloda.diffusion.pretrain import pretrain as train_on_public
from fastloda.files import write_atomically
from fastloda.models import load_unet, save_unet
from fastloda.report.plots import sample_grid
from fastloda.runs import DONE, Stage, digest, make_folder, write_json
from fastloda.schedules import Schedule
from fastloda.trainer import DPTrainer

logger = logging.getLogger("fastloda")

MODEL, ADAPTER, SAMPLES, GRID, EVALUATION = (
    "model.safetensors",
    "adapter.safetensors",
    "samples.npz",
    "grid.png",
    "evaluation.json",
)
PREVIEW_COLUMNS = 10  # images of each class in public/samples.png

with torch.device("meta"):  # for its configuration alone: no weights are drawn
    DIGITS_UNET = digits_unet().config


@dataclass(frozen=True)
class Adapter:
    """The low-dimensional adapter of each convolution (LoDA).

    Attributes:
        rank: channels between its two convolutions.
        activation: between them; "identity" is LoRA.
        negative_slope: of leaky_relu.
        scale: factor of the adapter's output.
        targets: regular expression that the whole name of a layer must match; default: every convolution.
    """

    rank: int = 4
    activation: Literal["leaky_relu", "identity"] = "leaky_relu"
    negative_slope: float = 0.1
    scale: float = 1.0
    targets: str | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"adapter.rank must be at least 1, got {self.rank}")
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise ValueError(f"adapter.targets is no regular expression: {self.targets!r} ({error})") from error


@dataclass(frozen=True)
class FineTuning:
    """How the adapters learn from the noisy gradients.

    Attributes:
        optimizer: adam, adamw or sgd.
        learning_rate: of the optimizer.
        warmup: steps of linear warm-up.
        schedule: of the learning rate after it.
        ema_decay: of the average of the adapters over the steps, which is what is released.
        label_dropout: share of labels dropped, for classifier-free guidance.
        micro_batch_size: records in memory at a time; the result does not depend on it.
        seed: of sampling and noise. Default: the operating system's randomness. A number makes an experiment that can
            be repeated, and whose noise can be foreseen.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1.5e-2
    warmup: int = 0
    schedule: Schedule = "constant"
    ema_decay: float = 0.98
    label_dropout: float = 0.1
    micro_batch_size: int = 512
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"training.label_dropout must lie in [0, 1], got {self.label_dropout}")
        if not self.learning_rate > 0 or not 0 <= self.ema_decay < 1 or self.micro_batch_size < 1 or self.warmup < 0:
            raise ValueError(
                f"training needs learning_rate > 0, 0 <= ema_decay < 1, micro_batch_size >= 1, warmup >= 0; got {self}"
            )

    def optimization(self) -> dict:
        """The fields that `PrivateTraining` has too."""
        return {name: value for name, value in asdict(self).items() if name != "label_dropout"}


@dataclass(frozen=True)
class Classifier:
    """The small CNN that is trained to judge images.

    Attributes:
        steps: optimizer steps, whatever the number of images.
        batch_size: images a step.
        lr: peak learning rate of AdamW, with a cosine schedule.
        weight_decay: of AdamW.
        width: channels of the first layer, a multiple of 8.
        seed: of its weights, batches and jitter.
    """

    steps: int = 500
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-2
    width: int = 32
    seed: int = 0


PUBLIC_TRAINING = PublicTraining(steps=2000, ema_decay=0.998)
ADAPTERS, FINE_TUNING, CLASSIFIER, NO_RUNS = Adapter(), FineTuning(), Classifier(), Names()


def pretrain(
    run: Path,
    *,
    data: str = "font-digits",
    count: int = 20_000,
    unet: UNetConfig = DIGITS_UNET,
    training: PublicTraining = PUBLIC_TRAINING,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Train a diffusion model on public images, without privacy.

    Writes public/ in the run's folder. Interrupted, it continues from its checkpoint when it is called again.

    Args:
        run: the run's folder.
        data: public images with labels: font-digits, or an npz file with arrays `images` (uint8, or floats in [-1, 1];
            NCHW or NHWC) and `labels`.
        count: of images to draw for font-digits.
        unet: shape of the U-Net; the default fits 8 x 8 digits.
        training: the optimization.
        device: where to compute.
        progress: show a bar.
    """
    place = resolve_device(device)
    settings = {"data": _full_name(data), "count": count, "unet": asdict(unet), "training": asdict(training)}
    settings |= {"device": place.type}
    inputs = () if data in NAMED else (Path(data),)
    stage = Stage(Path(run) / "public", settings, inputs, outputs=(MODEL, "samples.png"))
    if not _reuse(stage):
        images = _open_images(data, unet, count=count, seed=training.seed)
        with stage.work():
            with _seeded(training.seed):
                model = UNet(unet).to(place, memory_format=torch.channels_last)
            checkpoint = stage.folder / CHECKPOINT
            train_on_public(model, Diffusion(), images, training, checkpoint=checkpoint, progress=progress)
            save_unet(model, stage.folder / MODEL)
            labels = class_balanced_labels(PREVIEW_COLUMNS * unet.num_classes, unet.num_classes)
            preview = draw_samples(model, Diffusion(), labels, seed=training.seed, progress=progress)
            write_atomically(stage.folder / "samples.png", sample_grid(preview, labels))
        checkpoint.unlink(missing_ok=True)  # its work is done
    return {"model": str(stage.folder / MODEL)}


def finetune(
    run: Path,
    privacy: Privacy,
    *,
    data: str = "digits",
    model: Path | None = None,
    adapter: Adapter = ADAPTERS,
    training: FineTuning = FINE_TUNING,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Fit adapters of the public model to private images under (epsilon, delta)-differential privacy.

    Writes private/ in the run's folder: adapter.safetensors and privacy.json may be released, checkpoint.pt must not.
    Interrupted, it continues when it is called again, bit for bit, so that the budget is spent once. Deleting private/
    and starting anew spends it anew; what both released then counts together (`fastloda account --composition`).

    Args:
        run: the run's folder.
        privacy: the promise, from which the noise is computed.
        data: private images with labels: digits, or an npz file as in `fastloda pretrain`.
        model: folder of the public model; default: public/ in the run's folder.
        adapter: what is trained.
        training: the optimization.
        device: where to compute.
        progress: show a bar. Its loss and clipped fraction are private: for the operator's eyes.
    """
    place = resolve_device(device)
    public = _public_folder(run, model)
    network = load_unet(public / MODEL, place)
    images = _open_images(data, network.config)
    privacy = privacy.with_records(len(images))
    with _seeded(training.seed or 0):  # only where A starts: public, and independent of the noise
        attach_loda(network, **asdict(adapter))
    settings = {"data": _full_name(data), "privacy": asdict(privacy), "adapter": asdict(adapter)}
    settings |= {"training": asdict(training), "device": place.type}
    outputs = (ADAPTER, STATEMENT, EPSILON_CURVE)
    stage = Stage(Path(run) / "private", settings, (public / MODEL,), outputs, private=True)
    if not _reuse(stage):
        private = private_training(privacy, fixed_shape=place.type != "cpu", **training.optimization())
        records, losses = (images.images, images.labels), _diffusion_losses(privacy.views, training.label_dropout)
        checkpoint = stage.folder / CHECKPOINT
        trainer = DPTrainer(network, records, losses, private, checkpoint=checkpoint, progress=progress)
        with stage.work():
            trainer.fit()
            with trainer.average.in_place():
                save_loda(network, stage.folder / ADAPTER)
            publish(trainer, privacy, stage.folder)
    return read_statement(stage.folder)


def sample(
    run: Path,
    *,
    count: int = 2000,
    steps: int = 50,
    guidance: float = 0.0,
    seed: int = 0,
    public: bool = False,
    model: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Draw synthetic images, as many of each class, from the fine-tuned model.

    Writes samples/ in the run's folder. They are as private as the adapter that they come from, however many are drawn.

    Args:
        run: the run's folder.
        count: of images.
        steps: of the DDIM sampler.
        guidance: weight of classifier-free guidance; above 0 it doubles the time.
        seed: of the images; it is independent of training, and need not be secret.
        public: draw from the public model without the adapter, into samples-public/.
        model: folder of the public model; default: public/ in the run's folder.
        batch_size: images at a time; the result does not depend on it.
        device: where to compute.
        progress: show a bar.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch_size must be at least 1, got {count} and {batch_size}")
    if not 1 <= steps <= Diffusion().timesteps or not 0 <= guidance < float("inf"):
        raise ValueError(f"need 1 <= steps <= {Diffusion().timesteps} and guidance >= 0, got {steps} and {guidance}")
    place = resolve_device(device)
    base = _public_folder(run, model)
    network = load_unet(base / MODEL, place)
    inputs = (base / MODEL,) if public else (base / MODEL, _attach_trained(network, Path(run) / "private", base))
    settings = {
        "count": count,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "public": public,
        "device": place.type,
    }
    stage = Stage(Path(run) / ("samples-public" if public else "samples"), settings, inputs, (SAMPLES, GRID))
    if not _reuse(stage):
        with stage.work():
            labels = class_balanced_labels(count, network.config.num_classes)
            options = {
                "steps": steps,
                "guidance": guidance,
                "seed": seed,
                "batch_size": batch_size,
                "progress": progress,
            }
            images = draw_samples(network, Diffusion(), labels, **options)
            LabelledImages(images, labels, network.config.num_classes).save_npz(stage.folder / SAMPLES, uint8=True)
            write_atomically(stage.folder / GRID, sample_grid(images, labels))
    return {"samples": str(stage.folder / SAMPLES), "grid": str(stage.folder / GRID)}


def evaluate(
    run: Path,
    *,
    test: str = "digits-test",
    train: str | None = None,
    public: bool = False,
    classifier: Classifier = CLASSIFIER,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Train a classifier on synthetic images alone, and test it on real ones.

    Adds its accuracy to evaluation.json in the run's folder. The epsilon of the run does not cover the test images.

    Args:
        run: the run's folder.
        test: real images with labels: digits-test (360 digits that no other stage uses), or an npz file.
        train: train on these instead: digits, font-digits or an npz file. On private images this has no privacy.
        public: train on samples-public/ instead of samples/.
        classifier: its training.
        device: where to compute.
        progress: show a bar.
    """
    if train is not None and public:
        raise ValueError(f"give --train {train} or --public, not both")
    place = resolve_device(device)
    name = train or ("samples-public" if public else "samples")
    source = train or str(Path(run) / name / SAMPLES)
    if train is None and not Path(source).is_file():
        raise FileNotFoundError(f"no samples {source}: draw them with `fastloda sample{' --public' if public else ''}`")
    images = open_images(source)
    tests = open_images(test, num_classes=images.num_classes)
    if images.images.shape[1:] != tests.images.shape[1:]:
        raise ValueError(f"{source} has images of {_shape(images)}, {test} of {_shape(tests)}")
    settings = {"train": name, "test": test, "classifier": asdict(classifier), "device": place.type}
    # Synthetic images are known by their hash; a file of private ones is not hashed, and is judged anew every time.
    settings |= {"sha256": digest(Path(source))} if train is None else {}
    record = Path(run) / EVALUATION
    known = _read_json(record) if record.exists() else {}
    if known.get(name, {}).get("settings") == settings and {train or "digits", test} <= NAMED.keys():
        logger.info("%s: already there, with these settings", record)
    else:
        make_folder(Path(run))
        began = time.monotonic()
        judge = train_classifier(images, **asdict(classifier), device=place, progress=progress)
        known[name] = {
            "accuracy": accuracy(judge, tests),
            "train_images": len(images),
            "test_images": len(tests),
            "seconds": round(time.monotonic() - began, 1),
            "settings": settings,
        }
        write_json(record, known)
    return {key: value for key, value in known[name].items() if key != "settings"}


def account(
    delta: float,
    *,
    sample_rate: float | None = None,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    target_epsilon: float | None = None,
    composition: Names = NO_RUNS,
) -> dict:
    """Compute epsilon for given noise, the noise for a given epsilon, or the epsilon of several runs together.

    Epsilon is an upper bound for Poisson-sampled DP-SGD and add/remove adjacency, by the PRV accountant; that of Renyi
    DP stands beside it.

    Args:
        delta: probability with which the bound may fail.
        sample_rate: probability that a record enters a step's batch: batch size / records.
        noise_multiplier: standard deviation of the noise over the clip norm.
        steps: optimizer steps.
        target_epsilon: give this instead of noise_multiplier to get the noise.
        composition: several runs on the same records instead of all these: their folders, or privacy.json files, with
            commas between.
    """
    one = {"sample_rate": sample_rate, "steps": steps}
    if composition:
        if any(value is not None for value in (*one.values(), noise_multiplier, target_epsilon)):
            raise ValueError("--composition takes everything but --delta from the runs: give nothing else")
        return _compose([read_statement(Path(path)) for path in composition], delta)
    if missing := [f"--{name}" for name, value in one.items() if value is None]:
        raise ValueError(f"{' and '.join(missing)} missing; or give --composition")
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError("give either --noise_multiplier, to get epsilon, or --target_epsilon, to get the noise")
    if noise_multiplier is None:
        noise_multiplier = calibrate_noise(target_epsilon, delta, sample_rate, steps)
    accountant = PrivacyAccountant(sample_rate, noise_multiplier)
    epsilons = {"epsilon": accountant.epsilon(delta, steps), "epsilon_rdp": accountant.epsilon_rdp(delta, steps)}
    return epsilons | {"delta": delta, "noise_multiplier": noise_multiplier, **one}


def read_statement(path: Path) -> dict:
    """privacy.json: the file itself, or that of a run's folder or of its private/.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is none of ours.
    """
    found = [p for p in (path, path / STATEMENT, path / "private" / STATEMENT) if p.is_file()]
    if not found:
        raise FileNotFoundError(f"no {STATEMENT} at {path}: fine-tuning writes it when it has finished")
    statement = _read_json(found[0])
    if statement.get("adjacency") != ADJACENCY or statement.get("sampler") != SAMPLER:
        raise ValueError(f"{found[0]} is no privacy statement of FastLoDA")
    return statement


def _compose(statements: list[dict], delta: float) -> dict:
    runs = [(s["sample_rate"], s["noise_multiplier"], s["steps"]) for s in statements]
    return {"epsilon": compose_epsilon(runs, delta), "delta": delta, "each": [s["epsilon"] for s in statements]}


# -- what the stages share -------------------------------------------------------------------------------------------

NAMED = {
    "digits": lambda count, seed, size: digits_split()[0],
    "digits-test": lambda count, seed, size: digits_split()[1],
    "font-digits": lambda count, seed, size: font_digits(count, seed, size),
}


def open_images(
    name: str, *, num_classes: int | None = None, count: int = 20_000, seed: int = 0, size: int = 8
) -> LabelledImages:
    """A data set by name, or an npz file; count, seed and size are of font-digits.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or a label is not in 0 .. num_classes - 1.
    """
    if name in NAMED:
        images = NAMED[name](count, seed, size)
        if num_classes is not None and images.num_classes > num_classes:
            raise ValueError(f"{name} has {images.num_classes} classes, more than the {num_classes} expected")
        return images
    if not name.endswith(".npz") and not Path(name).exists():
        raise ValueError(f"data must be one of {', '.join(NAMED)} or an npz file, got {name!r}")
    images = load_npz(name, num_classes=num_classes)
    if not len(images):
        raise ValueError(f"{name} holds no images")
    return images


def _full_name(data: str) -> str:
    """The same from any working directory."""
    return data if data in NAMED else str(Path(data).resolve())


def _open_images(name: str, unet: UNetConfig, **font_digits) -> LabelledImages:
    """Images that the U-Net can take."""
    images = open_images(name, num_classes=unet.num_classes, size=unet.image_size, **font_digits)
    if images.images.shape[1:] != (unet.in_channels, unet.image_size, unet.image_size):
        wanted = f"{unet.in_channels} x {unet.image_size} x {unet.image_size}"
        raise ValueError(
            f"{name} has images of {_shape(images)}, the U-Net is for {wanted}: `fastloda pretrain` sets it by "
            "--unet.in_channels and --unet.image_size"
        )
    return images


def _shape(images: LabelledImages) -> str:
    return " x ".join(map(str, images.images.shape[1:]))


def _public_folder(run: Path, model: Path | None) -> Path:
    return Path(run) / "public" if model is None else Path(model)


def _attach_trained(network: UNet, private: Path, public: Path) -> Path:
    """Put the run's adapters on the network; returns their file."""
    if not (private / DONE).is_file():
        raise FileNotFoundError(
            f"no adapter in {private}: `fastloda finetune` makes one; or draw from the public model with --public"
        )
    if _read_json(private / DONE).get("inputs", {}).get(MODEL) != digest(public / MODEL):
        raise ValueError(f"{private / ADAPTER} adapts another model than {public / MODEL}")
    load_loda(network, private / ADAPTER)
    return private / ADAPTER


def _diffusion_losses(views: int, label_dropout: float):
    diffusion = Diffusion()

    def losses(model, batch, generator):
        x, y = batch
        return diffusion.losses(model, x, y, views=views, label_dropout=label_dropout, generator=generator)

    return losses


def _reuse(stage: Stage) -> bool:
    if done := stage.is_done():
        logger.info("%s: already there, with these settings", stage.folder)
    return done


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PyTorch's global CPU generator starts from `seed` inside, and is as it was after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
