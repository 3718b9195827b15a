"""Pipelines of diffusers in a folder, as `pipe.save_pretrained(folder)` writes them: losses for training, and drawing of samples.

DDPMPipeline, DDIMPipeline       a UNet2DModel on pixels, with a table of classes or without classes
DiTPipeline                      a DiTTransformer2DModel on latents, with a table of classes
StableDiffusionPipeline          a UNet2DConditionModel on latents, with one prompt for each class

The loss is the mean squared error of what the scheduler's `prediction_type` names, under the scheduler's own noise schedule.
Latents are the means of the VAE's distributions, computed once; each depends on its own image only. Everything but the network
is frozen. No code from a folder is run: only classes of diffusers and transformers are used, and weights must be safetensors.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.integrations.diffusers import diffusion_losses
from fastloda.loda.attach import BESIDE
from fastloda.progress import Progress
from fastloda.randomness import seeded
from fastloda.synthesis.bases import PIPELINE, refuse_prompts
from fastloda.synthesis.data import LabelledImages, named_classes
from fastloda.synthesis.diffusion.ddpm import check_eta
from fastloda.synthesis.diffusion.process import TIMESTEPS, drop_labels, mirror_some
from fastloda.synthesis.diffusion.sampler import image_seeds
from fastloda.synthesis.inputs import Takes
from fastloda.synthesis.runs import read_json
from fastloda.synthesis.settings import Drawing, FineTuning
from fastloda.training.noising import draw_timesteps
from fastloda.training.trainer import Losses

try:
    import diffusers
except ImportError as error:
    raise UserError("a pipeline of diffusers needs that package: pip install 'fastloda[diffusers]'") from error

LIBRARIES = ("diffusers", "transformers")
ENCODED_AT_ONCE = 16


class Pipeline:
    """A pipeline of diffusers as a `Base`; a subclass knows how the labels enter its kind of pipeline, and how to call it.

    Attributes:
        pipe: the pipeline, on its device.
        null: label that stands for "no label"; None if the model has none.
    """

    part = "unet"
    targets: str | None = None
    parts: dict[str, tuple[str, ...]] = {}  # component -> the classes that it may have; () for any
    null: int | None = None
    chosen_privately = False

    def __init__(self, folder: Path, pipe: Any):
        self.file, self.pipe, self.name = folder, pipe, type(pipe).__name__
        self.network: nn.Module = getattr(pipe, self.part)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval().float()
        self.takes = self._takes(self.network.config)
        self.class_names, self.synonyms = named_classes(self._table_of_names())

    def _takes(self, config: Any) -> Takes:
        raise NotImplementedError

    def _table_of_names(self) -> list[str]:
        """Read the names of the classes, by label, from the pipeline's or the network's `id2label`; [] if there are none."""
        files = (self.file / PIPELINE, self.file / self.part / "config.json")
        table = next((found for path in files if (found := read_json(path).get("id2label"))), {})
        most, labels = self.takes.num_classes, sorted(map(str, range(len(table))))
        if most is None or not table:
            return []
        if not isinstance(table, dict) or sorted(table) != labels or len(table) > most:
            raise UserError(
                f"{self.file}: id2label must name classes 0, 1, ..., at most the model's {most}, got {len(table)} names: mend "
                "it, or take it out of the JSON file, to give the first labels to your own classes"
            )
        return [str(table[str(label)]) for label in range(len(table))]

    def _side(self, config: Any) -> int:
        """Return the side of the network's square inputs."""
        if not isinstance(config.sample_size, int):
            raise UserError(f"{self.file}: sample_size is {config.sample_size}, and only square images are covered")
        return config.sample_size

    def caption(self, prompts: Sequence[str] | None) -> None:
        refuse_prompts(prompts, self.name)

    def records(self, images: LabelledImages, progress: bool = True) -> tuple[Tensor, Tensor]:
        return images.images[:], images.labels

    def losses(self, training: FineTuning, views: int) -> Losses:
        scheduler = self.pipe.scheduler
        cdf = _cdf_of(training.timesteps, scheduler.config.num_train_timesteps)

        def losses(model: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
            x0, y = (column.repeat_interleave(views, dim=0) for column in batch)
            times = draw_timesteps(cdf, len(batch[0]), views, generator, x0.device)
            if self.null is not None:
                y = drop_labels(y, self.null, training.label_dropout, generator)
            if training.flips:
                x0 = mirror_some(x0, generator)
            options = {"timesteps": times, "generator": generator, **self._conditions(y)}
            return diffusion_losses(self._predictor(model), scheduler, x0, **options)

        return losses

    def _conditions(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the network's arguments for labels [n], some of which may be `null`."""
        raise NotImplementedError

    def _predictor(self, model: nn.Module) -> Callable:
        """Return the function that predicts what the scheduler's prediction_type names, and nothing else."""
        return model

    def check_drawing(self, drawing: Drawing) -> None:
        if drawing.steps > (most := self.pipe.scheduler.config.num_train_timesteps):
            raise UserError(f"{self.file}: the scheduler has {most} steps, not {drawing.steps}: set --steps")
        if drawing.guidance and self.null is None:
            raise UserError(f"{self.name} has no pass without a label, which guidance needs: leave out --guidance")
        if drawing.stochasticity and not self._takes_eta:
            sampler = type(self.pipe.scheduler).__name__
            raise UserError(f"{self.name} with {sampler} has no amount of noise to set: leave out --stochasticity")
        check_eta(drawing.stochasticity)

    @property
    def _takes_eta(self) -> bool:
        """Whether the pipeline and its scheduler can be told how much fresh noise a step adds."""
        steps = self.pipe.__call__, self.pipe.scheduler.step
        return all("eta" in inspect.signature(step).parameters for step in steps)

    def draw(self, labels: Tensor, drawing: Drawing, *, seed: int, batch_size: int, skip: int = 0) -> Tensor:
        seeds, drawn = image_seeds(skip + len(labels), torch.Generator().manual_seed(seed))[skip:], []
        for rows in torch.arange(len(labels)).split(batch_size):
            first, last = int(rows[0]), int(rows[-1]) + 1
            generators = [torch.Generator().manual_seed(s) for s in seeds[first:last]]
            options = {"generator": generators, "num_inference_steps": drawing.steps, "output_type": "np"}
            options |= {"eta": drawing.stochasticity} if drawing.stochasticity else {}
            with seeded(seeds[first]):  # for schedulers that are not given the generators
                images = self._call(labels[rows], drawing.guidance, options)
            drawn.append(torch.from_numpy(images).movedim(3, 1) * 2 - 1)
        return torch.cat(drawn).clamp(-1, 1)

    def _call(self, labels: Tensor, guidance: float, options: dict) -> Any:
        """Call the pipeline, and return its images, an array [n, H, W, C] in [0, 1]."""
        raise NotImplementedError


class Pixels(Pipeline):
    """A DDPM or DDIM: a UNet2DModel on pixels, to which the labels are given if it has a table of classes."""

    parts = {"unet": ("UNet2DModel",), "scheduler": ()}

    def _takes(self, config: Any) -> Takes:
        if config.class_embed_type is not None:
            raise UserError(f"{self.file}: class_embed_type {config.class_embed_type!r} is not covered, only a table")
        return Takes(config.in_channels, self._side(config), config.num_class_embeds or 1)

    @property
    def _has_classes(self) -> bool:
        return self.network.config.num_class_embeds is not None

    def _conditions(self, labels: Tensor) -> dict[str, Tensor]:
        return {"class_labels": labels} if self._has_classes else {}

    def _call(self, labels: Tensor, guidance: float, options: dict) -> Any:
        with self._labelled(labels):
            return self.pipe(batch_size=len(labels), **options).images

    @contextmanager
    def _labelled(self, labels: Tensor):
        """Add the labels to each call of the network: these pipelines call it without any."""
        given = self._conditions(labels.to(self.pipe.device))
        add = lambda _, arguments, options: (arguments, options | given)  # noqa: E731
        handle = self.network.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class Latents(Pipeline):
    """A pipeline whose network works on the latents of an AutoencoderKL."""

    def _image_side(self, config: Any) -> int:
        vae = self.pipe.vae.config
        if config.in_channels != vae.latent_channels:
            raise UserError(
                f"{self.file}: the network takes {config.in_channels} channels, the latents have {vae.latent_channels}: only "
                "networks that take the latents alone are covered"
            )
        return self._side(config) * 2 ** (len(vae.block_out_channels) - 1)

    @torch.no_grad()
    def records(self, images: LabelledImages, progress: bool = True) -> tuple[Tensor, Tensor]:
        """Encode the images in batches of one fixed size: the rounding of an image then does not depend on how many there are."""
        vae, latents = self.pipe.vae, []
        with Progress("encoding", len(images), "image", shown=progress) as bar:
            for part in images.images.split(ENCODED_AT_ONCE):
                pixels = part.to(vae.device)
                filled = torch.cat([pixels, pixels.new_zeros(ENCODED_AT_ONCE - len(pixels), *pixels.shape[1:])])
                means = vae.encode(filled).latent_dist.mean[: len(pixels)]
                latents.append((means * vae.config.scaling_factor).cpu())
                bar.update(len(pixels))
        return torch.cat(latents), images.labels

    def losses(self, training: FineTuning, views: int) -> Losses:
        if training.flips:
            raise UserError(f"training.flips mirrors pixels, and {self.name} trains on latents: leave it out")
        return super().losses(training, views)


class ClassLatents(Latents):
    """A DiT: a transformer on latents, with a table of classes, the last of which means "no label"."""

    part = "transformer"
    targets = "both"  # its only convolution is the one that embeds the patches
    parts = {
        "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
        "vae": ("AutoencoderKL",),
        "scheduler": (),
    }

    def _takes(self, config: Any) -> Takes:
        self.null = config.num_embeds_ada_norm
        return Takes(self.pipe.vae.config.in_channels, self._image_side(config), self.null)

    def _conditions(self, labels: Tensor) -> dict[str, Tensor]:
        return {"class_labels": labels}

    def _predictor(self, model: nn.Module) -> Callable:
        """Leave out the learned variance, as the pipeline does."""
        channels = self.network.config.in_channels
        return lambda x, times, **options: (model(x, times, **options)[0][:, :channels],)

    def check_drawing(self, drawing: Drawing) -> None:
        super().check_drawing(drawing)
        if drawing.guidance and self.null != 1000:
            raise UserError(
                f"{self.name} takes class 1000 for no label, and {self.file} has {self.null} classes: leave out --guidance"
            )

    def _call(self, labels: Tensor, guidance: float, options: dict) -> Any:
        rows = 2 if guidance else 1  # for each image; the pipeline drops the second
        with self._steps_drawing_from(options["generator"] * rows):
            return self.pipe(class_labels=labels.tolist(), guidance_scale=1 + guidance, **options).images

    @contextmanager
    def _steps_drawing_from(self, generators: list[torch.Generator]):
        """Pass the generators to the scheduler's steps: this pipeline does not."""
        scheduler = self.pipe.scheduler
        if "generator" not in inspect.signature(scheduler.step).parameters:
            yield
            return
        scheduler.step = partial(scheduler.step, generator=generators)
        try:
            yield
        finally:
            del scheduler.step


class TextLatents(Latents):
    """A Stable Diffusion: a U-Net on latents that reads a prompt, here one for each class, through a frozen text encoder."""

    parts = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "scheduler": (),
        "text_encoder": (),
        "tokenizer": (),
    }

    def _takes(self, config: Any) -> Takes:
        for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim"):
            if getattr(config, name, None) is not None:
                raise UserError(f"{self.file}: {name} is {getattr(config, name)!r}: only prompts are covered")
        return Takes(self.pipe.vae.config.in_channels, self._image_side(config), None)

    @torch.no_grad()
    def caption(self, prompts: Sequence[str] | None) -> None:
        if prompts is None:
            raise UserError(
                f"{self.name} draws by prompts: give `fastloda finetune` one for each class, as --prompts 'a photo of a "
                "{class}' or --prompts 'cat=a photo of a cat,dog=a photo of a dog'"
            )
        self.prompts, self.null = list(prompts), len(prompts)
        self._texts, _ = self.pipe.encode_prompt([*self.prompts, ""], self.pipe.device, 1, False)

    def _conditions(self, labels: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._texts[labels]}

    def _call(self, labels: Tensor, guidance: float, options: dict) -> Any:
        prompts = [self.prompts[label] for label in labels.tolist()]
        return self.pipe(prompts, guidance_scale=1 + guidance, **options).images


KINDS: dict[str, type[Pipeline]] = {
    "DDPMPipeline": Pixels,
    "DDIMPipeline": Pixels,
    "DiTPipeline": ClassLatents,
    "StableDiffusionPipeline": TextLatents,
}


def open_pipeline(folder: Path, device: torch.device) -> Pipeline:
    """Open a folder with a pipeline of diffusers, in float32. Nothing is downloaded, no pickle read, and no code of it run.

    Raises:
        ValueError: the folder is damaged, or the pipeline or a part of it is of a kind that is not covered.
    """
    index = read_json(folder / PIPELINE)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"{folder} is a {name}, which is not covered: only {', '.join(KINDS)} are")
    kind = KINDS[name]
    for part, classes in kind.parts.items():
        _check_part(folder, part, index.get(part), classes)
        if (folder / part / BESIDE).exists():
            raise UserError(
                f"{folder / part} has adapters in {BESIDE}, which would be left out: save the model after merge_loda, and count "
                "what they have spent if the private images are the same"
            )
    left_out = {part: None for part, what in index.items() if isinstance(what, list) and part not in kind.parts}
    options = {"local_files_only": True, "use_safetensors": True}
    try:
        pipe = _load(name, folder, **options, **left_out)
    except ImportError as error:  # StableDiffusionPipeline without transformers
        raise UserError(f"{name} needs another package: pip install 'fastloda[diffusers]' ({error})") from error
    except Exception as error:  # a damaged folder raises almost any exception
        raise UserError(
            f"{folder} can't be loaded, is damaged, or has weights that are no safetensors: {error}"
        ) from error
    pipe.set_progress_bar_config(disable=True)  # our own bar counts images, not the steps of a batch
    for part in kind.parts:
        if lacking := [name for name, tensor in _tensors(getattr(pipe, part)) if tensor.is_meta]:
            raise UserError(f"{folder}: the weights of {part} lack {', '.join(lacking[:3])}: they are of another model")
    return kind(folder.resolve(), pipe.to(device))


def _load(name: str, folder: Path, **options: Any) -> Any:
    """Load a pipeline without the libraries' progress bars, and without a hint about a part that is left out."""
    # transformers recommends torchvision for image processors, which only the safety checker would use.
    imports, hint = logging.getLogger("transformers.utils.import_utils"), "requires torchvision"
    no_hint = lambda record: hint not in record.getMessage()  # noqa: E731
    imports.addFilter(no_hint)
    try:
        pipeline = getattr(diffusers, name)  # imports transformers, if the pipeline needs it
    finally:
        imports.removeFilter(no_hint)
    libraries = [library for each in ("diffusers", "transformers") if (library := sys.modules.get(each))]
    shown = [log for library in libraries if (log := library.utils.logging).is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        return pipeline.from_pretrained(folder, **options)
    finally:
        for log in shown:
            log.enable_progress_bar()


def _tensors(part: Any) -> list[tuple[str, Tensor]]:
    return [*part.named_parameters(), *part.named_buffers()] if isinstance(part, nn.Module) else []


def _check_part(folder: Path, part: str, what: Any, classes: tuple[str, ...]) -> None:
    match what:
        case [str(library), str(found)] if library in LIBRARIES and (not classes or found in classes):
            return
    raise UserError(
        f"{folder}: {part} is {what}, which is not covered: it must be of {' or '.join(classes or LIBRARIES)}"
    )


def _cdf_of(timesteps: tuple[int, int], count: int) -> Tensor:
    """Return the distribution function of timesteps first .. end - 1, of `count` in all; the default range means all of them."""
    first, end = timesteps
    last = count if end == TIMESTEPS else end
    if not first < last <= count:
        raise UserError(f"training.timesteps are {[first, end]}, but the pipeline's scheduler has {count}")
    within = torch.zeros(count, dtype=torch.float64)
    within[first:last] = 1
    return within.cumsum(0) / within.sum()
