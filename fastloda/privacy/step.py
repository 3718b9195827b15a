"""The private step: one backward, norms, clip, sum, add noise once, divide by the expected batch size, optimizer step.

This is DP-SGD (Abadi et al. 2016) with book-keeping (Bu et al. 2023). Neighbouring data sets differ by adding or removing one
record. Before the noise, a record changes nothing but the clipped sum, by at most max_grad_norm in L2 norm; with adaptive
clipping a count as well, which is accounted for (`fastloda.privacy.adaptive`).
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.compute import check_losses, check_views, compute_per_sample_grads, in_full_precision
from fastloda.per_sample.fallback.functional import cover_modules
from fastloda.per_sample.looking_engine import look_at_backward
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import check_optimizer, trainable_parameters
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.clip import Clipping, clip_factors, clipping_style, group_norms, group_sums
from fastloda.privacy.noise import NoiseOver, NoiseSource, add_noise
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
from fastloda.privacy.watch import Watch, add_watcher, resume_after_update, watch_from_update, watched_since_update

look_at_backward()  # when imported, for a loss may use a gradient that was made before any clipper


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
        max_grad_norm: the bound on a sample's contribution; with adaptive clipping its start, and the attribute then moves.
        views: the number of losses per sample, averaged before clipping.
        clipping: "flat", "automatic", "per_layer", "adaptive", or one of them with its settings (`privacy/styles.py`).
        group: the process group of the ranks. None: the default group, if it is initialised; "alone": this process only.

    Raises:
        ValueError: max_grad_norm is not positive and finite, or views < 1, or clipping is unknown or does not fit the model.
        PrivacyError: nothing trains, or a layer mixes samples, or a wrapper handles gradients by itself (`check_wrappers`).
    """

    def __init__(
        self,
        model: nn.Module,
        max_grad_norm: float,
        views: int = 1,
        *,
        clipping: Clipping = "flat",
        group: Group = None,
    ):
        max_grad_norm = check_max_grad_norm(max_grad_norm)
        self.views = check_views(views)
        self._clipping = clipping_style(clipping)
        self.model = model
        self.group = group
        self._world = World.of(group)
        hand_back_shards(model)
        check_wrappers(model, self.world)
        members = Members.of(model)
        self.parameters = trainable_parameters(members)
        # layers without a rule get the slower one, from the next forward pass on
        cover_modules(members.modules, self.parameters)
        self._watch: Watch | None = Watch(members)  # None from the noise to the end of the update
        add_watcher(model, self)
        self._groups = self.clipping.groups(self.parameters)
        shares = self.clipping.shares(self._groups, max_grad_norm)
        device = next(iter(self.parameters.values())).device
        self._shares = torch.tensor(shares, dtype=torch.float64, device=device)[:, None]
        self._bound = self.clipping.bound_from(max_grad_norm)
        self.reset()

    @property
    def clipping(self) -> Flat:
        """The style of clipping. It is fixed, for the noise, the groups and the bound all follow from it."""
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
        self._sums = FlatSums(self.parameters)  # anew, for the model may have been moved or cast
        self._has_sums = False
        self._bound.forget()
        self._stats = StepStats.none(self._shares.device)

    def accumulate(self, losses: Tensor, mask: Tensor | None = None) -> StepStats:
        """Add the clipped gradients of a micro-batch. Runs losses' only backward pass and frees its graph.

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

    def check_model(self) -> None:
        """Refuse the model if other parameters train than when the clipper was made, or if a pass over records wrote to it.

        Raises:
            ValueError: other parameters train.
            PrivacyError: a parameter or buffer changed.
        """
        members = Members.of(self.model)
        now = trainable_parameters(members)
        if now.keys() != self.parameters.keys() or any(now[name] is not p for name, p in self.parameters.items()):
            raise UserError("the model's trainable parameters changed since GhostClipper was made: make a new one")
        self._watch = self._watch or Watch(members)  # only PyTorch's optimizers show where an update ends
        self._watch.check(members, thorough=False)  # uncounted writes are looked for once, before the noise

    def _add(self, losses: Tensor, samples: int, mask: Tensor, sharded: bool) -> StepStats:
        """Do the work of `accumulate`, without `check_model`."""
        if not samples:  # an empty Poisson batch adds nothing; its noise comes in privatize
            check_not_sharded(sharded)
            return StepStats.none(losses.device)
        with in_full_precision(losses.device):
            world = self.world if sharded else World()
            grads = compute_per_sample_grads(losses, self.model, self.parameters, samples, world.most)
            norms, bounds = group_norms(grads, self._groups, samples, losses.device), self._shares * self.max_grad_norm
            factors = clip_factors(norms, bounds, mask, self.clipping)
            self._has_sums = True
            self._sums.add_(group_sums(grads, self._groups, factors))
            self._bound.observe(norms[0], mask)
        stats = StepStats.of(losses, norms, mask, bounds)
        self._stats += stats
        return stats

    def privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: NoiseSource | NoiseOver | None = None
    ) -> None:
        """Set .grad = (clipped sum + N(0, (noise_multiplier max_grad_norm)^2)) / expected_batch_size, and start anew.

        With adaptive clipping the gradient's noise is larger, by what the step's other release costs, and max_grad_norm moves.

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
            self._watch.check(Members.of(self.model))  # backward may have written, too
        std = self.clipping.gradient_noise(noise_multiplier, expected_batch_size) * self.max_grad_norm
        sums = world.sum_to_first(self._sums.buffers)
        if callable(generator):
            source = cast(NoiseOver, generator)([*sums.values(), *self._bound.observed(world)])
        else:
            source = generator
        noise = std if world.first else 0.0  # the other ranks copy the first one's mean
        noisy = {alike: add_noise(total, noise, source) for alike, total in sums.items()}
        means = {alike: (total / expected_batch_size).to(alike[1]) for alike, total in noisy.items()}
        world.copy_from_first(list(means.values()))
        self._bound.move(noise_multiplier, expected_batch_size, world, source)
        self._hand_over(means)

    def _hand_over(self, means: dict[Alike, Tensor]) -> None:
        """Put the noisy means into `.grad`, and let the optimizer write to the parameters."""
        for name, grad in self._sums.parted(means).items():
            self.parameters[name].grad = grad
        stats = self._stats
        self.reset()
        self._watch = None
        resume_after_update(self)
        stats.warn_if_wasted(stacklevel=3)  # at the end, for it waits for the GPU

    def watch(self) -> None:
        """Take the model as it is now: from now until the noise is added nothing in it may change."""
        self._watch = Watch(Members.of(self.model))

    def _facts(self, noise_multiplier: float, expected_batch_size: float) -> dict[str, object]:
        """List the facts on which all ranks must agree."""
        arguments = {
            "max_grad_norm": self.max_grad_norm,
            "views": self.views,
            "clipping": self.clipping,
            "noise_multiplier": noise_multiplier,
            "expected_batch_size": expected_batch_size,
        }
        return arguments | parameter_facts(self.parameters) | value_facts(self.parameters)


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
    statistics returned are of this rank's samples. Adaptive clipping is refused: its bound moves from step to step, and needs
    one `GhostClipper` for all of them.
    """
    watched_since_update(model, Members.of(model))
    clipper = GhostClipper(model, max_grad_norm, views, clipping=clipping, group=group)
    if isinstance(clipper.clipping, AdaptiveClipping):
        raise UserError(
            f"clipping={clipping!r} needs one GhostClipper for all steps, which keeps the bound between them"
        )
    check_optimizer(optimizer, clipper.parameters)
    _check_privatize(noise_multiplier, expected_batch_size)
    samples, mask = check_losses(losses, clipper.views, mask)
    stats = clipper._add(losses, samples, mask, hand_back_shards(model))  # the new clipper need not check its model
    clipper.privatize(noise_multiplier, expected_batch_size, generator)
    del clipper  # or it would go on to watch the model
    optimizer.step()
    watch_from_update(model)
    return stats


def _check_privatize(noise_multiplier: float, expected_batch_size: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise UserError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier!r}")
    if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise UserError(f"expected_batch_size must be positive and finite, got {expected_batch_size!r}")
