"""The names of the folders of a run, one for each stage, and of files that several stages use."""

import re

from fastloda.errors import UserError

PUBLIC, CHOSEN, LABELS, LAYERS, PRIVATE = "public", "chosen", "labels", "layers", "private"
ADAPTER, SUMS, EVALUATION = "adapter.safetensors", "sums.safetensors", "evaluation.json"
CHOSEN_IMAGES, CLASSIFIER_WEIGHTS = "images.npz", "classifier.safetensors"


def samples_folder(public: bool, name: str | None) -> str:
    """Return the name of the folder of a set of samples.

    Raises:
        UserError: the name of the set cannot be part of it.
    """
    if name is not None and not re.fullmatch(r"(?!public)\w[\w.-]*", name):
        raise UserError(f"--name must be letters, digits, dots and dashes, and not begin with public, got {name!r}")
    return "-".join(["samples", *(["public"] if public else []), *([name] if name else [])])
