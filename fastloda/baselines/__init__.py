"""What FastLoDA is compared with, at the same epsilon."""

from fastloda.baselines.dpsgd import DPSGD, dpsgd, train_dpsgd

__all__ = ["DPSGD", "dpsgd", "train_dpsgd"]
