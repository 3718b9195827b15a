"""Diffusion with classifier-free guidance: the U-Net, the noising process that it learns to undo, and the samplers."""

from fastloda.synthesis.diffusion.sampler import class_balanced_labels, guided_noise, sample
from fastloda.synthesis.diffusion.schedule import TIMESTEPS, Diffusion
from fastloda.synthesis.diffusion.unet import PRESETS, UNet, UNetConfig, digits_unet, paper_unet, preset_for

__all__ = [
    "PRESETS",
    "TIMESTEPS",
    "Diffusion",
    "UNet",
    "UNetConfig",
    "class_balanced_labels",
    "digits_unet",
    "guided_noise",
    "paper_unet",
    "preset_for",
    "sample",
]
