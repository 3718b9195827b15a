"""Functions that put adapters on a model, and save and load the adapters alone."""

import inspect
import json
import logging
import math
import os
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.loda.arithmetic import LinearOp
from fastloda.loda.layers import LoDAConv2d, LoDALinear, apply_adapter, check_settings, unfilled
from fastloda.loda.wrappers import bare_modules, without_wrappers

logger = logging.getLogger("fastloda")

ADAPTED = (LoDAConv2d, LoDALinear)
L = TypeVar("L", bound=nn.Module)
NO_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # layers without a matrix product
Targets = type | str | Iterable[str] | Callable[[str, nn.Module], bool]
SETTINGS = ("rank", "activation", "negative_slope", "scale")
SAVE = "save_pretrained"  # diffusers', transformers' and huggingface_hub's method
BESIDE = "loda.safetensors"  # the adapter file that is written beside the library's own
NOTHING_TO_SAVE = (
    "the model has no adapters to save: call attach_loda first; what PEFT has wrapped has a save_pretrained(folder)"
)


class LoDAConv1D(LoDALinear):
    """A frozen `Conv1D` of transformers (GPT-2's linear layer) with a trainable adapter, as `LoDALinear`.

    `weight` stays [in_features, out_features], transposed, as the model's own files and `save_pretrained` have it.
    """

    @classmethod
    def unfilled(cls, base: Any, **adapter) -> "LoDAConv1D":
        """Make the adapted layer of base's shapes on the meta device."""
        return cls(base.nx, base.nf, device="meta", dtype=base.weight.dtype, **adapter)

    @classmethod
    def from_linear(cls, linear: Any, **adapter) -> "LoDAConv1D":
        """Make the adapted layer of the Conv1D `linear`, whose tensors it shares."""
        return cls.unfilled(linear, **adapter)._adopt(linear)

    def merge(self) -> nn.Module:
        """Make the nn.Linear with weight W^T + scale B A; errors are those of `LoDALinear.merge`."""
        plain = self._plain()
        plain.weight = nn.Parameter(self.weight.detach().t())
        if isinstance(self.bias, nn.Parameter):
            plain.bias = self.bias
        adapted = LoDALinear.from_linear(plain, **{key: getattr(self, key) for key in SETTINGS})
        adapted.loda_A, adapted.loda_B = self.loda_A, self.loda_B
        return adapted.train(self.training).merge()

    def bare(self) -> nn.Module:
        """Make the Conv1D without the adapter, which shares the frozen tensors."""
        layer = _conv1d()(self.out_features, self.in_features)
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Compute y [N, ..., O] of input [N, ..., C]."""
        op = LinearOp(self.slope, self.scale)
        return apply_adapter(op, input, self.weight.t(), self.bias, self.loda_A, self.loda_B, self.by_row)


def _adaptable() -> tuple[type[nn.Module], ...]:
    """List the types of the layers that can be adapted: transformers' Conv1D too, if anyone has imported it."""
    conv1d = _conv1d()
    return (nn.Conv2d, nn.Linear) if conv1d is None else (nn.Conv2d, nn.Linear, conv1d)


def _conv1d() -> Any:
    """Return transformers' Conv1D; None if nobody has imported it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class Adapted(list[str]):
    """The list of the adapted layers' names; `skipped`: name -> reason, for the matching layers that were left as they were."""

    def __init__(self, names: Iterable[str], skipped: dict[str, str]):
        super().__init__(names)
        self.skipped = skipped


def attach_loda(
    model: nn.Module,
    *,
    rank: int = 4,
    targets: Targets | None = None,
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
    scale: float = 1.0,
) -> Adapted:
    """Replace matching nn.Conv2d, nn.Linear and transformers' Conv1D layers in place by LoDA layers on the same weights.

    All else is frozen. The model's output is unchanged until the adapters train.

    Args:
        model: the model to change.
        targets: a layer type (nn.Conv2d, nn.Linear, or a tuple of types); a regular expression that must match the whole name;
            a list of names, or of their endings after a dot; or a function (name, module) -> bool. Default: every Conv2d, or
            every Linear and Conv1D in a model without any.
        rank, activation, negative_slope, scale: see `LoDAConv2d`.

    Returns:
        The adapted names. `.skipped`, which is also summed up in one line of the log, says which matching layers were left alone
        and why: rank > min(C_in, C_out), so that an adapter would be larger than the layer; a subclass or a layer with hooks or
        a forward of its own, which may compute something else; or another kind of layer with weights, where targets are names
        or the default. Warns if the skipped layers hold most of the weights.

    Raises:
        ValueError: nothing matches, the model already has adapters, or it is a single layer (use `from_conv`, `from_linear`).
    """
    settings = {"rank": rank, "activation": activation, "negative_slope": negative_slope, "scale": scale}
    if adapted := [name for name, _ in loda_layers(model)]:
        raise UserError(
            f"the model already has adapters ({adapted[0]!r} and {len(adapted) - 1} more): load or train those"
        )
    matching = _matching(model, targets)
    if "" in matching:
        raise UserError(
            f"the model is a single {type(model).__name__}: use LoDAConv2d.from_conv or LoDALinear.from_linear"
        )
    skipped = {name: reason for name, layer in matching.items() if (reason := _reason_to_skip(layer, rank))}
    chosen = {
        name: layer for name, layer in matching.items() if isinstance(layer, _adaptable()) and name not in skipped
    }
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise UserError(f"no layer to adapt for targets={targets!r}" + (f" ({reasons}; ...)" if skipped else ""))
    replacements: dict[nn.Module, nn.Module] = {layer: _adapter(layer, settings) for layer in chosen.values()}
    model.requires_grad_(False)
    _replace(model, replacements)
    _save_adapters_too(model)
    _say_what_is_left(skipped, chosen, matching)
    return Adapted(chosen, skipped)


def _say_what_is_left(skipped: dict[str, str], chosen: Mapping[str, nn.Module], matching: dict[str, nn.Module]) -> None:
    """Log in one line which matching layers are left as they are; warn instead if they hold most of the weights."""
    if not skipped:
        return
    reasons = list(dict.fromkeys(skipped.values()))
    parts = [f"{_listed([name for name in skipped if skipped[name] == reason])} ({reason})" for reason in reasons]
    left = f"{len(skipped)} of the {len(matching)} layers that match: {_listed(parts, '; ')}"
    share = sum(map(_weights, chosen.values())) / sum(map(_weights, matching.values()))
    if share < 0.5:
        adapted = f"attach_loda adapted only {_listed(list(chosen))}, with {share:.0%} of the weights"
        warnings.warn(f"{adapted}; not adapted: {left}", stacklevel=3)
    else:
        logger.warning("not adapted: %s", left)


def _listed(names: list[str], between: str = ", ") -> str:
    return between.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weights(layer: nn.Module) -> int:
    """Estimate how many weights the layer itself multiplies with, without embedding tables, scales and position embeddings."""
    if isinstance(layer, _adaptable()):
        own = list(layer.parameters())
    else:
        named = {} if isinstance(layer, NO_PRODUCT) else layer._parameters
        own = [p for name, p in named.items() if p is not None and ("weight" in name or not layer._modules)]
    return sum(p.numel() for p in own if p.dim() > 1)


def _matching(model: nn.Module, targets: Targets | None) -> dict[str, nn.Module]:
    modules = dict(_layers(model, (nn.Module,)))
    layers = {name: m for name, m in modules.items() if isinstance(m, _adaptable())}
    others = {name: m for name, m in modules.items() if name and name not in layers and _weights(m)}
    if targets is None:
        convolutions = {name: m for name, m in layers.items() if isinstance(m, nn.Conv2d)}
        return (convolutions or layers) | others
    if isinstance(targets, (type, tuple)) and all(isinstance(t, type) for t in _as_tuple(targets)):
        kinds = _as_tuple(targets)
        matches = lambda name, layer: isinstance(layer, kinds)  # noqa: E731
    elif callable(targets):
        matches, others = targets, {}  # the function is asked only about layers that can be adapted
    elif isinstance(targets, str):
        matches = lambda name, layer: re.fullmatch(targets, name)  # noqa: E731
    else:
        endings = tuple(targets)
        unknown = [e for e in endings if not any(name == e or name.endswith("." + e) for name in layers | others)]
        if unknown:
            raise UserError(f"targets {unknown} match no Conv2d or Linear; the model has {list(layers)[:8]}...")
        matches = lambda name, layer: any(name == e or name.endswith("." + e) for e in endings)  # noqa: E731
    return {name: layer for name, layer in (layers | others).items() if matches(name, layer)}


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _reason_to_skip(layer: nn.Module, rank: int) -> str | None:
    if reason := _reason_to_keep(layer):
        return reason
    weight: Any = layer.weight  # a layer without one has a reason already
    narrowest = min(weight.shape[0], getattr(layer, "in_channels", weight.shape[1]))
    return f"rank {rank} > min(C_in, C_out) = {narrowest}" if rank > narrowest else None


def _reason_to_keep(layer: nn.Module) -> str | None:
    """Tell why replacing the layer would change what the model computes; None if it would not."""
    if not isinstance(layer, _adaptable()):
        return f"{type(layer).__name__} is no nn.Conv2d and no nn.Linear: replace it by one, or wrap the model by PEFT's LoRA"
    if type(layer) not in _adaptable():
        return f"{type(layer).__name__} is a subclass that may compute something else"
    return _lost_by_replacement(layer)


def _lost_by_replacement(layer: nn.Module) -> str | None:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks, which the replacement would lose"
    if "forward" in vars(layer):  # as accelerate's offloading does
        return "its forward is overridden, which the replacement would lose"
    return None


def _adapter(layer: Any, settings: dict) -> LoDAConv2d | LoDALinear:
    if isinstance(layer, nn.Conv2d):
        return LoDAConv2d.from_conv(layer, **settings)
    return (LoDALinear if isinstance(layer, nn.Linear) else LoDAConv1D).from_linear(layer, **settings)


def _blank(layer: Any, settings: dict) -> LoDAConv2d | LoDALinear:
    """Make an adapted layer of `layer`'s shapes on the meta device."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        return unfilled(layer, **settings)
    return LoDAConv1D.unfilled(layer, **settings)


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace layers at every place where they stand: a module may be registered under several names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
                if name == "_orig_mod":  # the wrapper also holds compiled code of the old layer: make the wrapper anew
                    parent.__setstate__(parent.__getstate__())


def merge_loda(model: nn.Module) -> list[str]:
    """Replace the model's adapted layers in place by ordinary ones of weight W + scale B A, which compute the same.

    The model then has no adapters and its original structure, so that any library saves, loads and exports it. The new weights
    are rounded to the dtype of W, and are frozen.

    Returns:
        The names of the merged layers.

    Raises:
        ValueError: the model has no adapters or is a single layer, or one of its layers, which is named, can't be merged: its
            activation is nonlinear, its convolution grouped, or it has hooks. The model is as before.
    """
    layers = _replaceable(model, "merge")
    merged: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if reason := _lost_by_replacement(layer):
            raise UserError(f"{name} can't be merged: {reason}")
        try:
            merged[layer] = layer.merge()
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    _replace(model, merged)
    _save_as_the_library_does(model)
    return list(layers)


def detach_loda(model: nn.Module, *, keep: Iterable[str] = ()) -> list[str]:
    """Take the adapters off in place: these layers are as before `attach_loda`, but frozen. What the adapters learned is lost.

    Args:
        model: the model to change.
        keep: the names of layers whose adapters stay, as `attach_loda` returned them; default: none.

    Returns:
        The names of the layers whose adapters were taken off.

    Raises:
        ValueError: a name in `keep` is no adapted layer's, the model has no adapters or is a single layer, or an adapted layer
            has hooks. The model is as before.
    """
    layers, kept = _replaceable(model, "take off"), set(keep)
    if unknown := sorted(kept - layers.keys()):
        raise UserError(f"keep names {unknown[:5]}, which have no adapters")
    bare = {name: layer for name, layer in layers.items() if name not in kept}
    for name, layer in bare.items():
        if reason := _lost_by_replacement(layer):
            raise UserError(f"the adapter of {name} can't be taken off: {reason}")
    _replace(model, {layer: layer.bare() for layer in bare.values()})
    if not kept:
        _save_as_the_library_does(model)
    return list(bare)


def _replaceable(model: nn.Module, verb: str) -> dict[str, LoDAConv2d | LoDALinear]:
    """Find the adapted layers of a model; refuse a model that has none, or that is one of them and can't be replaced in place."""
    layers = dict(loda_layers(model))
    if not layers:
        raise UserError(f"the model has no adapters to {verb}")
    if "" in layers:
        raise UserError(
            f"the model is a single layer, which can't be replaced in place: model.{'merge' if verb == 'merge' else 'bare'}() "
            "makes the other one"
        )
    return layers


def _save_adapters_too(model: nn.Module) -> None:
    """Make `save_pretrained` of the model and its parts write the adapters as well, where a library gave them that method."""
    for part in model.modules():
        if callable(getattr(type(part), SAVE, None)) and any(isinstance(m, ADAPTED) for m in part.modules()):
            setattr(part, SAVE, _SavePretrained(part))


def _save_as_the_library_does(model: nn.Module) -> None:
    for part in model.modules():
        vars(part).pop(SAVE, None)


class _SavePretrained:
    """The `save_pretrained` of a model with adapters: the library's own, then the adapters beside it, and a warning."""

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:  # diffusers' pipelines pass on the options that they find in it
        return inspect.signature(partial(getattr(type(self.model), SAVE), self.model))

    def __call__(self, save_directory: str | os.PathLike, *arguments, **options):
        result = getattr(type(self.model), SAVE)(self.model, save_directory, *arguments, **options)
        path = Path(save_directory) / BESIDE
        save_loda(self.model, path)
        warnings.warn(
            f"from_pretrained({str(save_directory)!r}) will give the model without its adapters, which are in {path}: "
            "load_loda(model, that file) puts them on; or call merge_loda(model) before, which folds adapters of the identity "
            "activation into the weights",
            stacklevel=2,
        )
        return result


def _layers(model: nn.Module, types: tuple[type[L], ...]) -> Iterator[tuple[str, L]]:
    """Yield (name, layer) of the layers of these types, each once, under its first name."""
    seen = set()
    for name, module in bare_modules(model):
        if isinstance(module, types) and module not in seen:
            seen.add(module)
            yield name, module


def loda_layers(model: nn.Module) -> Iterator[tuple[str, LoDAConv2d | LoDALinear]]:
    """Yield (name, layer) of each adapted layer; names are those in the model without its wrappers."""
    return _layers(model, ADAPTED)


def loda_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the adapters' parameters, A and B of each layer; parameters that layers share are listed once."""
    return list(dict.fromkeys(p for _, layer in loda_layers(model) for p in (layer.loda_A, layer.loda_B)))


def loda_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Collect the adapters' tensors by name, detached; wrappers around the model or a part of it do not change the names."""
    layers = loda_layers(model)
    return {f"{name}.{key}": getattr(layer, key).detach() for name, layer in layers for key in ("loda_A", "loda_B")}


def save_loda(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the model's adapters as safetensors, with their settings in the metadata, atomically; the folder is made if missing.

    Raises:
        ValueError: the model has no adapters.
        OSError: the file cannot be written.
    """
    settings = {name: {key: getattr(layer, key) for key in SETTINGS} for name, layer in loda_layers(model)}
    if not settings:
        raise UserError(NOTHING_TO_SAVE)
    tensors = separate(loda_state_dict(model))
    # One key, since the order of several varies: equal adapters give equal files.
    metadata = {"loda": json.dumps(settings)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)  # a missing folder must not lose a run that was paid for
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors for safetensors: contiguous, on the CPU, and without the shared memory that shared adapters have."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def load_loda(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Load adapters from a file into a model, attaching them first if it has none. Returns the names of the adapted layers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no adapter file, or one of another model or of other settings; the model is as before.
    """
    return install_adapters(model, *_read(Path(path)), path)


def install_adapters(
    model: nn.Module, settings: dict[str, dict], tensors: dict[str, Tensor], path: str | os.PathLike
) -> list[str]:
    """Put adapters into a model as `load_loda` does, from the contents of a file.

    Args:
        settings: layer name -> settings of `attach_loda`.
        tensors: "name.loda_A" and "name.loda_B" -> tensor.
        path: the file that error messages name.

    Raises:
        ValueError: the adapters are of another model or of other settings; the model is as before.
    """
    settings, tensors = _in_names_of(model, settings, tensors, path)
    layers = dict(loda_layers(model))
    bases = {} if layers else _bases(model, settings, path)
    blank = {name: _blank(base, settings[name]) for name, base in bases.items()}
    _check_same(layers or blank, settings, tensors, path)
    if bases:
        layers = {name: _adapter(base, settings[name]) for name, base in bases.items()}
        model.requires_grad_(False)
        _replace(model, {base: layers[name] for name, base in bases.items()})
        _save_adapters_too(model)
    with torch.no_grad():
        for name, layer in layers.items():
            for key in ("loda_A", "loda_B"):
                getattr(layer, key).copy_(tensors[f"{name}.{key}"])
    return list(layers)


def _read(path: Path) -> tuple[dict[str, dict], dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"no adapter file {path}")
    if reason := _no_safetensors(path):
        raise UserError(f"{path} is {reason}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("loda", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no safetensors file, or is cut short: {error}") from error
    if settings is None:
        raise UserError(f"{path} holds no LoDA adapters, but {_foreign(tensors)}")
    try:
        for chosen in settings.values():
            check_settings(**chosen)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} holds no LoDA adapters, or is damaged: {error}") from error
    if not settings:
        raise UserError(f"{path} holds no LoDA adapters")
    if set(tensors) != {f"{name}.{key}" for name in settings for key in ("loda_A", "loda_B")}:
        raise UserError(f"{path} is damaged: its tensors are not those of the layers in its metadata")
    for name, chosen in settings.items():  # checked before a layer of that rank is made
        if (rank := chosen["rank"]) != (found := next(iter(tensors[f"{name}.loda_A"].shape), 0)):
            raise UserError(f"{path} is damaged: {name} has rank {rank} in the metadata, {found} in its tensors")
    return settings, tensors


def _no_safetensors(path: Path) -> str | None:
    """Describe a file or folder that can't be a safetensors file, and say what loads it; return None if it may be one."""
    if path.is_dir():
        peft = (path / "adapter_config.json").is_file()
        return (
            "a folder with PEFT's LoRA: fastloda.integrations.peft.load_peft loads it" if peft else "a folder, no file"
        )
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        return "empty"
    if start[8:] == b"{":  # the header begins after the eight bytes of its length
        return None
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # torch.save's archives, and older pickles
        return (
            "a pickle, as torch.save writes them, which could run code: look into it with torch.load(..., weights_only=True), "
            "and save adapters by save_loda"
        )
    return None


def _foreign(tensors: dict[str, Tensor]) -> str:
    """Describe tensors that save_loda did not write, from their names, and say what loads them."""
    for pattern, what in FOREIGN.items():
        if any(re.search(pattern, name) for name in tensors):
            return what
    return f"{len(tensors)} tensors of something else ({_listed(sorted(tensors))})" if tensors else "no tensors at all"


FOREIGN = {  # a pattern found in a tensor's name -> what the file is
    r"^base_model\.model\..*lora_": "PEFT's LoRA: fastloda.integrations.peft.load_peft(model, folder) loads it, from the folder "
    "that holds adapter_config.json too",
    r"lora_(up|down)\.|^lora_(unet|te[12]?)_": "a LoRA as webui and kohya write them: diffusers' "
    "pipeline.load_lora_weights loads it",
    r"\.lora_[AB]\.|\.lora\.(up|down)\.": "a LoRA of diffusers: its load_lora_weights or load_lora_adapter loads it",
    r"(^|\.)loda_[AB]$": "a state dict with adapters but not their settings: attach_loda the same ones, and then "
    "model.load_state_dict(safetensors.torch.load_file(path), strict=False)",
    r"(^|\.)(weight|bias)$": "a state dict: model.load_state_dict(safetensors.torch.load_file(path)) loads it",
}


def real_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map the layer names in a file to the model's own, if it has such a layer, under any of its names, in wrappers or not."""
    modules = {name: m for name, m in bare_modules(model) if isinstance(m, _adaptable())}
    first = {layer: name for name, layer in _layers(model, _adaptable())}
    stripped = defaultdict(dict)
    for name, module in modules.items():
        stripped[without_wrappers(name)][module] = None
    found = {}
    for name in names:
        candidates = [modules[name]] if name in modules else list(stripped.get(without_wrappers(name), ()))
        if len(candidates) == 1:
            found[name] = first[candidates[0]]
    return found


def _in_names_of(
    model: nn.Module, settings: dict[str, dict], tensors: dict[str, Tensor], path: str | os.PathLike
) -> tuple[dict[str, dict], dict[str, Tensor]]:
    real = real_names(model, settings)
    twice = [name for name, count in Counter(real.values()).items() if count > 1]
    if twice:
        same = [name for name in settings if real.get(name) == twice[0]]
        raise UserError(f"{path} has adapters for {same}, which are one layer of this model: another model's adapters")
    renamed = {name: real.get(name, name) for name in settings}
    layers = {renamed[name]: chosen for name, chosen in settings.items()}
    return layers, {
        f"{renamed[name]}.{key}": tensors[f"{name}.{key}"] for name in settings for key in ("loda_A", "loda_B")
    }


def _bases(model: nn.Module, settings: dict[str, dict], path: str | os.PathLike) -> dict[str, nn.Module]:
    modules = dict(bare_modules(model))
    bases = {name: layer for name, layer in modules.items() if name in settings and isinstance(layer, _adaptable())}
    strangers = [name for name in settings if name not in bases]
    if strangers:
        raise UserError(
            f"{path} adapts {strangers[:5]}, no Conv2d or Linear of this model: these are another model's adapters"
        )
    if any(layer is model for layer in bases.values()):
        raise UserError(
            f"{path} adapts a single layer, which can't be replaced in place: load into LoDAConv2d.from_conv(layer, ...) or "
            "LoDALinear.from_linear(layer, ...)"
        )
    for name, layer in bases.items():
        if reason := _reason_to_keep(layer):
            raise UserError(f"{path} adapts {name!r}, which can't be replaced here: {reason}")
    return bases


def _same(key: str, ours, theirs, activation: str) -> bool:
    if key == "negative_slope" and activation == "identity":
        return True  # it has no effect
    return math.isclose(ours, theirs, rel_tol=1e-12) if key == "scale" else ours == theirs


def _check_same(
    layers: Mapping[str, nn.Module], settings: dict[str, dict], tensors: dict[str, Tensor], path: str | os.PathLike
) -> None:
    if strangers := sorted(layers.keys() ^ settings.keys()):
        raise UserError(f"{path} and the model adapt different layers: {strangers[:5]}")
    for name, layer in layers.items():
        for key in SETTINGS:
            ours, theirs = getattr(layer, key), settings[name][key]
            if not _same(key, ours, theirs, settings[name]["activation"]):
                raise UserError(f"{path}: {name} has {key}={theirs!r}, the model has {ours!r}")
        for key in ("loda_A", "loda_B"):
            ours, theirs = tuple(getattr(layer, key).shape), tuple(tensors[f"{name}.{key}"].shape)
            if ours != theirs:
                raise UserError(
                    f"{path}: {name}.{key} has shape {theirs}, the model has {ours}: another model's adapters"
                )
