"""A training loop written for Opacus, made private by FastLoDA: the import of the engine is all that changes.

    python examples/opacus_loop.py

It trains a small CNN on scikit-learn's digits to (epsilon, delta) = (4, 1e-4), in physical batches of at most 64 images.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloda import BatchMemoryManager, PrivacyEngine  # was: from opacus and opacus.utils.batch_memory_manager

DELTA = 1e-4


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])

    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(train, batch_size=150)
    criterion = nn.CrossEntropyLoss()

    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=4.0,
        target_delta=DELTA,
        epochs=10,
        max_grad_norm=1.0,
    )
    print(f"noise multiplier {optimizer.noise_multiplier:.3f}, sample rate {loader.sample_rate}")

    for epoch in range(10):
        model.train()
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as parts:
            for x, y in parts:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
        print(f"epoch {epoch + 1}: accuracy {accuracy:.1%}, epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")


if __name__ == "__main__":
    main()
