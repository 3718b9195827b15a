"""diffusers' pipelines as the public model: stages adapt them and draw from them as they do with our own U-Net."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install fastloda[diffusers]")
pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
import tiny_pipelines  # noqa: E402
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler  # noqa: E402

from fastloda import per_sample_grad_norms  # noqa: E402
from fastloda.integrations.diffusers import diffusion_losses  # noqa: E402
from fastloda.loda.attach import loda_layers, loda_parameters  # noqa: E402
from fastloda.synthesis import budget  # noqa: E402
from fastloda.synthesis.bases import class_prompts, open_base  # noqa: E402
from fastloda.synthesis.budget import Privacy  # noqa: E402
from fastloda.synthesis.cli import main  # noqa: E402
from fastloda.synthesis.data import LabelledImages, load_npz  # noqa: E402
from fastloda.synthesis.methods import Reach  # noqa: E402
from fastloda.synthesis.pipelines import open_pipeline  # noqa: E402
from fastloda.synthesis.runs import RunError, digest  # noqa: E402
from fastloda.synthesis.settings import Adapter, Drawing, FineTuning  # noqa: E402
from fastloda.synthesis.stages import finetune, sample  # noqa: E402
from fastloda.training.trainer import DPTrainer  # noqa: E402

diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()
CPU, QUIET = torch.device("cpu"), {"progress": False, "device": "cpu"}
PRIVACY = Privacy(target_epsilon=10.0, delta=1e-5, epochs=0.4, batch_size=8, views=2)
NAMES = ["cat", "dog", "owl"]
MAKE = {
    "pixels": tiny_pipelines.pixels,
    "dit": tiny_pipelines.dit,
    "text": tiny_pipelines.stable_diffusion,
}
SHAPES = {"pixels": (1, 8, 8), "dit": (3, 16, 16), "text": (3, 16, 16)}
PROMPTS = {"pixels": None, "dit": None, "text": "a photo of a {class}"}


def images_for(kind: str, count: int = 20) -> LabelledImages:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(count, *SHAPES[kind], generator=generator) * 2 - 1
    return LabelledImages(pixels, torch.arange(count) % 3, 3)


def folder_of(images: LabelledImages, root: Path) -> Path:
    """Write images as a folder with a subfolder for each class."""
    for i, (pixels, label) in enumerate(zip(images.images, images.labels, strict=True)):
        path = root / NAMES[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = pixels.add(1).mul(127.5).round().byte().movedim(0, 2).squeeze(2).numpy()
        Image.fromarray(grey).save(path)
    return root


def saved(make, folder: Path, **options) -> Path:
    make(**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Save a pipeline of each kind by diffusers; the tests leave them unchanged."""
    root = tmp_path_factory.mktemp("pipelines")
    made = {kind: saved(make, root / kind) for kind, make in MAKE.items()}
    return made | {"ddim": saved(tiny_pipelines.pixels, root / "ddim", pipeline=DDIMPipeline, scheduler=DDIMScheduler)}


def opened(folder: Path):
    base = open_base(folder, CPU)
    if base.takes.num_classes is None:
        base.caption(class_prompts("a photo of a {class}", NAMES))
    return base


# ---- through the stages


@pytest.mark.parametrize("kind", MAKE)
def test_a_pipeline_goes_from_private_images_to_samples(kind, folders, tmp_path):
    data, run, model = folder_of(images_for(kind), tmp_path / "data"), tmp_path / "run", folders[kind]
    options = {"data": str(data), "model": model, "prompts": PROMPTS[kind], "adapter": Adapter(rank=2, targets="both")}
    options["training"] = FineTuning(seed=1, learning_rate=0.1)
    statement = finetune(run, PRIVACY, **options, **QUIET)
    assert statement["classes"] == ["cat", "dog", "owl"] and statement["steps"] == 1 and 9 < statement["epsilon"] <= 10
    assert statement.get("prompts") == (
        ["a photo of a cat", "a photo of a dog", "a photo of a owl"] if PROMPTS[kind] else None
    )
    assert finetune(run, PRIVACY, **options, **QUIET) == statement  # the result exists already
    drawn = {}
    for public in (False, True):
        result = sample(run, count=4, steps=2, public=public, model=model, **QUIET)
        drawn[public] = load_npz(result["samples"])
        assert drawn[public].images.shape == (4, *SHAPES[kind]) and drawn[public].labels.tolist() == [0, 1, 2, 0]
    assert (drawn[False].images - drawn[True].images).abs().max() > 1e-2


def test_the_command_takes_a_pipeline(folders, tmp_path, capsys):
    data = folder_of(images_for("text"), tmp_path / "data")
    common = [f"--run={tmp_path / 'run'}", f"--model={folders['text']}", "--device=cpu", "--progress=false"]
    privacy = ["--privacy.target_epsilon=10", "--privacy.delta=1e-5", "--privacy.epochs=0.4", "--privacy.batch_size=8"]
    prompts = "--prompts=owl=an owl, at night,dog=a dog,cat=a cat"
    tuning = ["finetune", *common, f"--data={data}", *privacy, "--adapter.targets=attention"]
    assert main(tuning) == 2
    assert "StableDiffusionPipeline draws by prompts: give `fastloda finetune` one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*tuning, prompts]) == 0
    assert "an owl, at night" in capsys.readouterr().out
    assert main(["sample", *common, "--count=3", "--steps=2", "--guidance=1"]) == 0


def test_samples_of_another_pipeline_are_refused(folders, tmp_path):
    data, run = images_for("pixels"), tmp_path / "run"
    data.save_npz(tmp_path / "data.npz")
    model = saved(tiny_pipelines.pixels, tmp_path / "model")
    options = {"data": str(tmp_path / "data.npz"), "model": model, "adapter": Adapter(rank=1)}
    finetune(run, PRIVACY, **options, **QUIET)
    hidden = model / ".cache"
    hidden.write_text("of no weight")
    assert sample(run, count=3, steps=1, model=model, **QUIET)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    with pytest.raises(ValueError, match="adapts another model than"):
        sample(run, count=3, steps=1, model=model, **QUIET)
    with pytest.raises(RunError, match="was made from another"):
        finetune(run, PRIVACY, **options, **QUIET)


def test_what_no_pipeline_of_the_run_was_trained_for_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="draws by prompts"):
        sample(tmp_path, public=True, model=folders["text"], **QUIET)
    with pytest.raises(ValueError, match="no model of `fastloda choose`"):
        sample(tmp_path, public=True, reach=Reach(0.1), model=folders["pixels"], **QUIET)


@pytest.mark.parametrize(
    "kind, data, change, message",
    [
        ("pixels", "pixels", {"prompts": "a {class}"}, "DDPMPipeline takes the numbers of classes, not text"),
        ("dit", "pixels", {}, "images of 3 x 8 x 8, the pipeline is for 3 x 16 x 16: convert them"),
        ("dit", "dit", {"training": FineTuning(flips=True)}, "mirrors pixels, and DiTPipeline trains on latents"),
        ("text", "text", {"prompts": "cat=a cat"}, "for each of the classes 0, 1, 2 once"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    kind, data, change, message, folders, tmp_path
):
    images_for(data).save_npz(tmp_path / "data.npz")
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path / "run", PRIVACY, data=str(tmp_path / "data.npz"), model=folders[kind], **change, **QUIET)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_fine_tuning_on_latents_continues_bit_for_bit(folders, tmp_path, monkeypatch):
    images_for("dit").save_npz(tmp_path / "data.npz")
    options = {"data": str(tmp_path / "data.npz"), "model": folders["dit"], "training": FineTuning(seed=1), **QUIET}
    longer = replace(PRIVACY, epochs=1.2)
    assert finetune(tmp_path / "whole", longer, **options)["steps"] == 3
    monkeypatch.setattr(budget, "DPTrainer", partial(DPTrainer, checkpoint_every=1))
    with monkeypatch.context() as patch:
        step = DPTrainer.train_step

        def interrupted(self):
            if self.step == 2:
                raise KeyboardInterrupt
            return step(self)

        patch.setattr(DPTrainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(tmp_path / "run", longer, **options)
    finetune(tmp_path / "run", longer, **options)
    assert json.loads((tmp_path / "run" / "private" / "done.json").read_text())["resumed"]
    ours, whole = (load_file(tmp_path / run / "private" / "adapter.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


# ---- losses


def seen(base, training, views=2, seed=5):
    """Compute the losses of three records; return them with what the network was called with and its output."""
    data = images_for(
        {"DDPMPipeline": "pixels", "DDIMPipeline": "pixels", "DiTPipeline": "dit"}.get(base.name, "text"), 3
    )
    calls = []
    keep = lambda _, arguments, options, output: calls.append((arguments, options, output[0]))  # noqa: E731
    handle = base.network.register_forward_hook(keep, with_kwargs=True)
    x0, labels = base.records(data)
    losses = base.losses(training, views)(base.network, (x0, labels), torch.Generator().manual_seed(seed))
    handle.remove()
    ((x, times), options, output) = calls[0]
    return losses, x0.repeat_interleave(views, 0), labels.repeat_interleave(views), x, times, options, output


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", ["pixels", "text"])
def test_the_loss_is_of_what_the_scheduler_says(kind, prediction, tmp_path):
    base = opened(saved(MAKE[kind], tmp_path, kind=prediction))
    losses, x0, labels, x, times, options, output = seen(base, FineTuning(label_dropout=0.0))
    scheduler = base.pipe.scheduler
    abar = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    target = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, times)}[prediction]
    torch.testing.assert_close(losses, (output - target).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    if kind == "pixels":
        assert torch.equal(options["class_labels"], labels)
    else:
        prompts = [f"a photo of a {NAMES[label]}" for label in labels]
        wanted, _ = base.pipe.encode_prompt(prompts, "cpu", 1, False)
        torch.testing.assert_close(options["encoder_hidden_states"], wanted)


def test_a_dits_variance_is_left_out(folders):
    base = opened(folders["dit"])
    losses, x0, labels, x, times, options, output = seen(base, FineTuning(label_dropout=0.0))
    abar = base.pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    assert output.shape[1] == 8 and torch.equal(options["class_labels"], labels)
    torch.testing.assert_close(losses, (output[:, :4] - noise).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_dropped_labels_are_the_pipelines_own_null(folders):
    everything = FineTuning(label_dropout=1.0)
    assert set(seen(opened(folders["dit"]), everything)[5]["class_labels"].tolist()) == {3}
    text = opened(folders["text"])
    empty, _ = text.pipe.encode_prompt([""], "cpu", 1, False)
    torch.testing.assert_close(seen(text, everything)[5]["encoder_hidden_states"], empty.expand(6, -1, -1))
    assert seen(opened(folders["pixels"]), everything)[5]["class_labels"].tolist() == [0, 0, 1, 1, 2, 2]  # it has none


def test_timesteps_are_those_of_the_scheduler(tmp_path):
    make = lambda **_: DDPMScheduler(num_train_timesteps=50)  # noqa: E731
    base = opened(saved(tiny_pipelines.pixels, tmp_path, scheduler=make))
    assert seen(base, FineTuning(), views=40)[4].max() > 40
    times = seen(base, FineTuning(timesteps=(10, 12)), views=40)[4]
    assert set(times.tolist()) == {10, 11}
    for wrong in ((60, 1000), (0, 60)):
        with pytest.raises(ValueError, match="the pipeline's scheduler has 50"):
            base.losses(FineTuning(timesteps=wrong), 1)


@pytest.mark.parametrize("targets", ["attention", "both"])
def test_a_private_step_on_a_dit_is_exact(targets, folders):
    base = opened(folders["dit"])
    Adapter(rank=2, targets=targets).attach(base.network)
    model = base.network.double()
    for parameter in loda_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    x0, noise = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    times, labels = torch.tensor([0, 300, 700, 999]), torch.tensor([0, 1, 2, 3])

    def losses(model, rows):
        rows = rows.long()
        given = {"timesteps": times[rows], "noise": noise[rows], "class_labels": labels[rows]}
        return diffusion_losses(base._predictor(model), base.pipe.scheduler, x0[rows], **given)

    rows = torch.arange(4)
    truth = oracle.norms(oracle.sample_grads(model, losses, rows))
    torch.testing.assert_close(per_sample_grad_norms(losses(model, rows), model), truth, rtol=1e-9, atol=0)


def test_presets_choose_layers(folders):
    def adapted(targets):
        base = opened(folders["text"])
        Adapter(rank=1, targets=targets).attach(base.network)
        return {name: type(layer).__name__ for name, layer in loda_layers(base.network)}

    found = {targets: adapted(targets) for targets in ("attention", "convolutions", "both")}
    base = opened(folders["dit"])
    assert base.targets == "both" and opened(folders["pixels"]).targets is None
    assert set(found["attention"].values()) == {"LoDALinear"} and all(".attn" in name for name in found["attention"])
    assert set(found["convolutions"].values()) == {"LoDAConv2d"} and "conv_in" in found["convolutions"]
    assert found["both"] == found["convolutions"] | found["attention"]


# ---- latents and samples


@pytest.mark.parametrize("kind", ["dit", "text"])
def test_latents_are_the_vaes_means_whatever_else_is_encoded(kind, folders):
    base, data = opened(folders[kind]), images_for(kind, 20)
    latents, labels = base.records(data)
    with torch.no_grad():
        means = base.pipe.vae.encode(data.images).latent_dist.mean * 0.5
    torch.testing.assert_close(latents, means)
    assert torch.equal(labels, data.labels) and not latents.requires_grad
    some = torch.tensor([19, 2, 17, 0, 5])
    fewer, _ = base.records(data[some])
    assert torch.equal(fewer, latents[some])  # not even rounding depends on their number and places


STOCHASTIC = {
    "ddpm": lambda folder: saved(tiny_pipelines.pixels, folder),
    "ddim": lambda folder: saved(tiny_pipelines.pixels, folder, pipeline=DDIMPipeline, scheduler=DDIMScheduler),
    "dit": lambda folder: saved(tiny_pipelines.dit, folder),
    "dit by ddpm": lambda folder: saved(tiny_pipelines.dit, folder, scheduler=DDPMScheduler),
    "text": lambda folder: saved(tiny_pipelines.stable_diffusion, folder),
}


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_an_image_depends_on_its_seed_and_label_alone(kind, tmp_path):
    base = opened(STOCHASTIC[kind](tmp_path))
    drawing = Drawing(3, guidance=float(kind == "text"), stochasticity=float(kind == "ddim"))
    labels = torch.tensor([0, 1, 2, 2, 1])
    together = base.draw(labels, drawing, seed=4, batch_size=5)
    assert together.abs().max() <= 1 and len(together.flatten(1).unique(dim=0)) == 5
    torch.testing.assert_close(base.draw(labels, drawing, seed=4, batch_size=2), together, rtol=0, atol=1e-4)
    assert not torch.allclose(base.draw(labels, drawing, seed=5, batch_size=5), together, atol=1e-2)
    others = base.draw(torch.tensor([1, 1, 2, 2, 1]), drawing, seed=4, batch_size=5)
    difference = (others - together).abs().amax((1, 2, 3))
    assert difference[0] > 1e-4 and difference[1:].max() == 0
    assert not base.network._forward_pre_hooks


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_guidance_and_fresh_noise_are_the_pipelines_own(eta, tmp_path):
    base = opened(saved(tiny_pipelines.stable_diffusion, tmp_path, scheduler=DDIMScheduler))
    drawing = Drawing(2, guidance=2.0, stochasticity=eta)
    base.check_drawing(drawing)
    drawn = base.draw(torch.tensor([1]), drawing, seed=0, batch_size=1)
    seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(0)).item()
    options = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": 2, "output_type": "np"}
    wanted = base.pipe("a photo of a dog", guidance_scale=3.0, eta=eta, **options).images
    np.testing.assert_allclose(drawn.movedim(1, 3).numpy(), wanted * 2 - 1, atol=1e-5)


UNDRAWABLE = {
    "no null": ("pixels", {"guidance": 1.0}, "no pass without a label"),
    "another null": ("dit", {"guidance": 1.0}, "class 1000 for no label, and .* has 3 classes"),
    "steps": ("text", {"steps": 1001}, "the scheduler has 1000 steps, not 1001"),
    "no eta": ("dit", {"stochasticity": 0.5}, "DiTPipeline with .* has no amount of noise to set: leave out"),
    "eta": ("ddim", {"stochasticity": 1.5}, "eta, must lie in .0, 1., got 1.5"),
}


@pytest.mark.parametrize("name", UNDRAWABLE)
def test_what_a_pipeline_cannot_draw_is_refused(name, folders):
    kind, change, message = UNDRAWABLE[name]
    with pytest.raises(ValueError, match=message):
        opened(folders[kind]).check_drawing(Drawing(**{"steps": 2} | change))


def test_half_precision_folders_are_read_as_float32_and_frozen(tmp_path, recwarn):
    tiny_pipelines.dit().to(torch.float16).save_pretrained(tmp_path)
    pipe = opened(tmp_path).pipe
    assert not [w for w in recwarn if "float32" in str(w.message)]
    for part in (pipe.transformer, pipe.vae):
        assert {p.dtype for p in part.parameters()} == {torch.float32} and not part.training
        assert not any(p.requires_grad for p in part.parameters())


# ---- what is not a supported pipeline


def edited(name: str, **changes):
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def damaged(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99)


def labelled_by_time(folder: Path) -> None:
    shutil.rmtree(folder)
    saved(tiny_pipelines.pixels, folder, classes=None, class_embed_type="timestep")


def without_a_tensor(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "conv_out.weight"}, path)


def with_adapters(folder: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    Adapter(rank=1).attach(pipe.unet)
    with pytest.warns(UserWarning, match="without its adapters"):
        pipe.save_pretrained(folder)


INDEX, UNET = "model_index.json", "unet/config.json"
UNCOVERED = {
    "kind": ("pixels", edited(INDEX, _class_name="FluxPipeline"), "is a FluxPipeline, which is not covered: only DDPM"),
    "no kind": ("pixels", edited(INDEX, _class_name=["x", "Y"]), "not covered"),
    "code": ("pixels", edited(INDEX, unet=["my_package", "UNet2DModel"]), r"unet is \['my_package', .*not covered"),
    "another part": ("pixels", edited(INDEX, unet=["diffusers", "UNet1DModel"]), "must be of UNet2DModel"),
    "no part": ("text", edited(INDEX, tokenizer=None), "tokenizer is None"),
    "no class": ("pixels", edited(INDEX, scheduler=["diffusers", "NoScheduler"]), "can't be loaded"),
    "pickle": ("pixels", pickled, "can't be loaded"),
    "damaged": ("pixels", damaged, "can't be loaded"),
    "no object": ("pixels", lambda folder: (folder / INDEX).write_text("[]"), "holds no JSON object"),
    "labels of another kind": (
        "pixels",
        labelled_by_time,
        "class_embed_type",
    ),
    "other weights": ("pixels", edited(UNET, layers_per_block=2), "can't be loaded"),
    "fewer weights": ("pixels", without_a_tensor, "the weights of unet lack conv_out.weight"),
    "adapters": ("text", with_adapters, "unet has adapters in loda.safetensors.*merge_loda"),
    "oblong": ("pixels", edited(UNET, sample_size=[8, 16]), "only square images"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_other_folders_are_refused_by_name(name, tmp_path):
    kind, change, message = UNCOVERED[name]
    change(saved(MAKE[kind], tmp_path))
    with pytest.raises(ValueError, match=message):
        open_pipeline(tmp_path, CPU)


def test_flow_matching_is_refused_before_anything_is_written(tmp_path, folders):
    make = lambda **_: FlowMatchEulerDiscreteScheduler()  # noqa: E731
    model = saved(tiny_pipelines.dit, tmp_path / "model", scheduler=make)
    images_for("dit").save_npz(tmp_path / "data.npz")
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        finetune(tmp_path / "run", PRIVACY, data=str(tmp_path / "data.npz"), model=model, **QUIET)
    assert not (tmp_path / "run").exists()


def test_a_model_without_classes_takes_one(tmp_path):
    model = saved(tiny_pipelines.pixels, tmp_path / "model", classes=None)
    images = images_for("pixels")
    images.save_npz(tmp_path / "data.npz")
    options = {"model": model, "data": str(tmp_path / "data.npz"), "adapter": Adapter(rank=1), **QUIET}
    with pytest.raises(ValueError, match="3 classes, more than the model's 1"):
        finetune(tmp_path / "run", PRIVACY, **options)
    replace(images, labels=torch.zeros_like(images.labels), num_classes=1, class_names=()).save_npz(
        tmp_path / "data.npz"
    )
    finetune(tmp_path / "run", PRIVACY, **options)
    assert load_npz(sample(tmp_path / "run", count=2, steps=1, model=model, **QUIET)["samples"]).num_classes == 1


# ---- names of classes


def _named(folder: Path, table: dict, file: str = INDEX) -> Path:
    edited(file, id2label=table)(folder)
    return folder


TABLE = {"0": "tench, Tinca tinca", "1": "dog, domestic dog", "2": "cat"}


@pytest.mark.parametrize(("kind", "file"), [("dit", INDEX), ("dit", "transformer/config.json"), ("pixels", UNET)])
def test_a_pipelines_own_names_are_matched_with_the_private_classes(kind, file, tmp_path, monkeypatch):
    model = _named(saved(MAKE[kind], tmp_path / "model"), TABLE, file)
    images, run = images_for(kind), tmp_path / "run"
    images = replace(images, class_names=("cat", "domestic dog", "Fisch"))
    images.save_npz(tmp_path / "data.npz")
    options = {"data": str(tmp_path / "data.npz"), "model": model, "adapter": Adapter(rank=1), **QUIET}
    with pytest.raises(
        ValueError, match="Fisch of the classes cat, domestic dog, Fisch .* tench, dog, cat: .*Fisch=tench"
    ):
        finetune(run, PRIVACY, **options)
    labels, base = [], type(open_base(model, CPU))
    records = base.records
    monkeypatch.setattr(
        base, "records", lambda self, given, *how: labels.append(given.labels.tolist()) or records(self, given, *how)
    )
    statement = finetune(run, PRIVACY, class_map=["Fisch=Tinca tinca"], **options)
    assert labels == [[2, 1, 0] * 6 + [2, 1]]
    assert statement["classes"] == ["tench", "dog", "cat"]
    assert load_npz(sample(run, count=3, steps=1, model=model, **QUIET)["samples"]).class_names == (
        "tench",
        "dog",
        "cat",
    )


@pytest.mark.parametrize("table", [{"1": "cat"}, {"0": "cat", "one": "dog"}, dict.fromkeys("0123", "cat"), ["cat"]])
def test_a_table_of_other_classes_is_refused(table, tmp_path):
    model = _named(saved(MAKE["dit"], tmp_path), table, "transformer/config.json")
    with pytest.raises(
        ValueError, match="id2label must name classes 0, 1, ..., at most the model's 3, got [124] names"
    ):
        open_pipeline(model, CPU)


# ---- prompts


def test_each_class_has_its_prompt():
    assert class_prompts("a {class}, small", ["x", "y"]) == ["a x, small", "a y, small"]
    assert class_prompts("y=b, or c,x = an a ", ["x", "y"]) == ["an a", "b, or c"]


@pytest.mark.parametrize("text", ["x=a", "x=a,y=b,z=c", "x=a,y=", "x=a,x=b,y=c", "a photo", ""])
def test_prompts_that_fit_no_classes_are_refused(text):
    with pytest.raises(ValueError, match="for each of the classes x, y once"):
        class_prompts(text, ["x", "y"])


def test_a_folders_digest_is_of_its_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("1")
    first = digest(tmp_path)
    (tmp_path / "a" / "b").rename(tmp_path / "a" / "c")
    second = digest(tmp_path)
    (tmp_path / "a" / "c").write_text("2")
    assert len({first, second, digest(tmp_path)}) == 3
