"""diffusers' U-Nets: private steps equal one backward pass per sample, and the adapted model stays what pipelines expect."""

import copy
import os
import pickle
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import drawn
import hypothesis
import numpy as np
import oracle
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_flatten

from fastloda import (
    GhostClipper,
    PrivacyError,
    attach_loda,
    ghost_dp_step,
    load_loda,
    loda_parameters,
    merge_loda,
    per_sample_grad_norms,
    save_loda,
)
from fastloda.integrations.diffusers import ATTENTION, diffusion_losses, save_lora_weights
from fastloda.integrations.peft import save_peft

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install fastloda[diffusers]")
import tiny_pipelines  # noqa: E402
from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor  # noqa: E402
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler  # noqa: E402

diffusers.logging.set_verbosity_error()
CLASSES, WIDTH, WORDS = 3, 6, 2  # number of labels; features and length of the text that cross-attention reads
SIZES = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)


def unconditional(**settings):
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    given = SIZES | blocks | dict(sample_size=8, in_channels=2, out_channels=2, num_class_embeds=CLASSES) | settings
    return UNet2DModel(**given)


def conditional(**settings):
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    given = SIZES | blocks | dict(sample_size=8, in_channels=2, out_channels=2, cross_attention_dim=WIDTH) | settings
    return UNet2DConditionModel(**given)


def conditions(model, samples):
    """Make the conditions of the model for this number of samples."""
    given = {}
    if model.config.num_class_embeds is not None:
        given["class_labels"] = torch.arange(samples) % CLASSES
    if isinstance(model, UNet2DConditionModel):
        given["encoder_hidden_states"] = torch.randn(samples, WORDS, WIDTH, dtype=model.dtype)
    return given


# ---- exactness


class Task:
    """A denoising loss of fixed images, noise and timesteps, which can be computed for some of the rows alone."""

    def __init__(self, model, scheduler, samples, views, size):
        self.model, self.scheduler, self.views = model, scheduler, views
        self.x0 = torch.randn(samples, 2, *size, dtype=torch.float64)
        self.noise = torch.randn(samples * views, 2, *size, dtype=torch.float64)
        self.timesteps = torch.randint(0, 1000, (samples * views,))
        self.conditions = conditions(model, samples)
        self.rows = torch.arange(samples * views)

    def losses(self, model, rows):
        rows = rows.long()
        own = rows[:: self.views] // self.views
        given = {name: value[own] for name, value in self.conditions.items()}
        draws = dict(timesteps=self.timesteps[rows], noise=self.noise[rows])
        return diffusion_losses(model, self.scheduler, self.x0[own], views=self.views, **draws, **given)

    def __repr__(self):
        trains = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return f"{self.model.config}, views {self.views}, x0 {tuple(self.x0.shape)}, {len(trains)} train: {trains[:9]}"


def attach_all(model, **settings):
    return attach_loda(model, targets=(nn.Conv2d, nn.Linear), **settings)


def train_attention(model):
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith(ATTENTION):
            module.requires_grad_(True)


def train_some(model):
    """Adapt the attention, and train some layers in full below, between and above it."""
    attach_loda(model, rank=2, targets=ATTENTION)
    for name, module in model.named_modules():
        if name.endswith(("linear_2", "downsamplers.0.conv", "conv_norm_out", "norm1", "conv_out", "class_embedding")):
            module.requires_grad_(True)


TRAINED = {
    "convolutions": partial(attach_loda, rank=2),
    "attention": partial(attach_loda, rank=3, targets=ATTENTION),
    "all layers, LoRA": partial(attach_all, rank=1, activation="identity", scale=0.5),
    "attention in full": train_attention,
    "adapters and layers": train_some,
    "everything": lambda model: model.requires_grad_(True),
}
PROCESSORS = {"sdpa": AttnProcessor2_0, "products": AttnProcessor, "slices": partial(SlicedAttnProcessor, 2)}


@st.composite
def tasks(draw, make):
    """Draw any kind of blocks, attention, time embedding and set of trained layers, checkpointed or not."""
    settings = dict(
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        act_fn=draw(st.sampled_from(["silu", "gelu"])),
        num_class_embeds=draw(st.sampled_from([None, CLASSES])),
        layers_per_block=draw(st.sampled_from([1, 1, 2])),
        attention_head_dim=draw(st.sampled_from([2, 8])),
    )
    if make is unconditional:
        settings |= dict(downsample_type=draw(st.sampled_from(["conv", "resnet"])))
    else:
        settings |= dict(use_linear_projection=draw(st.booleans()), only_cross_attention=draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 999)))
    model = make(**settings).double()
    processor = PROCESSORS[draw(st.sampled_from(sorted(PROCESSORS)))]()
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)
    TRAINED[draw(st.sampled_from(sorted(TRAINED)))](model)
    drawn.randomise(model).train()
    if draw(st.booleans()):
        model.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(prediction_type=draw(st.sampled_from(["epsilon", "sample", "v_prediction"])))
    size = draw(st.sampled_from([(8, 8), (4, 6)]))
    return Task(model, scheduler, draw(st.integers(1, 3)), draw(st.integers(1, 3)), size)


def check_exact(task):
    """Check norms and the clipped sum, up to float64's rounding of the largest gradient."""
    truth = oracle.sample_grads(drawn.composed(task.model), task.losses, task.rows, task.views)
    norms = oracle.norms(truth)
    losses = task.losses(task.model, task.rows)
    found = per_sample_grad_norms(losses, task.model, views=task.views)
    tolerance = 1e-10 * norms.max().item()
    assert (found - norms).abs().max() <= tolerance
    bound = 0.9 * float(norms.median())
    clipper = GhostClipper(task.model, bound, task.views)
    clipper.accumulate(losses)
    clipper.privatize(0, 1)
    wanted = oracle.clipped_sum(truth, bound)
    got = {name: p.grad for name, p in task.model.named_parameters() if p.requires_grad}
    assert got.keys() == wanted.keys()
    assert oracle.norm({name: got[name] - wanted[name] for name in wanted}) <= 1e-10 * bound + tolerance


@pytest.mark.parametrize("make", [unconditional, conditional], ids=["UNet2DModel", "UNet2DConditionModel"])
def test_a_private_step_is_exact(make, counts):
    drawn.hold_for(tasks(make), counts(5, 150), check_exact)


@pytest.mark.parametrize("trained", TRAINED)
def test_each_way_to_train_is_exact(trained):
    model = conditional(num_class_embeds=CLASSES).double()
    TRAINED[trained](model)
    check_exact(Task(drawn.randomise(model), DDPMScheduler(), 2, 2, (8, 8)))


def test_attention_in_slices_of_one_row_is_exact_or_refused():
    """A slice of the batch may look as if its batch were in another dimension."""
    model = unconditional(num_class_embeds=None).double()
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(SlicedAttnProcessor(1))
    attach_loda(model, rank=2, targets=ATTENTION)
    task = Task(drawn.randomise(model), DDPMScheduler(), 2, 1, (8, 8))
    try:
        per_sample_grad_norms(task.losses(model, task.rows), model)
    except PrivacyError as error:
        assert "samples mix" in str(error)
    else:
        check_exact(task)


def test_the_adapters_are_where_they_belong():
    everywhere = [name for name, m in unconditional().named_modules() if isinstance(m, nn.Conv2d)]
    assert list(attach_loda(unconditional(), rank=1)) == everywhere
    names = attach_loda(conditional(), targets=ATTENTION)
    assert all(name.endswith(ATTENTION) for name in names) and len(names) == 4 * 2 * 4  # self and cross, in 4 blocks


def test_a_layer_whose_forward_is_overridden_is_left_alone():
    """Offloading overrides forward so; the replacement would call the forward of the class."""
    model = unconditional()
    model.conv_in.forward = lambda x: nn.Conv2d.forward(model.conv_in, x)
    assert attach_loda(model, rank=1).skipped.keys() == {"conv_in"}


def test_dropout_takes_part():
    model = unconditional(dropout=0.5).train()
    attach_loda(model)
    task = Task(model, DDPMScheduler(), 4, 2, (8, 8))
    task.x0, task.noise = task.x0.float(), task.noise.float()
    stats = GhostClipper(model, 1.0, 2).accumulate(task.losses(model, task.rows))
    assert stats.samples == 4 and stats.nonfinite == 0


# ---- the loss


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_that_of_the_scheduler(kind, scheduler):
    scheduler = scheduler(prediction_type=kind, beta_schedule="squaredcos_cap_v2", num_train_timesteps=200)
    model, x0 = unconditional(), torch.randn(3, 2, 8, 8)
    t, noise, labels = torch.tensor([0, 60, 199]), torch.randn(3, 2, 8, 8), torch.tensor([2, 0, 1])
    target = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[kind]
    by_hand = model(scheduler.add_noise(x0, noise, t), t, class_labels=labels).sample - target
    losses = diffusion_losses(model, scheduler, x0, timesteps=t, noise=noise, class_labels=labels)
    torch.testing.assert_close(losses, by_hand.square().mean((1, 2, 3)), rtol=1e-4, atol=0)


class Recorder(nn.Module):
    """A stand-in for the U-Net that keeps the arguments of its last call."""

    def forward(self, x, t, **given):
        self.x, self.t, self.given = x, t, given
        return (torch.zeros_like(x),)


def test_views_are_sample_major_and_share_the_conditions():
    model, x0 = Recorder(), torch.full((4, 1, 2, 2), 50.0) * torch.arange(4).view(4, 1, 1, 1)
    extra = {"text_embeds": torch.arange(4), "scale": 2}
    call = partial(diffusion_losses, model, DDPMScheduler(), x0, views=3, class_labels=torch.arange(4))
    losses = call(added_cond_kwargs=extra, generator=torch.Generator().manual_seed(5))
    wanted = torch.arange(4).repeat_interleave(3)
    assert losses.shape == (12,) and torch.equal(model.given["class_labels"], wanted)
    call(noise=torch.zeros(12, 1, 2, 2), timesteps=torch.zeros(12, dtype=torch.long))
    assert torch.equal(model.x[:, 0, 0, 0].div(50).round().long(), wanted)
    assert torch.equal(call(added_cond_kwargs=extra, generator=torch.Generator().manual_seed(5)), losses)
    assert torch.equal(model.given["added_cond_kwargs"]["text_embeds"], wanted)
    assert model.given["added_cond_kwargs"]["scale"] == 2
    assert (model.t.view(4, 3) // 334).tolist() == [[0, 1, 2]] * 4  # each view has its own third of the timesteps
    assert len(model.x.flatten(1).unique(dim=0)) == 12  # each view has its own noise
    assert not torch.equal(call(), losses)


def rows_of(samples):
    """Draw tensors with one row per sample, which holds the sample's number."""
    sizes = st.lists(st.integers(1, 3), max_size=2)
    return sizes.map(lambda size: torch.arange(samples).view(-1, *[1] * len(size)).expand(samples, *size).clone())


class Pair(NamedTuple):
    one: object
    other: object


def nested(leaves):
    """Draw any nesting that a U-Net may be given."""

    def deeper(inner):
        several = st.lists(inner, max_size=3)
        pairs = st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        dicts = st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3)
        return st.one_of(several, several.map(tuple), pairs, dicts, dicts.map(OrderedDict))

    return st.recursive(leaves, deeper, max_leaves=6)


@hypothesis.given(st.data(), st.integers(0, 4), st.integers(1, 3))
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
def test_conditions_are_repeated_in_any_nesting(data, samples, views):
    plain = st.sampled_from([None, True, 2, 0.5, "text", torch.float32, nn.Identity()])
    condition = data.draw(nested(st.one_of(plain, rows_of(samples))))
    model = Recorder()
    diffusion_losses(model, DDPMScheduler(), torch.zeros(samples, 1, 2, 2), views=views, condition=condition)
    (before, tree), (after, tree_after) = tree_flatten(condition), tree_flatten(model.given["condition"])
    assert tree == tree_after
    for was, now in zip(before, after, strict=True):
        if isinstance(was, torch.Tensor):
            assert now.shape == (samples * views, *was.shape[1:])
            assert all(torch.equal(now[i], was[i // views]) for i in range(len(now)))
        else:
            assert now is was


@pytest.mark.parametrize("views", [1, 2])
def test_residuals_as_a_controlnet_gives_them(views):
    """They are a tuple for the way down and a tensor for the middle; each sample's views equal a call of that sample alone."""
    model = conditional().double()
    x0, words = torch.randn(3, 2, 8, 8).double(), torch.randn(3, WORDS, WIDTH).double()
    shapes = [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4)]
    down, middle = [torch.randn(3, *shape).double() for shape in shapes], torch.randn(3, 16, 4, 4).double()
    given = dict(down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle)
    draws = dict(timesteps=torch.arange(3 * views), noise=torch.randn(3 * views, 2, 8, 8).double())
    losses = diffusion_losses(model, DDPMScheduler(), x0, views=views, encoder_hidden_states=words, **given, **draws)
    for i in range(3):
        own = slice(i * views, (i + 1) * views)
        alone = diffusion_losses(
            model,
            DDPMScheduler(),
            x0[i : i + 1],
            views=views,
            encoder_hidden_states=words[i : i + 1],
            down_block_additional_residuals=[t[i : i + 1] for t in down],
            mid_block_additional_residual=middle[i : i + 1],
            **{name: value[own] for name, value in draws.items()},
        )
        torch.testing.assert_close(alone, losses[own], rtol=1e-10, atol=1e-12)


@dataclass
class Held:
    rows: torch.Tensor


BAD_CALLS = {
    "listed": (
        dict(added_cond_kwargs={"image": [torch.zeros(4), torch.zeros(3)]}),
        r"kwargs\['image'\]\[1\] must have",
    ),
    "an array": (
        dict(views=2, down=(np.zeros(4),)),
        r"down\[0\] is a ndarray, whose rows can't be repeated for 2 views",
    ),
    "an object": (dict(views=2, held={"a": Held(torch.zeros(4))}), r"held\['a'\] is a Held.* give tensors"),
    "views": (dict(views=0), "views must be an integer >= 1, got 0"),
    "labels": (dict(class_labels=torch.zeros(5, dtype=torch.long)), r"class_labels must have one row .* 4 .* \(5,\)"),
    "nested": (dict(added_cond_kwargs={"text": torch.zeros(())}), r"added_cond_kwargs\['text'\] must have one row"),
    "timesteps": (dict(timesteps=torch.zeros(3, dtype=torch.long)), r"expected timesteps \(4,\)"),
    "noise": (dict(noise=torch.zeros(4, 1, 8, 8)), r"noise \(4, 2, 8, 8\)"),
    "flow": (
        dict(scheduler=FlowMatchEulerDiscreteScheduler()),
        "FlowMatchEulerDiscreteScheduler has no alphas_cumprod",
    ),
    "variance": (dict(unet=unconditional(out_channels=4, num_class_embeds=None)), r"predicts \(4, 4, 8, 8\)"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_named(name):
    changed, message = BAD_CALLS[name]
    given = dict(unet=Recorder(), scheduler=DDPMScheduler(), x0=torch.zeros(4, 2, 8, 8)) | changed
    with pytest.raises(ValueError, match=message):
        diffusion_losses(**given)


def test_an_unknown_kind_of_prediction_is_named():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type 'flow'"):
        diffusion_losses(Recorder(), scheduler, torch.zeros(2, 1, 4, 4))


def test_half_precision_predictions_are_scored_in_float32():
    model = unconditional(num_class_embeds=None).bfloat16()
    losses = diffusion_losses(model, DDPMScheduler(), torch.randn(2, 2, 8, 8).bfloat16())
    assert losses.dtype == torch.float32 and losses.isfinite().all()


# ---- the rest of diffusers


def take_step(model):
    optimizer = torch.optim.SGD(loda_parameters(model), 5.0)
    losses = diffusion_losses(model, DDPMScheduler(), torch.randn(4, 2, 8, 8), views=2)
    settings = dict(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4, views=2)
    ghost_dp_step(losses, model, optimizer, **settings)


def sampled(model):
    pipeline = DDPMPipeline(unet=model.eval(), scheduler=DDPMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return torch.from_numpy(pipeline(2, generator, num_inference_steps=3, output_type="np").images)


def test_a_pipeline_samples_from_the_adapted_model():
    model = unconditional(num_class_embeds=None)
    before = sampled(model)
    attach_loda(model)
    assert torch.equal(sampled(model), before)
    take_step(model.train())
    after = sampled(model)
    assert after.shape == before.shape and after.isfinite().all() and not torch.equal(after, before)


def test_adapters_go_onto_a_pretrained_model(tmp_path):
    model = unconditional(num_class_embeds=None)
    model.save_pretrained(tmp_path / "unet")
    attach_loda(model)
    take_step(model.train())
    save_loda(model, tmp_path / "adapters.safetensors")
    fresh = UNet2DModel.from_pretrained(tmp_path / "unet")
    load_loda(fresh, tmp_path / "adapters.safetensors")
    assert torch.equal(sampled(fresh), sampled(model))


def test_diffusers_loads_the_export(tmp_path):
    """diffusers loads it without PeftModel, and takes the scale from the metadata."""
    pytest.importorskip("peft", reason="peft is not installed: pip install fastloda[peft]")
    model = conditional()
    plain = copy.deepcopy(model)
    attach_loda(model, targets=(*ATTENTION, "conv1"), activation="identity", scale=0.25)
    for parameter in loda_parameters(model):
        nn.init.normal_(parameter)
    save_peft(model, tmp_path)
    x, given = torch.randn(3, 2, 8, 8), conditions(model, 3)
    outputs = lambda m: m(x, 7, **given).sample  # noqa: E731
    assert not torch.allclose(outputs(plain), outputs(model), atol=1e-2)
    plain.load_lora_adapter(tmp_path, weight_name="adapter_model.safetensors", prefix="base_model.model")
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)


def adapted(model, **settings):
    attach_loda(model, rank=2, **settings)
    for parameter in loda_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def drawn_from(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    prompts = ["cat", "dog"]
    return pipeline(prompts, guidance_scale=1.5, num_inference_steps=2, generator=generators, output_type="np").images


def test_a_pipeline_loads_the_exported_lora(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install fastloda[peft]")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    pipeline = tiny_pipelines.stable_diffusion()
    pipeline.save_pretrained(tmp_path / "base")
    plain = drawn_from(pipeline)
    adapted(pipeline.unet, targets=(*ATTENTION, "conv1"), activation="identity", scale=0.5)
    wanted = drawn_from(pipeline)
    assert np.abs(wanted - plain).max() > 1e-2
    assert save_lora_weights(pipeline.unet, tmp_path / "lora") == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    other = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    other.load_lora_weights(tmp_path / "lora")
    np.testing.assert_allclose(drawn_from(other), wanted, atol=1e-5)


def test_a_merged_pipeline_is_saved_and_loaded_by_diffusers_alone(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    pipeline = tiny_pipelines.stable_diffusion()
    adapted(pipeline.unet, targets=(nn.Conv2d, nn.Linear), activation="identity")
    wanted = drawn_from(pipeline)
    merge_loda(pipeline.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("loda*"))
    np.testing.assert_allclose(drawn_from(StableDiffusionPipeline.from_pretrained(tmp_path)), wanted, atol=1e-4)


@pytest.mark.parametrize("how", ["attached", "loaded", "copied", "unpickled"])
def test_saving_an_adapted_model_keeps_the_adapters_and_says_where(how, tmp_path):
    model = adapted(unconditional())
    if how == "loaded":
        save_loda(model, tmp_path / "a")
        model = unconditional()
        load_loda(model, tmp_path / "a")
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how == "unpickled":
        model = pickle.loads(pickle.dumps(model))
    pipeline = DDPMPipeline(model, DDPMScheduler())
    with pytest.warns(UserWarning, match="without its adapters, which are in .*unet.loda.safetensors: load_loda"):
        pipeline.save_pretrained(save_directory=tmp_path / "saved", variant="fp16")
    options_arrived = tmp_path / "saved" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    assert options_arrived.is_file()
    again = UNet2DModel.from_pretrained(tmp_path / "saved" / "unet", variant="fp16")
    load_loda(again, tmp_path / "saved" / "unet" / "loda.safetensors")
    x, given = torch.randn(2, 2, 8, 8), conditions(model, 2)
    torch.testing.assert_close(again(x, 7, **given).sample, model(x, 7, **given).sample)


def test_transformers_models_keep_their_adapters_too(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    model = adapted(tiny_pipelines.stable_diffusion().text_encoder, targets=("q_proj", "v_proj"))
    with pytest.warns(UserWarning, match="loda.safetensors: load_loda"):
        model.save_pretrained(tmp_path)
    again = transformers.CLIPTextModel.from_pretrained(tmp_path)
    load_loda(again, tmp_path / "loda.safetensors")
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(again(tokens).last_hidden_state, model(tokens).last_hidden_state)
