"""The stage `pretrain`: a diffusion model of public images."""

from dataclasses import asdict
from pathlib import Path

from fastloda.synthesis.arguments import Device, resolve_device
from fastloda.synthesis.bases import MODEL
from fastloda.synthesis.budget import CHECKPOINT
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.inputs import OWN_IMAGES, files_of, full_name, open_public, public_name
from fastloda.synthesis.methods.diffusion_model import PublicModel
from fastloda.synthesis.models import save_unet
from fastloda.synthesis.runs import Stage, reuse
from fastloda.synthesis.settings import UNetShape

from .layout import PUBLIC
from .preview import PREVIEW, draw_preview

PUBLIC_TRAINING, SHAPE = PublicTraining(steps=2000, ema_decay=0.998), UNetShape()


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
    if not reuse(stage):
        images = open_public(data, seed=training.seed, **reading)
        method, checkpoint = PublicModel(unet.config(images), training), stage.folder / CHECKPOINT
        with stage.work():
            model = method.train(images, training.seed, place, checkpoint, progress)
            save_unet(model, stage.folder / MODEL, images.class_names)
            names = images.class_names
            draw_preview(model, names, names, stage.folder, training.seed, progress)
        checkpoint.unlink(missing_ok=True)  # the finished model replaces it
    return {"model": str(stage.folder / MODEL)}
