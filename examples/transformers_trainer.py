"""transformers' Trainer, made private: GPT-2 with LoDA on its Conv1D layers learns to count, and the Trainer stays as it is.

    python examples/transformers_trainer.py
    torchrun --nproc_per_node 2 examples/transformers_trainer.py

`wrap_model=False` makes the model itself private, so that the Trainer still sees a GPT-2, whose own loss it uses. The private
data loader comes in by `get_train_dataloader`; large Poisson batches come in parts. Gradients are clipped by sample, so the
Trainer's own max_grad_norm is 0. If padding leaves records with different numbers of targets, give the Trainer a
`compute_loss_func` with `fastloda.CrossEntropyLoss`: GPT-2's own loss divides by the targets of the whole batch, and is refused.
"""

import tempfile

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

from fastloda import BatchMemoryManager, PrivacyEngine, attach_loda, loda_parameters

LENGTH, RECORDS, BATCH, EPOCHS, DELTA = 12, 400, 80, 4, 1e-4


class Counting(Dataset):
    """A data set of sequences such as 7 8 9 0 1 2, each of which is a record."""

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, i: int) -> dict:
        tokens = (torch.arange(LENGTH) + i) % 10
        return {"input_ids": tokens, "labels": tokens}


class PrivateTrainer(Trainer):
    """A Trainer that gets its batches from a private loader."""

    def __init__(self, *arguments, train_loader: DataLoader, **options):
        super().__init__(*arguments, **options)
        self.train_loader = train_loader

    def get_train_dataloader(self) -> DataLoader:
        return self.train_loader


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(  # before make_private, for it lets several processes find each other
            folder,
            num_train_epochs=EPOCHS,
            max_grad_norm=0.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
    size = dict(vocab_size=10, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    config = GPT2Config(**size, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # or transformers takes it with a note
    adapted = attach_loda(model, rank=8)
    print(f"adapted {len(adapted)} layers: {', '.join(adapted[:3])}, ...")

    optimizer = torch.optim.Adam(loda_parameters(model), lr=2e-2)
    loader = DataLoader(Counting(), batch_size=BATCH, collate_fn=default_data_collator)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.8, max_grad_norm=1.0, wrap_model=False
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 10 else 0.5)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as parts:
        PrivateTrainer(model, arguments, train_loader=parts, optimizers=(optimizer, schedule)).train()

    private.cleanup()  # from here on the model is an ordinary one
    print(f"{len(engine.accountant)} private steps, as many of the schedule: {schedule.last_epoch}")
    print(f"epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")
    with torch.no_grad():
        counted = model.eval()(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits.argmax(-1)
    print("after 3 4 5 6 7 8 it expects", *counted[0].tolist())


if __name__ == "__main__":
    main()
