"""Checkpoints of a training run: one file, written atomically, read without running code, refused for another run."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.privacy.ranks import World

FORMAT = "fastloda-checkpoint-5"


class CheckpointError(UserError):
    """The error for a file that is no checkpoint, is damaged, or belongs to another model or another run."""


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> str:
    """Say in which settings two runs differ, by name: "steps is 3 there and 4 here"; nothing if they are alike."""
    changed = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in changed)


def fingerprint(model: nn.Module) -> str:
    """Compute a hash of all frozen values and of the names and shapes of trainable ones, with which a checkpoint must agree."""
    digest = hashlib.sha256()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if name not in trainable:
            if hasattr(tensor, "full_tensor"):
                tensor = tensor.full_tensor()  # sharded: every rank gives its part
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, state: dict, model_fingerprint: str) -> None:
    """Write `state` (tensors and plain values) to `path`. A kill at any moment leaves the old file or the new one."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, "model": model_fingerprint, "state": state}, content)
    write_atomically(path, content.getvalue())


def load_checkpoint(path: str | os.PathLike, model_fingerprint: str, world: World = World()) -> dict:  # noqa: B008
    """Load the saved state on every rank of a world; rank 0 alone needs to see the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, is damaged, or belongs to another model.
    """
    path = Path(path)
    if not world.from_first(path.is_file):
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = io.BytesIO(world.from_first(path.read_bytes))
        document = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for a file that is cut short, or is something else
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is no checkpoint, or is damaged: {reason}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version ({FORMAT})")
    if document["model"] != model_fingerprint:
        raise CheckpointError(f"{path} is a checkpoint of another model: its frozen weights or its adapters differ")
    return document["state"]
