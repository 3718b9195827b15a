"""The stage `finetune`: adapters of the public model, trained privately; and the choice of layers to adapt before it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from fastloda.errors import UserError
from fastloda.loda.attach import save_loda
from fastloda.privacy.ranks import World
from fastloda.randomness import seeded
from fastloda.synthesis.account import read_statement, united
from fastloda.synthesis.arguments import NO_NAMES, Device, Names, resolve_device
from fastloda.synthesis.bases import Base, class_prompts, open_base
from fastloda.synthesis.budget import (
    CHECKPOINT,
    EPSILON_CURVE,
    STATEMENT,
    Privacy,
    fit_average,
    private_trainer,
    private_training,
    publish,
    release_statement,
    with_ids,
)
from fastloda.synthesis.data import relabelled
from fastloda.synthesis.methods.layer_choice import LayerChoice, once
from fastloda.synthesis.runs import CONFIG, RunError, Stage, reuse
from fastloda.synthesis.settings import OF_THE_LOSSES, Adapter, FineTuning
from fastloda.training.saliency import Saliency, release_saliency

from .earlier import all_releases, check_goes_on, public_folder, released_before
from .layout import ADAPTER, LAYERS, PRIVATE
from .private_images import PRIVATE_NAME, about_private, open_private, owners_of, source_of

ADAPTERS, FINE_TUNING, ALL_LAYERS = Adapter(), FineTuning(), LayerChoice()


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
    same budget covers it, and all of layers/ in the run's folder except its .yaml files and done.json may be released.

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
    base = open_base(public_folder(run, model), place)
    private = open_private(data, base, class_map, skip_unreadable, name)
    if owner is None and per_owner != 1:
        raise UserError(f"--per_owner {per_owner} is for images of owners: give --owner too, or leave it out")
    captions = None if prompts is None else class_prompts(prompts, private.class_names)
    base.caption(captions)
    owners = owners_of(data, private, owner, released_before(run, base))
    privacy = privacy.with_records(*((len(set(owners)), "owners") if owners else (len(private), "records")))
    losses = base.losses(training, privacy.views)
    adapter = replace(adapter, targets=adapter.targets or base.targets)
    with seeded(training.seed or 0):  # seeds only A's initial values, which are public and independent of the noise
        adapter.attach(base.network)
    settings = {"name": name, "privacy": asdict(privacy), "adapter": asdict(adapter), "prompts": prompts}
    settings |= {"layers": asdict(layers), "training": asdict(training), "device": place.type, "per_owner": per_owner}
    outputs = (ADAPTER, STATEMENT, EPSILON_CURVE)
    source = source_of(data, class_map, skip_unreadable) | {"owner": owner}
    options = {"private": True, "source": source, "world": World.of()}
    stage = Stage(Path(run) / PRIVATE, settings, (base.file,), outputs, **options)
    if not reuse(stage):
        check_goes_on(stage, CHECKPOINT)
        records = base.records(relabelled(private, base.class_names or private.class_names), progress)
        optimization = training.optimization() | {"per_owner": per_owner}
        about = about_private(name, private.class_names)
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
        before = released_before(run, base)
        options = {"checkpoint": stage.folder / CHECKPOINT, "earlier": all_releases(before), "progress": progress}
        trainer = private_trainer(base.network, records, losses, privacy, optimization, owners=owners, **options)
        with stage.work():
            fit_average(trainer)
            if not stage.world.first:
                return {}
            save_loda(base.network, stage.folder / ADAPTER)
            publish(
                trainer,
                privacy,
                stage.folder / ADAPTER,
                united(before),
                about | ({"prompts": captions} if captions else {}),
            )
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
    if not reuse(stage):
        if not stage.world.from_first(path.exists):
            _check_affordable(run, tuning, base)
        with stage.work():
            once(
                path,
                measure,
                stage.world,
                lambda found: about | _layers_statement(tuning, found, released_before(run, base)),
            )
    return once(path, measure, stage.world)


def _check_affordable(run: Path, tuning: Stage, base: Base) -> None:
    """Refuse to release the layers' saliency if fine-tuning has begun with one that is gone, or could not pay for a new one."""
    if tuning.world.from_first((tuning.folder / CONFIG).exists):
        raise RunError(f"{tuning.folder} goes on from {LAYERS}/{STATEMENT}, which is gone. {tuning.way_out}")
    due = LayerChoice(**tuning.settings["layers"]).releases
    earlier = all_releases(released_before(run, base)) + [each[1:] for each in due]
    private_training(Privacy(**tuning.settings["privacy"]), earlier)


def _layers_statement(tuning: Stage, found: Saliency, before: Sequence[dict]) -> dict:
    """Make the statement of the release by which the stage `tuning` chooses its layers, and of those before."""
    described = LayerChoice(**tuning.settings["layers"]).releases
    privacy, training = tuning.settings["privacy"], tuning.settings["training"]
    how = {"secure_noise": training["secure_noise"], "by_owner": tuning.source["owner"] is not None}
    numbers = privacy["delta"], privacy["records"], training["seed"]
    statement = release_statement(described, *numbers, before=united(before), **how)
    return with_ids(statement, hashlib.sha256(repr(found).encode()).hexdigest())
