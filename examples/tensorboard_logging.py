"""A private run logged to TensorBoard: what may be published, and apart from it, under private/, what may not.

    python examples/tensorboard_logging.py          # writes runs/tensorboard; see it with `tensorboard --logdir runs`

The run uses an optimizer and a scheduler of its own, and every 20 steps the averaged weights are tested on public images,
without any effect on the run.
"""

from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.tensorboard import SummaryWriter

from fastloda import DPTrainer, PrivateTraining, StepReport, evaluate_every

RECORDS, BATCH, STEPS = 1500, 150, 60


def losses(model, batch, generator):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def main() -> None:
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train, test = (images[:RECORDS], labels[:RECORDS]), (images[RECORDS:], labels[RECORDS:])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    writer = SummaryWriter("runs/tensorboard")

    def log(trainer: DPTrainer, report: StepReport) -> None:
        if trainer.world.first:
            writer.add_scalar("epsilon", report.epsilon, report.step)
            writer.add_scalar("learning_rate", trainer.optimizer.param_groups[0]["lr"], report.step)
            writer.add_scalar("private/loss", report.private.mean_loss, report.step)
            writer.add_scalar("private/clipped_fraction", report.private.clipped_fraction, report.step)

    @torch.no_grad()
    def evaluate(trainer: DPTrainer) -> None:
        accuracy = (trainer.model(test[0]).argmax(1) == test[1]).float().mean()
        writer.add_scalar("test_accuracy", accuracy, trainer.step)
        print(f"step {trainer.step}: accuracy {accuracy:.1%} of the averaged weights")

    settings = PrivateTraining(
        sample_rate=BATCH / RECORDS,
        expected_batch_size=BATCH,
        steps=STEPS,
        delta=1e-5,
        target_epsilon=8.0,
        ema_decay=0.9,
    )
    trainer = DPTrainer(
        model,
        train,
        losses,
        settings,
        optimizer=partial(torch.optim.NAdam, lr=0.01),
        scheduler=partial(OneCycleLR, max_lr=0.02, total_steps=STEPS),
        callbacks=[log, evaluate_every(20, evaluate)],
        progress=False,
    ).fit()
    writer.close()
    print(
        f"epsilon {trainer.epsilon():.2f}; the curves are in runs/tensorboard, those under private/ not to be published"
    )


if __name__ == "__main__":
    main()
