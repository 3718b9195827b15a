"""The diffusion package compared with slow or exact answers: the paper's layers, explicit formulas, known data."""

import copy
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from fastloda import attach_loda, loda_parameters, per_sample_grad_norms, progress
from fastloda.synthesis.diffusion import (
    DDPM,
    EDM,
    UNet,
    UNetConfig,
    class_balanced_labels,
    digits_unet,
    paper_unet,
    sample,
)
from fastloda.synthesis.diffusion.ddpm import ddim_schedule, ddim_step
from fastloda.synthesis.diffusion.edm import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, coefficients, noise_levels
from fastloda.synthesis.diffusion.sampler import guided
from fastloda.synthesis.diffusion.unet import PROCESSES, Attention, ResBlock

# (c_in, c_out, k, stride, pad, h_out, w_out): how many of the paper's 149 convolutions have this shape on 32 x 32 images.
PAPER_CONVOLUTIONS = {
    (3, 64, 3, 1, 1, 32, 32): 1,
    (64, 64, 3, 1, 1, 32, 32): 7,
    (64, 64, 1, 1, 0, 32, 32): 20,
    (64, 64, 3, 2, 1, 16, 16): 1,
    (64, 128, 3, 1, 1, 16, 16): 1,
    (128, 128, 3, 1, 1, 16, 16): 7,
    (64, 128, 1, 1, 0, 16, 16): 1,
    (128, 128, 1, 1, 0, 16, 16): 20,
    (128, 128, 3, 2, 1, 8, 8): 1,
    (128, 128, 3, 1, 1, 8, 8): 8,
    (128, 128, 1, 1, 0, 8, 8): 20,
    (128, 128, 3, 2, 1, 4, 4): 1,
    (128, 128, 3, 1, 1, 4, 4): 11,
    (128, 128, 1, 1, 0, 4, 4): 24,
    (256, 128, 3, 1, 1, 4, 4): 3,
    (256, 128, 1, 1, 0, 4, 4): 3,
    (256, 128, 3, 1, 1, 8, 8): 3,
    (256, 128, 1, 1, 0, 8, 8): 3,
    (256, 128, 3, 1, 1, 16, 16): 2,
    (256, 128, 1, 1, 0, 16, 16): 2,
    (192, 128, 3, 1, 1, 16, 16): 1,
    (192, 128, 1, 1, 0, 16, 16): 1,
    (128, 128, 3, 1, 1, 32, 32): 1,
    (192, 64, 3, 1, 1, 32, 32): 1,
    (192, 64, 1, 1, 0, 32, 32): 1,
    (128, 64, 3, 1, 1, 32, 32): 2,
    (128, 64, 1, 1, 0, 32, 32): 2,
    (64, 3, 3, 1, 1, 32, 32): 1,
}
# Names of modules in the paper's code, which `attach_loda` and pretrained files refer to.
PAPER_NAMES = """
downblocks.0.0 downblocks.1.0.block_1.2 downblocks.1.1.proj_q downblocks.3.0.layer downblocks.4.0.residual
middleblocks.0.block_2.3 middleblocks.1.proj middleblocks.2.block_1.2 upblocks.0.0.residual upblocks.2.2.layer
upblocks.11.1.proj_v out.2
""".split()


class Predictor(nn.Module):
    """A minimal model whose prediction is a given function of (x, t, y); it remembers its calls."""

    def __init__(self, predict, image_shape=(1, 4, 4), null_class=10, process=None):
        super().__init__()
        self.predict, self.image_shape, self.null_class = predict, image_shape, null_class
        self.process = process or DDPM()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        return self.predict(x, t, y)


def tiny_unet(**overrides) -> UNet:
    """Make a U-Net with two levels, attention in one, and no zero weights, so that gradients reach everything."""
    preset = dict(image_size=4, width=8, num_classes=3, class_width=4, zero_init=False)
    return digits_unet(**preset | overrides).eval()


def batch(model: UNet, n: int, dtype=torch.float32):
    x = torch.randn(n, *model.image_shape, dtype=dtype)
    return x, torch.randint(0, 1000, (n,)), torch.randint(0, model.null_class + 1, (n,))


def convolutions(model: UNet) -> dict[str, tuple[int, ...]]:
    """Find name -> (c_in, c_out, k, stride, pad, h_out, w_out) of every convolution; a forward pass must call it once."""
    found = {}

    def note(name):
        def hook(conv, _, out):
            assert name not in found
            geometry = (conv.kernel_size[0], conv.stride[0], conv.padding[0])
            found[name] = (conv.in_channels, conv.out_channels, *geometry, *out.shape[2:])

        return hook

    hooks = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        model(*batch(model, 1))
    for hook in hooks:
        hook.remove()
    return found


# ---- the U-Net


def test_paper_unet_has_the_papers_layers():
    model = paper_unet()
    assert sum(p.numel() for p in model.parameters()) == 10_422_851
    assert sum(isinstance(m, Attention) for m in model.modules()) == 21
    assert sum(isinstance(m, ResBlock) for m in model.modules()) == 22

    found = convolutions(model)
    assert Counter(found.values()) == PAPER_CONVOLUTIONS
    assert Counter(shape[2] for shape in found.values()) == {3: 52, 1: 97}
    assert set(PAPER_NAMES) <= set(found)


def test_parameter_count_does_not_depend_on_the_number_of_classes():
    many = paper_unet(num_classes=63)
    assert sum(p.numel() for p in many.parameters()) == 10_422_851
    many.load_state_dict(paper_unet(num_classes=2).state_dict())


def test_digits_unet_is_small():
    assert sum(p.numel() for p in digits_unet().parameters()) == 198_689


@settings(max_examples=15, deadline=None)
@given(
    width=st.sampled_from([8, 16, 24]),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    attention=st.one_of(st.booleans(), st.just((0,))),
    channels=st.integers(1, 3),
    patch=st.integers(1, 2),
)
def test_any_valid_config_builds_runs_and_survives_json(width, multipliers, blocks, attention, channels, patch):
    config = UNetConfig(
        image_size=8 * patch,
        in_channels=channels,
        width=width,
        multipliers=tuple(multipliers),
        blocks_per_level=blocks,
        attention=attention,
        norm_groups=8,
        patch=patch,
    )
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = UNet(config)
    x, t, y = batch(model, 2)
    assert model(x, t, y).shape == x.shape
    assert len(convolutions(model)) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.parametrize(
    "bad, values",
    [
        (dict(image_size=30), "30"),
        (dict(image_size=28, multipliers=(1, 1), patch=4), "8 for 2 levels of patches of 4 pixels, got 28"),
        (dict(patch=0), "0"),
        (dict(width=0), "0"),
        (dict(width=33, norm_groups=1), "33"),
        (dict(multipliers=()), r"\(\)"),
        (dict(multipliers=(1, 0)), r"\(1, 0\)"),
        (dict(norm_groups=7), "7 does not divide 64"),
        (dict(width=16, multipliers=(1, 2)), "32 does not divide 48"),
        (dict(image_size=8, width=16, multipliers=(1, 1, 1, 1)), "16 channels of 1 x 1"),
        (dict(num_classes=64), "class_width=64, num_classes=64"),
        (dict(dropout=1.0), "1.0"),
        (dict(attention=(4,)), r"\(4,\)"),
        (dict(blocks_per_level=0), "0"),
        (dict(process="vp"), "ddpm, edm, got 'vp'"),
    ],
)
def test_config_refuses_and_says_what(bad, values):
    with pytest.raises(ValueError, match=values):
        UNetConfig(**bad)


def test_config_refuses_unknown_fields():
    with pytest.raises(ValueError, match="heads"):
        UNetConfig.from_dict({"heads": 4})


def test_config_normalises_collections():
    config = UNetConfig(multipliers=[1, 2], attention={1, 0})
    assert config.multipliers == (1, 2) and config.attention == (0, 1)
    assert [config.attends(level) for level in (0, 1)] == [True, True]
    assert not UNetConfig(attention=False).attends(1)


def test_forward_refuses_wrong_shapes():
    model = tiny_unet()
    x, t, y = batch(model, 2)
    for wrong in ((x[:, :, :2], t, y), (x, t[:1], y), (x, t, y[:, None])):
        with pytest.raises(ValueError, match="expected x"):
            model(*wrong)


def test_patches_are_the_first_levels_channels():
    model = tiny_unet(image_size=8, patch=2)
    x, t, y = batch(model, 3)
    found = convolutions(model)
    assert found["downblocks.0.0"] == (4, 8, 3, 1, 1, 4, 4) and found["out.2"] == (8, 4, 3, 1, 1, 4, 4)
    of_patches = tiny_unet(in_channels=4)
    of_patches.load_state_dict(model.state_dict())
    patches = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    made = of_patches(patches, t, y).unflatten(1, (1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(model(x, t, y), made)


def test_zero_init_starts_at_zero():
    assert not digits_unet()(*batch(digits_unet(), 2)).any()
    assert tiny_unet()(*batch(tiny_unet(), 2)).any()


def test_every_class_and_timestep_matters():
    model = tiny_unet()
    x = torch.randn(1, *model.image_shape).expand(4, -1, -1, -1)
    t, classes = torch.full((4,), 7), torch.arange(4)
    by_class, by_time = model(x, t, classes), model(x, 100 * classes, torch.zeros_like(t))
    for out in (by_class, by_time):
        assert all((out[i] - out[j]).abs().max() > 1e-5 for i in range(4) for j in range(i))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_equals_the_explicit_softmax(memory_format):
    block = Attention(16, groups=4).double()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64).to(memory_format=memory_format)
    q, k, v = (p(block.norm(x)).flatten(2) for p in (block.proj_q, block.proj_k, block.proj_v))
    weights = torch.softmax(torch.einsum("ncp,ncq->npq", q, k) / math.sqrt(16), dim=2)
    expected = x + block.proj(torch.einsum("npq,ncq->ncp", weights, v).reshape(x.shape))
    assert torch.allclose(block(x), expected, rtol=1e-10, atol=1e-12)


def test_samples_do_not_mix():
    model = tiny_unet().double().train()
    x, t, y = batch(model, 3, torch.float64)
    x.requires_grad_()
    losses = DDPM().losses(model, x, y, views=2, t=t.repeat(2), label_dropout=0.5)
    for i, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        touched = gradient.flatten(1).abs().amax(1) > 0
        assert touched.tolist() == [j == i // 2 for j in range(3)]


def test_per_sample_gradients_by_vmap_equal_a_loop():
    model = tiny_unet().double().train()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, t, y = batch(model, 3, torch.float64)

    def loss(parameters, x, t, y):
        return functional_call(model, parameters, (x[None], t[None], y[None])).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, t, y)
    for i in range(3):
        out = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        alone = torch.autograd.grad(out.square().mean(), model.parameters())
        for (name, many), one in zip(together.items(), alone, strict=True):
            assert torch.allclose(many[i], one, rtol=1e-8, atol=1e-12), name


def test_checkpointing_copies_and_channels_last_change_nothing():
    model = tiny_unet().double()
    inputs = batch(model, 2, torch.float64)

    def gradients(model, run):
        run(model).square().sum().backward()
        return [p.grad for p in model.parameters()]

    expected = gradients(copy.deepcopy(model), lambda m: m(*inputs))
    variants = {
        "checkpoint": (model, lambda m: checkpoint(m, *inputs, use_reentrant=False)),
        "channels_last": (copy.deepcopy(model).to(memory_format=torch.channels_last), lambda m: m(*inputs)),
    }
    for name, (variant, run) in variants.items():
        for got, want in zip(gradients(variant, run), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-8, atol=1e-12), name


def test_bf16_autocast_stays_close():
    model = tiny_unet()
    inputs = batch(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs)
    high = model(*inputs)
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).norm() < 0.05 * high.norm()


# ---- the schedule and the loss


def test_schedule_is_the_linear_one():
    diffusion = DDPM()
    abar, product = diffusion.alphas_cumprod, 1.0
    assert abar.dtype == torch.float64 and abar.shape == (1000,)
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert abar[t].item() == pytest.approx(product, rel=1e-12)
    assert product == pytest.approx(4.0358e-5, rel=1e-4)


def test_add_noise_is_the_formula():
    diffusion = DDPM(10)
    x0, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0, 3, 9, 3])
    xt = diffusion.add_noise(x0, t, noise)
    assert xt.dtype == torch.float32
    for i in range(4):
        abar = diffusion.alphas_cumprod[t[i]].item()
        assert torch.allclose(xt[i], math.sqrt(abar) * x0[i] + math.sqrt(1 - abar) * noise[i], atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        dict(timesteps=0),
        dict(beta_start=0.0),
        dict(beta_start=0.1),
        dict(beta_end=1.0),
        dict(time_distribution=torch.ones(3)),
        dict(time_distribution=torch.zeros(1000)),
        dict(time_distribution=-torch.ones(1000)),
        dict(time_distribution=torch.full((1000,), math.nan)),
    ],
)
def test_diffusion_refuses(bad):
    with pytest.raises(ValueError, match="got"):
        DDPM(**bad)


def test_losses_are_sample_major_and_per_view():
    diffusion, model = DDPM(), Predictor(lambda x, t, y: 0.1 * x + t.view(-1, 1, 1, 1) / 1000)
    x0, y = torch.randn(3, 1, 4, 4), torch.tensor([5, 6, 7])
    t, noise = torch.randint(0, 1000, (6,)), torch.randn(6, 1, 4, 4)
    losses = diffusion.losses(model, x0, y, views=2, t=t, noise=noise, label_dropout=0)
    assert model.calls[0][2].tolist() == [5, 5, 6, 6, 7, 7]
    for row in range(6):
        i, at = slice(row // 2, row // 2 + 1), slice(row, row + 1)
        alone = diffusion.losses(model, x0[i], y[i], t=t[at], noise=noise[at], label_dropout=0)
        x = diffusion.add_noise(x0[i], t[at], noise[at])
        by_hand = (0.1 * x + t[row] / 1000 - noise[at]).square().mean()
        assert losses.shape == (6,)
        assert torch.allclose(losses[row], alone[0]) and torch.allclose(losses[row], by_hand)


def test_losses_draw_only_from_the_generator():
    diffusion, model = DDPM(), tiny_unet()
    x0, _, y = batch(model, 4)

    def draw(seed, global_seed):
        torch.manual_seed(global_seed)
        return diffusion.losses(model, x0, y, views=3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1, 1), draw(1, 2))
    assert not torch.isclose(draw(1, 1), draw(2, 1)).any()


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_labels_are_dropped_with_probability_p(p):
    n, model = 4000, Predictor(lambda x, t, y: x, image_shape=(1, 1, 1))
    DDPM().losses(model, torch.zeros(n, 1, 1, 1), torch.arange(n) % 10, views=2, label_dropout=p)
    _, _, seen = model.calls[0]
    dropped = seen == 10
    assert abs(dropped.float().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / (2 * n))
    assert torch.equal(seen[~dropped], (torch.arange(n) % 10).repeat_interleave(2)[~dropped])
    if p == 0.1:  # views are dropped independently: a sample loses both with p^2
        both = dropped.view(n, 2).all(1).float().mean().item()
        assert abs(both - p**2) < 5 * math.sqrt(p**2 / n)


@pytest.mark.parametrize(
    "bad",
    [
        dict(views=0),
        dict(label_dropout=1.5),
        dict(t=torch.zeros(3).long()),
        dict(noise=torch.zeros(2, 1, 4, 1)),
        dict(y=torch.zeros(3).long()),
    ],
)
def test_losses_refuse(bad):
    arguments = dict(x0=torch.zeros(2, 1, 4, 4), y=torch.zeros(2).long()) | bad
    with pytest.raises(ValueError, match="got"):
        DDPM().losses(Predictor(lambda x, t, y: x), **arguments)


@pytest.mark.parametrize("weights", [None, [0.0, 1, 1, 5, 1, 1, 0, 2, 2, 0]])
@pytest.mark.parametrize("views", [1, 3])
def test_timesteps_follow_their_distribution(weights, views):
    n = 20_000
    t = DDPM(10, time_distribution=weights).draw_times(n, views=views)
    p = torch.tensor(weights or [1.0] * 10) / sum(weights or [1.0] * 10)
    frequencies = torch.bincount(t, minlength=10) / (n * views)
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / (n * views)).sqrt()).all()


def test_timesteps_of_the_views_are_stratified_and_samples_independent():
    t = DDPM(1000).draw_times(2000, views=4).view(2000, 4)
    for view in range(4):
        assert t[:, view].min() >= 250 * view and t[:, view].max() < 250 * (view + 1)
    correlation = torch.corrcoef(torch.stack([t[:-1, 0], t[1:, 0], t[:-1, 1]]).double())
    assert (correlation - torch.eye(3)).abs().max() < 0.12


def test_timesteps_land_where_they_are_wanted():
    t = DDPM().draw_times(5, device="cpu", generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.shape == (5,)
    assert torch.equal(t, DDPM().draw_times(5, generator=torch.Generator().manual_seed(0)))


# ---- EDM


def test_the_loss_of_edm_is_the_weighted_error_of_its_denoiser():
    """By table 1 of Karras et al. 2022 it is lambda(sigma) |D(x; sigma) - x0|^2, with D = c_skip x + c_out F(c_in x)."""
    x0, y = 0.5 * torch.randn(5, 1, 4, 4), torch.zeros(5).long()
    sigma, noise = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]), torch.randn(5, 1, 4, 4)
    model = Predictor(lambda x, t, y: 0.3 * x + t.view(-1, 1, 1, 1) / 1000)
    losses = EDM().losses(model, x0, y, t=sigma, noise=noise, label_dropout=0)
    assert model.calls[0][1].tolist() == pytest.approx([0, 369.2, 521.1, 690.1, 1000], abs=0.1)
    for i, s in enumerate(sigma.tolist()):
        x = x0[i] + s * noise[i]
        c_in, c_out, c_skip = (s**2 + 0.25) ** -0.5, s * 0.5 / (s**2 + 0.25) ** 0.5, 0.25 / (s**2 + 0.25)
        place = math.log(s / 0.002) / math.log(80 / 0.002)
        denoised = c_skip * x + c_out * (0.3 * c_in * x + place)
        weighted = (s**2 + 0.25) / (0.5 * s) ** 2 * (denoised - x0[i]).square().mean()
        assert losses[i].item() == pytest.approx(weighted.item(), rel=2e-3)


def test_all_levels_count_alike_before_training():
    x0 = SIGMA_DATA * torch.randn(4000, 1, 4, 4)
    sigma = torch.logspace(-2, 1, 4).repeat(1000)
    losses = EDM().losses(Predictor(lambda x, t, y: 0 * x), x0, torch.zeros(4000).long(), t=sigma, label_dropout=0)
    assert (losses.view(1000, 4).mean(0) - 1).abs().max() < 0.06


@pytest.mark.parametrize("views", [1, 4])
def test_noise_levels_of_edm_are_lognormal_and_stratified(views):
    t = EDM().draw_times(5000, views=views, generator=torch.Generator().manual_seed(0))
    z = (t.double().log() + 1.2) / 1.2
    assert t.dtype == torch.float32 and t.isfinite().all()
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.03 and abs(z.pow(3).mean()) < 0.15
    view = (torch.special.ndtr(z).view(5000, views) * views).long()
    assert (view == torch.arange(views)).all(1).float().mean() > 0.999  # not all, because of rounding at the ends


def test_levels_of_edm_are_favoured_by_their_quantiles():
    t = EDM().between(200, 800).draw_times(5000, generator=torch.Generator().manual_seed(0))
    quantile = torch.special.ndtr((t.double().log() + 1.2) / 1.2)
    assert quantile.min() >= 0.2 - 1e-6 and quantile.max() <= 0.8 + 1e-6
    assert abs(quantile.mean() - 0.5) < 0.02 and abs(quantile.std() - 0.6 / math.sqrt(12)) < 0.01


@pytest.mark.parametrize("sigma", [0.2, 2.0, 12.0])
def test_levels_above_a_noise_are_the_same_for_both_processes(sigma):
    generator = torch.Generator().manual_seed(0)
    edm = EDM().noisier_than(sigma).draw_times(5000, generator=generator)
    abar = DDPM().alphas_cumprod[DDPM().noisier_than(sigma).draw_times(5000, generator=generator)]
    for sigmas in (edm.double(), (1 / abar - 1).sqrt()):
        assert 0.99 * sigma < sigmas.min() < 1.1 * sigma
    assert EDM().noisier_than(1e9).draw_times(10).min() > 12  # the last of the 1,000 levels


def test_a_process_of_other_levels_is_not_restricted():
    for process in (DDPM(timesteps=100), DDPM(time_distribution=[0.0] * 500 + [1.0] * 500)):
        with pytest.raises(ValueError, match="only a process of 1000 equally likely levels"):
            process.between(0, 500)


def test_levels_of_the_sampler_are_karras_et_als():
    levels = noise_levels(18)
    assert levels[0] == pytest.approx(80) and levels[-2:] == [pytest.approx(0.002), 0.0]
    assert levels[1] == pytest.approx(57.586, abs=1e-3) and levels == sorted(levels, reverse=True)
    assert noise_levels(1) == [pytest.approx(80), 0.0]


def test_heun_is_of_second_order():
    """The error at the end falls to about a quarter when the steps double."""
    mean, std = 0.4, 0.3
    model = exact(EDM(), lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean))((1, 4, 4))
    truth, *errors = (
        sample(model, torch.zeros(4).long(), steps=n, seed=0, progress=False, clip_denoised=False).double()
        for n in (1000, 40, 80)
    )
    ratio = (errors[0] - truth).norm() / (errors[1] - truth).norm()
    assert 3 < ratio < 6


# ---- the samplers


def exact(process, denoise):
    """Make a model of the process that is exact for data whose best estimate is denoise(x / signal, noise / signal)."""

    def noise(x, t, y):
        abar = process.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        x0 = denoise(x / abar.sqrt(), (1 / abar - 1).sqrt())
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    def output(x, t, y):
        sigma = (SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** (t.double() / 1000)).float()
        c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in coefficients(sigma))
        return (denoise(x / c_in, sigma.view(-1, 1, 1, 1)) - c_skip * x / c_in) / c_out

    predict = output if isinstance(process, EDM) else noise
    return lambda image_shape: Predictor(predict, image_shape=image_shape, process=process)


@pytest.mark.parametrize(
    "process, stochasticity", [(DDPM(), 0.0), (DDPM(), 0.5), (DDPM(), 1.0), (EDM(), 0.0), (EDM(), 10.0)]
)
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_a_perfect_predictor_is_inverted(process, stochasticity, steps):
    """The data is one image: the best estimate is that image, so that every sampler must end at it."""
    image = torch.rand(1, 4, 4) * 2 - 1
    model = exact(process, lambda x, sigma: image.expand(len(x), -1, -1, -1))((1, 4, 4))
    options = {"steps": steps, "stochasticity": stochasticity, "clip_denoised": False}
    out = sample(model, torch.zeros(3).long(), seed=0, progress=False, **options)
    assert torch.allclose(out, image.expand(3, -1, -1, -1), atol=1e-4)


@pytest.mark.parametrize(
    "process, stochasticity, steps",
    [(DDPM(), 0.0, 200), (DDPM(), 0.5, 200), (DDPM(), 1.0, 1000), (EDM(), 0.0, 40), (EDM(), 40.0, 200)],
)
def test_gaussian_data_is_reproduced(process, stochasticity, steps):
    """For N(mean, std^2) data the best estimate is linear in x; the samples must have that mean and std."""
    mean, std = 0.4, 0.3
    model = exact(process, lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean))((1, 64, 64))
    options = {"steps": steps, "stochasticity": stochasticity, "clip_denoised": False}
    out = sample(model, torch.zeros(8).long(), seed=0, progress=False, **options)
    assert abs(out.mean().item() - mean) < 5 * std / math.sqrt(out.numel()) + 2e-3
    assert abs(out.std().item() / std - 1) < 0.03
    assert abs(((out - out.mean()) / out.std()).pow(4).mean().item() - 3) < 0.2


@pytest.mark.parametrize("process", [DDPM(), EDM()])
def test_varied_images_stay_in_the_data_and_lose_what_the_noise_covers(process):
    """Variations of N(mean, std^2) data are such data too; the more noise is added, the less they are like their origins."""
    mean, std, steps = 0.4, 0.3, 100
    model = exact(process, lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean))((1, 64, 64))
    images = mean + std * torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    options = {"steps": steps, "clip_denoised": False, "seed": 0, "progress": False, "batch_size": 3}
    for strength, left in ((0.05, 5), (0.295, 30), (0.6, 60), (1.0, 100)):
        out = sample(model, torch.zeros(4).long(), varied=images, strength=strength, **options)
        assert abs(out.mean() - mean) < 0.03 and abs(out.std() / std - 1) < 0.05
        if isinstance(process, EDM):
            sigma = noise_levels(steps)[-left - 1]
        else:
            sigma = math.sqrt(1 / list(ddim_schedule(process, steps, 0.0))[-left][1] - 1)
        likeness = torch.corrcoef(torch.stack([out.flatten(), images.flatten()]))[0, 1]
        assert float(likeness) == pytest.approx(std / math.hypot(std, sigma), abs=0.03)


def test_ddpm_steps_are_ho_et_als():
    diffusion = DDPM(20, 0.01, 0.3)
    abar = diffusion.alphas_cumprod.tolist()
    x, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for t, now, following, sigma in ddim_schedule(diffusion, 20, eta=1.0):
        before = abar[t - 1] if t else 1.0
        alpha = abar[t] / before
        mean = (x - (1 - alpha) / math.sqrt(1 - abar[t]) * noise) / math.sqrt(alpha)
        variance = (1 - before) / (1 - abar[t]) * (1 - alpha)
        step = ddim_step(x, noise, now, following, sigma, clip=False)
        assert torch.allclose(step, mean, rtol=1e-10, atol=1e-12)
        assert sigma**2 == pytest.approx(variance, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_schedule_runs_from_the_noisiest_to_the_image(steps):
    entries = list(ddim_schedule(DDPM(), steps, eta=1.0))
    times = [t for t, *_ in entries]
    assert len(times) == steps and times == sorted(set(times), reverse=True) and times[0] == 999
    assert steps == 1 or times[-1] == 0
    assert entries[-1][2:] == (1.0, 0.0)
    assert [following for _, _, following, _ in entries[:-1]] == [now for _, now, _, _ in entries[1:]]


def test_clipped_samples_stay_in_range():
    model = Predictor(lambda x, t, y: -x)
    out = sample(model, torch.zeros(2).long(), stochasticity=1.0, steps=5, seed=0, progress=False)
    assert out.abs().max() <= 1 and out.dtype == torch.float32


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("arguments", [dict(), dict(stochasticity=0.7), dict(stochasticity=1.0), dict(guidance=1.5)])
def test_images_do_not_depend_on_the_batches(arguments, process):
    model, labels = tiny_unet(process=process), torch.arange(7) % 3

    def draw(labels=labels, seed=3, **more):
        return sample(model, labels, steps=5, seed=seed, progress=False, **arguments, **more)

    whole = draw()
    for batch_size in (1, 3):
        assert torch.allclose(draw(batch_size=batch_size), whole, atol=1e-4)
    assert torch.allclose(draw(labels[:4]), whole[:4], atol=1e-4)
    assert torch.equal(draw(), whole)
    assert not torch.isclose(draw(seed=4), whole).all(dim=(1, 2, 3)).any()
    pixels = whole.flatten(1)
    assert (torch.cdist(pixels, pixels) + torch.eye(7) > 1e-3).all()


def test_a_generator_serves_as_the_seed():
    model, labels = tiny_unet(), torch.arange(2)

    def draw(**source):
        return sample(model, labels, steps=2, progress=False, **source)

    generator = torch.Generator().manual_seed(3)
    first = draw(generator=generator)
    assert torch.equal(first, draw(seed=3)) and not torch.equal(first, draw(generator=generator))
    torch.manual_seed(3)
    assert torch.equal(first, draw())


def test_guidance_extrapolates_from_the_null_class():
    model = tiny_unet()
    x, t, _ = batch(model, 3)
    y = torch.arange(3)
    with torch.inference_mode():
        given, null = model(x, t, y), model(x, t, torch.full((3,), 3))
        assert torch.allclose(guided(model, y, 2.0, x, t), 3 * given - 2 * null, atol=1e-5)
        assert torch.equal(guided(model, y, 0.0, x, t), given)


def test_without_guidance_there_is_one_pass():
    model, labels = Predictor(lambda x, t, y: x), torch.zeros(5).long()
    for guidance, passes in ((0.0, 1), (0.5, 2)):
        model.calls.clear()
        sample(model, labels, steps=3, guidance=guidance, batch_size=2, seed=0, progress=False)
        assert len(model.calls) == passes * 3 * 3


@pytest.mark.parametrize("fails", [False, True])
def test_modes_come_back(fails):
    modes = []

    def predict(x, t, y):
        modes.append(model.training)
        if fails:
            raise RuntimeError("out of memory")
        return x

    model = Predictor(predict).train()
    model.frozen = nn.BatchNorm2d(1).eval()
    try:
        sample(model, torch.zeros(1).long(), steps=1, seed=0, progress=False)
    except RuntimeError:
        assert fails
    assert modes == [False] and model.training and not model.frozen.training


def test_images_can_be_trained_on():
    model = tiny_unet()
    images = sample(model, torch.arange(2), steps=1, seed=0, progress=False)
    DDPM().losses(model, images, torch.arange(2)).sum().backward()


def test_half_precision_models_sample():
    model = tiny_unet().bfloat16()
    out = sample(model, torch.arange(2), steps=2, guidance=1.0, seed=0, progress=False)
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_no_labels_no_images():
    assert sample(tiny_unet(), torch.arange(0), progress=False).shape == (0, 1, 4, 4)


def test_progress_counts_batches_and_steps(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHORT", 0.0)
    sample(Predictor(lambda x, t, y: x), torch.zeros(5).long(), steps=4, batch_size=2, seed=0)
    assert "12/12" in capsys.readouterr().err
    sample(Predictor(lambda x, t, y: x), torch.zeros(5).long(), steps=4, seed=0, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "bad",
    [
        dict(stochasticity=1.1),
        dict(stochasticity=-0.1),
        dict(steps=0),
        dict(steps=1001),
        dict(batch_size=0),
        dict(guidance=-1.0),
        dict(guidance=math.inf),
        dict(labels=torch.tensor([11])),
        dict(labels=torch.tensor([-1])),
        dict(labels=torch.zeros(2)),
        dict(labels=torch.zeros(2, 2).long()),
        dict(seed=1, generator=torch.Generator()),
        dict(strength=0.5),
        dict(strength=0.0, varied=torch.zeros(2, 1, 8, 8)),
        dict(strength=1.1, varied=torch.zeros(2, 1, 8, 8)),
    ],
)
def test_sample_refuses_and_runs_nothing(bad):
    model = Predictor(lambda x, t, y: x)
    with pytest.raises(ValueError):
        sample(model, **dict(labels=torch.zeros(2).long(), progress=False) | bad)
    assert not model.calls


def test_class_balanced_labels():
    labels = class_balanced_labels(23, 10)
    assert labels.dtype == torch.int64
    assert sorted(torch.bincount(labels).tolist()) == [2] * 7 + [3] * 3


def test_the_papers_adapters():
    """Rank 4 is on every convolution except the first and the last: 147 adapters with 366,592 trained parameters."""
    model = paper_unet()
    adapted = attach_loda(model, rank=4)
    assert len(adapted) == 147
    assert set(adapted.skipped) == {"downblocks.0.0", "out.2"}
    assert all("rank 4 > min(C_in, C_out) = 3" in reason for reason in adapted.skipped.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 366_592


def test_a_private_step_of_the_papers_unet_is_exact():
    """At a quarter of its width, on 16 x 16 images, the norms equal those of one backward pass per sample."""
    model = paper_unet(width=32, image_size=16, zero_init=False).double()
    attach_loda(model, rank=2)
    for parameter in loda_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    x, y = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 9])
    t, noise = torch.tensor([10, 500, 900]), torch.randn(3, 3, 16, 16, dtype=torch.float64)

    def losses(rows: slice) -> torch.Tensor:
        return DDPM().losses(model, x[rows], y[rows], label_dropout=0.0, t=t[rows], noise=noise[rows])

    trained = loda_parameters(model)
    truth = [
        torch.cat([g.flatten() for g in torch.autograd.grad(losses(slice(i, i + 1)).sum(), trained)]).norm()
        for i in range(3)
    ]
    torch.testing.assert_close(
        per_sample_grad_norms(losses(slice(0, 3)), model), torch.stack(truth), rtol=1e-10, atol=0
    )
