"""The stage `sample`: synthetic images of the fine-tuned model."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.loda.attach import load_loda
from fastloda.synthesis.account import counts, read_statement
from fastloda.synthesis.arguments import Device, resolve_device
from fastloda.synthesis.bases import Base, open_base
from fastloda.synthesis.budget import STATEMENT
from fastloda.synthesis.classify import predict
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import TIMESTEPS, class_balanced_labels
from fastloda.synthesis.methods.chosen_loda import of_classes
from fastloda.synthesis.methods.class_embeddings import ClassEmbeddings
from fastloda.synthesis.methods.moves import UNMOVED, Reach, moved
from fastloda.synthesis.methods.public_choice import PublicChoice
from fastloda.synthesis.methods.warm_up import load_released
from fastloda.synthesis.models import load_classifier
from fastloda.synthesis.runs import DONE, INPUTS, Stage, digest, read_json, reuse
from fastloda.synthesis.samples import GRID, IMAGES, PART, README, SAMPLES, draw_resumably, write_samples
from fastloda.synthesis.settings import Drawing

from .choosing import CHOICE, chosen_images
from .earlier import public_folder, statement_of_public
from .layout import ADAPTER, CHOSEN_IMAGES, CLASSIFIER_WEIGHTS, LABELS, PRIVATE, SUMS, samples_folder


def sample(
    run: Path,
    *,
    count: int = 2000,
    steps: int = 50,
    guidance: float = 0.0,
    stochasticity: float = 0.0,
    seed: int = 0,
    name: str | None = None,
    strength: float = 1.0,
    reach: Reach = UNMOVED,
    public: bool = False,
    model: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Draw synthetic images from the fine-tuned model, the same number for each class that it was trained on.

    Writes samples/ in the run's folder: an npz file, PNGs by class, a contact sheet, privacy.json, and a README.md that says what
    may be published. The images are as private as the adapter, however many are drawn. If `fastloda label` has made a classifier
    in this run, it labels them. If interrupted, it continues.

    Args:
        run: folder of the run.
        count: number of images.
        steps: number of steps of the sampler: DDIM, or a pipeline's own.
        guidance: weight of classifier-free guidance; above 0 it doubles the time.
        stochasticity: how much fresh noise each step adds; 0: none. It is eta of DDIM, at most 1, which is DDPM; for a model of
            `--unet.process edm` it is S_churn, of which 8 in 20 steps keeps strokes of digits whole.
        seed: seed of the images; it is independent of training, and does not have to be secret.
        name: name of another set of samples, which goes to samples-NAME/; give it another seed.
        strength: share of the steps by which images are made of those that `fastloda choose` chose, and not of noise; 1: of noise
            alone. With 0.3 strokes of digits break less often. It costs no budget.
        reach: how far the images are moved easily, to agree better with the release of `fastloda choose`; 0.1 for pixels helps a
            little on digits. It costs no budget.
        public: whether to draw from the model without the adapter, into samples-public/; chosen/ has its own privacy.json.
        model: folder of the public model, as in `fastloda finetune`. Default: chosen/ in the run's folder, or else public/.
        batch_size: number of images at a time; the result does not depend on it.
        device: device to compute on.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
    """
    check_sampling(count, steps, guidance, batch_size, strength)
    place, folder = resolve_device(device), Path(run) / samples_folder(public, name)
    base = open_base(public_folder(run, model), place)
    chosen, released = _chosen_for(base) if strength < 1 else None, _released_with(base) if reach else None
    inputs = (base.file,) if public else (base.file, _attach_trained(base, Path(run) / PRIVATE))
    inputs += (base.file.parent / CHOSEN_IMAGES,) if chosen else ()
    inputs += (base.file.parent / SUMS,) if released else ()
    trained_on = _trained_on(Path(run) / PRIVATE)
    base.caption(trained_on.get("prompts"))
    drawing = Drawing(steps, guidance, stochasticity)
    base.check_drawing(drawing)
    statement = statement_of_public(base) if public else trained_on
    numbers = map(str, range(base.takes.num_classes or 1))
    names = tuple((statement or {}).get("classes") or base.class_names or trained_on.get("classes") or numbers)
    if (chosen or released) and names != tuple(read_statement(base.file.parent)["classes"]):
        raise UserError(
            "--strength and --reach need the classes of `fastloda choose`, but the adapters were trained on others"
        )
    labeller = None if public else _labeller(Path(run) / LABELS, names, trained_on, place)
    inputs += (Path(run) / LABELS / CLASSIFIER_WEIGHTS,) if labeller else ()
    settings = {"count": count, **asdict(drawing), "seed": seed, "strength": strength, "reach": asdict(reach)}
    settings |= {"public": public, "labelled": labeller is not None, "device": place.type}
    outputs = (SAMPLES, GRID, README, *((STATEMENT,) if statement else ()))
    stage = Stage(folder, settings, inputs, outputs)
    if not reuse(stage):
        labels = class_balanced_labels(count, len(names))
        number = torch.tensor([(base.class_names or names).index(each) for each in names])
        begins = of_classes(chosen, labels, seed) if chosen else None

        def draw(some: Tensor, skip: int) -> Tensor:
            start = {"varied": begins[skip : skip + len(some)], "strength": strength} if chosen else {}
            return base.draw(number[some], drawing, skip=skip, seed=seed, batch_size=batch_size, **start)

        with stage.work():
            drawn = draw_resumably(draw, labels, folder / PART, batch_size, progress)
            images = LabelledImages(drawn, labels, len(names), names)
            images = moved(images, released, reach, seed, progress) if released else images
            images = replace(images, labels=predict(labeller, images.images)) if labeller else images
            write_samples(folder, images, statement)
        (folder / PART).unlink(missing_ok=True)
    return {"samples": str(folder / SAMPLES), "images": str(folder / IMAGES), "grid": str(folder / GRID)}


def check_sampling(count: int, steps: int, guidance: float, batch_size: int = 1, strength: float = 1.0) -> None:
    """Refuse with a ValueError what `sample` cannot do."""
    if count < 1 or batch_size < 1:
        raise UserError(f"count and batch_size must be at least 1, got {count} and {batch_size}")
    if not 1 <= steps <= TIMESTEPS or not 0 <= guidance < float("inf"):
        raise UserError(f"need 1 <= steps <= {TIMESTEPS} and guidance >= 0, got {steps} and {guidance}")
    if not 0 < strength <= 1:
        raise UserError(f"strength must lie in (0, 1], got {strength}")


def _chosen_for(base: Base) -> LabelledImages:
    """Load the images that `choose` chose for the model."""
    if not base.chosen_privately:
        raise UserError(f"{base.file} is no model of `fastloda choose`, with whose images --strength would begin")
    return chosen_images(base.file.parent)


def _labeller(folder: Path, names: tuple[str, ...], statement: Mapping, device: torch.device) -> torch.nn.Module | None:
    """Load the classifier of `label`, if there is one; UserError if it has other classes, or the statement does not cover it."""
    if not (folder / DONE).is_file():
        return None
    network, known = load_classifier(folder / CLASSIFIER_WEIGHTS, device)
    if known != names:
        raise UserError(f"the classifier in {folder} has other classes than the adapters: make both in one --run")
    if not counts(dict(statement), read_statement(folder)):
        raise UserError(
            f"{PRIVATE}/{STATEMENT} does not count {folder}: label and fine-tune in one --run, in this order"
        )
    return network


def _released_with(base: Base) -> ClassEmbeddings:
    """Load the features that `choose` released; whatever adapts its model has them in its budget."""
    released = load_released(base.file.parent / SUMS, [CHOICE]) if base.chosen_privately else {}
    if PublicChoice.kind not in released:
        raise UserError(
            f"{base.file} is no model of `fastloda choose` by choice, whose release --reach would move images toward"
        )
    return released[PublicChoice.kind]


def _attach_trained(base: Base, private: Path) -> Path:
    """Attach the run's adapters to the base's network, and return their file."""
    if not (private / DONE).is_file():
        raise FileNotFoundError(
            f"no adapter in {private}: `fastloda finetune` makes one; or draw from the public model with --public"
        )
    if digest(base.file) not in read_json(private / INPUTS).values():
        raise UserError(f"{private / ADAPTER} adapts another model than {base.file}")
    load_loda(base.network, private / ADAPTER)
    return private / ADAPTER


def _trained_on(private: Path) -> dict:
    """Read the run's statement: it has the classes and prompts that the adapters were trained on. {} if there is none yet."""
    return read_statement(private) if (private / STATEMENT).is_file() else {}
