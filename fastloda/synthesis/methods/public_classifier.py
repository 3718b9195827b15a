"""A classifier of public images, by whose features methods and image scores tell images apart; a table's cells share it."""

from torch import nn

from fastloda.synthesis.classify import seeded_network, train_classifier
from fastloda.synthesis.data import LabelledImages

from .base import Work
from .shared_weights import public_weights


def public_classifier(public: LabelledImages, steps: int, work: Work) -> nn.Module:
    """Train a small CNN for `steps` to classify public images, or load it from work.public_folder; frozen, in eval mode."""

    def train() -> nn.Module:
        options = {"seed": work.public_seed, "device": work.device, "progress": False}
        return train_classifier(public, steps=steps, **options)

    channels, side = public.images.shape[1:3]
    network = seeded_network("cnn", 0, in_channels=channels, num_classes=public.num_classes, image_size=side)
    network.load_state_dict(public_weights("classifier", {"steps": steps}, public, work, train))
    return network.to(work.device).eval().requires_grad_(False)
