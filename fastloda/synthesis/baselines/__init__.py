"""What FastLoDA is compared with, at the same epsilon."""

from fastloda.synthesis.baselines.dpsgd import DPSGD, run_dpsgd, train_dpsgd

__all__ = ["DPSGD", "run_dpsgd", "train_dpsgd"]
