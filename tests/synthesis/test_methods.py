"""The compared methods: what each releases, that it stays within its budget, and that its result is of the stated kind."""

import math
from dataclasses import replace

import pytest
import torch

from fastloda.accounting.compose import compose_epsilon
from fastloda.privacy.noise import noise_of
from fastloda.privacy.noise_stream import NoiseStream
from fastloda.randomness import Secret
from fastloda.synthesis.classify import accuracy, train_classifier
from fastloda.synthesis.data import ByteImages, LabelledImages, digits_split, font_digits, font_styles
from fastloda.synthesis.diffusion import DDPM, digits_unet
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import (
    DPLDM,
    DPMEPF,
    DPMERF,
    AutoencoderTraining,
    Budget,
    ByEpsilon,
    CentralImages,
    ChosenLoDA,
    ClassQueries,
    Direct,
    DirectDPSGD,
    DPDiffusion,
    DPLoDA,
    Evolution,
    InTurn,
    NoDP,
    PrivateClassifier,
    PrivateEvolution,
    PrivateLabels,
    PrivateTuning,
    PublicChoice,
    PublicModel,
    PublicOnly,
    Reach,
    Release,
    Sampler,
    Spent,
    Work,
)
from fastloda.synthesis.methods.autoencoder import LATENT_CHANNELS
from fastloda.synthesis.methods.base import at_budget
from fastloda.synthesis.methods.chosen_loda import of_classes
from fastloda.synthesis.methods.class_embeddings import fourier_features
from fastloda.synthesis.methods.dp_diffusion import TIME_WEIGHTS
from fastloda.synthesis.methods.dp_ldm import tune_attention_alone
from fastloda.synthesis.methods.dp_mepf import Perceptual
from fastloda.synthesis.methods.dp_sgd import DPSGD
from fastloda.synthesis.methods.gaussian_release import noise_multipliers, noise_stream, release_class_sums
from fastloda.synthesis.methods.generator import class_means
from fastloda.synthesis.methods.public_classifier import public_classifier
from fastloda.synthesis.settings import Adapter, Classifier, FineTuning
from fastloda.training.trainer import DPTrainer

with torch.device("meta"):
    UNET = digits_unet(width=8, norm_groups=4).config
    LATENT = digits_unet(width=8, norm_groups=4, image_size=4, in_channels=LATENT_CHANNELS, attention=True).config
MODEL = PublicModel(UNET, PublicTraining(steps=2, batch_size=8, warmup=1))
TUNING = PrivateTuning(steps=2, batch_size=10, views=2, training=FineTuning(learning_rate=1e-3), sampler_steps=2)
LDM = DPLDM(AutoencoderTraining(width=8, steps=2, batch_size=8), replace(MODEL, unet=LATENT), ByEpsilon({1.0: TUNING}))
METHODS = {
    "public only": PublicOnly(MODEL, TUNING),
    "loda": DPLoDA(MODEL, ByEpsilon({1.0: TUNING})),
    "correlated": DPLoDA(MODEL, ByEpsilon({1.0: replace(TUNING, steps=5, bands=2)})),
    "chosen": ChosenLoDA(
        DPLoDA(MODEL, ByEpsilon({1.0: TUNING})),
        ByEpsilon({1.0: PublicChoice(10.0, features=40, drawn=30, training=MODEL.conditional)}),
        samples_reach=Reach(0.2),
    ),
    "labelled": ChosenLoDA(
        DPLoDA(MODEL, ByEpsilon({1.0: TUNING})),
        ByEpsilon({1.0: PublicChoice(10.0, features=40, drawn=30, training=MODEL.conditional)}),
        labels=ByEpsilon({1.0: PrivateLabels(30.0, steps=2, batch_size=10, views=3, public_steps=2)}),
    ),
    "in turn": ChosenLoDA(
        DPLoDA(MODEL, ByEpsilon({1.0: TUNING})),
        ByEpsilon(
            {
                1.0: InTurn(
                    (
                        ClassQueries(20.0, MODEL.conditional, votes=2, kept=3, drawn=30, classifier_steps=2),
                        CentralImages(20.0, MODEL.conditional, drawn=30),
                        PublicChoice(20.0, MODEL.conditional, features=40, drawn=30),
                    )
                )
            }
        ),
        pool=lambda: font_styles(60, seed=0),
    ),
    "evolution": PrivateEvolution(
        MODEL, ByEpsilon({1.0: Evolution(samples=20, strengths=(1.0, 0.5), sampler_steps=2, encoder_steps=2)})
    ),
    "diffusion": DPDiffusion(MODEL, ByEpsilon({1.0: replace(TUNING, time_weights=TIME_WEIGHTS)})),
    "ldm": DPLDM(
        AutoencoderTraining(width=8, steps=2, batch_size=8), replace(MODEL, unet=LATENT), ByEpsilon({1.0: TUNING})
    ),
    "loda on latents": DPLDM(
        AutoencoderTraining(width=8, steps=2, batch_size=8),
        replace(MODEL, unet=LATENT),
        ByEpsilon({1.0: TUNING}),
        Adapter(rank=2),
    ),
    "merf": DPMERF(features=40, steps=3),
    "mepf": DPMEPF(encoder_steps=2, steps=3),
    "dpsgd": DirectDPSGD(ByEpsilon({1.0: Direct(DPSGD(width=8), steps=2, batch_size=10, views=2)})),
    "no dp": NoDP(Classifier(steps=3, width=8)),
}


@pytest.fixture(scope="module")
def public() -> LabelledImages:
    return font_digits(60, seed=0)


@pytest.fixture(scope="module")
def private() -> LabelledImages:
    return font_digits(40, seed=1)


def as_bytes(data: LabelledImages) -> LabelledImages:
    """Convert images to bytes, as which the published sets of photographs are kept."""
    return LabelledImages(
        ByteImages(((data.images + 1) * 127.5).round().to(torch.uint8)), data.labels, data.num_classes
    )


def work_in(folder, seed=0) -> Work:
    return Work(folder / "fit", folder / "public", seed, torch.device("cpu"), progress=False)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_keeps_its_budget_and_gives_what_it_says(name, public, private, tmp_path):
    method, budget = METHODS[name], Budget(2.0, 1e-5, len(private))
    fitted = method.fit(as_bytes(private), as_bytes(public), budget, work_in(tmp_path))
    spent = fitted.spent.to_dict()
    if not method.has_budget:
        assert spent["epsilon"] == (0.0 if name == "public only" else None)
    else:
        assert 1.9 < spent["epsilon"] <= 2.0 and spent["releases"]
    if isinstance(fitted, Sampler):
        images = fitted.images(20, seed=3)
        assert images.images.shape == (20, 1, 8, 8) and len(images.labels) == 20
        assert fitted.label or images.labels.bincount(minlength=10).tolist() == [2] * 10
        assert torch.equal(images.images, fitted.images(20, seed=3).images)
        assert not torch.equal(images.images, fitted.images(20, seed=4).images)
    else:
        assert isinstance(fitted, PrivateClassifier) and fitted.network(private.images).shape == (40, 10)
    if fitted.cost is not None:
        assert fitted.cost.seconds > 0 and fitted.cost.peak_bytes > 0 and fitted.cost.samples <= 40


@pytest.mark.parametrize("name", ["merf", "mepf", "loda", "chosen", "labelled", "in turn", "evolution"])
def test_only_the_release_carries_private_records(name, public, private, tmp_path, monkeypatch):
    """With the released sums or gradients replaced by constants, two private sets give the same samples."""
    sums = lambda what, features, labels, classes, noise, stream: (  # noqa: E731
        torch.ones(classes, features.shape[1], dtype=torch.float64),
        Release(what, 1.0, noise, 1),
    )
    for module in ("class_embeddings", "dp_mepf", "central_images", "class_queries", "private_evolution"):
        monkeypatch.setattr(f"fastloda.synthesis.methods.{module}.release_class_sums", sums)
    monkeypatch.setattr("fastloda.privacy.step.group_sums", lambda grads, groups, factors: dict.fromkeys(grads))
    other = LabelledImages(-private.images, private.labels.flip(0), 10)
    budget = Budget(2.0, 1e-5, 40)
    drawn = [
        METHODS[name].fit(data, public, budget, work_in(tmp_path / str(i))).images(10, seed=0)
        for i, data in enumerate((private, other))
    ]
    assert torch.equal(drawn[0].images, drawn[1].images) and torch.equal(drawn[0].labels, drawn[1].labels)


def test_the_choice_is_paid_from_the_same_budget(public, private, tmp_path):
    budget = Budget(2.0, 1e-5, len(private))
    alone, chosen = (
        METHODS[name].fit(private, public, budget, work_in(tmp_path / name)).spent for name in ("loda", "chosen")
    )
    (plain,), (choice, tuning) = alone.releases, chosen.releases
    assert choice == Release("sum of joint embeddings", 1.0, 10.0, 1)
    assert tuning.noise_multiplier > plain.noise_multiplier and tuning.steps == plain.steps
    assert (
        compose_epsilon([choice[1:], tuning[1:]], 1e-5)
        == chosen.epsilon
        <= 2.0
        < compose_epsilon([choice[1:], plain[1:]], 1e-5)
    )


def test_the_teacher_of_labels_is_paid_from_the_same_budget_too(public, private, tmp_path, monkeypatch):
    runs = []
    init = DPTrainer.__init__
    monkeypatch.setattr(
        DPTrainer, "__init__", lambda self, *args, **kw: (init(self, *args, **kw), runs.append(self))[0]
    )
    spent = METHODS["labelled"].fit(private, public, Budget(2.0, 1e-5, len(private)), work_in(tmp_path)).spent
    choice, teacher, tuning = spent.releases
    assert choice.what == "sum of joint embeddings" and tuning.what == "clipped gradients"
    assert teacher == Release("clipped gradients of a classifier", 10 / len(private), 30.0, 2)
    assert compose_epsilon([release[1:] for release in spent.releases], 1e-5) == spent.epsilon <= 2.0
    assert runs[0].settings.views == 3
    assert [Release.of(run)[1:] for run in runs] == [teacher[1:], tuning[1:]]  # what both really did
    assert runs[0].settings.seed != runs[1].settings.seed  # no noise is used twice


def test_a_teacher_learns_from_private_images_and_is_resumed(tmp_path):
    fonts, (digits, test) = font_digits(1000, seed=0), digits_split()

    def teacher(noise: float, digits: LabelledImages) -> float:
        labels = PrivateLabels(noise, steps=40, batch_size=200, public_steps=100)
        options = {"seed": 3, "device": torch.device("cpu")}
        settings = labels.private_training(len(digits), 1e-5, **options)
        options |= {"checkpoint": tmp_path / f"{noise}.pt", "progress": False}
        return accuracy(labels.teacher(digits, fonts, settings, **options), test)

    found = [teacher(noise, digits) for noise in (0.01, 100.0)]
    before = accuracy(train_classifier(fonts, steps=100, seed=3, progress=False), test)
    assert found[0] > before + 0.1 and found[1] < before
    others = replace(digits, images=-digits.images[:])
    assert teacher(0.01, others) == found[0]  # it was loaded, and nothing was left to train


def test_a_sampler_s_images_have_the_labels_that_it_gives_them():
    draw = lambda labels, seed: labels[:, None, None, None] / 10.0 + torch.zeros(len(labels), 1, 2, 2)  # noqa: E731
    plain = Sampler(draw, 3, Spent(1e-5, ()))
    turned = replace(plain, label=lambda images: (images[:, 0, 0, 0] * 10).round().long().add(1) % 3)
    assert plain.images(4, 0).labels.tolist() == [0, 1, 2, 0] and turned.images(4, 0).labels.tolist() == [1, 2, 0, 1]
    assert torch.equal(plain.images(4, 0).images, turned.images(4, 0).images)


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"steps": 0},
        {"views": 0},
        {"training": DPSGD(seed=1)},
    ],
)
def test_labels_refuse_settings_without_sense(bad):
    with pytest.raises(ValueError, match="labels"):
        PrivateLabels(**{"noise_multiplier": 1.0} | bad)


def test_a_step_of_more_records_than_there_are_is_refused_before_anything_is_released(public, private, tmp_path):
    method = replace(METHODS["labelled"], labels=ByEpsilon({1.0: PrivateLabels(30.0, batch_size=41)}))
    with pytest.raises(ValueError, match="labels.batch_size 41 exceeds the 40 records"):
        method.fit(private, public, Budget(2.0, 1e-5, len(private)), work_in(tmp_path))
    assert not list(tmp_path.rglob("*"))


def test_warm_ups_in_turn_and_rounds_are_all_counted(public, private, tmp_path):
    budget = Budget(2.0, 1e-5, len(private))
    spent = {
        name: METHODS[name].fit(private, public, budget, work_in(tmp_path / name)).spent
        for name in ("in turn", "evolution")
    }
    *before, tuning = spent["in turn"].releases
    assert [release.what for release in before] == [
        "votes for public classes",
        "sum of clipped images",
        "sum of joint embeddings",
    ]
    assert [release[1:] for release in before] == [(1.0, 20.0, 1)] * 3 and tuning.what == "clipped gradients"
    (rounds,) = spent["evolution"].releases
    assert (rounds.what, rounds.sample_rate, rounds.steps) == ("votes for samples", 1.0, 2)
    one = compose_epsilon([(1.0, rounds.noise_multiplier, 1)], 1e-5)
    assert one < spent["evolution"].epsilon == compose_epsilon([rounds[1:]], 1e-5) <= 2.0


def test_evolution_makes_more_of_what_private_images_vote_for(tmp_path, monkeypatch):
    """Each class has two kinds of samples; private images are like one kind, and so is what is drawn."""
    digits = font_digits(200, seed=0)
    kinds = torch.arange(200) // 10 % 2
    drawn = digits.images * (1 - 2 * kinds.float())[:, None, None, None]  # every second kind is a negative

    def samples(model, labels, *, varied=None, **_):
        return drawn[: len(labels)] if varied is None else varied

    monkeypatch.setattr("fastloda.synthesis.methods.private_evolution.draw_samples", samples)
    settings = Evolution(samples=200, strengths=(0.5, 0.5), encoder_steps=5)
    method = PrivateEvolution(MODEL, ByEpsilon({1.0: settings}))
    private = font_digits(2000, seed=7)
    shares = []
    for data in (private, LabelledImages(-private.images, private.labels, 10)):
        sampler = method.fit(data, digits, Budget(50.0, 1e-5, 2000), work_in(tmp_path))
        shares.append(float((sampler.images(500, seed=0).images.mean((1, 2, 3)) < 0).float().mean()))
    assert shares[0] > 0.9 and shares[1] < 0.1


def test_samples_are_moved_toward_a_choice_alone():
    """Otherwise the fault would show when the budget is spent and samples are drawn."""
    means = ByEpsilon({1.0: CentralImages(20.0, MODEL.conditional)})
    with pytest.raises(ValueError, match="samples_reach needs a warm-up by choice"):
        ChosenLoDA(METHODS["loda"], means, samples_reach=Reach(0.1))


def test_correlated_noise_is_accounted_by_rounds(public, private, tmp_path):
    """A record may enter one of two steps, twice as often; five steps are three rounds."""
    spent = METHODS["correlated"].fit(private, public, Budget(2.0, 1e-5, len(private)), work_in(tmp_path)).spent
    ((_, rate, noise, rounds),) = spent.releases
    assert (rate, rounds) == (2 * 10 / len(private), 3) and 1.9 < spent.epsilon <= 2


@pytest.mark.parametrize("change", [{"guidance": 0.5}, {"sampler_steps": 3}, {"stochasticity": 0.5}])
def test_the_tuning_says_how_images_are_sampled(change, public, private, tmp_path):
    method, budget, work = METHODS["public only"], Budget(1.0, 1e-4, len(private)), work_in(tmp_path)
    changed = replace(method, sampling=replace(TUNING, **change))
    usual, other, again = (
        m.fit(private, public, budget, work).images(4, 0).images[:] for m in (method, changed, changed)
    )
    assert not torch.equal(usual, other) and torch.equal(other, again)


def test_the_choice_moves_the_samples_too(public, private, tmp_path):
    method, budget = METHODS["chosen"], Budget(2.0, 1e-5, len(private))
    resting = replace(method, samples_reach=Reach())
    fits = [each.fit(private, public, budget, work_in(tmp_path / str(i))) for i, each in enumerate((method, resting))]
    moved, rest = (fitted.images(100, seed=0) for fitted in fits)
    distance = (moved.images - rest.images).square().mean().sqrt()
    assert 1e-3 < distance < 0.3 and fits[0].spent == fits[1].spent


def test_samples_may_begin_at_the_images_of_the_warm_up(public, private, tmp_path):
    """The fewer steps lead back from the noise, the nearer samples are to these images, each to one of its own class."""
    method, budget = replace(METHODS["chosen"], samples_reach=Reach()), Budget(2.0, 1e-5, len(private))
    seen = []
    tuning = replace(TUNING, sampler_steps=20)
    method = replace(method, loda=replace(method.loda, tunings=ByEpsilon({1.0: tuning})))
    further = method.choice.at(2.0)
    steady = lambda self, pool, *rest: (seen.append(pool[torch.arange(30)]), seen[-1])[1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(further), "training_images", steady)
        fits = [
            replace(method, strength=strength).fit(private, public, budget, work_in(tmp_path / str(strength)))
            for strength in (0.05, 0.3, 1.0)
        ]
    own = seen[0]
    distances = []
    for fitted in fits:
        drawn = fitted.images(30, seed=0)
        apart = torch.cdist(drawn.images.flatten(1), own.images[:].flatten(1))
        distances.append(apart.masked_fill(drawn.labels[:, None] != own.labels, math.inf).amin(1).mean())
    assert distances[0] < 0.5 * distances[1] and distances[1] < distances[2]


def test_images_of_given_classes_are_taken_without_repetition_where_there_are_enough():
    images = font_digits(50, seed=0)
    marked = replace(images, images=(torch.arange(50.0) / 50)[:, None, None, None].expand(50, 1, 2, 2))
    labels = torch.tensor([3, 3, 3, 3, 3, 3, 7, 3])
    taken, other = ((of_classes(marked, labels, seed)[:, 0, 0, 0] * 50).round().long() for seed in (1, 2))
    assert torch.equal(images.labels[taken], labels) and len(set(taken[[0, 1, 2, 3, 4]].tolist())) == 5
    assert taken[5] == taken[0] and taken[7] == taken[1]
    assert not torch.equal(taken, other)
    with pytest.raises(ValueError, match="no image of class 3 to begin at"):
        of_classes(images[images.labels != 3], labels, seed=1)


@pytest.mark.parametrize("strength", [0.0, 1.1, math.nan])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ValueError, match="strength must lie in"):
        replace(METHODS["chosen"], strength=strength)


def test_methods_share_the_public_model(public, private, tmp_path):
    first = MODEL.fit(public, work_in(tmp_path))
    models = lambda: list((tmp_path / "public").glob("*.safetensors"))  # noqa: E731
    assert len(models()) == 1 and not list((tmp_path / "public").glob("*.pt"))  # no checkpoint is left
    again = MODEL.fit(public, work_in(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    MODEL.fit(public, work_in(tmp_path, seed=1))
    MODEL.fit(private, work_in(tmp_path))
    assert len(models()) == 3  # another seed or other images make other models


@pytest.mark.parametrize("name", ["mepf", "evolution", "ldm"])
def test_methods_share_what_is_trained_on_public_images(name, public, private, tmp_path):
    """Two seeds of a table that share public models train each of them once; without a shared seed each trains its own."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    for seed in (1, 2):
        for folder, public_seed in ((shared, 0), (own, None)):
            work = replace(work_in(folder, seed), folder=folder / str(seed), public_seed=public_seed)
            METHODS[name].fit(private, public, Budget(2.0, 1e-5, len(private)), work)
    once, twice = (sorted((folder / "public").glob("*.safetensors")) for folder in (shared, own))
    assert once and len(twice) == 2 * len(once)


def test_a_loaded_classifier_has_the_features_of_the_trained_one(public, tmp_path):
    work = work_in(tmp_path, seed=3)
    trained, some = train_classifier(public, steps=2, seed=3, progress=False), public.images[:5]
    for _ in range(2):  # the second one is loaded
        found = public_classifier(public, 2, work)
        assert torch.equal(found(some), trained(some))
        assert not any(parameter.requires_grad for parameter in found.parameters())


def test_pretraining_in_two_steps_starts_without_labels(public, tmp_path, monkeypatch):
    seen = []
    losses = DDPM.losses

    def spy(self, model, x, y, **options):
        seen.append((len(x), options["label_dropout"]))
        return losses(self, model, x, y, **options)

    monkeypatch.setattr(DDPM, "losses", spy)
    everything = lambda: as_bytes(font_digits(90, seed=5))  # noqa: E731
    two = replace(MODEL, unconditional=PublicTraining(steps=3, batch_size=4, warmup=1), everything=everything)
    two.fit(as_bytes(public), work_in(tmp_path))
    assert seen == [(4, 1.0)] * 3 + [(8, 0.1)] * 2
    replace(two, everything=None).fit(as_bytes(public), work_in(tmp_path))  # other images make another model
    assert len(seen) == 10


def test_a_killed_pretraining_continues_bit_for_bit(public, tmp_path, monkeypatch):
    two = replace(MODEL, unconditional=PublicTraining(steps=2, batch_size=4, warmup=1))
    whole = two.fit(public, work_in(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "fastloda.synthesis.methods.diffusion_model.save_unet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            two.fit(public, work_in(tmp_path / "killed"))
    resumed = two.fit(public, work_in(tmp_path / "killed"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_dp_ldm_trains_attention_and_class_embedding_alone():
    model = digits_unet(width=8, norm_groups=4)
    tune_attention_alone(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("cemb_layer") for name in names)
    rest = {name for name in names if not name.startswith("cemb_layer")}
    assert rest and all(any(part in name for part in (".proj", ".norm.")) for name in rest)
    assert not any(name.startswith(("temb_layer", "out", "downblocks.0.")) for name in names)


# ---- one-shot releases


def test_a_record_moves_the_released_sums_by_at_most_one():
    torch.manual_seed(0)
    stream = lambda: noise_stream(0)  # noqa: E731, the same noise cancels
    for scale in (1e-3, 1.0, 1e6, math.inf, math.nan):
        features, labels = torch.randn(6, 5) * scale, torch.arange(6) % 3
        with_all, _ = release_class_sums("x", features, labels, 3, 0.7, stream())
        without, _ = release_class_sums("x", features[1:], labels[1:], 3, 0.7, stream())
        assert (with_all - without).norm() <= 1 + 1e-9 and with_all.isfinite().all()


def test_released_sums_are_the_sums_and_carry_the_stated_noise():
    features, labels = torch.nn.functional.normalize(torch.randn(500, 4)), torch.arange(500) % 2
    exact, _ = release_class_sums("x", features, labels, 2, 1e-12, noise_stream(0))
    expected = torch.stack([features[labels == c].double().sum(0) for c in range(2)])
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)
    draws = torch.stack(
        [release_class_sums("x", features[:2], labels[:2], 50, 3.0, noise_stream(s))[0] for s in range(100)]
    )
    assert draws[:, 2:].std() == pytest.approx(3.0, rel=0.02)


def test_the_noise_of_releases_is_no_generator_whose_state_its_numbers_show():
    """PyTorch's generator on the CPU is linear: who knows all records but one knows enough of its numbers."""
    drawn = [noise_stream(seed).normal(torch.Size([4])) for seed in (None, None, 0, 1, 0)]
    assert all(isinstance(noise_stream(seed), NoiseStream) for seed in (None, 0))
    assert len({tuple(d.tolist()) for d in drawn}) == 4 and torch.equal(drawn[2], drawn[4])
    assert not torch.equal(noise_of(Secret.of_seed(0), torch.device("cpu")).normal(torch.Size([4])), drawn[2])


@pytest.mark.parametrize("shares", [(1.0,), (0.6, 0.3, 0.1), (0.5, 0.5)])
def test_shares_of_a_budget_compose_to_it(shares):
    noises = noise_multipliers(Budget(3.0, 1e-5, 100), shares)
    assert 2.98 < compose_epsilon([(1.0, noise, 1) for noise in noises], 1e-5) <= 3.0
    with pytest.raises(ValueError, match="sum to 1"):
        noise_multipliers(Budget(3.0, 1e-5, 100), (0.5, 0.6))


def test_features_have_norm_one_whatever_the_image(public):
    extreme = torch.cat([public.images[:3], torch.ones(1, 1, 8, 8), -torch.ones(1, 1, 8, 8)])
    phi = fourier_features(extreme, torch.randn(64, 50))
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(5))
    kernel = torch.exp(-(extreme[0] - extreme[1]).square().sum() / 2 / 9)
    wide = fourier_features(extreme, torch.randn(64, 20_000, generator=torch.Generator().manual_seed(0)) / 3)
    assert (wide[0] @ wide[1]).item() == pytest.approx(kernel.item(), abs=0.03)  # a Gaussian kernel's features
    encoder = Perceptual(train_classifier(public, steps=2, width=8, progress=False).features)
    for moment in encoder(extreme):
        assert (moment.norm(dim=1) <= 1 + 1e-6).all()


def test_class_means_are_means_of_classes():
    features, labels = torch.randn(7, 3), torch.tensor([0, 0, 2, 2, 2, 0, 3])
    means = class_means(features, labels, 5)
    torch.testing.assert_close(means[2], features[2:5].mean(0))
    assert means[1].abs().sum() == 0


def test_a_matched_mean_embedding_gives_images_of_the_right_classes(tmp_path):
    """With little noise, DP-MERF's samples teach a classifier more than chance would."""
    data = font_digits(600, seed=0)
    fitted = DPMERF(features=400, steps=120).fit(data, data, Budget(1e5, 1e-5, 600), work_in(tmp_path))
    judge = train_classifier(data, steps=120, progress=False)
    images = fitted.images(200, seed=0)
    assert (judge(images.images).argmax(1) == images.labels).double().mean() > 0.4


# ---- budgets and settings


def test_spent_composes_all_releases():
    releases = (Release("a", 1.0, 2.0, 1), Release("b", 0.1, 1.5, 10))
    spent = Spent(1e-5, releases)
    assert spent.epsilon == compose_epsilon([(1.0, 2.0, 1), (0.1, 1.5, 10)], 1e-5)
    assert Spent(1e-5).epsilon == 0 and Spent(1e-5, (Release("raw", 1.0, 0.0, 1),)).to_dict()["epsilon"] is None


@pytest.mark.parametrize("bad", [(0.0, 1e-5, 10), (math.inf, 1e-5, 10), (1.0, 0.1, 10), (1.0, 1e-5, 0)])
def test_impossible_budgets_are_refused(bad):
    with pytest.raises(ValueError):
        Budget(*bad)


def test_settings_are_those_of_the_largest_smaller_budget():
    settings = ByEpsilon({1.0: "strict", 5.0: "usual"})
    assert [settings.at(e) for e in (0.5, 1.0, 4.9, 5.0, 10.0)] == ["strict", "strict", "strict", "usual", "usual"]


def test_the_settings_of_a_budget_are_those_that_it_uses():
    """What another budget uses does not matter; what this one uses does, however deeply it is nested."""
    method = ChosenLoDA(METHODS["loda"], ByEpsilon({1.0: PublicChoice(4.0), 10.0: PublicChoice(1.0)}))
    other = replace(method, choice=ByEpsilon({1.0: PublicChoice(4.0), 10.0: PublicChoice(2.0)}))
    assert at_budget(method, 1.0) == at_budget(other, 1.0)
    assert at_budget(method, 10.0) != at_budget(other, 10.0)
    deeper = replace(method, loda=DPLoDA(MODEL, ByEpsilon({1.0: replace(TUNING, steps=9)})))
    assert at_budget(method, 1.0) != at_budget(deeper, 1.0)
    assert at_budget(METHODS["no dp"], 1.0) is METHODS["no dp"]


def test_timesteps_follow_the_mixture():
    t = DDPM().mixture(TIME_WEIGHTS).draw_times(40_000, generator=torch.Generator().manual_seed(0))
    shares = [((t >= first) & (t < end)).double().mean().item() for first, end, _ in TIME_WEIGHTS]
    assert shares == pytest.approx([0.015, 0.785, 0.2], abs=0.01)
    with pytest.raises(ValueError, match="500 and 400"):
        DDPM().mixture([(500, 400, 1.0)])
