"""A classifier of public images, by whose features methods tell images apart; methods and seeds of a table share it."""

from torch import nn

from fastloda.synthesis.classify import seeded_network, train_classifier
from fastloda.synthesis.data import LabelledImages

from .base import Work
from .shared_file import public_weights


def public_features(public: LabelledImages, steps: int, work: Work) -> nn.Sequential:
    """Return the layers below the head of a small CNN, trained for `steps` to classify public images; frozen, in eval mode."""

    def train() -> nn.Module:
        options = {"seed": work.public_seed, "device": work.device, "progress": False}
        return train_classifier(public, steps=steps, **options)

    channels, side = public.images.shape[1:3]
    network = seeded_network("cnn", 0, in_channels=channels, num_classes=public.num_classes, image_size=side)
    network.load_state_dict(public_weights("classifier", {"steps": steps}, public, work, train))
    return network.features.to(work.device).eval().requires_grad_(False)
