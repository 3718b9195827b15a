"""Ordinary, non-private training of the diffusion model on public images."""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastloda.errors import UserError
from fastloda.interrupts import interrupts_wait
from fastloda.progress import Progress
from fastloda.randomness import generator_states, make_generators, restore_generators
from fastloda.synthesis.data.images import LabelledImages
from fastloda.synthesis.diffusion.process import Process
from fastloda.synthesis.diffusion.unet import UNet
from fastloda.training.average import Average, copy_into
from fastloda.training.checkpoint import CheckpointError, fingerprint, load_checkpoint, save_checkpoint
from fastloda.training.posthoc import Snapshots
from fastloda.training.schedules import warmup_then


@dataclass(frozen=True)
class PublicTraining:
    """Settings of public pre-training.

    Attributes:
        steps: number of optimizer steps (AdamW, warm-up, cosine).
        batch_size: number of images in a step, drawn with replacement.
        learning_rate: peak learning rate of AdamW.
        warmup: number of steps of linear warm-up; a cosine to zero follows.
        weight_decay: weight decay of AdamW.
        ema_decay: decay of the moving average of the weights, which training leaves in the model.
        label_dropout: share of labels that are dropped, for classifier-free guidance.
        seed: seed of batches, timesteps and noise.
    """

    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.0
    ema_decay: float = 0.995
    label_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.ema_decay < 1 or not self.learning_rate > 0:
            raise UserError(f"need steps, batch_size >= 1, learning_rate > 0 and 0 <= ema_decay < 1, got {self}")


def pretrain(
    model: UNet,
    data: LabelledImages,
    settings: PublicTraining,
    *,
    process: Process | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 200,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
    snapshots: int = 0,
    length: float | None = None,
) -> UNet:
    """Train all of `model` on public images, and leave the averaged weights in it; resume from `checkpoint` if it exists.

    It saves every `checkpoint_every` steps, after `checkpoint_seconds` without a save, at the end, and at SIGINT (Ctrl-C) or
    SIGTERM, which take effect after the current step. `process` replaces the model's own process, to train at some levels only.

    With `snapshots` (32, say) the average can have any relative `length`, instead of being ema_decay's (`training/posthoc.py`);
    another call with the same checkpoint computes an average of another length, without training.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another model, other settings or other data.
        UserError: training began with another number of snapshots, or an average of that length can't be computed.
    """
    checkpoint_path = None if checkpoint is None else Path(checkpoint)
    run = _Run(model, process or model.process, data, settings, checkpoint_path, snapshots)
    saved = time.monotonic()
    with (
        interrupts_wait() as received,
        Progress("public", settings.steps, done=run.step, shown=progress) as bar,
    ):
        while run.step < settings.steps and not received:
            loss = run.train_step()
            bar.update(note=f"loss {loss.item():.4f}" if run.step % 10 == 0 else "")
            waited = time.monotonic() - saved >= checkpoint_seconds
            if run.step % checkpoint_every == 0 or waited or received or run.step == settings.steps:
                run.save()
                saved = time.monotonic()
    copy_into(run.parameters, run.average.values if length is None else run.snapshots.average(length))
    return model


class _Run:
    def __init__(
        self,
        model: UNet,
        process: Process,
        data: LabelledImages,
        settings: PublicTraining,
        checkpoint: Path | None,
        snapshots: int,
    ):
        self.model, self.process, self.data, self.settings, self.checkpoint = model, process, data, settings, checkpoint
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        s = settings
        self.optimizer = torch.optim.AdamW(self.parameters.values(), s.learning_rate, weight_decay=s.weight_decay)
        self.schedule = warmup_then(self.optimizer, "cosine", s.steps, s.warmup)
        self.average = Average(self.parameters, s.ema_decay)
        self.snapshots = Snapshots(self.parameters, s.steps, snapshots)
        self.generators = make_generators({"batches": "cpu", "losses": self.device}, s.seed)
        self.step = 0
        self._fingerprint = fingerprint(model)
        if checkpoint is not None and checkpoint.exists():
            self._resume()

    def train_step(self) -> torch.Tensor:
        index = torch.randint(len(self.data), (self.settings.batch_size,), generator=self.generators["batches"])
        x, y = self.data.images[index].to(self.device), self.data.labels[index].to(self.device)
        dropout = self.settings.label_dropout
        loss = self.process.losses(self.model, x, y, label_dropout=dropout, generator=self.generators["losses"]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.average.update(self.step)
        self.snapshots.update(self.step)
        return loss.detach()

    def save(self) -> None:
        if self.checkpoint is None:
            return
        state = {
            "settings": asdict(self.settings),
            "images": self.data.digest(),
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average.values,
            "snapshots": self.snapshots.state(),
            "optimizer": self.optimizer.state_dict(),
            "generators": generator_states(self.generators),
        }
        save_checkpoint(self.checkpoint, state, self._fingerprint)

    def _resume(self) -> None:
        state = load_checkpoint(self.checkpoint, self._fingerprint)
        if (state["settings"], state["images"]) != (asdict(self.settings), self.data.digest()):
            raise CheckpointError(f"{self.checkpoint} is of a run with other settings or data: {state['settings']}")
        copy_into(self.parameters, state["parameters"])
        self.average.load(state["average"])
        self.snapshots.load(state.get("snapshots", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = self.step = state["step"]
        restore_generators(self.generators, state["generators"])
