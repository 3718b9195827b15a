"""One command from two sets of images, public and private, to private synthetic images: a plan, then the stages in order."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fastloda.errors import UserError
from fastloda.synthesis import stages
from fastloda.synthesis.arguments import NO_NAMES, Device, Names, resolve_device
from fastloda.synthesis.budget import STATEMENT, Privacy, nominal_records
from fastloda.synthesis.data import (
    FolderFacts,
    LabelledImages,
    listed,
    look_at,
    mapped_names,
    only,
    read_owners,
    relabelled,
)
from fastloda.synthesis.diffusion import UNetConfig
from fastloda.synthesis.effort import Effort, efforts, keep, kept, largest
from fastloda.synthesis.inputs import (
    check_there,
    open_for_unet,
    open_public,
    open_tests,
    read_class_map,
    sensible_size,
    shape_text,
)
from fastloda.synthesis.methods.diffusion_model import PrivateTuning
from fastloda.synthesis.parser import as_yaml
from fastloda.synthesis.plan import Cost, Plan, duration, measure
from fastloda.synthesis.presets import SAMPLER_STEPS, SMALL, judge, private_tuning
from fastloda.synthesis.recipe import Recipe
from fastloda.synthesis.settings import Adapter, UNetShape
from fastloda.synthesis.stages.pretraining import SHAPE
from fastloda.synthesis.stages.private_images import PRIVATE_NAME
from fastloda.synthesis.stages.sampling import check_sampling

logger = logging.getLogger("fastloda")


def synthesize(
    public: str,
    private: str,
    epsilon: float,
    out: Path,
    *,
    test: str | None = None,
    delta: float | None = None,
    records: int | None = None,
    name: str = PRIVATE_NAME,
    class_map: Names = NO_NAMES,
    skip_unreadable: bool = False,
    owner: str | None = None,
    per_owner: int = 1,
    size: int | None = None,
    channels: int | None = None,
    choose: bool = False,
    count: int = 2000,
    minutes: float = 15.0,
    public_steps: int | None = None,
    private_steps: int | None = None,
    sampler_steps: int | None = None,
    rank: int = 4,
    unet: UNetShape = SHAPE,
    seed: int | None = None,
    dry_run: bool = False,
    device: Device = "auto",
    progress: bool = True,
) -> dict:
    """Make private synthetic images from a set of public and a set of private images.

    It says what it has found and what it will do, then runs pretrain, choose (if asked for), finetune, sample and evaluate (if
    there are test images) in the folder `out`. If interrupted, it continues when it is called again. Everything in out/samples
    may be published, on the terms in its privacy.json; out/private also contains files that must not be.

    Each set is a folder of images, with a subfolder for each class, or an npz file or a name, as for `fastloda pretrain` and
    `fastloda finetune`. Classes are matched by name. Size and channels depend on the public images only, because a single
    private image could change them.

    Args:
        public: public images, on which the model to adapt is trained; of the private images' classes, and possibly of others.
        private: private images.
        epsilon: upper bound on epsilon of all that is released about the private images; 1 is strong, 10 is common in research.
        out: folder for all results.
        test: real images, to test a classifier that is trained on the synthetic ones; epsilon does not cover them.
        delta: probability with which the bound may fail. Default: the largest power of ten below 1 / (10 records).
        records: public, nominal number of private records. Default: the count of the data, which thereby becomes public.
        name: public name of the private images, which is written to privacy.json. No path is published.
        class_map: pairs private=public, separated by commas, for private classes that have another name in the public images.
        skip_unreadable: whether to leave out images that cannot be read, instead of refusing. What is left out is not protected.
        owner: who owns each private image, if people have several: then privacy protects a person with all their images.
            `subfolder`, a regular expression with one group that matches from the start of the file name, or a .csv file, as for
            `fastloda finetune --owner`.
        per_owner: number of an owner's images in a step; only with `owner`.
        size: side of the synthetic images in pixels. Default: the largest of 8, 16, 24, 32, 48 and 64 that is not above the side
            of any public image.
        channels: number of channels, 1 or 3. Default: 1 if all public images are grey, else 3.
        choose: whether to choose public images privately first (`fastloda choose`), with a part of the same budget.
        count: number of synthetic images.
        minutes: time that everything except the evaluation may take on this machine, estimated from a few public steps. The steps
            below and the U-Net are as large as it allows, unless they are given; the plan says what more time would change.
        public_steps: number of steps of public training. Default: up to 2,000.
        private_steps: number of steps of private training. Default: up to 400, or 100 below epsilon 3.
        sampler_steps: number of steps of the sampler. Default: 50, or 25 if time is short.
        rank: rank of the adapters.
        unet: shape of the U-Net. Default: the preset for the size, with half the width if time is short.
        seed: seed of everything. Default: the operating system's randomness for what is private. A number makes an experiment
            that can be repeated, and whose noise can be foreseen.
        dry_run: whether to stop after the plan, without writing anything.
        device: device to compute on.
        progress: whether to show progress: bars on a terminal, elsewhere a line now and then.
    """
    place = resolve_device(device)
    Privacy(epsilon, 1e-9 if delta is None else delta)  # refuses now what no number of records could make right
    if owner is not None and choose:
        raise UserError(
            "--choose releases a sum in which each image counts by itself: leave it out, or leave out --owner"
        )
    if not 0 < minutes < float("inf"):
        raise UserError(f"minutes must be positive and finite, got {minutes}")
    check_sampling(count, sampler_steps or SAMPLER_STEPS, 0.0)
    given = {"public_steps": public_steps, "private_steps": private_steps, "sampler_steps": sampler_steps}
    given = {name: steps for name, steps in given.items() if steps is not None}
    begun = kept(Path(out), {"minutes": minutes, **given})
    tuning_of, adapter = partial(private_tuning, epsilon, seed=seed), Adapter(rank)
    look = partial(_costs, unet=unet, begun=begun, tuning_of=tuning_of, adapter=adapter, device=place)
    found = open_sets(public, private, test, class_map, skip_unreadable, size, channels, look)
    units = len(found.private) if owner is None else len(set(read_owners(private, found.private.files, owner)))
    counted = "records" if owner is None else "owners"
    found.say(name, "image" if owner is None else f"owner of images, of whom there are {units}")
    nominal, side = nominal_records(records, units, "--records", counted), found.public.images.shape[2]
    options = {"delta": delta, "choose": choose, "count": count, "rank": rank, "seed": seed}

    def plan_of(effort: Effort) -> Plan:
        recipe = Recipe.fitting(epsilon, nominal, side, **options, **effort.steps)
        return Plan(recipe, effort.shape(unet).config(found.public), found.costs[effort.width], per_owner, counted)

    choices = efforts(Effort.full(side, epsilon), list(found.costs), given)
    effort = begun or largest(choices, lambda each: plan_of(each).total, 60 * minutes)
    plan = plan_of(effort)
    recipe, config, unet = plan.recipe, plan.unet, effort.shape(unet)
    shown = plan.to_dict(recipe.noise_multiplier()) | _times(plan, plan if begun else plan_of(choices[0]), minutes)
    if dry_run:
        return shown
    if not begun:
        keep(Path(out), effort, {"minutes": minutes, **given})
    logger.info("the plan:\n%s", as_yaml(shown).rstrip())
    device_and_bars = {"device": device, "progress": progress}
    common = {"skip_unreadable": skip_unreadable, **device_and_bars}
    source = {"data": private, "name": name, "class_map": class_map, **common}
    shape = {"size": config.image_size, "channels": config.in_channels, "unet": unet}
    steps = {"pretrain": lambda: recipe.pretrain(out, data=public, **shape, **common)}
    if choose:
        steps["choose"] = lambda: recipe.choose(out, public=public, **source)
    steps["finetune"] = lambda: recipe.finetune(out, owner=owner, per_owner=per_owner, **source)
    steps["sample"] = lambda: recipe.sample(out, **device_and_bars)
    if test is not None:
        judging = {"test": test, "class_map": class_map, "classifier": judge(config.image_size)}
        steps["evaluate"] = lambda: stages.evaluate(out, **judging, **common)
    return _run(steps) | {"privacy": str(Path(out) / "samples" / STATEMENT)}


def _costs(
    pool: LabelledImages,
    *,
    unet: UNetShape,
    begun: Effort | None,
    tuning_of: Callable[[int], PrivateTuning],
    adapter: Adapter,
    device: torch.device,
) -> dict[int | None, Cost]:
    """Measure the costs of steps on the public images, by the U-Net's width: its own, and half of it unless a shape is given."""
    logger.info("note: timing a few steps on public images")
    usual = unet.config(pool)
    widths = (begun.width,) if begun else (None,) if unet != SHAPE else (None, usual.width // 2)
    shapes = {width: replace(usual, width=width or usual.width) for width in widths}
    tuning = tuning_of(usual.image_size)
    return {width: measure(shape, pool, tuning, adapter, device) for width, shape in shapes.items()}


def _times(plan: Plan, most: Plan, minutes: float) -> dict[str, str]:
    """Describe the total time of a plan, and what the plan that takes the most time has in addition."""
    within = "within" if plan.total <= 60 * minutes else "more than"
    shown = {"time in all": f"{duration(plan.total)} on this machine, {within} --minutes {minutes:g}"}
    if most == plan:
        return shown
    public, private = most.recipe.pretraining, most.recipe.privacy
    more = (
        f"--minutes {math.ceil(most.total / 60)}: {most.cost.parameters:,} parameters, {public.steps} public steps of "
    )
    return shown | {"with more time": more + f"{public.batch_size} images, {private.steps} private steps"}


@dataclass(frozen=True)
class Sets:
    """The image sets of a run, opened and matched.

    Attributes:
        public, private: the images.
        facts: facts about the sets that are folders, by the name of the set ("public" or "private").
        costs: costs of a step on the public images, by the width of the U-Net.
    """

    public: LabelledImages
    private: LabelledImages
    facts: Mapping[str, FolderFacts]
    costs: Mapping[int | None, Cost]

    def say(self, name: str, unit: str) -> None:
        """Say what was found, what the unit of privacy is, and what becomes public."""
        for what, images in (("public", self.public), ("private", self.private)):
            logger.info("%s: %s", what, _described(images, self.facts.get(what)))
        logger.info(
            "note: privacy protects one %s. The names of the private classes are published, under the name %r",
            unit,
            name,
        )


def open_sets(
    public: str,
    private: str,
    test: str | None,
    class_map: Names,
    skip_unreadable: bool,
    size: int | None,
    channels: int | None,
    look: Callable[[LabelledImages], dict[int | None, Cost]],
) -> Sets:
    """Open all sets of images as the stages will do, and match their classes.

    `look` measures the costs on the public images, before any private image is read.

    Raises:
        FileNotFoundError, UserError: a set is refused; if several are, the message names the reason for each.
    """
    for path in (public, private, test):
        check_there(path)
    facts = {"public": look_at(public)} if Path(public).is_dir() else {}
    if size is None and facts:
        size = sensible_size(facts["public"])
    mapping, refusals = read_class_map(class_map), []

    def opened(open_set: Callable[[], LabelledImages]) -> LabelledImages | None:
        try:
            return open_set()
        except UserError as error:
            refusals.append(str(error))
            return None

    reading = {"skip_unreadable": skip_unreadable}
    pool = opened(lambda: open_public(public, size=size, channels=channels, **reading))
    channels, size = pool.images.shape[1:3] if pool else (channels or 3, size or SMALL)
    config = UNetConfig(image_size=size, in_channels=channels, multipliers=(1,))
    costs = look(pool) if pool else {}
    facts |= {"private": look_at(private)} if Path(private).is_dir() else {}
    records = opened(lambda: open_for_unet(private, config, **reading))
    if pool and records:
        named = mapped_names(records, mapping)
        opened(lambda: relabelled(records, pool.class_names, mapping, of="the public images"))
        if test is not None and not refusals:
            known = only(pool, [each for each in pool.class_names if each in named])
            opened(lambda: open_tests(test, known, mapping, **reading))
    if refusals:
        raise UserError("\n".join(refusals))
    return Sets(pool, records, facts, costs)


def _described(images: LabelledImages, facts: FolderFacts | None) -> str:
    """Describe images, and how those of a folder get one size: "600 images, 48 x 40 RGB, centre crop to 32 x 32"."""
    classes = f"{images.num_classes} classes: {listed(images.class_names)}"
    if facts is None:
        return f"{len(images)} images, {shape_text(images)}, {classes}"
    (width, height), *others = facts.sizes
    more = f" and {len(others)} other sizes" if others else ""
    side = images.images.shape[2]
    kind = f"{width} x {height}{more} {'grey' if facts.channels == 1 else 'RGB'}"
    cut = "" if facts.sizes.keys() == {(side, side)} else f", centre crop to {side} x {side}"
    return f"{len(images)} images, {kind}{cut}, {classes}"


def _run(steps: Mapping[str, Callable[[], dict]]) -> dict:
    """Run the stages in order, and collect what the user wants to know about their results."""
    wanted, found = ("epsilon", "delta", "samples", "images", "grid", "accuracy"), {}
    for number, (stage, work) in enumerate(steps.items(), 1):
        logger.info("[%d/%d] %s", number, len(steps), stage)
        found |= {key: value for key, value in work().items() if key in wanted}
    return found
