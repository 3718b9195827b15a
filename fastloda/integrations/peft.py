"""Conversion of LoRA adapters to and from PEFT's format: adapter_config.json and adapter_model.safetensors in a folder.

With the identity activation LoDA is LoRA (Hu et al. 2021), A and B have the same shapes in both, and PEFT's lora_alpha / r is
LoDA's scale. PEFT itself is not needed, and nothing in the files can run code. diffusers' models that take LoRA load such a
folder too: `unet.load_lora_adapter(folder, weight_name="adapter_model.safetensors", prefix="base_model.model")`.

A model that PEFT has wrapped (get_peft_model) needs none of this: a private step takes it as it is, DoRA excepted.
"""

import json
import logging
import math
import os
import re
from collections import Counter
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.loda.attach import NOTHING_TO_SAVE, install_adapters, loda_layers, real_names, separate
from fastloda.loda.layers import LoDAConv2d, LoDALinear
from fastloda.loda.wrappers import bare_modules

logger = logging.getLogger("fastloda")

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
DIFFUSERS_METADATA = "lora_adapter_metadata"  # the key under which diffusers looks for LoraConfig's arguments

# Settings of a LoraConfig that are read here, or that do not change what A and B compute; all others must be neutral.
UNDERSTOOD = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "bias",
}
HARMLESS = {
    *("peft_version", "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors' names say which
    *(
        "fan_in_fan_out",
        "megatron_core",
        "megatron_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "runtime_config",
    ),
    "lora_dropout",
}
BASE_UNCHANGED = (
    True,
    False,
    "gaussian",
)  # initialisations of A and B that leave the base weights alone; PiSSA, say, does not
PLAIN_PATTERN = re.compile(r"\^?(?:[\w\-.]|\\[.\-])*")  # no repetition: a regular expression that can't take long


def save_peft(model: nn.Module, folder: str | os.PathLike, *, base_model: str | None = None) -> None:
    """Write a model's adapters as PEFT's LoRA, for `PeftModel.from_pretrained(the unadapted model, folder)`.

    Layers of different rank or scale go into PEFT's rank_pattern and alpha_pattern. Each file is written atomically, and
    the folder has no configuration while its tensors change.

    Args:
        folder: folder to write into; made if missing.
        base_model: name or path of the unadapted model, which PEFT's AutoPeftModel looks for.

    Raises:
        ValueError: the model has no adapters, or one that PEFT can't represent, which is named with the reason: a nonlinear
            activation; a convolution with groups, dilation or a padding other than by zeros, where PEFT's adapter differs.
        OSError: a file cannot be written.
    """
    tensors, config, metadata = as_lora(model, PREFIX)
    peft_only = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "inference_mode": True}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(folder / TENSORS, lambda temporary: save_file(tensors, temporary, metadata))
    write_atomically(folder / CONFIG, json.dumps(peft_only | config, indent=2).encode())


def load_peft(model: nn.Module, folder: str | os.PathLike) -> list[str]:
    """Load PEFT's LoRA into a model, first attaching it as adapters with the identity activation if the model has none.

    The model then gives PEFT's outputs in eval mode, and can be trained further, also privately; lora_dropout is dropped.

    Returns:
        The names of the adapted layers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged, or belong to another model; the adapter is no plain LoRA of Conv2d and Linear
            (DoRA, trained biases, PiSSA, ...), with the name of the setting or layer; it is pickled (adapter_model.bin),
            which could run code; or the model has other adapters. The model is unchanged then.
    """
    folder = Path(folder)
    config, tensors = _read_config(folder), _read_tensors(folder)
    settings = {}
    for name in dict.fromkeys(key.removesuffix(".loda_A").removesuffix(".loda_B") for key in tensors):
        settings[name] = _settings(name, config, tensors, folder)
    modules = dict(bare_modules(model))
    for name, own_name in real_names(model, settings).items():
        if reason := _differs_in_peft(modules[own_name]):
            raise UserError(
                f"{folder} adapts {name}, a convolution with {reason}, where PEFT's adapter differs from LoDA's"
            )
    if config.get("lora_dropout"):
        logger.warning("%s was trained with lora_dropout=%s, which is not taken over", folder, config["lora_dropout"])
    return install_adapters(model, settings, tensors, folder)


# ---- writing


def as_lora(model: nn.Module, prefix: str) -> tuple[dict[str, Tensor], dict, dict[str, str]]:
    """Convert a model's adapters to LoRA: tensors by name, LoraConfig's arguments, and metadata with these for diffusers.

    Args:
        prefix: beginning of every name, with its dot.

    Raises:
        ValueError: as for `save_peft`.
    """
    layers = dict(loda_layers(model))
    if not layers:
        raise UserError(NOTHING_TO_SAVE)
    if "" in layers:
        raise UserError("the model is a single layer, which PEFT can't name: put it into a module")
    for name, layer in layers.items():
        if reason := _not_lora(layer):
            raise UserError(f"{name}: {reason}, which PEFT's LoRA can't represent; save_loda can")
    tensors = {}
    for name, layer in layers.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": layer.loda_A, f"{prefix}{name}.lora_B.weight": layer.loda_B}
    config = _config(layers)
    metadata = {DIFFUSERS_METADATA: json.dumps({prefix + key: value for key, value in config.items()})}
    return separate(tensors), config, metadata


def _not_lora(layer: LoDAConv2d | LoDALinear) -> str | None:
    if layer.slope != 1.0:
        return f"activation {layer.activation!r} is not linear"
    reason = _differs_in_peft(layer)
    return reason and f"the convolution has {reason}"


def _differs_in_peft(layer: nn.Module) -> str | None:
    """Say why PEFT's adapter of a layer would differ: PEFT's A takes only a convolution's kernel, stride and padding."""
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.groups != 1:
        return f"groups={layer.groups}"
    if layer.dilation != (1, 1):
        return f"dilation={layer.dilation}"
    return f"padding_mode={layer.padding_mode!r}" if layer.padding_mode != "zeros" else None


def _config(layers: dict[str, LoDAConv2d | LoDALinear]) -> dict:
    """Make LoraConfig's arguments: the most common rank and alpha, and patterns for the layers that have others."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.scale * layer.rank for name, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != alpha},
        "target_modules": "|".join(map(re.escape, layers)),  # a list would also match the ends of other names
    }


def _exactly(name: str) -> str:
    """Make the pattern that matches this name alone."""
    return "^" + re.escape(name)


# ---- reading


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no adapter configuration {path}")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path} is no LoRA configuration: peft_type must be 'LORA'")
    if strange := [key for key in config.keys() - UNDERSTOOD - HARMLESS if config[key]]:
        key = min(strange)
        raise UserError(f"{path} sets {key}={config[key]!r}, which is no plain LoRA: not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path} sets bias={config['bias']!r}: trained biases are not part of an adapter")
    if config.get("init_lora_weights", True) not in BASE_UNCHANGED:
        raise UserError(
            f"{path} sets init_lora_weights={config['init_lora_weights']!r}, which may have changed the base weights: "
            "save it from PEFT as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors, and rename them to LoDA's "name.loda_A" and "name.loda_B"."""
    path = folder / TENSORS
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise UserError(f"{folder / PICKLE} is a pickle, which could run code: save it from PEFT as safetensors")
        raise FileNotFoundError(f"no adapter file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error
    tensors = {}
    for key, tensor in found.items():
        match = KEY.fullmatch(key)
        if not match or not tensor.is_floating_point():
            raise UserError(
                f"{path} holds {key!r} ({tensor.dtype}): only LoRA's A and B of Conv2d and Linear are supported"
            )
        tensors[f"{match[1]}.loda_{match[2]}"] = tensor
    for key in tensors:
        if (other := f"{key[:-1]}{'AB'[key.endswith('A')]}") not in tensors:
            raise UserError(f"{path} is damaged: it holds {key} without {other}")
    if not tensors:
        raise UserError(f"{path} holds no adapters")
    return tensors


def _settings(name: str, config: dict, tensors: dict[str, Tensor], folder: Path) -> dict:
    rank = _matched(name, config, "rank_pattern", "r", folder)
    alpha = _matched(name, config, "alpha_pattern", "lora_alpha", folder)
    found = next(iter(tensors[f"{name}.loda_A"].shape), 0)
    if rank != found or rank < 1:
        raise UserError(f"{folder} is damaged: {name} has r={rank!r} in the configuration, {found} in its tensors")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return {"rank": rank, "activation": "identity", "negative_slope": 0.1, "scale": scale}


def _matched(name: str, config: dict, pattern_key: str, default_key: str, folder: Path) -> float:
    """Look up a layer's rank or alpha as PEFT does: the first pattern that matches the end of the layer's name gives it."""
    default = {"r": 8, "lora_alpha": 8}[default_key]  # LoraConfig's defaults
    value, patterns = config.get(default_key, default), config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{folder / CONFIG}: {pattern_key} must map names to numbers, got {patterns!r}")
    for pattern, number in patterns.items():
        if not PLAIN_PATTERN.fullmatch(pattern):
            raise UserError(
                f"{folder / CONFIG}: {pattern_key} has {pattern!r}: only layer names or their ends are supported"
            )
        if re.match(rf"(.*\.)?({pattern})$", name):
            value = number
            break
    kinds = int if default_key == "r" else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{folder / CONFIG}: {default_key} of {name} is {value!r}, no number")
    return value
