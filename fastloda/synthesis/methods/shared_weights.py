"""Models of public images that several methods, cells and processes share: one of them trains, the others load."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastloda.files import write_atomically
from fastloda.synthesis.data import LabelledImages

from .base import Work


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Admit one process at a time to the context for `path`, whose folder is made; the lock of a killed process is freed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield


def public_path(kind: str, settings: object, public: LabelledImages, work: Work) -> Path:
    """Name the file in work.public_folder of what is trained with these settings, as JSON values, on these images."""
    about = json.dumps([settings, work.public_seed, public.digest()], sort_keys=True)
    return work.public_folder / f"{kind}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"


def public_weights(
    kind: str, settings: Mapping, public: LabelledImages, work: Work, train: Callable[[], nn.Module]
) -> dict[str, Tensor]:
    """Return the weights, on the CPU, of the network that train() makes; it is called only if their file is not there yet."""
    path = public_path(kind, settings, public, work)
    with only_one(path):
        if not path.exists():
            weights = {name: tensor.cpu().contiguous() for name, tensor in train().state_dict().items()}
            write_atomically(path, lambda temporary: save_file(weights, temporary))
    return load_file(path)
