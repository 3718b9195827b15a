"""A diffusers U-Net, trained on public digits, fine-tuned privately on handwritten ones, and exported as PEFT's LoRA.

python examples/diffusers_unet.py            (needs diffusers and scikit-learn; about ten seconds on a CPU)
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from fastloda import DPTrainer, PrivateTraining, attach_loda
from fastloda.integrations.diffusers import diffusion_losses
from fastloda.integrations.peft import save_peft
from fastloda.synthesis.data import digits_split, font_digits

SCHEDULER = DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def losses(unet, batch, generator=None):
    images, labels = batch
    return diffusion_losses(unet, SCHEDULER, images, class_labels=labels, generator=generator)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(  # in real use: UNet2DModel.from_pretrained(...)
        sample_size=8,
        in_channels=1,
        out_channels=1,
        num_class_embeds=10,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    public = font_digits(1000, seed=0, size=8)
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    for _ in range(60):
        rows = torch.randint(len(public), (32,))
        optimizer.zero_grad()
        losses(unet, (public.images[rows], public.labels[rows])).mean().backward()
        optimizer.step()

    private, test = digits_split()
    score = lambda: losses(unet, (test.images, test.labels), torch.Generator().manual_seed(1)).mean().item()  # noqa: E731
    with torch.no_grad():
        before = score()
    adapted = attach_loda(unet, rank=4, activation="identity")  # LoRA, so that PEFT can represent it
    settings = PrivateTraining(
        sample_rate=0.05,
        expected_batch_size=0.05 * len(private),
        steps=12,
        noise_multiplier=0.8,
        delta=1e-5,
        max_grad_norm=0.01,
        optimizer="adam",
        learning_rate=1e-2,
    )
    trainer = DPTrainer(unet, (private.images, private.labels), losses, settings)
    trainer.fit()
    with torch.no_grad():
        print(f"denoising loss on unseen handwritten digits: {before:.3f} before, {score():.3f} after")
    print(f"{len(adapted)} adapted convolutions, epsilon {trainer.epsilon():.2f} at delta {settings.delta:g}")
    save_peft(unet, folder)
    print(
        "PeftModel.from_pretrained takes", ", ".join(f"{p.name} ({p.stat().st_size} bytes)" for p in folder.iterdir())
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
