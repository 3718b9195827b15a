"""Classifiers, which measure generated images by how well real images can be classified after training on them."""

from .augment import AUGMENTS, AugmentName, augmentation, flip_crop, jitter
from .cnn import SmallCNN
from .networks import NETWORKS, NetworkName, make_network, seeded_network
from .norms import Norm
from .resnet9 import ResNet9
from .train import OptimizerName, accuracy, predict, train_classifier
from .wideresnet import WideResNet

__all__ = [
    "AUGMENTS",
    "NETWORKS",
    "AugmentName",
    "NetworkName",
    "Norm",
    "OptimizerName",
    "ResNet9",
    "SmallCNN",
    "WideResNet",
    "accuracy",
    "augmentation",
    "flip_crop",
    "jitter",
    "make_network",
    "predict",
    "seeded_network",
    "train_classifier",
]
