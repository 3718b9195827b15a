"""A pipeline of diffusers in a folder: fine-tuned privately, sampled from, and then exported for diffusers alone.

python examples/diffusers_folder.py          (needs diffusers; about ten seconds on a CPU)

In real use the folder holds a model that someone trained on public images: DiTPipeline, StableDiffusionPipeline, DDPMPipeline or
DDIMPipeline, as `pipe.save_pretrained(folder)` or `hf download` leave it. On the command line:

    fastloda finetune --run runs/a --model FOLDER --data PRIVATE --privacy.target_epsilon 8 --privacy.delta 1e-5
    fastloda sample   --run runs/a --model FOLDER
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from fastloda import load_loda, merge_loda
from fastloda.synthesis.budget import Privacy
from fastloda.synthesis.settings import Adapter, FineTuning
from fastloda.synthesis.stages import finetune, sample


def make_public_model(folder: Path) -> Path:
    """Write a small pipeline for 8 x 8 digits, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
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
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return folder


def main(folder: Path) -> None:
    model, run = make_public_model(folder / "public"), folder / "run"
    statement = finetune(
        run,
        Privacy(target_epsilon=8.0, delta=1e-5, epochs=2, batch_size=256),
        data="digits",
        model=model,
        adapter=Adapter(rank=4, targets="both", activation="identity"),  # LoRA, so that it can be merged
        training=FineTuning(learning_rate=1e-2),
    )
    print(f"epsilon {statement['epsilon']:.2f} at delta {statement['delta']:g}, {statement['steps']} steps")
    drawn = sample(run, count=20, steps=10, model=model)
    print("private synthetic images:", Path(drawn["samples"]).relative_to(folder))

    pipe = DDIMPipeline.from_pretrained(model)
    load_loda(pipe.unet, run / "private" / "adapter.safetensors")
    print(f"{len(merge_loda(pipe.unet))} layers merged; diffusers alone loads the result")
    pipe.save_pretrained(folder / "merged")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
