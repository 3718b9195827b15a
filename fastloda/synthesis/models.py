"""Files of a U-Net and of a classifier: weights as safetensors, with the configuration in the metadata."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.synthesis.classify import make_network
from fastloda.synthesis.diffusion import UNet, UNetConfig

PRIVATELY, CLASSES = "chosen_privately", "class_names"
T = TypeVar("T", bound=nn.Module)


def save_unet(model: UNet, path: Path, class_names: Sequence[str] = (), chosen_privately: bool = False) -> None:
    """Write a U-Net to `path` atomically.

    Args:
        model: the model.
        path: file to write.
        class_names: name of each class; the numbers "0", "1", ... by default. They are stored in the file's metadata.
        chosen_privately: whether its public images were chosen privately, which costs a part of the budget; stored there too.

    Raises:
        OSError: the file cannot be written.
    """
    about = model.config.to_dict() | ({PRIVATELY: True} if chosen_privately else {})
    about[CLASSES] = list(class_names) or [str(label) for label in range(model.config.num_classes)]
    _save(model, path, about)


def load_unet(path: Path, device: torch.device | str = "cpu") -> UNet:
    """Load a U-Net in channels_last, in which convolutions are fastest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of `save_unet`, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no public model {path}: make one with `fastloda pretrain`; `finetune` and `sample` also take --model FOLDER, a "
            "pipeline of diffusers"
        )
    model, _ = _load(path, "model of `fastloda pretrain`", lambda about: UNet(UNetConfig.from_dict(about)))
    return model.to(device, memory_format=torch.channels_last)


def save_classifier(network: nn.Module, path: Path, class_names: Sequence[str], **config) -> None:
    """Write a classifier to `path` atomically; `config` is what `make_network` made it from.

    Raises:
        OSError: the file cannot be written.
    """
    _save(network, path, config | {CLASSES: list(class_names)})


def load_classifier(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, tuple[str, ...]]:
    """Load a classifier in eval mode, and the names of its classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of `save_classifier`, or is damaged.
    """
    network, about = _load(path, "classifier of FastLoDA", lambda config: make_network(**config))
    return network.to(device).eval(), tuple(about[CLASSES])


def class_names_of(path: Path) -> tuple[str, ...]:
    """Read the names of the classes of the model in `path`."""
    with safetensors.safe_open(path, "pt") as file:
        return tuple(_about(file)[CLASSES])


def was_chosen_privately(path: Path) -> bool:
    """Tell whether the public images of the model in `path` were chosen privately, which costs a part of the budget."""
    with safetensors.safe_open(path, "pt") as file:
        return PRIVATELY in _about(file)


def _save(module: nn.Module, path: Path, about: dict) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    metadata = {"config": json.dumps(about)}  # one entry, because several would have a random order
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _load(path: Path, kind: str, make: Callable[[dict], T]) -> tuple[T, dict]:
    """Load a module, and the facts about it; `make` makes one of the same configuration."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = _about(file)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        module = make({name: value for name, value in about.items() if name not in (PRIVATELY, CLASSES)})
        module.load_state_dict(tensors)
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no {kind}, or is damaged: {error}") from error
    return module, about


def _about(file) -> dict:
    about = json.loads((file.metadata() or {}).get("config", "null"))
    if not isinstance(about, dict):
        raise UserError("it has no configuration")
    return about
