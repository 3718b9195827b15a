"""Scores of how close generated images are to real ones: FID, KID, precision and recall, on features of your choice.

They are computed from real images without noise: those of private images are only for the operator.
"""

from .distances import Scores, fid, kid, precision_recall, scores
from .features import Extractor, classifier_features, torchscript_features

__all__ = [
    "Extractor",
    "Scores",
    "classifier_features",
    "fid",
    "kid",
    "precision_recall",
    "scores",
    "torchscript_features",
]
