"""Random diffusers pipelines with a few thousand parameters each, made without downloads."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

CLASSES, TEXT_WIDTH, TOKENS = 3, 8, 16
UNET = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)


def pixels(
    pipeline=DDPMPipeline, scheduler=DDPMScheduler, kind="epsilon", classes=CLASSES, **unet
) -> DiffusionPipeline:
    """Make a DDPM or DDIM pipeline of 8 x 8 grey images, with a table of classes, or None for an unconditional one."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    sizes = dict(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=classes)
    return pipeline(UNet2DModel(**UNET | blocks | sizes | unet), scheduler(prediction_type=kind))


def autoencoder(**settings) -> AutoencoderKL:
    """Make a VAE for 16 x 16 RGB images with latents of 4 x 8 x 8."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=0.5)
    return AutoencoderKL(**blocks | sizes | settings)


def dit(scheduler=DDIMScheduler, classes=CLASSES, learned_variance=True) -> DiTPipeline:
    """Make a DiT pipeline of 16 x 16 RGB images, which predicts a variance too, as the published ones do."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=4, num_layers=2, sample_size=8, num_embeds_ada_norm=classes)
    channels = dict(in_channels=4, out_channels=8 if learned_variance else 4)
    transformer = DiTTransformer2DModel(**sizes, **channels, norm_elementwise_affine=False)
    return DiTPipeline(transformer, autoencoder(), scheduler())


def stable_diffusion(scheduler=DDIMScheduler, kind="epsilon", **unet) -> StableDiffusionPipeline:
    """Make a Stable Diffusion pipeline of 16 x 16 RGB images, whose tokens are single letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    marks = ["<|startoftext|>", "<|endoftext|>"]
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase + string.digits]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(marks + letters)}, merges=[], model_max_length=TOKENS
    )
    text = CLIPTextConfig(
        vocab_size=len(marks + letters),
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    sizes = dict(sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=TEXT_WIDTH)
    return StableDiffusionPipeline(
        autoencoder(),
        CLIPTextModel(text),
        tokenizer,
        UNet2DConditionModel(**UNET | blocks | sizes | unet),
        scheduler(prediction_type=kind, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
