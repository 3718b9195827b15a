"""The stages from public images to private synthetic ones: functions on a run's folder, which `runs.py` makes resumable.

pretrain    public/model.safetensors, samples.png
choose      chosen/model.safetensors, samples.png, sums.safetensors, privacy.json: the public model, trained further
finetune    layers/privacy.json, if it chooses the layers to adapt, with the numbers by which it chooses
            private/adapter.safetensors, privacy.json, epsilon.png; checkpoint.pt and source.yaml, which must stay private
sample      samples/ as `samples.py` writes it; samples-NAME/ for another set; samples-public/ from the public model alone
dpsgd       dpsgd/classifier.safetensors, privacy.json: a classifier trained on the private images themselves
evaluate    evaluation.json

Classes are matched by name: those of the public model, the private images, the samples and the tests.
"""

import logging
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.loda.attach import load_loda, save_loda
from fastloda.privacy.ranks import World
from fastloda.randomness import seeded
from fastloda.synthesis.account import known_releases, read_statement, releases
from fastloda.synthesis.arguments import Device, Names, resolve_device
from fastloda.synthesis.bases import MODEL, Base, OwnUNet, class_prompts, open_base
from fastloda.synthesis.budget import (
    ADJACENCY,
    CHECKPOINT,
    EPSILON_CURVE,
    OWNER_ADJACENCY,
    STATEMENT,
    Privacy,
    check_delta,
    fit_average,
    nominal_records,
    private_trainer,
    private_training,
    publish,
    release_statement,
)
from fastloda.synthesis.classify import accuracy, train_classifier
from fastloda.synthesis.data import LabelledImages, listed, mapped_names, read_owners, relabelled
from fastloda.synthesis.diffusion import TIMESTEPS, UNet, class_balanced_labels
from fastloda.synthesis.diffusion import sample as draw_samples
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.inputs import (
    NAMED,
    OWN_IMAGES,
    files_of,
    full_name,
    open_for_unet,
    open_images,
    open_public,
    open_tests,
    public_name,
    read_class_map,
)
from fastloda.synthesis.methods.central_images import CentralImages
from fastloda.synthesis.methods.class_embeddings import ClassEmbeddings
from fastloda.synthesis.methods.class_queries import ClassQueries
from fastloda.synthesis.methods.diffusion_model import PublicModel
from fastloda.synthesis.methods.dp_sgd import DPSGD, make_classifier, train_dpsgd
from fastloda.synthesis.methods.gaussian_release import noise_stream
from fastloda.synthesis.methods.layer_choice import LayerChoice, once
from fastloda.synthesis.methods.moves import UNMOVED, Reach, moved
from fastloda.synthesis.methods.public_choice import PublicChoice
from fastloda.synthesis.methods.warm_up import InTurn, Released, load_released, save_released
from fastloda.synthesis.models import save_unet
from fastloda.synthesis.runs import CONFIG, DONE, RunError, Stage, digest, make_folder, read_json, write_json
from fastloda.synthesis.samples import GRID, IMAGES, PART, README, SAMPLES, contact_sheet, draw_resumably, write_samples
from fastloda.synthesis.settings import OF_THE_LOSSES, Adapter, Classifier, Drawing, FineTuning, UNetShape
from fastloda.training.saliency import Saliency, release_saliency

logger = logging.getLogger("fastloda")

ADAPTER, EVALUATION = "adapter.safetensors", "evaluation.json"
CLASSIFIER_WEIGHTS = "classifier.safetensors"
PUBLIC, CHOSEN, LAYERS, PRIVATE = "public", "chosen", "layers", "private"
SUMS, PREVIEW = "sums.safetensors", "samples.png"
PREVIEW_COLUMNS = 10  # number of images of each class in the preview

PUBLIC_TRAINING, SHAPE, NO_NAMES = PublicTraining(steps=2000, ema_decay=0.998), UNetShape(), Names()
ADAPTERS, FINE_TUNING, CLASSIFIER, ALL_LAYERS = Adapter(), FineTuning(), Classifier(), LayerChoice()
QUERIES, MEANS, CHOICE, BY_CHOICE = ClassQueries(), CentralImages(), PublicChoice(), Names([PublicChoice.kind])
PRIVATE_NAME = "private images"


def pretrain(
    run: Path,
    *,
    data: str,
    size: int | None = None,
    channels: int | None = None,
    count: int = 20_000,
    skip_unreadable: bool = False,
    unet: UNetShape = SHAPE,
    training: PublicTraining = PUBLIC_TRAINING,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Train a diffusion model on public images, without privacy.

    Writes public/ in the run's folder. If interrupted, it continues from its checkpoint when it is called again. The model has
    the classes of the images, with their names, and as many channels.

    Args:
        run: folder of the run.
        data: public images with labels: a folder of images, with a subfolder for each class; or an npz file with the arrays
            `images` (uint8, or floats in [-1, 1] or in the range that `range` gives, as [0, 1]; NCHW or NHWC), `labels` (from 0),
            and optionally `num_classes` and `class_names`; or font-digits or colour-font-digits; or a published set in a folder,
            as in svhn:FOLDER, imagenet32:FOLDER or imagenet10:FOLDER (its ten classes that match CIFAR-10's).
        size: side in pixels; the central square of each image in a folder is resized to it. Default: the largest of 8, 16, 24,
            32, 48 and 64 that is not above the side of any image.
        channels: number of channels, 1 or 3. Default: 1 if all images are grey, else 3.
        count: number of images to draw for font-digits and colour-font-digits.
        skip_unreadable: whether to leave out the images of a folder that cannot be read, instead of refusing the folder.
        unet: shape of the U-Net.
        training: settings of the optimization.
        device: device to compute on.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
    """
    place = resolve_device(device)
    reading = {"size": size, "channels": channels, "count": count, "skip_unreadable": skip_unreadable}
    settings = {
        "data": public_name(data, OWN_IMAGES),
        **reading,
        "unet": asdict(unet),
        "training": asdict(training),
        "device": place.type,
    }
    source = {"data": full_name(data)}
    stage = Stage(Path(run) / PUBLIC, settings, files_of(data), outputs=(MODEL, PREVIEW), source=source)
    if not _reuse(stage):
        images = open_public(data, seed=training.seed, **reading)
        method, checkpoint = PublicModel(unet.config(images), training), stage.folder / CHECKPOINT
        with stage.work():
            model = method.train(images, training.seed, place, checkpoint, progress)
            save_unet(model, stage.folder / MODEL, images.class_names)
            names = images.class_names
            _draw_preview(model, names, names, stage.folder, training.seed, progress)
        checkpoint.unlink(missing_ok=True)  # the finished model replaces it
    return {"model": str(stage.folder / MODEL)}


def choose(
    run: Path,
    *,
    delta: float,
    data: str,
    public: str,
    name: str = PRIVATE_NAME,
    class_map: Names = NO_NAMES,
    skip_unreadable: bool = False,
    by: Names = BY_CHOICE,
    queries: ClassQueries = QUERIES,
    means: CentralImages = MEANS,
    choice: PublicChoice = CHOICE,
    records: int | None = None,
    count: int = 100_000,
    model: Path | None = None,
    seed: int | None = None,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Train the public model a little further, on those public images that resemble the private ones.

    This stage is optional, and comes between `pretrain` and `finetune`. A noisy sum of the private images' features tells which
    public images these are, and how to move them closer to the private ones (`methods/public_choice.py`). Other sums are votes
    for public classes (`methods/class_queries.py`) or the mean image of each class (`methods/central_images.py`). Several sums
    are released together and used one after another. Writes chosen/ in the run's folder. `finetune` and `sample` then use its
    model, and the target epsilon of `finetune` covers these releases too, whichever model it adapts. All of chosen/ except
    source.yaml may be released, on the terms in its privacy.json. If interrupted, it continues; the sums are drawn only once.
    It must come before `finetune`: if the run is fine-tuned already, use another run.

    Args:
        run: folder of the run.
        delta: delta for which epsilon is reported; the same as for `finetune`, below 1 / records.
        data: private images, as in `fastloda finetune`.
        public: public images to choose from, as in `fastloda pretrain`; more and more varied ones are better. If `queries` is
            first, they may have any classes, and many, as font-styles has.
        name: public name of the private images, which is written to privacy.json.
        class_map: as in `fastloda finetune`.
        skip_unreadable: whether to leave out the images of a folder that cannot be read, instead of refusing the folder.
        by: the releases to make, in this order, separated by commas: queries, means, choice. The settings of each are below. Only
            its noise_multiplier determines its cost: epsilon 0.7 for 5, and 0.4 for 8, at delta 1e-5.
        queries: settings of the votes for public classes, and of the training that follows.
        means: settings of the central images, and of the training that follows.
        choice: settings of the features by which public images are chosen and moved, and of the training that follows.
        records: public, nominal number of private records. Default: the count of the data, which thereby becomes public. All
            classes are assumed to be equally frequent.
        count: number of images to draw for font-digits and colour-font-digits.
        model: folder of the public model. Default: public/ in the run's folder.
        seed: seed of the noise and of everything else. Default: the operating system's randomness. A number makes an experiment
            that can be repeated, and whose noise can be foreseen.
        device: device to compute on.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
    """
    place = resolve_device(device)
    folder = Path(run) / PUBLIC if model is None else Path(model)
    base = OwnUNet(folder, place)
    network, known = base.network, base.class_names
    if base.chosen_privately:  # the release that it was made from would not be counted
        raise UserError(f"{folder} holds a model of chosen images already: choose for the public model, once")
    private = _open_private(data, base, class_map, skip_unreadable, name)
    nominal = nominal_records(records, len(private), "--records")
    check_delta("delta", delta, nominal)
    warm_ups = {part.kind: part for part in (queries, means, choice)}
    if not set(by) <= set(warm_ups):
        raise UserError(f"--by takes {', '.join(warm_ups)}, got {listed(by)}")
    warm_up = InTurn(tuple(warm_ups[kind] for kind in by))
    settings = {"delta": delta, "by": list(by)} | {part.kind: asdict(part) for part in warm_up.parts}
    settings |= {"records": nominal, "name": name, "public": public_name(public, OWN_IMAGES)}
    settings |= {"count": count, "seed": seed, "device": place.type}
    outputs, inputs = (MODEL, PREVIEW, SUMS, STATEMENT), (base.file, *files_of(public))
    source = _source(data, class_map, skip_unreadable) | {"public": full_name(public)}
    stage = Stage(Path(run) / CHOSEN, settings, inputs, outputs, private=True, source=source)
    if not _reuse(stage):
        options = {"count": count, "seed": seed or 0, "skip_unreadable": skip_unreadable}
        pool = warm_up.pool(open_for_unet(public, network.config, **options), private.class_names)
        _check_comes_first(stage.folder, Path(run) / PRIVATE)
        with stage.work():
            released = _released_once(stage, warm_up, private, pool, seed)
            numbers = torch.tensor([known.index(name) for name in private.class_names])
            options = {"numbers": numbers, "checkpoint": stage.folder / CHECKPOINT, "progress": progress}
            warm_up.train_further(network, pool, released, seed or 0, **options)
            save_unet(network, stage.folder / MODEL, known, chosen_privately=True)
            _draw_preview(network, known, private.class_names, stage.folder, seed or 0, progress)
        for checkpoint in stage.folder.glob(f"*{CHECKPOINT}"):
            checkpoint.unlink()
    return read_statement(stage.folder) | {"model": str(stage.folder / MODEL)}


def _check_goes_on(stage: Stage, kept: str) -> None:
    """Refuse, with a RunError, a private stage that has released something but would start again, because `kept` is gone.

    Its releases would be made a second time, and its new statement would count only the second.
    """
    if (stage.folder / STATEMENT).exists() and not (stage.folder / kept).exists():
        raise RunError(
            f"{stage.folder / STATEMENT} says what was released, but {stage.folder / kept} is gone. {stage.way_out}"
        )


def _check_comes_first(chosen: Path, private: Path) -> None:
    """Refuse, with a RunError, to release if adapters were trained already: their statement could not count the release."""
    if (private / CONFIG).exists() and not (chosen / SUMS).exists():
        raise RunError(
            f"{private} was fine-tuned already, and its {STATEMENT} would not count what `fastloda choose` releases: choose in "
            "another --run, with --model for the public model, and fine-tune there; `fastloda account --composition` then says "
            "what both cost together"
        )


def _released_once(
    stage: Stage, warm_up: InTurn, private: LabelledImages, pool: LabelledImages, seed: int | None
) -> Released:
    """Release the noisy sums, and save them before they are used, so that an interrupted stage does not release them again."""
    sums, statement, records = stage.folder / SUMS, stage.folder / STATEMENT, stage.settings["records"]
    _check_goes_on(stage, SUMS)
    if not sums.exists():
        save_released(sums, warm_up.release(private, pool, records, seed or 0, noise_stream(seed)))
    if not statement.exists():
        facts = release_statement(warm_up.releases, stage.settings["delta"], records, seed)
        write_json(statement, _about(stage.settings["name"], private.class_names) | facts)
    return load_released(sums, warm_up.parts)


def finetune(
    run: Path,
    privacy: Privacy,
    *,
    data: str,
    name: str = PRIVATE_NAME,
    class_map: Names = NO_NAMES,
    skip_unreadable: bool = False,
    owner: str | None = None,
    per_owner: int = 1,
    model: Path | None = None,
    prompts: str | None = None,
    adapter: Adapter = ADAPTERS,
    layers: LayerChoice = ALL_LAYERS,
    training: FineTuning = FINE_TUNING,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Fit adapters of the public model to private images under (epsilon, delta)-differential privacy.

    Writes private/ in the run's folder: adapter.safetensors and privacy.json may be released, checkpoint.pt and source.yaml
    must not. If interrupted, it continues when it is called again, bit for bit, and the budget is spent once. If private/ is
    deleted and the command starts again, the budget is spent again; then both releases count together (`fastloda account
    --composition`). With --layers.share below 1, a noisy sum first determines which layers to adapt. It is drawn once, the
    same budget covers it, and all of layers/ in the run's folder except source.yaml may be released.

    Args:
        run: folder of the run.
        privacy: the promise of privacy, from which the noise is computed.
        data: private images with labels: a folder of images or an npz file as in `fastloda pretrain`; digits or colour-digits;
            mnist:FOLDER or cifar10:FOLDER. cifar10@1%:FOLDER or cifar10@500:FOLDER takes only so many of them, with the classes
            in the same proportion. They may have fewer classes than the model; their names are assumed to be public.
        name: public name of the private images, which is written to privacy.json. No path is published.
        class_map: pairs private=public, separated by commas, for private classes that have another name in the model.
        skip_unreadable: whether to leave out the images of a folder that cannot be read, instead of refusing the folder.
        owner: who owns each image of a folder, if people have several: then privacy protects a person with all their images,
            and privacy.batch_size, privacy.records and privacy.epochs count people. `subfolder`: the folder directly inside the
            folder of the class; or a regular expression with one group that matches from the start of the file name; or a .csv
            file with the columns file and owner. Default: each person has one image.
        per_owner: number of an owner's images in a step, averaged before clipping; only with `owner`. Time and memory grow with
            it.
        model: folder of the public model: a U-Net of `fastloda pretrain`, or a pipeline of diffusers (DDPM, DDIM, DiT, Stable
            Diffusion), which is assumed to be public: if private images were used to train it, that is not counted. Default:
            chosen/ in the run's folder, or else public/.
        prompts: prompts for a model that reads text: a template with {class}, as "a photo of a {class}", or one for each class,
            as "cat=a photo of a cat,dog=a photo of a dog".
        adapter: settings of the adapters that are trained.
        layers: settings of a choice of layers to adapt.
        training: settings of the optimization.
        device: device to compute on.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then. It shows loss and clipped
            fraction, which are private: only the operator may see them.
    """
    place = resolve_device(device)
    base = open_base(_public_folder(run, model), place)
    private = _open_private(data, base, class_map, skip_unreadable, name)
    captions = None if prompts is None else class_prompts(prompts, private.class_names)
    base.caption(captions)
    owners = _owners_of(data, private, owner, _released_before(run, base))
    privacy = privacy.with_records(*((len(set(owners)), "owners") if owners else (len(private), "records")))
    losses = base.losses(training, privacy.views)
    adapter = replace(adapter, targets=adapter.targets or base.targets)
    with seeded(training.seed or 0):  # seeds only A's initial values, which are public and independent of the noise
        adapter.attach(base.network)
    settings = {"name": name, "privacy": asdict(privacy), "adapter": asdict(adapter), "prompts": prompts}
    settings |= {"layers": asdict(layers), "training": asdict(training), "device": place.type, "per_owner": per_owner}
    outputs = (ADAPTER, STATEMENT, EPSILON_CURVE)
    source = _source(data, class_map, skip_unreadable) | {"owner": owner}
    options = {"private": True, "source": source, "world": World.of()}
    stage = Stage(Path(run) / PRIVATE, settings, (base.file,), outputs, **options)
    if not _reuse(stage):
        _check_goes_on(stage, CHECKPOINT)
        records = base.records(relabelled(private, base.class_names or private.class_names), progress)
        optimization = training.optimization() | {"per_owner": per_owner}
        about = _about(name, private.class_names)
        measure = partial(
            release_saliency,
            *(base.network, records, losses),
            records=privacy.records,
            noise_multiplier=layers.noise_multiplier,
            views=privacy.views,
            owners=owners,
            per_owner=per_owner,
            micro_batch_size=training.micro_batch_size,
            seed=training.seed,
            secure_noise=training.secure_noise,
        )
        layers.keep_best(base.network, partial(_release_layers, run, stage, base, measure, about), training.seed or 0)
        before = _released_before(run, base)
        options = {"checkpoint": stage.folder / CHECKPOINT, "earlier": _all_releases(before), "progress": progress}
        trainer = private_trainer(base.network, records, losses, privacy, optimization, owners=owners, **options)
        with stage.work():
            fit_average(trainer)
            if not stage.world.first:
                return {}
            save_loda(base.network, stage.folder / ADAPTER)
            counted = [release for statement in before for release in known_releases(statement)]
            publish(trainer, privacy, stage.folder, counted, about | ({"prompts": captions} if captions else {}))
    return read_statement(stage.folder) if stage.world.first else {}


def _release_layers(run: Path, tuning: Stage, base: Base, measure: Callable[[], Saliency], about: dict) -> Saliency:
    """Release the saliency of the layers (where the records' gradients are) in layers/, as a stage before `tuning`; or load it.

    It depends on those settings of `tuning` that the losses need, and can be used again when others change.
    """
    known = tuning.settings
    settings = {name: known[name] for name in ("name", "adapter", "prompts", "device", "per_owner")}
    settings |= {"privacy": {name: known["privacy"][name] for name in ("delta", "records", "views")}}
    settings |= {"training": {name: known["training"][name] for name in (*OF_THE_LOSSES, "seed", "secure_noise")}}
    settings |= {"layers": {"noise_multiplier": known["layers"]["noise_multiplier"]}}
    options = {"private": True, "source": tuning.source, "world": tuning.world}
    stage = Stage(Path(run) / LAYERS, settings, (base.file,), (STATEMENT,), **options)
    path = stage.folder / STATEMENT
    if not _reuse(stage):
        if not stage.world.from_first(path.exists):
            _check_affordable(run, tuning, base)
        with stage.work():
            once(path, measure, stage.world, lambda: about | _layers_statement(tuning))
    return once(path, measure, stage.world)


def _check_affordable(run: Path, tuning: Stage, base: Base) -> None:
    """Refuse to release the layers' saliency if fine-tuning has begun with one that is gone, or could not pay for a new one."""
    if tuning.world.from_first((tuning.folder / CONFIG).exists):
        raise RunError(f"{tuning.folder} goes on from {LAYERS}/{STATEMENT}, which is gone. {tuning.way_out}")
    due = LayerChoice(**tuning.settings["layers"]).releases
    earlier = _all_releases(_released_before(run, base)) + [each[1:] for each in due]
    private_training(Privacy(**tuning.settings["privacy"]), earlier)


def _layers_statement(tuning: Stage) -> dict:
    """Make the statement of the release by which the stage `tuning` chooses its layers."""
    described = LayerChoice(**tuning.settings["layers"]).releases
    privacy, training = tuning.settings["privacy"], tuning.settings["training"]
    how = {"secure_noise": training["secure_noise"], "by_owner": tuning.source["owner"] is not None}
    return release_statement(described, privacy["delta"], privacy["records"], training["seed"], **how)


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
        _check_goes_on(stage, CHECKPOINT)
        with stage.work():
            options = {"device": place, "checkpoint": stage.folder / CHECKPOINT, "progress": progress}
            model, trainer = train_dpsgd(data, privacy, training, **options)
            write_atomically(stage.folder / CLASSIFIER_WEIGHTS, lambda path: save_file(model.state_dict(), path))
            publish(trainer, privacy, stage.folder)
    model = make_classifier(data, training)
    model.load_state_dict(load_file(stage.folder / CLASSIFIER_WEIGHTS))
    return model.to(place).eval()


def sample(
    run: Path,
    *,
    count: int = 2000,
    steps: int = 50,
    guidance: float = 0.0,
    stochasticity: float = 0.0,
    seed: int = 0,
    name: str | None = None,
    reach: Reach = UNMOVED,
    public: bool = False,
    model: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Draw synthetic images from the fine-tuned model, the same number for each class that it was trained on.

    Writes samples/ in the run's folder: an npz file, PNGs by class, a contact sheet, privacy.json, and a README.md that says what
    may be published. The images are as private as the adapter, however many are drawn. If interrupted, it continues.

    Args:
        run: folder of the run.
        count: number of images.
        steps: number of steps of the sampler: DDIM, or a pipeline's own.
        guidance: weight of classifier-free guidance; above 0 it doubles the time.
        stochasticity: how much fresh noise each step adds; 0: none. It is eta of DDIM, at most 1, which is DDPM; for a model of
            `--unet.process edm` it is S_churn, of which 8 in 20 steps keeps strokes of digits whole.
        seed: seed of the images; it is independent of training, and does not have to be secret.
        name: name of another set of samples, which goes to samples-NAME/; give it another seed.
        reach: how far the images are moved easily, to agree better with the release of `fastloda choose`; 0.1 for pixels helps a
            little on digits. It costs no budget.
        public: whether to draw from the model without the adapter, into samples-public/; chosen/ has its own privacy.json.
        model: folder of the public model, as in `fastloda finetune`. Default: chosen/ in the run's folder, or else public/.
        batch_size: number of images at a time; the result does not depend on it.
        device: device to compute on.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
    """
    check_sampling(count, steps, guidance, batch_size)
    place, folder = resolve_device(device), Path(run) / samples_folder(public, name)
    base = open_base(_public_folder(run, model), place)
    released = _released_with(base) if reach else None
    inputs = (base.file,) if public else (base.file, _attach_trained(base, Path(run) / PRIVATE))
    inputs += (base.file.parent / SUMS,) if reach else ()
    trained_on = _trained_on(Path(run) / PRIVATE)
    base.caption(trained_on.get("prompts"))
    drawing = Drawing(steps, guidance, stochasticity)
    base.check_drawing(drawing)
    statement = _statement_of_public(base) if public else trained_on
    numbers = map(str, range(base.takes.num_classes or 1))
    names = tuple((statement or {}).get("classes") or base.class_names or trained_on.get("classes") or numbers)
    if released and names != tuple(read_statement(base.file.parent)["classes"]):
        raise UserError("--reach needs the classes of `fastloda choose`, but the adapters were trained on others")
    settings = {
        "count": count,
        **asdict(drawing),
        "seed": seed,
        "reach": asdict(reach),
        "public": public,
    }
    settings |= {"device": place.type}
    outputs = (SAMPLES, GRID, README, *((STATEMENT,) if statement else ()))
    stage = Stage(folder, settings, inputs, outputs)
    if not _reuse(stage):
        labels = class_balanced_labels(count, len(names))
        number = torch.tensor([(base.class_names or names).index(each) for each in names])
        options = {"seed": seed, "batch_size": batch_size}
        draw = lambda some, skip: base.draw(number[some], drawing, skip=skip, **options)  # noqa: E731
        with stage.work():
            drawn = draw_resumably(draw, labels, folder / PART, batch_size, progress)
            images = LabelledImages(drawn, labels, len(names), names)
            images = moved(images, released, reach, seed, progress) if released else images
            write_samples(folder, images, statement)
        (folder / PART).unlink(missing_ok=True)
    return {"samples": str(folder / SAMPLES), "images": str(folder / IMAGES), "grid": str(folder / GRID)}


def samples_folder(public: bool, name: str | None) -> str:
    """Return the name of the folder of a set of samples.

    Raises:
        UserError: the name of the set cannot be part of it.
    """
    if name is not None and not re.fullmatch(r"(?!public)\w[\w.-]*", name):
        raise UserError(f"--name must be letters, digits, dots and dashes, and not begin with public, got {name!r}")
    return "-".join(["samples", *(["public"] if public else []), *([name] if name else [])])


def check_sampling(count: int, steps: int, guidance: float, batch_size: int = 1) -> None:
    """Refuse with a ValueError what `sample` cannot do."""
    if count < 1 or batch_size < 1:
        raise UserError(f"count and batch_size must be at least 1, got {count} and {batch_size}")
    if not 1 <= steps <= TIMESTEPS or not 0 <= guidance < float("inf"):
        raise UserError(f"need 1 <= steps <= {TIMESTEPS} and guidance >= 0, got {steps} and {guidance}")


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
        known[key] = {
            "accuracy": accuracy(judge, tests),
            "train_images": len(images),
            "test_images": len(tests),
            "seconds": round(time.monotonic() - began, 1),
            "settings": settings,
        }
        write_json(record, known)
    return {key: value for key, value in known[key].items() if key != "settings"}


def _open_private(data: str, base: Base, class_map: Sequence[str], skip_unreadable: bool, name: str) -> LabelledImages:
    """Open the private images, with those of the model's classes that they have, by name; log what they are.

    If the model's classes have no names, the classes of the images are the first ones of the model.
    """
    images = open_for_unet(data, base.takes, skip_unreadable=skip_unreadable)
    called = {own: base.synonyms.get(known, known) for own, known in read_class_map(class_map).items()}
    mapping = {**base.synonyms, **called}
    found = mapped_names(images, mapping)
    known = base.class_names or tuple(dict.fromkeys(found))
    if base.takes.num_classes is not None and len(known) > base.takes.num_classes:
        raise UserError(f"{data} has {len(known)} classes, more than the model's {base.takes.num_classes}")
    relabelled(images, known, mapping, of="the public model")  # refuses unknown classes
    private = relabelled(images, [each for each in known if each in found], mapping)
    logger.info("private: %s, called %r in what is published: %d images", data, name, len(private))
    logger.info("note: the names of their classes are published: %s", listed(private.class_names))
    return private


def _source(data: str, class_map: Names, skip_unreadable: bool) -> dict:
    """Collect the settings on where private images are, and how they are read."""
    return {"data": full_name(data), "class_map": list(class_map), "skip_unreadable": skip_unreadable}


def _about(name: str, classes: Sequence[str]) -> dict:
    """Collect the public facts about private images that a statement begins with."""
    return {"name": name, "classes": list(classes)}


def _public_folder(run: Path, model: Path | None) -> Path:
    """Find the public model's folder; RunError if `choose` was begun and not finished, since its model may be meant."""
    if model is not None:
        return Path(model)
    chosen, public = Path(run) / CHOSEN, Path(run) / PUBLIC
    if (chosen / DONE).is_file():
        return chosen
    if (chosen / CONFIG).exists():
        raise RunError(
            f"{chosen} is not finished: the same `fastloda choose` continues it; or give --model {shlex.quote(str(public))}, "
            "to do without its model (what it has released counts all the same)"
        )
    return public


def _released_before(run: Path, base: Base) -> list[dict]:
    """Read the statements of earlier releases about the private records, for the adapted model or in this run."""
    chosen, layers, folders = Path(run) / CHOSEN, Path(run) / LAYERS, []
    if base.chosen_privately:
        folders.append(base.file.parent)
    if (chosen / SUMS).exists() and chosen.resolve() not in [folder.resolve() for folder in folders]:
        folders.append(chosen)
    if (layers / STATEMENT).exists():
        folders.append(layers)
    return [read_statement(folder) for folder in folders]


def _all_releases(statements: Sequence[dict]) -> list[tuple]:
    return [release for statement in statements for release in releases(statement)]


def _owners_of(data: str, private: LabelledImages, owner: str | None, before: list[dict]) -> list[str] | None:
    """Read who owns each image, if that is asked for; UserError if an earlier release has another unit of privacy."""
    adjacency, other = (ADJACENCY, "owner") if owner is None else (OWNER_ADJACENCY, "image")
    if any(statement["adjacency"] != adjacency for statement in before):
        raise UserError(
            f"a sum was released before in which each {other} counts by itself, which this run's epsilon would not cover: "
            "fine-tune in another --run, with --model for the public model"
        )
    return None if owner is None else read_owners(data, private.files, owner)


def _released_with(base: Base) -> ClassEmbeddings:
    """Load the features that `choose` released; whatever adapts its model has them in its budget."""
    released = load_released(base.file.parent / SUMS, [CHOICE]) if base.chosen_privately else {}
    if PublicChoice.kind not in released:
        raise UserError(
            f"{base.file} is no model of `fastloda choose` by choice, whose release --reach would move images toward"
        )
    return released[PublicChoice.kind]


def _statement_of_public(base: Base) -> dict | None:
    """Read the statement of the public model, if private images had an influence on it."""
    return read_statement(base.file.parent) if base.chosen_privately else None


def _draw_preview(
    model: UNet, known: Sequence[str], names: Sequence[str], folder: Path, seed: int, progress: bool
) -> None:
    """Draw a contact sheet of a model with the classes `known`: some images of each of the classes `names`."""
    labels = class_balanced_labels(PREVIEW_COLUMNS * len(names), len(names))
    number = torch.tensor([known.index(name) for name in names])
    drawn = draw_samples(model, number[labels], seed=seed, progress=progress).clamp(-1, 1)
    write_atomically(folder / PREVIEW, contact_sheet(LabelledImages(drawn, labels, len(names), tuple(names))))


def _attach_trained(base: Base, private: Path) -> Path:
    """Attach the run's adapters to the base's network, and return their file."""
    if not (private / DONE).is_file():
        raise FileNotFoundError(
            f"no adapter in {private}: `fastloda finetune` makes one; or draw from the public model with --public"
        )
    if digest(base.file) not in read_json(private / DONE).get("inputs", {}).values():
        raise UserError(f"{private / ADAPTER} adapts another model than {base.file}")
    load_loda(base.network, private / ADAPTER)
    return private / ADAPTER


def _trained_on(private: Path) -> dict:
    """Read the run's statement: it has the classes and prompts that the adapters were trained on. {} if there is none yet."""
    return read_statement(private) if (private / STATEMENT).is_file() else {}


def _reuse(stage: Stage) -> bool:
    if done := stage.is_done():
        logger.info("%s: already there, with these settings", stage.folder)
    return done
