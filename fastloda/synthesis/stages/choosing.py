"""The stage `choose`: the public model, trained further on public images that resemble the private ones."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastloda.errors import UserError
from fastloda.synthesis.account import read_statement
from fastloda.synthesis.arguments import NO_NAMES, Device, Names, resolve_device
from fastloda.synthesis.bases import MODEL, OwnUNet
from fastloda.synthesis.budget import CHECKPOINT, STATEMENT, check_delta, nominal_records, release_statement, with_ids
from fastloda.synthesis.data import LabelledImages, listed, load_npz
from fastloda.synthesis.inputs import OWN_IMAGES, files_of, full_name, open_for_unet, public_name
from fastloda.synthesis.methods.central_images import CentralImages
from fastloda.synthesis.methods.class_queries import ClassQueries
from fastloda.synthesis.methods.gaussian_release import noise_stream
from fastloda.synthesis.methods.public_choice import PublicChoice
from fastloda.synthesis.methods.warm_up import InTurn, Released, load_released, save_released
from fastloda.synthesis.models import save_unet
from fastloda.synthesis.runs import Stage, digest, reuse, write_json

from .earlier import check_comes_first, check_goes_on
from .layout import CHOSEN, CHOSEN_IMAGES, PUBLIC, SUMS
from .preview import PREVIEW, draw_preview
from .private_images import PRIVATE_NAME, about_private, open_private, source_of

QUERIES, MEANS, CHOICE, BY_CHOICE = ClassQueries(), CentralImages(), PublicChoice(), Names([PublicChoice.kind])


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
    its .yaml files and done.json may be released, on the terms in its privacy.json. If interrupted, it continues; the sums are
    drawn only once.
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
            its noise_multiplier determines its cost: epsilon 0.7 for 5, and 0.4 for 8, at delta 1e-5. `label` and `sample
            --strength` use the images of the last one: choice, if it is among them.
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
    private = open_private(data, base, class_map, skip_unreadable, name)
    nominal = nominal_records(records, len(private), "--records")
    check_delta("delta", delta, nominal)
    warm_ups = {part.kind: part for part in (queries, means, choice)}
    if not set(by) <= set(warm_ups):
        raise UserError(f"--by takes {', '.join(warm_ups)}, got {listed(by)}")
    warm_up = InTurn(tuple(warm_ups[kind] for kind in by))
    statement = about_private(name, private.class_names) | release_statement(warm_up.releases, delta, nominal, seed)
    settings = {"delta": delta, "by": list(by)} | {part.kind: asdict(part) for part in warm_up.parts}
    settings |= {"records": nominal, "name": name, "public": public_name(public, OWN_IMAGES)}
    settings |= {"count": count, "seed": seed, "device": place.type}
    outputs, inputs = (MODEL, PREVIEW, SUMS, CHOSEN_IMAGES, STATEMENT), (base.file, *files_of(public))
    source = source_of(data, class_map, skip_unreadable) | {"public": full_name(public)}
    stage = Stage(Path(run) / CHOSEN, settings, inputs, outputs, private=True, source=source)
    if not reuse(stage):
        options = {"count": count, "seed": seed or 0, "skip_unreadable": skip_unreadable}
        pool = warm_up.pool(open_for_unet(public, network.config, **options), private.class_names)
        check_comes_first(stage, SUMS)
        with stage.work():
            released = _released_once(stage, warm_up, private, pool, statement)
            numbers = torch.tensor([known.index(name) for name in private.class_names])
            options = {"numbers": numbers, "checkpoint": stage.folder / CHECKPOINT, "progress": progress}
            images = warm_up.train_further(network, pool, released, seed or 0, **options)
            images = replace(images, class_names=private.class_names)  # some warm-ups know only their number
            save_unet(network, stage.folder / MODEL, known, chosen_privately=True)
            images.save_npz(stage.folder / CHOSEN_IMAGES, uint8=True)  # last, for `label` looks for it
            draw_preview(network, known, private.class_names, stage.folder, seed or 0, progress)
        for checkpoint in stage.folder.glob(f"*{CHECKPOINT}"):
            checkpoint.unlink()
    return read_statement(stage.folder) | {"model": str(stage.folder / MODEL)}


def _released_once(
    stage: Stage, warm_up: InTurn, private: LabelledImages, pool: LabelledImages, statement: dict
) -> Released:
    """Release the noisy sums, and save them before they are used, so that an interrupted stage does not release them again."""
    sums, records, seed = stage.folder / SUMS, stage.settings["records"], stage.settings["seed"]
    check_goes_on(stage, SUMS)
    if not sums.exists():
        save_released(sums, warm_up.release(private, pool, records, seed or 0, noise_stream(seed)))
    if not (stage.folder / STATEMENT).exists():
        write_json(stage.folder / STATEMENT, with_ids(statement, digest(sums)))
    return load_released(sums, warm_up.parts)


def chosen_images(folder: Path) -> LabelledImages:
    """Load the images that `choose` left in its folder, with the private classes; FileNotFoundError if it has not finished."""
    if not (folder / CHOSEN_IMAGES).is_file():
        raise FileNotFoundError(f"no {folder / CHOSEN_IMAGES}: `fastloda choose` makes it, and comes first")
    return load_npz(folder / CHOSEN_IMAGES)
