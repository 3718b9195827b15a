"""The private step: one backward, norms, clip, sum, add noise once, divide by the expected batch size, optimizer step.

This is DP-SGD (Abadi et al. 2016) with book-keeping (Bu et al. 2023). Neighbouring data sets differ by adding or removing one
record. Before the noise, a record changes nothing but the clipped sum, by at most max_grad_norm in L2 norm, and with adaptive
clipping a count, which is accounted for (`fastloda.privacy.adaptive`).
"""

import math
import weakref
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.compute import check_losses, check_views, compute_per_sample_grads, in_full_precision
from fastloda.per_sample.fallback.functional import cover_modules
from fastloda.per_sample.gradient import PerSampleGrad
from fastloda.per_sample.looking_engine import look_at_backward
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import check_optimizer, trainable_parameters
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.clip import Clipping, clip_factors, clipping_style, group_norms, group_sums
from fastloda.privacy.correlated import CorrelatedNoise
from fastloda.privacy.noise import NoiseOver, NoiseSource
from fastloda.privacy.ranks import (
    Group,
    World,
    check_not_sharded,
    check_wrappers,
    hand_back_shards,
    parameter_facts,
    value_facts,
)
from fastloda.privacy.stats import StepStats
from fastloda.privacy.styles import Flat, check_max_grad_norm
from fastloda.privacy.sums import Alike, FlatSums
from fastloda.privacy.watch import Watch, add_watcher, end_update, resume_after_update

look_at_backward()  # at import, since a loss may use a gradient that was computed before any clipper was made


class Clipped(NamedTuple):
    """The norms, float64 [groups, samples], and the counts of a micro-batch that was clipped."""

    norms: Tensor
    stats: StepStats


class GhostClipper:
    """The clipped sum of per-sample gradients, over any number of micro-batches, and its noisy mean in `.grad`.

    >>> clipper = GhostClipper(model, max_grad_norm=1.0)
    >>> for x, y in micro_batches:
    ...     clipper.accumulate(loss(model(x), y))          # one number per sample
    >>> clipper.privatize(noise_multiplier=1.0, expected_batch_size=256)
    >>> optimizer.step()

    Guarantees: one sample changes the sum by at most max_grad_norm (1 + 1e-5) in L2 norm, whatever the model puts out; a
    sample whose gradient is not finite contributes zero; the noise is added once, however many micro-batches there are.

    Where `torch.distributed` is initialised, all ranks make one step (`fastloda.privacy.ranks`): each accumulates its own share
    of the samples, perhaps none, and all call privatize. The noise is added once for all of them, and every rank gets the same
    bits in `.grad`. No record may be on two ranks.

    Args:
        model: the model whose trainable parameters get the private gradient.
        max_grad_norm: the bound on a sample's contribution; with adaptive clipping, the default of the initial one, and the
            attribute then changes with each step.
        views: the number of losses per sample, which are averaged before clipping.
        clipping: "flat", "automatic", "per_layer", "adaptive", or one of them with its settings (`privacy/styles.py`).
        bands: the number of steps over which the noise is correlated (`privacy/correlated.py`). If it is above 1, no record may
            enter two of any `bands` consecutive steps, nor may other records decide which steps it may enter, and the accountant
            counts ceil(steps / bands) steps, at the rate with which a record enters a step that it may enter: `DPTrainer` and
            `make_private` see to all this.
        group: the process group of the ranks. None: the default group, if it is initialised; "alone": this process only.

    Raises:
        ValueError: max_grad_norm is not positive and finite, or views or bands < 1, or clipping is unknown or does not fit the
            model.
        PrivacyError: nothing trains, or a layer mixes samples, or a wrapper handles gradients by itself (`check_wrappers`).
    """

    def __init__(
        self,
        model: nn.Module,
        max_grad_norm: float,
        views: int = 1,
        *,
        clipping: Clipping = "flat",
        bands: int = 1,
        group: Group = None,
    ):
        max_grad_norm = check_max_grad_norm(max_grad_norm)
        self.views = check_views(views)
        self._clipping = clipping_style(clipping)
        self.noise = CorrelatedNoise(bands)
        self.model = model
        self.group = group
        self._world = World.of(group)
        hand_back_shards(model)
        check_wrappers(model, self.world)
        members = Members.of(model)
        self.parameters = trainable_parameters(members)
        # layers without a rule get the general, slower one, from the next forward pass on
        cover_modules(members.modules, self.parameters)
        self._watch: Watch | None = Watch(members)  # None from the noise to the end of the update
        add_watcher(model, self)
        _kept.pop(model, None)  # it would compare the model with an earlier state; the present one is accepted here
        self._groups = self.clipping.groups(self.parameters)
        shares = self.clipping.shares(self._groups, max_grad_norm)
        device = next(iter(self.parameters.values())).device
        self._shares = torch.tensor(shares, dtype=torch.float64, device=device)[:, None]
        self._bound = self.clipping.bound_from(max_grad_norm)
        self.reset()

    @property
    def clipping(self) -> Flat:
        """The style of clipping. It can't be changed, since the noise, the groups and the bound all depend on it."""
        return self._clipping

    @property
    def max_grad_norm(self) -> float:
        """The bound on a sample's contribution to the sum. It may be set between two steps.

        Raises:
            ValueError: the bound is not positive and finite.
            PrivacyError: gradients are accumulated already, clipped to another bound than the noise would be for.
        """
        return self._bound.value

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        if self._has_sums and value != self.max_grad_norm:
            raise PrivacyError(
                f"max_grad_norm changed within a step: what was accumulated is clipped to {self.max_grad_norm:g}, and the noise "
                "would not fit it. Change it before the first accumulate() of a step, or call reset()"
            )
        self._bound.value = check_max_grad_norm(value)

    @property
    def world(self) -> World:
        """The ranks that make the step together, fixed when the clipper was made.

        Raises:
            PrivacyError: they have changed since.
        """
        return self._world.unchanged(self.group)

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._sums = FlatSums(self.parameters)  # new buffers, since the model may have been moved or cast
        self._has_sums = False
        self._bound.forget()
        self._stats = StepStats.none(self._shares.device)

    def accumulate(self, losses: Tensor, mask: Tensor | None = None) -> StepStats:
        """Add the clipped gradients of a micro-batch. This runs backward from losses, and frees the graph of losses.

        Args:
            losses: [samples * views], sample-major: one number per sample and view. A sample's gradient is that of the mean
                over its views.
            mask: bool [samples]; False marks padding, which contributes zero. Default: all true.

        Raises:
            ValueError: losses, mask or views do not fit each other; nothing has changed then.
            PrivacyError: a sample's contribution could not be bounded; nothing has changed then.
        """
        samples, mask = check_losses(losses, self.views, mask)
        self._world.unchanged(self.group)
        sharded = hand_back_shards(self.model)
        self.check_model()
        return self._add(losses, samples, mask, sharded)

    def check_model(self) -> Members:
        """Refuse the model if other parameters train than when the clipper was made, or if a pass over records wrote to it.

        Returns the model's members as they are now.

        Raises:
            ValueError: other parameters train.
            PrivacyError: a parameter or buffer changed.
        """
        members = Members.of(self.model)
        if not _are_same(trainable_parameters(members), self.parameters):
            raise UserError("the model's trainable parameters changed since GhostClipper was made: make a new one")
        self._watch = self._watch or Watch(members)  # an optimizer that is not PyTorch's reports no end of its update
        self._watch.check(members, thorough=False)  # writes that PyTorch does not count are looked for before the noise
        return members

    def _add(self, losses: Tensor, samples: int, mask: Tensor, sharded: bool) -> StepStats:
        """Do the work of `accumulate`, without `check_model`."""
        if not samples:  # an empty Poisson batch adds nothing; privatize adds its noise
            check_not_sharded(sharded)
            return StepStats.none(losses.device)
        with in_full_precision(losses.device):
            world = self.world if sharded else World()
            grads = compute_per_sample_grads(losses, self.model, self.parameters, samples, world.most)
            self._has_sums = True
            clipped = self.clip_into(self._sums, losses, grads, mask, self.bounds)
        return self._observe(clipped, mask)

    @property
    def bounds(self) -> Tensor:
        """The bound of each group of parameters, float64 [groups, 1]."""
        return self._shares * self.max_grad_norm

    def clip_into(
        self, sums: FlatSums, losses: Tensor, grads: Mapping[str, PerSampleGrad], mask: Tensor, bounds: Tensor
    ) -> Clipped:
        """Add the gradients, clipped to `bounds`, to `sums`, and return the micro-batch's norms and counts."""
        norms = group_norms(grads, self._groups, len(mask), losses.device)
        factors = clip_factors(norms, bounds, mask, self.clipping)
        sums.add_(group_sums(grads, self._groups, factors))
        return Clipped(norms, StepStats.of(losses, norms, mask, bounds))

    def add(self, sums: FlatSums, clipped: Clipped, mask: Tensor) -> StepStats:
        """Add a micro-batch that `clip_into` has clipped, with the present bounds, into `sums` that were zero before."""
        self._has_sums = True
        self._sums.join_(sums)
        return self._observe(clipped, mask)

    def _observe(self, clipped: Clipped, mask: Tensor) -> StepStats:
        self._bound.observe(clipped.norms[0], mask)
        self._stats += clipped.stats
        return clipped.stats

    def privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: NoiseSource | NoiseOver | None = None
    ) -> None:
        """Set .grad = (clipped sum + N(0, (noise_multiplier max_grad_norm)^2)) / expected_batch_size, and reset the sum.

        With adaptive clipping the gradient's noise is larger, to pay for the release of the noisy count, and max_grad_norm
        changes.

        Args:
            noise_multiplier: the noise's standard deviation over max_grad_norm, as accounted; 0 gives no privacy.
            expected_batch_size: sample_rate x records, those of all ranks together. Public: never the realised batch size.
            generator: the source of the noise, read on rank 0 only: a torch.Generator for experiments that must repeat, or a
                `SecureGenerator`; or a function that all ranks call with the sums, and that returns one. Default: a generator
                seeded by the operating system.

        Raises:
            ValueError: an argument is out of range, or the ranks disagree on one, on max_grad_norm, on views, or on the
                trainable parameters or their values. All ranks raise, and nothing has changed.
        """
        world = self.world
        if world.size > 1:  # before any check that could fail on one rank alone: all ranks must refuse together
            world.check_same(self._facts(noise_multiplier, expected_batch_size))
        _check_privatize(noise_multiplier, expected_batch_size)
        if self._watch:
            self._watch.check(Members.of(self.model))  # the backward pass may have written to it as well
        std = self.clipping.gradient_noise(noise_multiplier, expected_batch_size) * self.max_grad_norm
        sums = world.sum_to_first(self._sums.buffers)
        if callable(generator):
            source = cast(NoiseOver, generator)([*sums.values(), *self._bound.observed(world)])
        else:
            source = generator
        noise = std if world.first else 0.0  # the other ranks copy the first one's mean
        noisy = self.noise.add(sums, noise, source)
        means = {alike: (total / expected_batch_size).to(alike[1]) for alike, total in noisy.items()}
        world.copy_from_first(list(means.values()))
        self._bound.move(noise_multiplier, expected_batch_size, world, source)
        self._hand_over(means)

    def _hand_over(self, means: dict[Alike, Tensor]) -> None:
        """Put the noisy means into `.grad`, reset, and allow writes to the model until the optimizer's update ends."""
        self.noise.released()
        for name, grad in self._sums.parted(means).items():
            self.parameters[name].grad = grad
        stats = self._stats
        self.reset()
        self._watch = None
        resume_after_update(self)
        stats.warn_if_wasted(stacklevel=3)  # at the end, since it waits for the GPU

    def watch(self) -> None:
        """Accept the model's present state: from now until the noise is added nothing in it may change."""
        self._watch = Watch(Members.of(self.model))

    def _facts(self, noise_multiplier: float, expected_batch_size: float) -> dict[str, object]:
        """List the facts on which all ranks must agree."""
        arguments = {
            "max_grad_norm": self.max_grad_norm,
            "views": self.views,
            "clipping": self.clipping,
            "bands": self.noise.bands,
            "the number of steps with correlated noise": self.noise.steps if self.noise.bands > 1 else 0,
            "noise_multiplier": noise_multiplier,
            "expected_batch_size": expected_batch_size,
        }
        return arguments | parameter_facts(self.parameters) | value_facts(self.parameters)


class _KeptClipper(GhostClipper):
    """The clipper that `ghost_dp_step` keeps for the model's next step; it refers to the model weakly."""

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("the model is gone")
        return model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def fits(self, members: Members, max_grad_norm: float, views: int, clipping: Clipping, group: Group) -> bool:
        """Tell whether a new clipper for these arguments would be like this one; check the model's members as it would.

        Raises:
            PrivacyError: a layer mixes samples, or a wrapper handles gradients by itself.
        """
        world, parameters = World.of(group), trainable_parameters(members)
        check_wrappers(self.model, world)
        cover_modules(members.modules, parameters)
        asked = (max_grad_norm, views, clipping_style(clipping), group, world)
        ours = (self.max_grad_norm, self.views, self.clipping, self.group, self._world)
        return asked == ours and self._sums.fit(parameters) and _are_same(parameters, self.parameters)


def _are_same(one: Mapping[str, nn.Parameter], other: Mapping[str, nn.Parameter]) -> bool:
    return one.keys() == other.keys() and all(other[name] is p for name, p in one.items())


# Model -> the clipper of its last `ghost_dp_step`: to make a new one would take a small step longer than its noise does.
_kept: weakref.WeakKeyDictionary[nn.Module, _KeptClipper] = weakref.WeakKeyDictionary()


def _clipper_for(model: nn.Module, max_grad_norm: float, views: int, clipping: Clipping, group: Group) -> _KeptClipper:
    """Take the clipper that the model's last step kept, if it fits the arguments, or make a new one.

    A step that fails keeps none, so that the next one accepts the model as it then is.

    Raises:
        UserError, PrivacyError: as those of `GhostClipper`; or the model changed since its last step, or clipping is adaptive.
    """
    if kept := _kept.pop(model, None):
        members = Members.of(model)
        fits = kept.fits(members, max_grad_norm, views, clipping, group)
        # a clipper that fits looks for writes that PyTorch did not count before the noise
        (kept._watch or Watch(members)).check(members, thorough=not fits)
        if fits:
            return kept
    clipper = _KeptClipper(model, max_grad_norm, views, clipping=clipping, group=group)
    if isinstance(clipper.clipping, AdaptiveClipping):
        raise UserError(
            f"clipping={clipping!r} needs one GhostClipper for all steps, which keeps the bound between them"
        )
    return clipper


def ghost_dp_step(
    losses: Tensor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    views: int = 1,
    mask: Tensor | None = None,
    generator: NoiseSource | None = None,
    clipping: Clipping = "flat",
    group: Group = None,
) -> StepStats:
    """Make one private step with any optimizer, in place of `loss.mean().backward(); optimizer.step()`.

    losses [samples * views] is the model's loss, one number per sample and view. Arguments and errors are those of
    `GhostClipper`, its `accumulate` and its `privatize`; every check comes before anything changes. On several ranks the
    statistics returned are those of this rank's samples. Adaptive clipping is refused: its bound changes from step to step,
    which needs one `GhostClipper` for all steps.
    """
    sharded = hand_back_shards(model)
    clipper = _clipper_for(model, max_grad_norm, views, clipping, group)
    check_optimizer(optimizer, clipper.parameters)
    _check_privatize(noise_multiplier, expected_batch_size)
    samples, mask = check_losses(losses, clipper.views, mask)
    stats = clipper._add(losses, samples, mask, sharded)
    clipper.privatize(noise_multiplier, expected_batch_size, generator)
    optimizer.step()
    end_update(clipper)  # for optimizers that are not PyTorch's, which have no hook that calls it
    _kept[model] = clipper
    return stats


def _check_privatize(noise_multiplier: float, expected_batch_size: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise UserError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier!r}")
    if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise UserError(f"expected_batch_size must be positive and finite, got {expected_batch_size!r}")
