"""A LightningModule, made private: `make_private` takes its network, optimizer and loader before the Trainer fits it.

python examples/lightning_module.py
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloda import PrivacyEngine

DELTA = 1e-4


class Classifier(lightning.LightningModule):
    """A classifier of digits; its network and optimizer are private ones."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, engine: PrivacyEngine):
        super().__init__()
        self.network, self.optimizer, self.engine = network, optimizer, engine

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def training_step(self, batch, _) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def validation_step(self, batch, _) -> None:
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(1) == y).float().mean())
        self.log("epsilon", self.engine.get_epsilon(DELTA))


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=150)
    test = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=300)

    engine = PrivacyEngine()
    network, optimizer, loader = engine.make_private(
        module=network, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", **quiet)
    trainer.fit(Classifier(network, optimizer, engine), loader, test)
    found = trainer.callback_metrics
    print(f"accuracy {found['accuracy']:.1%}, epsilon {found['epsilon']:.2f} at delta {DELTA}")


if __name__ == "__main__":
    main()
