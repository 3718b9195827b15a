"""The private data: 1,797 real handwritten digits, always split in the same way."""

import torch

from .images import LabelledImages

TEST_COUNT = 360
_ON_PIXELS = 16  # largest value, which counts the on-pixels of a 4 x 4 block


def digits_split() -> tuple[LabelledImages, LabelledImages]:
    """Load the private set (1437 images) and the test set (360): [n, 1, 8, 8], always the same stratified split.

    The counts 0 .. 16 become -1 .. 1. Source: `sklearn.datasets.load_digits`, the test part of UCI's "Optical
    Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), shipped inside scikit-learn: no download.
    """
    from sklearn.datasets import load_digits  # not at the top, where it would add half a second to every import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / (_ON_PIXELS / 2) - 1
    labels = torch.tensor(digits.target, dtype=torch.int64)
    index = torch.arange(len(labels))
    private, test = train_test_split(index, test_size=TEST_COUNT, stratify=labels, random_state=0)
    everything = LabelledImages(images, labels, num_classes=10)
    return everything[private], everything[test]
