"""Diffusion with classifier-free guidance: the U-Net, the noising processes that it learns to reverse, and the sampler."""

from fastloda.synthesis.diffusion.ddpm import DDPM
from fastloda.synthesis.diffusion.edm import EDM
from fastloda.synthesis.diffusion.process import TIMESTEPS, Process
from fastloda.synthesis.diffusion.sampler import class_balanced_labels, sample
from fastloda.synthesis.diffusion.unet import PRESETS, UNet, UNetConfig, digits_unet, paper_unet, preset_for

__all__ = [
    "DDPM",
    "EDM",
    "PRESETS",
    "TIMESTEPS",
    "Process",
    "UNet",
    "UNetConfig",
    "class_balanced_labels",
    "digits_unet",
    "paper_unet",
    "preset_for",
    "sample",
]
