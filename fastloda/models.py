"""The public model in one file: a U-Net's weights as safetensors, its configuration in the metadata."""

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from fastloda.diffusion import UNet, UNetConfig
from fastloda.files import write_atomically


def save_unet(model: UNet, path: Path) -> None:
    """Write it, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"config": json.dumps(model.config.to_dict())}  # one entry: the order of several is random
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_unet(path: Path, device: torch.device | str = "cpu") -> UNet:
    """The U-Net, in channels_last, which convolutions are fastest in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of `save_unet`'s, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no public model {path}: make one with `fastloda pretrain`")
    try:
        with safetensors.safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        model = UNet(UNetConfig.from_dict(config))
        model.load_state_dict(tensors)
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no model of `fastloda pretrain`, or is damaged: {error}") from error
    return model.to(device, memory_format=torch.channels_last)
