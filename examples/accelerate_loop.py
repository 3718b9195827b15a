"""A training loop with accelerate, made private: `make_private` comes before `accelerator.prepare`.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

`prepare` leaves the private data loader as it is: each process draws its own share of one Poisson batch, and the loop moves it to
the device.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloda import PrivacyEngine

DELTA, EPOCHS = 1e-4, 5


def main() -> None:
    accelerator = Accelerator(step_scheduler_with_optimizer=False)  # one step of the schedule for one of the optimizer
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=150)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=4.0,
        target_delta=DELTA,
        epochs=EPOCHS,
        max_grad_norm=1.0,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    for epoch in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(accelerator.device)), y.to(accelerator.device))
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found = model(images[1500:].to(accelerator.device)).argmax(1).cpu()
        accuracy = (found == labels[1500:]).float().mean()
        accelerator.print(f"epoch {epoch + 1}: accuracy {accuracy:.1%}, epsilon {engine.get_epsilon(DELTA):.2f}")


if __name__ == "__main__":
    main()
