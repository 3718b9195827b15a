"""Diffusers: losses per sample for its U-Nets and schedulers.

`attach_loda`, `save_loda`, `load_loda` and the private step take diffusers' models as they are, and the adapted model stays
what a pipeline expects. `attach_loda(unet)` adapts every convolution; `attach_loda(unet, targets=ATTENTION)` the
attention's projections. Diffusers uses non-reentrant activation checkpointing, which the private step requires.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.utils._pytree import keystr, tree_map_with_path

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.integrations.peft import as_lora
from fastloda.training.noising import add_noise, draw, draw_timesteps

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the targets of diffusers' own LoRA training
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name under which a pipeline looks for LoRA


def save_lora_weights(model: nn.Module, folder: str | os.PathLike, *, part: str = "unet") -> Path:
    """Write a model's adapters as the LoRA that a pipeline loads: `pipe.load_lora_weights(folder)`; return the file's path.

    The file is pytorch_lora_weights.safetensors, written atomically; its metadata has each layer's rank and scale. A pipeline
    that takes no LoRA (DDPM, DiT) takes the merged model instead: `fastloda.merge_loda(model)`.

    Args:
        folder: folder to write into; made if missing.
        part: the model's name in the pipeline: "unet" or "transformer".

    Raises:
        ValueError: the model has no adapters, or one that LoRA can't represent; see `fastloda.integrations.peft.save_peft`.
        OSError: the file cannot be written.
    """
    tensors, _, metadata = as_lora(model, f"{part}.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / LORA_WEIGHTS
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def diffusion_losses(
    unet: nn.Module,
    scheduler: Any,
    x0: Tensor,
    *,
    views: int = 1,
    generator: Generator | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """Compute the mean squared error of the U-Net's prediction, one number per sample and view: [n * views].

    Rows i * views .. (i + 1) * views - 1 belong to sample i, as `ghost_dp_step(..., views=views)` takes them. View k draws
    its timestep from the k-th of `views` equal ranges, and its own noise.

    Args:
        unet: UNet2DModel, UNet2DConditionModel, or any model with the call unet(x_t, t, return_dict=False, **conditions)[0].
        scheduler: any scheduler with `alphas_cumprod` (DDPM, DDIM, PNDM, Euler, DPM-Solver, ...): it gives x_t = sqrt(abar_t)
            x0 + sqrt(1 - abar_t) noise, and by its `prediction_type` the target: the noise ("epsilon"), x0 ("sample"), or
            sqrt(abar_t) noise - sqrt(1 - abar_t) x0 ("v_prediction"; Salimans & Ho 2022).
        x0: [n, C, H, W], images in [-1, 1] or latents.
        generator: generator of the timesteps and the noise; PyTorch's global one if None.
        timesteps, noise: [n * views] integers and [n * views, C, H, W], instead of those that would be drawn.
        conditions: class_labels, encoder_hidden_states, added_cond_kwargs, ... for the U-Net. Every tensor in them, also inside
            dictionaries, lists and tuples (IP-Adapter, ControlNet), has one row per sample, which all of its views share.

    Raises:
        ValueError: the scheduler or a shape does not fit; the message has the value.
    """
    samples = len(x0)
    if not isinstance(views, int) or isinstance(views, bool) or views < 1:
        raise UserError(f"views must be an integer >= 1, got {views!r}")
    conditions = {name: _per_view(name, value, samples, views) for name, value in conditions.items()}
    alphas_cumprod, predicted_kind = _alphas_cumprod(scheduler), _prediction_type(scheduler)
    x0 = x0.repeat_interleave(views, dim=0)
    if timesteps is None:
        timesteps = draw_timesteps(_uniform_cdf(len(alphas_cumprod)), samples, views, generator, x0.device)
    if noise is None:
        noise = draw(torch.randn, x0.shape, generator, x0.device).to(x0)
    if timesteps.shape != (len(x0),) or noise.shape != x0.shape:
        got = f"{tuple(timesteps.shape)} and {tuple(noise.shape)}"
        raise UserError(f"expected timesteps ({len(x0)},) and noise {tuple(x0.shape)}, got {got}")
    targets = {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: add_noise(alphas_cumprod, noise, timesteps, -x0),
    }
    predicted = unet(add_noise(alphas_cumprod, x0, timesteps, noise), timesteps, return_dict=False, **conditions)[0]
    if predicted.shape != x0.shape:  # a learned variance, which a simple loss leaves untrained
        raise UserError(f"the U-Net predicts {tuple(predicted.shape)} for images of {tuple(x0.shape)}")
    precise = torch.promote_types(predicted.dtype, torch.float32)
    return (predicted.to(precise) - targets[predicted_kind]().to(precise)).square().flatten(1).mean(1)


def _alphas_cumprod(scheduler: Any) -> Tensor:
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise UserError(f"{type(scheduler).__name__} has no alphas_cumprod: flow matching and EDM are not covered")
    return alphas_cumprod


@cache
def _uniform_cdf(count: int) -> Tensor:
    return torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:]


def _prediction_type(scheduler: Any) -> str:
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise UserError(f"{type(scheduler).__name__} has prediction_type {kind!r}, not epsilon, sample or v_prediction")
    return kind


def _per_view(name: str, condition: Any, samples: int, views: int) -> Any:
    """Repeat each sample's row of every tensor in a condition once per view, however the tensors are nested."""

    def repeated(path: tuple, value: Any) -> Any:
        place = f"{name}{keystr(path)}"
        if isinstance(value, Tensor):
            if value.dim() == 0 or len(value) != samples:
                raise UserError(
                    f"{place} must have one row for each of {samples} samples, got shape {tuple(value.shape)}"
                )
            return value.repeat_interleave(views, dim=0)
        if views > 1 and _may_hold_rows(value):
            raise UserError(
                f"{place} is a {type(value).__name__}, whose rows can't be repeated for {views} views: give tensors, in "
                "dictionaries, lists or tuples"
            )
        return value

    return tree_map_with_path(repeated, condition)


def _may_hold_rows(value: Any) -> bool:
    """Tell whether a value may hold rows of samples: arrays and objects may; numbers, strings and functions may not."""
    return (
        not isinstance(value, (str, bytes))
        and not callable(value)
        and (hasattr(value, "__len__") or hasattr(value, "__dict__"))
    )
