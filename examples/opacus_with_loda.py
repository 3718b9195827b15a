"""Opacus's own engine on a model with LoDA adapters: one import teaches it their per-sample gradients.

    pip install 'fastloda[opacus]'
    python examples/opacus_with_loda.py

A CNN is trained on scikit-learn's digits 0 to 4, which are public here; then Opacus fine-tunes its adapters, and only them, on
most of the digits 5 to 9, once in its "hooks" and once in its "ghost" mode. The remaining digits 5 to 9 are the test set.
"""

import copy
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastloda.integrations.opacus  # noqa: F401
from fastloda import attach_loda, loda_parameters

warnings.filterwarnings("ignore", message="Secure RNG turned off|Full backward hook is firing")


def pretrained(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 5)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def main() -> None:
    from opacus import PrivacyEngine

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    public = labels < 5
    base = pretrained(images[public], labels[public])
    x, y = images[~public], labels[~public] - 5
    private, test = TensorDataset(x[:700], y[:700]), (x[700:], y[700:])

    for mode in ("hooks", "ghost"):
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        attach_loda(model, rank=4, targets=["2", "5"])
        optimizer = torch.optim.Adam(loda_parameters(model), lr=1e-2)
        engine, criterion = PrivacyEngine(), nn.CrossEntropyLoss()
        made = engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(private, batch_size=100),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
        wrapped, optimizer, *criteria, loader = made
        criterion = criteria[0] if criteria else criterion
        for _ in range(5):
            for x, y in loader:
                optimizer.zero_grad()
                criterion(wrapped(x), y).backward()
                optimizer.step()
        with torch.no_grad():
            accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
        print(f"{mode}: accuracy {accuracy:.1%} on digits 5 to 9, epsilon {engine.get_epsilon(1e-4):.2f} at delta 1e-4")


if __name__ == "__main__":
    main()
