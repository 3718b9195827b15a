"""A small classifier: generated images are worth what it learns from them about real ones."""

from .cnn import SmallCNN
from .train import accuracy, jitter, predict, train_classifier

__all__ = ["SmallCNN", "accuracy", "jitter", "predict", "train_classifier"]
