"""The plan of a run from public and private images to synthetic ones: what it will do, need and cost, known before it starts."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from fastloda.privacy.step import GhostClipper
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import UNet, UNetConfig
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods.diffusion_model import PrivateTuning
from fastloda.synthesis.presets import SAMPLER_STEPS
from fastloda.synthesis.recipe import Recipe
from fastloda.synthesis.settings import Adapter
from fastloda.synthesis.stages.preview import PREVIEW_COLUMNS

REPEATS = 2
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """The cost of one image in a step, measured on a few public images.

    Attributes:
        parameters: number of the model's parameters.
        trained: number of those that private training changes.
        public_seconds, private_seconds, sampling_seconds: time per image in a step of public training, per record in one of
            private training, and per image in a step of the sampler.
        public_bytes, private_bytes: memory per image, or per record, that a step keeps for the backward pass.
    """

    parameters: int
    trained: int
    public_seconds: float
    private_seconds: float
    sampling_seconds: float
    public_bytes: float
    private_bytes: float


def measure(
    config: UNetConfig, public: LabelledImages, tuning: PrivateTuning, adapter: Adapter, device: torch.device
) -> Cost:
    """Measure what a step costs, with a new U-Net and some public images."""
    model = UNet(config).to(device, memory_format=torch.channels_last)
    some = 2**13 if device.type == "cpu" else 2**17  # pixels; a GPU needs as long for few images as for many
    count = max(4, min(128, some // config.image_size**2))
    index = torch.arange(count) % len(public)
    images, labels = public.images[index].to(device), public.labels[index].to(device)
    generator = Generator(device).manual_seed(0)
    parameters = sum(p.numel() for p in model.parameters())

    def public_loss() -> Tensor:
        return model.process.losses(model, images, labels, generator=generator).mean()

    def sampling_step() -> Tensor:
        with torch.inference_mode():
            return model(images, torch.zeros_like(labels), labels)

    public_seconds, public_bytes = _median_seconds(lambda: public_loss().backward(), device), saved_bytes(public_loss)
    sampling_seconds = _median_seconds(sampling_step, device)
    model.zero_grad()
    with _silent(logging.getLogger("fastloda")):  # `finetune` reports which layers are left out
        adapter.attach(model)
    _leave_the_start(model)
    clipper = GhostClipper(model, 1.0, tuning.views)
    losses_of = tuning.training.losses(tuning.trained(model.process), tuning.views)

    def private_losses() -> Tensor:
        return losses_of(model, (images, labels), generator)

    private_seconds = _median_seconds(lambda: clipper.accumulate(private_losses()), device)
    private_bytes = saved_bytes(private_losses)
    trained = sum(p.numel() for p in clipper.parameters.values())
    per_image = (x / count for x in (public_seconds, private_seconds, sampling_seconds, public_bytes, private_bytes))
    return Cost(parameters, trained, *per_image)


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _leave_the_start(model: UNet) -> None:
    """Replace weights that start at zero: gradients that are zero because of them would be probed again in every step."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(1e-3)


@dataclass(frozen=True)
class Plan:
    """The plan of a run: recipe, U-Net, cost of a step, images per owner in a step, and the name of the units of privacy."""

    recipe: Recipe
    unet: UNetConfig
    cost: Cost
    per_owner: int = 1
    counted: str = "records"

    @property
    def seconds(self) -> dict[str, float]:
        """The estimated time of each stage; `evaluate` is left out."""
        recipe, cost, privacy = self.recipe, self.cost, self.recipe.privacy

        def training(public: PublicTraining) -> float:
            preview = PREVIEW_COLUMNS * self.unet.num_classes * SAMPLER_STEPS * cost.sampling_seconds
            return public.steps * public.batch_size * cost.public_seconds + preview

        private = privacy.steps * privacy.batch_size * self.per_owner * cost.private_seconds
        passes = recipe.count * recipe.tuning.sampler_steps * (2 if recipe.tuning.guidance else 1)
        choice = {"choose": training(recipe.choice.training)} if recipe.choice else {}
        sampling = {"sample": passes * cost.sampling_seconds}
        return {"pretrain": training(recipe.pretraining)} | choice | {"finetune": private} | sampling

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self, noise_multiplier: float) -> dict[str, object]:
        """Describe each stage; times and memory are estimated from the measured steps."""
        recipe, cost, pretraining, privacy = self.recipe, self.cost, self.recipe.pretraining, self.recipe.privacy
        at_once = min(recipe.tuning.training.micro_batch_size, privacy.batch_size)
        memory = max(pretraining.batch_size * cost.public_bytes, at_once * cost.private_bytes)
        times = {stage: duration(seconds) for stage, seconds in self.seconds.items()}
        further = recipe.choice and recipe.choice.training
        choice = {"choose": {"steps": further.steps, "time": times["choose"]}} if further else {}
        return {
            "pretrain": {
                "steps": pretraining.steps,
                "images a step": pretraining.batch_size,
                "parameters": cost.parameters,
                "time": times["pretrain"],
            },
            **choice,
            "finetune": {
                "epsilon": privacy.target_epsilon,
                "delta": privacy.delta,
                "noise multiplier": round(noise_multiplier, 3),
                "steps": privacy.steps,
                f"{self.counted} a step": f"{privacy.batch_size} expected of {privacy.records}, {privacy.views} views of each",
                "trained numbers": cost.trained,
                "time": times["finetune"],
            },
            "sample": {
                "images": recipe.count,
                "channels and pixels": f"{self.unet.in_channels} x {self.unet.image_size} x {self.unet.image_size}",
                "sampler steps": recipe.tuning.sampler_steps,
                "time": times["sample"],
            },
            "memory": f"about {memory / GIB:.1f} GiB for a step",
        }


def duration(seconds: float) -> str:
    """Write an estimated time in the unit that suits it."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Count the bytes that a forward pass keeps for its backward pass; each storage is counted once."""
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # noqa: F841, it keeps the storages alive, so that no two have one address
    return sum(sizes.values())


def _median_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Measure the median time of a step; a first call is not counted."""
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
